"""Cells and levels of a step, the rows behind them, and the weights that stand for what was done."""

import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import _gradients
from gradsurgery._buffer import Rows
from gradsurgery._gradients import TaskGradients
from gradsurgery._plan import Level, Plan
from gradsurgery._reuse import Reuse, nearest_weights

CPU = torch.device("cpu")
TASKS = ("a", "b", "c", "d")
GROUPS = ("x", "y", "z")


def planned(reach, group_of, groups=GROUPS):
    return Plan(tuple(reach), group_of, groups, TASKS, CPU)


def seen(plan):
    return [[(cell.group, cell.name, cell.tasks, cell.parameters) for cell in level.cells] for level in plan.levels]


def rows_of(reach, sizes, seed=0):
    """Random rows, and the vectors ``[K, n]`` that they are."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for reached, size in zip(reach, sizes, strict=True):
        own = Rows()
        for task in reached:
            own.add(task, torch.randn(size, dtype=torch.float64, generator=generator))
        rows.append(own)
    return rows


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_cells_are_what_the_same_tasks_reached_widest_first():
    reach = [(0, 1), (0, 1, 2), (2,), (), (0, 1), (1, 2), (0, 2), (3,)]
    plan = planned(reach, [0, 0, 0, 0, 0, 2, 2, 2])
    assert plan.alone == [2, 7]
    assert seen(plan) == [
        [(0, "x", (0, 1, 2), (1,)), (2, "z", (1, 2), (5,))],
        [(0, "x [a, b]", (0, 1), (0, 4)), (2, "z [a, c]", (0, 2), (6,))],
    ]
    first, second = plan.levels
    assert first.groups.tolist() == second.groups.tolist() == [0, 2]
    assert first.active.tolist() == [[True, True, True, False], [False] * 4, [False, True, True, False]]
    assert not first.full
    assert not second.full


def test_of_cells_as_wide_the_first_parameters_come_first():
    plan = planned([(2, 3), (0, 1), (1, 2)], [1, 1, 1])
    assert seen(plan) == [[(1, "y", (2, 3), (0,))], [(1, "y [a, b]", (0, 1), (1,))], [(1, "y [b, c]", (1, 2), (2,))]]


def test_nothing_to_operate_on():
    plan = planned([(1,), ()], [0, 1])
    assert plan.levels == []
    assert plan.alone == [0]


@pytest.mark.parametrize(
    ("reach", "full"),
    [
        ([(0, 1, 2, 3)] * 3, True),
        ([(0, 1, 2, 3)] * 2, False),
        ([(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2)], False),
    ],
)
def test_a_level_is_full_if_all_tasks_reached_all_groups(reach, full):
    (level,) = planned(reach, range(len(reach))).levels
    assert level.full == full
    assert level.active.all() == full


# --- Levels -----------------------------------------------------------------------------------------------------------

REACHES = {
    "full": [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)],
    "some": [(0, 3), (0, 3), (1, 2, 3), (1, 2, 3)],
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_gram_matrices_of_a_level(reach):
    sizes, group_of = [5, 2, 7, 1], [0, 0, 1, 2] if len(reach[0]) == 4 else [0, 0, 2, 2]
    rows = rows_of(reach, sizes)
    (level,) = planned(reach, group_of).levels
    found = level.gram(rows, torch.float64)
    assert found.shape == (3, 4, 4)
    for g in range(3):
        members = [rows[p].of for p in range(4) if group_of[p] == g]
        for i in range(4):
            for j in range(4):
                expected = sum((float(of[i] @ of[j]) for of in members if i in of and j in of), 0.0)
                assert float(found[g, i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert level.gram(rows, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("mixes", [False, True])
def test_what_a_level_makes_of_its_rows(reach, mixes):
    sizes, group_of = [5, 2, 7, 1], [0, 0, 1, 2] if len(reach[0]) == 4 else [0, 0, 2, 2]
    (level,) = planned(reach, group_of).levels
    coefficients = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    rows = rows_of(reach, sizes)
    expected = [sum(coefficients[group_of[p], k] * row for k, row in rows[p].of.items()) for p in range(4)]
    found = dict(level.combine(rows, coefficients))
    for p in range(4):
        torch.testing.assert_close(found[p], expected[p])
        assert not rows[p].tasks  # they are freed
    rows = rows_of(reach, sizes)
    mixing = torch.randn(3, 4, 4) if mixes else None
    for p, (place, tasks, own) in level.operate(rows, lambda p, rows, own: (p, rows.tasks, own), mixing):
        assert (place, tasks) == (p, reach[p])
        assert not mixes or torch.equal(own, mixing[group_of[p]][list(reach[p])][:, list(reach[p])])
        assert mixes or own is None
    assert not any(own.tasks for own in rows)


# --- The rows of an optimizer -----------------------------------------------------------------------------------------


def gradients(*shapes, groups="tensor"):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return TaskGradients(torch.optim.SGD(parameters, lr=0.1), None, groups)


def test_plans_are_kept(monkeypatch):
    monkeypatch.setattr(_gradients, "_MOST_PLANS", 2)
    found = gradients(2, 3)
    for own in found.rows:
        own.add(0, torch.ones(1))
        own.add(1, torch.ones(1))
    whole = found.plan(TASKS)
    assert seen(whole) == [[(0, "param0", (0, 1), (0,)), (1, "param1", (0, 1), (1,))]]
    part = found.plan(TASKS, [1])
    assert seen(part) == [[(1, "param1", (0, 1), (1,))]]
    assert found.plan(TASKS) is whole
    assert found.plan(TASKS, [0, 1]) is whole
    assert found.plan(TASKS, [1]) is part
    found.plan(TASKS, [0])  # one too many: all are forgotten
    assert found.plan(TASKS) is not whole


def test_what_is_not_finite_has_a_name():
    found = gradients(2, 3)
    for p, own in enumerate(found.rows):
        for task in range(3):
            own.add(task, torch.ones(2 + p))
    assert found.not_finite() == []
    found.rows[1].of[2][0] = float("inf")
    found.rows[0].of[1][1] = float("nan")
    assert sorted(found.not_finite()) == [(1, "param0"), (2, "param1")]
    found.drop(2)
    assert found.not_finite() == [(1, "param0")]
    assert [own.tasks for own in found.rows] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("there", ["none", "dense", "sparse"])
@pytest.mark.parametrize("combined", ["dense", "sparse"])
def test_combined_gradients_are_added_to_what_is_there(there, combined):
    found = gradients((3, 2))
    (parameter,) = found.parameters
    form = {"none": lambda t: None, "dense": torch.clone, "sparse": lambda t: t.to_sparse(1)}
    old, new = torch.tensor([[1.0, 2], [0, 0], [3, 0]]), torch.tensor([[0.0, 0], [5, 6], [0, 7]])
    parameter.grad = form[there](old)
    found.accumulate(0, form[combined](new))
    assert parameter.grad.is_sparse == (combined == "sparse" and there != "dense")
    assert torch.equal(parameter.grad.to_dense(), new if there == "none" else old + new)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_gradient_that_is_a_view_is_added_to_where_it_is(dims):
    found, whole = gradients((3, 2)), torch.zeros(24)
    (parameter,) = found.parameters
    parameter.grad = whole[6:12].view(3, 2)  # as in the buckets of DistributedDataParallel
    found.accumulate(0, torch.ones(3, 2).to_sparse(dims))
    assert whole.tolist() == [0] * 6 + [1] * 6 + [0] * 12


def test_rows_of_other_steps_are_forgotten():
    found = gradients(2, 3)
    found.rows[0].add(1, torch.ones(2))
    found.clear()
    assert all(own.tasks == () for own in found.rows)
    copied = found.with_rows([Rows(), Rows()])
    assert copied.parameters is found.parameters
    assert copied.rows is not found.rows


# --- Steps without surgery --------------------------------------------------------------------------------------------


def a_step(groups, tasks=4, active=None, seed=0, weights=None):
    rng = np.random.default_rng(seed)
    jacobian = rng.standard_normal((groups, tasks, 9))
    active = np.ones((groups, tasks), bool) if active is None else np.array(active)
    jacobian[~active] = 0
    mixing = rng.standard_normal((groups, tasks, tasks))
    mixing = np.where(active[:, :, None] & active[:, None, :], mixing, np.eye(tasks))
    gram = jacobian @ jacobian.swapaxes(1, 2)
    tensors = map(torch.tensor, (active, gram, mixing, np.zeros(tasks)))
    step = gs.Step(TASKS[:tasks], GROUPS[:groups], *tensors, None if weights is None else torch.tensor(weights))
    return step, jacobian


SOME = [[True, True, False, True], [True, False, False, True], [False, True, False, True]]


@pytest.mark.parametrize("active", [None, SOME])
@pytest.mark.parametrize("groups", [1, 3])
def test_nearest_weights_are_nearest(groups, active):
    step, jacobian = a_step(groups, active=None if active is None else active[:groups])
    there = step.active.numpy()
    columns = np.where(there, (step.mixing.numpy() * there[:, :, None]).sum(1), 0)
    mean = columns.sum(0) / np.maximum(there.sum(0), 1)
    # Least squares over all coordinates of all groups, and, a thousandth as important, the mean of what groups want.
    every = np.concatenate(jacobian, axis=1).T  # [G * D, K]
    wanted = np.concatenate([columns[g] @ jacobian[g] for g in range(groups)])
    ridge = np.sqrt(1e-3) * np.linalg.norm(every, axis=0)
    expected = np.linalg.lstsq(np.concatenate([every, np.diag(ridge)]), np.concatenate([wanted, ridge * mean]), rcond=None)[
        0
    ]
    found = nearest_weights(step).numpy()
    whole = there.any(0)
    np.testing.assert_allclose(found[whole], (columns[0] if groups == 1 else expected)[whole], rtol=1e-9, atol=1e-12)
    assert (found[~whole] == 1).all()


def test_weights_of_steps_in_between():
    found = gradients(2, 3)
    reuse = Reuse(3)
    assert not reuse.rests  # nothing is known
    step, _ = a_step(1, weights=[2.0, 3.0, 4.0, 5.0])
    reuse.learn(step, found, [1])
    assert torch.equal(reuse.own, step.loss_weights)
    torch.testing.assert_close(reuse.weights, step.mixing[0].sum(0) * step.loss_weights)
    assert reuse.shared == {"param1"}
    rests = []
    for reuse.steps in range(7):
        rests.append(reuse.rests)
    assert rests == [False, True, True] * 2 + [False]
    again = Reuse(3)
    again.load_state_dict(reuse.state_dict(), found)
    assert (again.steps, again.shared) == (6, {"param1"})
    assert torch.equal(again.weights, reuse.weights)
    assert torch.equal(again.own, reuse.own)
    again.load_state_dict({}, found)
    assert (again.steps, len(again.weights), len(again.own), again.shared) == (0, 0, 0, frozenset())
    step, _ = a_step(1)
    reuse.learn(step, found, [0])
    assert reuse.own.tolist() == [1] * 4
    torch.testing.assert_close(reuse.weights, step.mixing[0].sum(0))


@pytest.mark.parametrize(("every", "rests"), [(0, True), (1, False)])
def test_surgery_at_no_step_or_at_each(every, rests):
    reuse = Reuse(every)
    step, _ = a_step(1)
    reuse.learn(step, gradients(2, 3), [0])
    assert len(reuse.weights) == 0
    for reuse.steps in range(3):
        assert reuse.rests == rests


def test_a_level_of_one_group_of_two():
    cell = planned([(0, 1, 2, 3)], [1], ("x", "y")).levels[0].cells[0]
    assert not Level([cell], 2, 4, CPU).full
