"""The single pass on every model of the zoo."""

from collections import namedtuple

import pytest
import torch
from conftest import wrap
from torch import nn
from zoo import ZOO, Net

import gradsurgery as gs
from gradsurgery.sources._split import cuts

TASKS = ("a", "b", "c", "d")
ORDERS = {
    "all in turn": [0, 1, 2, 0, 1, 2],
    "one absent, one alone": [2, 0, 0, 3, 3, 3, 0],
    "one task": [1, 1, 1, 1],
}
every_model = pytest.mark.parametrize("name", ZOO)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(name, ids):
    specimen = ZOO[name]
    return specimen.model(), specimen.batch(len(ids))


def dense(gradient):
    return gradient.to_dense() if gradient.is_sparse else gradient


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("ids", ORDERS.values(), ids=ORDERS)
@every_model
def test_check_split(name, ids):
    model, batch = made(name, ids)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gs.testing.check_split(model, batch, ids).errors.keys() == trained


@pytest.mark.parametrize("name", list(ZOO)[::3])
def test_in_single_precision(name):
    ids = ORDERS["all in turn"]
    gs.testing.check_split(*made(name, ids), ids, reduction="sum")


@pytest.mark.usefixtures("_double")
@every_model
def test_the_sum_of_the_tasks_is_in_the_gradients(name):
    ids = torch.tensor(ORDERS["one absent, one alone"])
    model, batch = made(name, ids)
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    opt = wrap(model, gs.Sum(), tasks=TASKS, verify=False)
    with opt.split(ids):
        out = model(*batch)
        out = out if isinstance(out, torch.Tensor) else out[0]
        losses = out * torch.randn(out.shape, dtype=out.dtype)
    expected = dict.fromkeys(parameters)
    for k in ids.unique():
        found = torch.autograd.grad(losses[ids == k].mean(), trained, retain_graph=True, allow_unused=True)
        for (n, _), gradient in zip([(n, p) for n, p in parameters.items() if p.requires_grad], found, strict=True):
            if gradient is not None:
                expected[n] = dense(gradient) if expected[n] is None else expected[n] + dense(gradient)
    opt.backward(losses)
    opt.combine()
    largest = max(gradient.norm() for gradient in expected.values() if gradient is not None)
    tolerance = 1e-4 if "single precision" in ZOO[name].note else 1e-11
    for n, parameter in parameters.items():
        if expected[n] is None:  # frozen, or not reached
            assert parameter.grad is None, n
        elif parameter.grad is None:  # reached by samples that it makes no difference to
            assert not expected[n].any(), n
        else:
            assert (dense(parameter.grad) - expected[n]).norm() <= tolerance * largest, n


# --- check_split ------------------------------------------------------------------------------------------------------

IDS = [0, 1, 1, 0]


def two_layers():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))


def test_check_split_says_what_is_wrong(monkeypatch):
    products = cuts.products
    # Products of a weight [4, 3], and of one [2, 4].
    factor = {(4, 3): 1.5, (2, 4): 1.25}
    monkeypatch.setattr(cuts, "products", lambda *args: (found := products(*args)) * factor[tuple(found.shape[-2:])])
    model, batch = two_layers(), torch.randn(4, 3)
    message = (
        r"The single pass is wrong for '0\.weight', '2\.weight'\. relative error, at most 6\.4e-05:\n"
        r"0\.weight  5\.0e-01\n2\.weight  2\.5e-01\n0\.bias    [0-9.]*e"
    )
    with pytest.raises(AssertionError, match=message):
        gs.testing.check_split(model, batch, IDS)
    report = gs.testing.check_split(model, batch, IDS, tolerance=1.0)
    assert report.errors["0.weight"] == pytest.approx(0.5)
    assert report.errors["0.bias"] < 1e-6
    assert report.wrong == []


def test_check_split_finds_nan(monkeypatch):
    products = cuts.products
    monkeypatch.setattr(cuts, "products", lambda *args: products(*args) * torch.nan)
    with pytest.raises(AssertionError, match=r"wrong for '0\.weight', '2\.weight'"):
        gs.testing.check_split(two_layers(), torch.randn(4, 3), IDS)


def test_reports_show_the_worst():
    report = gs.testing.SplitReport({f"p{i}": float(i) for i in range(13)}, tolerance=10.0)
    assert report.wrong == ["p11", "p12"]
    assert str(report).splitlines()[:3] == ["relative error, at most 1.0e+01:", "p12  1.2e+01", "p11  1.1e+01"]
    assert str(report).splitlines()[-1] == "and 3 more"
    assert gs.testing.SplitReport({"p": torch.nan}, 1.0).wrong == ["p"]


Output = namedtuple("Output", ["past", "logits"])

CALLS = {
    "a tensor": (two_layers, lambda x: x),
    "a tuple": (lambda: Net(lambda m, x, y: m.net(x + y), net=two_layers()), lambda x: (x, x)),
    "a list": (lambda: Net(lambda m, x, y: m.net(x + y), net=two_layers()), lambda x: [x, x]),
    "a mapping": (lambda: nn.Bilinear(3, 3, 2), lambda x: {"input1": x, "input2": x}),
    "a mapping as output": (lambda: Net(lambda m, x: {"past": None, "out": m.net(x)}, net=two_layers()), lambda x: x),
    "a tuple as output": (lambda: Net(lambda m, x: Output((), m.net(x)), net=two_layers()), lambda x: x),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("ids", [IDS, ["a", "b", "b", "a"], torch.tensor(IDS), torch.tensor(IDS).numpy()], ids=type)
def test_what_check_split_takes(what, ids):
    make, batch = CALLS[what]
    assert gs.testing.check_split(make(), batch(torch.randn(4, 3)), ids).errors


def test_check_split_with_a_loss_of_ones_own():
    model, x = two_layers(), torch.randn(4, 3)
    gs.testing.check_split(model, x, IDS, loss=lambda out: (out - 1).square())
    with pytest.raises(ValueError, match="one entry for each of the 4 samples"):
        gs.testing.check_split(model, x, IDS, loss=lambda out: out.mean())
    with pytest.raises(ValueError, match="batch normalisation in training mode"):
        gs.testing.check_split(nn.Sequential(model, nn.BatchNorm1d(2)), x, IDS)
    with pytest.raises(TypeError, match=r"The model returned no tensor, but dict\. Pass `loss`"):
        gs.testing.check_split(Net(lambda m, x: {"out": None}, net=model), x, IDS)


def test_check_split_leaves_no_gradients():
    model = two_layers()
    gs.testing.check_split(model, torch.randn(4, 3), IDS)
    assert all(parameter.grad is None for parameter in model.parameters())
