"""A Transformer that translates: encoder and decoder, all parameters shared by all languages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from .corpus import END, PAD, START


@dataclass(frozen=True)
class Size:
    """Of a model.

    Attributes:
        width: of the embeddings and blocks.
        inner: of the feed-forward layers.
        layers: blocks of the encoder, and of the decoder.
        heads: of attention.
        dropout: probability.
    """

    width: int
    inner: int
    layers: int
    heads: int
    dropout: float = 0.1


class Memory(NamedTuple):
    """What the decoder looks at: keys and values ``[B, heads, S, d]`` of each block, and where it may look."""

    blocks: list[tuple[Tensor, Tensor]]
    mask: Tensor


class Attention(nn.Module):
    """Attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``[B, T, width]``, and keys and values ``[B, heads, S, d]`` → ``[B, T, width]``."""
        found = scaled_dot_product_attention(self._apart(self.query(x)), keys, values, attn_mask=mask, is_causal=causal)
        return self.output(found.transpose(1, 2).flatten(2))

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, width]`` → keys and values ``[B, heads, S, d]``."""
        return self._apart(self.key(x)), self._apart(self.value(x))

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, attention to the encoder if ``crosses``, feed-forward; normalised ahead of each."""

    def __init__(self, size: Size, crosses: bool) -> None:
        super().__init__()
        self.attention = Attention(size.width, size.heads)
        self.attention_norm = nn.LayerNorm(size.width)
        if crosses:
            self.cross = Attention(size.width, size.heads)
            self.cross_norm = nn.LayerNorm(size.width)
        self.feed = nn.Sequential(nn.Linear(size.width, size.inner), nn.ReLU(), nn.Linear(size.inner, size.width))
        self.feed_norm = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(size.dropout)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, width]`` → ``[B, S, width]``."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, *self.attention.remember(y), mask))
        return x + self.dropout(self.feed(self.feed_norm(x)))

    def decode(
        self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``[B, T, width]`` → ``[B, T, width]``, and the keys and values of all symbols so far."""
        y = self.attention_norm(x)
        keys, values = self.attention.remember(y)
        if past is not None:  # one more symbol, which may look at all before it
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.dropout(self.attention(y, keys, values, causal=past is None))
        x = x + self.dropout(self.cross(self.cross_norm(x), *memory, mask))
        return x + self.dropout(self.feed(self.feed_norm(x))), (keys, values)


class Translator(nn.Module):
    """Encoder and decoder, each a ``ModuleList`` of blocks, so that ``groups="layer"`` gives a surgery group per block.

    One matrix serves as the embedding of both sides and as the output layer.

    Args:
        symbols: size ``V`` of the vocabulary.
        size: of the model.
        longest: most symbols on a side.
    """

    positions: Tensor

    def __init__(self, symbols: int, size: Size, longest: int = 128) -> None:
        super().__init__()
        self.longest = longest
        self.embedding = nn.Embedding(symbols, size.width)
        self.encoder = nn.ModuleList(Block(size, crosses=False) for _ in range(size.layers))
        self.encoder_norm = nn.LayerNorm(size.width)
        self.decoder = nn.ModuleList(Block(size, crosses=True) for _ in range(size.layers))
        self.decoder_norm = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(size.dropout)
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.startswith("embedding"):
                nn.init.xavier_uniform_(parameter)
        self.register_buffer("positions", _sinusoids(longest, size.width), persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Source ``[B, S]`` and the target so far ``[B, T]`` → scores of the next symbol everywhere, ``[B, T, V]``."""
        memory = self.encode(source)
        x = self._embed(target)
        for block, remembered in zip(self.decoder, memory.blocks, strict=True):
            x, _ = block.decode(x, remembered, memory.mask)  # padding comes last, and nothing looks ahead
        return self._scores(x)

    def encode(self, source: Tensor) -> Memory:
        """``[B, S]`` → what the decoder looks at."""
        mask = (source != PAD)[:, None, None]
        x = self._embed(source)
        for block in self.encoder:
            x = block.encode(x, mask)
        x = self.encoder_norm(x)
        return Memory([block.cross.remember(x) for block in self.decoder], mask)

    @torch.no_grad()
    def translate(self, source: Tensor) -> Tensor:
        """Greedy decoding: ``[B, S]`` → ``[B, T]``, without the start symbol, padded after the end.

        At most half as long again as the longest source, and ten symbols more.
        """
        memory = self.encode(source)
        symbol = source.new_full((len(source), 1), START)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        pasts: list[tuple[Tensor, Tensor] | None] = [None] * len(self.decoder)
        found = []
        for at in range(min(self.longest, source.shape[1] * 3 // 2 + 10)):
            x = self._embed(symbol, at)
            for n, block in enumerate(self.decoder):
                x, pasts[n] = block.decode(x, memory.blocks[n], memory.mask, pasts[n])
            symbol = self._scores(x[:, -1:]).argmax(-1).masked_fill(done[:, None], PAD)
            found.append(symbol)
            done |= symbol[:, 0] == END
            if done.all():
                break
        return torch.cat(found, 1)

    def _embed(self, ids: Tensor, start: int = 0) -> Tensor:
        scaled = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scaled + self.positions[start : start + ids.shape[1]])

    def _scores(self, x: Tensor) -> Tensor:
        return linear(self.decoder_norm(x), self.embedding.weight)


SIZES = {
    "tiny": Size(width=128, inner=512, layers=2, heads=4),
    "small": Size(width=256, inner=1024, layers=4, heads=4),
    "big": Size(width=1024, inner=8192, layers=6, heads=16),
}
"""``big`` is a Transformer-Big, as in the thesis; with 64k pieces, and one matrix for embeddings and output, it has 343M
parameters."""


def _sinusoids(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
