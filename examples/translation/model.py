"""A small Transformer that translates characters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .data import END, LONGEST, PAD, START


class Translator(nn.Module):
    """Encoder and decoder, each a ``ModuleList`` of blocks, so that ``groups="layer"`` gives a surgery group per block.

    Args:
        symbols: size ``V`` of the vocabulary that both sides share.
        width: of the embeddings and blocks.
        layers: blocks of the encoder, and of the decoder.
        heads: of attention.
        dropout: probability.
    """

    positions: Tensor

    def __init__(self, symbols: int, width: int = 96, layers: int = 3, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        options = {"dim_feedforward": 2 * width, "dropout": dropout, "batch_first": True}
        self.embedding = nn.Embedding(symbols, width, padding_idx=PAD)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **options) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(width, heads, **options) for _ in range(layers))
        self.output = nn.Linear(width, symbols)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.register_buffer("positions", _sinusoids(LONGEST + 2, width), persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Source ``[B, S]`` and the target so far ``[B, T]`` → scores of the next symbol everywhere, ``[B, T, V]``."""
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S]`` → what the decoder looks at, ``[B, S, width]``, and where that is padding, ``[B, S]``."""
        padding = source == PAD
        hidden = self._embed(source)
        for block in self.encoder:
            hidden = block(hidden, src_key_padding_mask=padding)
        return hidden, padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """``[B, T]`` → ``[B, T, V]``. Padding in the target needs no mask: it comes last, and nothing looks ahead."""
        length = target.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        hidden = self._embed(target)
        for block in self.decoder:
            hidden = block(hidden, memory, tgt_mask=ahead, memory_key_padding_mask=padding, tgt_is_causal=True)
        return self.output(hidden)

    @torch.no_grad()
    def translate(self, source: Tensor) -> Tensor:
        """Greedy decoding: ``[B, S]`` → ``[B, T]``, without the start symbol, padded after the end."""
        memory, padding = self.encode(source)
        target = torch.full((len(source), 1), START)
        done = torch.zeros(len(source), dtype=torch.bool)
        while target.shape[1] <= LONGEST + 1 and not done.all():
            symbol = self.decode(target, memory, padding)[:, -1].argmax(-1).masked_fill(done, PAD)
            target = torch.cat([target, symbol[:, None]], 1)
            done |= symbol == END
        return target[:, 1:]

    def _embed(self, ids: Tensor) -> Tensor:
        scaled = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scaled + self.positions[: ids.shape[1]])


def _sinusoids(length: int, width: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
