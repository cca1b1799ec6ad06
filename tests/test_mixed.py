"""What is said of a batch: the task of each sample, and how many there are."""

import numpy as np
import pytest
import torch

from gradsurgery._counts import read_samples
from gradsurgery._mixed import MixedBatch

TASKS = ("a", "b", "c")
INDICES = [2, 0, 2, 2]
NAMES = ["c", "a", "c", "c"]


@pytest.mark.parametrize(
    "ids",
    [
        INDICES,
        tuple(INDICES),
        np.array(INDICES),
        np.array(INDICES, np.uint8),
        torch.tensor(INDICES),
        NAMES,
        np.array(NAMES),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_all_ways_to_name_tasks_are_the_same(ids):
    mixed = MixedBatch(ids, TASKS)
    assert mixed.task_of.tolist() == INDICES
    assert mixed.present == (0, 2)


@pytest.mark.parametrize("ids", [[3], [-1], [0, 3], ["d"], []])
def test_tasks_that_do_not_exist(ids):
    with pytest.raises(ValueError, match="task_ids"):
        MixedBatch(ids, TASKS)


@pytest.mark.parametrize(
    "ids", ["abc", [0.0], [True], [None], torch.tensor([0.0]), torch.tensor([True]), np.array([0.5]), 0]
)
def test_task_ids_of_another_type(ids):
    with pytest.raises(TypeError, match="task_ids"):
        MixedBatch(ids, TASKS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_losses_of_tasks_are_reductions_of_their_samples(reduction, shape):
    mixed = MixedBatch(INDICES, TASKS, reduction)
    losses = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    of = [losses[[i for i, task in enumerate(INDICES) if task == k]] for k in range(3)]
    expected = [getattr(own, reduction)() if len(own) else losses.new_zeros(()) for own in of]
    torch.testing.assert_close(mixed.values(losses, torch.zeros(3, dtype=torch.float64)), torch.stack(expected).detach())
    factors = torch.tensor([0.5, 7.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(torch.stack(expected) @ factors, losses)
    torch.testing.assert_close(mixed.seeds(losses, factors), gradient)
    assert mixed.labels(losses).shape == (4, *[1] * (losses.dim() - 1))
    counts = mixed.counts(losses)
    assert counts.of == tuple(float(own.numel()) for own in of)
    assert counts.kind == ("mixed" if reduction == "mean" else "sum")


def test_losses_that_do_not_fit_the_batch():
    one = MixedBatch([0], TASKS)
    losses = torch.ones(1, requires_grad=True)
    assert one.check(losses) is losses
    with pytest.raises(ValueError, match=r"`losses` has no elements. Found shape \(1, 0\)"):
        one.check(torch.ones(1, 0, requires_grad=True))
    with pytest.raises(ValueError, match=r"each of the 1 samples .* Found shape \(\)"):
        one.check(torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match=r"each of the 1 samples .* Found shape \(2,\)"):
        one.check(torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="no graph"):
        one.check(torch.ones(1))
    with pytest.raises(TypeError, match="Found dict"):
        one.check({"a": losses})


def test_samples():
    assert read_samples(None, ["c", "a"], TASKS) == ((1.0, 0.0, 1.0), "alike")
    assert read_samples({"a": 2, "c": 0.0}, ["c", "a"], TASKS) == ((2.0, 0.0, 0.0), "given")
    assert read_samples({"a": 2, "b": 5}, ["a"], TASKS) == ((2.0, 0.0, 0.0), "given")  # b's loss is not there


@pytest.mark.parametrize("number", [-1, -0.5, float("inf"), float("nan"), True, "2", None])
def test_samples_are_numbers(number):
    with pytest.raises(ValueError, match=r"`samples\['a'\]` must be a number, at least 0"):
        read_samples({"a": number}, ["a"], TASKS)


def test_samples_of_other_tasks():
    with pytest.raises(ValueError, match=r"`samples` names 'd', but the tasks are \['a', 'b', 'c'\]"):
        read_samples({"a": 1, "d": 1}, ["a"], TASKS)
    with pytest.raises(ValueError, match=r"no number for task 'b', whose loss is there. Found \['a'\]"):
        read_samples({"a": 1}, ["a", "b"], TASKS)
    with pytest.raises(TypeError, match="`samples` must be a mapping from tasks to numbers. Found list"):
        read_samples([1, 2], ["a"], TASKS)
