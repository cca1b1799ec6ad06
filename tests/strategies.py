"""What the tests need beside the strategies of the library, all in float64."""

import numpy as np
from hypothesis import strategies as st

from gradsurgery.testing.strategies import apart, jacobians, scales

__all__ = ["apart", "jacobians", "orders", "scales", "seeds", "targets"]

seeds = st.integers(0, 2**32 - 1)


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
