"""More rules as their papers write them, one vector at a time. See :mod:`oracles`.

Each function takes a Jacobian ``[K, D]`` and returns the combined gradient ``[D]``, unless it says otherwise.
"""

import numpy as np
from scipy.optimize import bisect, brentq, minimize, nnls, root


def unconflicted(g, jacobian):
    """The nearest direction to ``g`` that conflicts with no row: ``g + J^T x`` with the ``x >= 0`` that is shortest so."""
    return g + jacobian.T @ nnls(jacobian.T, -g, maxiter=1000)[0] if len(jacobian) else g


def upgrad(jacobian):
    """Quinton and Rey 2024, Equation 4."""
    return np.mean([unconflicted(g, jacobian) for g in jacobian], 0)


def dualproj(jacobian):
    return unconflicted(jacobian.mean(0), jacobian)


def cagrad(jacobian, c):
    """Liu et al. 2021, Algorithm 1, by a general solver."""
    g0, tasks = jacobian.mean(0), len(jacobian)

    def dual(w):
        return w @ jacobian @ g0 + c * np.linalg.norm(g0) * np.linalg.norm(w @ jacobian)

    best = min(
        (
            minimize(
                dual,
                start / start.sum(),
                method="SLSQP",
                bounds=[(0, 1)] * tasks,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                options={"ftol": 1e-15, "maxiter": 1000},
            )
            for start in (np.ones(tasks), *(np.eye(tasks) + 0.05))
        ),
        key=lambda solved: solved.fun,
    )
    g_w = best.x @ jacobian
    return g0 + c * np.linalg.norm(g0) / np.linalg.norm(g_w) * g_w, best.fun


def nash_weights(jacobian, power=1.0):
    """``G a = a^-p``, as the minimum of a convex function of ``log a``-free variables, by a general solver."""
    gram = jacobian @ jacobian.T

    def value(s):
        a = np.exp(s)
        utility = s.sum() if power == 1 else (a ** (1 - power)).sum() / (1 - power)
        return a @ gram @ a / 2 - utility, a * (gram @ a - a**-power)

    start = -np.log(np.linalg.norm(jacobian, axis=1))
    return np.exp(minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 2000}).x)


def aligned_mtl(jacobian, scale):
    """Senushkin et al. 2023, Algorithm 1; returns the aligned gradients ``[K, D]``, before they are averaged."""
    values, vectors = np.linalg.eigh(jacobian @ jacobian.T)
    kept = values > len(values) * np.finfo(np.float32).eps * values.max()
    values, vectors = values[kept], vectors[:, kept]
    sigma = {"min": values.min(), "median": np.sort(values)[(len(values) - 1) // 2], "rmse": values.mean()}[scale]
    return np.sqrt(sigma) * vectors @ np.diag(values**-0.5) @ vectors.T @ jacobian


def imtl_g(jacobian):
    """Liu et al. 2021, Equation 5."""
    unit = jacobian / np.linalg.norm(jacobian, axis=1)[:, None]
    differences, directions = jacobian[0] - jacobian[1:], unit[0] - unit[1:]
    others = jacobian[0] @ directions.T @ np.linalg.inv(differences @ directions.T)
    return np.array([1 - others.sum(), *others]) @ jacobian


def config(jacobian, weights=None):
    """Liu, Chu and Thuerey 2025, Equations 2 and 3."""
    unit = jacobian / np.linalg.norm(jacobian, axis=1)[:, None]
    direction = np.linalg.pinv(unit) @ (np.ones(len(jacobian)) if weights is None else weights)
    direction /= np.linalg.norm(direction)
    return (jacobian @ direction).sum() * direction


def cosine_gate(jacobian, main, weighted):
    """Du et al. 2018, Equation 4 and Algorithm 1."""
    g = sum(jacobian[k] for k in main)
    result = g.copy()
    for k in range(len(jacobian)):
        if k not in main:
            cosine = g @ jacobian[k] / np.linalg.norm(g) / np.linalg.norm(jacobian[k])
            result += (max(0, cosine) if weighted else float(cosine >= 0)) * jacobian[k]
    return result


def agem(jacobian, anchors):
    """Chaudhry et al. 2019, Equation 11."""
    r = np.mean([jacobian[k] for k in anchors], 0)
    g = sum(jacobian[k] for k in range(len(jacobian)) if k not in anchors)
    return g - (g @ r) / (r @ r) * r if g @ r < 0 else g


def gem(jacobian, anchors):
    """Lopez-Paz and Ranzato 2017, Equations 8 to 11."""
    g = sum(jacobian[k] for k in range(len(jacobian)) if k not in anchors)
    return unconflicted(g, jacobian[list(anchors)])


def on_simplex(point):
    """The nearest point of the simplex: all coordinates are lowered by the same number, down to zero."""
    low, high = point.min() - 1, point.max()
    level = bisect(lambda t: np.maximum(point - t, 0).sum() - 1, low, high, xtol=1e-15, rtol=1e-15, maxiter=1000)
    return np.maximum(point - level, 0)


def sdmgrad_weights(jacobian, w, lam, lr, momentum, iterations):
    """Xiao, Ban and Ji 2023, Algorithm 1: the new ``w``, and the tasks' weights."""
    scaled = jacobian / np.linalg.norm(jacobian, axis=1).mean()
    average, velocity = np.full(len(w), 1 / len(w)), np.zeros(len(w))
    for _ in range(iterations):
        velocity = momentum * velocity + scaled @ (scaled.T @ (w + lam * average))
        w = on_simplex(w - lr * velocity)
    return w, (w + lam * average) / (1 + lam)


def modo_weights(jacobian, w, lr, rho):
    """Chen et al. 2023, Algorithm 2."""
    return on_simplex(w - lr * (jacobian @ (jacobian.T @ w) + rho * w))


def krum(jacobian, byzantine, selected):
    """Blanchard et al. 2017, Section 4."""
    scores = []
    for i in range(len(jacobian)):
        distances = sorted(((jacobian[i] - g) ** 2).sum() for j, g in enumerate(jacobian) if j != i)
        scores.append(sum(distances[: len(jacobian) - byzantine - 2]))
    return jacobian[np.argsort(scores, kind="stable")[:selected]].mean(0)


# --- Exact but for rounding: which constraints are tight, by an active-set method, and the rest in closed form ---------


def shortest(jacobian):
    """MGDA: the shortest vector in the convex hull of the rows."""
    # min ||J^T x||^2 + (1 - sum x)^2 over x >= 0 is a multiple of it, whatever the multiple.
    tight = nnls(np.vstack([jacobian.T, np.ones(len(jacobian))]), np.eye(jacobian.shape[1] + 1)[-1], maxiter=1000)[0] > 0
    equal = np.linalg.lstsq(jacobian[tight], np.ones(tight.sum()), rcond=None)[0]  # equal products with these rows
    found = equal / (equal @ equal)
    assert np.linalg.lstsq(jacobian[tight].T, found, rcond=None)[0].min() > 0
    assert (jacobian @ found).min() > (1 - 1e-12) * (found @ found)
    return found


def conflict_averse(jacobian, c):
    """CAGrad: the point of a ball around the mean whose least inner product with a row is the largest."""
    g0, norms = jacobian.mean(0), np.linalg.norm(jacobian, axis=1)
    radius = c * np.linalg.norm(g0)

    def change(least):
        """The shortest one after which no product is less (Lawson and Hanson 1974, Chapter 23)."""
        above = least - jacobian @ g0
        system = np.vstack([jacobian.T, above])
        tight = nnls(system, np.eye(len(system))[-1], maxiter=1000)[0] > 0
        return np.linalg.lstsq(jacobian[tight], above[tight], rcond=None)[0] if tight.any() else np.zeros_like(g0)

    low, high = (jacobian @ g0).min(), (jacobian @ g0 + radius * norms).min() + 1e-3 * radius
    least = brentq(lambda m: np.linalg.norm(change(m)) - radius, low, high, xtol=1e-300, rtol=1e-15)
    found = g0 + change(least)
    # No allowed direction gains more than what any point of the hull of the rows says (weak duality).
    w = np.linalg.lstsq(jacobian.T, change(least), rcond=None)[0]
    assert w.min() > -1e-12 * w.max()
    w = w / w.sum()
    bound = w @ jacobian @ g0 + radius * np.linalg.norm(w @ jacobian)
    assert (jacobian @ found).min() > bound - 1e-14 * norms.max() ** 2
    return found


def bargained(jacobian):
    """Nash-MTL: ``G a = 1 / a``, in ``s = log a``. How far ``a_i (G a)_i`` is from 1 bounds the relative error of ``a``."""
    matrix = jacobian @ jacobian.T

    def equations(s):
        return np.exp(s) * (matrix @ np.exp(s)) - 1

    def slopes(s):
        return np.exp(s)[:, None] * matrix * np.exp(s) + np.diag(equations(s) + 1)

    start = np.log(nash_weights(jacobian))
    s = root(equations, start, jac=slopes, tol=1e-15).x
    assert np.abs(equations(s)).max() < 1e-13
    return np.exp(s) @ jacobian
