"""How labels pass through the nodes of an autograd graph, from a node's outputs to its inputs.

A rule is a function of a :class:`Passage`; it returns a flow for each input of the node, or None if it does not know.
What no rule knows is found out by :func:`probed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from .labels import (
    NOBODY,
    SHARED,
    Flow,
    Labels,
    Shape,
    Unknown,
    across,
    compact,
    constant,
    full,
    merge,
    others,
    reduced,
    reshaped,
    scattered,
)
from .passage import Passage, signed
from .probe import probed

Rule: TypeAlias = Callable[[Passage], "Sequence[Flow] | None"]


class Interaction(Exception):
    """Samples of different tasks reach each other: what does it, and what to do about it."""


def flows(passage: Passage) -> Sequence[Flow]:
    """What arrives at each of the node's inputs."""
    if 0 in prod_sizes(passage):
        return [None] * len(passage.inner)
    rule = RULES.get(passage.name)
    try:
        found = rule(passage) if rule is not None else None
    except (AttributeError, Unknown):  # another release of PyTorch may keep other attributes
        found = None
    if found is None:
        found = probed(passage)
    return [None if shape is None else flow for shape, flow in zip(passage.inner, found, strict=True)]


def prod_sizes(passage: Passage) -> list[int]:
    """Numbers of elements of the outputs that a gradient arrives at."""
    return [prod(shape) for shape, labels in zip(passage.outer, passage.labels, strict=True) if labels is not None]


# --- Rules ------------------------------------------------------------------------------------------------------------


def _elementwise(p: Passage) -> Sequence[Flow] | None:
    """Arithmetic, with broadcasting."""
    if not p.single:
        return None
    labels, outer = p.labels[0], p.outer[0]
    assert labels is not None
    for shape in p.inner:
        if shape is not None and (
            len(shape) > len(outer) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(outer), strict=False))
        ):
            return None
    return [None if shape is None else reduced(labels, shape) for shape in p.inner]


def _same(p: Passage) -> Sequence[Flow] | None:
    """An input of the shape of the output, element by element."""
    return [p.labels[0]] if p.single and list(p.inner) == [p.outer[0]] else None


def _view(p: Passage) -> Sequence[Flow] | None:
    (shape,) = p.inner
    return [reshaped(p.first, p.outer[0], shape)] if shape is not None else [None]


def _t(p: Passage) -> Sequence[Flow]:
    return [p.first.T]


def _transpose(p: Passage) -> Sequence[Flow]:
    ndim = p.first.ndim
    return [np.swapaxes(p.first, signed(p.saved("dim0")) % ndim, signed(p.saved("dim1")) % ndim) if ndim else p.first]


def _permute(p: Passage) -> Sequence[Flow]:
    return [np.transpose(p.first, np.argsort(p.dims("dims", p.first.ndim))) if p.first.ndim else p.first]


def _expand(p: Passage) -> Sequence[Flow]:
    (shape,) = p.inner
    return [None if shape is None else reduced(p.first, shape)]


def _repeat(p: Passage) -> Sequence[Flow] | None:
    (shape,) = p.inner
    repeats = tuple(p.saved("repeats"))
    if shape is None:
        return [None]
    shape = (1,) * (len(repeats) - len(shape)) + shape
    pairs = tuple(n for pair in zip(repeats, shape, strict=True) for n in pair)
    apart = across(reshaped(p.first, p.outer[0], pairs), range(0, len(pairs), 2))
    if apart is None:
        return [SHARED]
    return [reduced(apart.reshape(apart.shape[1::2]), shape[len(shape) - len(p.inner[0] or ()) :])]


def _select(p: Passage) -> Sequence[Flow]:
    (shape,) = p.inner
    if shape is None:
        return [None]
    dim, index = signed(p.saved("dim")) % len(shape), signed(p.saved("index"))
    return [_placed(np.expand_dims(p.first, dim), dim, slice(index, index + 1 or None), shape)]


def _slice(p: Passage) -> Sequence[Flow]:
    (shape,) = p.inner
    if shape is None:
        return [None]
    dim = signed(p.saved("dim")) % len(shape)
    if p.outer[0][dim] == shape[dim]:
        return [p.first]
    return [_placed(p.first, dim, slice(signed(p.saved("start")), signed(p.saved("end")), p.saved("step")), shape)]


def _placed(labels: Labels, dim: int, where: slice, shape: Shape) -> Labels:
    """Labels of a tensor of which these are a slice. Nobody has the rest."""
    result = np.full([*labels.shape[:dim], shape[dim], *labels.shape[dim + 1 :]], NOBODY, np.int32)
    result[(slice(None),) * dim + (where,)] = labels
    return result


def _split(p: Passage) -> Sequence[Flow]:
    dim = signed(p.saved("dim")) % len(p.outer[0])
    return [_joined(p, dim)]


def _joined(p: Passage, dim: int) -> Labels:
    there = [labels for labels in p.labels if labels is not None]
    alike = all(np.array_equal(labels, there[0]) for labels in there[1:])
    if len(there) == len(p.labels) and alike and there[0].shape[dim] == 1:
        return there[0]
    wide = np.broadcast_shapes(*((*labels.shape[:dim], 1, *labels.shape[dim + 1 :]) for labels in there))
    parts = []
    for labels, shape in zip(p.labels, p.outer, strict=True):
        part = constant(NOBODY, len(shape)) if labels is None else labels
        parts.append(np.broadcast_to(part, (*wide[:dim], shape[dim], *wide[dim + 1 :])))
    return np.concatenate(parts, dim)


def _unbind(p: Passage) -> Sequence[Flow]:
    dim = signed(p.saved("dim")) % (len(p.outer[0]) + 1)
    apart = [None if labels is None else np.expand_dims(labels, dim) for labels in p.labels]
    return [_joined(Passage(p.node, p.name, apart, [(*s[:dim], 1, *s[dim:]) for s in p.outer], p.inner), dim)]


def _cat(p: Passage) -> Sequence[Flow] | None:
    outer = p.outer[0]
    dim = signed(p.saved("dim")) % len(outer)
    labels = p.first
    if labels.shape[dim] == 1:
        return [labels] * len(p.inner)
    unknown = [i for i, shape in enumerate(p.inner) if shape is None]
    sizes = [0 if shape is None else shape[dim] if len(shape) == len(outer) else 0 for shape in p.inner]
    if len(unknown) == 1:
        sizes[unknown[0]] = outer[dim] - sum(sizes)
    elif unknown:
        return None
    result: list[Flow] = []
    start = 0
    for size in sizes:
        result.append(compact(labels.take(range(start, start + size), dim), [dim]) if size else None)
        start += size
    return result


def _stack(p: Passage) -> Sequence[Flow]:
    dim = signed(p.saved("dim")) % len(p.outer[0])
    if p.first.shape[dim] == 1:
        return [np.squeeze(p.first, dim)] * len(p.inner)
    return [compact(p.first.take([i], dim).squeeze(dim)) for i in range(len(p.inner))]


def _index(p: Passage) -> Sequence[Flow] | None:
    (shape,) = p.inner
    if shape is None:
        return [None]
    indices = list(p.saved("indices"))
    key: list[Any] = []
    dims: list[int] = []
    for index in indices:
        if index is None:
            key.append(slice(None))
            continue
        array = index.detach().cpu().numpy()
        dims += range(len(key), len(key) + (array.ndim if array.dtype == bool else 1))
        key.append(array)
        if array.dtype == bool and array.ndim > 1:
            return None if len(indices) > 1 else [scattered(p.first, (array,), shape, dims)]
    return [scattered(p.first, tuple(key), shape, dims)]


def _index_select(p: Passage) -> Sequence[Flow]:
    (shape,) = p.inner
    if shape is None:
        return [None]
    dim = signed(p.saved("dim")) % len(shape)
    key = (slice(None),) * dim + (_numbers(p.saved("index")),)
    return [scattered(p.first, key, shape, [dim])]


def _index_put(p: Passage) -> Sequence[Flow] | None:
    indices = p.saved("indices")
    keys = tuple(slice(None) if index is None else index.detach().cpu().numpy() for index in indices)
    if len(p.inner) != 2:
        return None
    dims = [dim for dim, key in enumerate(keys) if not isinstance(key, slice)]
    if any(not isinstance(key, slice) and key.dtype == bool and key.ndim > 1 for key in keys):
        return None
    picked = full(p.first, p.outer[0], dims)[keys]
    return [p.first, None if p.inner[1] is None else reduced(compact(picked), p.inner[1])]


def _index_add(p: Passage) -> Sequence[Flow]:
    dim = signed(p.saved("dim")) % max(len(p.outer[0]), 1)
    labels = p.first
    if labels.shape[dim] != 1:
        labels = compact(labels.take(_numbers(p.saved("index")), dim), [dim])
    return [p.first, labels]


def _reduction(p: Passage) -> Sequence[Flow] | None:
    """A sum, say: what was reduced belongs to whoever the result belongs to."""
    (shape,) = p.inner
    if shape is None:
        return [None]
    labels = p.first
    if labels.ndim == len(shape):
        return [labels]
    if hasattr(p.node, "_saved_dim"):
        return [np.expand_dims(labels, tuple(p.dims("dim", len(shape))))]
    return [labels.reshape((1,) * len(shape))] if labels.size == 1 else None


def _along(p: Passage) -> Sequence[Flow] | None:
    """Something that mixes elements along dimensions, such as softmax, to a tensor that has the other sizes unchanged."""
    name = next((n for n in ("dim", "dims", "dimension") if hasattr(p.node, f"_saved_{n}")), None)
    outer = p.outer[0]
    if name is None or len([shape for shape in p.inner if shape is not None]) != 1:
        return None
    dims = p.dims(name, len(outer))
    labels = across(p.first, dims)
    if labels is None:
        return None
    result: list[Flow] = []
    for shape in p.inner:
        if shape is None:
            result.append(None)
            continue
        if len(shape) != len(outer):
            return None
        if any(a != b for i, (a, b) in enumerate(zip(shape, outer, strict=True)) if i not in dims):
            return None
        result.append(labels)
    return result


def _batch_first(p: Passage) -> Sequence[Flow] | None:
    """Something that mixes elements of all dimensions but the first: pooling, padding, resampling."""
    labels = across(p.first, others(p.first, 0))
    if not p.single or labels is None:
        return None
    result: list[Flow] = []
    for shape in p.inner:
        if shape is None:
            result.append(None)
        elif labels.size == 1:
            result.append(labels.reshape((1,) * len(shape)))
        elif shape and shape[0] == p.outer[0][0]:
            result.append(labels.reshape((-1,) + (1,) * (len(shape) - 1)))
        else:
            return None
    return result


def _pad(p: Passage) -> Sequence[Flow] | None:
    labels = across(p.first, range(p.first.ndim - len(p.saved("pad")) // 2, p.first.ndim))
    return None if labels is None else [labels]


def _convolution(p: Passage) -> Sequence[Flow] | None:
    labels = across(p.first, others(p.first, 0))
    return None if labels is None else [labels, SHARED, SHARED]


def _normalised(p: Passage) -> Sequence[Flow] | None:
    """Layer and RMS norm: over the last dimensions."""
    if p.labels[0] is None:
        return None
    ndim = p.labels[0].ndim
    labels = across(p.labels[0], range(ndim - len(p.saved("normalized_shape")), ndim))
    return None if labels is None else [labels, *[SHARED] * (len(p.inner) - 1)]


def _group_norm(p: Passage) -> Sequence[Flow] | None:
    labels = across(p.first, others(p.first, 0)) if p.single else None
    return None if labels is None else [labels, SHARED, SHARED]


def _batch_norm(p: Passage) -> Sequence[Flow] | None:
    labels = p.first
    channels = p.outer[0][1]
    if p.saved("training"):
        same = across(labels, others(labels, 1))
        if same is None:
            raise Interaction(
                "batch normalisation in training mode mixes the samples of the batch",
                "put these layers into evaluation mode (module.eval()), or use GroupNorm or LayerNorm instead",
            )
        labels = same
    affine = reduced(np.moveaxis(labels, 1, -1), (channels,))
    return [labels, affine, affine][: len(p.inner)]


def _mm(p: Passage) -> Sequence[Flow]:
    return _product(p.first)


def _addmm(p: Passage) -> Sequence[Flow] | None:
    if p.inner[0] is not None and len(p.inner[0]) > len(p.outer[0]):
        return None
    added = None if p.inner[0] is None else reduced(p.first, p.inner[0])
    return [added, *_product(p.first)]


def _product(labels: Labels) -> list[Flow]:
    """``[..., n, m]`` as the product of ``[..., n, k]`` and ``[..., k, m]``."""
    left, right = across(labels, [labels.ndim - 1]), across(labels, [labels.ndim - 2])
    return [SHARED if left is None else left, SHARED if right is None else right]


def _attention(p: Passage) -> Sequence[Flow] | None:
    labels = None if p.labels[0] is None else across(p.labels[0], [2, 3])
    if labels is None:
        return None
    result: list[Flow] = []
    for i, shape in enumerate(p.inner):
        if shape is None:
            result.append(None)
        elif i >= 3:
            result.append(reduced(labels, shape))
        elif any(size != 1 and shape[dim] != size for dim, size in enumerate(labels.shape)):
            return None
        else:
            result.append(labels)
    return result


def _nll_loss(p: Passage) -> Sequence[Flow] | None:
    shape = p.inner[0]
    if shape is None:
        return None
    if len(shape) == p.first.ndim + 1:
        return [np.expand_dims(p.first, min(1, p.first.ndim))]
    return [p.first.reshape((1,) * len(shape))] if p.first.size == 1 else None


def _handed_on(p: Passage) -> Sequence[Flow] | None:
    """What FSDP2 puts around a module's inputs to know when its backward pass is over. Not to be tried out."""
    return p.labels if len(p.labels) == len(p.inner) else None


def _embedding(p: Passage) -> Sequence[Flow]:
    return [SHARED]


def _rnn_layer(p: Passage) -> Sequence[Flow] | None:
    """A fused recurrent layer ``[T, B, ...]``: its input, four weights, and two initial states ``[B, ...]``."""
    if p.saved("batch_first") or len(p.inner) != 7:
        return None
    found: Flow = None
    for labels in p.labels:
        if labels is not None:
            per_sample = across(labels, others(labels, labels.ndim - 2))
            if per_sample is None:
                return None
            found = merge(found, per_sample.reshape(1, -1, 1))
    if not isinstance(found, np.ndarray):
        return None
    states = [None if shape is None else found.reshape((-1, 1) if len(shape) == 2 else (1, -1, 1)) for shape in p.inner]
    return [found, SHARED, SHARED, SHARED, SHARED, states[5], states[6]]


def _numbers(index: Tensor) -> Any:
    return np.atleast_1d(index.detach().cpu().numpy())


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


# Names of ATen's functions, which change rarely. A name that is missing here costs time, and is never wrong.
ELEMENTWISE = """
Abs Acos Acosh Add Addcdiv Addcmul Asin Asinh Atan Atan2 Atanh BinaryCrossEntropy BinaryCrossEntropyWithLogits Ceil
Celu Clamp ClampMax ClampMin Clone Conj Copysign Cos Cosh Digamma Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmod
Gelu Hardshrink Hardsigmoid Hardswish Hardtanh HuberLoss Hypot LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 Logaddexp
Logaddexp2 Logit LogSigmoid MaskedFill Maximum Minimum Mish MseLoss Mul NativeDropout FusedDropout NanToNum Neg Polar
Pow PreluKernel Reciprocal Relu Relu6 Remainder Round RreluWithNoise Rsqrt Rsub Selu Sgn Sigmoid Sign Silu Sin Sinc
Sinh SmoothL1Loss Softplus Softshrink SoftMarginLoss Sqrt Square Sub Tan Tanh Threshold ToCopy Tril Triu Trunc Where
Xlogy
"""
RULES: dict[str, Rule] = _table(
    (_elementwise, ELEMENTWISE),
    (_same, "Alias Detach Contiguous Copy Real Imag ViewAsRealCopy Fill Lift"),
    (_view, "View UnsafeView Reshape ReshapeAlias Squeeze Unsqueeze Flatten Unflatten"),
    (_t, "T"),
    (_transpose, "Transpose Swapaxes"),
    (_permute, "Permute Movedim"),
    (_expand, "Expand"),
    (_repeat, "Repeat"),
    (_select, "Select"),
    (_slice, "Slice"),
    (_split, "Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Chunk"),
    (_unbind, "Unbind"),
    (_cat, "Cat"),
    (_stack, "Stack"),
    (_index, "Index UnsafeIndex"),
    (_index_select, "IndexSelect"),
    (_index_put, "IndexPut IndexPutImpl UnsafeIndexPut"),
    (_index_add, "IndexAdd"),
    (_reduction, "Sum Mean Nansum Var Std Amax Amin Logsumexp LinalgVectorNorm Norm Max Min Median Mode Prod Kthvalue"),
    (_along, "Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Logcumsumexp Flip Roll Sort Topk Glu Gather"),
    (
        _batch_first,
        "MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D "
        "AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ReflectionPad1D ReflectionPad2D "
        "ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D PixelShuffle PixelUnshuffle Im2Col Col2Im",
    ),
    (_pad, "ConstantPadNd"),
    (_convolution, "Convolution"),
    (_normalised, "NativeLayerNorm FusedRmsNorm"),
    (_group_norm, "NativeGroupNorm"),
    (_batch_norm, "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm"),
    (_mm, "Mm Bmm"),
    (_addmm, "Addmm Baddbmm"),
    (
        _attention,
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention",
    ),
    (_nll_loss, "NllLoss NllLoss2D"),
    (_embedding, "Embedding"),
    (_rnn_layer, "MkldnnRnnLayer"),
    (_handed_on, "RegisterPostBackwardFunction"),
)
