"""Rules that solve small problems, weigh and gate: against naive versions on plain vectors, and worked by hand."""

import warnings

import more_oracles
import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import assume, given, settings
from oracles import names

import gradsurgery as gs

CLOSE = 1e-9
quick = settings(deadline=None, max_examples=40)

CONFLICT = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
PLANE = torch.tensor([[3.0, 0.0], [3.0, 4.0]], dtype=torch.float64)  # unit vectors (1, 0) and (0.6, 0.8)


def combined(rule, jacobian, state=None):
    state = rule.init(names(len(jacobian)), ["all"]) if state is None else state
    mixing, new = rule.mix(oracles.gram(jacobian), state)
    return mixing[0].numpy().sum(0) @ jacobian, new


def weights_of(rule, jacobian, state=None):
    state = rule.init(names(len(jacobian)), ["all"]) if state is None else state
    return rule.mix(oracles.gram(jacobian), state)[0][0].sum(0).numpy()


def many(seed, tasks, dim, lean=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tasks, dim)) + lean) * rng.uniform(0.2, 5, size=(tasks, 1))


sizes = pytest.mark.parametrize(
    ("tasks", "dim"), [(1, 3), (2, 3), (3, 2), (5, 9), (6, 9), (8, 3), (16, 40), (32, 33), (64, 100)]
)


# --- Worked by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (gs.UPGrad(), [-0.25, 0.75]),  # half of PCGrad's two projections
        (gs.UPGrad(weights={"0": 3.0}), [0.75 * 0 - 0.25 * 0.5, 0.75 * 1 + 0.25 * 0.5]),
        (gs.DualProj(), [0.0, 0.5]),  # the mean does not conflict
        (gs.DualProj(weights={"0": 0.25}), [-0.4, 0.4]),  # (-0.6, 0.2) does, with the first
        (gs.CosineGate(main=("0",)), [1.0, 1.0]),
        (gs.CosineGate(main=("1",)), [-1.0, 0.0]),
        (gs.AGEM(anchors=("1",)), [0.0, 1.0]),
        (gs.AGEM(anchors=("0",)), [-0.5, 0.5]),
        (gs.GEM(anchors=("1",)), [0.0, 1.0]),
        (gs.GEM(anchors=("0",)), [-0.5, 0.5]),
        (gs.GEM(anchors=("0",), margin=0.5), [0.0, 1.0]),
        (gs.EqualNorm(to="one"), [2**-0.5 - 1, 2**-0.5]),
        (gs.EqualNorm(to="max"), [1 - 2**0.5, 1.0]),
        (gs.EqualNorm(to="min"), [2**-0.5 - 1, 2**-0.5]),
        (gs.PCGrad(weights={"1": 3.0}), [-1.5, 2.5]),  # (0, 1) + 3 (-0.5, 0.5)
        (gs.GradVac(weights={"1": 3.0}), [-1.5, 2.5]),
        (gs.CRMOGM(gs.Sum()), [0.0, 1.0]),
        (gs.CAGrad(c=0.0), [0.0, 0.5]),
    ],
    ids=repr,
)
def test_two_tasks_in_conflict(rule, expected):
    found = gs.operate(CONFLICT, rule)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("jacobian", [CONFLICT, PLANE, 1e8 * PLANE, CONFLICT * torch.tensor([[1e-3], [1e5]])])
@pytest.mark.parametrize("rule", [gs.IMTLG(), gs.NashMTL(), gs.ConFIG(), gs.FairGrad()], ids=repr)
def test_of_two_tasks_the_direction_is_that_of_the_unit_vectors_sum(rule, jacobian):
    found = gs.operate(jacobian, rule)
    bisector = (jacobian / jacobian.norm(dim=1, keepdim=True)).sum(0)
    torch.testing.assert_close(found / found.norm(), bisector / bisector.norm(), rtol=1e-9, atol=1e-9)


def test_nash_mtl_of_two_tasks_in_closed_form():
    norms, cosine = np.array([3.0, 5.0]), 0.6
    np.testing.assert_allclose(weights_of(gs.NashMTL(), PLANE.numpy()), 1 / (norms * np.sqrt(1 + cosine)), rtol=1e-10)


def test_krum_by_hand():
    jacobian = torch.tensor([[0.0], [1.0], [3.0], [4.5], [100.0]], dtype=torch.float64)
    # f = 1: the sums of the two smallest squares are 1 + 9, 1 + 4, 2.25 + 4, 2.25 + 12.25 and far more
    assert gs.operate(jacobian, gs.Krum(byzantine=1)).item() == 1.0
    assert gs.operate(jacobian, gs.Krum(byzantine=1, selected=2)).item() == 2.0


# --- Against the naive versions ---------------------------------------------------------------------------------------


def scale(jacobian):
    return max(np.linalg.norm(jacobian, axis=1).max(), 1e-300)


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [(gs.UPGrad(), more_oracles.upgrad), (gs.DualProj(), more_oracles.dualproj)],
    ids=["upgrad", "dualproj"],
)
@quick
@given(jacobian=strategies.jacobians(widest=2, max_tasks=7))
def test_projections_equal_their_oracles(rule, oracle, jacobian):
    # Where gradients depend on each other, the oracle itself is as exact as the root of its tolerance.
    assert np.linalg.norm(combined(rule, jacobian)[0] - oracle(jacobian)) < 1e-6 * scale(jacobian)


@sizes
@pytest.mark.parametrize("lean", [-0.2, 0.0, 0.5])
def test_projections_of_many_tasks_equal_their_oracles(tasks, dim, lean):
    jacobian = many(tasks, tasks, dim, lean)
    for rule, oracle in ((gs.UPGrad(), more_oracles.upgrad), (gs.DualProj(), more_oracles.dualproj)):
        found = combined(rule, jacobian)[0]
        assert np.linalg.norm(found - oracle(jacobian)) < 1e-8 * scale(jacobian)
        assert (jacobian @ found / np.linalg.norm(jacobian, axis=1)).min() > -1e-8 * scale(jacobian)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@quick
@given(jacobian=strategies.apart(widest=1, min_tasks=2))
def test_cagrad_equals_its_oracle(c, jacobian):
    expected, gain = more_oracles.cagrad(jacobian, c)
    found = combined(gs.CAGrad(c=c), jacobian)[0]
    # The oracle stops within some 1e-12 of the objective, which is a root of that in the vector.
    assert np.linalg.norm(found - expected) < 1e-4 * scale(jacobian)
    assert (jacobian @ found).min() > gain - 1e-7 * scale(jacobian) ** 2


@sizes
@pytest.mark.parametrize("c", [0.2, 0.7])
def test_cagrad_is_optimal(tasks, dim, c):
    """Weak duality: the least gain of any ``d`` that is allowed is at most the value of any ``w``. Here they are equal."""
    jacobian = many(tasks, tasks, dim)
    g0 = jacobian.mean(0)
    weights = weights_of(gs.CAGrad(c=c), jacobian)
    added = weights - 1 / tasks
    assert added.min() > -1e-12
    d, radius = weights @ jacobian, c * np.linalg.norm(g0)
    assert np.linalg.norm(d - g0) < radius * (1 + 1e-7)
    w = added / added.sum()
    value = w @ jacobian @ g0 + radius * np.linalg.norm(w @ jacobian)
    assert (jacobian @ d).min() == pytest.approx(value, abs=1e-6 * np.linalg.norm(g0) * scale(jacobian))


def test_cagrad_where_nothing_improves_all_tasks():
    jacobian = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    found = combined(gs.CAGrad(c=0.5), jacobian)[0]
    g0 = jacobian.mean(0)
    assert abs(found[0]) < 1e-4
    assert np.linalg.norm(found - g0) <= 0.5 * np.linalg.norm(g0) + 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@quick
@given(jacobian=strategies.apart(widest=1))
def test_fairgrad_solves_its_equations(alpha, jacobian):
    w = weights_of(gs.FairGrad(alpha=alpha), jacobian)
    assert w.min() > 0
    np.testing.assert_allclose(jacobian @ (jacobian.T @ w), w ** (-1 / alpha), rtol=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0, 10.0, 100.0])
@pytest.mark.parametrize("tasks", [1, 2, 6, 32])
@pytest.mark.parametrize("length", [1e-10, 1.0, 1e15])
def test_fairgrad_of_gradients_made_for_its_weights(alpha, tasks, length):
    """Of unit gradients and any ``v > 0`` with ``C v > 0``, lengths make it the solution ``w = v / length``, exactly."""
    rng, power = np.random.default_rng(tasks), 1 / alpha
    unit = rng.normal(size=(tasks, 2 * tasks)) + 1
    unit /= np.linalg.norm(unit, axis=1)[:, None]
    v = 10 ** rng.uniform(max(-4 / power, -100), 0, size=tasks)  # far apart, as they are where alpha is large
    products = unit @ (unit.T @ v)
    assert products.min() > 0.01 * v.max()
    lengths = (products * v**power) ** (1 / (power - 1))
    expected = v / lengths * length ** (-2 / (1 + power))
    np.testing.assert_allclose(weights_of(gs.FairGrad(alpha=alpha), lengths[:, None] * unit * length), expected, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0, 10.0])
def test_fairgrad_settles_at_pareto_stationary_points(alpha):
    """Without a solution there is one after a little has been added to the Gram matrix; a warning would be an error."""
    jacobian = torch.tensor(np.stack([many(seed, 8, 3) for seed in range(40)]))
    assert gs.FairGrad(alpha=alpha).mix(jacobian @ jacobian.mT, {})[0].isfinite().all()


@sizes
def test_nash_mtl_solves_its_equations(tasks, dim):
    jacobian = many(tasks, tasks, dim, lean=4.0 if dim < tasks else 0.0)  # leaning, so that something improves all tasks
    w = weights_of(gs.NashMTL(), jacobian)
    np.testing.assert_allclose(w * (jacobian @ (jacobian.T @ w)), np.ones(tasks), rtol=1e-6)
    np.testing.assert_allclose(weights_of(gs.FairGrad(alpha=1.0), jacobian), w, rtol=1e-9)


@pytest.mark.parametrize(
    ("rule", "power"), [(gs.NashMTL(), 1.0), (gs.FairGrad(alpha=2.0), 0.5), (gs.FairGrad(alpha=0.5), 2.0)]
)
def test_bargaining_equals_a_general_solver(rule, power):
    jacobian = many(0, 6, 9)
    np.testing.assert_allclose(weights_of(rule, jacobian), more_oracles.nash_weights(jacobian, power), rtol=1e-5)


@pytest.mark.parametrize("rule", [gs.NashMTL(), gs.FairGrad(alpha=2.0), gs.FairGrad(alpha=0.5)], ids=repr)
@pytest.mark.parametrize("jacobian", [[[1.0, 0], [-1, 0]], [[1.0, 0], [-2, 0], [0, 1]], [[1.0], [1], [-1]]])
def test_bargaining_at_a_pareto_stationary_point_is_finite(rule, jacobian):
    w = weights_of(rule, np.array(jacobian))
    assert (w > 0).all()
    assert w.max() < 1e6


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@quick
@given(jacobian=strategies.apart(widest=1))
def test_aligned_mtl_equals_its_oracle(scale, jacobian):
    found, _ = oracles.modified(gs.AlignedMTL(scale=scale), jacobian)
    np.testing.assert_allclose(
        found * len(jacobian), more_oracles.aligned_mtl(jacobian, scale), rtol=1e-7, atol=1e-8 * np.abs(jacobian).max()
    )


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_gradients_of_low_rank_equal_their_oracle(scale):
    jacobian = many(1, 6, 3)
    found, _ = oracles.modified(gs.AlignedMTL(scale=scale), jacobian)
    np.testing.assert_allclose(found * 6, more_oracles.aligned_mtl(jacobian, scale), rtol=1e-7, atol=1e-9)


@quick
@given(jacobian=strategies.apart(widest=1, min_tasks=2))
def test_imtl_g_equals_its_oracle(jacobian):
    unit = jacobian / np.linalg.norm(jacobian, axis=1)[:, None]
    expected = more_oracles.imtl_g(jacobian)
    weights = weights_of(gs.IMTLG(), jacobian)
    assume(np.abs(weights).sum() < 1e4)  # they nearly cancel, in the oracle too
    found = weights @ jacobian
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(found - expected) < 1e-6 * max(np.linalg.norm(expected), scale(jacobian))
    projections = unit @ found
    np.testing.assert_allclose(projections, projections[0], rtol=1e-7, atol=1e-9 * scale(jacobian))


def test_imtl_g_gives_up_on_those_groups_alone_whose_weights_cancel():
    gram = torch.tensor([[[1.0, 0], [0, 4]], [[1, -1], [-1, 1]]], dtype=torch.float64)
    mixing, _ = gs.IMTLG().mix(gram, {})
    torch.testing.assert_close(mixing[0], torch.diag(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)))
    assert not mixing[1].any()


@pytest.mark.parametrize("given_weights", [None, {"0": 2.0, "1": 0.5}])
@quick
@given(jacobian=strategies.apart(widest=1, min_tasks=2))
def test_config_equals_its_oracle(given_weights, jacobian):
    weights = None if given_weights is None else np.array([2.0, 0.5, 1, 1, 1][: len(jacobian)])
    found = combined(gs.ConFIG(weights=given_weights), jacobian)[0]
    np.testing.assert_allclose(found, more_oracles.config(jacobian, weights), rtol=1e-7, atol=1e-8 * scale(jacobian))


@pytest.mark.parametrize("rule", [gs.IMTLG(), gs.ConFIG()], ids=repr)
def test_where_unit_gradients_cancel_there_is_no_direction(rule):
    for seed in range(20):  # what rounding leaves of their sum must not become one
        lengths = np.random.default_rng(seed).uniform(0.1, 10, size=(4, 6, 1))
        jacobian = lengths * np.array([1, -1, -1, 1, 1, -1])[:, None]
        for rows in jacobian:
            assert np.abs(combined(rule, rows)[0]).max() == 0


def test_config_of_dependent_gradients_equals_its_oracle():
    for seed in range(5):
        jacobian = many(seed, 8, 4)
        np.testing.assert_allclose(combined(gs.ConFIG(), jacobian)[0], more_oracles.config(jacobian), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("main", [(0,), (1, 2)])
@quick
@given(jacobian=strategies.apart(min_tasks=3, widest=2))
def test_cosine_gate_equals_its_oracle(weighted, main, jacobian):
    found = combined(gs.CosineGate(main=tuple(map(str, main)), weighted=weighted), jacobian)[0]
    np.testing.assert_allclose(
        found, more_oracles.cosine_gate(jacobian, main, weighted), rtol=1e-9, atol=1e-9 * scale(jacobian)
    )


@pytest.mark.parametrize("anchors", [(0,), (1, 2)])
@quick
@given(jacobian=strategies.apart(min_tasks=3, widest=2))
def test_episodic_memories_equal_their_oracles(anchors, jacobian):
    anchored = tuple(map(str, anchors))
    for rule, oracle in ((gs.AGEM(anchored), more_oracles.agem), (gs.GEM(anchored), more_oracles.gem)):
        found = combined(rule, jacobian)[0]
        assert np.linalg.norm(found - oracle(jacobian, anchors)) < 1e-7 * scale(jacobian)
    assert (jacobian[list(anchors)] @ found).min() > -1e-8 * scale(jacobian) ** 2


def test_many_anchors():
    jacobian = many(3, 20, 30)
    anchors = tuple(range(1, 20))
    found = combined(gs.GEM(tuple(map(str, anchors))), jacobian)[0]
    np.testing.assert_allclose(found, more_oracles.gem(jacobian, anchors), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", [gs.AlignedMTL, gs.DualProj, gs.SDMGrad, gs.UPGrad])
def test_only_proportions_of_weights_count(kind):
    jacobian = torch.tensor(many(3, 3, 5))
    small, large = (gs.operate(jacobian, kind(weights={"0": size, "1": 2 * size, "2": size})) for size in (0.125, 4.0))
    torch.testing.assert_close(small, large, rtol=1e-12, atol=1e-12)


def test_memories_that_cancel_are_no_constraint():
    jacobian = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, 0.3], [-0.4, 0.7, 0.6], [0.3, -0.9, -0.9]]).double()
    assert torch.equal(gs.operate(jacobian, gs.AGEM(("1", "2", "3"))), jacobian[0])
    jacobian[2] = -jacobian[1]
    assert torch.equal(gs.operate(jacobian[:3], gs.AGEM(("1", "2"))), jacobian[0])


@pytest.mark.parametrize("rule", [gs.GEM(("1",), margin=0.5), gs.AGEM(("1",))], ids=repr)
def test_a_memory_at_right_angles_changes_nothing(rule):
    assert gs.operate(torch.eye(2), rule).tolist() == [1, 0]


def test_a_memory_without_gradient_is_no_constraint():
    jacobian = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    for rule in (gs.AGEM(("1",)), gs.GEM(("1",))):
        assert torch.equal(gs.operate(jacobian, rule), jacobian[0])


def test_sdmgrad_and_modo_equal_their_oracles_over_steps():
    sdm, modo = gs.SDMGrad(lr=0.5, lam=0.2, momentum=0.3, iterations=7), gs.MoDo(lr=0.05, rho=0.2)
    states = [rule.init(names(4), ["all"]) for rule in (sdm, modo)]
    w, v = np.full(4, 0.25), np.full(4, 0.25)
    for step in range(5):
        jacobian = many(step, 4, 6)
        found, states[0] = combined(sdm, jacobian, states[0])
        w, weights = more_oracles.sdmgrad_weights(jacobian, w, 0.2, 0.5, 0.3, 7)
        np.testing.assert_allclose(found, weights @ jacobian, rtol=1e-8, atol=1e-8)
        found, states[1] = combined(modo, jacobian, states[1])
        v = more_oracles.modo_weights(jacobian, v, 0.05, 0.2)
        np.testing.assert_allclose(found, v @ jacobian, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(states[1]["w"][0], v, rtol=0, atol=1e-9)


def test_sdmgrad_ends_at_the_shortest_vector():
    jacobian = many(0, 5, 8)
    long = gs.SDMGrad(lam=0.0, lr=0.5, iterations=3000)
    np.testing.assert_allclose(combined(long, jacobian)[0], oracles.mgda(jacobian), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 5, 16])
def test_sdmgrad_settles_on_gradients_that_stay_the_same(tasks):
    jacobian, rule, state = many(1, tasks, 2 * tasks), gs.SDMGrad(lam=0.5), None
    # || sum_i w_i g_i + lam g_0 || is the length of a point in the hull of the g_i + lam g_0.
    expected = more_oracles.shortest(jacobian + 0.5 * jacobian.mean(0)) / 1.5
    for _ in range(200):
        before = state
        found, state = combined(rule, jacobian, state)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale(jacobian))
    torch.testing.assert_close(state["w"], before["w"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("byzantine", "selected"), [(0, 1), (1, 1), (1, 3), (2, 4)])
def test_krum_equals_its_oracle(byzantine, selected):
    for seed in range(10):
        jacobian = many(seed, 8, 5)
        found = combined(gs.Krum(byzantine, selected), jacobian)[0]
        np.testing.assert_allclose(found, more_oracles.krum(jacobian, byzantine, selected), rtol=1e-12)


def test_cr_mogm_is_a_moving_average_of_weights():
    rule, state, w = gs.CRMOGM(gs.MGDA(), alpha=0.7), None, None
    for step in range(4):
        jacobian = many(step, 3, 5)
        now = weights_of(gs.MGDA(), jacobian)
        w = now if w is None else 0.7 * w + 0.3 * now
        found, state = combined(rule, jacobian, state)
        np.testing.assert_allclose(found, w @ jacobian, rtol=1e-9)


def test_states_are_no_larger_than_they_need_be():
    assert gs.NashMTL().init(names(3), ["all"]) == {}
    assert gs.SDMGrad().init([], ["all"])["w"].shape == (1, 0)


def test_nash_mtl_keeps_its_weights_between_updates():
    rule = gs.NashMTL(update_every=3)
    state, found = None, []
    for step in range(7):
        state = rule.init(names(3), ["all"]) if state is None else state
        mixing, state = rule.mix(oracles.gram(many(step, 3, 5)), state)
        found.append(mixing[0].diagonal().numpy())
    for step in range(7):
        np.testing.assert_array_equal(found[step], found[3 * (step // 3)])
        np.testing.assert_allclose(
            found[3 * (step // 3)], weights_of(gs.NashMTL(), many(3 * (step // 3), 3, 5)), rtol=1e-12
        )


def test_nash_mtl_counts_the_steps_of_each_group():
    rule = gs.NashMTL(update_every=3)
    state = rule.init(names(3), names(2))
    first, second = (oracles.gram(np.stack([many(10 * g + step, 3, 5) for g in range(2)])) for step in range(2))
    before, state = rule.mix(first, state, active=torch.tensor([[True] * 3, [False] * 3]))
    after, _ = rule.mix(second, state)  # the first step of the second group, and none in which the first solves anew
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], gs.NashMTL().mix(second[1:], {})[0])


# --- GradNorm ---------------------------------------------------------------------------------------------------------


def test_gradnorm_is_algorithm_1():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    twin.load_state_dict(model.state_dict())
    alpha, lr = 0.7, 0.002
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), gs.GradNorm(alpha=alpha, lr=lr), model=model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    w, first = torch.ones(2, dtype=torch.float64, requires_grad=True), None

    def losses_of(net, x):
        out = net(x)
        return (out[:, 0] - 3).square().mean() * 4, (out.sum(1) + 1).square().mean()

    for step in range(6):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        opt.backward(dict(zip("ab", losses_of(model, x), strict=True)))
        opt.step()
        opt.zero_grad()

        losses = torch.stack(losses_of(twin, x))
        first = losses.detach() if first is None else first
        norms = torch.stack(
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(w[k] * losses[k], tuple(twin.parameters()), create_graph=True)
                    ]
                ).norm()
                for k in range(2)
            ]
        )
        ratios = losses.detach() / first
        target = (norms.mean() * (ratios / ratios.mean()) ** alpha).detach()
        (slope,) = torch.autograd.grad((norms - target).abs().sum(), w, retain_graph=True)
        plain.zero_grad()
        (w.detach() * losses).sum().backward()
        plain.step()
        with torch.no_grad():
            w = w - lr * slope
            w = (w * 2 / w.sum()).requires_grad_()
        torch.testing.assert_close(opt.rule_state["weight"], w.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert (w.detach() - 1).abs().max() > 0.01


def test_gradnorm_leaves_an_absent_tasks_weight_alone():
    model = torch.nn.Linear(3, 1)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.GradNorm(), model=model, tasks=list("abc"))
    x = torch.ones(2, 3)
    for present in ("abc", "ab", "c", "abc"):
        before = None if opt.rule_state is None else opt.rule_state["weight"].clone()
        out = model(x).mean()
        opt.backward({task: ((k + 1) * (out + k)).square() + 0.1 for k, task in enumerate("abc") if task in present})
        opt.step()
        opt.zero_grad()
        after = opt.rule_state["weight"]
        assert after.sum().item() == pytest.approx(3)
        for k, task in enumerate("abc"):
            if task not in present:
                assert after[k] == before[k]
                assert opt.last.loss_weights[k] == 1


def observed(gram, losses, *, active=None, state=None):
    """GradNorm's state after a step."""
    rule = gs.GradNorm()
    tasks = names(len(losses))
    gram, losses = torch.tensor(gram, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    active = torch.ones(1, len(tasks), dtype=torch.bool) if active is None else torch.tensor([active])
    step = gs.Step(tuple(tasks), ("all",), active, gram[None], torch.eye(len(tasks)).expand_as(gram[None]), losses)
    return rule.observe(step, rule.init(tasks, ["all"]) if state is None else state)


@pytest.mark.parametrize("loss", [float("nan"), 5.0])
def test_gradnorm_of_the_others_is_as_if_a_task_without_gradient_were_not_there(loss):
    alone = observed([[4.0, 1.0], [1.0, 9.0]], [2.0, 3.0])
    found = observed([[4.0, 1, 0], [1, 9, 0], [0, 0, 0]], [2.0, 3.0, loss], active=[True, True, loss == 5.0])
    torch.testing.assert_close(found["weight"][:2], alone["weight"])
    assert found["weight"][2] == 1
    assert alone["weight"][0] > 1 > alone["weight"][1]


def test_gradnorm_after_a_loss_of_zero():
    state = observed([[4.0, 1.0], [1.0, 9.0]], [0.0, 3.0])
    assert state["initial"].tolist() == [0, 3]
    usual = observed([[4.0, 1.0], [1.0, 9.0]], [2.0, 3.0])
    assert torch.equal(state["weight"], usual["weight"])  # it trains as the rest do
    state = observed([[4.0, 1.0], [1.0, 9.0]], [2.0, 1.0], state=state)  # what falls is measured from the first loss above
    assert state["initial"].tolist() == [2, 3]


def test_gradnorm_where_all_losses_or_all_gradients_are_zero():
    state = observed([[4.0, 1.0], [1.0, 9.0]], [2.0, 3.0])
    for gram, losses in (([[4.0, 1.0], [1.0, 9.0]], [0.0, 0.0]), ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0])):
        found = observed(gram, losses, state=state)
        assert found["weight"].sum().item() == pytest.approx(2)
        assert torch.equal(found["initial"], state["initial"])
    assert torch.equal(found["weight"], state["weight"])
    nobody = observed([[0.0, 0.0], [0.0, 0.0]], [float("nan")] * 2, active=[False, False], state=state)
    assert all(torch.equal(nobody[key], state[key]) for key in state)


def test_gradnorm_by_hand():
    # A loss below zero has the rate 0; gradients of several groups are one; and no weight falls below the least.
    state = {"weight": torch.tensor([0.5, 1.5]).double(), "initial": torch.tensor([2.0, 4.0]).double()}
    gram = torch.tensor([[[4.0, 0.0], [0.0, 5.0]], [[5.0, 0.0], [0.0, 11.0]]]).double()
    there = torch.ones(2, 2, dtype=torch.bool)
    step = gs.Step(("a", "b"), ("x", "y"), there, gram, torch.eye(2).expand_as(gram), torch.tensor([-1.0, 2.0]).double())
    found = gs.GradNorm(alpha=2.0, lr=0.1, smallest=0.2).observe(step, state)
    # Norms 3 and 4, of which the mean is 3.5; rates 0 and 1/2, in units of their mean 0 and 2: targets 0 and 14.
    new = [max(0.5 - 0.1 * 3 / 0.5, 0.2), 1.5 + 0.1 * 4 / 1.5]
    np.testing.assert_allclose(found["weight"].numpy(), 2 * np.array(new) / sum(new), rtol=1e-12)
    step = gs.Step(step.tasks, step.groups, torch.tensor([[True, True], [True, False]]), gram, step.mixing, step.losses)
    new[1] = 1.5 + 0.1 * 5**0.5 / 1.5  # what it has not reached is not there
    found = gs.GradNorm(alpha=2.0, lr=0.1, smallest=0.2).observe(step, state)
    np.testing.assert_allclose(found["weight"].numpy(), 2 * np.array(new) / sum(new), rtol=1e-12)


COMMON = {"one": np.ones_like, "mean": np.mean, "min": np.min, "max": np.max}


@pytest.mark.parametrize(("to", "common"), COMMON.items(), ids=COMMON)
def test_equal_norms_in_several_groups(to, common):
    jacobian = np.stack([many(g, 3, 5) for g in range(2)])
    mixing, _ = gs.EqualNorm(to=to).mix(oracles.gram(jacobian), {})
    for g in range(2):
        lengths = np.linalg.norm(jacobian[g], axis=-1)
        np.testing.assert_allclose(mixing[g].numpy(), np.diag(common(lengths) / lengths), rtol=1e-12)


# --- Weights, names and settings --------------------------------------------------------------------------------------


OUT_OF_RANGE = {
    "UPGrad-no-weights": (
        lambda: gs.UPGrad(weights={}),
        "`weights` must map distinct tasks, at least one, to weights >= 0. Found {}",
    ),
    "UPGrad-negative-weight": (lambda: gs.UPGrad(weights={"a": -1.0}), "`weights` must map distinct tasks"),
    "DualProj-twice-the-same": (lambda: gs.DualProj(weights=[("a", 1), ("a", 2)]), "`weights` must map distinct tasks"),
    "ConFIG-weight-nan": (lambda: gs.ConFIG(weights={"a": float("nan")}), "`weights` must map distinct tasks"),
    "PCGrad-weight-inf": (lambda: gs.PCGrad(weights={"a": float("inf")}), "`weights` must map distinct tasks"),
    "CAGrad-c": (lambda: gs.CAGrad(c=1.0), r"`c` must be in \[0, 1\). Found c=1.0"),
    "NashMTL-update_every-0": (
        lambda: gs.NashMTL(update_every=0),
        "`update_every` must be a number of steps, at least 1. Found 0",
    ),
    "NashMTL-update_every-True": (
        lambda: gs.NashMTL(update_every=True),
        "`update_every` must be a number of steps, at least 1. Found True",
    ),
    "FairGrad-alpha": (lambda: gs.FairGrad(alpha=0), "`alpha` must be positive and finite. Found alpha=0"),
    "AlignedMTL-scale": (
        lambda: gs.AlignedMTL(scale="max"),
        "`scale` must be 'min', 'median' or 'rmse'. Found scale='max'",
    ),
    "GradNorm-alpha": (lambda: gs.GradNorm(alpha=-1), "`alpha` must be at least 0. Found alpha=-1"),
    "GradNorm-lr": (lambda: gs.GradNorm(lr=0), "`lr` must be positive. Found lr=0"),
    "GradNorm-smallest": (lambda: gs.GradNorm(smallest=0), r"`smallest` must be in \(0, 1\). Found smallest=0"),
    "CosineGate-main": (
        lambda: gs.CosineGate(main="de"),
        r"`main` must be several names. Found the string 'de'; write \('de',\)",
    ),
    "AGEM-no-anchors": (lambda: gs.AGEM(anchors=()), r"`anchors` must be distinct names, at least one. Found \(\)"),
    "GEM-twice-the-same": (lambda: gs.GEM(anchors=("a", "a")), "`anchors` must be distinct names"),
    "GEM-margin": (lambda: gs.GEM(anchors=("a",), margin=-1), "`margin` must be at least 0. Found margin=-1"),
    "SDMGrad-lam": (lambda: gs.SDMGrad(lam=-1), "`lam` must be at least 0. Found lam=-1"),
    "SDMGrad-lr": (lambda: gs.SDMGrad(lr=0), "`lr` must be positive, or None. Found lr=0"),
    "SDMGrad-momentum": (lambda: gs.SDMGrad(momentum=1), r"`momentum` must be in \[0, 1\). Found momentum=1"),
    "SDMGrad-iterations": (lambda: gs.SDMGrad(iterations=0), "`iterations` must be at least 1. Found iterations=0"),
    "MoDo-lr": (lambda: gs.MoDo(lr=-1), "`lr` must be positive. Found lr=-1"),
    "MoDo-rho": (lambda: gs.MoDo(rho=-1), "`rho` must be at least 0. Found rho=-1"),
    "CRMOGM-alpha": (lambda: gs.CRMOGM(gs.MGDA(), alpha=2), r"`alpha` must be in \[0, 1\]. Found alpha=2"),
    "Krum-byzantine": (
        lambda: gs.Krum(byzantine=-1),
        "`byzantine` must be a number of tasks, at least 0. Found byzantine=-1",
    ),
    "Krum-selected": (lambda: gs.Krum(selected=0), "`selected` must be a number of tasks, at least 1. Found selected=0"),
    "EqualNorm-to": (lambda: gs.EqualNorm(to="median"), "`to` must be 'mean', 'min', 'max' or 'one'. Found to='median'"),
}


@pytest.mark.parametrize(("make", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_settings_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_to_be_smoothed_must_be_one():
    with pytest.raises(TypeError, match="`rule` must be a rule. Found 'mgda' of type str"):
        gs.CRMOGM("mgda")


@pytest.mark.parametrize(
    "rule",
    [
        *(make(weights={"de": 1.0}) for make in (gs.UPGrad, gs.DualProj, gs.AlignedMTL, gs.ConFIG, gs.SDMGrad)),
        *(gs.PCGrad(weights={"de": 1.0}), gs.GradVac(weights={"de": 1.0})),
        *(gs.CosineGate(main=("de",)), gs.AGEM(anchors=("de",)), gs.GEM(anchors=("de",))),
    ],
    ids=repr,
)
def test_rules_may_not_name_a_task_that_does_not_exist(rule):
    with pytest.raises(ValueError, match=rf"{type(rule).__name__}'s `\w+` names \['de'\], but the tasks are \['0', '1'\]"):
        gs.operate(torch.eye(2), rule)


def test_krum_needs_enough_tasks():
    with pytest.raises(ValueError, match="`byzantine=1` needs at least 5 tasks. Found 3; lower `byzantine`"):
        gs.operate(torch.eye(3), gs.Krum(byzantine=1))


def test_weights_are_pairs_or_a_mapping():
    rule = gs.UPGrad(weights={"a": 2, "b": 1})
    assert rule == gs.UPGrad(weights=[("a", 2.0), ("b", 1.0)])
    assert repr(rule) == "UPGrad(weights=(('a', 2.0), ('b', 1.0)))"
    assert hash(rule) == hash(eval(repr(rule), vars(gs)))


# --- Ranges and solvers -----------------------------------------------------------------------------------------------

SOLVED = [gs.MGDA(), gs.UPGrad(), gs.DualProj(), gs.CAGrad(), gs.NashMTL(), gs.AlignedMTL(), gs.IMTLG(), gs.ConFIG()]


@pytest.mark.parametrize("rule", SOLVED, ids=repr)
@pytest.mark.parametrize("length", [1e-10, 1e15])
@pytest.mark.parametrize("tasks", [3, 8])
def test_tiny_and_huge_gradients(rule, length, tasks):
    jacobian = many(0, tasks, 12)
    expected, _ = combined(rule, jacobian)
    found, _ = combined(rule, length * jacobian)
    unit = 1.0 if isinstance(rule, gs.NashMTL) else length
    np.testing.assert_allclose(found, unit * expected, rtol=1e-6, atol=1e-8 * unit)


@pytest.mark.parametrize("rule", SOLVED, ids=repr)
@pytest.mark.parametrize("tasks", [2, 5, 6, 16, 64])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_with_zero_and_equal_rows_is_finite_and_silent(rule, tasks, rank):
    for seed in range(3):
        jacobian = many(seed, tasks, rank)
        jacobian[0] = 0
        jacobian[-1] = -jacobian[tasks // 2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isfinite(combined(rule, jacobian)[0]).all()


@pytest.mark.parametrize("rule", [*SOLVED, gs.FairGrad(alpha=2.0), gs.GEM(("0",))], ids=repr)
@pytest.mark.parametrize("tasks", [3, 8])
def test_what_is_not_finite_is_no_error(rule, tasks):
    # GradScaler has to see it in p.grad, so that a rule may not raise.
    jacobian = torch.tensor(many(0, tasks, 12))
    jacobian[1, 3] = float("inf")
    assert not gs.operate(jacobian, rule).isfinite().all()


@pytest.mark.parametrize("rule", [gs.UPGrad(), gs.DualProj(), gs.CAGrad(), gs.GEM(("0", "1"))], ids=repr)
@pytest.mark.parametrize(("tasks", "dim"), [(3, 2), (8, 3), (12, 4), (16, 5), (32, 8)])
def test_products_in_float32_of_more_tasks_than_coordinates(rule, tasks, dim):
    """Rounding leaves negative eigenvalues, with which the problems that define these rules would have no solution."""
    for seed in range(5):
        jacobian = torch.tensor(many(seed, tasks, dim)).float()
        expected, longest = gs.operate(jacobian.double(), rule), jacobian.norm(dim=1).max().item()
        assert (gs.operate(jacobian, rule) - expected).norm() < 1e-4 * longest


@pytest.mark.parametrize("tasks", [6, 9, 20])
def test_the_ways_to_solve_a_problem_agree(tasks):
    from gradsurgery.rules import _complementarity, _shortest, _solvers

    jacobian = torch.tensor(np.stack([many(seed, tasks, tasks + 3) for seed in range(4)]))
    cosines = _solvers.directions(jacobian @ jacobian.mT, None).cosines
    found = _complementarity.complementary(cosines, cosines, "it")
    newton = _complementarity._by_interior_points(cosines, cosines, "it", 1e-12)
    torch.testing.assert_close(found, newton, rtol=0, atol=1e-8)
    if tasks == 6:
        torch.testing.assert_close(_complementarity._by_enumeration(cosines, cosines), newton, rtol=0, atol=1e-8)
        shortest = _shortest.shortest_by_enumeration(cosines, torch.ones_like(cosines[..., 0], dtype=torch.bool))
        weights, gap = _shortest.on_simplex(cosines, torch.ones_like(shortest, dtype=torch.bool), 1e-14, 50)
        torch.testing.assert_close(shortest, weights, rtol=0, atol=1e-6)
        assert gap.max() <= 1e-14


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("rule", [*SOLVED, gs.FairGrad(alpha=2.0), gs.GEM(("0", "1")), gs.AGEM(("0",))], ids=repr)
def test_where_values_may_not_be_looked_at_the_result_is_the_same(rule, tasks, monkeypatch):
    import gradsurgery.rules as package

    jacobian = torch.tensor(np.stack([many(seed, tasks, tasks + 6) for seed in range(3)]))
    jacobian[1, 2] = 0
    gram, active = jacobian @ jacobian.mT, torch.ones(3, tasks, dtype=torch.bool)
    active[2, 1] = False
    state, results = rule.init(names(tasks), names(3)), []
    for _ in range(2):
        mixing, _ = rule.mix(gram, state, active=active)
        coefficients = (mixing * active[:, :, None]).sum(1) * active
        results.append((coefficients[:, None] @ jacobian).squeeze(1))
        for module in filter(lambda module: hasattr(module, "looks"), vars(package).values()):
            monkeypatch.setattr(module, "looks", lambda _: False)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_stopping_early_names_the_rule(monkeypatch):
    from gradsurgery.rules import _complementarity, _solvers

    cosines = _solvers.directions(torch.tensor(many(0, 8, 9) @ many(0, 8, 9).T)[None], None).cosines
    with pytest.warns(RuntimeWarning, match="UPGrad stopped after 1 iterations with an error of .* nearly dependent"):
        _complementarity._by_interior_points(cosines, cosines, "UPGrad", 1e-12, iterations=1)
    monkeypatch.setattr(_solvers, "_NEWTON_STEPS", 1)
    with pytest.warns(RuntimeWarning, match="FairGrad stopped with a relative error of"):
        gs.operate(torch.tensor(many(0, 8, 9)), gs.FairGrad(alpha=10.0))
