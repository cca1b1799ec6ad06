"""Small models of many architectures, to test that something holds for every kind of parametric operation.

Every input and the first output has the ``B`` samples in dimension 0, whatever a model does in between, and no sample
influences the output of another. All models run in train mode, in single and in double precision.

What a test has to allow for: a loss that weighs all outputs alike, or squares them, is constant behind a last norm; the
gradient of a bias in front of a norm, or of attention's keys, is zero up to rounding; and where samples take different
ways, there are parameters that none of the samples reaches.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

seq = nn.Sequential


@dataclass(frozen=True)
class Specimen:
    """A model and its inputs.

    Args:
        model: Builds the model; the caller seeds before.
        batch: ``B`` → positional inputs of that many samples. The first tensor that the model returns is ``[B, ...]``.
        note: What a test may have to know.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Any, ...]]
    note: str = ""


# Inputs -------------------------------------------------------------------------------------------------------------


def floats(*shape):
    return lambda B: (torch.randn(B, *shape),)


def tokens(vocabulary, *shape):
    return lambda B: (torch.randint(vocabulary, (B, *shape)),)


def lengths(longest):
    return lambda B: (torch.randint(1, longest + 1, (B,)),)


def prefixes(longest):
    """``[B, T]`` with ones where a sequence has not ended yet."""
    return lambda B: (present(*lengths(longest)(B), longest).long(),)


def adjacency(nodes):
    """``[B, N, N]`` weights of the edges, rows summing to one."""
    return lambda B: (torch.rand(B, nodes, nodes).softmax(-1),)


def both(*inputs):
    return lambda B: tuple(tensor for each in inputs for tensor in each(B))


# Building blocks ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """``function(self, *inputs)`` of the parts: submodules, and parameters given by their shapes."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part) / 2))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def direct(function, inputs, note="", **shapes):
    """A specimen that has no submodules: a function of parameters and the input."""
    return Specimen(lambda: Net(function, **shapes), inputs, note)


def time_first(module):
    """On ``[B, T, D]``, a module that wants ``[T, B, D]`` and may return a tuple."""

    def function(m, x):
        out = m.inner(x.transpose(0, 1))
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)

    return Net(function, inner=module)


def mlp(*sizes):
    return seq(*[layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())][:-1])


def present(lengths, longest):
    """``[B, T]`` True where a sequence of that length has not ended yet."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def causal(x):
    """``[T, T]`` True where attention must not look, for ``x [B, T, D]``."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)


# Linear layers ------------------------------------------------------------------------------------------------------


def activations():
    kinds = (nn.SiLU, nn.ELU, nn.Softplus, nn.LeakyReLU, nn.Mish, nn.Hardswish, nn.SELU, nn.Sigmoid, nn.GLU)
    return seq(*[layer for kind in kinds for layer in (nn.Linear(6, 6), kind())])


def flattened(m, x):
    """Samples and times in one dimension, time first: the rows of a sample are not next to each other."""
    rows = m.first(x.transpose(0, 1).flatten(0, 1)).tanh()
    return m.last(rows).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def two_views(m, x):
    return torch.cat(m.net(torch.cat([x, x.flip(1)])).chunk(2), 1)


def relations(m, x):
    """Every pair of the objects of a sample."""
    n = x.shape[1]
    pairs = torch.cat([x[:, :, None].expand(-1, -1, n, -1), x[:, None].expand(-1, n, -1, -1)], -1)
    return m.rho(m.phi(pairs).sum((1, 2)))


def beside_a_call_without_gradient(m, x):
    with torch.no_grad():
        target = m.net(x)
    return (m.net(x + 1) - target).square()


def written_in_place(m, x):
    out = m.first(x).add_(1)
    out[:, 1:3] += m.second(x)
    out[:, 0] *= m.scale
    return out.tanh_()


def one_at_a_time(m, x):
    """Calls without a batch dimension: ``[C, T]`` for the convolution, ``[T, C]`` for the recurrent layer."""
    return torch.stack([m.out(m.rnn(m.conv(sample).T)[0][-1]) for sample in x])


def frozen_weights():
    """Only the biases are trained."""
    model = mlp(5, 6, 3)
    for layer in model[::2]:
        layer.weight.requires_grad_(False)
    return model


def tied_weights():
    """One parameter in two modules."""
    model = seq(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    return model


DENSE = {
    "mlp": Specimen(
        lambda: seq(
            seq(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.2)),
            seq(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3)),
        ),
        floats(6),
    ),
    "mlp_activations": Specimen(activations, floats(6)),
    "mlp_prelu": Specimen(lambda: seq(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3), nn.PReLU()), floats(5)),
    "mlp_one_number": Specimen(lambda: seq(mlp(5, 6, 1), nn.Flatten(0)), floats(5), "output [B]"),
    "mlp_frozen_weights": Specimen(frozen_weights, floats(5), "some parameters require no gradient"),
    "mlp_tied_weights": Specimen(tied_weights, floats(5), "one parameter in two modules"),
    "linear_batch_time": Specimen(lambda: mlp(4, 6, 3), floats(5, 4)),
    "linear_time_batch": Specimen(lambda: time_first(mlp(4, 6, 3)), floats(5, 4)),
    "linear_square": Specimen(lambda: time_first(mlp(4, 6, 3)), lambda B: (torch.randn(B, B, 4),), "T = B"),
    "linear_flattened": Specimen(
        lambda: Net(flattened, first=nn.Linear(4, 6), last=nn.Linear(6, 3)), floats(5, 4), "rows [T * B, D] inside"
    ),
    "linear_two_views": Specimen(lambda: Net(two_views, net=mlp(5, 6, 3)), floats(5), "rows [2 * B, D] inside"),
    "linear_keyword": Specimen(lambda: Net(lambda m, x: m.inner(input=x), inner=nn.Linear(5, 3)), floats(5)),
    "linear_also_without_gradient": Specimen(lambda: Net(beside_a_call_without_gradient, net=mlp(5, 6, 3)), floats(5)),
    "linear_in_place": Specimen(
        lambda: Net(written_in_place, first=nn.Linear(5, 6), second=nn.Linear(5, 2), scale=()), floats(5)
    ),
    "bilinear": Specimen(
        lambda: Net(
            lambda m, x, y: m.last(m.first(x, y).tanh(), y),
            first=nn.Bilinear(4, 3, 5),
            last=nn.Bilinear(5, 3, 2, bias=False),
        ),
        both(floats(4), floats(3)),
    ),
    "called_several_times": Specimen(
        lambda: Net(lambda m, x: m.net(m.net(m.net(x)).mean(1) + m.net(x[:, 0])), net=mlp(5, 6, 5)),
        floats(4, 5),
        "on [B, T, D] and on [B, D]",
    ),
    "one_at_a_time": Specimen(
        lambda: Net(one_at_a_time, conv=nn.Conv1d(3, 4, 2), rnn=nn.GRU(4, 5), out=nn.Linear(5, 2)),
        floats(3, 6),
        "calls on single samples, with no batch dimension",
    ),
    "mixer": Specimen(
        lambda: Net(
            lambda m, x: m.channels(m.norm(x + m.times(x.mT).mT)),
            times=mlp(5, 7, 5),
            norm=nn.LayerNorm(4),
            channels=mlp(4, 6, 3),
        ),
        floats(5, 4),
        "a linear layer along time",
    ),
    "deep_sets": Specimen(
        lambda: Net(lambda m, x: m.rho(m.phi(x).mean(1)), phi=mlp(3, 6, 5), rho=mlp(5, 6, 2)), floats(7, 3)
    ),
    "relation_network": Specimen(lambda: Net(relations, phi=mlp(6, 8, 5), rho=mlp(5, 2)), floats(4, 3)),
    "autoencoder": Specimen(lambda: seq(nn.Flatten(), mlp(16, 8, 3, 8, 16), nn.Unflatten(1, (1, 4, 4))), floats(1, 4, 4)),
    "autoencoder_tied": Specimen(
        lambda: Net(
            lambda m, x: F.linear(m.encode(x).tanh(), m.encode.weight.T, m.bias), encode=nn.Linear(6, 4), bias=(6,)
        ),
        floats(6),
        "a weight that its module and a function use",
    ),
}


# Convolutions -------------------------------------------------------------------------------------------------------


class WaveNet(nn.Module):
    """Gated causal convolutions with residual and skip connections."""

    def __init__(self, channels=4, dilations=(1, 2, 4)):
        super().__init__()
        self.first = nn.Conv1d(2, channels, 1)
        self.gated = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=d) for d in dilations)
        self.residual = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.last = nn.Conv1d(channels, 3, 1)

    def forward(self, x):
        x, skip = self.first(x), 0
        for gated, residual in zip(self.gated, self.residual, strict=True):
            out = F.glu(gated(F.pad(x, (gated.dilation[0], 0))).tanh(), 1)
            skip = skip + out
            x = x + residual(out)
        return self.last(F.relu(skip + x))


class UNet(nn.Module):
    """Skip connections, max and average pooling, interpolation, pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 16, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(4 + 8, 4, 3, padding=1), nn.Conv2d(4 + 4, 1, 3, padding=1)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.correction = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        high = F.relu(self.down1(x))
        low = F.relu(self.down2(F.max_pool2d(high, 2)))
        middle = F.pixel_shuffle(F.relu(self.middle(F.avg_pool2d(low, 2))), 2)
        up = self.upsample(F.relu(self.up2(torch.cat([middle, low], 1))))
        correction = F.interpolate(self.correction(low), scale_factor=2, mode="bilinear")
        return self.up1(torch.cat([up, high], 1)) + correction


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, channels last, layer scale; each sample skips the block at random."""

    def __init__(self, dim=6, drop=0.3):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = seq(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.rand(dim))
        self.drop = drop

    def forward(self, x):
        out = self.depthwise(x).permute(0, 2, 3, 1)
        out = (self.gamma * self.mlp(self.norm(out))).permute(0, 3, 1, 2)
        if self.training:
            out = out * (torch.rand(len(x), 1, 1, 1, device=x.device) > self.drop) / (1 - self.drop)
        return x + out


class ResidualBlock(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.body = seq(
            seq(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(2, after), nn.ReLU(inplace=True)),
            seq(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(2, after)),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class InvertedResidual(nn.Module):
    """MobileNet's block: expand, depthwise, squeeze and excite, project."""

    def __init__(self, dim=4, wide=8):
        super().__init__()
        self.expand = seq(nn.Conv2d(dim, wide, 1, bias=False), nn.GroupNorm(2, wide), nn.ReLU6())
        self.depthwise = seq(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.Hardswish())
        self.excite = seq(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 2, 1), nn.SiLU(), nn.Conv2d(2, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Conv2d(wide, dim, 1, bias=False)

    def forward(self, x):
        wide = self.depthwise(self.expand(x))
        return x + self.project(self.excite(wide) * wide)


def modulated(m, x, style):
    """Kernels of its own for each sample, as in StyleGAN2: the samples are groups of channels of one big sample."""
    kernels = m.weight * (1 + m.style(style))[:, None, :, None, None]
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=1, groups=len(x))
    return out.view(len(x), -1, *x.shape[2:])


def unfolded(m, x):
    """A convolution as a linear layer on patches, which then overlap."""
    return F.fold(m.linear(F.unfold(x, 3, padding=1).mT).mT, (5, 5), 2)


def frames(m, video):
    """``[B, T, C, H, W]``: a network on all the frames at once."""
    return m.out(m.conv(video.flatten(0, 1)).relu().mean((2, 3)).view(*video.shape[:2], -1).amax(1))


CONVOLUTIONS = {
    "conv1d": Specimen(
        lambda: seq(
            seq(nn.Conv1d(3, 6, 3, stride=2, padding=1), nn.Tanh()),
            seq(nn.Conv1d(6, 6, 3, dilation=2, padding="same", groups=3, bias=False), nn.Tanh(), nn.Conv1d(6, 2, 1)),
        ),
        floats(3, 9),
    ),
    "conv2d": Specimen(
        lambda: seq(
            seq(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout2d(0.2)),
            seq(nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU()),
            seq(nn.Conv2d(8, 4, (1, 3), bias=False), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        ),
        floats(2, 8, 8),
    ),
    "conv2d_depthwise": Specimen(
        lambda: seq(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.SiLU(), nn.Conv2d(6, 2, 1)), floats(3, 6, 6)
    ),
    "conv2d_padding_modes": Specimen(
        lambda: seq(
            seq(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()),
            seq(nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), nn.Tanh()),
            seq(nn.Conv2d(4, 2, 3, padding=1, padding_mode="replicate"), nn.ZeroPad2d(1), nn.Conv2d(2, 2, 2)),
        ),
        floats(2, 5, 6),
    ),
    "conv3d": Specimen(
        lambda: seq(
            seq(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
            seq(nn.Conv3d(4, 4, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(4, 2)),
        ),
        floats(2, 4, 4, 4),
    ),
    "conv_transpose1d": Specimen(
        lambda: seq(
            nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2)
        ),
        floats(3, 5),
    ),
    "conv_transpose2d": Specimen(
        lambda: seq(
            seq(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, bias=False), nn.Tanh()),
            nn.ConvTranspose2d(4, 2, 3, dilation=2),
        ),
        floats(4, 3, 3),
    ),
    "conv_transpose3d": Specimen(
        lambda: seq(nn.ConvTranspose3d(2, 3, 2, stride=2), nn.Tanh(), nn.ConvTranspose3d(3, 1, 2)),
        floats(2, 2, 2, 2),
    ),
    "conv_of_frames": Specimen(
        lambda: Net(frames, conv=nn.Conv2d(2, 4, 3), out=nn.Linear(4, 3)),
        floats(3, 2, 5, 5),
        "rows [B * T, C, H, W] inside",
    ),
    "conv_unfolded": Specimen(lambda: Net(unfolded, linear=nn.Linear(18, 4)), floats(2, 4, 4)),
    "conv_modulated": Specimen(
        lambda: Net(modulated, weight=(3, 2, 3, 3), style=nn.Linear(4, 2)),
        both(floats(2, 5, 5), floats(4)),
        "[1, B * C, H, W] inside",
    ),
    "wavenet": Specimen(WaveNet, floats(2, 10)),
    "unet": Specimen(UNet, floats(2, 8, 8)),
    "convnext_block": Specimen(
        lambda: seq(nn.Conv2d(3, 6, 2, stride=2), ConvNeXtBlock(), ConvNeXtBlock()),
        floats(3, 8, 8),
        "stochastic depth",
    ),
    "resnet": Specimen(
        lambda: seq(
            seq(ResidualBlock(3, 4, 1), ResidualBlock(4, 8, 2)),
            seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        ),
        floats(3, 8, 8),
    ),
    "mobilenet": Specimen(
        lambda: seq(nn.Conv2d(3, 4, 3, stride=2), InvertedResidual(), InvertedResidual()), floats(3, 9, 9)
    ),
}


# Embeddings ---------------------------------------------------------------------------------------------------------


def bag(m, tokens, lengths):
    """All sequences in one, with the offsets where they start."""
    kept = tokens[present(lengths, tokens.shape[1])]
    weights = m.weights[kept] if hasattr(m, "weights") else None
    return m.out(m.bag(kept, lengths.cumsum(0) - lengths, per_sample_weights=weights))


BAG = both(tokens(12, 5), lengths(5))

EMBEDDINGS = {
    "embedding": Specimen(lambda: seq(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(20, 3)), tokens(12, 5), "tokens [B, T]"),
    "embedding_of_one": Specimen(lambda: seq(nn.Embedding(12, 4), nn.Linear(4, 3)), tokens(12), "tokens [B]"),
    "embedding_padding": Specimen(lambda: seq(nn.Embedding(4, 5, padding_idx=1), nn.Tanh(), nn.Linear(5, 2)), tokens(4, 6)),
    "embedding_time_first": Specimen(
        lambda: Net(lambda m, tokens: m.embed(tokens.T).tanh().mean(0), embed=nn.Embedding(4, 5)), tokens(4, 6)
    ),
    "embedding_sparse": Specimen(
        lambda: seq(nn.Embedding(12, 4, sparse=True), nn.Linear(4, 3)), tokens(12, 5), "sparse gradient"
    ),
    "embedding_tied": Specimen(
        lambda: Net(
            lambda m, tokens: m.mix(m.embed(tokens)).tanh() @ m.embed.weight.T,
            embed=nn.Embedding(12, 4),
            mix=nn.Linear(4, 4),
        ),
        tokens(12, 5),
        "a weight that its module and a function use",
    ),
    "bag_sum": Specimen(lambda: Net(bag, bag=nn.EmbeddingBag(12, 4, mode="sum"), out=nn.Linear(4, 3)), BAG),
    "bag_mean": Specimen(
        lambda: Net(bag, bag=nn.EmbeddingBag(12, 4, mode="mean", padding_idx=2), out=nn.Linear(4, 3)), BAG
    ),
    "bag_max": Specimen(lambda: Net(bag, bag=nn.EmbeddingBag(12, 4, mode="max"), out=nn.Linear(4, 3)), BAG),
    "bag_weighted": Specimen(
        lambda: Net(bag, bag=nn.EmbeddingBag(12, 4, mode="sum"), weights=(12,), out=nn.Linear(4, 3)), BAG
    ),
    "bag_of_rows": Specimen(lambda: seq(nn.EmbeddingBag(12, 4), nn.Linear(4, 3)), tokens(12, 5), "2-D input"),
    "bag_sparse": Specimen(
        lambda: seq(nn.EmbeddingBag(12, 4, mode="sum", sparse=True), nn.Linear(4, 3)), tokens(12, 5), "sparse gradient"
    ),
    "adaptive_softmax": Specimen(
        lambda: Net(
            lambda m, x, target: m.softmax(m.first(x), target).output,
            first=nn.Linear(5, 8),
            softmax=nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2),
        ),
        both(floats(5), tokens(12)),
        "output [B]; its clusters see some of the samples, or none",
    ),
}


# Norms --------------------------------------------------------------------------------------------------------------


class BatchNormInEval(nn.Module):
    """Batch norm with frozen statistics in a model that is otherwise in train mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.drop = nn.Dropout(0.2)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.drop(F.relu(self.norm(self.conv(x))))


def between(norm):
    """A norm between two convolutions."""
    return seq(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 2, 1))


NORMS = {
    "layer_norm": Specimen(
        lambda: seq(nn.Linear(4, 6), nn.LayerNorm((5, 6)), nn.Tanh(), nn.LayerNorm(6, bias=False)), floats(5, 4)
    ),
    "layer_norm_plain": Specimen(
        lambda: seq(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)), floats(4)
    ),
    "layer_norm_time_first": Specimen(lambda: time_first(seq(nn.Linear(4, 6), nn.LayerNorm(6))), floats(5, 4)),
    "rms_norm": Specimen(lambda: seq(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.RMSNorm((5, 6))), floats(5, 4)),
    "group_norm": Specimen(lambda: between(nn.GroupNorm(2, 4)), floats(2, 5, 5)),
    "instance_norm1d": Specimen(
        lambda: seq(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.Conv1d(4, 2, 1)), floats(2, 6)
    ),
    "instance_norm2d": Specimen(lambda: between(nn.InstanceNorm2d(4, affine=True)), floats(2, 5, 5)),
    "batch_norm_eval": Specimen(BatchNormInEval, floats(2, 5, 5), "its batch norm stays in eval mode"),
    "local_response_norm": Specimen(lambda: between(nn.LocalResponseNorm(3, alpha=1.0)), floats(2, 5, 5)),
}


# Attention ----------------------------------------------------------------------------------------------------------


def padded(m, x, lengths):
    mask = ~present(lengths, x.shape[1])
    return m.out(m.attention(x, x, x, key_padding_mask=mask)[0])


def cross(m, x, memory):
    return m.attention(x, memory, memory, need_weights=False)[0] + x


def cross_time_first(m, x, memory):
    x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    return m.attention(x, memory, memory)[0].transpose(0, 1)


def by_hand(m, x):
    """Multi-query attention: heads of queries, one head of keys and values."""
    q, k, v = m.q(x).unflatten(-1, (2, 4)).transpose(1, 2), m.k(x)[:, None], m.v(x)[:, None]
    scores = (q @ k.mT / 2 + m.bias).masked_fill(causal(x), -torch.inf)
    return m.out(F.dropout(scores.softmax(-1), 0.1, m.training).matmul(v).transpose(1, 2).flatten(2))


def fused(m, x):
    q, k, v = m.qkv(x).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def linear_attention(m, x):
    q, k, v = (F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x))
    return torch.einsum("btd,bde->bte", q, torch.einsum("bsd,bse->bde", k, v)) / (q @ k.sum(1)[..., None])


def latents(m, x):
    """Learned queries that attend to the input (Perceiver)."""
    queries = m.queries.expand(len(x), -1, -1)
    return m.out(m.attention(queries, x, x)[0])


def decoded(m, x, memory):
    return m.decoder(x, m.first(memory), tgt_mask=causal(x), tgt_is_causal=True)


def encoded(m, x, lengths):
    return m.encoder(m.first(x), src_key_padding_mask=~present(lengths, x.shape[1]))


def encoder_layer(norm_first, activation="relu"):
    return nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation, batch_first=True, norm_first=norm_first)


class Seq2Seq(nn.Module):
    """``nn.Transformer`` from tokens to tokens."""

    def __init__(self, norm_first, batch_first):
        super().__init__()
        options = {"batch_first": batch_first, "norm_first": norm_first}
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, **options)
        encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)
        self.batch_first = batch_first
        self.embed = nn.Embedding(12, 8)
        self.transformer = nn.Transformer(8, 2, 1, 2, 12, 0.1, custom_encoder=encoder, **options)
        self.out = nn.Linear(8, 12)

    def forward(self, source, target):
        mask = causal(target)
        source, target = self.embed(source), self.embed(target)
        if self.batch_first:
            return self.out(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))
        out = self.transformer(source.transpose(0, 1), target.transpose(0, 1), tgt_mask=mask, tgt_is_causal=True)
        return self.out(out).transpose(0, 1)


class ViT(nn.Module):
    """Patches, a class token, learned positions."""

    def __init__(self, dim=8):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, dim) / 2)
        self.position = nn.Parameter(torch.randn(1, 5, dim) / 2)
        self.encoder = nn.TransformerEncoder(encoder_layer(True, "gelu"), 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        patches = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


class WindowAttention(nn.Module):
    """Swin's block: attention in shifted windows, with a bias for each relative position."""

    def __init__(self, dim=8, heads=2, window=4, shift=2):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = seq(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) / 2)
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        rows, columns = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("index", rows * (2 * window - 1) + columns)

    def forward(self, x):
        """``x [B, H, W, C]``."""
        (B, H, W, C), w = x.shape, self.window
        out = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        out = out.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        q, k, v = self.qkv(out).view(-1, w * w, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + self.table[self.index].permute(2, 0, 1)
        out = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out = out.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        x = x + out.roll((self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


def swin(m, x):
    return m.head(m.blocks(m.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


ATTENTION = {
    "attention": Specimen(
        lambda: Net(padded, attention=nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), out=nn.Linear(8, 3)),
        both(floats(5, 8), lengths(5)),
        "key_padding_mask",
    ),
    "attention_time_first": Specimen(
        lambda: time_first(
            Net(
                lambda m, x: m.attention(x, x, x, attn_mask=causal(x.transpose(0, 1)), need_weights=False),
                attention=nn.MultiheadAttention(8, 2, bias=False, add_zero_attn=True),
            )
        ),
        floats(5, 8),
        "attn_mask",
    ),
    "attention_cross": Specimen(
        lambda: Net(cross, attention=nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True)),
        both(floats(4, 8), floats(3, 5)),
    ),
    "attention_cross_time_first": Specimen(
        lambda: Net(cross_time_first, attention=nn.MultiheadAttention(8, 2, add_bias_kv=True)),
        both(floats(4, 8), floats(3, 8)),
        "add_bias_kv",
    ),
    "attention_by_hand": Specimen(
        lambda: Net(
            by_hand,
            q=nn.Linear(6, 8),
            k=nn.Linear(6, 4, bias=False),
            v=nn.Linear(6, 4),
            out=nn.Linear(8, 3),
            bias=(2, 5, 5),
        ),
        floats(5, 6),
        "a bias on the scores",
    ),
    "attention_fused": Specimen(lambda: Net(fused, qkv=nn.Linear(6, 24), out=nn.Linear(8, 3)), floats(5, 6)),
    "attention_linear": Specimen(
        lambda: Net(linear_attention, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 3)), floats(5, 6)
    ),
    "attention_latents": Specimen(
        lambda: Net(latents, queries=(3, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 2)),
        floats(5, 8),
    ),
    "transformer_encoder": Specimen(
        lambda: Net(
            encoded,
            first=nn.Linear(3, 8),
            encoder=nn.TransformerEncoder(encoder_layer(False), 2, enable_nested_tensor=False),
        ),
        both(floats(5, 3), lengths(5)),
    ),
    "transformer_decoder": Specimen(
        lambda: Net(
            decoded,
            first=nn.Linear(3, 8),
            decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, 0.1, batch_first=True), 1),
        ),
        both(floats(5, 8), floats(4, 3)),
    ),
    "transformer": Specimen(lambda: Seq2Seq(norm_first=False, batch_first=True), both(tokens(12, 5), tokens(12, 4))),
    "transformer_time_first": Specimen(
        lambda: Seq2Seq(norm_first=True, batch_first=False), both(tokens(12, 5), tokens(12, 4))
    ),
    "vit": Specimen(ViT, floats(3, 8, 8)),
    "swin": Specimen(
        lambda: Net(
            swin,
            patch=nn.Conv2d(3, 8, 2, stride=2),
            blocks=seq(WindowAttention(shift=0), WindowAttention()),
            head=nn.Linear(8, 3),
        ),
        floats(3, 16, 16),
    ),
}


# Recurrent ----------------------------------------------------------------------------------------------------------


class SelectiveScan(nn.Module):
    """Mamba's block, with its scan written as a loop."""

    def __init__(self, dim=6, states=4):
        super().__init__()
        self.inner, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, 3, groups=dim, padding=2)
        self.select, self.step = nn.Linear(dim, 1 + 2 * states, bias=False), nn.Linear(1, dim)
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(dim, 1))
        self.skip = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        times, states = x.shape[1], self.log_decay.shape[1]
        x, gate = self.inner(x).chunk(2, -1)
        x = F.silu(self.conv(x.mT)[..., :times]).mT
        step, write, read = self.select(x).split([1, states, states], -1)
        step = F.softplus(self.step(step))
        decay = torch.exp(-step[..., None] * self.log_decay.exp())
        drive = (step * x)[..., None] * write[:, :, None]
        state, out = torch.zeros_like(drive[:, 0]), []
        for t in range(times):
            state = decay[:, t] * state + drive[:, t]
            out.append((state @ read[:, t, :, None])[..., 0])
        return self.out((torch.stack(out, 1) + self.skip * x) * F.silu(gate))


def projected(m, x):
    with warnings.catch_warnings():  # oneDNN says that it cannot do this, and another implementation does
        warnings.filterwarnings("ignore", "LSTM with projections", UserWarning)
        return m.lstm(x)[0]


def packed(m, x, lengths):
    rows = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(m.lstm(rows)[0], batch_first=True, total_length=x.shape[1])
    return m.out(out)


def packed_end(m, x, lengths):
    rows = pack_padded_sequence(m.first(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
    return m.gru(rows)[1].transpose(0, 1).flatten(1)


def learned_start(m, x):
    start = m.start.expand(-1, len(x), -1).contiguous()
    return m.gru(x.transpose(0, 1), start)[0].transpose(0, 1)


def lstm_cell(m, x):
    h = c = x.new_zeros(len(x), 5)
    out = []
    for row in x.unbind(1):
        h, c = m.cell(row, (h, c))
        out.append(h)
    return torch.stack(out, 1)


def gru_cell(m, x):
    h = x[:, 0, :1] * m.start
    for row in x.unbind(1):
        h = m.cell(row, h)
    return m.out(h)


def elman(m, x):
    h = m.start
    for row in x.unbind(1):
        h = torch.tanh(row @ m.w + h @ m.u + m.b)
    return h


def crf(m, x):
    """Log-partition function ``[B]`` of a chain."""
    score, *rest = m.emit(x).unbind(1)
    for emission in rest:
        score = torch.logsumexp(score[:, :, None] + m.transitions, 1) + emission
    return torch.logsumexp(score + m.last, 1)


RECURRENT = {
    "rnn_tanh": Specimen(lambda: Net(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(4, 6, batch_first=True)), floats(5, 4)),
    "rnn_relu": Specimen(lambda: time_first(nn.RNN(4, 6, nonlinearity="relu")), floats(5, 4)),
    "lstm": Specimen(
        lambda: Net(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, dropout=0.2)),
        floats(5, 4),
    ),
    "lstm_projected": Specimen(
        lambda: Net(projected, lstm=nn.LSTM(4, 6, batch_first=True, bidirectional=True, proj_size=3)), floats(5, 4)
    ),
    "lstm_end": Specimen(
        lambda: Net(lambda m, x: m.lstm(x)[1][1].transpose(0, 1).flatten(1), lstm=nn.LSTM(4, 5, 2, batch_first=True)),
        floats(5, 4),
        "the last cell states",
    ),
    "gru": Specimen(lambda: time_first(nn.GRU(4, 6, bias=False, bidirectional=True)), floats(5, 4)),
    "gru_learned_start": Specimen(lambda: Net(learned_start, start=(1, 1, 6), gru=nn.GRU(4, 6)), floats(5, 4)),
    "packed_lstm": Specimen(
        lambda: Net(packed, lstm=nn.LSTM(4, 6, batch_first=True), out=nn.Linear(6, 3)), both(floats(5, 4), lengths(5))
    ),
    "packed_gru_end": Specimen(
        lambda: Net(packed_end, first=nn.Linear(3, 4), gru=nn.GRU(4, 6, batch_first=True, bidirectional=True)),
        both(floats(5, 3), lengths(5)),
    ),
    "lstm_cell": Specimen(lambda: Net(lstm_cell, cell=nn.LSTMCell(4, 5)), floats(6, 4)),
    "gru_cell": Specimen(lambda: Net(gru_cell, cell=nn.GRUCell(4, 5), start=(5,), out=nn.Linear(5, 3)), floats(6, 4)),
    "rnn_by_hand": direct(elman, floats(6, 4), "the first state has no batch", w=(4, 5), u=(5, 5), b=(5,), start=(5,)),
    "crf": Specimen(lambda: Net(crf, emit=nn.Linear(3, 4), transitions=(4, 4), last=(4,)), floats(6, 3), "output [B]"),
    "selective_scan": Specimen(lambda: seq(SelectiveScan(), nn.LayerNorm(6), SelectiveScan()), floats(7, 6)),
}


# Parameters used directly -------------------------------------------------------------------------------------------


class RoundToStep(torch.autograd.Function):
    """Quantisation with a learned step and a straight-through gradient (LSQ)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step):
        return (x / step).round() * step

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, step = ctx.saved_tensors
        return grad, (grad * ((x / step).round() - x / step)).sum()


def codebook(m, x):
    """The nearest code, with a straight-through gradient to the input (VQ-VAE), and the codebook loss."""
    codes = m.codes[torch.cdist(x, m.codes).argmin(-1)]
    return torch.cat([x * m.scale + (codes - x).detach(), (codes - x.detach()).square()], -1)


def relative(m, x):
    """A bias on the scores, gathered by relative position."""
    time = torch.arange(x.shape[1], device=x.device)
    return (x @ x.mT + m.bias[time[:, None] - time + x.shape[1] - 1]).softmax(-1) @ x


def one_vector(m, x):
    """All parameters are views of one."""
    w, b = m.flat[:12].view(3, 4), m.flat[12:]
    return F.linear(x, w, b)


def accumulated(m, x):
    out = torch.zeros(len(x), 3, 5, dtype=x.dtype, device=x.device)
    out[:, 0] += m.bias
    out[:, 1:] = x[:, None] * m.scale
    return out.index_add(1, torch.tensor([2, 0], device=x.device), m.extra.expand(len(x), -1, -1))


def resampled(m, x):
    """A position embedding for another resolution."""
    return x + F.interpolate(m.position, size=x.shape[-2:], mode="bilinear")


def warped(m, x):
    """Sampling at learned places."""
    return F.grid_sample(x, m.grid.tanh().expand(len(x), -1, -1, -1), align_corners=False)


def rotated(m, x):
    """Pairs of features turned by learned angles."""
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(x * torch.polar(m.size.exp(), m.angle)).flatten(-2)


def ordinal(m, x):
    return torch.sigmoid(x @ m.w[:, None] - torch.cat([m.first, m.gaps.exp()]).cumsum(0))


def energy_gradient(m, x):
    """The gradient of an energy with respect to the input, as forces are computed."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(m.energy(x).sum(), x, create_graph=True)[0]


def fourier(m, x):
    modes = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :3], torch.view_as_complex(m.w))
    return torch.fft.irfft(modes, n=x.shape[-1]) + m.skip(x)


def long_convolution(m, x):
    n = x.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(m.kernel, 2 * n), 2 * n)[..., :n]


def wheres(m, x):
    return torch.where(x > 0, x, m.fill) * torch.maximum(x, m.floor).masked_fill(x > 1, 0) + x.clamp(min=m.low)


PARAMETERS = {
    "scale": direct(lambda m, x: x * m.scale, floats(5, 4), scale=(4,)),
    "shift": direct(lambda m, x: torch.tanh(x + m.shift), floats(5, 4), shift=(5, 4)),
    "position": direct(lambda m, x: (x + m.position[None, : x.shape[1]]).square(), floats(5, 4), position=(7, 4)),
    "position_resampled": direct(resampled, floats(2, 4, 4), position=(1, 2, 3, 3)),
    "class_token": direct(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1).softmax(1), floats(3, 4), token=(1, 1, 4)
    ),
    "parameter_only_rows": direct(
        lambda m, x: torch.cat([m.token.expand(len(x), -1), x], 1), floats(4), "output rows without the input", token=(3,)
    ),
    "parameter_matmul": direct(lambda m, x: m.w @ x, floats(4, 5), w=(3, 4)),
    "matmul_parameter": direct(lambda m, x: x @ m.w, floats(5, 4), w=(4, 3)),
    "matmul_vector": direct(lambda m, x: x @ m.v, floats(4), "output [B]", v=(4,)),
    "matmul_time_first": direct(
        lambda m, x: torch.tensordot(x.transpose(0, 1), m.w, 1).transpose(0, 1), floats(5, 4), w=(4, 3)
    ),
    "matmul_batch_last": direct(lambda m, x: torch.tanh(m.w @ x.T + m.b[:, None]).T, floats(4), w=(3, 4), b=(3,)),
    "matmul_heads": direct(lambda m, x: x[:, None] @ m.w, floats(5, 4), w=(2, 4, 3)),
    "addmm": direct(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), floats(4), w=(4, 3), b=(3,)),
    "einsum": direct(lambda m, x: torch.einsum("bti,ij,j->btj", x, m.w, m.v), floats(5, 4), w=(4, 3), v=(3,)),
    "einsum_heads": direct(
        lambda m, x: torch.einsum("bhte,hed->btd", torch.einsum("btd,hde->bhte", x, m.w).tanh(), m.o),
        floats(5, 4),
        w=(2, 4, 3),
        o=(2, 3, 4),
    ),
    "einsum_channels": direct(lambda m, x: torch.einsum("bihw,io->bohw", x, m.w), floats(3, 4, 4), w=(3, 2)),
    "einsum_quadratic": direct(lambda m, x: torch.einsum("bi,ijk,bj->bk", x, m.w, x), floats(4), w=(4, 4, 2)),
    "conv_function": direct(lambda m, x: F.conv1d(x, m.w.flip(-1), m.b, padding=1), floats(2, 5), w=(3, 2, 3), b=(3,)),
    "norm_function": direct(lambda m, x: F.layer_norm(x, (4,), 1 + m.w, m.b), floats(5, 4), w=(4,), b=(4,)),
    "gate": direct(lambda m, x: x * torch.sigmoid(m.gate) + x.roll(1, 1) * (1 - m.gate.sigmoid()), floats(5), gate=(5,)),
    "temperature": direct(lambda m, x: (x / m.temperature.exp()).softmax(-1), floats(5), "0-dim", temperature=()),
    "power": direct(lambda m, x: (x.abs() + 0.1) ** m.power, floats(5), power=()),
    "where": direct(wheres, floats(5), fill=(), floor=(5,), low=()),
    "table": direct(lambda m, i: m.table[i].tanh(), tokens(7, 3), table=(7, 4)),
    "table_of_two": direct(
        lambda m, i: m.table[i[:, 0], i[:, 1]] + m.table.index_select(0, i[:, 0])[:, 3], tokens(5, 2), table=(5, 5)
    ),
    "table_gathered": direct(
        lambda m, i: m.table.expand(len(i), -1, -1).gather(1, i[..., None].expand(-1, -1, 4)), tokens(7, 3), table=(7, 4)
    ),
    "relative_position": direct(relative, floats(5, 4), bias=(9,)),
    "layer_mix": direct(lambda m, x: torch.einsum("l,bld->bd", m.mix.softmax(0), x), floats(3, 5), mix=(3,)),
    "one_vector": direct(one_vector, floats(4), flat=(15,)),
    "accumulated": direct(accumulated, floats(5), bias=(5,), scale=(2, 5), extra=(2, 5)),
    "low_rank": direct(lambda m, x: x @ m.u @ m.v, floats(5, 6), u=(6, 2), v=(2, 4)),
    "prototypes": direct(
        lambda m, x: F.normalize(x, dim=-1) @ F.normalize(m.w, dim=-1).T - torch.cdist(x, m.w), floats(5), w=(3, 5)
    ),
    "codebook": direct(codebook, floats(3, 4), codes=(6, 4), scale=(4,)),
    "ordinal": direct(ordinal, floats(4), w=(4,), first=(1,), gaps=(3,)),
    "rotation": direct(rotated, floats(6), size=(3,), angle=(3,)),
    "grid_sample": direct(warped, floats(2, 4, 4), grid=(1, 3, 3, 2)),
    "custom_function": Specimen(
        lambda: Net(lambda m, x: RoundToStep.apply(m.net(x), m.step.exp() / 8), net=mlp(4, 5, 3), step=()), floats(4)
    ),
    "ensemble_vmap": direct(
        lambda m, x: torch.vmap(lambda w, b: torch.tanh(x @ w + b), out_dims=1)(m.w, m.b),
        floats(5),
        "torch.vmap over the members",
        w=(3, 5, 4),
        b=(3, 4),
    ),
    "energy_gradient": Specimen(
        lambda: Net(energy_gradient, energy=mlp(4, 6, 5, 1)), floats(4), "a backward pass inside; one bias is unused"
    ),
    "fourier": Specimen(lambda: Net(fourier, w=(2, 3, 3, 2), skip=nn.Conv1d(2, 3, 1)), floats(2, 8), "complex numbers"),
    "long_convolution": direct(long_convolution, floats(3, 7), kernel=(3, 7)),
}


# Weights that are computed ------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def parametrized():
    inner = nn.Linear(4, 4)
    parametrize.register_parametrization(inner, "weight", Symmetric())
    return seq(inner, nn.Tanh(), inner)


def scaled_call(m, x):
    return functional_call(m.net, {name: p * m.scale for name, p in m.net.named_parameters()}, (x,))


def hypernetwork(m, x):
    """The weights come from a network whose input is a parameter."""
    return F.linear(x, m.net(m.code).view(3, 4), m.net(m.code.flip(0))[:3])


def conditional(m, x, context):
    """Weights of its own for each sample."""
    w, b = m.net(context).split([12, 3], -1)
    return torch.baddbmm(b[:, None], x, w.view(-1, 4, 3))


def lora():
    model = Net(
        lambda m, x: F.linear(x, m.inner.weight + m.b @ m.a, m.inner.bias), inner=nn.Linear(5, 4), b=(4, 2), a=(2, 5)
    )
    model.inner.weight.requires_grad_(False)
    return model


def film(m, x, context):
    scale, shift = m.condition(context)[..., None, None].chunk(2, 1)
    return (1 + scale) * m.conv(x) + shift


COMPUTED = {
    "weight_norm": Specimen(
        lambda: seq(
            parametrizations.weight_norm(nn.Conv1d(3, 4, 2)), nn.Tanh(), parametrizations.weight_norm(nn.Conv1d(4, 2, 1))
        ),
        floats(3, 5),
    ),
    "spectral_norm": Specimen(
        lambda: seq(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2)),
        floats(5),
        "each forward pass in train mode is one power iteration: a second one has slightly other weights",
    ),
    "orthogonal": Specimen(
        lambda: seq(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(4, 3))),
        floats(5, 4),
    ),
    "symmetric": Specimen(parametrized, floats(4), "one parametrized module, called twice"),
    "functional_call": Specimen(lambda: Net(scaled_call, net=mlp(4, 5, 3), scale=()), floats(4)),
    "hypernetwork": Specimen(lambda: Net(hypernetwork, net=mlp(5, 6, 12), code=(5,)), floats(4), "calls with no batch"),
    "hypernetwork_conditional": Specimen(
        lambda: Net(conditional, net=mlp(2, 5, 15)), both(floats(5, 4), floats(2)), "weights per sample"
    ),
    "lora": Specimen(lora, floats(5), "the base weight requires no gradient"),
    "film": Specimen(
        lambda: Net(film, conv=nn.Conv2d(2, 3, 3), condition=nn.Linear(4, 6)), both(floats(2, 5, 5), floats(4))
    ),
    "checkpointed": Specimen(
        lambda: Net(
            lambda m, x: x + checkpoint(m.block, x, use_reentrant=False),
            block=seq(nn.LayerNorm(5), nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 5)),
        ),
        floats(5),
        "the block runs again in the backward pass",
    ),
}


# Samples that take different ways -----------------------------------------------------------------------------------


def experts(m, x):
    """Each sample goes to one expert."""
    weight, chosen = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        rows = chosen == k
        out[rows] = weight[rows, None] * expert(x[rows])
    return out


def experts_of_tokens(m, x):
    """Each token of each sample goes to two experts."""
    rows = x.flatten(0, 1)
    weight, chosen = m.router(rows).softmax(-1).topk(2)
    out = torch.zeros_like(rows)
    for k, expert in enumerate(m.experts):
        row, place = (chosen == k).nonzero(as_tuple=True)
        out = out.index_add(0, row, weight[row, place, None] * expert(rows[row]))
    return out.view_as(x)


def heads(m, x, task):
    """Every head on every sample; each sample keeps one."""
    hidden = m.trunk(x)
    return torch.stack([head(hidden) for head in m.heads], 1)[torch.arange(len(x), device=x.device), task]


def heads_apart(m, x, task):
    """Each head on the samples of its task, which are then put back in order."""
    hidden = m.trunk(x)
    out = torch.cat([head(hidden[task == k]) for k, head in enumerate(m.heads)])
    return out[task.argsort(stable=True).argsort()]


def indexed_heads(m, x, task):
    return torch.bmm(m.w[task], m.trunk(x)[..., None])[..., 0] + m.b[task]


def early_exit(m, x):
    """Only the samples that are not done go through the second block."""
    hidden = m.first(x)
    going = hidden[:, 0] > 0
    return m.out(hidden.masked_scatter(going[:, None], m.second(hidden[going])))


def sorted_batch(m, x):
    order = x[:, 0].argsort()
    return m.last(m.first(x[order])[order.argsort()])


def graph(m, x, adjacency):
    return m.second(torch.bmm(adjacency, F.relu(m.first(torch.bmm(adjacency, x)))))


def messages(m, x, edges):
    """All graphs in one: ``edges [B, E, 2]`` of nodes, whose messages are summed by index_add."""
    B, N, _ = x.shape
    source, target = (edges + N * torch.arange(B, device=x.device)[:, None, None]).flatten(0, 1).T
    nodes = m.embed(x.flatten(0, 1))
    sums = torch.zeros_like(nodes).index_add(0, target, m.message(torch.cat([nodes[source], nodes[target]], -1)))
    return m.update(sums, nodes).view(B, N, -1).sum(1)


def three(a, b):
    return nn.ModuleList(nn.Linear(a, b) for _ in range(3))


TASK = both(floats(4), tokens(3))

ROUTED = {
    "experts": Specimen(
        lambda: Net(experts, router=nn.Linear(5, 3), experts=nn.ModuleList(mlp(5, 6, 5) for _ in range(3))),
        floats(5),
        "an expert may see no sample",
    ),
    "experts_of_tokens": Specimen(
        lambda: Net(experts_of_tokens, router=nn.Linear(5, 3), experts=three(5, 5)), floats(4, 5), "rows [B * T, D] inside"
    ),
    "heads": Specimen(lambda: Net(heads, trunk=mlp(4, 6), heads=three(6, 2)), TASK),
    "heads_apart": Specimen(lambda: Net(heads_apart, trunk=mlp(4, 6), heads=three(6, 2)), TASK, "a head may see no sample"),
    "heads_indexed": Specimen(lambda: Net(indexed_heads, trunk=mlp(4, 6), w=(3, 2, 6), b=(3, 2)), TASK),
    "early_exit": Specimen(
        lambda: Net(early_exit, first=nn.Linear(4, 5), second=mlp(5, 6, 5), out=nn.Linear(5, 2)), floats(4)
    ),
    "sorted_batch": Specimen(lambda: Net(sorted_batch, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), floats(4)),
    "graph_dense": Specimen(
        lambda: Net(graph, first=nn.Linear(4, 6), second=nn.Linear(6, 3)), both(floats(5, 4), adjacency(5))
    ),
    "graph_messages": Specimen(
        lambda: Net(messages, embed=nn.Linear(3, 5), message=mlp(10, 6, 5), update=nn.GRUCell(5, 5)),
        both(floats(4, 3), tokens(4, 7, 2)),
        "rows [B * N, D] and [B * E, D] inside",
    ),
}


# Models of the transformers library ---------------------------------------------------------------------------------


WIDE = 0.3  # With the library's 0.02, the gradients of models this narrow would be next to nothing.


class Named(nn.Module):
    """The first output of a model of the library, which gets its inputs by name."""

    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True)))[0]


def bert():
    config = hf.BertConfig(
        vocab_size=24,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        initializer_range=WIDE,
        attn_implementation="eager",
    )
    return hf.BertModel(config)


def gpt2():
    config = hf.GPT2Config(
        vocab_size=24,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=WIDE,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return Named(hf.GPT2LMHeadModel(config), "input_ids")


def llama():
    config = hf.LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        initializer_range=WIDE,
        use_cache=False,
    )
    return Named(hf.LlamaForCausalLM(config), "input_ids")


def t5():
    config = hf.T5Config(
        vocab_size=24,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=6,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    return Named(hf.T5ForConditionalGeneration(config), "input_ids", "attention_mask", "decoder_input_ids")


def hf_vit():
    config = hf.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        hidden_dropout_prob=0.1,
        initializer_range=WIDE,
    )
    return Named(hf.ViTModel(config, add_pooling_layer=False), "pixel_values")


def hf_convnext():
    config = hf.ConvNextConfig(
        image_size=16,
        num_stages=2,
        hidden_sizes=[4, 8],
        depths=[1, 2],
        drop_path_rate=0.2,
        layer_scale_init_value=0.5,
        initializer_range=WIDE,
    )
    return Named(hf.ConvNextModel(config), "pixel_values")


LIBRARY = {
    "hf_bert": Specimen(bert, both(tokens(24, 5), prefixes(5)), "returns a ModelOutput; its pooler is unused"),
    "hf_gpt2": Specimen(gpt2, tokens(24, 5), "tied embedding"),
    "hf_llama": Specimen(llama, tokens(24, 5), "rounds to single precision inside"),
    "hf_t5": Specimen(
        t5,
        both(tokens(24, 5), prefixes(5), tokens(24, 4)),
        "tied embedding, relative position bias; rounds to single precision inside",
    ),
    "hf_vit": Specimen(hf_vit, floats(3, 8, 8)),
    "hf_convnext": Specimen(hf_convnext, floats(3, 16, 16), "stochastic depth; its pooler is unused"),
}


ZOO: dict[str, Specimen] = {
    **DENSE,
    **CONVOLUTIONS,
    **EMBEDDINGS,
    **NORMS,
    **ATTENTION,
    **RECURRENT,
    **PARAMETERS,
    **COMPUTED,
    **ROUTED,
    **LIBRARY,
}
