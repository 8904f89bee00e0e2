"""Least squares for products of three polynomials, and for sums of such products.

Solvers take bases, three arrays [N, K_m + 1] with the powers of u_m at the N
points, and the target [N], thought to be near 1. What they find are the coefficients of
the factors, three arrays [R, K_m + 1], such that

    F(points) = sum over q of the product over m of bases[m] @ factors[m][q].

A product has two numbers too many: multiply one factor by 2 and another by 1/2, and
nothing changes (a *gauge*). In a single product the factors of w and r are therefore
held at 1 for u = 0. In a sum they cannot be: one of its products may well be 0 at the
unpruned network, and then no number starting from 1 could describe it.
"""

import math
import warnings

import numpy as np
from scipy.optimize import least_squares, nnls

EXACT = 1e-15  # a step or descent below this share ends a fit
FLOOR = 1e-30  # share of the squares that counts as an exact fit
CLOSE = 1e-10  # and that of a sum, whose valleys are flat
STEPS = 300  # of Levenberg-Marquardt, per start
STARTS = 4  # random ones of a sum
SPREAD = 0.3  # standard deviation of the random coefficients it starts from
SWEEPS = 5000  # of a falling product, over d, w and r

Matrices = list[np.ndarray]


# -- Levenberg-Marquardt ---------------------------------------------------------------


def start_flat(bases: Matrices) -> Matrices:
    """A product that is 1 everywhere."""
    return [np.eye(1, basis.shape[1]) for basis in bases]


def predict(bases: Matrices, factors: Matrices) -> np.ndarray:
    """F at the points, [N]."""
    curves = [basis @ f.T for basis, f in zip(bases, factors, strict=True)]
    return np.prod(curves, axis=0).sum(axis=1)


def derive(bases: Matrices, factors: Matrices, m: int) -> np.ndarray:
    """d F(points) / d factors[m], [N, R (K_m + 1)].

    F is linear in the factors of one dimension: it is this times factors[m], flat.
    """
    a, b = (n for n in range(3) if n != m)
    others = (bases[a] @ factors[a].T) * (bases[b] @ factors[b].T)  # [N, R]
    return (others[:, :, None] * bases[m][:, None, :]).reshape(len(others), -1)


def solve_sum(
    bases: Matrices, target: np.ndarray, *, rank: int = 1, ridge: float = 0.0
) -> Matrices:
    """R products by Levenberg-Marquardt.

    ridge: added to the squares times those of all coefficients, for points that do not
    determine them.
    """
    best, _ = _descend(bases, target, start_flat(bases), 0.0, EXACT)
    if rank == 1:
        return best
    # One product ends at the same place from wherever it starts; a sum does not, so the
    # best of several starts around the best product is taken.
    rng, found = np.random.default_rng(0), []
    for _ in range(STARTS):
        start = [SPREAD * rng.standard_normal((rank, f.shape[1])) for f in best]
        for noise, factor in zip(start, best, strict=True):
            noise[0] += factor[0]
        found.append(_descend(bases, target, start, ridge, CLOSE))
    return min(found, key=lambda pair: pair[1])[0]


def _descend(
    bases: Matrices, target: np.ndarray, start: Matrices, ridge: float, tolerance: float
) -> tuple[Matrices, float]:
    """Levenberg-Marquardt from `start`, and half the squares it ends at."""
    shapes, root = [factor.shape for factor in start], math.sqrt(ridge)
    ends = np.cumsum([factor.size for factor in start])
    theta = np.concatenate([factor.ravel() for factor in start])
    free = np.ones(len(theta), dtype=bool)
    if len(start[0]) == 1:
        free[ends[:2]] = False  # the gauge of a single product: H_w = H_r = 1 at u = 0
    # The ridge as rows of their own; zeros where it is 0, since MINPACK refuses more
    # coefficients than rows.
    tail = root * np.eye(free.sum())

    def split(moved):
        theta[free] = moved
        parts = np.split(theta.copy(), ends[:-1])
        return [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]

    def miss(moved):
        return np.concatenate([predict(bases, split(moved)) - target, root * moved])

    def slope(moved):
        factors = split(moved)
        columns = [derive(bases, factors, m) for m in range(3)]
        return np.vstack([np.hstack(columns)[:, free], tail])

    found = least_squares(
        miss, theta[free], slope, method="lm",
        xtol=tolerance, ftol=tolerance, gtol=EXACT, max_nfev=STEPS,
    )  # fmt: skip
    return split(found.x), found.cost


# -- a falling product -----------------------------------------------------------------


def alternate(bases: Matrices, target: np.ndarray) -> Matrices:
    """One falling product, one factor at a time, the other two held: never uphill.

    Warns where the squares still fall after `SWEEPS`.
    """
    factors = start_flat(bases)
    last = math.inf
    for _ in range(SWEEPS):
        for m in range(3):
            factors[m] = _solve_falling(derive(bases, factors, m), target)[None]
        squares = float(((predict(bases, factors) - target) ** 2).sum())
        if last - squares <= EXACT * squares or squares <= FLOOR * (target @ target):
            return factors
        last = squares
    warnings.warn(
        f"the monotone fit has not settled in {SWEEPS} sweeps: add points that tell d, "
        "w and r apart",
        stacklevel=5,
    )
    return factors


def _solve_falling(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    # In the basis 1, 1 - u, 1 - u^2, ... weights >= 0 are enough for a curve that falls
    # over u and stays at 0 or above, and nnls asks for nothing but weights >= 0.
    change = -np.eye(design.shape[1])
    change[0] = 1
    return change @ nnls(design @ change, target)[0]
