"""Whose an element of a gradient is: labels, their way through nodes, segments, and the memory for rows."""

import mmap
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from gradsurgery._arena import Arena, new_block
from gradsurgery.sources._split.cuts import CUTS, Wanted, cut, general
from gradsurgery.sources._split.flow import ELEMENTWISE, RULES, Interaction
from gradsurgery.sources._split.labels import (
    NOBODY,
    SHARED,
    Segments,
    Shared,
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
from gradsurgery.sources._split.passage import Passage, kind
from gradsurgery.sources._split.probe import present, probed

quick = settings(deadline=None, max_examples=80)

# --- Labels -----------------------------------------------------------------------------------------------------------
# The naive versions work on labels that have the tensor's shape.

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def labels_of(draw, shape):
    """Labels of a tensor, of size one along some of its dimensions."""
    narrow = tuple(draw(st.sampled_from([1, size])) for size in shape)
    values = draw(st.lists(st.integers(NOBODY, 2), min_size=prod(narrow), max_size=prod(narrow)), label="labels")
    return np.array(values, np.int32).reshape(narrow)


@st.composite
def some_labels(draw):
    """A shape, and labels."""
    shape = draw(shapes)
    return shape, draw(labels_of(shape))


@st.composite
def views(draw):
    """Two shapes of as many elements."""
    factors = draw(st.lists(st.integers(1, 3), max_size=5))

    def grouped():
        ends = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        parts = [factors[a:b] for a, b in zip([0, *ends], [*ends, len(factors)], strict=True)]
        return tuple(prod(part) for part in parts if part or draw(st.booleans()))

    return grouped(), grouped()


def owner(group):
    """The only task of some elements: None if there are several, NOBODY if there is none."""
    found = set(np.unique(group)) - {NOBODY}
    return None if len(found) > 1 else found.pop() if found else NOBODY


def whole(flow, shape):
    return flow if flow is None or isinstance(flow, Shared) else np.broadcast_to(flow, shape)


def check_same_flow(found, expected, shape):
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.ndim == len(shape)
        assert np.array_equal(whole(found, shape), expected)
    else:
        assert found is expected


@quick
@given(some_labels(), st.data())
def test_compact(some, data):
    shape, labels = some
    dims = data.draw(st.none() | st.lists(st.sampled_from(range(len(shape))), unique=True) if shape else st.none())
    found = compact(labels, dims)
    assert np.array_equal(whole(found, shape), whole(labels, shape))
    for dim in range(len(shape)):
        alike = (labels == labels.take([0], dim)).all()
        assert found.shape[dim] == (1 if alike and (dims is None or dim in dims) else labels.shape[dim])


@quick
@given(some_labels(), st.data())
def test_across(some, data):
    shape, labels = some
    dims = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True) if shape else st.just([]))
    everything = whole(labels, shape)
    lines = np.moveaxis(everything, dims, list(range(len(dims)))).reshape(
        -1, prod(n for d, n in enumerate(shape) if d not in dims)
    )
    owners = [owner(line) for line in lines.T]
    if None in owners:
        assert across(labels, dims) is None
        return
    found = across(labels, dims)
    assert all(found.shape[dim] == 1 for dim in dims)
    kept = np.array(owners, np.int32).reshape([1 if d in dims else n for d, n in enumerate(shape)])
    assert np.array_equal(whole(found, kept.shape), kept)


def test_others():
    assert others(np.zeros((2, 3, 4, 5), np.int32), 1, 3) == [0, 2]


@quick
@given(some_labels())
def test_full(some):
    shape, labels = some
    dims = range(0, len(shape), 2)
    found = full(labels, shape, dims)
    assert found.shape == tuple(n if d in dims else labels.shape[d] for d, n in enumerate(shape))
    assert np.array_equal(whole(found, shape), whole(labels, shape))


@quick
@given(st.data())
def test_merge(data):
    shape = data.draw(shapes)
    flow = st.none() | st.just(SHARED) | labels_of(shape)
    a, b = data.draw(flow), data.draw(flow)
    found = merge(a, b)
    if a is None or b is None:
        assert found is (b if a is None else a)
    elif isinstance(a, Shared) or isinstance(b, Shared):
        assert found is SHARED
    else:
        pairs = np.stack([whole(a, shape), whole(b, shape)]).reshape(2, -1)
        owners = [owner(pair) for pair in pairs.T]
        check_same_flow(found, SHARED if None in owners else np.array(owners, np.int32).reshape(shape), shape)


@quick
@given(views(), st.data())
def test_reshaped(shapes, data):
    old, new = shapes
    labels = data.draw(labels_of(old))
    found = reshaped(labels, old, new)
    check_same_flow(found, whole(labels, old).reshape(new), new)
    rows = constant(0, len(old)) + np.arange(old[0], dtype=np.int32).reshape(-1, *[1] * (len(old) - 1)) if old else labels
    if old and new and old[0] == new[0]:  # a batch stays as small as it is
        assert reshaped(rows, old, new).shape == (old[0], *[1] * (len(new) - 1))


@quick
@given(some_labels(), st.data())
def test_reduced(some, data):
    outer, labels = some
    inner = outer[data.draw(st.integers(0, len(outer))) :]
    inner = tuple(data.draw(st.sampled_from([1, size])) for size in inner)
    extra = len(outer) - len(inner)
    owners = np.full(inner, NOBODY, np.int32)
    for place in np.ndindex(inner):
        copies = tuple(slice(None) if size == 1 else slice(i, i + 1) for i, size in zip(place, inner, strict=True))
        task = owner(whole(labels, outer)[(slice(None),) * extra + copies])
        if task is None:
            assert reduced(labels, inner) is SHARED
            return
        owners[place] = task
    check_same_flow(reduced(labels, inner), owners, inner)


def test_reduced_to_more_dimensions():
    assert reduced(constant(2, 1), (3, 1, 4)).shape == (1, 1, 1)
    assert reduced(np.array([0, 1], np.int32), (2, 1)) is SHARED


@quick
@given(st.data())
def test_scattered(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    first = data.draw(st.integers(0, len(shape) - 1))
    dims = list(range(first, data.draw(st.integers(first + 1, len(shape)))))
    picked = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple))
    drawn = [
        data.draw(st.lists(st.integers(-shape[d], shape[d] - 1), min_size=prod(picked), max_size=prod(picked)))
        for d in dims
    ]
    key = (slice(None),) * first + tuple(np.array(values).reshape(picked) for values in drawn)
    places = np.arange(prod(shape)).reshape(shape)[key]
    labels = data.draw(labels_of(places.shape))
    found = scattered(labels, key, shape, dims)
    owners = np.full(prod(shape), NOBODY, np.int32)
    for place, task in zip(places.flat, whole(labels, places.shape).flat, strict=True):
        if task != NOBODY and owners[place] not in (NOBODY, task):
            assert found is SHARED
            return
        owners[place] = max(owners[place], task)
    check_same_flow(found, owners.reshape(shape), shape)


def test_scattered_with_a_mask():
    mask = np.array([[True, False], [False, True]])
    found = scattered(np.array([2, 1], np.int32), (mask,), (2, 2), [0, 1])
    assert found.tolist() == [[2, NOBODY], [NOBODY, 1]]


@quick
@given(st.lists(st.integers(NOBODY, 3), max_size=12))
def test_segments(labels):
    found = Segments(np.array(labels, np.int32))
    assert found.tasks == sorted(set(labels) - {NOBODY})
    assert found.sizes == [labels.count(task) for task in found.tasks]
    assert found.even == (len(set(found.sizes)) == 1)
    values = torch.arange(2 * len(labels)).view(2, -1)
    ordered = found.sort(values, 1)
    assert ordered.shape == (2, sum(found.sizes))
    assert (found.order is None) == (labels == sorted(labels) and NOBODY not in labels)
    for task, (start, end) in zip(found.tasks, found.bounds, strict=True):
        mine = torch.tensor([k == task for k in labels])
        assert torch.equal(ordered[:, start:end], values[:, mine])
    assert torch.equal(found.sort(values.T), ordered.T)


# --- Flow -------------------------------------------------------------------------------------------------------------


class Case:
    """A function that makes one node of its inputs, and their shapes. ``low`` is the smallest value of an input."""

    def __init__(self, function, *shapes, low=0.1):
        self.function, self.shapes, self.low = function, shapes, low

    def outputs(self):
        inputs = [(self.low + 0.8 * torch.rand(shape, dtype=torch.float64)).requires_grad_() for shape in self.shapes]
        found = self.function(*inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)


def unary(names, module=torch):
    return {name.title().replace("_", ""): [Case(getattr(module, name), (3, 2, 4))] for name in names.split()}


def binary(names, module=torch, **options):
    def case(name, *shapes):
        return Case(lambda x, y: getattr(module, name)(x, y, **options), *shapes)

    shapes = [((3, 2, 4), (3, 2, 4)), ((3, 2, 4), (2, 1)), ((1, 4), (3, 2, 1)), ((3, 4), ())]
    return {
        name.title().replace("_", ""): [case(name, *pair) for pair in shapes if not options or pair[0] == pair[1]]
        for name in names.split()
    }


def along(name, *arguments):
    """An operation along each dimension in turn."""
    return [Case(lambda x, dim=dim: getattr(x, name)(*arguments, dim=dim), (2, 3, 4)) for dim in (0, 1, 2, -1, -2)]


def reductions(names):
    def cases(name):
        for dim in (0, 1, -1):
            for keepdim in (True, False):
                yield Case(lambda x, d=dim, k=keepdim: reduce(x, dim=d, keepdim=k), (2, 3, 4))
        if name in ("sum", "mean", "amax", "logsumexp"):
            yield Case(lambda x: reduce(x, dim=(0, 2)), (2, 3, 4))
        if name not in ("logsumexp", "kthvalue", "mode"):
            yield Case(lambda x: reduce(x), (2, 3))

        def reduce(x, **options):
            found = getattr(x, name)(*[1] * (name == "kthvalue"), **options)
            return found if isinstance(found, torch.Tensor) else found[0]

    return {name.title(): list(cases(name)) for name in names.split()}


def images(functions, *shape):
    return {name: [Case(function, shape)] for name, function in functions.items()}


def resized(mode):
    return lambda x: F.interpolate(x, scale_factor=2, mode=mode)


def padded(mode, dims):
    return lambda x: F.pad(x, (1, 1) * dims, mode=mode)


INDEX = torch.tensor([2, 0, 2, 1])
MASK = torch.tensor([[True, False, True], [False, True, True]])
ROWS = torch.tensor([1, 0])

OPERATIONS = {
    **unary(
        "abs acos asin asinh atan atanh ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor lgamma log log10 log2 "
        "logit nan_to_num neg reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt tan tanh trunc clone"
    ),
    "Acosh": [Case(torch.acosh, (3, 4), low=1.1)],
    "Log1P": [Case(torch.log1p, (3, 4))],
    "Tril": [Case(torch.tril, (2, 3, 4))],
    "Triu": [Case(torch.triu, (2, 3, 4))],
    **unary("celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu mish silu softplus softshrink", F),
    "LogSigmoid": [Case(F.logsigmoid, (3, 4))],
    "Threshold": [Case(lambda x: F.threshold(x, 0.5, 0.0), (3, 4))],
    "RreluWithNoise": [Case(lambda x: F.rrelu(x, training=True), (3, 4))],
    "NativeDropout": [Case(lambda x: torch.native_dropout(x, 0.5, True)[0], (3, 4))],
    **binary("add sub mul div atan2 copysign fmod hypot logaddexp logaddexp2 maximum minimum polar pow remainder xlogy"),
    "Rsub": [Case(lambda x, y: torch.rsub(x, y), (3, 4), (4,))],
    "Lerp": [Case(lambda x, y: torch.lerp(x, y, 0.3), (3, 4), (4,)), Case(torch.lerp, (3, 1), (3, 4), (4,))],
    "Addcdiv": [Case(torch.addcdiv, (4,), (3, 4), (3, 1))],
    "Addcmul": [Case(torch.addcmul, (3, 1), (3, 4), (4,))],
    "Where": [Case(lambda x, y: torch.where(torch.tensor([True, False, True, True]), x, y), (3, 4), (1,))],
    "MaskedFill": [Case(lambda x, y: x.masked_fill(MASK, y), (2, 3), ())],
    "Clamp": [Case(lambda x: x.clamp(0.3, 0.7), (3, 4)), Case(torch.clamp, (3, 4), (4,), (3, 1))],
    "ClampMin": [Case(lambda x: x.clamp_min(0.4), (3, 4)), Case(torch.clamp_min, (3, 4), (4,))],
    "ClampMax": [Case(lambda x: x.clamp_max(0.4), (3, 4)), Case(torch.clamp_max, (3, 4), (4,))],
    "PreluKernel": [Case(lambda x, w: F.prelu(x - 0.5, w), (3, 2, 4), (2,))],
    "ToCopy": [Case(lambda x: x.float(), (3, 4))],
    **binary(
        "binary_cross_entropy binary_cross_entropy_with_logits mse_loss smooth_l1_loss huber_loss", F, reduction="none"
    ),
    "SoftMarginLoss": [Case(lambda x: F.soft_margin_loss(x, x.detach().sign(), reduction="none"), (3, 4))],
    # Views and rearrangements.
    "Alias": [Case(torch.ops.aten.alias, (3, 4))],
    "Lift": [Case(torch.ops.aten.lift, (3, 4))],
    "Fill": [Case(lambda x: torch.ops.aten.fill(x, 2.0), (3, 4))],
    "View": [Case(lambda x, new=new: x.view(new), (4, 3, 2)) for new in [(12, 2), (4, 6), (2, 2, 3, 2), (24,), (3, 8)]],
    "UnsafeView": [Case(lambda x: torch.ops.aten._unsafe_view(x, [2, 2, 6]), (4, 3, 2))],
    "ReshapeAlias": [Case(lambda x: torch.ops.aten._reshape_alias(x, [4, 3], [3, 1]), (2, 2, 3))],
    "Squeeze": [Case(torch.squeeze, (3, 1, 2, 1)), Case(lambda x: x.squeeze(1), (3, 1, 2, 1))],
    "Unsqueeze": [Case(lambda x, d=d: x.unsqueeze(d), (3, 2)) for d in (0, 1, 2, -1)],
    "T": [Case(torch.t, (3, 4)), Case(torch.t, (3,))],
    "Transpose": [Case(lambda x, a=a, b=b: x.transpose(a, b), (2, 3, 4)) for a, b in [(0, 1), (0, -1), (-2, -1)]],
    "Permute": [Case(lambda x, p=p: x.permute(p), (2, 3, 4)) for p in [(2, 0, 1), (-1, 1, 0), (1, 2, 0)]],
    "Expand": [Case(lambda x: x.expand(3, 2, 4), (2, 1)), Case(lambda x: x.expand(2, 3, -1), (3, 4))],
    "Repeat": [Case(lambda x: x.repeat(2, 1, 2), (3, 4)), Case(lambda x: x.repeat(1, 3), (3, 2))],
    "Select": [Case(lambda x, d=d, i=i: x.select(d, i), (2, 3, 4)) for d, i in [(0, 1), (1, -1), (-1, -2), (2, 0)]],
    "Slice": [
        Case(lambda x, key=key: x[key], (4, 5))
        for key in [slice(1, None), slice(0, 3), (slice(None), slice(1, 4, 2)), slice(0, 9, 3)]
    ],
    "Split": [Case(lambda x, d=d: x.split(2, d), (4, 3)) for d in (0, 1, -1)],
    "SplitWithSizes": [Case(lambda x: x.split([1, 2], 1), (4, 3)), Case(lambda x: x.split([1, 0, 3]), (4, 3))],
    "UnsafeSplit": [Case(lambda x: x.unsafe_split(2), (4, 3))],
    "UnsafeSplitWithSizes": [Case(lambda x: x.unsafe_split_with_sizes([1, 2], -1), (4, 3))],
    "Unbind": [Case(lambda x, d=d: x.unbind(d), (2, 3, 2)) for d in (0, 1, -1)],
    "Cat": [
        Case(lambda x, y: torch.cat([x, y]), (2, 3), (1, 3)),
        Case(lambda x, y: torch.cat([x, y], -1), (2, 3), (2, 2)),
        Case(lambda x: torch.cat([torch.zeros(2, 1), x], 1), (2, 3)),
        Case(lambda x: torch.cat([torch.zeros(1, 3), x, torch.zeros(2, 3)]), (2, 3)),
        Case(lambda x, y: torch.cat([x, torch.zeros(2, 2), y], 1), (2, 3), (2, 0)),
    ],
    "Stack": [Case(lambda x, y, d=d: torch.stack([x, y], d), (2, 3), (2, 3)) for d in (0, 1, 2, -1)],
    "Index": [
        Case(lambda x: x[INDEX], (3, 4)),
        Case(lambda x: x[:, INDEX], (2, 3, 4)),
        Case(lambda x: x[ROWS, INDEX[:2]], (2, 3, 4)),
        Case(lambda x: x[ROWS[:, None], :, INDEX[None]], (2, 3, 4)),
        Case(lambda x: x[MASK], (2, 3, 4)),
        Case(lambda x: x[:, MASK[0]], (2, 3, 4)),
        Case(lambda x: x[MASK[:, 0], ROWS[:1]], (2, 3, 4)),
        Case(lambda x: x[ROWS.view(2, 1)], (2, 3)),
    ],
    "UnsafeIndex": [Case(lambda x: torch.ops.aten._unsafe_index(x, [None, INDEX]), (2, 3))],
    "IndexSelect": [Case(lambda x, d=d: x.index_select(d, INDEX), (3, 3)) for d in (0, 1, -1)],
    "IndexPut": [
        Case(lambda x, y: torch.index_put(x, (ROWS,), y), (3, 4), (4,)),
        Case(lambda x, y: torch.index_put(x, (ROWS, INDEX[:2]), y), (3, 4), (2,)),
        Case(lambda x, y: torch.index_put(x, (ROWS,), y, accumulate=True), (3, 4), (2, 4)),
        Case(lambda x, y: torch.index_put(x, (MASK[0],), y), (3, 4), (2, 1)),
    ],
    "UnsafeIndexPut": [Case(lambda x, y: torch.ops.aten._unsafe_index_put(x, [ROWS], y), (3, 4), (2, 4))],
    "IndexAdd": [Case(lambda x, y, d=d: x.index_add(d, ROWS, y), (3, 3), s) for d, s in [(0, (2, 3)), (1, (3, 2))]],
    # Reductions, and what mixes elements along a dimension.
    **reductions("sum mean nansum var std amax amin logsumexp max min median mode prod kthvalue"),
    "LinalgVectorNorm": [Case(lambda x, d=d: torch.linalg.vector_norm(x, dim=d), (2, 3, 4)) for d in (None, 0, -1, (0, 2))],
    "Norm": [Case(lambda x: torch.ops.aten.norm(x, 2.0), (3, 4))],
    "Softmax": along("softmax"),
    "LogSoftmax": along("log_softmax"),
    "SafeSoftmax": [Case(lambda x: torch.ops.aten._safe_softmax(x, 1), (3, 4))],
    "Cumsum": along("cumsum"),
    "Cumprod": along("cumprod"),
    "Logcumsumexp": along("logcumsumexp"),
    "Flip": [Case(lambda x, d=d: x.flip(d), (2, 3, 4)) for d in (0, 1, (0, -1))],
    "Roll": [
        Case(lambda x: x.roll(1, -1), (2, 3)),
        Case(lambda x: x.roll(1), (2, 3)),
        Case(lambda x: x.roll(1, 0), (4, 2)),
    ],
    "Sort": [Case(lambda x, d=d: x.sort(d)[0], (2, 3, 4)) for d in (0, 1, -1)],
    "Topk": [Case(lambda x, d=d: x.topk(2, d)[0], (2, 3, 4)) for d in (0, 1, -1)],
    "Glu": [Case(lambda x, d=d: F.glu(x, d), (4, 2, 6)) for d in (0, 1, -1)],
    "Gather": [
        Case(lambda x: x.gather(1, torch.tensor([[0, 2], [2, 1], [1, 1]])), (3, 4)),
        Case(lambda x: x.gather(0, torch.tensor([[0, 2], [2, 1], [1, 1]])), (3, 2)),
        Case(lambda x: x.gather(1, torch.tensor([[0, 2]])), (3, 4)),
    ],
    # Layers.
    **images({"AvgPool2D": lambda x: F.avg_pool2d(x, 2), "UpsampleNearest2D": resized("nearest")}, 2, 3, 4),
    **images(
        {
            "MaxPool2DWithIndices": lambda x: F.max_pool2d(x, 2),
            "AvgPool2D": lambda x: F.avg_pool2d(x, 2),
            "AdaptiveAvgPool2D": lambda x: F.adaptive_avg_pool2d(x, 2),
            "AdaptiveMaxPool2D": lambda x: F.adaptive_max_pool2d(x, 2),
            "FractionalMaxPool2D": lambda x: F.fractional_max_pool2d(x, 2, output_size=2),
            "UpsampleNearest2D": resized("nearest"),
            "UpsampleBilinear2D": resized("bilinear"),
            "UpsampleBicubic2D": resized("bicubic"),
            "ReflectionPad2D": padded("reflect", 2),
            "ReplicationPad2D": padded("replicate", 2),
            "PixelShuffle": lambda x: F.pixel_shuffle(x, 2),
            "PixelUnshuffle": lambda x: F.pixel_unshuffle(x, 2),
            "Im2Col": lambda x: F.unfold(x, 2),
        },
        *(3, 4, 4, 4),
    ),
    **images(
        {
            "MaxPool3DWithIndices": lambda x: F.max_pool3d(x, 2),
            "AvgPool3D": lambda x: F.avg_pool3d(x, 2),
            "AdaptiveAvgPool3D": lambda x: F.adaptive_avg_pool3d(x, 2),
            "AdaptiveMaxPool3D": lambda x: F.adaptive_max_pool3d(x, 2),
            "UpsampleNearest3D": resized("nearest"),
            "UpsampleTrilinear3D": resized("trilinear"),
            "ReflectionPad3D": padded("reflect", 3),
            "ReplicationPad3D": padded("replicate", 3),
        },
        *(3, 1, 3, 2, 2),
    ),
    **images(
        {
            "UpsampleNearest1D": resized("nearest"),
            "UpsampleLinear1D": resized("linear"),
            "ReflectionPad1D": padded("reflect", 1),
            "ReplicationPad1D": padded("replicate", 1),
        },
        *(3, 2, 4),
    ),
    "Col2Im": [Case(lambda x: F.fold(x, (3, 3), (2, 2)), (3, 8, 4))],
    "ConstantPadNd": [Case(lambda x: F.pad(x, (1, 0)), (3, 4)), Case(lambda x: F.pad(x, (1, 0, 0, -1)), (2, 3, 4))],
    "Convolution": [
        Case(F.conv2d, (3, 2, 3, 3), (4, 2, 2, 2), (4,)),
        Case(F.conv_transpose1d, (3, 2, 3), (2, 4, 2)),
        Case(lambda x, w: F.conv1d(x, w, groups=2), (3, 4, 3), (2, 2, 2)),
    ],
    "NativeLayerNorm": [Case(lambda x, w, b: F.layer_norm(x, w.shape, w, b), (3, 2, 4), s, s) for s in [(4,), (2, 4)]],
    "NativeGroupNorm": [Case(lambda x, w, b: F.group_norm(x, 2, w, b), (3, 4, 3), (4,), (4,))],
    "NativeBatchNorm": [
        Case(lambda x, w, b: F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double(), w, b), (3, 2, 4), (2,), (2,)),
        Case(lambda x: F.batch_norm(x, None, None, training=True), (3, 2, 4)),
    ],
    "Mm": [Case(torch.mm, (3, 2), (2, 4))],
    "Bmm": [Case(torch.bmm, (3, 2, 2), (3, 2, 4))],
    "Addmm": [
        *[Case(torch.addmm, s, (3, 2), (2, 4)) for s in [(4,), (3, 1), (3, 4), ()]],
        Case(lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=3), (4,), (3, 2), (2, 4)),
    ],
    "Baddbmm": [
        *[Case(torch.baddbmm, s, (3, 2, 2), (3, 2, 4)) for s in [(3, 1, 4), (2, 1)]],
        Case(lambda b, x, w: torch.baddbmm(b, x, w, beta=3, alpha=0.5), (2, 4), (3, 2, 2), (3, 2, 4)),
    ],
    "ScaledDotProductFlashAttentionForCpu": [
        Case(F.scaled_dot_product_attention, (3, 2, 4, 4), (3, 2, 5, 4), (3, 2, 5, 4))
    ],
    "NllLoss": [
        Case(lambda x: F.nll_loss(x, ROWS, reduction="none"), (2, 3)),
        Case(lambda x: F.nll_loss(x, ROWS), (2, 3)),
        Case(lambda x: F.nll_loss(x, ROWS[0]), (3,)),
    ],
    "NllLoss2D": [Case(lambda x: F.nll_loss(x, INDEX.view(1, 2, 2).expand(3, -1, -1), reduction="none"), (3, 3, 2, 2))],
    "Embedding": [Case(lambda w: F.embedding(INDEX.view(2, 2), w), (3, 4))],
}

# These have other names on the CPU in this release of PyTorch, or are other devices'.
OTHERWISE = """
Chunk Conj Contiguous Copy Detach Flatten Imag IndexPutImpl Movedim Real Relu6 Reshape Selu Square Swapaxes Unflatten
ViewAsRealCopy CudnnBatchNorm FusedDropout FusedRmsNorm MiopenBatchNorm MkldnnMaxPool2D MkldnnRnnLayer
ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
RegisterPostBackwardFunction
"""


def test_every_rule_has_a_case():
    assert set(OPERATIONS) | set(OTHERWISE.split()) == set(RULES)
    assert not set(OPERATIONS) & set(OTHERWISE.split())


def random_labels(rng, shape, wide):
    narrow = [size if dim in wide else 1 for dim, size in enumerate(shape)]
    return rng.choice([NOBODY, 0, 1, 2, 2], narrow).astype(np.int32)


def passages(case, name):
    """A node, its outputs, and labels: along no dimension, along each, and along all."""
    outputs = case.outputs()
    node = outputs[0].grad_fn
    assert kind(node) == name
    outer = [tuple(output.shape) for output in node._input_metadata]
    inner = [None if n is None else tuple(n._input_metadata[number].shape) for n, number in node.next_functions]
    rng = np.random.default_rng(0)
    most = max(len(shape) for shape in outer)
    for wide in [(), *[(dim,) for dim in range(most)] * 3, range(most)]:
        labels = [None] * len(outer)
        for output in outputs:
            if len(outputs) == 1 or rng.random() < 0.8:
                labels[output.output_nr] = random_labels(rng, output.shape, wide)
        if present(labels) and all(labels[output.output_nr] is None or output.numel() for output in outputs):
            yield Passage(node, name, labels, outer, inner), outputs


def by_task(passage, outputs):
    """Task → what of its gradients arrives at each input, by one backward pass per task; and the gradients sent."""
    targets = [(i, n, number) for i, (n, number) in enumerate(passage.node.next_functions) if n is not None]
    inputs = [n.variable if hasattr(n, "variable") else GradientEdge(n, number) for _, n, number in targets]
    there = [output for output in outputs if passage.labels[output.output_nr] is not None]
    whose = [torch.tensor(whole(passage.labels[output.output_nr], output.shape)) for output in there]
    noise = [(0.5 + torch.rand(output.shape, dtype=torch.float64)).to(output.dtype) for output in there]
    result = {}
    for task in present(passage.labels):
        seeds = [torch.where(labels == task, own, 0.0) for labels, own in zip(whose, noise, strict=True)]
        found = torch.autograd.grad(there, inputs, seeds, retain_graph=True, allow_unused=True)
        result[task] = {i: gradient for (i, *_), gradient in zip(targets, found, strict=True)}
    sent = [None] * len(passage.labels)
    for output, labels, own in zip(there, whose, noise, strict=True):
        sent[output.output_nr] = torch.where(labels == NOBODY, 0.0, own)
    return result, sent


def owners(gradients, i, shape):
    """Whose each element of an input's gradient is."""
    there = [g[i] is not None for g in gradients.values()]
    reached = np.stack(
        [(g[i] != 0).numpy() if t else np.zeros(shape, bool) for t, g in zip(there, gradients.values(), strict=True)]
    )
    if (reached.sum(0) > 1).any():
        return SHARED
    return np.where(reached.any(0), np.array(list(gradients))[reached.argmax(0)], NOBODY)


def check_flow(found, expected, shape, *, may_be_shared):
    """``found`` may know more than ``expected``: the tasks of elements whose derivative happens to be zero."""
    if isinstance(found, Shared):
        assert expected is SHARED or may_be_shared or len(set(np.unique(expected)) - {NOBODY}) < 2
    elif found is None:
        assert expected is not SHARED
        assert (expected == NOBODY).all()
    else:
        assert expected is not SHARED
        assert found.ndim == len(shape)
        known = expected != NOBODY
        assert np.array_equal(whole(found, shape)[known], expected[known])


# Called by hand, these nodes do not sum what they give back to the shape of an input that was broadcast.
UNSUMMED = {*ELEMENTWISE.split(), "Addmm", "Baddbmm", "IndexPut"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rules(name):
    answers = 0
    for passage, outputs in (pair for case in OPERATIONS[name] for pair in passages(case, name)):
        gradients, _ = by_task(passage, outputs)
        try:
            found = RULES[name](passage)
        except (Unknown, Interaction):
            found = None
        answers += found is not None
        probes = probed(passage)
        for i, shape in enumerate(passage.inner):
            if shape is None:
                continue
            expected = owners(gradients, i, shape)
            broadcast = shape != passage.outer[0]
            if found is not None:
                lucky = name == "Embedding" or (broadcast and name in ("Maximum", "Minimum"))
                check_flow(found[i], expected, shape, may_be_shared=lucky)
            check_flow(probes[i], expected, shape, may_be_shared=broadcast and name in UNSUMMED)
            if isinstance(probes[i], np.ndarray) and len(gradients) > 1:  # a probe does not guess
                assert np.array_equal(whole(probes[i], shape), expected)
    assert answers


def test_a_probe_with_one_task():
    node = torch.rand(4, requires_grad=True).as_strided((2,), (1,)).grad_fn
    (found,) = probed(Passage(node, "AsStrided", [constant(1, 1)], [(2,)], [(4,)]))
    assert whole(found, (4,)).tolist() == [1, 1, NOBODY, NOBODY]


def test_a_probe_without_any_task():
    node = torch.rand(4, requires_grad=True).as_strided((2,), (1,)).grad_fn
    (found,) = probed(Passage(node, "AsStrided", [constant(NOBODY, 1)], [(2,)], [(4,)]))
    assert found is None or (found == NOBODY).all()


SPECIAL = {
    "negative start": ("Slice", [Case(lambda x: x[-2:], (4, 5)), Case(lambda x: x[:, -2:], (4, 5))]),
    "negative end": ("Slice", [Case(lambda x: x[:-1], (4, 5))]),
    "picked twice, used once": ("Index", [Case(lambda x: x[INDEX], (3, 4))]),
    "repeated, used once": ("Repeat", [Case(lambda x: x.repeat(2, 1), (3, 2)), Case(lambda x: x.repeat(1, 3), (3, 2))]),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_special_cases(what):
    name, cases = SPECIAL[what]
    for passage, outputs in (pair for case in cases for pair in passages(case, name)):
        gradients, _ = by_task(passage, outputs)
        for flow in RULES[name](passage) or ():
            check_flow(flow, owners(gradients, 0, passage.inner[0]), passage.inner[0], may_be_shared=False)


# --- Cuts -------------------------------------------------------------------------------------------------------------

NORMS = ("NativeLayerNorm", "NativeGroupNorm", "Convolution")


def check_cuts(passage, outputs, edges):
    gradients, sent = by_task(passage, outputs)
    there = gradients[min(gradients)]
    wanted = [
        Wanted(i, shape, passage.node.next_functions[i], not there[i].is_complex())
        for i, shape in enumerate(passage.inner)
        if shape is not None and i in edges
    ]
    for function in (cut, general):
        with torch.no_grad():
            blocks = function(passage, sent, wanted)
        for w in wanted:
            tasks, block = blocks[w.edge]
            assert tasks == list(gradients)
            for task, gradient in zip(tasks, block, strict=True):
                found = gradient.to_dense() if gradient.is_sparse else gradient
                torch.testing.assert_close(found, gradients[task][w.edge])


@pytest.mark.parametrize("name", [name for name in CUTS if name in OPERATIONS])
def test_cuts(name):
    for passage, outputs in (pair for case in OPERATIONS[name] for pair in passages(case, name)):
        if 1 in passage.first.shape:
            check_cuts(passage, outputs, (1, 2) if name in NORMS else (0, 1, 2))


@pytest.mark.parametrize("name", ["Mul", "Add", "Pow", "Where"])
def test_cuts_where_all_dimensions_have_tasks_of_their_own(name):
    for passage, outputs in (pair for case in OPERATIONS[name] for pair in passages(case, name)):
        check_cuts(passage, outputs, (0, 1, 2))


@pytest.mark.parametrize("name", NORMS)
def test_cuts_of_the_input(name):
    for passage, outputs in (pair for case in OPERATIONS[name] for pair in passages(case, name)):
        if passage.first.size == 1:
            check_cuts(passage, outputs, (0, 1, 2))


# --- Memory for rows --------------------------------------------------------------------------------------------------

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])
CPU = torch.device("cpu")


def inside(arena, tensor):
    start = arena._memory.bytes.data_ptr()
    return start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= start + arena._memory.size


@quick
@given(st.lists(st.tuples(st.integers(0, 3), shapes, dtypes), min_size=1, max_size=25), st.integers(1, 3))
def test_no_two_live_tensors_overlap(actions, steps):
    arena = Arena()
    for _ in range(steps):
        live = []
        for number, (action, shape, dtype) in enumerate(actions):
            if action == 0 and live:
                arena.give(live.pop(number % len(live))[0].flatten(1))
            else:
                tensor = arena.take((number % 3 + 1, *shape, 2), dtype, CPU)
                assert (tensor.shape, tensor.dtype) == ((number % 3 + 1, *shape, 2), dtype)
                live.append((tensor.fill_(number), number))
        assert all((tensor == value).all() for tensor, value in live)
        arena.reset()


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=1, max_size=25))
def test_a_step_like_the_one_before_takes_no_new_memory(actions):
    arena = Arena()
    for step in range(4):
        live = []
        for give, size in actions:
            if give and live:
                arena.give(live.pop(0))
            live.append(arena.take((size,), torch.float32, CPU))
            if step == 3:
                assert inside(arena, live[-1])
        for tensor in live:
            arena.give(tensor)


@pytest.mark.parametrize("which", range(3))
def test_memory_is_given_again(which):
    arena = Arena()
    for _ in range(2):  # at first, nothing is known of how much it takes
        rows = [arena.take((100,), torch.float32, CPU) for _ in range(3)]
        arena.reset()
    rows = [arena.take((100,), torch.float32, CPU) for _ in range(3)]
    arena.give(rows[which])
    again = arena.take((10, 10), torch.float32, CPU)
    assert arena._wanted == 3 * 448  # in units of 64
    assert again.data_ptr() == rows[which].data_ptr()
    assert inside(arena, again)
    beside = arena.take((arena._memory.size,), torch.uint8, CPU)
    assert not inside(arena, beside)  # no place is left
    arena.give(beside)
    arena.give(torch.zeros(3))  # not the arena's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("width", [1, 31, 1024, 4096, 65536, 100_003])
def test_rows_of_a_block_do_not_drive_each_other_out_of_the_cache(width, dtype):
    arena = Arena()
    for block in (new_block((3, width), dtype, CPU), arena.take((3, width), dtype, CPU)):
        assert block[0].is_contiguous()
        distance = block.stride(0) * dtype.itemsize
        if width * dtype.itemsize > 4096:
            assert distance % 4096 == 17 * 64
            assert width * dtype.itemsize <= distance <= width * dtype.itemsize + 4096 + 64
        else:
            assert block.is_contiguous()


def test_reset_takes_everything_back():
    arena = Arena()
    for _ in range(3):
        whole = arena.take((7, 11), torch.float64, CPU)
        arena.reset()
    assert inside(arena, whole)
    assert arena.take((7, 11), torch.float64, CPU).data_ptr() == whole.data_ptr()


def test_a_system_that_takes_no_pages_back(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    arena = Arena()
    for _ in range(3):
        arena.take((7, 11), torch.float64, CPU).fill_(1)
        arena.reset()
