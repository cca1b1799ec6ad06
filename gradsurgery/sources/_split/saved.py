"""Reading what nodes keep for their backward pass more often than once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils import checkpoint


def keep_readable(node: Node) -> None:
    """Lets the node's saved tensors be read ahead of the engine, and still be there for it.

    That is so anyway, except inside ``torch.utils.checkpoint``, which hands each tensor that it recomputed out once, and
    then forgets it. Here it is forgotten when the node is.
    """
    for name in _names(node):
        raw = getattr(node, name, None)
        for saved in raw if isinstance(raw, (tuple, list)) else (raw,):
            holder = getattr(saved, "data", None) if isinstance(saved, torch._C._autograd.SavedTensor) else None
            if isinstance(holder, checkpoint._Holder) and not isinstance(holder.handles, _Lasting):
                holder.handles = _Lasting(holder.handles)


def freed(node: Any) -> bool:
    """Whether a tensor that the node keeps has no memory at present, as parameters that FSDP2 will gather again."""
    kept: list[Any] = [getattr(node, name.removeprefix("_raw"), None) for name in _names(node)]
    if isinstance(node, BackwardCFunction):
        kept = list(node.saved_tensors)
    tensors = [tensor for tensor in kept if isinstance(tensor, Tensor) and tensor.layout == torch.strided]
    return any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors)


class _Lasting(dict[Any, Any]):
    """Entries are not replaced by None."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if value is not None:
            super().__setitem__(key, value)


_raw_names: dict[str, list[str]] = {}  # of each kind of node, what it keeps


def _names(node: Node) -> list[str]:
    kind = node.name()
    if kind not in _raw_names:
        _raw_names[kind] = [name for name in dir(node) if name.startswith("_raw_saved_")]
    return _raw_names[kind]
