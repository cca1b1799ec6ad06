"""The small problems behind the rules, solved for all surgery groups at once, on the device.

Gradients may be of very different lengths, so that most problems are put in terms of their directions: ``cosines`` is the
Gram matrix of unit vectors, ``[G, K, K]``, with ones on the diagonal (see :func:`directions`). Nothing is read back to the
host, except on the CPU, where looking costs nothing: there, solvers stop when they are done, and warn when they are not.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ENUMERATED = 5  # with so many tasks at most, all 2^K supports of a solution are tried at once
# Gram matrices may be from products in float32, whose rounding looks like directions of this squared length.
ROUNDING = 4 * torch.finfo(torch.float32).eps
UNSOLVED = "the gradients are nearly dependent, and the result is less exact"
_RIDGE = 1e-14  # added to squared lengths of 1, so that parallel gradients do not make a singular matrix


class Directions(NamedTuple):
    """Gram matrices as cosines and norms, in double precision where the device has it.

    Attributes:
        cosines: ``[G, K, K]``; a task without a direction has those of a unit vector that is orthogonal to all others.
        norms: ``[G, K]``, 1 for tasks without a direction.
        there: ``[G, K]``, which tasks have one: not those that are absent, zero, or not finite.
    """

    cosines: Tensor
    norms: Tensor
    there: Tensor


def directions(gram: Tensor, active: Tensor | None) -> Directions:
    """Cosines and norms of Gram matrices ``[G, K, K]``, given which tasks are active ``[G, K]``."""
    gram = precise(gram)
    square = gram.diagonal(dim1=-2, dim2=-1)
    there = (square > 0) & (square < torch.inf)
    if active is not None:
        there = there & active
    norms = torch.where(there, square, 1.0).sqrt()
    both = there[:, :, None] & there[:, None, :]
    cosines = torch.where(both, gram / norms[:, :, None] / norms[:, None, :], 0.0)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1)
    return Directions(cosines, norms, there)


def precise(gram: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return gram if gram.device.type == "mps" else gram.double()


def looks(tensor: Tensor) -> bool:
    """Whether values may be read: on the CPU, where that does not wait for anything."""
    return tensor.device.type == "cpu"


def warn(rule: str, problem: str, remedy: str) -> None:
    """Warns that a solver stopped early."""
    warnings.warn(f"{rule} {problem}: {remedy}.", RuntimeWarning, stacklevel=5)


# --- Complementarity: x >= 0 with C x + q >= 0, one of the two zero in each coordinate ----------------------------------


def complementary(cosines: Tensor, linear: Tensor, rule: str, tolerance: float = 1e-12) -> Tensor:
    """``argmin 1/2 x^T C x + q^T x`` subject to ``x >= 0``.

    Args:
        cosines: ``C``, ``[G, K, K]``.
        linear: ``q``, ``[G, R, K]``: ``R`` problems that share a matrix. ``-q`` has no part outside the range of ``C``.
        rule: named in warnings.
        tolerance: allowed for ``|min(x, C x + q)|``, in units of the largest ``|q|``.

    Returns:
        ``x``, ``[G, R, K]``. Not unique if ``C`` is singular; ``C x`` is.
    """
    if not cosines.shape[-1] or not linear.numel():
        return linear.clone()
    if linear.shape[-1] <= ENUMERATED:
        return _by_enumeration(cosines, linear)
    scale = linear.abs().amax(-1, keepdim=True)
    linear = linear / torch.where(scale > 0, scale, 1.0)
    if not looks(linear):
        return scale * _by_interior_points(cosines, linear, rule, tolerance)
    x = _by_splitting(cosines, linear, tolerance) if linear.shape[1] > 1 else (-linear).clamp(min=0)
    for method in (_by_pivoting, _by_interior_points):  # on what is not solved yet
        violated = ~(torch.minimum(x, torch.baddbmm(linear, x, cosines)).abs().amax(-1) <= tolerance)
        group, problem = violated.nonzero().unbind(1)
        if not len(group):
            break
        if method is _by_pivoting:
            x[group, problem] = _by_pivoting(cosines[group], linear[group, problem], x[group, problem], tolerance)
        else:
            rest = violated.any(-1).nonzero().squeeze(1)
            x[rest] = _by_interior_points(cosines[rest], linear[rest], rule, tolerance)
    return x.mul_(scale)


@lru_cache(maxsize=32)
def _supports(tasks: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All subsets of the tasks, as masks ``[S, K, 1]`` and as what a matrix is multiplied with ``[S, K, K]``."""
    bits = torch.arange(2**tasks).reshape(-1, 1).bitwise_right_shift(torch.arange(tasks)).bitwise_and(1)
    pairs = bits[:, :, None] * bits[:, None, :]
    pairs.diagonal(dim1=-2, dim2=-1).fill_(1)
    return bits[..., None].to(device, dtype), pairs.to(device, dtype)


def _by_enumeration(cosines: Tensor, linear: Tensor) -> Tensor:
    """For each support the solution that has it if there is one; of these the one that violates the conditions least."""
    masks, pairs = _supports(linear.shape[-1], cosines.dtype, cosines.device)
    right = linear.mT[:, None]  # [G, 1, K, R]
    x = torch.linalg.solve_ex(_ridged(cosines)[:, None] * pairs, right * -masks)[0].clamp_(min=0)  # [G, S, K, R]
    violation = torch.minimum(x, cosines[:, None] @ x + right).abs().amax(-2)  # [G, S, R]
    best = violation.nan_to_num_(torch.inf).argmin(1)
    found: Tensor = x.gather(1, best[:, None, None].expand(-1, 1, x.shape[2], -1))
    return found.squeeze(1).mT


def _by_splitting(cosines: Tensor, linear: Tensor, tolerance: float) -> Tensor:
    """Approximations, by the alternating direction method of multipliers (ADMM).

    Far quicker than Newton steps where many problems share a well-conditioned matrix, which is factored once. What it
    leaves unsolved is near enough for :func:`_by_pivoting`.
    """
    eye = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    largest = cosines.abs().sum(-1).amax(-1)
    smallest = torch.linalg.inv_ex(cosines + 1e-3 * eye)[0].abs().sum(-1).amax(-1).reciprocal()
    weight = (largest * smallest).sqrt()[:, None, None]  # of the distance between the two variables
    inverse = torch.linalg.inv_ex(cosines + weight * eye)[0]
    offset, step = torch.matmul(linear, inverse).neg_(), inverse.mul_(weight)
    x = offset.clamp(min=0)
    dual = torch.zeros_like(x)
    found = x
    before = torch.full_like(weight, torch.inf)
    going = torch.ones_like(weight, dtype=torch.bool)  # so that no group depends on how long another takes
    for _ in range(8):
        for _ in range(10):
            free = torch.baddbmm(offset, x - dual, step)
            dual.add_(free, alpha=1.6).sub_(x, alpha=0.6)  # over-relaxed
            x = dual.clamp(min=0)
            dual.sub_(x)
        found = torch.where(going, x, found)
        violation = torch.minimum(x, torch.baddbmm(linear, x, cosines)).abs().amax((-1, -2), keepdim=True)
        going = going & (violation > tolerance) & (violation < 0.1 * before)
        if not bool(going.any()):
            break
        before = violation
    return found


def _by_pivoting(cosines: Tensor, linear: Tensor, x: Tensor, tolerance: float, iterations: int = 10) -> Tensor:
    """Block principal pivoting (Júdice and Pires 1994) of ``[N, K, K]`` and ``[N, K]``, from an approximation ``x``.

    Mostly a few steps lead to the support of the solution, for any matrix that is not singular; they may also cycle.
    """
    support = x > cosines.new_tensor(1e-3) * x.amax(-1, keepdim=True)
    eye = (1 + _RIDGE) * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        inside = support.to(x.dtype)
        factor = torch.linalg.cholesky_ex(torch.where(support[:, :, None] & support[:, None, :], cosines, eye))[0]
        x = -torch.cholesky_solve((linear * inside)[..., None], factor)
        slack = torch.baddbmm(linear[..., None], cosines, x).squeeze(-1)
        x = x.squeeze(-1)
        wrong = torch.where(support, x, slack) < -tolerance
        if not bool(wrong.any()):
            break
        support = support ^ wrong
    return x.clamp(min=0)


def _by_interior_points(cosines: Tensor, linear: Tensor, rule: str, tolerance: float, iterations: int = 60) -> Tensor:
    """Mehrotra's predictor-corrector method, for any matrix."""
    groups, many, tasks = linear.shape
    matrix = _ridged(cosines)[:, None].expand(-1, many, -1, -1).reshape(-1, tasks, tasks)
    linear = linear.reshape(-1, tasks)
    x = torch.ones_like(linear)
    y = torch.ones_like(linear)
    for _ in range(iterations):
        outside = (matrix @ x[..., None]).squeeze(-1) + linear - y
        gap = (x * y).mean(-1, keepdim=True)
        error = torch.maximum(torch.minimum(x, y).amax(-1, keepdim=True), outside.abs().amax(-1, keepdim=True))
        if looks(x) and not bool((error > tolerance).any()):
            break
        newton = _Newton(matrix, x, y, outside)
        dx, dy = newton.step(torch.zeros_like(x))
        length = _longest(x, dx, y, dy)
        ahead = ((x + length * dx) * (y + length * dy)).mean(-1, keepdim=True)
        dx, dy = newton.step((ahead / gap) ** 3 * gap - dx * dy)
        length = 0.995 * _longest(x, dx, y, dy)
        fine = (dx.isfinite() & dy.isfinite()).all(-1, keepdim=True) & (error > tolerance)
        x, y = torch.where(fine, x + length * dx, x), torch.where(fine, y + length * dy, y)
    else:
        if looks(x) and bool((error > 1e6 * tolerance).any()):
            warn(rule, f"stopped after {iterations} iterations with an error of {float(error.max()):.1e}", UNSOLVED)
    return x.reshape(groups, many, tasks)


class _Newton:
    """Newton steps for ``C x + q - y = 0`` (so far: ``outside``) and ``x y = aim``."""

    def __init__(self, matrix: Tensor, x: Tensor, y: Tensor, outside: Tensor) -> None:
        self._x, self._y, self._outside = x, y, outside
        self._factors = torch.linalg.lu_factor_ex(matrix + torch.diag_embed(y / x))[:2]

    def step(self, aim: Tensor) -> tuple[Tensor, Tensor]:
        """``dx`` and ``dy``."""
        right = aim / self._x - self._y
        dx = torch.linalg.lu_solve(*self._factors, (right - self._outside)[..., None]).squeeze(-1)
        return dx, right - self._y / self._x * dx


def _longest(x: Tensor, dx: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The largest step, at most 1, that keeps both from becoming negative."""
    limits = (torch.where(d < 0, -v / d, 1.0).amin(-1, keepdim=True) for v, d in ((x, dx), (y, dy)))
    return torch.minimum(*limits).clamp_max(1)


def _ridged(cosines: Tensor) -> Tensor:
    result = cosines.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    return result


# --- The simplex: w >= 0 with sum w = 1 ---------------------------------------------------------------------------------


def on_simplex(gram: Tensor, there: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, Tensor]:
    """``argmin 1/2 w^T G w`` over the simplex, by a primal-dual interior-point method.

    With multipliers ``z >= 0`` of ``w >= 0``, the solution has ``G w - l = z`` for some number ``l``, and ``w z = 0``.
    From a point inside we take Newton steps on these equations, and let ``w z`` go to zero.

    Args:
        gram: ``[G, K, K]``, of which the largest element is about 1; rows and columns of absent tasks are zero.
        there: ``[G, K]``, which tasks take part. The others' weights are 1.
        tolerance: for the duality gap.
        iterations: at most so many.

    Returns:
        The weights ``w``, ``[G, K]``, and the duality gaps, ``[G, 1]``.
    """
    absent, inside = ~there, there.to(gram.dtype)
    count = inside.sum(-1, keepdim=True).clamp_min(1)
    # An absent task has w = z = 1, which no step changes and no sum counts.
    w = torch.where(absent, 1.0, 1 / count)
    slope = (gram @ (w * inside)[..., None]).squeeze(-1)
    z = torch.where(absent, 1.0, slope - slope.masked_fill(absent, torch.inf).amin(-1, keepdim=True) + 1)
    for _ in range(iterations):
        gap = (w * z * inside).sum(-1, keepdim=True)
        unfinished = gap > tolerance
        if looks(gram) and not bool(unfinished.any()):
            break
        newton = _SimplexNewton(gram, w, z, inside)
        # Where a step would lead that aims at w z = 0 at once tells how far to aim (Mehrotra).
        dw, dz = newton.step(torch.zeros_like(w))
        length = _longest(w, dw, z, dz)
        ahead = ((w + length * dw) * (z + length * dz) * inside).sum(-1, keepdim=True)
        dw, dz = newton.step((ahead / gap) ** 3 * gap / count - dw * dz)
        length = torch.where(unfinished, 0.995 * _longest(w, dw, z, dz), 0.0)
        fine = (dw.isfinite() & dz.isfinite()).all(-1, keepdim=True)  # else precision is exhausted: stay
        w, z = torch.where(fine, w + length * dw, w), torch.where(fine, z + length * dz, z)
    return w, (w * z * inside).sum(-1, keepdim=True)


class _SimplexNewton:
    """Newton steps from one point: ``G dw - dl = dz``, ``w dz + z dw = aim - w z`` and ``sum dw = 0``."""

    def __init__(self, gram: Tensor, w: Tensor, z: Tensor, there: Tensor) -> None:
        self._w, self._z, self._there = w, z, there
        self._factors = torch.linalg.lu_factor_ex(gram + torch.diag_embed(z / w))[:2]
        self._ones = self._solved(there)
        self._sum = self._ones.sum(-1, keepdim=True)

    def step(self, aim: Tensor) -> tuple[Tensor, Tensor]:
        """``dw`` and ``dz``, all ``[G, K]``."""
        right = (aim / self._w - self._z) * self._there
        free = self._solved(right)
        dw = free - free.sum(-1, keepdim=True) / self._sum * self._ones
        return dw, right - self._z / self._w * dw

    def _solved(self, right: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(*self._factors, right[..., None])
        return solution.squeeze(-1)


def shortest_by_enumeration(gram: Tensor, there: Tensor) -> Tensor:
    """As :func:`on_simplex`, for a few tasks: for each support the solution that has it; of these the one of least gap.

    A negative weight is made zero before the gap is measured. So what a support without a solution leads to can do no harm.
    """
    square = torch.where(there, gram.diagonal(dim1=-2, dim2=-1), 1.0).clamp_min(1e-60)  # of a largest of 1
    inverse = square.rsqrt()
    cosines = gram * inverse[:, :, None] * inverse[:, None, :]
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1 + _RIDGE)
    masks, pairs = _supports(gram.shape[-1], gram.dtype, gram.device)
    inverse = (inverse * there)[:, None, :, None]
    x = torch.linalg.solve_ex(cosines[:, None] * pairs, inverse * masks)[0]
    w = (x * inverse).clamp_(min=0).squeeze(-1)
    w = w / w.sum(-1, keepdim=True)  # [G, S, K]
    slope = w @ gram
    least = torch.where(there[:, None], slope, torch.inf).amin(-1)
    best = ((w * slope).sum(-1) - least).nan_to_num_(torch.inf).argmin(1)
    found: Tensor = w.gather(1, best[:, None, None].expand(-1, 1, w.shape[-1]))
    return found.squeeze(1)


# --- Balance: C w = t w^-p ----------------------------------------------------------------------------------------------


def balanced(cosines: Tensor, target: Tensor, power: float, rule: str) -> Tensor:
    """The positive solution of ``C w = t w^-p``, the minimum of ``1/2 w^T C w - sum_i t_i u(w_i)`` with ``u' = w^-p``.

    Without one, because some positive ``w`` has ``C w = 0``, a direction near it: what there is for ``C + 1e-6 I``.

    Args:
        cosines: ``C``, ``[G, K, K]``.
        target: ``log t``, ``[G, K]``.
        power: ``p > 0``.
        rule: named in warnings.

    Returns:
        ``w``, ``[G, K]``.
    """
    if not target.numel():
        return target
    # If t is multiplied by e^s, w is by e^(s / (1 + p)): let the largest t be 1.
    shift = target.amax(-1, keepdim=True)
    target = target - shift
    w, error = _balanced(cosines, target, power, 1e-12)
    # Where it is what was added to C that makes a solution, it had better not be a huge one.
    made = 1e-12 * (w ** (1 + power) / target.exp()).amax(-1, keepdim=True)  # the largest part of C w that is not from C
    failed = ~((error < 1e-8) & (made < 1e-4))
    if not looks(w):
        w = torch.where(failed, _balanced(cosines, target, power, 1e-6)[0], w)
    elif bool(failed.any()):
        index = failed.nonzero()[:, 0]
        w[index], error = _balanced(cosines[index], target[index], power, 1e-6)
        if not bool((error < 1e-4).all()) and bool(cosines.isfinite().all()):
            warn(rule, f"stopped with a relative error of {float(error.max()):.1e}", UNSOLVED)
    return w * (shift / (1 + power)).exp()


def _balanced(cosines: Tensor, target: Tensor, power: float, ridge: float, iterations: int = 80) -> tuple[Tensor, Tensor]:
    """``w`` and how far it is from a solution ``[G, 1]``, by primal-dual Newton steps.

    They are for ``C w = z`` and ``p log w + log z = log t``, the second of which is approached by a factor at a time.
    """
    matrix = cosines + ridge * torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    size = cosines.abs()
    z = w = torch.ones_like(target)
    for _ in range(iterations):
        outside = (matrix @ w[..., None]).squeeze(-1) - z
        off = target - power * w.log() - z.log()
        error = torch.maximum(outside.abs() / (size @ w[..., None]).squeeze(-1), off.abs()).amax(-1, keepdim=True)
        unfinished = error > 1e-13
        if looks(w) and not bool(unfinished.any()):
            break
        off, slope = z * off.clamp(-2, 2), power * z / w
        dw = torch.linalg.solve_ex(matrix + torch.diag_embed(slope), off - outside)[0]
        dz = off - slope * dw
        limit = torch.minimum(*(torch.where(d < 0, -v / d, 2.0).amin(-1, keepdim=True) for v, d in ((w, dw), (z, dz))))
        length = (0.9 * limit).clamp_max(1)
        fine = (dw.isfinite() & dz.isfinite()).all(-1, keepdim=True) & unfinished
        w, z = torch.where(fine, w + length * dw, w), torch.where(fine, z + length * dz, z)
    return w, error


# --- Least squares: C x = b ---------------------------------------------------------------------------------------------


def least_squares(cosines: Tensor, right: Tensor) -> Tensor:
    """The shortest of the ``x`` ``[G, K]`` for which ``C x`` is nearest to ``b`` ``[G, K]``.

    Directions that are rounding (:data:`ROUNDING`) count as zero.
    """
    if not looks(cosines):
        return _by_eigenvectors(cosines, right)
    factor, info = torch.linalg.cholesky_ex(cosines)
    x = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
    # The smallest pivot is at least the smallest eigenvalue. It may be far above it, which leaves x large.
    pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1)
    size = x.abs().amax(-1)
    doubtful = (info != 0) | ~(pivot > 1e-2) | ~(size < 1e3 * right.abs().amax(-1).clamp_min(1e-300))
    if bool(doubtful.any()):
        index = doubtful.nonzero()[:, 0]
        x[index] = _by_eigenvectors(cosines[index], right[index])
    return x


def _by_eigenvectors(cosines: Tensor, right: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cosines.nan_to_num(0.0))
    kept = values > ROUNDING * values[:, -1:]
    parts = torch.where(kept, (vectors.mT @ right[..., None]).squeeze(-1) / torch.where(kept, values, 1.0), 0.0)
    x: Tensor = vectors @ parts[..., None]
    return x.squeeze(-1)
