"""No step waits for the device: nothing is read back to the host."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs
from gradsurgery import _buffer
from gradsurgery.rules import _solvers

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), bool(), float()
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="waits for the device"), NoReads():
        bool(torch.ones(()) > 0)


RULES = [gs.Sum(), gs.Mean(), gs.PCGrad(), gs.GradVac(), gs.GradVac(target=0.5), gs.Chain(gs.PCGrad(), gs.Mean())]
LOOKING = [  # on the CPU
    *(gs.MGDA(), gs.UPGrad(), gs.DualProj(), gs.CAGrad(), gs.NashMTL(), gs.NashMTL(update_every=2), gs.FairGrad(alpha=2.0)),
    *(gs.AlignedMTL(), gs.AlignedMTL(scale="median"), gs.IMTLG(), gs.ConFIG(), gs.GradNorm(), gs.CosineGate(("a",))),
    *(gs.AGEM(("a",)), gs.GEM(("a",)), gs.SDMGrad(), gs.MoDo(), gs.CRMOGM(gs.MGDA()), gs.Krum(), gs.EqualNorm()),
    gs.UPGrad(weights={"a": 2.0}),
]


@pytest.fixture
def elsewhere(monkeypatch):
    """Takes the way of other devices."""
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: False)
    monkeypatch.setattr(_solvers, "looks", lambda tensor: False)
    for name in ("_complementarity", "_shortest", "_aligned_mtl", "_mgda", "_cagrad", "_nash_mtl", "_imtl_g"):
        monkeypatch.setattr(f"gradsurgery.rules.{name}.looks", lambda tensor: False)


@pytest.mark.parametrize("tasks", [3, 7])
@pytest.mark.parametrize("rule", LOOKING, ids=repr)
def test_solvers(rule, tasks, elsewhere):
    torch.manual_seed(0)
    rows = torch.randn(2, tasks, 9, dtype=torch.float64)
    gram, names = rows @ rows.mT, list("abcdefg"[:tasks])
    state = rule.init(names, ["x", "y"])
    active = torch.tensor([[True] * tasks, [True] * (tasks - 1) + [False]])
    with NoReads():
        for here in (None, active, active):
            mixing, state = rule.mix(
                gram if here is None else gram * here[:, :, None] * here[:, None, :], state, active=here
            )
    assert mixing.isfinite().all()


@pytest.mark.parametrize("tasks", [3, 7])
@pytest.mark.parametrize("rule", LOOKING[:10], ids=repr)
def test_solvers_find_the_same_without_looking(rule, tasks, elsewhere, monkeypatch):
    torch.manual_seed(1)
    rows = torch.randn(2, tasks, 9, dtype=torch.float64)
    state = rule.init(list("abcdefg"[:tasks]), ["x", "y"])
    found = (rule.mix(rows @ rows.mT, state)[0] @ rows).sum(1)
    monkeypatch.undo()
    torch.testing.assert_close(found, (rule.mix(rows @ rows.mT, state)[0] @ rows).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_device(rule, source, monkeypatch):
    """The law of this name, in whole steps."""
    # On the CPU, where it costs nothing, the range of float32 products is looked at. Take the way of other devices.
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: False)
    torch.manual_seed(0)
    trunk, heads = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.ModuleList([nn.Linear(4, 1)] * 1)
    heads.append(nn.Linear(4, 1))
    model = nn.ModuleList([trunk, heads])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gs.SurgeryOptimizer(sgd, rule, model=model, groups="layer", source=source, tasks=("a", "b", "c"))
    recorder = gs.Recorder(opt)

    def step(absent):
        hidden = trunk(torch.randn(5, 3))
        losses = {"a": heads[0](hidden).mean(), "b": heads[1](hidden).square().mean(), "c": hidden.square().mean()}
        opt.backward({task: loss for task, loss in losses.items() if task != absent})
        opt.step()
        opt.zero_grad()

    for absent in (None, "b"):
        step(absent)  # plans are made once
        with NoReads():
            step(absent)
            step(absent)
    assert len(recorder.steps) == 6


@pytest.mark.parametrize("rule", [gs.GradVac(), gs.GradDrop(0.5), gs.TrimmedMean(1)], ids=repr)
@pytest.mark.parametrize("at_features", [True, False])
def test_features_and_coordinates(rule, at_features, monkeypatch):
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: False)
    model = nn.ModuleList([nn.Linear(3, 4), *(nn.Linear(4, 1) for _ in range(3))])
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, model=model)

    def step():
        z = model[0](torch.randn(5, 3))
        opt.backward([head(z).square().mean() for head in model[1:]], features=z if at_features else None)
        opt.step()
        opt.zero_grad()

    step()  # plans are made once
    with NoReads():
        step()
        step()


def test_step_with_a_scaler(monkeypatch):
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: False)
    model = nn.Linear(3, 2)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        out = model(torch.randn(5, 3))
        with NoReads():
            opt.backward({"a": out.mean(), "b": -out.square().mean()}, scaler=scaler)
            opt.combine()


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac()], ids=repr)
@pytest.mark.parametrize("every", [1, 2])
def test_mixed_batches(rule, every, monkeypatch):
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: False)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gs.SurgeryOptimizer(sgd, rule, model=model, groups="layer", tasks=3, every=every)

    def step():
        with opt.split(torch.tensor([2, 0, 1, 0, 2])):
            losses = model(torch.randn(5, 3, 5)).square().mean(1)
        opt.backward(losses)
        opt.step()
        opt.zero_grad()

    step()  # the first is checked, which reads
    step()
    with NoReads():
        for _ in range(3):
            step()
