"""The rules as their papers write them: one vector at a time, in float64, without a Gram matrix.

A Jacobian is ``[K, D]``. ``orders[i]`` is the order in which task ``i`` meets the other tasks. Each function returns the
modified gradients ``[K, D]``, whose sum is the gradient that is stepped on.
"""

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from gradsurgery.testing.oracles import mean as mean
from gradsurgery.testing.oracles import mgda as mgda
from gradsurgery.testing.oracles import pcgrad as pcgrad


def sum_(jacobian):
    return jacobian.copy()


class Meeting(NamedTuple):
    """What happened as ``g'_i`` met ``g_j``."""

    i: int
    j: int
    cosine: float  # before
    target: float
    fired: bool
    growth: float  # of ||g'_i||
    size: float  # ||g'_i|| / ||g_i||, before


def gradvac(jacobian, orders, targets, beta, *, tasks=None, max_growth=np.inf, ema=True):
    """Thesis, Algorithm 2, with the bound on the norm that the library adds.

    Args:
        targets: ``[K, K]``.
        tasks: indices of the tasks that are operated on; None means all.
        max_growth: bound on ``||g'_i|| / ||g_i||``.
        ema: whether the targets move.

    Returns:
        The modified gradients, the new targets, and a list of the meetings.
    """
    modified, targets, meetings = jacobian.copy(), targets.copy(), []
    norms = [np.linalg.norm(g) for g in jacobian]
    for i in range(len(jacobian)) if tasks is None else tasks:
        for j in orders[i]:
            g_j, norm = jacobian[j], np.linalg.norm(modified[i])
            if norms[j] == 0 or norm == 0:
                continue
            phi = np.clip(modified[i] @ g_j / (norm * norms[j]), -1, 1)
            t = targets[i, j]
            fired = phi < t
            if fired:
                a = norm * (t * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - t**2)) / (norms[j] * np.sqrt(1 - t**2))
                a = min(a, _reaches(modified[i], g_j, max_growth * norms[i]))
                modified[i] = modified[i] + a * g_j
            meetings.append(Meeting(i, j, phi, t, fired, np.linalg.norm(modified[i]) / norm, norm / norms[i]))
            if ema:
                targets[i, j] = (1 - beta) * t + beta * phi
    return modified, targets, meetings


def _reaches(g, h, bound):
    """The largest ``a`` with ``||g + a h|| <= bound``."""
    if np.isinf(bound):
        return np.inf
    a, b, c = h @ h, 2 * g @ h, g @ g - bound**2
    return (-b + np.sqrt(max(b**2 - 4 * a * c, 0))) / (2 * a)


# --- How the library is asked the same question. ----------------------------------------------------------------------


@contextmanager
def fixed_orders(orders):
    """Random rules meet tasks in these orders, ``[K, K - 1]`` for all groups or ``[G, K, K - 1]``."""
    orders = torch.as_tensor(orders)

    def order(gram, generator):
        assert generator is None
        return orders.expand(len(gram), *orders.shape[-2:]).contiguous()

    with (
        mock.patch("gradsurgery.rules._pcgrad.random_order", order),
        mock.patch("gradsurgery.rules._gradvac.random_order", order),
    ):
        yield


def gram(jacobian):
    """``[K, D]`` or ``[G, K, D]`` → Gram matrices ``[G, K, K]``."""
    jacobian = torch.as_tensor(jacobian)
    jacobian = jacobian[None] if jacobian.dim() == 2 else jacobian
    return jacobian @ jacobian.mT


def names(count):
    return [str(k) for k in range(count)]


def modified(rule, jacobian, *, orders=None, targets=None):
    """The library's modified gradients ``[K, D]``, and the rule's new state."""
    matrix = gram(jacobian)
    state = rule.init(names(len(jacobian)), ["all"])
    if targets is not None:
        state = {**state, "target": torch.as_tensor(targets)[None].clone()}
    if orders is None:
        mixing, state = rule.mix(matrix, state)
    else:
        with fixed_orders(orders):
            mixing, state = rule.mix(matrix, state)
    return mixing[0].numpy() @ jacobian, state


def error(found, expected, lengths):
    """The largest distance between two rows, in units of ``lengths``: those of the original gradients, say."""
    distances = np.linalg.norm(np.atleast_2d(found - expected), axis=-1)
    return (distances / np.where(lengths > 0, lengths, 1)).max()
