"""Agreement with TorchJD, where both define a rule alike, on random Jacobians in float64.

Where its result is that of an iterative solver which stops early, ours has to satisfy what defines the rule more exactly.
"""

import numpy as np
import pytest
import torch
from oracles import gram, names

import gradsurgery as gs

aggregation = pytest.importorskip("torchjd.aggregation")
tasks_ = pytest.mark.parametrize("tasks", [2, 3, 4, 5, 6, 8, 12, 16])


def jacobian_of(tasks, seed=0):
    rng = np.random.default_rng(100 * tasks + seed)
    return torch.tensor((rng.normal(size=(tasks, 3 * tasks)) - 0.1) * rng.uniform(0.3, 3, size=(tasks, 1)))


def ours(rule, jacobian):
    state = rule.init(names(len(jacobian)), ["all"])
    return rule.mix(gram(jacobian), state)[0][0].sum(0) @ jacobian


def check(found, expected, tolerance=1e-5):
    assert (found - expected).norm() <= tolerance * expected.norm()


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
    weights = torch.arange(1.0, tasks + 1, dtype=torch.float64) if weighted else None
    mapping = {str(k): k + 1.0 for k in range(tasks)} if weighted else None
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        theirs = getattr(aggregation, name)(None if weights is None else weights / weights.sum(), projector=projector)
        check(ours(getattr(gs, name)(weights=mapping), jacobian), theirs(jacobian))


@tasks_
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl(tasks, scale):
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        check(ours(gs.AlignedMTL(scale=scale), jacobian), aggregation.AlignedMTL(scale_mode=scale)(jacobian))


@tasks_
def test_imtl_g_and_config(tasks):
    for seed in range(5):
        jacobian = jacobian_of(tasks, seed)
        check(ours(gs.IMTLG(), jacobian), aggregation.IMTLG()(jacobian))
        check(ours(gs.ConFIG(), jacobian), aggregation.ConFIG()(jacobian))


@tasks_
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad(tasks, alpha):
    pytest.importorskip("scipy")
    jacobian = jacobian_of(tasks)
    found, theirs = ours(gs.FairGrad(alpha=alpha), jacobian), aggregation.FairGrad(alpha=alpha)
    # It stops at 1e-8 of the sum of squares, which leaves some more in the weights.
    check(found, theirs(jacobian))


@tasks_
def test_sdmgrad_and_modo(tasks):
    jacobian = jacobian_of(tasks)
    weighting = aggregation.SDMGradWeighting(lr=0.3)
    check(ours(gs.SDMGrad(lr=0.3), jacobian), weighting(jacobian @ jacobian.T) @ jacobian)
    weighting = aggregation.MoDoWeighting(gamma=0.01, rho=0.1)
    check(ours(gs.MoDo(lr=0.01, rho=0.1), jacobian), weighting(jacobian @ jacobian.T) @ jacobian)


def test_cr_mogm():
    theirs, rule = aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting(), alpha=0.8), gs.CRMOGM(gs.IMTLG(), alpha=0.8)
    state = rule.init(names(4), ["all"])
    for seed in range(4):
        jacobian = jacobian_of(4, seed)
        mixing, state = rule.mix(gram(jacobian), state)
        check(mixing[0].sum(0), theirs(jacobian @ jacobian.T))


def test_pcgrad_of_two_tasks():
    for seed in range(5):
        jacobian = jacobian_of(2, seed)
        check(ours(gs.PCGrad(), jacobian), aggregation.PCGrad()(jacobian))


@tasks_
def test_mgda(tasks):
    jacobian = jacobian_of(tasks)
    # Frank-Wolfe steps: nearer with more of them.
    found, theirs = ours(gs.MGDA(), jacobian), aggregation.MGDA(epsilon=1e-7, max_iters=3000)(jacobian)
    assert found.norm() <= theirs.norm() * (1 + 1e-12)
    check(found, theirs, 2e-2)


@tasks_
@pytest.mark.parametrize("c", [0.2, 0.8])
def test_cagrad(tasks, c):
    pytest.importorskip("cvxpy", reason="TorchJD's CAGrad needs torchjd[cagrad]")
    jacobian = jacobian_of(tasks)
    found, theirs = ours(gs.CAGrad(c=c), jacobian), aggregation.CAGrad(c=c, norm_eps=0.0)(jacobian)
    check(found, theirs, 1e-3)
    assert (jacobian @ found).min() >= (jacobian @ theirs).min() - 1e-8 * jacobian.norm() ** 2  # the gain that is maximised


@tasks_
@pytest.mark.filterwarnings("ignore")  # of the solver
def test_nash_mtl(tasks):
    pytest.importorskip("ecos", reason="TorchJD's Nash-MTL needs torchjd[nash_mtl]")
    pytest.importorskip("cvxpy")
    jacobian = jacobian_of(tasks)
    found = ours(gs.NashMTL(), jacobian)
    theirs = aggregation.NashMTL(n_tasks=tasks, max_norm=0.0, update_weights_every=1, optim_niter=100)(jacobian)
    # Its Gram matrix is divided by its norm, so that its weights are longer; and it stops at an error of 1e-3.
    check(found / found.norm(), theirs / theirs.norm(), 1e-2)


def test_krum_squares_distances():
    """As the paper does. TorchJD's distances are not squared, so that another task is the closest one here."""
    jacobian = torch.tensor([[0.0], [1.0], [2.2], [4.1], [4.2], [6.3], [9.9]], dtype=torch.float64)
    found = ours(gs.Krum(byzantine=1), jacobian)
    squares = (jacobian - jacobian.T).square().sort(dim=1).values[:, 1:5].sum(1)
    assert found == jacobian[squares.argmin()]
