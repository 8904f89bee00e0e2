"""Solvers of the accuracy predictor: products of three polynomials, and sums of them.

Each takes bases, three arrays [N, K_m + 1] with the powers of u_m at the N points, and
the target [N]; what it returns are factors, three arrays [R, K_m + 1], such that

    F(points) = sum over q of the product over m of bases[m] @ factors[m][q].

To weigh point n by v, multiply its target and its row of one basis by sqrt(v). The
target is thought to be near 1 (accuracy over the largest accuracy).
"""

import math
import warnings

import numpy as np
from scipy.optimize import least_squares, nnls

EXACT = 1e-15  # a step or descent below this share ends the fit of a product
CLOSE = 1e-10  # and that of a sum, whose valleys are flat
FLOOR = 1e-30  # share of the squares that counts as an exact fit
STEPS = 300  # of Levenberg-Marquardt on a sum, per start
SPREAD = 0.3  # standard deviation of the random coefficients it starts from

Matrices = list[np.ndarray]


# -- derivatives -----------------------------------------------------------------------


def cross(bases: Matrices) -> np.ndarray:
    """All products of a column of each basis: [N, product of the K_m + 1]."""
    return np.einsum("ni,nj,nk->nijk", *bases).reshape(len(bases[0]), -1)


def derive(bases: Matrices, factors: Matrices, m: int) -> np.ndarray:
    """d F(points) / d factors[m], [N, R (K_m + 1)].

    F is linear in the factors of one dimension: it is this times factors[m], flat.
    """
    a, b = (n for n in range(3) if n != m)
    others = (bases[a] @ factors[a].T) * (bases[b] @ factors[b].T)  # [N, R]
    return (others[:, :, None] * bases[m][:, None, :]).reshape(len(others), -1)


def predict(bases: Matrices, factors: Matrices) -> np.ndarray:
    """F at the points, [N]."""
    return derive(bases, factors, 0) @ factors[0].ravel()


def combine(factors: Matrices) -> np.ndarray:
    """The tensor of coefficients, [K_d + 1, K_w + 1, K_r + 1]."""
    return np.einsum("qi,qj,qk->ijk", *factors)


# -- Levenberg-Marquardt ---------------------------------------------------------------


def solve_product(bases: Matrices, target: np.ndarray) -> Matrices:
    """a H_d H_w H_r by Levenberg-Marquardt over a and the c_mk, R = 1.

    H_m starts with 1, so that no constant can move from one factor to another: the
    1 + sum of K_m numbers are all that is free. Starts at the additive model.
    """
    ends = np.cumsum([1, *(basis.shape[1] - 1 for basis in bases)])

    def split(theta):
        base, *parts = np.split(theta, ends[:-1])
        found = [np.concatenate([[1.0], part])[None] for part in parts]
        return [base * found[0], *found[1:]]

    def miss(theta):
        return predict(bases, split(theta)) - target

    def slope(theta):
        factors = split(theta)
        columns = [derive(bases, factors, m)[:, 1:] for m in range(3)]
        value = predict(bases, split(np.concatenate([[1.0], theta[1:]])))
        return np.column_stack([value, theta[0] * columns[0], *columns[1:]])

    found = least_squares(
        miss, _start_product(bases, target), slope, method="lm",
        xtol=EXACT, ftol=EXACT, gtol=EXACT,
    )  # fmt: skip
    return split(found.x)


def _start_product(bases: Matrices, target: np.ndarray) -> np.ndarray:
    """a and the c_mk of the additive model a + sum of a c_mk u_m^k, which is linear.

    On points that prune one dimension at a time it is the product exactly.
    """
    flat = _start_flat(bases)
    columns = [derive(bases, flat, m) for m in range(3)]
    design = np.hstack([columns[0], columns[1][:, 1:], columns[2][:, 1:]])
    base, *rest = np.linalg.lstsq(design, target, rcond=None)[0]
    if base <= 0:  # no unpruned accuracy to divide by
        return np.eye(1, design.shape[1])[0]
    return np.array([base, *(x / base for x in rest)])


def _start_flat(bases: Matrices) -> Matrices:
    return [np.eye(1, basis.shape[1]) for basis in bases]


def solve_sum(
    bases: Matrices,
    target: np.ndarray,
    *,
    rank: int,
    ridge: float = 0.0,
    starts: int = 8,
    seed: int = 0,
) -> Matrices:
    """The best of several random starts around the best product, R = rank.

    ridge: added to the squares times those of all coefficients, for points that do not
    determine them.
    """
    product, rng = solve_product(bases, target), np.random.default_rng(seed)
    best, least = product, math.inf
    for _ in range(starts):
        start = [SPREAD * rng.standard_normal((rank, f.shape[1])) for f in product]
        for noise, factor in zip(start, product, strict=True):
            noise[0] += factor[0]
        found, cost = _descend(bases, target, start, math.sqrt(ridge))
        if cost < least:
            best, least = found, cost
    return best


def _descend(
    bases: Matrices, target: np.ndarray, start: Matrices, root: float
) -> tuple[Matrices, float]:
    """Levenberg-Marquardt over all coefficients, and half the squares it ends at.

    The rows of the ridge also make up for coefficients outnumbering the points.
    """
    shapes = [factor.shape for factor in start]
    ends = np.cumsum([factor.size for factor in start])
    tail = root * np.eye(ends[-1])

    def split(theta):
        parts = np.split(theta, ends[:-1])
        return [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]

    def miss(theta):
        return np.concatenate([predict(bases, split(theta)) - target, root * theta])

    def slope(theta):
        factors = split(theta)
        columns = [derive(bases, factors, m) for m in range(3)]
        return np.vstack([np.hstack(columns), tail])

    found = least_squares(
        miss, np.concatenate([factor.ravel() for factor in start]), slope, method="lm",
        xtol=CLOSE, ftol=CLOSE, gtol=EXACT, max_nfev=STEPS,
    )  # fmt: skip
    return split(found.x), found.cost


# -- alternating least squares ---------------------------------------------------------


def alternate(
    bases: Matrices, target: np.ndarray, *, monotone: bool = False, sweeps: int = 5000
) -> Matrices:
    """a H_d H_w H_r, one factor at a time, the other two held: never uphill, R = 1.

    Starts at the constant 1. monotone: factors b_0 + sum over k of b_k (1 - u^k), with
    b >= 0, by nnls: at least 0 and falling over u from 0 to 1. Warns where the squares
    still fall after `sweeps`.
    """
    factors, last = _start_flat(bases), math.inf
    solve = _solve_falling if monotone else _solve_free
    for _ in range(sweeps):
        for m in range(3):
            factors[m] = solve(derive(bases, factors, m), target)[None]
        residual = predict(bases, factors) - target
        squares = residual @ residual
        if last - squares <= EXACT * squares or squares <= FLOOR * (target @ target):
            return factors
        last = squares
    warnings.warn(
        f"als has not settled in {sweeps} sweeps: raise `sweeps`, take lm, or add "
        "points that tell d, w and r apart",
        stacklevel=5,
    )
    return factors


def _solve_free(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(design, target, rcond=None)[0]


def _solve_falling(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    change = -np.eye(design.shape[1])
    change[0] = 1  # columns 1, 1 - u, 1 - u^2, ...
    return change @ nnls(design @ change, target)[0]
