"""Agreement with TorchJD on random Jacobians in float64, for every rule that both have and define alike.

Where its result is that of a solver which stops early, whatever its settings, a third solution decides, one that is exact
but for rounding: ours has to be that, and theirs near it.
"""

from unittest import mock

import more_oracles
import numpy as np
import pytest
import torch
from oracles import fixed_orders, gram, names

import gradsurgery as gs

aggregation = pytest.importorskip("torchjd.aggregation")
TASKS = [2, 3, 4, 5, 6, 8, 12, 16]
tasks_ = pytest.mark.parametrize("tasks", TASKS)

BOTH = {  # each has a test below
    *("AlignedMTL", "CAGrad", "ConFIG", "CRMOGM", "DualProj", "FairGrad", "GradDrop", "GradVac", "IMTLG", "Krum", "Mean"),
    *("MGDA", "MoDo", "NashMTL", "PCGrad", "Random", "SDMGrad", "Sum", "TrimmedMean", "UPGrad"),
}
THEIRS_ALONE = {"Constant", "ExcessMTL", "PCD"}
DIFFERENT = sorted(BOTH - {"CRMOGM", "GradDrop", "Mean", "MoDo", "PCGrad", "Random", "Sum", "TrimmedMean"})


def jacobian_of(tasks, seed=0):
    rng = np.random.default_rng(100 * tasks + seed)
    return torch.tensor((rng.normal(size=(tasks, 3 * tasks)) - 0.1) * rng.uniform(0.3, 3, size=(tasks, 1)))


def ours(rule, jacobian):
    return following(rule, [jacobian])[0]


def following(rule, jacobians):
    """The combined gradients of steps that follow each other."""
    state, found = rule.init(names(len(jacobians[0])), ["all"]), []
    for jacobian in jacobians:
        mixing, state = rule.mix(gram(jacobian), state)
        found.append(mixing[0].sum(0) @ jacobian)
    return found


def distance(found, expected):
    return float((torch.as_tensor(found) - torch.as_tensor(expected)).norm() / torch.as_tensor(expected).norm())


def check(found, expected, tolerance=1e-5):
    assert distance(found, expected) <= tolerance


def preferences(tasks):
    """As a vector that sums to 1, and by task."""
    weights = torch.arange(1.0, tasks + 1, dtype=torch.float64)
    return weights / weights.sum(), {str(k): k + 1.0 for k in range(tasks)}


def test_every_aggregator_is_here():
    theirs = {name.removesuffix("Weighting") for name in aggregation.__all__}
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", ""}
    assert theirs - bases == BOTH | THEIRS_ALONE
    assert {name for name in theirs if hasattr(gs, name)} | {"Random"} == BOTH  # which is RLW here


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_difference_is_in_a_note(name):
    assert "TorchJD" in getattr(gs, name).__doc__.partition("Note:")[2]


# --- Closed forms -----------------------------------------------------------------------------------------------------


@tasks_
def test_closed_forms(tasks):
    vector, mapping = preferences(tasks)
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        for name in ("Sum", "Mean", "IMTLG", "ConFIG"):
            check(ours(getattr(gs, name)(), jacobian), getattr(aggregation, name)()(jacobian), 1e-9)
        for scale in ("min", "median", "rmse"):
            found, theirs = gs.AlignedMTL(scale=scale, weights=mapping), aggregation.AlignedMTL(vector, scale_mode=scale)
            check(ours(found, jacobian), theirs(jacobian), 1e-9)
            theirs = aggregation.AlignedMTL(scale_mode=scale)
            check(ours(gs.AlignedMTL(scale=scale), jacobian), theirs(jacobian), 1e-9)
        check(ours(gs.ConFIG(weights=mapping), jacobian), aggregation.ConFIG(vector)(jacobian), 1e-9)


@tasks_
def test_random_orders(tasks):
    """Both from the same random numbers: TorchJD draws a permutation for one task after the other."""
    jacobians = [jacobian_of(tasks, seed) for seed in range(3)]
    theirs = aggregation.GradVac(beta=0.3, eps=0.0)
    rule, targets = gs.GradVac(beta=0.3, max_growth=float("inf")), torch.zeros(1, tasks, tasks, dtype=torch.float64)
    for seed, jacobian in enumerate(jacobians):
        torch.manual_seed(seed)
        orders = torch.stack([drawn[drawn != i] for i, drawn in enumerate(torch.randperm(tasks) for _ in range(tasks))])
        torch.manual_seed(seed)
        expected = aggregation.PCGrad()(jacobian)
        with fixed_orders(orders):
            check(ours(gs.PCGrad(), jacobian), expected, 1e-9)

        torch.manual_seed(seed)
        others = torch.arange(tasks).expand(tasks, -1)[~torch.eye(tasks, dtype=torch.bool)].reshape(tasks, tasks - 1)
        orders = torch.stack([row[torch.randperm(tasks - 1)] for row in others])
        torch.manual_seed(seed)
        expected = theirs(jacobian)
        with fixed_orders(orders):
            mixing, state = rule.mix(gram(jacobian), {"target": targets})
        targets = state["target"]
        check(mixing[0].sum(0) @ jacobian, expected, 1e-9)
        check(targets[0], theirs.gramian_weighting._phi_t, 1e-9)


@tasks_
def test_steps_on_weights(tasks):
    vector, mapping = preferences(tasks)
    jacobians = [jacobian_of(tasks, seed) for seed in range(4)]
    pairs = [
        (gs.SDMGrad(lr=0.3), aggregation.SDMGradWeighting(lr=0.3)),
        (gs.SDMGrad(lr=0.1, lam=0.6, weights=mapping), aggregation.SDMGradWeighting(0.1, lambda_=0.6, pref_vector=vector)),
        (gs.MoDo(lr=0.01, rho=0.1), aggregation.MoDoWeighting(gamma=0.01, rho=0.1)),
        (gs.CRMOGM(gs.IMTLG(), alpha=0.8), aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting(), alpha=0.8)),
    ]
    for rule, theirs in pairs:
        for found, jacobian in zip(following(rule, jacobians), jacobians, strict=True):
            check(found, theirs(jacobian @ jacobian.T) @ jacobian, 1e-7)  # SDMGrad: it adds 1e-8 to a squared norm


@tasks_
def test_random_weights(tasks):
    jacobian = jacobian_of(tasks)
    torch.manual_seed(0)
    weights, _ = gs.RLW().weigh(torch.ones(tasks, dtype=torch.float64), {})
    torch.manual_seed(0)
    check(weights @ jacobian, aggregation.Random()(jacobian), 1e-12)


@tasks_
def test_coordinates(tasks):
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        for trim in range((tasks - 1) // 2 + 1):
            check(gs.operate(jacobian, gs.TrimmedMean(trim)), aggregation.TrimmedMean(trim)(jacobian), 1e-12)
        for leak in (None, torch.linspace(0, 1, tasks, dtype=torch.float64)):
            mapping = {} if leak is None else {str(k): value for k, value in enumerate(leak.tolist())}
            torch.manual_seed(seed)
            theirs = aggregation.GradDrop(leak=leak)(jacobian)
            torch.manual_seed(seed)
            check(gs.operate(jacobian, gs.GradDrop(mapping)), theirs, 1e-12)


@pytest.mark.parametrize("tasks", [tasks for tasks in TASKS if tasks > 2])
def test_krum_of_squared_distances(tasks):
    """The same, once TorchJD is handed a matrix in which each distance is the square of what it was."""
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        matrix = -0.5 * torch.cdist(jacobian, jacobian) ** 4
        for byzantine in range((tasks - 3) // 2 + 1):
            for selected in (1, 2):
                theirs = aggregation.KrumWeighting(byzantine, selected)(matrix)
                check(ours(gs.Krum(byzantine, selected), jacobian), theirs @ jacobian, 1e-12)


def test_krum_squares_distances():
    """As the paper does. TorchJD's distances are not squared, so that it chooses another task here."""
    rows = [[0, 4], [2, 7], [7, 7], [9, 9], [1, 1], [1, 7]]
    jacobian = torch.tensor(rows, dtype=torch.float64)
    squares = torch.cdist(jacobian, jacobian).square().sort(dim=1).values[:, 1:4].sum(1)
    assert squares.argmin() == 0
    assert torch.equal(ours(gs.Krum(byzantine=1), jacobian), jacobian[0])
    assert torch.equal(aggregation.Krum(n_byzantine=1)(jacobian), jacobian[1])


# --- Solvers that can be made exact -----------------------------------------------------------------------------------


def exact_projector():
    pytest.importorskip("qpsolvers", reason="TorchJD's projections need torchjd[quadprog_projector]")
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)  # by default it changes the Gram matrix by 1e-4


@tasks_
@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
@pytest.mark.parametrize("weighted", [False, True])
def test_projections(name, tasks, weighted):
    projector = exact_projector()
    vector, mapping = preferences(tasks) if weighted else (None, None)
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        theirs = getattr(aggregation, name)(vector, projector=projector)
        check(ours(getattr(gs, name)(weights=mapping), jacobian), theirs(jacobian), 1e-8)


@tasks_
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0, 10.0])
def test_fairgrad(tasks, alpha):
    pytest.importorskip("scipy")
    for seed in range(2):
        jacobian = jacobian_of(tasks, seed)
        check(ours(gs.FairGrad(alpha=alpha), jacobian), aggregation.FairGrad(alpha=alpha)(jacobian), 1e-8)


def test_fairgrad_of_torchjd_depends_on_its_start():
    """What the Note of :class:`gradsurgery.FairGrad` says."""
    pytest.importorskip("scipy")
    for factor in (1e-4, torch.tensor([[1e-3], [1e3], [1], [1], [1]])):
        jacobian = jacobian_of(5) * factor
        matrix = jacobian @ jacobian.T
        weights = gs.FairGrad(alpha=2.0).mix(matrix[None], {})[0][0].diagonal()
        check(weights * (matrix @ weights) ** 2, torch.ones(5, dtype=torch.float64), 1e-8)
        assert distance(aggregation.FairGrad(alpha=2.0)(jacobian), weights @ jacobian) > 0.05


# --- Solvers that stop early ------------------------------------------------------------------------------------------


@tasks_
def test_mgda(tasks):
    """Frank-Wolfe steps approach the solution ever more slowly, unless it is on an edge."""
    for seed in range(3):
        jacobian = jacobian_of(tasks, seed)
        exact = more_oracles.shortest(jacobian.numpy())
        check(ours(gs.MGDA(), jacobian), exact, 1e-8)
        theirs = aggregation.MGDA(epsilon=1e-7, max_iters=1000)(jacobian)
        check(theirs, exact, 1e-5 if tasks == 2 else 0.1)
        assert ours(gs.MGDA(), jacobian).norm() <= theirs.norm() * (1 + 1e-12)


def test_mgda_of_torchjd_is_not_nearer_than_it_says():
    """The numbers in the Note of :class:`gradsurgery.MGDA`."""
    jacobian = jacobian_of(16, 1)
    exact = more_oracles.shortest(jacobian.numpy())
    assert distance(aggregation.MGDA()(jacobian), exact) > 0.05
    assert distance(aggregation.MGDA(epsilon=1e-7, max_iters=1000)(jacobian), exact) > 0.01


@tasks_
@pytest.mark.parametrize("c", [0.2, 0.8])
def test_cagrad(tasks, c):
    pytest.importorskip("cvxpy", reason="TorchJD's CAGrad needs torchjd[cagrad]")
    for seed in range(2):
        jacobian = jacobian_of(tasks, seed)
        exact = more_oracles.conflict_averse(jacobian.numpy(), c)
        check(ours(gs.CAGrad(c=c), jacobian), exact, 1e-8)
        check(aggregation.CAGrad(c=c, norm_eps=0.0)(jacobian), exact, 1e-3)


@pytest.mark.filterwarnings("ignore")  # of the solver, that cannot do what is asked
def test_cagrad_of_torchjd_is_as_exact_as_its_solver():
    """The number in the Note of :class:`gradsurgery.CAGrad`, and the reason for it."""
    cvxpy = pytest.importorskip("cvxpy", reason="TorchJD's CAGrad needs torchjd[cagrad]")
    solve = cvxpy.Problem.solve

    def tighter(problem, solver):
        return solve(problem, solver=solver, tol_gap_abs=1e-16, tol_gap_rel=1e-16, tol_feas=1e-14, max_iter=500)

    errors = []
    for seed in range(5):
        jacobian = jacobian_of(12, seed)
        exact, theirs = more_oracles.conflict_averse(jacobian.numpy(), 0.2), aggregation.CAGrad(c=0.2, norm_eps=0.0)
        errors.append(distance(theirs(jacobian), exact))
        with mock.patch.object(cvxpy.Problem, "solve", tighter):
            check(theirs(jacobian), exact, 2e-5)
    assert max(errors) > 2e-5


@tasks_
@pytest.mark.filterwarnings("ignore")  # of the solver
def test_nash_mtl(tasks):
    pytest.importorskip("ecos", reason="TorchJD's Nash-MTL needs torchjd[nash_mtl]")
    pytest.importorskip("cvxpy")
    solved = []
    for seed in range(3):
        jacobian = jacobian_of(tasks, seed)
        matrix, theirs = jacobian @ jacobian.T, aggregation.NashMTL(n_tasks=tasks, max_norm=0.0, optim_niter=100)
        exact = more_oracles.bargained(jacobian.numpy())
        check(ours(gs.NashMTL(), jacobian), exact, 1e-8)
        weights = theirs.weighting(jacobian)
        # Where its solver fails, it keeps what it had: at first the plain sum, which does not solve G a = 1 / a.
        solved.append(bool((weights * (matrix @ weights) - 1).abs().max() < 1e-2))
        if solved[-1]:
            check(weights @ jacobian, exact)
    assert sum(solved) >= 2


@pytest.mark.filterwarnings("ignore")
def test_nash_mtl_of_torchjd_is_the_plain_sum_where_its_solver_fails():
    """What the Note of :class:`gradsurgery.NashMTL` says."""
    pytest.importorskip("ecos", reason="TorchJD's Nash-MTL needs torchjd[nash_mtl]")
    pytest.importorskip("cvxpy")
    jacobian = jacobian_of(2, 1)
    check(aggregation.NashMTL(n_tasks=2, max_norm=0.0)(jacobian), jacobian.sum(0), 1e-6)
    assert distance(jacobian.sum(0), more_oracles.bargained(jacobian.numpy())) > 0.1
