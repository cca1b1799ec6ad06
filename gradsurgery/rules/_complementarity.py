"""Complementarity, for all surgery groups at once: ``x >= 0`` with ``C x + q >= 0``, one of the two zero everywhere."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._solvers import ENUMERATED, UNSOLVED, looks, warn

_RIDGE = 1e-14  # added to squared lengths of 1
_FIRST, _THEN = 18, 12  # steps in single precision


def complementary(
    cosines: Tensor, linear: Tensor, rule: str, tolerance: float = 1e-12, start: Tensor | None = None
) -> Tensor:
    """``argmin 1/2 x^T C x + q^T x`` subject to ``x >= 0``.

    Args:
        cosines: ``C``, ``[G, K, K]``.
        linear: ``q``, ``[G, R, K]``: ``R`` problems that share a matrix. ``-q`` has no part outside the range of ``C``.
        rule: named in warnings.
        tolerance: allowed for ``|min(x, C x + q)|``, in units of the largest ``|q|``.
        start: ``[G, R, K]``, a guess of where ``x`` is positive. It may save time.

    Returns:
        ``x``, ``[G, R, K]``. Not unique if ``C`` is singular; ``C x`` is.
    """
    if not linear.numel():
        return linear.clone()
    if linear.shape[-1] <= ENUMERATED:
        return _by_enumeration(cosines, linear)
    if not looks(linear):
        return _by_interior_points(cosines, linear, rule, tolerance)
    allowed = (tolerance * linear.abs().amax(-1, keepdim=True)).clamp_min(torch.finfo(linear.dtype).tiny)
    if linear.shape[1] == 1:
        support = linear < 0 if start is None else start > 0
        x = by_pivoting(cosines, linear.squeeze(1), support.squeeze(1), allowed.squeeze(1)).unsqueeze(1)
        unsolved = _unsolved(cosines, linear, x, allowed)
    else:
        x = _by_reflections(cosines, linear, allowed)
        unsolved = _unsolved(cosines, linear, x, allowed)
        group, problem = unsolved.nonzero().unbind(1)
        if len(group):
            near = x[group, problem]
            support = near > 1e-3 * near.amax(-1, keepdim=True)  # a part that is nearly zero tells little
            x[group, problem] = by_pivoting(cosines[group], linear[group, problem], support, allowed[group, problem])
            unsolved = _unsolved(cosines, linear, x, allowed)
    rest = unsolved.any(-1).nonzero().squeeze(1)
    if len(rest):
        x[rest] = _by_interior_points(lifted(cosines[rest]), linear[rest], rule, tolerance)
    return x


def _unsolved(cosines: Tensor, linear: Tensor, x: Tensor, allowed: Tensor) -> Tensor:
    """Where ``|min(x, C x + q)|`` is more than is allowed, ``[G, R]``."""
    violation = torch.minimum(x, torch.baddbmm(linear, x, cosines)).abs_().amax(-1, keepdim=True)
    return (violation <= allowed).logical_not_().squeeze(-1)  # what is not a number is not solved


@lru_cache(maxsize=32)
def supports(tasks: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All subsets of the tasks, as masks ``[S, K, 1]`` and as what a matrix of cosines is multiplied with ``[S, K, K]``.

    The diagonal is a little more than 1, so that parallel gradients do not make a singular matrix.
    """
    bits = torch.arange(2**tasks).reshape(-1, 1).bitwise_right_shift(torch.arange(tasks)).bitwise_and(1)
    pairs = (bits[:, :, None] * bits[:, None, :]).to(device, dtype)
    pairs.diagonal(dim1=-2, dim2=-1).fill_(1 + _RIDGE)
    return bits[..., None].to(device, dtype), pairs


def _by_enumeration(cosines: Tensor, linear: Tensor) -> Tensor:
    """For each support the solution that has it if there is one; of these the one that violates the conditions least."""
    masks, pairs = supports(linear.shape[-1], cosines.dtype, cosines.device)
    right = linear.neg().mT.unsqueeze(1) * masks  # [G, S, K, R]
    x = torch.linalg.solve_ex(cosines.unsqueeze(1) * pairs, right)[0].mT.clamp_(min=0)  # [G, S, R, K]
    slack = torch.bmm(x.flatten(1, 2), cosines).view_as(x).add_(linear.unsqueeze(1))
    violation = torch.minimum(x, slack).abs_().amax(-1)  # [G, S, R]
    best = violation.nan_to_num_(torch.inf).argmin(1)[:, None, :, None]
    found: Tensor = x.gather(1, best.expand(-1, -1, -1, x.shape[-1]))
    return found.squeeze(1)


def _by_reflections(cosines: Tensor, linear: Tensor, allowed: Tensor) -> Tensor:
    """Approximations, by the modulus iteration (van Bokhoven 1981), which is Peaceman-Rachford splitting.

    ``x = max(s, 0)`` and ``y = w max(-s, 0)`` have ``C x + q = y`` where ``(C + w) s = (w - C) |s| - 2 q``, for a number
    ``w``; this is iterated. Where many problems share a well-conditioned matrix, it is far quicker than Newton steps: each
    takes one product. What it leaves unsolved is near enough for :func:`by_pivoting`.
    """
    eye = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    smallest, largest = _ends_of_spectrum(cosines + 1e-3 * eye)
    weight = (largest * smallest).sqrt_()  # contracts both ends alike
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(cosines + weight * eye)[0])
    offset = torch.bmm(linear, inverse).mul_(-2)
    turn = inverse.mul_(2 * weight).sub_(eye)
    # A step of length d leaves |C x + q - y| = |(C + w) d| / 2.
    enough = 2 * allowed / (largest + weight)  # [G, R, 1]
    # In single precision at first, and so are corrections: what they leave is an error like any other.
    single = turn.float()
    s = found = _reflected(offset.float(), single, _FIRST).to(offset)
    rest = torch.arange(len(found))  # the groups that are not done: none depends on how long another takes
    before = torch.full_like(weight, torch.inf)
    for _ in range(12):
        moved = torch.baddbmm(offset, s.abs(), turn).sub_(s)
        change = (moved.abs().amax(-1, keepdim=True) / enough).amax(-2, keepdim=True)
        going = ((change > 1) & (change < 0.3 * before)).flatten().nonzero().squeeze(1)
        if not len(going):
            break
        if len(going) < len(rest):
            rest, s, moved, change = rest[going], s[going], moved[going], change[going]
            enough, offset, turn, single = enough[going], offset[going], turn[going], single[going]
        s = s + _reflected(moved.float(), single, _THEN, around=s.float())
        before = change
        if len(rest) == len(found):
            found = s
        else:
            found[rest] = s
    return found.clamp_(min=0)


def _ends_of_spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """About the smallest and the largest eigenvalue of ``[G, K, K]``, each ``[G, 1, 1]``, by a few powers."""
    factor = torch.linalg.cholesky_ex(matrix)[0]
    vector = torch.linspace(0, 400, matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).cos_()
    back = forth = vector.expand(matrix.shape[0], -1).unsqueeze(-1)
    for _ in range(2):
        before, back = back, torch.cholesky_solve(back, factor)
    smallest = (before.norm(dim=1, keepdim=True) / back.norm(dim=1, keepdim=True)).nan_to_num_(0.0).clamp_(1e-3, 1.0)
    for _ in range(4):
        before, forth = forth, torch.bmm(matrix, forth)
    return smallest, forth.norm(dim=1, keepdim=True) / before.norm(dim=1, keepdim=True)


def _reflected(offset: Tensor, turn: Tensor, steps: int, around: Tensor | None = None) -> Tensor:
    """``s`` after some iterations of ``s = |s| turn + offset``; or of the same for ``around + s``, less ``around``.

    The latter loses no digits where ``s`` is small: ``|a + s| - |a| = max(u, -u - 2 |a|)`` with ``u = sign(a) s``.
    """
    s, last, size = offset.clone(), torch.empty_like(offset), torch.empty_like(offset)  # fresh memory costs much
    if around is not None:
        signs, twice, back = around.sign(), around.abs().mul_(-2), torch.empty_like(offset)
    for _ in range(steps):
        if around is None:
            torch.abs(s, out=size)
        else:
            torch.mul(s, signs, out=size)
            torch.maximum(size, torch.sub(twice, size, out=back), out=size)
        last, s = s, torch.baddbmm(offset, size, turn, out=last)
    return s


def by_pivoting(cosines: Tensor, linear: Tensor, support: Tensor, allowed: Tensor, iterations: int = 10) -> Tensor:
    """Block principal pivoting (Júdice and Pires 1994) for ``[N, K, K]`` and ``[N, K]``, from a guess of the support.

    Mostly a few steps lead to the support of the solution, for any matrix that is not singular; they may also cycle.
    """
    tasks = linear.shape[-1]
    for _ in range(iterations):
        # The blocks of the supports, filled up to the size of the largest.
        size = int(support.sum(-1).max())
        order = support.to(linear.dtype).topk(size, sorted=False).indices
        inside = support.gather(1, order)
        rows = cosines.gather(1, order.unsqueeze(-1).expand(-1, -1, tasks))
        block = rows.gather(2, order.unsqueeze(1).expand(-1, size, -1))
        eye = torch.eye(size, dtype=linear.dtype, device=linear.device)
        block = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), block, eye)
        right = linear.gather(1, order) * inside
        part = -torch.cholesky_solve(right.unsqueeze(-1), torch.linalg.cholesky_ex(block)[0])
        x = torch.zeros_like(linear).scatter_(1, order, part.squeeze(-1))
        slack = torch.baddbmm(linear.unsqueeze(-1), rows.mT, part).squeeze(-1)
        wrong = torch.where(support, x, slack) < -allowed
        if not bool(wrong.any()):
            break
        support = support ^ wrong
    return x.clamp_(min=0)


def _by_interior_points(cosines: Tensor, linear: Tensor, rule: str, tolerance: float, iterations: int = 60) -> Tensor:
    """Mehrotra's predictor-corrector method, for any matrix."""
    groups, many, tasks = linear.shape
    matrix = _ridged(cosines)[:, None].expand(-1, many, -1, -1).reshape(-1, tasks, tasks)
    scale = linear.abs().amax(-1, keepdim=True)
    linear = (linear / torch.where(scale > 0, scale, 1.0)).reshape(-1, tasks)
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
        length = longest(x, dx, y, dy)
        ahead = ((x + length * dx) * (y + length * dy)).mean(-1, keepdim=True)
        dx, dy = newton.step((ahead / gap) ** 3 * gap - dx * dy)
        length = 0.995 * longest(x, dx, y, dy)
        fine = (dx.isfinite() & dy.isfinite()).all(-1, keepdim=True) & (error > tolerance)
        x, y = torch.where(fine, x + length * dx, x), torch.where(fine, y + length * dy, y)
    else:
        if looks(x) and bool((error > 1e6 * tolerance).any()):
            warn(rule, f"stopped after {iterations} iterations with an error of {float(error.max()):.1e}", UNSOLVED)
    return x.reshape(groups, many, tasks) * scale


def lifted(cosines: Tensor) -> Tensor:
    """What products in float32 left indefinite, as if each gradient had a small part of its own; the others as they are.

    Without it, the problems of more tasks than coordinates need not be bounded. For the CPU: it looks.
    """
    eye = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    index = torch.linalg.cholesky_ex(cosines + 1e-11 * eye).info.nonzero().squeeze(1)
    if not len(index):
        return cosines
    result = cosines.clone()
    below = torch.linalg.eigvalsh(cosines[index].nan_to_num())[:, :1, None]
    result[index] -= 4 * below * eye
    return result


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


def longest(x: Tensor, dx: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The largest step, at most 1, that keeps both from becoming negative."""
    limits = (torch.where(d < 0, -v / d, 1.0).amin(-1, keepdim=True) for v, d in ((x, dx), (y, dy)))
    return torch.minimum(*limits).clamp_max(1)


def _ridged(cosines: Tensor) -> Tensor:
    result = cosines.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    return result
