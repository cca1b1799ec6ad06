"""One table of rules, one table of laws: those of :class:`gradsurgery.Rule`, which the library checks itself."""

import re
from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import strategies
import test_gate
import test_weigh
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import fixed_orders, gram, names

import gradsurgery as gs
from gradsurgery.testing._laws import LAWS

CLOSE = 1e-9  # of the original norms, in float64 on well-conditioned Jacobians
quick = settings(deadline=None, max_examples=20)

RULES = {
    "identity": gs.Rule(),
    "sum": gs.Sum(),
    "mean": gs.Mean(),
    "pcgrad": gs.PCGrad(),
    "gradvac": gs.GradVac(beta=0.3),
    "gradvac with a fixed target": gs.GradVac(target=0.5),
    "gradvac on some tasks": gs.GradVac(beta=0.3, tasks=("0", "2")),
    "mgda": gs.MGDA(),
    "upgrad": gs.UPGrad(),
    "upgrad with weights": gs.UPGrad(weights={"0": 2.0, "2": 0.5}),
    "dualproj": gs.DualProj(),
    "cagrad": gs.CAGrad(c=0.4),
    "nash-mtl": gs.NashMTL(),
    "nash-mtl now and then": gs.NashMTL(update_every=2),
    "fairgrad": gs.FairGrad(alpha=2.0),
    "aligned-mtl": gs.AlignedMTL(),
    "aligned-mtl, median": gs.AlignedMTL(scale="median"),
    "aligned-mtl, rmse": gs.AlignedMTL(scale="rmse"),
    "imtl-g": gs.IMTLG(),
    "config": gs.ConFIG(),
    "gradnorm": gs.GradNorm(),
    "cosine gate": gs.CosineGate(main=("0",)),
    "cosine gate, unweighted": gs.CosineGate(main=("0",), weighted=False),
    "a-gem": gs.AGEM(anchors=("0", "2")),
    "gem": gs.GEM(anchors=("0", "2")),
    "sdmgrad": gs.SDMGrad(),
    "sdmgrad, at a rate of its own": gs.SDMGrad(lr=0.3),
    "modo": gs.MoDo(),
    "cr-mogm": gs.CRMOGM(gs.MGDA()),
    "krum": gs.Krum(byzantine=0, selected=2),
    "equal norm": gs.EqualNorm(),
    "adversary": gs.Adversary("0", mu=0.5),
    "adversaries, in time": gs.Adversary(("0", "2"), steps=3),
    "transference": gs.Transference(lr=0.1, beta=0.3),
    "pcgrad with weights": gs.PCGrad(weights={"0": 2.0, "2": 0.5}),
    "gradvac with weights": gs.GradVac(beta=0.3, weights={"0": 2.0, "2": 0.5}),
    "pcgrad, mean": gs.Chain(gs.PCGrad(), gs.Mean()),
    "gradvac, mgda": gs.Chain(gs.GradVac(beta=0.3), gs.MGDA()),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
walks = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.random], ids=[name for name, rule in RULES.items() if rule.random]
)


# Rules whose weights depend on how long gradients are, whatever their directions: by the paper's equations.
BY_LENGTH = ("nash-mtl", "nash-mtl now and then", "fairgrad", "modo")
# Rules that give a task a weight that depends on the lengths of the other tasks' gradients, or on how many there are.
BY_LENGTHS = (
    *("dualproj", "cagrad", "aligned-mtl", "aligned-mtl, median", "aligned-mtl, rmse", "imtl-g", "config", "a-gem", "gem"),
    *("sdmgrad", "sdmgrad, at a rate of its own", "cr-mogm", "krum", "equal norm"),
)

WEIGHTED = ("upgrad with weights", "pcgrad with weights", "gradvac with weights")
GATED = ("cosine gate", "cosine gate, unweighted", "adversary", "adversaries, in time")


def rules(*exclude):
    kept = {name: rule for name, rule in RULES.items() if name not in exclude}
    return pytest.mark.parametrize("rule", kept.values(), ids=kept)


def test_the_table_has_every_rule():
    parts = [part for rule in ALL.values() for part in (rule, *getattr(rule, "rules", ()))]
    parts += [part.rule for part in parts if isinstance(part, gs.CRMOGM)]
    every = {getattr(gs.rules, name) for name in gs.rules.__all__}
    assert {type(part) for part in parts} == {gs.Rule, *(rule for rule in every if issubclass(rule, gs.Rule))}


# --- Asking a rule ----------------------------------------------------------------------------------------------------


def mapped(function, state):
    return {k: mapped(function, v) if isinstance(v, dict) else function(k, v) for k, v in state.items()}


def leaves(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def some_state(rule, tasks, groups, targets):
    """A state in the middle of training. ``targets`` is ``[K, K]``, or ``[G, K, K]``."""
    present = [str(k) for k in range(max(tasks, 3))]  # "gradvac on some tasks" has to find its own
    state = mapped(
        lambda key, value: value[(slice(groups), *[slice(tasks)] * 2)[value.dim() == 1 :][: value.dim()]],
        rule.init(present, names(groups)),
    )
    targets = torch.as_tensor(targets).expand(groups, tasks, tasks)
    return mapped(lambda key, value: targets.clone() if key == "target" else value.clone(), state)


def taken(state, tasks):
    """The state of some of the tasks, in this order."""

    def take(key, value):
        return (value[:, tasks][:, :, tasks] if value.dim() == 3 else value[:, tasks]) if value.dim() > 1 else value[tasks]

    return mapped(take, state)


def relative(mixing, jacobian):
    """``M`` in units of the original norms: how long the part of ``g_j`` in ``g'_i`` is, compared with ``g_i``."""
    lengths = torch.as_tensor(jacobian).norm(dim=-1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return mixing * lengths[..., None, :] / lengths[..., :, None]


def solves(rule):
    """Rules that solve a problem up to a tolerance. Its weights need not be unique, but the combined gradient is."""
    inexact = (gs.MGDA, gs.CRMOGM, gs.CAGrad, gs.AlignedMTL, gs.SDMGrad)
    return any(isinstance(part, inexact) for part in getattr(rule, "rules", (rule,)))


def check_same_mixing(rule, found, expected, jacobian):
    if not solves(rule):
        torch.testing.assert_close(relative(found, jacobian), relative(expected, jacobian), rtol=CLOSE, atol=CLOSE)
        return
    # A relative gap of 1e-14 is 1e-7 of the longest gradient; a rule before MGDA may have made it up to 10 times longer.
    jacobian = torch.as_tensor(jacobian)
    longest = jacobian.norm(dim=-1).amax(-1, keepdim=True)
    combined, other = ((m.sum(-2, keepdim=True) @ jacobian).squeeze(-2) / longest for m in (found, expected))
    torch.testing.assert_close(combined, other, rtol=0, atol=1e-5)


def check_same_state(found, expected, **tolerance):
    tolerance = tolerance or {"rtol": CLOSE, "atol": CLOSE}
    expected = dict(leaves(expected))
    for key, value in leaves(found):
        torch.testing.assert_close(value, expected.pop(key), **tolerance)
    assert not expected


@st.composite
def situations(draw, jacobians=strategies.apart, *, groups=1, **settings):
    """A Jacobian ``[K, D]`` (or several, ``[G, K, D]``), orders and targets."""
    first = draw(jacobians(**settings))
    tasks = len(first)
    stack = [first] + [
        draw(jacobians(min_tasks=tasks, max_tasks=tasks).map(lambda j: _widened(j, first.shape[1])))
        for _ in range(groups - 1)
    ]
    orders = np.stack([draw(strategies.orders(tasks)) for _ in range(groups)])
    targets = np.stack([draw(strategies.targets(tasks)) for _ in range(groups)])
    return (first, orders[0], targets[0]) if groups == 1 else (np.stack(stack), orders, targets)


def _widened(jacobian, dim):
    """As many coordinates as another Jacobian; those of :func:`strategies.apart` have as many already."""
    result = np.zeros((len(jacobian), dim))
    width = min(dim, jacobian.shape[1])
    result[:, :width] = jacobian[:, :width]
    return result


# --- The contract -----------------------------------------------------------------------------------------------------

# The core's rules, on which other rules rest: tried harder, and all pairs of them chained.
FEW = ("identity", "sum", "mean", "pcgrad", "gradvac", "gradvac on some tasks", "mgda", "pcgrad, mean", "gradvac, mgda")

GATE = test_gate.seen_gate([str(k) for k in range(4)])
ALL = {
    **RULES,
    **test_weigh.RULES,
    "famo, pcgrad": gs.Chain(gs.FAMO(), gs.PCGrad()),
    "task gate": gs.TaskGate(GATE, "0"),
    "task gate, geometric": gs.TaskGate(GATE, "0", beta=1.0, mean="geometric"),
    "transference in proportion to nothing": gs.Transference(relative=False),
}
CLAIMS = [(name, law) for name, rule in ALL.items() for law in LAWS.values() if law.claimed(rule)]


@pytest.mark.parametrize(("name", "law"), CLAIMS, ids=[f"{name}-{law.name}" for name, law in CLAIMS])
def test_law(name, law):
    rule = ALL[name]
    tasks = ["0", "1", "2"] if "'0'" in repr(rule) else test_weigh.TASKS if name in ("uncertainty", "stch") else None
    examples = 40 if name in FEW else 8
    gs.testing.check_rule(rule, laws=[law.name], tasks=tasks, tolerance=1e-5 if solves(rule) else CLOSE, examples=examples)


def test_every_law_is_in_the_docstring():
    assert re.findall(r"\* \*\*(\w+)\*\*", gs.Rule.__doc__) == [*(law for law in LAWS if law not in FLAGS), *FLAGS]


FLAGS = ["separable", "random", "symmetric", "scale_equivariant", "non_conflicting"]


def test_what_is_claimed():
    names = lambda flag: {name for name, rule in ALL.items() if getattr(rule, flag)}  # noqa: E731
    assert names("non_conflicting") == {"mgda", "upgrad", "upgrad with weights", "dualproj"}
    assert set(ALL) - names("scale_equivariant") == {"identity", "gradnorm", *BY_LENGTH}
    assert {type(ALL[name]) for name in names("random")} == {gs.PCGrad, gs.GradVac, gs.RLW, gs.Chain}
    assert set(ALL) - names("symmetric") == {"stch"}


# --- The same where tasks meet in random orders: from the same orders -------------------------------------------------


@walks
@quick
@given(situation=situations(groups=3))
def test_batched(rule, situation):
    jacobian, orders, targets = situation
    matrix, state = gram(jacobian), some_state(rule, jacobian.shape[1], 3, targets)
    with fixed_orders(orders):
        found, new = rule.mix(matrix, state)
    for g in range(3):
        with fixed_orders(orders[g]):
            expected, expected_state = rule.mix(matrix[g : g + 1], mapped(lambda _, v, g=g: v[g : g + 1], state))
        check_same_mixing(rule, found[g : g + 1], expected, jacobian[g : g + 1])
        check_same_state(mapped(lambda _, v, g=g: v[g : g + 1], new), expected_state)


@walks
@quick
@given(situation=situations(max_tasks=4), data=st.data())
def test_absent(rule, situation, data):
    jacobian, orders, targets = situation
    tasks = len(jacobian)
    active = np.array(data.draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks)), dtype=bool)
    here, gone = np.flatnonzero(active), np.flatnonzero(~active)
    state = some_state(rule, tasks, 1, targets)
    # Rows and columns of absent tasks are zero. No result may depend on them, so anything else must do as well.
    clean = gram(jacobian * active[:, None])
    dirty = gram(np.where(active[:, None], jacobian, 1e3 * np.roll(jacobian, 1, axis=0)))
    results = []
    for matrix in (clean, dirty):
        with fixed_orders(orders):
            results.append(rule.mix(matrix, state, active=torch.tensor(active)[None]))
    (mixing, new), (other, _) = results
    check_same_state(results[1][1], new, rtol=0, atol=0)
    assert torch.equal(mixing, other)

    eye = torch.eye(tasks, dtype=mixing.dtype)
    assert torch.equal(mixing[0, gone], eye[gone])
    assert torch.equal(mixing[0, :, gone], eye[:, gone])
    before = dict(leaves(state))
    for key, value in leaves(new):
        if value.dim() == 3:
            assert torch.equal(value[0, gone], before[key][0, gone])
            assert torch.equal(value[0, :, gone], before[key][0, :, gone])

    if len(here):  # and the others are operated on as if they were alone
        index = {k: n for n, k in enumerate(here)}
        induced = np.array([[index[j] for j in orders[i] if active[j]] for i in here], dtype=np.int64)
        with fixed_orders(induced.reshape(len(here), len(here) - 1)):
            alone, alone_state = rule.mix(gram(jacobian[here]), taken(state, here))
        check_same_mixing(rule, mixing[:, here][:, :, here], alone, jacobian[here])
        check_same_state(taken(new, here), alone_state)


@walks
@quick
@given(situation=situations(), data=st.data())
def test_permuting_the_tasks_permutes_the_result(rule, situation, data):
    jacobian, orders, targets = situation
    tasks = len(jacobian)
    permutation = np.array(data.draw(st.permutations(range(tasks))))
    inverse = np.argsort(permutation)
    state = some_state(rule, tasks, 1, targets)
    with fixed_orders(orders):
        mixing, new = rule.mix(gram(jacobian), state)
    with fixed_orders(inverse[orders[permutation]]):
        found, found_state = rule.mix(gram(jacobian[permutation]), taken(state, permutation))
    check_same_mixing(rule, found, mixing[:, permutation][:, :, permutation], jacobian[permutation])
    check_same_state(found_state, taken(new, permutation))


# --- What one would expect --------------------------------------------------------------------------------------------


@rules("mean", "mgda", "pcgrad, mean", "gradvac, mgda", *BY_LENGTH, *BY_LENGTHS)
@quick
@given(situation=situations(widest=0), factors=st.lists(st.sampled_from([1e-7, 0.3, 12.0, 1e7]), min_size=5, max_size=5))
def test_only_directions_decide_what_is_operated_on(rule, situation, factors):
    # Each task's gradient changes in proportion to its own length, whatever the lengths of the others.
    jacobian, orders, targets = situation
    scaled = jacobian * np.array(factors[: len(jacobian)])[:, None]
    state = some_state(rule, len(jacobian), 1, targets)
    with fixed_orders(orders):
        mixing, new = rule.mix(gram(jacobian), state)
        found, found_state = rule.mix(gram(scaled), state)
    torch.testing.assert_close(relative(found, scaled), relative(mixing, jacobian), rtol=CLOSE, atol=CLOSE)
    check_same_state(found_state, new)


@every_rule
@quick
@given(situation=situations(widest=3))
def test_float32_gram_matrices_give_float32_results(rule, situation):
    jacobian, orders, targets = situation
    state = some_state(rule, len(jacobian), 1, targets)
    low = mapped(lambda _, v: v.float() if v.is_floating_point() else v, state)
    with fixed_orders(orders):
        mixing, new = rule.mix(gram(jacobian), state)
        found, found_state = rule.mix(gram(jacobian).float(), low)
    assert mixing.dtype == torch.float64
    assert found.dtype == torch.float32
    for (_, value), (_, before) in zip(leaves(found_state), leaves(low), strict=True):
        assert value.dtype == before.dtype
    # 6e-8 is multiplied by slopes of up to 2, over distances from the span of the others of at least 0.19, four times.
    # MGDA solves a problem that is perturbed by 6e-8, of which the square root remains.
    if solves(rule):
        jacobian = torch.tensor(jacobian)
        longest = jacobian.norm(dim=-1).max()
        combined, other = (m.double().sum(-2) @ jacobian / longest for m in (found, mixing))
        torch.testing.assert_close(combined, other, rtol=0, atol=5e-3)
    else:
        # Rules that solve for weights divide by what may be small: their error is relative to the weights.
        parts = getattr(rule, "rules", (rule,))
        walks_only = all(type(part) in (gs.Rule, gs.Sum, gs.Mean, gs.PCGrad, gs.GradVac) for part in parts)
        rtol = 0 if walks_only else 1e-3
        torch.testing.assert_close(relative(found.double(), jacobian), relative(mixing, jacobian), rtol=rtol, atol=1e-3)
    check_same_state(mapped(lambda _, v: v.double() if v.is_floating_point() else v, found_state), new, rtol=0, atol=1e-3)


@rules("mean", "mgda", "pcgrad, mean", "gradvac, mgda", "upgrad", *BY_LENGTH, *BY_LENGTHS, *GATED, *WEIGHTED)
@quick
@given(situation=situations(min_tasks=2), data=st.data())
def test_a_zero_gradient_changes_nothing_and_is_not_changed(rule, situation, data):
    jacobian, orders, targets = situation
    tasks = len(jacobian)
    zero = data.draw(st.integers(0, tasks - 1))
    others = np.array([k for k in range(tasks) if k != zero])
    jacobian = np.where(np.arange(tasks)[:, None] == zero, 0.0, jacobian)
    state = some_state(rule, tasks, 1, targets)
    with fixed_orders(orders):
        mixing, new = rule.mix(gram(jacobian), state)
    unit = torch.eye(tasks, dtype=mixing.dtype)[zero]
    assert torch.equal(mixing[0, zero], unit)
    assert torch.equal(mixing[0, :, zero], unit)
    shifted = np.array([[j - (j > zero) for j in orders[i] if j != zero] for i in others], dtype=np.int64)
    with fixed_orders(shifted.reshape(tasks - 1, tasks - 2)):
        alone, alone_state = rule.mix(gram(jacobian[others]), taken(state, others))
    check_same_mixing(rule, mixing[:, others][:, :, others], alone, jacobian[others])
    check_same_state(taken(new, others), alone_state)
    before = dict(leaves(state))
    for key, value in leaves(new):
        if value.dim() == 3:  # no cosine: the target stays
            assert torch.equal(value[0, zero], before[key][0, zero])
            assert torch.equal(value[0, :, zero], before[key][0, :, zero])


# One task is its own anchor; CAGrad adds c of it; zero gradients have no part in others.
@rules("cagrad", "a-gem", "gem", "imtl-g", "config", "cr-mogm", *BY_LENGTH[:3], *WEIGHTED)
@pytest.mark.parametrize("length", [0.0, 1e-10, 1.0, 1e10])
def test_one_task_keeps_its_gradient(rule, length):
    state = some_state(rule, 1, 2, np.zeros((1, 1)))
    mixing, new = rule.mix(torch.full((2, 1, 1), length**2, dtype=torch.float64), state)
    assert torch.equal(mixing, torch.ones(2, 1, 1, dtype=torch.float64))
    check_same_state(new, state, rtol=0, atol=0)


@every_rule
def test_no_groups_and_no_active_task(rule):
    state = some_state(rule, 3, 0, np.zeros((3, 3)))
    assert rule.mix(torch.empty(0, 3, 3, dtype=torch.float64), state)[0].shape == (0, 3, 3)
    state = some_state(rule, 3, 2, np.zeros((3, 3)))
    none = torch.zeros(2, 3, dtype=torch.bool)
    mixing, new = rule.mix(torch.zeros(2, 3, 3, dtype=torch.float64), state, active=none)
    assert torch.equal(mixing, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    check_same_state(new, state, rtol=0, atol=0)


# Rules that only weigh have no rank to lose; of two equal tasks, solutions may weigh either.
@rules("identity", "sum", "mean", "mgda", "gradvac, mgda", "cr-mogm", "cagrad")
@quick
@given(situation=situations(min_tasks=2, widest=0))
def test_low_rank_is_the_limit_of_full_rank(rule, situation):
    jacobian, orders, targets = situation
    exact = np.vstack([jacobian[1], jacobian[1:]])  # task 0 becomes a copy of task 1: the Gram matrix is singular
    nearby = exact.copy()
    nearby[0, 0] += 1e-9
    state = some_state(rule, len(jacobian), 1, targets)
    with fixed_orders(orders):
        found, limit = (rule.mix(gram(j), state)[0][0] @ torch.tensor(j) for j in (exact, nearby))
    torch.testing.assert_close(found, limit, rtol=0, atol=1e-6)


PAIRS = {f"{first}; {second}": (RULES[first], RULES[second]) for first in FEW for second in FEW}
PAIRS |= {f"{name}; pcgrad": (rule, gs.PCGrad()) for name, rule in RULES.items() if name not in FEW}
PAIRS |= {f"pcgrad; {name}": (gs.PCGrad(), rule) for name, rule in RULES.items() if name not in FEW}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_a_chain_is_the_product_of_its_matrices(first, second):
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(2, 4, 6)) - 0.2
    orders = np.stack([[rng.permutation([j for j in range(4) if j != i]) for i in range(4)] for _ in range(2)])
    chain = gs.Chain(first, second)
    state = chain.init(names(4), names(2))
    with fixed_orders(orders):
        found, new = chain.mix(gram(jacobian), state)
        one, one_state = first.mix(gram(jacobian), first.init(names(4), names(2)))
        after = one @ torch.tensor(jacobian)  # the second rule gets the gradients as the first one left them
        two, two_state = second.mix(gram(after), second.init(names(4), names(2)))
    check_same_mixing(second, found, two @ one, jacobian)
    if not isinstance(first, gs.Chain) and not isinstance(second, gs.Chain):  # chains inside a chain are flattened
        check_same_state(new, {"0": one_state, "1": two_state})


def test_a_chain_inside_a_chain_is_flattened():
    assert gs.Chain(gs.Chain(gs.PCGrad(), gs.Sum()), gs.Mean()) == gs.Chain(gs.PCGrad(), gs.Sum(), gs.Mean())


# --- GradVac ----------------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("rule", [gs.GradVac(target=0.0), gs.GradVac()], ids=repr)
@settings(deadline=None, max_examples=60)
@given(situation=situations(strategies.jacobians))
def test_gradvac_with_target_zero_is_pcgrad(rule, situation):
    # Whatever the rank: at t = 0 neither the angle nor its square root plays a part.
    jacobian, orders, _ = situation
    with fixed_orders(orders):
        found = rule.mix(gram(jacobian), rule.init(names(len(jacobian)), ["all"]))[0]
        expected = gs.PCGrad().mix(gram(jacobian), {})[0]
    torch.testing.assert_close(relative(found, jacobian), relative(expected, jacobian), rtol=CLOSE, atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 3])
@quick
@given(data=st.data(), target=st.floats(-0.95, 0.95))
def test_the_cosine_is_the_target_right_after_gradvac_fires(tasks, data, target):
    jacobian, orders, _ = data.draw(situations(min_tasks=tasks, max_tasks=tasks))
    found, _ = oracles.modified(gs.GradVac(target=target, max_growth=float("inf")), jacobian, orders=orders)
    before = jacobian if tasks == 2 else oracles.gradvac(jacobian, orders[:, :-1], np.full((3, 3), target), 0)[0]
    for i in range(tasks):
        last = orders[i, -1]  # a later meeting would have changed the cosine again
        start = cosine(before[i], jacobian[last])
        expected = max(start, target)
        assert cosine(found[i], jacobian[last]) == pytest.approx(expected, abs=CLOSE)


@quick
@given(situation=situations(min_tasks=2, max_tasks=2), target=st.floats(-0.95, 0.95))
def test_gradvac_lengthens_by_the_ratio_of_sines_when_it_fires(situation, target):
    jacobian, orders, _ = situation
    phi = cosine(*jacobian)
    found, _ = oracles.modified(gs.GradVac(target=target), jacobian, orders=orders)
    growth = np.linalg.norm(found, axis=1) / np.linalg.norm(jacobian, axis=1)
    expected = np.sqrt(1 - phi**2) / np.sqrt(1 - target**2) if phi < target else 1
    np.testing.assert_allclose(growth, expected, rtol=CLOSE)


@quick
@given(
    situation=situations(strategies.jacobians),
    target=st.sampled_from([-1.0, -0.5, 0.9, 1 - 1e-9, 1.0]),
    max_growth=st.sampled_from([1.0, 2.0, 10.0]),
)
def test_gradvac_never_lengthens_a_gradient_by_more_than_max_growth(situation, target, max_growth):
    jacobian, orders, _ = situation
    found, _ = oracles.modified(gs.GradVac(target=target, max_growth=max_growth), jacobian, orders=orders)
    lengths = np.linalg.norm(jacobian, axis=1)
    assert (np.linalg.norm(found, axis=1) <= max_growth * lengths * (1 + CLOSE)).all()


# --- MGDA -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(jacobian=strategies.jacobians(widest=4))
def test_mgda_has_the_smallest_norm_and_conflicts_with_no_task(jacobian):
    weights = gs.MGDA().mix(gram(jacobian), {})[0][0].diagonal().numpy()
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    direction, largest = weights @ jacobian, np.linalg.norm(jacobian, axis=1).max()
    slack = 1e-13 * largest**2  # the relative duality gap is at most 1e-14, and rounding adds a little
    assert direction @ direction <= oracles.mgda(jacobian) @ oracles.mgda(jacobian) + slack
    assert (jacobian @ direction >= direction @ direction - slack).all()


@quick
@given(jacobian=strategies.apart(min_tasks=2), data=st.data())
def test_mgda_is_zero_where_a_convex_combination_vanishes(jacobian, data):
    # Pareto-stationary: the last gradient is a negative combination of the others.
    weights = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=len(jacobian), max_size=len(jacobian))))
    jacobian = np.vstack([jacobian, -weights @ jacobian])
    direction = gs.operate(torch.tensor(jacobian), gs.MGDA()).numpy()
    assert np.linalg.norm(direction) <= 1e-6 * np.linalg.norm(jacobian, axis=1).max()


@dataclass(frozen=True)
class OwnRule(gs.Rule):
    """A user's rule: halves the gradient of each task that conflicts with another one, and counts the steps."""

    factor: float = 0.5

    def init(self, tasks, groups, *, device=None, dtype=torch.float64):
        return {"steps": torch.zeros(len(groups), dtype=dtype, device=device)}

    def mix(self, gram, state, *, active=None, generator=None):
        weights = torch.where((gram < 0).any(-1), self.factor, 1.0).to(gram.dtype)
        return torch.diag_embed(weights), {"steps": state["steps"] + 1}


def test_a_rule_of_ones_own_works_everywhere():
    jacobian = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(gs.operate(jacobian, OwnRule()), torch.tensor([0.0, 1.5], dtype=torch.float64))
    chain, state = gs.Chain(OwnRule(factor=0.0), gs.Mean()), {}
    for _ in range(3):
        combined, state = gs.operate(jacobian, chain, state=state)
    torch.testing.assert_close(combined, torch.tensor([0.0, 1 / 3], dtype=torch.float64))
    assert state["0"]["steps"].tolist() == [3]
    assert repr(chain) == "Chain(OwnRule(factor=0.0), Mean())"
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = gs.SurgeryOptimizer(torch.optim.SGD([parameter], lr=1.0), OwnRule())
    opt.backward(list(jacobian @ parameter))
    opt.step()
    assert parameter.tolist() == [0.0, -1.5]
    assert opt.rule_state["steps"].tolist() == [1]
