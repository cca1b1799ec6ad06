"""What rules share: weights by name, absent tasks in mixing matrices, random walks, and what is learned of losses."""

import math
from dataclasses import dataclass

import pytest
import torch

import gradsurgery as gs
from gradsurgery.rules import _weighing
from gradsurgery.rules._walk import Walk, few_groups, random_order
from gradsurgery.rules._weights import (
    Weighted,
    Weights,
    check_names,
    diagonal,
    marked,
    operated,
    shares,
    task_names,
    weighted,
)

TASKS, GROUPS = ("a", "b", "c"), ("x", "y")
SOME = torch.tensor([[True, False, True], [False, False, False]])
GRAM = torch.eye(3).expand(2, 3, 3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Given(Weighted, gs.Rule):
    weights: Weights | None = None


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [{"a": 2, "c": 0}, [("a", 2), ("c", 0)], (("a", 2.0), ("c", 0.0))], ids=["map", "list", "tuple"]
)
def test_weights_of_one_form(weights):
    given = Given(weights)
    assert given.weights == (("a", 2.0), ("c", 0.0))
    state = given.init(TASKS, GROUPS, dtype=torch.float32)
    assert state["weights"].dtype == torch.float32
    assert state["weights"].tolist() == [[2, 1, 0]] * 2
    with pytest.raises(ValueError, match=r"`weights` names \['c'\], but the tasks are \['a', 'b'\]"):
        given.init(("a", "b"), GROUPS)


def test_no_weights():
    assert Given().weights is None
    assert Given().init(TASKS, GROUPS) == {}


def test_names():
    check_names("tasks", ("a", "c"), TASKS, gs.Sum())
    with pytest.raises(ValueError, match=r"Sum's `tasks` names \['d'\], but the tasks are \['a', 'b', 'c'\]"):
        check_names("tasks", ("a", "d"), TASKS, gs.Sum())
    assert task_names("tasks", ["a", "b"]) == ("a", "b")
    assert marked(("c", "a"), TASKS, GROUPS, None).tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize(
    ("weights", "active", "expected"),
    [
        (None, None, [[1 / 3] * 3] * 2),
        (None, SOME, [[0.5, 0, 0.5], [0, 0, 0]]),
        ([[1.0, 1, 2]] * 2, None, [[0.25, 0.25, 0.5]] * 2),
        ([[1.0, 1, 3]] * 2, SOME, [[0.25, 0, 0.75], [0, 0, 0]]),
        ([[0.0, 1, 0]] * 2, SOME, [[0, 0, 0], [0, 0, 0]]),
        ([[0.0, 0, 0]] * 2, None, [[0, 0, 0]] * 2),
    ],
)
def test_shares(weights, active, expected):
    found = shares(GRAM, {} if weights is None else {"weights": torch.tensor(weights)}, active)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, tensor(expected))


def test_shares_of_nobody():
    assert shares(torch.zeros(2, 0, 0), {}, None).shape == (2, 0)


def test_mixing_matrices_of_rules_that_weigh():
    weights = tensor([[2.0, 3, 4], [5, 6, 7]])
    assert diagonal(weights, GRAM, None).dtype == GRAM.dtype
    assert torch.equal(diagonal(weights, GRAM, None), torch.diag_embed(weights).float())
    assert torch.equal(diagonal(weights, GRAM, SOME), torch.diag_embed(tensor([[2.0, 1, 4], [1, 1, 1]])).float())
    mixing = torch.arange(18.0).view(2, 3, 3)
    assert weighted(mixing, {}, SOME) is mixing
    assert torch.equal(weighted(mixing, {"weights": weights}, None), mixing * weights.float()[:, :, None])
    found = weighted(mixing, {"weights": weights}, SOME)
    assert torch.equal(found, mixing * torch.tensor([[2.0, 1, 4], [1, 1, 1]])[:, :, None])


def test_absent_tasks_have_rows_and_columns_of_the_identity():
    mixing = torch.arange(1.0, 19.0, dtype=torch.float64).view(2, 3, 3)
    assert torch.equal(operated(mixing, GRAM, None), mixing.float())
    found = operated(mixing, GRAM, SOME)
    assert found.dtype == GRAM.dtype
    assert found.tolist() == [[[1, 0, 3], [0, 1, 0], [7, 0, 9]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]]


# --- Walks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_walks_are_the_plain_loops(groups, tasks):
    generator = torch.Generator().manual_seed(0)
    start, change, pairs = torch.rand(3, groups, tasks, tasks, dtype=torch.float64, generator=generator).unbind()
    order = random_order(start, generator)
    walk = Walk(start.shape, order)
    asked = walk.by_meeting(pairs)
    added = walk.run(start, change, lambda s, product: asked[s] - product)
    found = walk.by_pair(added, torch.full_like(pairs, 7.0))
    for g in range(groups):
        for i in range(tasks):
            products, expected = start[g, i].clone(), torch.full((tasks,), 7.0, dtype=torch.float64)
            for j in order[g, i].tolist():
                expected[j] = pairs[g, i, j] - products[j]
                products += expected[j] * change[g, j]
            torch.testing.assert_close(found[g, i], expected)


def test_groups_in_which_tasks_are_there():
    assert few_groups(None) is None
    assert few_groups(torch.ones(3, 2, dtype=torch.bool)) is None
    assert few_groups(torch.tensor([[True, False], [False, True]])) is None
    assert few_groups(torch.tensor([[True, False], [False, False], [True, True]])).tolist() == [0, 2]
    assert few_groups(torch.ones(3, 2, dtype=torch.bool, device="meta")) is None


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_softmax_of_those_who_are_there():
    values, there = tensor([1.0, 1000.0, 3.0, -2.0]), torch.tensor([True, False, True, True])
    expected = torch.zeros(4).double()
    expected[there] = torch.softmax(values[there], 0)
    torch.testing.assert_close(_weighing.softmax(values, there), expected)
    torch.testing.assert_close(_weighing.softmax(values + 900, there), expected)
    assert _weighing.softmax(values, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(_weighing.softmax(-values * 1e6, there)[3], tensor(1.0))


def test_losses_that_may_be_divided_by():
    there = torch.tensor([True, True, True, False])
    found = _weighing.positive(gs.GLS(), tensor([2.0, 0.0, 1e-30, -1.0]), there)
    assert found.tolist() == [2.0, 1e-20, 1e-20, 1.0]
    with pytest.raises(ValueError, match=r"Found -0.5 for the task of index 1"):
        _weighing.positive(gs.GLS(), tensor([2.0, -0.5, -3.0, 1.0]), there)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam(decay):
    start = tensor([1.0, -2.0, 0.5])
    value, state = start, _weighing.fresh_adam(3, None, torch.float64)
    parameters = [torch.nn.Parameter(number.clone()) for number in start]
    optimizers = [torch.optim.Adam([p], lr=0.1, weight_decay=decay) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        there = torch.tensor([True, step % 2 == 0, step > 2])  # tasks that come and go count steps of their own
        gradient = torch.randn(3, dtype=torch.float64, generator=generator)
        value, state = _weighing.adam(value, gradient, state, there, 0.1, decay=decay)
        for k in range(3):
            if there[k]:
                parameters[k].grad = gradient[k]
                optimizers[k].step()
        torch.testing.assert_close(value, torch.stack([p.detach() for p in parameters]), rtol=1e-12, atol=1e-14)
    assert state["steps"].tolist() == [6, 3, 3]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_settings_that_must_be_positive(value):
    _weighing.check_positive(mu=1e-9, lr=1e9)
    with pytest.raises(ValueError, match="`lr` must be positive. Found lr="):
        _weighing.check_positive(mu=1.0, lr=value)


def test_names_in_settings():
    assert _weighing.named_tasks("tasks", ["a", "b"]) == ("a", "b")
    assert _weighing.named_tasks("tasks", []) == ()
    with pytest.raises(ValueError, match=r"write \('a',\)"):
        _weighing.named_tasks("tasks", "a")
    with pytest.raises(ValueError, match="`tasks` must be distinct names"):
        _weighing.named_tasks("tasks", ["a", "a"])
