"""Faults that have been found in public implementations of these rules. Each has a test that is named after it.

Settings, errors, and what a rule has as an object are tested here as well.
"""

import io
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import oracles
import pytest
import torch

import gradsurgery as gs
from gradsurgery.rules._walk import random_order

RULES = [
    *(gs.Sum(), gs.Mean(), gs.PCGrad(), gs.GradVac(), gs.GradVac(target=0.5), gs.MGDA(), gs.UPGrad(), gs.DualProj()),
    *(gs.CAGrad(), gs.AlignedMTL(), gs.IMTLG(), gs.ConFIG(), gs.CosineGate(("0",)), gs.AGEM(("1",)), gs.GEM(("1",))),
    *(gs.SDMGrad(), gs.Krum(selected=2), gs.EqualNorm()),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def rows(*vectors, dtype=torch.float64):
    return torch.tensor(vectors, dtype=dtype)


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def angle(a, b):
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    return (a - b).norm().item()


# --- A task projected on itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_task_projected_on_itself(tasks):
    jacobian = random_rows(tasks, 8)
    own = torch.arange(tasks)
    assert not (random_order(oracles.gram(jacobian), None)[0] == own[:, None]).any()
    # The pair (i, i) has cosine 1: it would raise its own target at once, and a target above 1 - eps would then fire.
    rule = gs.GradVac(beta=1.0)
    mixing, state = rule.mix(oracles.gram(jacobian), rule.init(oracles.names(tasks), ["all"]))
    assert torch.equal(mixing[0].diagonal(), torch.ones(tasks, dtype=torch.float64))
    assert torch.equal(state["target"][0].diagonal(), torch.zeros(tasks, dtype=torch.float64))


# --- Masks built from gradient values ---------------------------------------------------------------------------------


@every_rule
def test_masks_built_from_gradient_values(rule):
    # A coordinate in which a gradient happens to be zero is no coordinate that the task does not have. So the result must
    # not depend on the coordinate system: in a rotated one there are no zeros.
    jacobian = rows([1.0, 1.0, 0.0], [-1.0, 0.0, 0.5])
    rotation = torch.linalg.qr(random_rows(3, 3))[0]
    torch.testing.assert_close(gs.operate(jacobian @ rotation, rule), gs.operate(jacobian, rule) @ rotation)


def test_a_projection_reaches_coordinates_in_which_a_gradient_is_zero():
    jacobian = rows([1.0, 0.0], [-1.0, 1.0])
    found, _ = oracles.modified(gs.PCGrad(), jacobian.numpy())
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.0, 1.0]], rtol=1e-15)


# --- The moving average is updated only when the rule fires -----------------------------------------------------------


def test_ema_updated_only_when_the_rule_fires():
    rule, state, targets = gs.GradVac(beta=0.5), {}, []
    for cosine in (0.8, 0.8, -0.6, 0.9):
        _, state = gs.operate(rows([1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]), rule, state=state)
        targets.append(state["target"][0, 0, 1].item())
    # It fires in the third step alone (0.8 > 0, 0.8 > 0.4, -0.6 < 0.6, 0.9 > 0). If only that one counted, the targets
    # would be 0, 0, -0.3 and -0.3: they could never rise.
    np.testing.assert_allclose(targets, [0.4, 0.6, 0.0, 0.45], rtol=0, atol=1e-15)


def test_ema_follows_the_cosine_of_the_modified_gradient():
    # g'_0 is projected on g_1 first, and its cosine with g_2 is measured after that.
    jacobian = np.array([[1.0, 0.5, 0.0], [-1.0, 0.0, 0.2], [0.3, 0.2, 1.0]])
    orders = np.array([[1, 2], [0, 2], [0, 1]])
    _, state = oracles.modified(gs.GradVac(beta=1.0), jacobian, orders=orders)
    projected = jacobian[0] - jacobian[0] @ jacobian[1] / (jacobian[1] @ jacobian[1]) * jacobian[1]
    expected = projected @ jacobian[2] / np.linalg.norm(projected) / np.linalg.norm(jacobian[2])
    original = jacobian[0] @ jacobian[2] / np.linalg.norm(jacobian[0]) / np.linalg.norm(jacobian[2])
    assert state["target"][0, 0, 2].item() == pytest.approx(expected, abs=1e-14)
    assert abs(expected - original) > 0.05


# --- Wrong sign -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.GradVac(target=0.0), gs.GradVac(target=0.7)], ids=repr)
def test_wrong_sign(rule):
    jacobian = np.array([[1.0, 0.0, 0.3], [-0.6, 0.8, 0.0]])
    mixing, _ = rule.mix(oracles.gram(jacobian), {})
    assert (mixing[0][[0, 1], [1, 0]] > 0).all()  # one adds of the other, which was against it
    found, _ = oracles.modified(rule, jacobian)
    for i, j in ((0, 1), (1, 0)):
        assert found[i] @ jacobian[j] > jacobian[i] @ jacobian[j]


# --- NaN for parallel, opposite and zero gradients --------------------------------------------------------------------

V = [0.3, -0.7, 0.1]
DEGENERATE = {
    "parallel": rows(V, [3 * v for v in V]),
    "identical": rows(V, V, V),
    "opposite": rows(V, [-v for v in V]),
    "opposite, of other length": rows(V, [-3 * v for v in V]),
    "one zero": rows(V, [0.0] * 3),
    "all zero": torch.zeros(3, 3, dtype=torch.float64),
    "parallel, opposite and zero": rows(V, [2 * v for v in V], [-v for v in V], [0.0] * 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("jacobian", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("rule", [*RULES, gs.GradVac(target=1.0), gs.GradVac(target=-1.0)], ids=repr)
def test_nan_for_parallel_opposite_and_zero_gradients(rule, jacobian, dtype):
    state = {}
    for _ in range(3):
        found, state = gs.operate(jacobian.to(dtype), rule, state=state)
        assert found.isfinite().all()
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    ("case", "rule", "factor"),  # the result in units of V
    [
        ("parallel", gs.PCGrad(), 4),
        ("parallel", gs.GradVac(target=0.9), 4),
        ("parallel", gs.MGDA(), 1),
        ("identical", gs.PCGrad(), 3),
        ("identical", gs.GradVac(target=0.9), 3),
        ("identical", gs.MGDA(), 1),
        ("opposite", gs.PCGrad(), 0),
        ("opposite", gs.GradVac(target=0.9), 0),
        ("opposite", gs.MGDA(), 0),
        ("opposite, of other length", gs.PCGrad(), 0),
        ("opposite, of other length", gs.GradVac(), 0),
        ("opposite, of other length", gs.MGDA(), 0),
        ("one zero", gs.PCGrad(), 1),
        ("one zero", gs.GradVac(target=0.9), 1),
        ("one zero", gs.MGDA(), 0),
        ("all zero", gs.PCGrad(), 0),
        ("all zero", gs.GradVac(target=0.9), 0),
        ("all zero", gs.MGDA(), 0),
    ],
)
def test_parallel_opposite_and_zero_gradients_by_hand(case, rule, factor):
    # MGDA stops 1e-7 of the largest gradient away from the answer, at most.
    tolerance = 1e-6 if isinstance(rule, gs.MGDA) else 1e-14
    torch.testing.assert_close(gs.operate(DEGENERATE[case], rule), factor * rows(V)[0], rtol=0, atol=tolerance)


# --- GradVac explodes as its target approaches 1 ----------------------------------------------------------------------


def explosion(beta, steps, bounds, dtype=torch.float64):
    """After many steps with identical gradients, one of two turns a little: how much longer the result is, for each bound.

    The target itself does not depend on the bound, as nothing is lengthened before.
    """
    base, state = random_rows(40, dtype=dtype), {}
    same = torch.stack([base, base])
    for _ in range(steps):
        _, state = gs.operate(same, gs.GradVac(beta=beta), state=state)
    changed = torch.stack([base, base + 0.05 * random_rows(40, seed=1, dtype=dtype)])
    results = [gs.operate(changed, gs.GradVac(beta=beta, max_growth=bound), state=state)[0] for bound in bounds]
    return [(result.norm() / changed.sum(0).norm()).item() for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "steps"), [(0.5, 25), (0.01, 25), (0.01, 1000), (1.0, 25)])
def test_gradvac_exploding_as_the_target_approaches_1(beta, steps, dtype):
    # Either gradient grows by max_growth at most, and the two are almost parallel.
    by_three, by_ten = explosion(beta, steps, [3.0, 10.0], dtype)
    assert by_three < 3.01
    assert by_ten < 10.01


def test_without_the_bound_gradvac_would_lengthen_far_more():
    assert explosion(0.5, 25, [float("inf")])[0] > 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 50, 1000])
@pytest.mark.parametrize("rule", [gs.GradVac(target=1.0), gs.GradVac(beta=1.0), gs.GradVac(beta=0.5)], ids=repr)
def test_gradvac_lengthens_identical_gradients_by_rounding(rule, size, dtype):
    # The cosine of a gradient and its copy is 1 up to rounding. Next to a target of 1 that must not look like an angle.
    state = {}
    for seed in range(60):
        gradient = random_rows(size, seed=seed, dtype=dtype)
        found, state = gs.operate(gradient.expand(3, -1), rule, state=state)
        torch.testing.assert_close(found, 3 * gradient, rtol=1e-5, atol=1e-5)


def test_a_target_of_1_goes_as_far_as_max_growth_allows():
    jacobian = np.array([[1.0, 0.0], [0.0, 1.0]])
    found, _ = oracles.modified(gs.GradVac(target=1.0, max_growth=2.0), jacobian)
    np.testing.assert_allclose(found, [[1.0, 3**0.5], [3**0.5, 1.0]], rtol=1e-14)


@pytest.mark.parametrize("jacobian", [*DEGENERATE.values(), random_rows(4, 5)], ids=[*DEGENERATE, "random"])
def test_a_target_of_minus_1_never_operates(jacobian):
    mixing, _ = gs.GradVac(target=-1.0).mix(oracles.gram(jacobian), {})
    assert torch.equal(mixing[0], torch.eye(len(jacobian), dtype=torch.float64))


# --- Silent mean instead of the rule when gradients are small ---------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e19, 1e30])
@every_rule
def test_silent_mean_when_gradients_are_small(rule, scale):
    # In float32 squares underflow below 1e-23 and overflow above 1e18: all in conflict, so that the rules differ.
    jacobian = random_rows(3, 50, dtype=torch.float32)
    jacobian[0] = -0.7 * jacobian[1] - 0.5 * jacobian[2] + 0.3 * jacobian[0]
    expected, expected_state = gs.operate(jacobian, rule, state={}, generator=torch.Generator().manual_seed(0))
    found, state = gs.operate(jacobian * scale, rule, state={}, generator=torch.Generator().manual_seed(0))
    assert found.norm(dtype=torch.float64).item() == pytest.approx(scale * expected.norm().item(), rel=1e-5)
    assert angle(found, expected) < 1e-5
    for key, value in state.items():
        torch.testing.assert_close(value, expected_state[key], rtol=0, atol=1e-6)
    if not isinstance(rule, gs.Sum | gs.Mean):
        assert angle(found, jacobian.mean(0)) > 0.05


# --- Conflicts measured in half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1000, 300_000])  # more than one chunk
def test_conflicts_measured_in_half_precision(dtype, size):
    jacobian = random_rows(3, size).add_(0.3 * random_rows(size, seed=1)).to(dtype)
    exact = jacobian.double()
    unit = exact / exact.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    # With three tasks the second meeting is with a modified gradient, so look at pairs. beta = 1: the target is the cosine.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        _, state = gs.operate(jacobian[[i, j]], gs.GradVac(beta=1.0), state={})
        assert state["target"].dtype == torch.float64
        assert state["target"][0, 0, 1].item() == pytest.approx(cosines[i, j].item(), abs=1e-6)
    rounded = (exact @ exact.T).to(dtype).double()  # even if only the finished products were kept in half precision
    lengths = rounded.diagonal().sqrt()
    if dtype == torch.bfloat16:
        assert (rounded / lengths / lengths[:, None] - cosines).fill_diagonal_(0).abs().max() > 1e-5


@every_rule
def test_half_precision_gradients_are_combined_in_float32(rule):
    jacobian = random_rows(3, 500).bfloat16()
    found = gs.operate(jacobian, rule, generator=torch.Generator().manual_seed(0))
    exact = gs.operate(jacobian.double(), rule, generator=torch.Generator().manual_seed(0))
    assert found.dtype == torch.bfloat16
    # One rounding of the result, half a unit in the last of 8 places; and MGDA's weights, from a Gram matrix in float32.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3 * exact.abs().max().item())


# --- A reduction flag that is always true -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [gs.Sum(), gs.PCGrad(), gs.GradVac(target=0.5)], ids=repr)
def test_a_reduction_flag_that_is_always_true(rule):
    jacobian = random_rows(4, 10)
    total = gs.operate(jacobian, rule, generator=torch.Generator().manual_seed(0))
    mean = gs.operate(jacobian, gs.Chain(rule, gs.Mean()), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean, total / 4)
    assert total.norm() > 1


# --- Settings ---------------------------------------------------------------------------------------------------------


OUT_OF_RANGE = {
    "GradVac-beta-above": (lambda: gs.GradVac(beta=1.5), r"`beta` must be in \[0, 1\]. Found beta=1.5"),
    "GradVac-beta-below": (lambda: gs.GradVac(beta=-0.1), r"`beta` must be in \[0, 1\]. Found beta=-0.1"),
    "GradVac-beta-nan": (lambda: gs.GradVac(beta=float("nan")), r"`beta` must be in \[0, 1\]. Found beta=nan"),
    "GradVac-target-above": (lambda: gs.GradVac(target=1.01), r"`target` is a cosine and must be in \[-1, 1\].*Found 1.01"),
    "GradVac-target-nan": (
        lambda: gs.GradVac(target=float("nan")),
        r"`target` is a cosine and must be in \[-1, 1\].*Found nan",
    ),
    "GradVac-max_growth-below": (
        lambda: gs.GradVac(max_growth=0.9),
        "`max_growth` must be at least 1. Found max_growth=0.9",
    ),
    "GradVac-max_growth-nan": (
        lambda: gs.GradVac(max_growth=float("nan")),
        "`max_growth` must be at least 1. Found max_growth=nan",
    ),
    "GradVac-one-name": (
        lambda: gs.GradVac(tasks="de"),
        r"`tasks` must be several names. Found the string 'de'; write \('de',\)",
    ),
    "GradVac-no-tasks": (lambda: gs.GradVac(tasks=[]), r"`tasks` must be distinct names, at least one.*Found \(\)"),
    "GradVac-twice-the-same": (
        lambda: gs.GradVac(tasks=["de", "de"]),
        r"`tasks` must be distinct names.*Found \('de', 'de'\)",
    ),
    "MGDA-tolerance-0": (lambda: gs.MGDA(tolerance=0), "`tolerance` must be positive. Found tolerance=0"),
    "MGDA-tolerance-nan": (lambda: gs.MGDA(tolerance=float("nan")), "`tolerance` must be positive. Found tolerance=nan"),
    "MGDA-iterations": (lambda: gs.MGDA(iterations=0), "`iterations` must be at least 1. Found iterations=0"),
    "Chain-of-none": (lambda: gs.Chain(), "`Chain` needs at least one rule. Found none"),
}


@pytest.mark.parametrize(("make", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_settings_out_of_range_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("part", [gs.PCGrad, "pcgrad", None])
def test_a_chain_takes_rules_only(part):
    with pytest.raises(TypeError, match=f"`Chain` takes rules. Found .* of type {type(part).__name__}"):
        gs.Chain(gs.Sum(), part)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"beta": 1}, {"target": -1}, {"target": 1}, {"max_growth": 1}])
def test_settings_on_the_edge_of_their_range_are_fine(settings):
    assert gs.operate(random_rows(3, 4), gs.GradVac(**settings)).isfinite().all()


NONE, INF = (), float("inf")
RANGES = [  # rule, setting, the ends of its range, what is just outside, other settings
    (gs.Adversary, "mu", (0,), (-0.01, INF), {"tasks": "a"}),
    (gs.Adversary, "steps", (1, None), (0, True, 1.5), {"tasks": "a"}),
    (gs.CAGrad, "c", (0,), (-0.01, 1), {}),
    (gs.CRMOGM, "alpha", (0, 1), (-0.01, 1.01), {"rule": gs.Sum()}),
    (gs.DWA, "epoch", (1,), (0, True, 1.5), {}),
    (gs.DWA, "temperature", NONE, (0, INF), {}),
    (gs.FAMO, "decay", (0,), (-0.01, INF), {}),
    (gs.FAMO, "lr", NONE, (0, INF), {}),
    (gs.FairGrad, "alpha", NONE, (0, INF), {}),
    (gs.GEM, "margin", (0,), (-0.01, INF), {"anchors": ("a",)}),
    (gs.GradDrop, "leak", (0, 1, {"a": 1, "b": 0}), (-0.01, 1.01, {"a": 1.01}), {}),
    (gs.GradNorm, "alpha", (0,), (-0.01, INF), {}),
    (gs.GradNorm, "lr", NONE, (0, INF), {}),
    (gs.GradNorm, "smallest", NONE, (0, 1), {}),
    (gs.Krum, "byzantine", (0,), (-1, True, 0.5), {}),
    (gs.Krum, "selected", (1,), (0, True, 1.5), {}),
    (gs.MGDA, "iterations", (1,), (0,), {}),
    (gs.MGDA, "tolerance", NONE, (0,), {}),
    (gs.MoDo, "lr", NONE, (0, INF), {}),
    (gs.MoDo, "rho", (0,), (-0.01, INF), {}),
    (gs.NashMTL, "update_every", (1,), (0, True, 1.5), {}),
    (gs.PCGrad, "weights", ({"a": 0},), ({"a": -0.01}, {"a": INF}, {}), {}),
    (gs.SDMGrad, "iterations", (1,), (0,), {}),
    (gs.SDMGrad, "lam", (0,), (-0.01, INF), {}),
    (gs.SDMGrad, "lr", (None,), (0, INF), {}),
    (gs.SDMGrad, "momentum", (0,), (-0.01, 1), {}),
    (gs.Transference, "beta", (1,), (0, 1.01), {}),
    (gs.Transference, "lr", NONE, (0, INF), {}),
    (gs.TrimmedMean, "trim", (0,), (-1, True, 0.5), {}),
]


@pytest.mark.parametrize(
    ("rule", "setting", "ends", "outside", "others"), RANGES, ids=[f"{r.__name__}-{s}" for r, s, *_ in RANGES]
)
def test_ranges_of_settings(rule, setting, ends, outside, others):
    for value in ends:
        rule(**{setting: value}, **others)
    for value in outside:
        with pytest.raises(ValueError, match=f"`{setting}"):
            rule(**{setting: value}, **others)


# --- Rules as objects -------------------------------------------------------------------------------------------------

OBJECTS = [
    (gs.Rule(), "Rule()"),
    (gs.Sum(), "Sum()"),
    (gs.Mean(), "Mean()"),
    (gs.PCGrad(), "PCGrad(weights=None)"),
    (gs.GradVac(beta=0.1), "GradVac(beta=0.1, target=None, tasks=None, max_growth=10.0, weights=None)"),
    (gs.GradVac(target=0.5, tasks=["de"]), "GradVac(beta=0.01, target=0.5, tasks=('de',), max_growth=10.0, weights=None)"),
    (gs.MGDA(), f"MGDA(tolerance={gs.MGDA().tolerance}, iterations={gs.MGDA().iterations})"),
    (gs.UPGrad(weights={"a": 2}), "UPGrad(weights=(('a', 2.0),))"),
    (gs.DualProj(), "DualProj(weights=None)"),
    (gs.CAGrad(c=0.5), "CAGrad(c=0.5)"),
    (gs.NashMTL(update_every=3), "NashMTL(update_every=3)"),
    (gs.FairGrad(alpha=2.0), "FairGrad(alpha=2.0)"),
    (gs.AlignedMTL(), "AlignedMTL(scale='min', weights=None)"),
    (gs.IMTLG(), "IMTLG()"),
    (gs.ConFIG(), "ConFIG(weights=None)"),
    (gs.GradNorm(), "GradNorm(alpha=1.5, lr=0.025, smallest=0.001)"),
    (gs.CosineGate(["a"]), "CosineGate(main=('a',), weighted=True)"),
    (gs.AGEM(["a"]), "AGEM(anchors=('a',))"),
    (gs.GEM(["a"]), "GEM(anchors=('a',), margin=0.0)"),
    (gs.SDMGrad(), "SDMGrad(lam=0.3, lr=None, momentum=0.5, iterations=20, weights=None)"),
    (gs.MoDo(), "MoDo(lr=0.1, rho=0.1)"),
    (gs.CRMOGM(gs.IMTLG()), "CRMOGM(rule=IMTLG(), alpha=0.9)"),
    (gs.Krum(), "Krum(byzantine=0, selected=1)"),
    (gs.EqualNorm(), "EqualNorm(to='mean')"),
    (gs.Chain(gs.PCGrad(), gs.Mean()), "Chain(PCGrad(weights=None), Mean())"),
]


@pytest.mark.parametrize(("rule", "text"), OBJECTS)
def test_repr_equality_hash_and_pickling(rule, text):
    assert repr(rule) == text
    assert eval(text, vars(gs)) == rule
    twin = pickle.loads(pickle.dumps(rule))
    assert twin == rule
    assert hash(twin) == hash(rule)
    assert twin is not rule
    assert [other for other, _ in OBJECTS if other == rule] == [rule]


def test_rules_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        gs.GradVac().beta = 0.5
    with pytest.raises(FrozenInstanceError):
        gs.Chain(gs.Sum()).rules = ()


# --- operate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jacobian", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "`jacobian` must be a floating-point tensor. Found list"),
        (np.ones((2, 3)), TypeError, "`jacobian` must be a floating-point tensor. Found ndarray"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "`jacobian` must be a floating-point tensor. Found torch.int64"),
        (torch.ones(3), ValueError, r"`jacobian` must be \[K, D\] with K >= 1 tasks. Found shape \(3,\)"),
        (torch.ones(2, 3, 4), ValueError, r"`jacobian` must be \[K, D\] with K >= 1 tasks. Found shape \(2, 3, 4\)"),
        (torch.ones(0, 4), ValueError, r"`jacobian` must be \[K, D\] with K >= 1 tasks. Found shape \(0, 4\)"),
    ],
)
def test_operate_says_what_is_wrong_with_a_jacobian(jacobian, error, message):
    with pytest.raises(error, match=message):
        gs.operate(jacobian, gs.Sum())


@every_rule
def test_operate_returns_a_state_if_it_is_given_one(rule):
    jacobian = random_rows(3, 6)
    combined = gs.operate(jacobian, rule, generator=torch.Generator().manual_seed(0))
    assert combined.shape == (6,)
    again, state = gs.operate(jacobian, rule, state={}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, combined)
    assert isinstance(state, dict)


def test_a_saved_state_continues_bit_for_bit():
    rule, state = gs.Chain(gs.GradVac(beta=0.3, tasks=("0", "1")), gs.GradVac(beta=0.1), gs.Mean()), {}
    for seed in range(3):
        _, state = gs.operate(random_rows(3, 6, seed=seed), rule, state=state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)
    for seed in range(3, 6):
        torch.manual_seed(seed)
        found, state = gs.operate(random_rows(3, 6, seed=seed), rule, state=state)
        torch.manual_seed(seed)
        expected, restored = gs.operate(random_rows(3, 6, seed=seed), rule, state=restored)
        assert torch.equal(found, expected)
    assert torch.equal(state["0"]["target"], restored["0"]["target"])
    assert torch.equal(state["1"]["target"], restored["1"]["target"])


def test_operate_lets_rules_observe():
    rule, state, step = gs.Adversary("1", steps=4), {}, 0
    rows = random_rows(2, 6)
    for step in range(6):
        combined, state = gs.operate(rows, rule, state=state)
        strength = 2 / (1 + np.exp(-10 * min(step / 4, 1))) - 1
        torch.testing.assert_close(combined, rows[0] - strength * rows[1])
    losses, state = torch.tensor([2.0, 0.5], dtype=torch.float64), {}
    for _ in range(3):
        _, state = gs.operate(rows, gs.Transference(lr=0.1), losses=losses, state=state)
    torch.testing.assert_close(state["total"][0], 3 * 0.1 * rows @ rows.T / losses)
    _, without = gs.operate(rows, gs.Chain(gs.Transference(), gs.PCGrad()), state={})  # there is nothing to divide by
    assert not without["0"]["steps"].any()
    _, learned = gs.operate(rows, gs.GradNorm(), losses=losses, state={})
    assert torch.equal(learned["initial"], losses)
    assert not torch.equal(learned["weight"], torch.ones(2, dtype=torch.float64))


@every_rule
def test_operate_leaves_its_arguments_alone(rule):
    jacobian = random_rows(3, 6).requires_grad_()
    before = jacobian.detach().clone()
    first, state = gs.operate(jacobian, rule, state={})
    kept = {key: value.clone() for key, value in state.items()}
    second, _ = gs.operate(jacobian, rule, state=state)
    assert not first.requires_grad
    assert not second.requires_grad
    assert torch.equal(jacobian, before)
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert first.data_ptr() != jacobian.data_ptr()


@every_rule
def test_operate_takes_strided_complex_and_empty_rows(rule):
    jacobian = random_rows(3, 6)

    def operate(rows):
        return gs.operate(rows, rule, generator=torch.Generator().manual_seed(0))

    expected = operate(jacobian)
    torch.testing.assert_close(operate(jacobian.T.contiguous().T), expected)
    complex_rows = torch.view_as_complex(jacobian.reshape(3, 3, 2))  # a complex coordinate is two real ones
    torch.testing.assert_close(operate(complex_rows), torch.view_as_complex(expected.reshape(3, 2)))
    assert operate(torch.empty(3, 0)).shape == (0,)
