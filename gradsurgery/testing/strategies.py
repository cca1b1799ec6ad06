"""Hypothesis strategies for what rules are given, by rank, conflict and scale. All in float64.

>>> import gradsurgery as gs
>>> from hypothesis import given
>>> @given(jacobian=gs.testing.strategies.jacobians(min_tasks=2, max_tasks=2, conflict=True))
... def test_conflict(jacobian):
...     assert jacobian[0] @ jacobian[1] < 0
>>> test_conflict()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

__all__ = ["apart", "grams", "jacobians", "losses", "scales"]

Array: TypeAlias = npt.NDArray[np.float64]

_seeds = st.integers(0, 2**16 - 1)


@st.composite
def scales(draw: st.DrawFn, tasks: int, *, widest: int = 10) -> Array:
    """``[K]`` lengths between ``10^-widest`` and ``10^widest``: one for all tasks, or one for each."""
    exponents = st.integers(-widest, widest)
    common = draw(exponents)
    each = draw(st.one_of(st.just([common] * tasks), st.lists(exponents, min_size=tasks, max_size=tasks)))
    return np.asarray(10.0 ** np.array(each))


@st.composite
def jacobians(
    draw: st.DrawFn,
    *,
    min_tasks: int = 1,
    max_tasks: int = 5,
    rank: int | None = None,
    conflict: bool | None = None,
    widest: int = 10,
) -> Array:
    """Any Jacobian ``[K, D]``: of low rank too, with parallel, opposite and zero rows.

    Args:
        draw: given by hypothesis.
        min_tasks: smallest ``K``.
        max_tasks: largest ``K``.
        rank: of the rows, before they are scaled, or all tasks if that is fewer; None means any.
        conflict: True for negative inner products of all pairs, False for positive ones; None means any. Rows are then
            independent.
        widest: as for :func:`scales`.

    Raises:
        ValueError: for both a rank and a kind of conflict.
    """
    tasks = draw(st.integers(min_tasks, max_tasks))
    if conflict is not None:
        if rank is not None:
            raise ValueError("`rank` and `conflict` cannot both be chosen: rows in conflict are made independent.")
        return draw(apart(min_tasks=tasks, max_tasks=tasks, conflict=conflict, widest=widest))
    if rank is not None:
        rng, least = np.random.default_rng(draw(_seeds)), min(rank, tasks)
        dim = least + draw(st.integers(0, 3))
        rows = np.eye(tasks, least) + rng.normal(size=(tasks, least)) / 3
        basis = np.linalg.qr(rng.normal(size=(max(dim, 1), least)))[0].T
        return np.asarray((rows @ basis) * draw(scales(tasks, widest=widest))[:, None])
    dim = draw(st.integers(1, 6))
    small = hnp.arrays(np.float64, (tasks, dim), elements=st.integers(-3, 3).map(float))
    normal: Callable[[int], Array] = lambda seed: np.random.default_rng(seed).normal(size=(tasks, dim))  # noqa: E731
    jacobian = draw(st.one_of(small, _seeds.map(normal)))
    # Half of the rows or so become copies of another one: parallel (1), opposite (-1) or zero (0).
    for i in draw(st.lists(st.integers(0, tasks - 1), max_size=tasks, unique=True)):
        jacobian[i] = draw(st.sampled_from([1.0, -1.0, 0.0])) * jacobian[draw(st.integers(0, tasks - 1))]
    return np.asarray(jacobian * draw(scales(tasks, widest=widest))[:, None])


@st.composite
def apart(
    draw: st.DrawFn, *, min_tasks: int = 1, max_tasks: int = 5, conflict: bool | None = None, widest: int = 10
) -> Array:
    """Jacobians ``[K, K + 2]`` whose every row is well away from the span of the others.

    The singular values of the unit rows are at least 0.19, and so is the distance of each of them from the span of the
    others. So nothing is nearly parallel or nearly cancelled, where a cosine is a question of rounding.

    Args:
        draw: given by hypothesis.
        min_tasks: smallest ``K``.
        max_tasks: largest ``K``.
        conflict: as for :func:`jacobians`.
        widest: as for :func:`scales`.
    """
    tasks = draw(st.integers(min_tasks, max_tasks))
    rng = np.random.default_rng(draw(_seeds))
    rows = np.linalg.qr(rng.normal(size=(tasks + 2, tasks)))[0].T  # orthonormal
    # The mean direction is lengthened (aligned) or shortened (in conflict); then every row gets a twist of its own.
    longer = {None: st.floats(-0.8, 2.0), True: st.floats(-0.7, -0.1), False: st.floats(0.1, 2.0)}[conflict]
    rows = rows + draw(longer) * rows.mean(0)
    if conflict is None:
        rows = rows + 0.3 * rng.normal(size=rows.shape) / np.sqrt(tasks + 2)
        left, singular, right = np.linalg.svd(rows / np.linalg.norm(rows, axis=1)[:, None], full_matrices=False)
        rows = left * np.maximum(singular, 0.2) @ right
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    return np.asarray(rows * draw(scales(tasks, widest=widest))[:, None])


def grams(
    *,
    min_tasks: int = 1,
    max_tasks: int = 5,
    rank: int | None = None,
    conflict: bool | None = None,
    widest: int = 10,
) -> st.SearchStrategy[Array]:
    """Gram matrices ``[K, K]``, of :func:`jacobians` with these settings."""
    made = jacobians(min_tasks=min_tasks, max_tasks=max_tasks, rank=rank, conflict=conflict, widest=widest)
    return made.map(lambda jacobian: jacobian @ jacobian.T)


def losses(tasks: int, *, smallest: int = -10, largest: int = 15) -> st.SearchStrategy[Array]:
    """Positive losses ``[K]``, between ``10^smallest`` and ``10^largest``."""
    values = st.tuples(st.integers(1, 9), st.integers(smallest, largest - 1)).map(lambda pair: pair[0] * 10.0 ** pair[1])
    return st.lists(values, min_size=tasks, max_size=tasks).map(np.array)
