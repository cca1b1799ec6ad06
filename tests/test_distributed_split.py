"""Mixed batches under FSDP2: the single pass on several processes that share the parameters, against one on all samples."""

import pytest
import torch
from test_distributed import CLOSE, RULES, compare
from test_distributed_shards import whole
from test_stream import TASKS, Everything
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 4


class Blocks(nn.Module):
    """Symbols and a learned place go through blocks, and each task has a head."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.place = nn.Parameter(torch.randn(3, 5))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh()) for _ in "abc"
        )
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in TASKS)
        self.checkpointed = checkpointed

    def forward(self, tokens, ids):
        x = self.embed(tokens % 9) + self.place
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        x = x.mean(1)
        order = ids.argsort(stable=True).argsort()
        return torch.cat([head(x[ids == k]) for k, head in enumerate(self.heads)])[order]


def shard_blocks(model, **settings):
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)


def shard_everything(model):
    """With a layer that keeps its parameters, and one that is divided along another dimension."""
    fully_shard(model.body[0], reshard_after_forward=False)
    fully_shard(model.body[2], shard_placement_fn=lambda p: Shard(p.ndim - 1))
    fully_shard(model.norm)
    fully_shard(model)


def shard_quietly(model):
    """As for gradients that accumulate."""
    shard_blocks(model)
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)


def shard_half(model):
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**half))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**half, output_dtype=torch.float32))


MODELS = {
    "blocks": (Blocks, shard_blocks),
    "checkpointed": (lambda: Blocks(checkpointed=True), shard_blocks),
    "everything": (Everything, shard_everything),
    "half": (Blocks, shard_half),
    "quiet": (Blocks, shard_quietly),
}


def samples(step, rank, dtype):
    """Rank 0 never has the last task, and rank 1 not always the second."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = (5, 8, 3, 6)[rank]
    ids = torch.randint(4, (size,), generator=generator)
    ids[ids == 3] = 3 if rank else 0
    if rank == 1 and step % 2:
        ids[ids == 1] = 2
    tokens = torch.randint(6, (size, 3), generator=generator)
    return tokens, ids, torch.randn(size, 2, generator=generator, dtype=torch.float64).to(dtype)


def new(dtype, what, rule, sharded, frozen=(), **settings):
    torch.manual_seed(3)
    make, shard = MODELS[what]
    model = make().to(dtype)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if sharded:
        shard(model)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.5)
    settings = {"groups": "layer", "tasks": TASKS, "check_ranks": sharded, **settings}
    return model, gs.SurgeryOptimizer(sgd, rule, model=model, **settings)


def train(model, opt, ranks, dtype, accumulate=1, steps=STEPS):
    seen = []
    for step in range(steps):
        for number in range(accumulate):
            parts = [samples(accumulate * step + number, rank, dtype) for rank in ranks]
            tokens, ids, wanted = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            with opt.split(ids):
                found = (model(tokens, ids) - wanted).square().mean(1)
            opt.backward(found)
        opt.combine()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        seen.append([None if p.grad is None else whole(p.grad) for p in model.parameters()])
        opt.step()
        opt.zero_grad()
    return [whole(p.detach()) for p in model.parameters()], seen, opt.last


def sharded(rank, dtype, what, rule, settings, times):
    from gradsurgery._ranks import buckets

    size, buckets._BYTES = buckets._BYTES, 64
    try:
        model, opt = new(dtype, what, rule, True, **settings)
        found = train(model, opt, [rank], dtype, **times)
        left = [p for p in model.parameters() if not hasattr(p, "placements")]
        return *found, len(left), opt.streaming.why
    finally:
        buckets._BYTES = size


def check(ranks, count, dtype, what="blocks", rule=None, close=None, times=None, **settings):
    rule, times = rule or gs.GradVac(beta=0.3), times or {}
    results = ranks(count, sharded, dtype, what, rule, settings, times)
    expected = train(*new(dtype, what, rule, False, **settings), range(count), dtype, **times)
    for parameters, seen, last, left, why in results:
        compare(parameters, expected[0], close or CLOSE[dtype])
        for ours, theirs, first in zip(seen, expected[1], results[0][1], strict=True):
            compare(ours, theirs, close or 10 * CLOSE[dtype])
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, first, strict=True))
        assert last.groups == expected[2].groups
        assert torch.equal(last.active, expected[2].active)
        torch.testing.assert_close(last.losses, expected[2].losses, rtol=close or 10 * CLOSE[dtype], atol=0, equal_nan=True)
        assert left == 0  # all is sharded again
        assert why.startswith("parameters are sharded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_as_one_process_on_all_samples(ranks, rule, count, dtype):
    check(ranks, count, dtype, rule=RULES[rule], times={"steps": 20})


def test_weights_made_of_parameters_tied_ones_and_other_shards(ranks):
    check(ranks, 2, torch.float64, "everything", gs.PCGrad(), groups="tensor")


def test_several_passes_and_checkpointed_activations(ranks):
    check(ranks, 2, torch.float64, "checkpointed", times={"accumulate": 2, "steps": 2})


def test_settings_for_gradients_that_accumulate(ranks):
    check(ranks, 2, torch.float64, "quiet", gs.PCGrad(), times={"accumulate": 2, "steps": 2})


def test_mixed_precision(ranks):
    check(ranks, 2, torch.float32, "half", gs.PCGrad(), close=0.05, times={"steps": 2})


def test_frozen_parameters_and_a_rule_that_weighs_losses(ranks):
    frozen = ("place", "blocks.1.1.weight", "heads.2.bias")
    check(ranks, 2, torch.float64, rule=gs.Chain(gs.UncertaintyWeighting(), gs.PCGrad()), frozen=frozen)


# --- Without any gradient of FSDP2's own --------------------------------------------------------------------------------


def traffic(rank):
    """Reduce-scatters of FSDP2 in each step, and whether anything was left whole."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    calls, plain = [], _fsdp_param_group.foreach_reduce

    def counting(*arguments, **settings):
        calls.append(len(arguments[0]))
        return plain(*arguments, **settings)

    _fsdp_param_group.foreach_reduce = counting
    try:
        model, opt = new(torch.float64, "blocks", gs.PCGrad(), True)
        counts = []
        for _ in range(2):
            calls.clear()
            train(model, opt, [rank], torch.float64, steps=1)
            counts.append(len(calls))
        return counts
    finally:
        _fsdp_param_group.foreach_reduce = plain


def test_fsdp_adds_up_nothing_itself(ranks):
    for first, second in ranks(2, traffic):
        assert first > 0  # the first pass is compared with a plain one
        assert second == 0


def patience(rank):
    """For how long the groups wait."""
    model, opt = new(torch.float64, "blocks", gs.PCGrad(), True)
    train(model, opt, [rank], torch.float64, steps=1)
    ranks = opt._surgery.ranks
    wires = ranks._wire, ranks._whole.wire
    groups = [wire.group for wire in wires]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups], len(set(groups))


def test_rows_travel_in_a_group_that_is_as_patient_as_the_first(ranks):
    for (given, own), groups in ranks(2, patience):
        assert given == own != 1800  # which is the default
        assert groups == 2


# --- What goes wrong ----------------------------------------------------------------------------------------------------


def wrong(rank, what):
    model, opt = new(torch.float64, "blocks", gs.PCGrad(), True, verify=what != "verify" or rank == 0)
    try:
        if what == "rows":  # of one task, on one rank, not those of a plain pass
            from gradsurgery._ranks.unsharded import Inflow

            plain = Inflow.finish

            def finish(self):
                plain(self)
                if rank == 1:
                    self._gradients.rows[0].of[0].mul_(3)

            Inflow.finish = finish
        if not what.endswith("at first"):
            train(model, opt, [rank], torch.float64, steps=1)
        if what.startswith(("passes", "split")):
            tokens, ids, wanted = samples(1, rank, torch.float64)
            found = (model(tokens, ids) - wanted).square().mean(1)  # in which all ranks have to take part
            if rank:
                with opt.split(ids):
                    pass
                opt.backward(found)
            elif what.startswith("split"):
                opt.backward({"a": found.mean()})
            opt.combine()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if what == "rows":
            Inflow.finish = plain
    return "no error"


def test_every_rank_says_what_goes_wrong_on_one(ranks):
    first, second = ranks(2, wrong, "rows")
    assert first.startswith("RuntimeError: Rank 1 failed in the backward pass of this step")
    assert second.startswith("RuntimeError: The gradients of a single pass are not those of a plain backward pass")
    first, second = ranks(2, wrong, "verify")
    assert first == second
    assert "disagree about the settings: `verify`" in first
    for what in ("passes", "passes at first", "split at first"):
        first, second = ranks(2, wrong, what)
        assert first == second
        assert "every rank needs as many backward passes" in first
    first, second = ranks(2, wrong, "split")
    assert first == second
    assert "One step holds losses of tasks without `samples` and mixed batches with means" in first


class Product(torch.autograd.Function):
    """A product with a parameter, which nothing is known of."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return Product.apply(x, self.scale)


def unknown(rank, keep):
    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 4), Scaled(), nn.Linear(4, 1))
    for layer in model:
        fully_shard(layer, reshard_after_forward=not keep)
    fully_shard(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, tasks=TASKS)
    try:
        with opt.split(torch.arange(8) % 4):
            found = model(torch.randn(8, 4)).square()[:, 0]
        opt.backward(found)
        opt.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_operations_that_have_to_be_tried_out(ranks):
    for text in ranks(2, unknown, False):
        assert "split() has to try operation Product out" in text
        assert "reshard_after_forward=False" in text
    assert ranks(2, unknown, True) == ["no error"] * 2
