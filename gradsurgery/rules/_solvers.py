"""The small problems behind the rules, solved for all surgery groups at once, on the device.

Gradients may be of very different lengths, so that most problems are put in terms of their directions: ``cosines`` is the
Gram matrix of unit vectors, ``[G, K, K]``, with ones on the diagonal (see :func:`directions`). Nothing is read back to the
host, except on the CPU, where looking costs nothing: there, solvers stop when they are done, and warn when they are not.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

ENUMERATED = 5  # with so many tasks at most, all 2^K supports of a solution are tried at once
# Gram matrices may be from products in float32, whose rounding looks like directions of this squared length.
ROUNDING = 4 * torch.finfo(torch.float32).eps
_WHOLE_STEPS, _NEWTON_STEPS = 20, 50  # a dozen are needed, unless there is no solution
UNSOLVED = "the gradients are nearly dependent, and the result is less exact"


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
    there = square - square < square  # 0 < square < inf, at once
    if active is not None:
        there = there & active
    everywhere = looks(gram) and bool(there.all())
    norms = square.sqrt() if everywhere else torch.where(there, square, 1.0).sqrt()
    inverse = norms.reciprocal()
    cosines = (gram * inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
    if not everywhere:
        cosines = torch.where(there.unsqueeze(-1) & there.unsqueeze(-2), cosines, 0.0)
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
    w, error = _balanced(cosines, target, power, 0.0)
    enough = torch.finfo(w.dtype).eps ** 0.5
    # The squared length of what is combined, w^T C w, had better not be the rest of a cancellation.
    left = (target.exp() * w ** (1 - power)).sum(-1, keepdim=True)
    failed = ~((error < enough) & (left > 1e-8 * w.amax(-1, keepdim=True).square()))
    if not looks(w):
        w = torch.where(failed, _balanced(cosines, target, power, 1e-6)[0], w)
    elif bool(failed.any()):
        index = failed.nonzero()[:, 0]
        w[index], error = _balanced(cosines[index], target[index], power, 1e-6)
        if not bool((error < 1e-4).all()) and bool(cosines.isfinite().all()):
            warn(rule, f"stopped with a relative error of {float(error.max()):.1e}", UNSOLVED)
    return w * (shift / (1 + power)).exp()


def _balanced(cosines: Tensor, target: Tensor, power: float, ridge: float) -> tuple[Tensor, Tensor]:
    """``w`` and how far ``C w`` is from ``z = t w^-p`` ``[G, 1]``, by Newton steps along the curve of ``(w, z)``.

    A number ``y`` tells where on its curve a task is. At ``y = 0`` the slope ``dz/dw`` is -1; beyond, ``w`` grows with
    ``y``, and before, ``z`` falls with it. So neither leaves its range however small it is, and no entry of the derivative
    of ``C w - z`` is large. As ``p`` goes to zero, which is max-min fairness, ``C w - z`` becomes the normal map of a
    complementarity problem (Robinson 1992), linear but for a kink.
    """
    matrix = cosines + ridge * torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    size = matrix.abs()
    log_turn = (target + math.log(power)) / (1 + power)
    turn_w, turn_z = log_turn.exp(), (target - power * log_turn).exp()

    def curve(y: Tensor) -> tuple[Tensor, Tensor]:
        w, z = turn_w + y.clamp_min(0), turn_z - y.clamp_max(0)
        beyond = y >= 0
        on_curve = (target - power * w.log()).exp(), ((target - z.log()) / power).exp()
        return torch.where(beyond, w, on_curve[1]), torch.where(beyond, on_curve[0], z)

    w = (target / (1 + power)).exp()  # the solution for orthogonal gradients
    y = torch.where(w >= turn_w, w - turn_w, turn_z - w)
    fractions = 0.5 ** torch.arange(8, dtype=w.dtype, device=w.device).reshape(-1, 1, 1)
    for taken in range(_NEWTON_STEPS + 1):
        w, z = curve(y)
        outside = (matrix @ w.unsqueeze(-1)).squeeze(-1) - z
        error = (outside.abs() / ((size @ w.unsqueeze(-1)).squeeze(-1) + z)).amax(-1, keepdim=True)
        unfinished = error > 512 * torch.finfo(w.dtype).eps
        if taken == _NEWTON_STEPS or (looks(w) and not bool(unfinished.any())):
            break
        beyond, slope = y >= 0, power * z / w
        derivative = matrix * torch.where(beyond, 1.0, slope.reciprocal()).unsqueeze(-2)
        derivative.diagonal(dim1=-2, dim2=-1).add_(torch.where(beyond, slope, 1.0))
        step = torch.linalg.solve_ex(derivative, -outside)[0]
        if taken >= _WHOLE_STEPS:  # they go round in circles, which is rare: from now on, the first fraction that helps
            ws, zs = curve(y + fractions * step)
            left = ((((matrix @ ws.unsqueeze(-1)).squeeze(-1) - zs) / z).square().sum(-1)).nan_to_num_(torch.inf)  # [8, G]
            helps = left <= (1 - 0.1 * fractions[..., 0]) * (outside / z).square().sum(-1)
            chosen = torch.where(helps.any(0), helps.to(torch.int8).argmax(0), left.argmin(0))
            step = step * fractions[chosen, 0]
        # So that no group depends on how long another takes.
        y = torch.where(unfinished & step.isfinite().all(-1, keepdim=True), y + step, y)
    return w, error


# --- Least squares: C x = b ---------------------------------------------------------------------------------------------


def least_squares(cosines: Tensor, right: Tensor) -> Tensor:
    """The shortest of the ``x`` ``[G, K]`` for which ``C x`` is nearest to ``b >= 0`` ``[G, K]``.

    Directions that are rounding (:data:`ROUNDING`) count as zero, and so does a ``b`` of which no more lies in the others.
    """
    if not looks(cosines):
        return _by_eigenvectors(cosines, right)
    factor, info = torch.linalg.cholesky_ex(cosines)
    x = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    # The smallest pivot is at least the smallest eigenvalue. It may be far above it, which leaves x large.
    fine = (factor.diagonal(dim1=-2, dim2=-1) > 1e-2) & (x.abs() <= 1e3 * right.amax(-1, keepdim=True))
    if bool(info.any()) or not bool(fine.all()):
        index = ((info == 0) & fine.all(-1)).logical_not().nonzero().squeeze(1)
        x[index] = _by_eigenvectors(cosines[index], right[index])
    return x


def _by_eigenvectors(cosines: Tensor, right: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cosines.nan_to_num(0.0))
    kept = values > ROUNDING * values[:, -1:]
    along = torch.where(kept, (vectors.mT @ right[..., None]).squeeze(-1), 0.0)
    # Where all that is left of b is rounding, the solution must not be made of it.
    left = along.square().sum(-1, keepdim=True) > ROUNDING**2 * right.square().sum(-1, keepdim=True)
    x: Tensor = vectors @ torch.where(kept & left, along / torch.where(kept, values, 1.0), 0.0)[..., None]
    return x.squeeze(-1)
