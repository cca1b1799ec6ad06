"""Per-task gradients of what several tasks share, at one node of the graph: the sum over the batch, cut between tasks.

A cut is a function of a :class:`Passage`, the gradients of its outputs, and the inputs that are wanted. It returns, for
each of them, a block ``[k, *shape]``: one gradient for each of the ``k`` tasks that are there, in increasing order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..._arena import new_block
from .flow import ELEMENTWISE
from .labels import Labels, Segments, Shape, across, full, others
from .passage import Passage, signed
from .probe import call, masked, present

New: TypeAlias = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


@dataclass(eq=False)
class Wanted:
    """An input of a node whose per-task gradients are wanted.

    Attributes:
        edge: which input.
        shape: of the input.
        target: the output of a node that is this input.
        real: whether the input is real.
        new: where memory for a block comes from.
    """

    edge: int
    shape: Shape
    target: tuple[Node, int]
    real: bool = True
    new: New = field(default=new_block)


Blocks: TypeAlias = dict[int, tuple[list[int], Tensor | list[Tensor]]]
"""For each input, the tasks, and a gradient for each of them: a block; or, with rows that are mostly zero, sparse ones."""

_CACHED = 1024
_segments: dict[bytes, Segments] = {}


def segments(labels: Labels) -> Segments:
    """The segments of labels ``[N]``. Those of one batch serve many nodes, and often the next batch."""
    key = labels.tobytes()
    found = _segments.get(key)
    if found is None:
        if len(_segments) >= _CACHED:
            _segments.clear()
        found = _segments[key] = Segments(labels)
    return found


def cut(passage: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks:
    """The blocks that are wanted."""
    if not present(passage.labels):
        return {}
    fast = CUTS.get(passage.name)
    blocks = fast(passage, gradients, wanted) if fast is not None and passage.labels[0] is not None else None
    return general(passage, gradients, wanted) if blocks is None else blocks


def general(passage: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks:
    """Right for every node: sends each task's gradients through it, one task after the other."""
    tasks = present(passage.labels)
    found: dict[int, list[Tensor]] = {w.edge: [] for w in wanted}
    reached: dict[int, list[int]] = {w.edge: [] for w in wanted}
    for task in tasks:
        sent = [
            None if labels is None or gradient is None else masked(gradient, labels, [task])
            for labels, gradient in zip(passage.labels, gradients, strict=True)
        ]
        products = call(passage.node, sent)
        for w in wanted:
            product = products[w.edge]
            if product is not None:
                found[w.edge].append(product if product.is_sparse else product.sum_to_size(w.shape))
                reached[w.edge].append(task)
    return {
        edge: (reached[edge], parts if all(part.is_sparse for part in parts) else torch.stack(parts))
        for edge, parts in found.items()
        if parts
    }


def split_labelled(tensor: Tensor, labels: Labels) -> tuple[list[int], Tensor]:
    """A block of a gradient whose every element belongs to one task."""
    tasks = present([labels])
    if not tasks:
        return [], tensor[:0]
    if len(tasks) == 1 and (labels >= 0).all():
        return tasks, tensor[None].clone()  # which may be what the engine goes on with, while blocks are added to
    return tasks, torch.stack([masked(tensor, labels, [task]) for task in tasks])


def summed(values: Tensor, labels: Labels, shape: Shape) -> tuple[list[int], Tensor]:
    """Values summed to ``shape``, as broadcasting has it, for each task apart."""
    extra = values.ndim - len(shape)
    over = [d for d in range(values.ndim) if d < extra or (shape[d - extra] == 1 and values.shape[d] != 1)]
    apart = [d for d, size in enumerate(labels.shape) if size != 1]
    if not set(apart) <= set(over):
        tasks = present([labels])
        return tasks, torch.stack([masked(values, labels, [task]).sum_to_size(shape) for task in tasks])
    if alike := [d for d in over if d not in apart]:
        values = values.sum(alike, keepdim=True)
    if not apart:
        block = values.reshape(1, *shape)
        return [int(labels.flat[0])], block if over else block.clone()  # as it is, the engine may go on with it
    found = segments(labels.reshape(-1))
    rows = values.movedim(apart, list(range(len(apart)))).reshape(labels.size, -1)
    return found.tasks, _row_sums(rows, found).reshape(len(found.tasks), *shape)


def _row_sums(rows: Tensor, found: Segments) -> Tensor:
    """``[N, D]`` → ``[k, D]``."""
    rows = found.sort(rows)
    if found.even:
        return rows.view(len(found.tasks), found.sizes[0], rows.shape[1]).sum(1)
    return torch.stack([rows[start:end].sum(0) for start, end in found.bounds])


def products(left: Tensor, right: Tensor, found: Segments, new: New = new_block) -> Tensor:
    """``[b, n, i]`` and ``[b, n, j]`` → ``[k, b, i, j]``: products over each task's part of the ``n`` rows."""
    left, right = found.sort(left, 1), found.sort(right, 1)
    b, _, i = left.shape
    j = right.shape[2]
    k = len(found.tasks)
    block = new((k, b, i, j), left.dtype, left.device)
    if b == 1 and found.even:
        size = found.sizes[0]
        torch.bmm(left.reshape(k, size, i).mT, right.reshape(k, size, j), out=block[:, 0])
        return block
    for t, (start, end) in enumerate(found.bounds):
        torch.bmm(left[:, start:end].mT, right[:, start:end], out=block[t])
    return block


# --- Cuts -------------------------------------------------------------------------------------------------------------


def _elementwise(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    # Nodes leave it to the engine to sum a gradient to its input's shape: called by hand, they return it as it is.
    found = call(p.node, gradients)
    result: Blocks = {}
    for w in wanted:
        values = found[w.edge]
        if values is None:
            continue
        if values.shape != p.outer[0]:
            return None
        result[w.edge] = summed(values, p.first, w.shape)
    return result


def _arithmetic(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    gradient = _there(gradients[0])
    result: Blocks = {}
    for w in wanted:
        values = _derivative(p, gradient, w.edge)
        if values is None:
            return _elementwise(p, gradients, wanted)
        values = values.real if w.real and values.is_complex() else values
        result[w.edge] = summed(values.expand(p.outer[0]), p.first, w.shape)
    return result


def _derivative(p: Passage, gradient: Tensor, edge: int) -> Any:
    """What arithmetic gives back to one of its operands, before it is summed to the operand's shape."""
    kind = p.node.name()
    if kind in ("AddBackward0", "SubBackward0"):
        factor: Any = 1 if edge == 0 else p.saved("alpha") if p.name == "Add" else -p.saved("alpha")
        return gradient if factor == 1 else gradient * factor
    if kind == "MulBackward0":
        factor = p.saved("self" if edge else "other").conj()
        return gradient * factor
    if kind == "DivBackward0":
        other = p.saved("other").conj()
        factor = -(p.saved("self").conj() / other / other) if edge else 1 / other
        return gradient * factor
    if kind == "PreluKernelBackward0" and edge == 1:
        return torch.where(p.saved("self") > 0, torch.zeros_like(gradient), p.saved("self") * gradient)
    return None


def _expand(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks:
    (w,) = wanted
    return {w.edge: summed(_there(gradients[0]), p.first, w.shape)}


_OPERANDS = {"Mm": ("self", "mat2"), "Bmm": ("self", "mat2"), "Addmm": ("mat1", "mat2"), "Baddbmm": ("batch1", "batch2")}


def _product(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    gradient, first = _there(gradients[0]), p.first
    adds = len(p.inner) == 3
    scale = p.saved("alpha") if adds else 1
    last = len(p.inner) - 1
    order: Segments | None = None
    if first.ndim == 2 and first.shape[1] == 1 and all(w.edge == last or w.shape[:-1] in ((), (1,)) for w in wanted):
        # A weight and its bias want the rows in order of their tasks: they are put so once for both.
        order = segments(np.ascontiguousarray(full(first, p.outer[0], [0])).reshape(-1))
        gradient = order.sort(gradient)
        first = order.labels[:, None]
    result: Blocks = {}
    for w in wanted:
        if adds and w.edge == 0:
            values = gradient if p.saved("beta") == 1 else gradient * p.saved("beta")
            result[w.edge] = summed(values, first, w.shape)
            continue
        is_right = w.edge == last
        dim = first.ndim - (2 if is_right else 1)
        labels = across(first, others(first, dim))
        if labels is None:
            return None
        found = segments(np.ascontiguousarray(full(labels, gradient.shape, [dim])).reshape(-1))
        other = p.saved(_OPERANDS[p.name][0 if is_right else 1]).conj()
        if order is not None and is_right:
            other = order.sort(other)
        # The gradient of a transposed weight is made in the weight's own layout.
        flip = first.ndim == 2 and w.target[0].name() == "TBackward0"
        if is_right:
            left, right = other, gradient
        else:
            left, right = gradient.mT, other.mT
        if flip:
            left, right = right, left
        block = products(left if left.ndim == 3 else left[None], right if right.ndim == 3 else right[None], found, w.new)
        block = block.mT if flip else block
        if scale != 1:
            block = block * scale
        result[w.edge] = found.tasks, block.reshape(len(found.tasks), *w.shape) if not flip else block[:, 0]
    return result


def _layer_norm(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    gradient, labels = _there(gradients[0]), p.labels[0]
    assert labels is not None
    if any(w.edge == 0 for w in wanted):
        return None
    result: Blocks = {}
    for w in wanted:
        values = gradient
        if w.edge == 1:
            values = (p.saved("input") - p.saved("result1")).mul_(p.saved("result2")).mul_(gradient)
        result[w.edge] = summed(values, labels, w.shape)
    return result


def _rms_norm(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    w, labels = wanted[0], p.labels[0]
    assert labels is not None
    if any(w.edge == 0 for w in wanted):
        return None
    return {w.edge: summed(p.saved("input") * p.saved("result1") * _there(gradients[0]), labels, w.shape)}


def _by_sample(p: Passage, tensors: Sequence[Tensor]) -> tuple[Segments, list[Tensor]] | None:
    """The tensors with their first dimension, the samples, in order of the tasks."""
    labels = across(p.first, others(p.first, 0))
    if labels is None:
        return None
    found = segments(np.ascontiguousarray(full(labels, p.outer[0], [0])).reshape(-1))
    return found, [found.sort(tensor) for tensor in tensors]


def _convolution(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    gradient, weight = _there(gradients[0]), p.saved("weight")
    sorted_ = _by_sample(p, [gradient, p.saved("input")])
    if sorted_ is None or any(w.edge == 0 for w in wanted):
        return None
    found, (g, x) = sorted_
    result: Blocks = {}
    for w in wanted:
        if w.edge == 2:
            result[2] = summed(gradient.movedim(1, -1), np.moveaxis(p.first, 1, -1), w.shape)
            continue
        block = w.new((len(found.tasks), *w.shape), weight.dtype, weight.device)
        for t, (start, end) in enumerate(found.bounds):
            block[t] = torch.ops.aten.convolution_backward(
                *(g[start:end], x[start:end], weight, None),
                *(p.saved("stride"), p.saved("padding"), p.saved("dilation"), p.saved("transposed")),
                *(p.saved("output_padding"), p.saved("groups"), [False, True, False]),
            )[1]
        result[w.edge] = found.tasks, block
    return result


def _group_norm(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    tensors = [_there(gradients[0]), p.saved("input"), p.saved("result1"), p.saved("result2")]
    sorted_ = _by_sample(p, tensors)
    if sorted_ is None or any(w.edge == 0 for w in wanted):
        return None
    found, tensors = sorted_
    mask = [False, any(w.edge == 1 for w in wanted), any(w.edge == 2 for w in wanted)]
    sizes = p.saved("C"), p.saved("HxW"), p.saved("group")
    parts = [
        torch.ops.aten.native_group_norm_backward(
            *(tensor[start:end].contiguous() for tensor in tensors), p.saved("weight"), end - start, *sizes, mask
        )
        for start, end in found.bounds
    ]
    return {w.edge: (found.tasks, torch.stack([part[w.edge] for part in parts])) for w in wanted}


def _embedding(p: Passage, gradients: Sequence[Tensor | None], wanted: Sequence[Wanted]) -> Blocks | None:
    (w,) = wanted
    labels = across(p.first, [p.first.ndim - 1])
    if p.saved("scale_grad_by_freq") or labels is None:
        return None
    gradient, indices = _there(gradients[0]), p.saved("indices")
    tasks = present([labels])
    number, width = w.shape
    # One table for each task, below each other; and a last row for what is padding, and for nobody's.
    place = np.full(max(tasks) + 2, len(tasks) * number, np.int64)  # the last entry is that of nobody, -1
    place[tasks] = np.arange(len(tasks)) * number
    first = torch.from_numpy(np.asarray(place[labels[..., 0]])).to(indices.device)
    last = len(tasks) * number
    index = torch.where(first == last, last, indices + first)
    padding = signed(p.saved("padding_idx"))
    if padding >= 0:
        index = torch.where(indices == padding, last, index)
    # Where tables are mostly empty, it pays to find the rows in use; but except on the CPU, that waits for the device.
    if not p.saved("sparse") and (index.device.type != "cpu" or 2 * index.numel() > last):
        table = torch.ops.aten.embedding_dense_backward(gradient, index, last + 1, last, False)
        return {w.edge: (tasks, table[:-1].view(len(tasks), number, width))}
    used, inverse = torch.unique(index, return_inverse=True)
    values = torch.ops.aten.embedding_dense_backward(gradient, inverse, len(used), -1, False)
    ends = torch.searchsorted(used, torch.arange(len(tasks) + 1, device=used.device) * number).tolist()
    rows = [
        torch.sparse_coo_tensor(
            (used[start:end] - t * number)[None], values[start:end], w.shape, is_coalesced=True, check_invariants=False
        )
        for t, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    return {w.edge: (tasks, rows)}


def _there(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


Cut: TypeAlias = Callable[[Passage, Sequence[Tensor | None], Sequence[Wanted]], "Blocks | None"]

CUTS: dict[str, Cut] = {
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "PreluKernel"), _arithmetic),
    **dict.fromkeys(_OPERANDS, _product),
    "Expand": _expand,
    "NativeLayerNorm": _layer_norm,
    "FusedRmsNorm": _rms_norm,
    "Convolution": _convolution,
    "NativeGroupNorm": _group_norm,
    "Embedding": _embedding,
}
