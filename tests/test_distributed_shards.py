"""Sharded parameters: FSDP2, tensor parallelism and their compositions, against one process on all samples."""

import pytest
import torch
from conftest import TASKS, Heads
from test_distributed import CLOSE, RULES, compare
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 20
SAMPLES = {"a": (4, 6, 3, 5), "b": (2, 2, 7, 1), "c": (0, 3, 4, 2)}  # rank 0 has none of the last task


class Blocks(Heads):
    """As :class:`Heads`, with a trunk of blocks that can be checkpointed."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh()) for _ in "ab"
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        hidden = self.trunk(x)
        for block in self.blocks:
            hidden = hidden + (checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden))
        adapted = torch.tanh(self.adapter(hidden))
        return {task: head(adapted if task in ("a", "b") else hidden) for task, head in self.heads.items()}


def samples(step, rank, dtype):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {
        t: torch.randn(max(sizes[rank], 1), 4, generator=generator, dtype=torch.float64).to(dtype)
        for t, sizes in SAMPLES.items()
    }


def losses(model, step, ranks, dtype):
    """The mean over the samples of these ranks; zero, but with a graph, where there are none."""
    parts = [(task, r, x) for r in ranks for task, x in samples(step, r, dtype).items()]
    outputs = model(torch.cat([x for _, _, x in parts]))
    totals, start = dict.fromkeys(SAMPLES, 0), 0
    for task, rank, x in parts:
        wanted = (-1) ** TASKS.index(task) * x.sum(1) + 0.1 * step
        error = outputs[task][start : start + len(x), 0] - wanted
        totals[task] = totals[task] + error.square().sum() * (SAMPLES[task][rank] > 0)
        start += len(x)
    counts = {task: sum(sizes[rank] for rank in ranks) for task, sizes in SAMPLES.items()}
    return {task: total / max(counts[task], 1) for task, total in totals.items()}, counts


def shard(model, how):
    if how in ("tensor", "sequence"):
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
            if how == "sequence":
                split = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),))
                parallelize_module(block, mesh, split)
                plan = {
                    "0": SequenceParallel(sequence_dim=0),
                    "1": ColwiseParallel(input_layouts=Shard(0)),
                    "3": RowwiseParallel(),
                }
            parallelize_module(block, mesh, plan)
        return
    shape = (torch.distributed.get_world_size(),)
    names = ("shard",)
    if how == "hybrid":
        shape, names = (2, 2), ("replicate", "shard")
    if how == "both":
        shape, names = (2, 2), ("shard", "tensor")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    settings = {"mesh": mesh}
    if how == "both":
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
        settings = {"mesh": mesh["shard"]}
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if how == "half" else {}
    for block in model.blocks:
        fully_shard(block, **settings, mp_policy=MixedPrecisionPolicy(**half))
    fully_shard(model, **settings, mp_policy=MixedPrecisionPolicy(**half, output_dtype=torch.float32 if half else None))


def train(model, opt, ranks, dtype, steps):
    grads = []
    for step in range(steps):
        found, counts = losses(model, step, ranks, dtype)
        opt.backward(found, samples=counts)
        opt.combine()
        grads.append([None if p.grad is None else whole(p.grad) for p in model.parameters()])
        opt.step()
        opt.zero_grad()
    return [whole(p.detach()) for p in model.parameters()], grads, opt.last, opt.rule_state


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def new(dtype, how, rule, groups="layer", checkpointed=False):
    torch.manual_seed(3)
    model = Blocks(checkpointed).to(dtype)
    if how is not None:
        shard(model, how)
    sgd = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.5)
    return model, gs.SurgeryOptimizer(sgd, rule, model=model, groups=groups, check_ranks=True)


def sharded(rank, how, dtype, rule, settings, steps=STEPS):
    model, opt = new(dtype, how, rule, **settings)
    count = torch.distributed.get_world_size()
    # Ranks of one tensor-parallel group work on the same samples.
    ours = list(range(count)) if how in ("tensor", "sequence") else [rank // 2] if how == "both" else [rank]
    return train(model, opt, ours, dtype, steps)


def check(ranks, count, how, rule, dtype, close=None, steps=STEPS, **settings):
    results = ranks(count, sharded, how, dtype, rule, settings, steps)
    model, opt = new(dtype, None, rule, **{k: v for k, v in settings.items() if k != "checkpointed"})
    expected = train(model, opt, list(range(2 if how == "both" else count)), dtype, steps)
    for parameters, grads, last, state in results:
        compare(parameters, expected[0], close or CLOSE[dtype])
        assert str(state) == str(results[0][3])
        torch.testing.assert_close(last.losses, expected[2].losses, rtol=close or 10 * CLOSE[dtype], atol=0)
        for ours, theirs in zip(grads, results[0][1], strict=True):
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_fsdp(ranks, rule, count, dtype):
    check(ranks, count, "fsdp", RULES[rule], dtype)


@pytest.mark.parametrize("how", ["hybrid", "both", "tensor", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_meshes(ranks, how, dtype):
    count = 2 if how in ("tensor", "sequence") else 4
    check(ranks, count, how, gs.GradVac(beta=0.1), dtype)


def test_activation_checkpointing(ranks):
    check(ranks, 2, "fsdp", gs.GradVac(beta=0.1), torch.float64, steps=5, checkpointed=True, groups="tensor")


@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_coordinates(ranks, how):
    check(ranks, 2, how, gs.Chain(gs.UncertaintyWeighting(), gs.TrimmedMean(1)), torch.float64, steps=5)


def test_mixed_precision(ranks):
    check(ranks, 2, "half", gs.PCGrad(), torch.float32, close=0.02, steps=3)


# --- What cannot be done says so ---------------------------------------------------------------------------------------


def refusals(rank):
    found = {}

    def attempt(name, make):
        try:
            make()
        except (ValueError, TypeError) as error:
            found[name] = str(error)

    model, opt = new(torch.float32, "fsdp", gs.PCGrad())
    sgd = opt.optimizer
    attempt("batched", lambda: gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, source="batched"))
    attempt("every", lambda: gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, every=2))
    attempt("result", lambda: gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, reduce="result"))
    attempt("alone", lambda: gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, process_group=False))
    attempt("nameless", lambda: gs.SurgeryOptimizer(sgd, gs.PCGrad()))

    def split():
        other = gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, tasks=TASKS)
        with other.split([0, 1]):
            pass

    attempt("split", split)

    def different():
        values, _ = losses(model, 0, [rank], torch.float32)
        opt.backward({task: values[task] for task in ("ab" if rank else "abc")})

    attempt("different", lambda: opt.backward(dict.fromkeys(TASKS, losses(model, 0, [rank], torch.float32)[0]["a"])))
    opt.zero_grad()
    attempt("different", different)
    opt.zero_grad()

    def fewer():
        first, second = (losses(model, step, [rank], torch.float32)[0] for step in range(2))
        opt.backward(first)
        if rank:
            opt.combine()
        else:
            opt.backward(second)

    attempt("fewer", fewer)
    return found


def test_what_cannot_be_done_with_sharded_parameters(ranks):
    first, second = ranks(2, refusals)
    assert first == second
    assert "needs source='autograd'" in first["batched"]
    assert "needs every=1" in first["every"]
    assert "leave out reduce='result'" in first["result"]
    assert "leave out process_group=False" in first["alone"]
    assert "pass `model` too" in first["nameless"]
    assert "single pass needs whole ones. Call backward() with one loss for each task" in first["split"]
    for name in ("different", "fewer"):
        assert "every rank needs the same tasks" in first[name]
        assert "samples={...: 0}" in first[name]
