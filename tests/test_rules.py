"""Each rule against its naive version on plain vectors, and against cases worked by hand."""

from itertools import product

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import error, fixed_orders, modified
from scipy import optimize, stats

import gradsurgery as gs
from gradsurgery.rules._walk import random_order

# A few operations in float64, whose inputs are well conditioned or whose result is a continuous function of a rounded Gram
# matrix: 1e-9 leaves room for some thousand units of rounding.
CLOSE = 1e-9
quick = settings(deadline=None, max_examples=60)

CONFLICT = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def lengths(jacobian):
    return np.linalg.norm(jacobian, axis=1)


def with_orders(jacobians):
    return jacobians.flatmap(lambda jacobian: st.tuples(st.just(jacobian), strategies.orders(len(jacobian))))


# --- Worked by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (gs.Sum(), [0, 1]),
        (gs.Mean(), [0, 0.5]),
        (gs.PCGrad(), [-0.5, 1.5]),
        (gs.Chain(gs.PCGrad(), gs.Mean()), [-0.25, 0.75]),
        (gs.GradVac(), [-0.5, 1.5]),  # targets start at zero, where it is PCGrad
        # phi = -1/sqrt(2), t = 1/sqrt(2): the sum of (1, 1) + 2 (-1, 0) and (-1, 0) + (1, 1)
        (gs.GradVac(target=2**-0.5), [-1, 2]),
        (gs.MGDA(), [-0.2, 0.4]),  # w_1 = (1 + 1) / (2 + 1 + 2)
    ],
    ids=repr,
)
def test_two_tasks_in_conflict(rule, expected):
    torch.testing.assert_close(gs.operate(CONFLICT, rule), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_pcgrad_on_two_tasks_is_agem_applied_both_ways():
    def agem(g, reference):
        return g - (g @ reference) / (reference @ reference) * reference if g @ reference < 0 else g

    a, b = CONFLICT
    torch.testing.assert_close(gs.operate(CONFLICT, gs.PCGrad()), agem(a, b) + agem(b, a))


@quick
@given(strategies.jacobians(min_tasks=2, max_tasks=2, widest=4))
def test_mgda_of_two_tasks_in_closed_form(jacobian):
    a, b = jacobian
    denominator = a @ a + b @ b - 2 * a @ b
    w = np.clip((b @ b - a @ b) / denominator, 0, 1) if denominator > 0 else 0.5
    largest = lengths(jacobian).max()
    # A relative duality gap of 1e-14 leaves 1e-7 of the largest norm between the two vectors.
    found = modified(gs.MGDA(), jacobian)[0].sum(0)
    assert error(found, w * a + (1 - w) * b, largest) < 1e-6


# --- Against the naive versions ---------------------------------------------------------------------------------------


@quick
@given(strategies.jacobians())
def test_sum_equals_its_oracle(jacobian):
    np.testing.assert_array_equal(modified(gs.Sum(), jacobian)[0], oracles.sum_(jacobian))


@quick
@given(strategies.jacobians())
def test_mean_equals_its_oracle(jacobian):
    assert error(modified(gs.Mean(), jacobian)[0], oracles.mean(jacobian), lengths(jacobian)) < 1e-15


@quick
@given(with_orders(strategies.jacobians()))
def test_pcgrad_equals_its_oracle(case):
    # Whatever the rank: g'_i depends on the Gram matrix continuously, since a projection of almost nothing is almost none.
    jacobian, orders = case
    found, _ = modified(gs.PCGrad(), jacobian, orders=orders)
    assert error(found, oracles.pcgrad(jacobian, orders), lengths(jacobian)) < CLOSE


@quick
@given(with_orders(strategies.apart()), st.data())
def test_gradvac_equals_its_oracle(case, data):
    jacobian, orders = case
    targets = data.draw(strategies.targets(len(jacobian)))
    beta = data.draw(st.sampled_from([0, 0.01, 0.3, 1]))
    max_growth = data.draw(st.sampled_from([1, 1.5, 10, np.inf]))
    found, state = modified(gs.GradVac(beta=beta, max_growth=max_growth), jacobian, orders=orders, targets=targets)
    expected, new, _ = oracles.gradvac(jacobian, orders, targets, beta, max_growth=max_growth)
    assert error(found, expected, lengths(jacobian)) < CLOSE
    np.testing.assert_allclose(state["target"][0], new, rtol=0, atol=CLOSE)


@quick
@given(with_orders(strategies.apart(min_tasks=2)), st.floats(-0.9, 0.9))
def test_gradvac_with_a_fixed_target_equals_its_oracle(case, target):
    jacobian, orders = case
    found, state = modified(gs.GradVac(target=target), jacobian, orders=orders)
    constant = np.full([len(jacobian)] * 2, target)
    expected, _, _ = oracles.gradvac(jacobian, orders, constant, 0, max_growth=10, ema=False)
    assert error(found, expected, lengths(jacobian)) < CLOSE
    assert state == {}


def test_gradvac_equals_its_oracle_over_many_steps():
    rng = np.random.default_rng(0)
    rule, state, targets, fired = gs.GradVac(beta=0.2), {}, np.zeros((3, 3)), 0
    for _ in range(50):
        jacobian = rng.normal(size=(3, 8)) + rng.normal(size=8)
        orders = [rng.permutation([j for j in range(3) if j != i]) for i in range(3)]
        with fixed_orders(np.array(orders)):
            found, state = gs.operate(torch.tensor(jacobian), rule, state=state)
        expected, targets, meetings = oracles.gradvac(jacobian, orders, targets, 0.2, max_growth=10)
        fired += sum(meeting.fired for meeting in meetings)
        np.testing.assert_allclose(found, expected.sum(0), rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(state["target"][0], targets, rtol=0, atol=CLOSE)
    assert 50 < fired < 250  # of 300 meetings: both branches were taken


@quick
@given(strategies.jacobians(widest=4))
def test_mgda_equals_its_oracle(jacobian):
    # The duality gap bounds the distance of the two vectors: 1e-14 is 1e-7 of the largest norm.
    found = modified(gs.MGDA(), jacobian)[0].sum(0)
    assert error(found, oracles.mgda(jacobian), lengths(jacobian).max()) < 1e-6


@quick
@given(strategies.apart(widest=0))
def test_mgda_weights_equal_those_of_a_general_solver(jacobian):
    matrix = jacobian @ jacobian.T
    solved = optimize.minimize(
        lambda w: w @ matrix @ w / 2,
        np.full(len(jacobian), 1 / len(jacobian)),
        jac=lambda w: matrix @ w,
        method="SLSQP",
        bounds=[(0, 1)] * len(jacobian),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    weights = gs.MGDA().mix(oracles.gram(jacobian), {})[0][0].diagonal().numpy()
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    # Both stop at 1e-14 of the objective: 1e-7 of the vector, 5e-7 of the weights (singular values are at least 0.19).
    np.testing.assert_allclose(weights, solved.x, rtol=0, atol=1e-6)


def test_chain_equals_its_oracles_one_after_the_other():
    jacobian = np.random.default_rng(1).normal(size=(4, 6))
    orders = np.array([[1, 2, 3], [3, 0, 2], [1, 3, 0], [2, 0, 1]])
    found, _ = modified(gs.Chain(gs.PCGrad(), gs.GradVac(target=0.3), gs.Mean()), jacobian, orders=orders)
    projected = oracles.pcgrad(jacobian, orders)
    pulled, _, _ = oracles.gradvac(projected, orders, np.full((4, 4), 0.3), 0, max_growth=10)
    np.testing.assert_allclose(found, oracles.mean(pulled), rtol=CLOSE, atol=CLOSE)


# --- All random orders ------------------------------------------------------------------------------------------------

# Three tasks, each in conflict with both others, so that every order leads elsewhere.
THREE = np.array([[1.0, 0.2, 0.0, 0.3], [-0.9, 1.0, 0.1, 0.0], [-0.2, -0.9, 1.0, 0.0]])
TARGETS = np.array([[0.0, 0.3, -0.1], [0.2, 0.0, 0.5], [0.4, 0.1, 0.0]])
ALL_ORDERS = [np.array(orders) for orders in product([[1, 2], [2, 1]], [[0, 2], [2, 0]], [[0, 1], [1, 0]])]


def pcgrad_of_three(orders):
    return modified(gs.PCGrad(), THREE, orders=orders)[0], oracles.pcgrad(THREE, orders)


def gradvac_of_three(orders):
    found, state = modified(gs.GradVac(beta=0.1), THREE, orders=orders, targets=TARGETS)
    expected, new, _ = oracles.gradvac(THREE, orders, TARGETS, 0.1)
    return np.hstack([found, state["target"][0].numpy()]), np.hstack([expected, new])


@pytest.mark.parametrize("case", [pcgrad_of_three, gradvac_of_three])
def test_all_orders_of_three_tasks(case):
    results = []
    for orders in ALL_ORDERS:
        found, expected = case(orders)
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
        results.append(found)
    for a in range(8):  # no two orders may pass for each other
        for b in range(a):
            assert np.abs(results[a] - results[b]).max() > 1e-3


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(target=0.2)], ids=repr)
def test_draws_reach_every_order_equally_often(rule):
    draws = 4000
    generator = torch.Generator().manual_seed(0)
    found, _ = rule.mix(oracles.gram(THREE).expand(draws, -1, -1), {}, generator=generator)
    possible = []
    for orders in ALL_ORDERS:
        with fixed_orders(orders):
            possible.append(rule.mix(oracles.gram(THREE), {})[0][0])
    is_this_one = (found[:, None] - torch.stack(possible)).abs().amax((-1, -2)) < 1e-9
    assert (is_this_one.sum(1) == 1).all()
    assert stats.chisquare(is_this_one.sum(0).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("tasks", "possible"), [(2, 1), (3, 2), (4, 6)])
def test_random_order_is_uniform_over_the_others(tasks, possible):
    order = random_order(torch.empty(2000, tasks, tasks), torch.Generator().manual_seed(0))
    for i in range(tasks):
        others = torch.tensor([j for j in range(tasks) if j != i])
        assert (order[:, i].sort(-1).values == others).all()  # never i itself
        seen, counts = order[:, i].unique(dim=0, return_counts=True)
        assert len(seen) == possible
        if possible > 1:
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_random_orders_of_two_tasks_are_independent():
    order = random_order(torch.empty(2000, 3, 3), torch.Generator().manual_seed(0))
    first = torch.stack([order[:, i, 0] > order[:, i, 1] for i in range(3)], 1).double()
    assert torch.corrcoef(first.T).fill_diagonal_(0).abs().max() < 4 / 2000**0.5  # four standard deviations


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(target=0.2)], ids=repr)
def test_randomness_comes_from_the_given_generator_only(rule):
    matrix = oracles.gram(THREE).expand(20, -1, -1)

    def draw(seed):
        return rule.mix(matrix, {}, generator=torch.Generator().manual_seed(seed))[0]

    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_is_used():
    jacobian = torch.tensor(np.random.default_rng(0).normal(size=(12, 4)))
    torch.manual_seed(5)
    first, second = gs.operate(jacobian, gs.PCGrad()), gs.operate(jacobian, gs.PCGrad())
    torch.manual_seed(5)
    assert torch.equal(gs.operate(jacobian, gs.PCGrad()), first)
    assert not torch.equal(first, second)


# --- What only one rule has -------------------------------------------------------------------------------------------


def test_gradvac_operates_on_the_named_tasks_only_and_the_others_still_serve():
    orders = np.array([[1, 2], [0, 2], [0, 1]])
    rule = gs.GradVac(beta=0.1, tasks=("1",))
    found, state = modified(rule, THREE, orders=orders, targets=TARGETS)
    expected, new, meetings = oracles.gradvac(THREE, orders, TARGETS, 0.1, tasks=[1])
    assert [(meeting.i, meeting.j) for meeting in meetings if meeting.fired] == [(1, 0), (1, 2)]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(found[[0, 2]], THREE[[0, 2]])
    np.testing.assert_allclose(state["target"][0], new, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(state["target"][0][[0, 2]], TARGETS[[0, 2]])


def test_gradvac_may_not_name_a_task_that_does_not_exist():
    with pytest.raises(ValueError, match=r"GradVac's `tasks` names \['de'\], but the tasks are \['0', '1'\]"):
        gs.operate(torch.eye(2), gs.GradVac(tasks=["de", "1"]))


def test_mgda_warns_where_it_stops_early():
    jacobian = torch.tensor(np.random.default_rng(0).normal(size=(6, 4)))
    jacobian[0] = 0  # else pivoting may find it without any iteration
    with pytest.warns(RuntimeWarning, match="MGDA stopped after 1 iterations .*raise `iterations` or `tolerance`"):
        gs.operate(jacobian, gs.MGDA(iterations=1))


@pytest.mark.parametrize("tasks", [8, 32])
def test_mgda_solves_many_tasks(tasks):
    jacobian = np.random.default_rng(tasks).normal(size=(tasks, 2 * tasks)) + 0.3
    direction = modified(gs.MGDA(), jacobian)[0].sum(0)
    # Optimality: no task's gradient has a smaller product with the direction than the direction itself.
    assert (jacobian @ direction).min() >= direction @ direction * (1 - 1e-6)
