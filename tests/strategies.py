"""Hypothesis strategies for Jacobians ``[K, D]`` in float64, by rank, conflict and scale."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

seeds = st.integers(0, 2**32 - 1)


@st.composite
def scales(draw, tasks, *, widest=10):
    """``[K]`` lengths of gradients between ``10^-widest`` and ``10^widest``: one for all tasks, or one for each."""
    exponents = st.integers(-widest, widest)
    common = draw(exponents)
    each = draw(st.one_of(st.just([common] * tasks), st.lists(exponents, min_size=tasks, max_size=tasks)))
    return 10.0 ** np.array(each)


@st.composite
def jacobians(draw, *, min_tasks=1, max_tasks=5, widest=10):
    """Any Jacobian: of low rank too, with parallel, opposite and zero rows."""
    tasks = draw(st.integers(min_tasks, max_tasks))
    dim = draw(st.integers(1, 6))
    small = hnp.arrays(np.float64, (tasks, dim), elements=st.integers(-3, 3).map(float))
    jacobian = draw(st.one_of(small, seeds.map(lambda seed: np.random.default_rng(seed).normal(size=(tasks, dim)))))
    # Half of the rows or so become copies of another one: parallel (1), opposite (-1) or zero (0).
    for i in draw(st.lists(st.integers(0, tasks - 1), max_size=tasks, unique=True)):
        jacobian[i] = draw(st.sampled_from([1.0, -1.0, 0.0])) * jacobian[draw(st.integers(0, tasks - 1))]
    return jacobian * draw(scales(tasks, widest=widest))[:, None]


@st.composite
def apart(draw, *, min_tasks=1, max_tasks=5, widest=10):
    """Jacobians whose every row is well away from the span of the others: in conflict, unrelated, or aligned.

    The singular values of the unit rows are at least 0.19, and so is the distance of each of them from the span of the
    others. So no ``g'_i`` is nearly parallel to a ``g_j`` or nearly cancelled, where a cosine is a question of rounding.
    """
    tasks = draw(st.integers(min_tasks, max_tasks))
    rng = np.random.default_rng(draw(seeds))
    rows = np.linalg.qr(rng.normal(size=(tasks + 2, tasks)))[0].T  # orthonormal
    # The mean direction is lengthened (aligned) or shortened (in conflict); then every row gets a twist of its own.
    rows = rows + draw(st.floats(-0.8, 2.0)) * rows.mean(0) + 0.3 * rng.normal(size=rows.shape) / np.sqrt(tasks + 2)
    left, singular, right = np.linalg.svd(rows / np.linalg.norm(rows, axis=1)[:, None], full_matrices=False)
    rows = left * np.maximum(singular, 0.2) @ right
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    return rows * draw(scales(tasks, widest=widest))[:, None]


@st.composite
def orders(draw, tasks):
    """``[K, K - 1]``: for each task, an order of the others."""
    return np.array(
        [draw(st.permutations([j for j in range(tasks) if j != i])) for i in range(tasks)], dtype=np.int64
    ).reshape(tasks, tasks - 1)


def targets(tasks, *, largest=0.9):
    """``[K, K]`` targets, zero on the diagonal."""

    def make(seed):
        values = np.random.default_rng(seed).uniform(-largest, largest, (tasks, tasks))
        np.fill_diagonal(values, 0)
        return values

    return seeds.map(make)
