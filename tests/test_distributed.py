"""Several processes against one on all of their samples."""

from contextlib import nullcontext

import pytest
import torch
from conftest import TASKS, Heads
from torch import nn

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 20
RULES = {
    "sum": gs.Sum(),
    "mean": gs.Mean(),
    "pcgrad": gs.PCGrad(),
    "gradvac": gs.GradVac(beta=0.1),
    "mgda": gs.MGDA(),
    "chain": gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.1, tasks=("a", "b")), gs.Mean()),
}
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Mixed(nn.Module):
    """A batch of samples of three tasks: symbols and numbers go through a trunk, and each task reads off its own output."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(12, 4, sparse=sparse)
        self.trunk = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5))
        self.rest = nn.Linear(5, 3)

    def forward(self, x, symbols):
        return self.rest(torch.tanh(self.trunk(x + self.embedding(symbols))))

    def losses(self, x, symbols, task_ids):
        out = self(x, symbols)
        wanted = torch.stack([x.sum(1), -2 * x[:, 0], x[:, 1] - 3], 1)
        own = torch.nn.functional.one_hot(task_ids, 3).to(x)
        return (out - wanted).square() * (own + 0.1)  # [B, 3]


def samples(step, sizes, dtype):
    """Inputs, symbols and tasks of all ranks' samples. Rank 0 never has the third task, and not all have the second."""
    generator = torch.Generator().manual_seed(step)
    parts = []
    for rank, size in enumerate(sizes):
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
        symbols = torch.randint(12, (size,), generator=generator)
        task_ids = torch.randint(3, (size,), generator=generator)
        if rank == 0:
            task_ids[task_ids == 2] = 0
        if rank == 1 + step % 2:
            task_ids[task_ids == 1] = 2
        parts.append((x, symbols, task_ids))
    return parts


def joined(parts):
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def new(kind, dtype, **settings):
    torch.manual_seed(3)
    model = kind().to(dtype)
    settings = {"groups": "layer", "tasks": TASKS, **settings}
    rule = settings.pop("rule")
    inner = settings.pop("inner", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5))(model.parameters())
    wrapper = settings.pop("wrap", lambda model: model)
    wrapped = wrapper(model)
    return wrapped, gs.SurgeryOptimizer(inner, rule, model=wrapped, **settings)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def step_mixed(model, opt, part, **settings):
    x, symbols, task_ids = part
    with opt.split(task_ids, **settings):
        losses = getattr(model, "module", model).losses(x, symbols, task_ids)
    opt.backward(losses)


def task_losses(model, part):
    """One loss for each task that is there, and how many samples it is the mean of."""
    x, symbols, task_ids = part
    losses = getattr(model, "module", model).losses(x, symbols, task_ids)
    found = {task: losses[task_ids == k] for k, task in enumerate(TASKS) if (task_ids == k).any()}
    return {task: own.mean() for task, own in found.items()}, {task: len(own) for task, own in found.items()}


def step_tasks(model, opt, part):
    losses, counts = task_losses(model, part)
    opt.backward(losses, samples=counts)


def step_joint(model, opt, part):
    losses, counts = task_losses(model, part)
    opt.joint_loss(losses, samples=counts).backward()


SOURCES = {"mixed": step_mixed, "tasks": step_tasks}
WAYS = {**SOURCES, "joint": step_joint}


def gradients(model):
    return [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]


def equal(ours, theirs):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def compare(found, expected, close):
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
            assert error <= close, float(error)


def run(rank, sizes, dtype, source, settings, steps=STEPS, accumulate=1):
    """Parameters after training, whether gradients were equal on all ranks, and the last losses."""
    model, opt = new(Mixed, dtype, **settings)
    same = []
    for step in range(steps):
        for micro in range(accumulate):
            WAYS[source](model, opt, samples(step * accumulate + micro, sizes, dtype)[rank])
        opt.combine()
        same.append(gradients(model))
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], same, opt.last.losses, opt.rule_state


def alone(sizes, dtype, source, settings, steps=STEPS, accumulate=1):
    """The same on one process, with all samples."""
    settings = {k: v for k, v in settings.items() if k not in ("process_group", "wrap", "check_ranks")}
    model, opt = new(Mixed, dtype, **settings)
    for step in range(steps):
        for micro in range(accumulate):
            WAYS[source](model, opt, joined(samples(step * accumulate + micro, sizes, dtype)))
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], None, opt.last.losses, opt.rule_state


SIZES = {2: (5, 8), 4: (6, 3, 9, 1)}


def check_run(ranks, count, dtype, source, close=None, **settings):
    steps = {k: settings.pop(k) for k in ("steps", "accumulate") if k in settings}
    expected = alone(SIZES[count], dtype, source, settings, **steps)
    results = ranks(count, run_with, SIZES[count], dtype, source, settings, steps)
    for parameters, grads, losses, state in results:
        compare(parameters, expected[0], close or CLOSE[dtype])
        torch.testing.assert_close(losses, expected[2], rtol=10 * CLOSE[dtype], atol=0, equal_nan=True)
        assert all(equal(a, b) for a, b in zip(grads, results[0][1], strict=True))
        assert str(state) == str(results[0][3])


def run_with(rank, sizes, dtype, source, settings, steps):
    return run(rank, sizes, dtype, source, settings, **steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rule", RULES)
def test_ranks_do_as_one_process_on_all_samples(ranks, rule, source, count, dtype):
    check_run(ranks, count, dtype, source, rule=RULES[rule], process_group=True, check_ranks=True)


def test_a_distributed_data_parallel_model_is_all_that_it_takes(ranks):
    check_run(ranks, 2, torch.float32, "tasks", rule=gs.GradVac(beta=0.1), wrap=ddp, check_ranks=True)
    check_run(ranks, 2, torch.float64, "mixed", rule=gs.PCGrad(), wrap=ddp, check_ranks=True)


def test_a_joint_loss_counts_samples(ranks):
    check_run(ranks, 2, torch.float64, "joint", rule=gs.GradVac(beta=0.1), process_group=True, check_ranks=True)


def accumulate(rank, quietly):
    model, opt = new(Mixed, torch.float64, rule=gs.PCGrad(), wrap=ddp)
    for step in range(4):
        x, symbols, task_ids = samples(step, SIZES[2], torch.float64)[rank]
        with model.no_sync() if quietly and step % 2 == 0 else nullcontext():
            with opt.split(task_ids):
                found = (model(x, symbols) - 1).square()
            opt.backward(found)
        if step % 2:
            opt.step()
            opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_no_sync_makes_no_difference(ranks):
    plain = ranks(2, accumulate, False)
    assert equal(*plain)
    for ours, theirs in zip(ranks(2, accumulate, True), plain, strict=True):
        assert equal(ours, theirs)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("every", [1, 3])
def test_accumulation_and_surgery_less_often(ranks, source, every):
    # With losses of tasks, counts that change from pass to pass would weigh the step's samples alike.
    settings = {"rule": gs.GradVac(beta=0.1), "process_group": True, "every": every, "check_ranks": True}
    accumulate = 3 if source == "mixed" else 1
    check_run(ranks, 2, torch.float64, source, accumulate=accumulate, steps=8, **settings)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("rule", [gs.FAMO(), gs.Chain(gs.RLW(), gs.DWA())], ids=["famo", "rlw, dwa"])
def test_losses_are_weighed_by_those_of_all_ranks(ranks, rule, measure, source):
    settings = {"rule": rule, "process_group": True, "measure": measure, "check_ranks": True}
    check_run(ranks, 2, torch.float64, source, steps=8, **settings)
    check_run(ranks, 4, torch.float64, source, steps=4, **settings)


@pytest.mark.parametrize("groups", ["model", "tensor"])
def test_other_groups_and_optimizers(ranks, groups):
    check_run(ranks, 2, torch.float64, "mixed", rule=gs.PCGrad(), groups=groups, process_group=True, steps=5)
    adam = {"inner": new_adam, "nonfinite": "skip", "seed": 5}
    check_run(ranks, 4, torch.float64, "tasks", 1e-9, rule=gs.PCGrad(), groups=groups, process_group=True, steps=5, **adam)


def new_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


# --- Heads, absent tasks, and ranks without any -----------------------------------------------------------------------


def heads_run(rank, present, settings, steps=4, apart=True):
    torch.manual_seed(3)
    model = Heads().double()
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model=model, tasks=TASKS, **settings)
    grads = []
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        losses = model.losses(x)
        there = present[rank][step % len(present[rank])]
        if apart:
            for task in there:
                opt.backward({task: losses[task]}, retain_graph=True)
        else:
            opt.backward({task: losses[task] if task in there else None for task in TASKS})
        opt.step()
        grads.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        opt.zero_grad()
    return grads, opt.last


def heads_alone(present, settings, steps=4):
    torch.manual_seed(3)
    model = Heads().double()
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model=model, tasks=TASKS, **settings)
    grads = []
    for step in range(steps):
        losses = {}
        for rank, steps_of in enumerate(present):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
            for task in steps_of[step % len(steps_of)]:
                losses.setdefault(task, []).append(model.losses(x)[task])
        if losses:
            opt.backward({task: torch.stack(found).mean() for task, found in losses.items()})
        opt.step()
        grads.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        opt.zero_grad()
    return grads, opt.last


PRESENT = {
    "all": (["abc"], ["abc"]),
    "some on one rank only": (["ab", "c", "abc"], ["b", "ca", "a"]),
    "a rank without any": (["abc", "", "cb"], ["", "ab", ""]),
    "a step without any": (["abc", ""], ["bc", ""]),
    "each its own": (["a"], ["c"]),
    "a task that is nowhere": (["ab"], ["a"]),
}


@pytest.mark.parametrize("settings", [{"rule": gs.GradVac(), "every": 2}, {"rule": gs.RLW(), "measure": False}])
def test_steps_without_surgery_and_ranks_without_losses(ranks, settings):
    present = PRESENT["a rank without any"]
    expected, _ = heads_alone(present, settings)
    for grads, _ in ranks(2, heads_run, present, {**settings, "process_group": True}, 4, False):
        for step_grads, step_expected in zip(grads, expected, strict=True):
            compare(step_grads.values(), step_expected.values(), 1e-12)


@pytest.mark.parametrize(
    ("what", "source"),
    [(what, None) for what in PRESENT]
    + [(what, source) for what in PRESENT for source in ("autograd", "batched") if what != "a step without any"],
)
def test_tasks_on_some_ranks(ranks, what, source):
    """In a backward pass for each; or, with a source, in one where absent tasks are None, on a rank without any too."""
    settings = {"rule": gs.GradVac(beta=0.2), "groups": "layer"}
    expected, last = heads_alone(PRESENT[what], settings)
    settings = {**settings, "process_group": True, "check_ranks": True, **({} if source is None else {"source": source})}
    results = ranks(2, heads_run, PRESENT[what], settings, 4, source is None)
    for grads, step in results:
        for step_grads, step_expected in zip(grads, expected, strict=True):
            compare(step_grads.values(), step_expected.values(), 1e-12)
        assert all(equal(a.values(), b.values()) for a, b in zip(grads, results[0][0], strict=True))
        assert step.groups == last.groups
        assert torch.equal(step.active, last.active)
        torch.testing.assert_close(step.gram, last.gram)
        torch.testing.assert_close(step.losses, last.losses, equal_nan=True)


# --- Sparse gradients, half precision, complex numbers, nothing at all --------------------------------------------------


def sparse_run(rank, sizes, source, **settings):
    model = Mixed(sparse=True).double()
    settings = {"rule": gs.GradVac(beta=0.2), "groups": "layer", "tasks": TASKS, **settings}
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model=model, **settings)
    grads, layouts = [], []
    for step in range(3):
        parts = samples(step, sizes, torch.float64)
        SOURCES[source](model, opt, joined(parts) if rank is None else parts[rank])
        opt.combine()
        grads.append(gradients(model))
        layouts.append([p.grad.layout for p in model.parameters()])
        opt.step()
        opt.zero_grad()
    return grads, layouts


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("count", [2, 4])
def test_sparse_embeddings(ranks, source, count):
    torch.manual_seed(0)
    expected, layouts = sparse_run(None, SIZES[count], source)
    results = ranks(count, sparse_distributed, SIZES[count], source)
    for grads, found in results:
        assert found == layouts
        for step, (ours, theirs) in enumerate(zip(grads, expected, strict=True)):
            compare(ours, theirs, 1e-12)
            assert equal(ours, results[0][0][step])


def sparse_distributed(rank, sizes, source):
    return sparse_run(rank, sizes, source, process_group=True, check_ranks=True)


def odd_run(rank):
    torch.manual_seed(3)
    half = nn.Parameter(torch.randn(3, 5).bfloat16())
    turned = nn.Parameter(torch.randn(7, dtype=torch.complex64))
    nothing = nn.Parameter(torch.zeros(0, 3))
    one = nn.Parameter(torch.randn(()))
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    model = nn.ParameterList([half, turned, nothing, one, frozen])
    opt = gs.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model, groups="tensor", process_group=True
    )

    def losses(rank):
        common = half.float().square().sum() + turned.abs().square().sum() + nothing.sum() + one
        other = -half.float().sum() * (rank + 1) - (turned * (1 + 2j)).real.sum() - nothing.sum() + one**2 * rank
        return {"a": common * (rank + 1), "b": other}

    opt.backward(losses(rank))
    opt.combine()
    found = [p.grad for p in model]
    torch.manual_seed(3)
    plain = gs.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model, groups="tensor", process_group=False
    )
    plain.zero_grad()
    both = [losses(0), losses(1)]
    plain.backward({task: (both[0][task] + both[1][task]) / 2 for task in "ab"})
    plain.combine()
    return found, [p.grad for p in model]


def test_odd_parameters(ranks):
    results = ranks(2, odd_run)
    for found, expected in results:
        for ours, theirs in zip(found, expected, strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs)
        assert equal(found, results[0][0])
        assert found[1].is_complex()


# --- Scaled losses, and gradients that are not finite -------------------------------------------------------------------


def scaled_run(rank):
    model, opt = new(Mixed, torch.float32, rule=gs.GradVac(beta=0.2), process_group=True, check_ranks=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for step in range(6):
        losses, counts = task_losses(model, samples(step, (6, 7), torch.float32)[rank])
        if step == 3 and rank == 1:
            losses["a"] = losses["a"] * torch.inf
        opt.backward(losses, samples=counts, scaler=scaler)
        opt.combine()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return [p.detach() for p in model.parameters()], scales, opt.rule_state["target"]


def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(ranks):
    results = ranks(2, scaled_run)
    assert results[0][1] == results[1][1]
    assert results[0][1][3] < results[0][1][2]
    assert equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])
    assert all(p.isfinite().all() for p in results[0][0])


def nonfinite_run(rank, way):
    model, opt = new(Mixed, torch.float32, rule=gs.PCGrad(), process_group=True, nonfinite=way)
    losses, counts = task_losses(model, samples(0, (6, 7), torch.float32)[rank])
    if rank == 1:
        losses["a"] = losses["a"] * torch.nan
    opt.backward(losses, samples=counts)
    try:
        opt.combine()
    except FloatingPointError as error:
        return str(error)
    return opt.skipped, gradients(model)


def test_what_is_not_finite_is_so_on_all_ranks(ranks):
    first, second = ranks(2, nonfinite_run, "raise")
    assert first == second
    assert first.startswith("The gradient of task 'a' for parameter 'embedding.weight' holds inf or nan")
    first, second = ranks(2, nonfinite_run, "skip")
    assert first[0] == second[0] == {"a": 1}
    assert equal(first[1], second[1])
    assert all(grad.isfinite().all() for grad in first[1])


# --- The cheap way ------------------------------------------------------------------------------------------------------


def cheap_run(rank, rule):
    model, opt = new(Mixed, torch.float64, rule=rule, process_group=True, reduce="result", check_ranks=True)
    found, rows = [], []
    for step in range(3):
        part = samples(step, (6, 7), torch.float64)[rank]
        losses, counts = task_losses(model, part)
        named = dict(model.named_parameters())
        own = {
            task: dict(zip(named, torch.autograd.grad(loss, named.values(), retain_graph=True), strict=True))
            for task, loss in losses.items()
        }
        rows.append((own, counts))
        opt.backward(losses, samples=counts)
        opt.step()
        found.append((gradients(model), opt.last))
        opt.zero_grad()
    return found, rows, {name: name.rpartition(".")[0] or name for name in named}, opt.groups


def test_cheap_surgery_line_by_line(ranks):
    """Gram matrices are means over the ranks of those of their own rows, each times its share and the number of ranks."""
    results = ranks(2, cheap_run, gs.MGDA())
    for step in range(3):
        assert equal(results[0][0][step][0], results[1][0][step][0])
        both = [result[1][step] for result in results]
        total = {task: sum(counts.get(task, 0) for _, counts in both) for task in TASKS}
        there = [task for task in TASKS if total[task]]
        combined = []
        for names in results[0][3].values():
            scaled = []
            for own, counts in both:
                zero = torch.zeros_like(torch.cat([next(iter(own.values()))[name].flatten() for name in names]))
                scaled.append(
                    torch.stack(
                        [
                            torch.cat([own[task][name].flatten() for name in names]) * counts[task] / total[task]
                            if task in own
                            else zero
                            for task in there
                        ]
                    )
                )
            gram = sum(2 * rows @ rows.T for rows in scaled)
            mixing, _ = gs.MGDA().mix(gram[None], {})
            combined.append(mixing[0].sum(0) @ sum(scaled))
        found = torch.cat([grad.flatten() for grad in results[0][0][step][0]])
        torch.testing.assert_close(found, torch.cat(combined), rtol=1e-9, atol=1e-12)


def test_cheap_sum_is_exact(ranks):
    settings = {"rule": gs.Sum(), "process_group": True, "reduce": "result", "check_ranks": True}
    for source in SOURCES:
        check_run(ranks, 4, torch.float64, source, steps=4, **settings)
