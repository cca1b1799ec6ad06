"""The small problems behind the rules: each solver by itself, and by the conditions that define its solution."""

from itertools import combinations

import numpy as np
import pytest
import torch

from gradsurgery.rules import _complementarity, _shortest, _solvers
from gradsurgery.rules._complementarity import by_pivoting, complementary, longest, supports
from gradsurgery.rules._shortest import on_simplex, shortest, shortest_by_enumeration
from gradsurgery.rules._simplex_steps import conditional, projected
from gradsurgery.rules._solvers import balanced, directions, least_squares

INF, NAN = float("inf"), float("nan")
EXACT = 1e-12


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def grams(tasks, dimensions, groups=3, seed=0):
    """``[G, K, K]``, of random gradients; the fewer dimensions, the nearer to dependent."""
    rows = torch.randn(groups, tasks, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.mT / dimensions


def cosines(tasks, dimensions, groups=3, seed=0):
    return directions(grams(tasks, dimensions, groups, seed), None).cosines


def numbers(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_interior_points(monkeypatch):
    """They are for what the quicker ways leave over."""

    def fail(*_):
        pytest.fail("a problem that is not hard was left to interior points")

    monkeypatch.setattr(_complementarity, "_by_interior_points", fail)
    monkeypatch.setattr(_shortest, "on_simplex", fail)


@pytest.fixture
def elsewhere(monkeypatch):
    """As on another device than the CPU, where solvers may not look at values."""
    for module in (_complementarity, _shortest, _solvers):
        monkeypatch.setattr(module, "looks", lambda _: False)


# --- Directions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [None, [[True, False, True], [True, True, True]]])
@pytest.mark.parametrize("length", [1.0, 0.0, INF, NAN])
def test_directions(length, active):
    gram, active = grams(3, 4, groups=2), None if active is None else torch.tensor(active)
    gram[1, 0, 0] = gram[1, 0, 0] * length
    found = directions(gram, active)
    for g in range(2):
        for i in range(3):
            there = 0 < gram[g, i, i] < INF and (active is None or bool(active[g, i]))
            assert found.there[g, i] == there
            for j in range(3):
                other = 0 < gram[g, j, j] < INF and (active is None or bool(active[g, j]))
                expected = gram[g, i, j] / (gram[g, i, i] * gram[g, j, j]).sqrt() if there and other else tensor(0.0)
                torch.testing.assert_close(found.cosines[g, i, j], expected if i != j else tensor(1.0))
            if there:
                torch.testing.assert_close(found.norms[g, i], gram[g, i, i].sqrt())
            elif not 0 < gram[g, i, i] < INF:
                assert found.norms[g, i] == 1


def test_solvers_compute_in_double_precision():
    found = directions(grams(3, 4).float(), None)
    assert found.cosines.dtype == found.norms.dtype == torch.float64


# --- Complementarity --------------------------------------------------------------------------------------------------


def check_complementary(matrix, linear, x, tolerance=EXACT):
    """``x >= 0``, ``C x + q >= 0``, one of the two zero; ``[G, R, K]``, in units of the largest ``|q|``."""
    assert (x >= 0).all()
    size = linear.abs().amax(-1, keepdim=True)
    assert (torch.minimum(x, x @ matrix + linear).abs() <= tolerance * size).all()


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_supports(tasks):
    masks, pairs = supports(tasks, torch.float64, torch.device("cpu"))
    found = {tuple(k for k in range(tasks) if mask[k]) for mask in masks}
    assert found == {subset for size in range(tasks + 1) for subset in combinations(range(tasks), size)}
    for mask, pair in zip(masks, pairs, strict=True):
        torch.testing.assert_close(pair - torch.diag(pair.diag()), mask * mask.mT * (1 - torch.eye(tasks).double()))
        assert (pair.diag() > 1).all()
        torch.testing.assert_close(pair.diag(), torch.ones(tasks).double(), rtol=0, atol=1e-13)


SIZES = torch.tensor([1.0, 1e-4, 1e5]).double()[:, None, None]  # of the problems of three groups


@pytest.mark.parametrize("tasks", [1, 2, 4, 5])
@pytest.mark.parametrize("many", [1, 3])
def test_by_enumeration(tasks, many):
    matrix, linear = cosines(tasks, tasks + 2), numbers(3, many, tasks) * SIZES
    check_complementary(matrix, linear, complementary(matrix, linear, "it"), 1e-10)


@pytest.mark.parametrize("tasks", [6, 9, 16])
@pytest.mark.parametrize("start", [None, 0.0, 1.0])
def test_one_problem_per_matrix(tasks, start, no_interior_points):
    matrix, linear = cosines(tasks, 3 * tasks), numbers(3, 1, tasks) * SIZES
    start = None if start is None else torch.full_like(linear, start)
    check_complementary(matrix, linear, complementary(matrix, linear, "it", start=start))


@pytest.mark.parametrize("tasks", [6, 9, 16])
def test_many_problems_per_matrix(tasks, no_interior_points):
    for linear in (cosines(tasks, 3 * tasks), numbers(3, 4, tasks) * SIZES):
        matrix = cosines(tasks, 3 * tasks)
        check_complementary(matrix, linear, complementary(matrix, linear, "it"))


@pytest.mark.parametrize("tasks", [6, 16])
def test_by_reflections(tasks):
    matrix, linear = cosines(tasks, 3 * tasks), numbers(3, 5, tasks) * SIZES
    allowed = EXACT * linear.abs().amax(-1, keepdim=True)
    check_complementary(matrix, linear, _complementarity._by_reflections(matrix, linear, allowed))


def test_no_group_of_reflections_depends_on_how_long_another_takes():
    matrix = torch.cat([cosines(8, dimensions, groups=1) for dimensions in (12, 10_000, 16, 40)])
    matrix[1] = torch.eye(8)
    linear = numbers(4, 5, 8)
    linear[2, 1] = 0
    allowed = EXACT * linear.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    found = _complementarity._by_reflections(matrix, linear, allowed)
    assert (found[2, 1] == 0).all()
    for g in range(4):
        one = slice(g, g + 1)
        alone = _complementarity._by_reflections(matrix[one], linear[one], allowed[one])
        torch.testing.assert_close(found[one], alone, rtol=0, atol=1e-13)
    check_complementary(matrix[1:], linear[1:], found[1:])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_reflections_around_a_point(steps):
    offset, turn, around = numbers(3, 4, 6), numbers(3, 6, 6, seed=2) / 6, numbers(3, 4, 6, seed=3)
    whole = [around]
    for _ in range(steps + 1):
        whole.append(whole[-1].abs() @ turn + offset)
    found = _complementarity._reflected(whole[1] - around, turn, steps, around=around)
    torch.testing.assert_close(found, whole[-1] - around)
    plain = offset
    for _ in range(steps):
        plain = plain.abs() @ turn + offset
    torch.testing.assert_close(_complementarity._reflected(offset, turn, steps), plain)


def test_ends_of_the_spectrum():
    matrix = torch.cat([cosines(12, dimensions) for dimensions in (14, 18, 60)])
    values = torch.linalg.eigvalsh(matrix)
    smallest, largest = (end.flatten() for end in _complementarity._ends_of_spectrum(matrix))
    assert (values[:, 0] <= smallest).all()
    assert (smallest < 2 * values[:, 0]).all()
    assert (largest <= values[:, -1]).all()
    assert (largest > 0.7 * values[:, -1]).all()
    strange = torch.stack([torch.eye(12), 100 * torch.eye(12), 1e-6 * torch.eye(12), torch.full((12, 12), NAN)]).double()
    smallest, largest = (end.flatten() for end in _complementarity._ends_of_spectrum(strange))
    torch.testing.assert_close(smallest, tensor([1.0, 1.0, 1e-3, 1e-3]))
    torch.testing.assert_close(largest, tensor([1.0, 100.0, 1e-6, NAN]), equal_nan=True)


@pytest.mark.parametrize("tasks", [6, 16])
def test_by_pivoting(tasks):
    matrix, linear = cosines(tasks, 2 * tasks, groups=20), numbers(20, tasks)
    allowed = EXACT * linear.abs().amax(-1, keepdim=True)
    x = by_pivoting(matrix, linear, linear < 0, allowed, iterations=4)
    check_complementary(matrix, linear[:, None], x[:, None])
    torch.testing.assert_close(by_pivoting(matrix, linear, x > 0, allowed, iterations=1), x)  # from where it is


@pytest.mark.parametrize("tasks", [1, 4, 12])
@pytest.mark.parametrize("rank", [0.5, 2])
@pytest.mark.parametrize("many", [1, 3])
def test_by_interior_points(tasks, rank, many):
    matrix = cosines(tasks, max(int(rank * tasks), 1))
    linear = (numbers(3, many, tasks) @ matrix) * SIZES
    x = _complementarity._by_interior_points(matrix, linear, "it", EXACT, iterations=14)
    check_complementary(matrix, linear, x, 1e-11)


@pytest.mark.parametrize("many", [1, 4])
def test_complementarity_without_a_look(many, elsewhere):
    matrix, linear = cosines(8, 16), numbers(3, many, 8) * SIZES
    linear[1, 0] = 0
    check_complementary(matrix, linear, complementary(matrix, linear, "it"), 1e-11)


def test_problems_of_zeros():
    for many in (1, 4):
        linear = numbers(3, many, 8)
        linear[1, 0] = 0
        found = complementary(cosines(8, 16), linear, "it")
        assert (found[1, 0] == 0).all()
        check_complementary(cosines(8, 16), linear, found)


def test_lifted():
    matrix = cosines(6, 12)
    for positive in (matrix, cosines(6, 3)):
        assert _complementarity.lifted(positive) is positive
    wrong = matrix.clone()
    values, vectors = torch.linalg.eigh(matrix[1])
    values[0] = -1e-6
    wrong[1] = vectors * values @ vectors.mT
    found = _complementarity.lifted(wrong)
    assert torch.equal(found[[0, 2]], matrix[[0, 2]])
    torch.testing.assert_close(found[1], wrong[1] + 4e-6 * torch.eye(6).double(), rtol=0, atol=1e-12)


def test_hard_problems_among_others():
    matrix = cosines(8, 16)
    matrix[1] = cosines(8, 3, groups=1)[0]  # singular
    for linear in (matrix, numbers(3, 1, 8) @ matrix):
        check_complementary(matrix, linear, complementary(matrix, linear, "it"), 1e-9)


@pytest.mark.parametrize("many", [1, 8])
def test_what_is_not_finite_stays_in_its_group(many):
    matrix, linear = cosines(8, 16), numbers(3, many, 8)
    expected = complementary(matrix, linear, "it")
    matrix[1, 2, 3] = matrix[1, 3, 2] = NAN
    torch.testing.assert_close(complementary(matrix, linear, "it")[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 1, 7), (2, 0, 7), (2, 0, 0), (2, 1, 0)])
def test_no_problem(shape):
    groups, _, tasks = shape
    assert complementary(torch.zeros(groups, tasks, tasks), torch.zeros(shape), "it").shape == shape


def test_how_far_a_step_may_go():
    one = torch.ones(1, 2).double()
    for x, dx, y, dy, expected in [
        ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0], 1.0),
        ([1.0, 1.0], [-0.5, 1.0], [1.0, 1.0], [0.0, 1.0], 1.0),
        ([1.0, 1.0], [-4.0, -2.0], [1.0, 1.0], [0.0, -3.0], 0.25),
        ([1.0, 3.0], [-1.0, -2.0], [1.0, 2.0], [0.0, -5.0], 0.4),
        ([4.0, 4.0], [-1.0, -2.0], [4.0, 9.0], [-3.0, -2.0], 1.0),
    ]:
        assert longest(tensor([x]) * one, tensor([dx]), tensor([y]), tensor([dy])).tolist() == [[expected]]


def test_no_interior_point_depends_on_how_long_another_takes():
    easy, hard = cosines(7, 60, groups=1), cosines(7, 3, groups=1)
    results, there = [], torch.ones(2, 7, dtype=torch.bool)
    for second, spread in ((easy, 1.0), (hard, 0.1)):
        linear = torch.stack([numbers(2, 7), numbers(2, 7) * spread ** torch.arange(7)])
        found = _complementarity._by_interior_points(torch.cat([easy, easy]), linear, "it", EXACT)
        results.append((found[0], *(part[0] for part in on_simplex(torch.cat([easy, second]), there, EXACT, 30))))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_newton_steps_solve_their_equations():
    matrix, x, y, outside, aim = grams(4, 6), *(numbers(3, 4, seed=seed) for seed in range(4))
    x, y = x.abs() + 0.1, y.abs() + 0.1
    dx, dy = _complementarity._Newton(matrix, x, y, outside).step(aim)
    torch.testing.assert_close((matrix @ dx[..., None]).squeeze(-1) - dy, -outside)
    torch.testing.assert_close(x * dy + y * dx, aim - x * y)


# --- The shortest vector in a convex hull -----------------------------------------------------------------------------


def check_shortest(gram, there, weights, tolerance=EXACT):
    """Weights on the simplex, with a duality gap of zero; ``[G, K]``."""
    for matrix, here, w in zip(gram, there, weights, strict=True):
        matrix, w = matrix[here][:, here], w[here]
        assert (w >= 0).all()
        assert abs(w.sum() - 1) <= 1e-9
        assert w @ matrix @ w - (matrix @ w).min() <= tolerance * matrix.diagonal().max()


def masked(gram, there):
    return torch.where(there[:, :, None] & there[:, None, :], gram, 0.0)


def some(groups, tasks):
    """All tasks, or some of them."""
    everywhere = torch.ones(groups, tasks, dtype=torch.bool)
    partly = torch.rand(groups, tasks, generator=torch.Generator().manual_seed(3)) < 0.6
    partly[:, 0] = True
    return everywhere, partly


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_shortest_by_enumeration(tasks, rank):
    for there in some(6, tasks):
        gram = masked(grams(tasks, rank, groups=6), there)
        gram = gram / gram.amax((-1, -2), keepdim=True)
        check_shortest(gram, there, shortest_by_enumeration(gram, there), 1e-11)


@pytest.mark.parametrize("tasks", [1, 2, 6, 16])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_shortest_by_interior_points(tasks, rank):
    for there in some(6, tasks):
        gram = masked(grams(tasks, rank, groups=6), there)
        gram = gram / gram.amax((-1, -2), keepdim=True)
        weights, gap = on_simplex(gram, there, EXACT, 13)
        check_shortest(gram, there, weights, 10 * EXACT)
        assert (gap <= EXACT).all()
        assert (weights[~there] == 1).all()


@pytest.mark.parametrize("tasks", [2, 6, 16])
def test_shortest_by_pivoting(tasks, no_interior_points):
    for there in some(6, tasks):
        gram = masked(grams(tasks, 3 * tasks, groups=6), there)
        lengths = torch.linspace(0.2, 1, tasks).double()
        gram = gram / gram.amax((-1, -2), keepdim=True) * lengths[:, None] * lengths
        weights, gap = shortest(gram, there, EXACT, 15)
        check_shortest(gram, there, weights)
        assert (gap <= EXACT).all()
        assert (weights[~there] == 1).all()


def test_shortest_where_some_groups_are_hard():
    gram = grams(8, 24, groups=4)
    gram[2] = grams(8, 3, groups=1)[0]
    gram = gram / gram.amax((-1, -2), keepdim=True)
    there = torch.ones(4, 8, dtype=torch.bool)
    weights, gap = shortest(gram, there, EXACT, 20)
    check_shortest(gram, there, weights)
    assert gap.shape == (4, 1)
    assert (gap <= EXACT).all()


def test_shortest_without_a_look(elsewhere):
    gram, there = grams(8, 24, groups=4), torch.ones(4, 8, dtype=torch.bool)
    gram[2] = grams(8, 3, groups=1)[0]
    there[1, 3] = False
    gram = masked(gram / gram.amax((-1, -2), keepdim=True), there)
    weights, gap = shortest(gram, there, EXACT, 20)
    check_shortest(gram, there, weights, 2 * EXACT)
    assert (gap <= EXACT).all()


def test_newton_steps_on_the_simplex_solve_their_equations():
    w, z, aim = (numbers(3, 4, seed=seed).abs() + 0.1 for seed in range(3))
    there = torch.ones(3, 4, dtype=torch.bool)
    there[1, 2] = False
    gram = masked(grams(4, 6), there)
    dw, dz = _shortest._SimplexNewton(gram, w, z, there.double()).step(aim)
    torch.testing.assert_close((dw * there).sum(-1), torch.zeros(3).double())
    torch.testing.assert_close((w * dz + z * dw)[there], (aim - w * z)[there])
    lengths = (gram @ dw[..., None]).squeeze(-1) - dz  # the same number for all that are there
    for group, here in zip(lengths, there, strict=True):
        torch.testing.assert_close(group[here], group[here][:1].expand(int(here.sum())))
    assert dw[1, 2] == dz[1, 2] == 0


# --- Balance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_balance(power, spread, shift):
    matrix, target = cosines(5, 8), spread * numbers(3, 5) + shift
    w = balanced(matrix, target, power, "it")
    assert (w > 0).all()
    found = (matrix @ w[..., None]).squeeze(-1).log() + power * w.log()
    torch.testing.assert_close(found, target, rtol=0, atol=1e-7)


def test_balance_takes_few_steps(monkeypatch):
    monkeypatch.setattr(_solvers, "_NEWTON_STEPS", 9)
    matrix, target = cosines(5, 8), numbers(3, 5)
    w, error = _solvers._balanced(matrix, target, 1.0, 0.0)
    assert (error <= EXACT).all()
    torch.testing.assert_close(w * (matrix @ w[..., None]).squeeze(-1), target.exp())


def test_balance_where_whole_steps_go_round_in_circles(monkeypatch):
    rows = numbers(64, 8, 4, seed=0)
    rows[..., 0] = 0.3 * rows[..., 0].abs() + 0.01  # a direction that helps all, so that there is a solution
    matrix, target = directions(rows @ rows.mT, None).cosines, torch.zeros(64, 8).double()
    w, error = _solvers._balanced(matrix, target, 0.003, 0.0)
    assert (error <= EXACT).all()
    products, there = (matrix @ w[..., None]).squeeze(-1), w > 1e-300  # of the others, w is too small for a number
    torch.testing.assert_close(products[there], w[there] ** -0.003, rtol=1e-9, atol=0)
    monkeypatch.setattr(_solvers, "_WHOLE_STEPS", INF)
    assert (_solvers._balanced(matrix, target, 0.003, 0.0)[1] > 1e-6).any()


def test_no_balance_depends_on_how_long_another_takes():
    easy, hard = cosines(5, 40, groups=1), cosines(5, 5, groups=1)
    target = numbers(1, 5).expand(2, 5)
    first, other = (_solvers._balanced(torch.cat([easy, second]), target, 0.1, 0.0)[0] for second in (easy, hard))
    assert torch.equal(first[0], other[0])


@pytest.mark.parametrize("power", [0.1, 1.0, 3.0])
def test_balance_by_steps_of_which_each_helps(power, monkeypatch):
    monkeypatch.setattr(_solvers, "_WHOLE_STEPS", 0)
    monkeypatch.setattr(_solvers, "_NEWTON_STEPS", 9)
    w, error = _solvers._balanced(cosines(5, 8), 3 * numbers(3, 5), power, 0.0)
    assert (error <= EXACT).all()
    torch.testing.assert_close(w, balanced(cosines(5, 8), 3 * numbers(3, 5), power, "it"))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_balance_without_a_look(power, monkeypatch):
    matrix, target = cosines(4, 6), numbers(3, 4)
    matrix[1] = tensor([[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    expected = balanced(matrix, target, power, "it")
    monkeypatch.setattr(_solvers, "looks", lambda _: False)
    torch.testing.assert_close(balanced(matrix, target, power, "it"), expected)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_balance_that_does_not_exist_is_near_it(power):
    matrix = cosines(2, 4)
    matrix[1] = tensor([[1.0, -1.0], [-1.0, 1.0]])
    w = balanced(matrix, torch.zeros(3, 2).double(), power, "it")
    torch.testing.assert_close(w[1], torch.full((2,), 1e6 ** (1 / (1 + power))).double(), rtol=1e-6, atol=0)
    for g in (0, 2):
        torch.testing.assert_close(matrix[g] @ w[g], w[g] ** -power)
    assert balanced(torch.zeros(0, 2, 2), torch.zeros(0, 2), power, "it").shape == (0, 2)


# --- Least squares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_least_squares(tasks):
    matrix, right = cosines(tasks, 2 * tasks, groups=5), numbers(5, tasks).abs()
    matrix[1] = cosines(tasks, max(tasks // 2, 1), groups=1)[0]
    matrix[3] = torch.ones(tasks, tasks)  # all parallel
    found = least_squares(matrix, right)
    torch.testing.assert_close(found, _solvers._by_eigenvectors(matrix, right))
    for g in range(5):
        expected = np.linalg.pinv(matrix[g].numpy(), rcond=1e-6, hermitian=True) @ right[g].numpy()
        np.testing.assert_allclose(found[g].numpy(), expected, rtol=1e-8, atol=1e-9)


def test_least_squares_of_what_is_dependent_but_for_rounding():
    ones = torch.ones(3, 10, 10).double()
    matrix, right = ones - 1e-6 * (ones - torch.eye(10)), torch.arange(1.0, 11).expand(3, 10).double()
    torch.testing.assert_close(least_squares(matrix, right), 0.55 * ones[0, :3], rtol=0, atol=1e-6)
    # Here Cholesky's factors tell little, either because what follows is not large,
    matrix = tensor([[[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]]])
    torch.testing.assert_close(least_squares(matrix, tensor([[1.0, 1 + 3e-10]])), tensor([[0.5, 0.5]]))
    # or because all pivots are (Kahan 1966).
    powers = 0.1 ** (torch.arange(30).double() / 29)
    factor = powers[:, None] * (torch.eye(30) - (1 - powers[1] ** 2).sqrt() * torch.ones(30, 30).double().triu(1))
    matrix, right = (factor.mT @ factor)[None], numbers(1, 30).abs()
    for size in (1.0, 1e-6):
        found = least_squares(matrix, size * right)
        torch.testing.assert_close(found, size * _solvers._by_eigenvectors(matrix, right), rtol=1e-6, atol=0)


def test_least_squares_where_only_rounding_is_left():
    matrix = tensor([[[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]]).expand(2, 3, 3)
    found = least_squares(matrix, tensor([[1.0, 1.0, 1.0], [1 + 3e-5, 1.0, 1.0]]))
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], tensor([4e-5 / 3, -2e-5 / 3, -2e-5 / 3]))


def test_least_squares_without_a_look(elsewhere):
    matrix, right = cosines(6, 12), numbers(3, 6).abs()
    torch.testing.assert_close((matrix @ least_squares(matrix, right)[..., None]).squeeze(-1), right)


# --- Weights on the simplex -------------------------------------------------------------------------------------------


def nearest_on_simplex(point):
    """By a look at every face."""
    best = None
    for size in range(1, len(point) + 1):
        for face in map(list, combinations(range(len(point)), size)):
            candidate = np.zeros(len(point))
            candidate[face] = point[face] + (1 - point[face].sum()) / size
            if (candidate >= 0).all() and (best is None or np.sum((candidate - point) ** 2) < np.sum((best - point) ** 2)):
                best = candidate
    return best


@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_projection_onto_the_simplex(tasks, size):
    point = size * numbers(8, tasks) + 100
    for active in some(8, tasks):
        found = projected(point, active)
        for g in range(8):
            here = active[g].numpy()
            np.testing.assert_allclose(found[g].numpy()[here], nearest_on_simplex(point[g].numpy()[here]), atol=1e-12)
            assert (found[g].numpy()[~here] == 0).all()


def test_projection_of_nobody():
    assert projected(numbers(2, 3), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert projected(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_conditional_weights():
    weights = tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    active = torch.tensor([[True, True, True], [True, True, False], [True, True, False], [False, False, False]])
    found, total = conditional(weights, active)
    torch.testing.assert_close(found, tensor([[0.2, 0.3, 0.5], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(total, tensor([[1.0], [0.5], [0.0], [0.0]]))
