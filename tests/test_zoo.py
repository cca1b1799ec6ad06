"""The single pass on every model of the zoo."""

import pytest
import torch
from conftest import wrap
from zoo import ZOO

import gradsurgery as gs

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
        losses = out * torch.randn(out.shape, dtype=out.real.dtype)
    losses = losses.abs().square() if losses.is_complex() else losses
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
