"""Fit the accuracy predictor to measured points (d, w, r, accuracy).

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021, regress a polynomial of
degree K = 3 on pruned networks and find a product of three univariate ones (rank R = 1)
to suffice. How they solve for it is not known to us; here it is least squares.

    rank 1     F = a H_d H_w H_r, H_m = 1 + sum over k of c_mk u_m^k: 1 + 3K numbers,
               by Levenberg-Marquardt ("lm") or alternating least squares ("als")
    rank R     a sum of R such products: R (1 + 3K) numbers
    rank None  all (K+1)^3 coefficients, linear ("lstsq"), of least norm

where u = (1 - x) / span as in `lib.map3d.predictor`. Points that prune one dimension at
a time identify 1 + 3K numbers, whatever the rank: a fit that asks for more warns.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.polynomial.polynomial import polyvander
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls

from lib.map3d.predictor import DIMENSIONS, SLACK, Map

COLUMNS = (*DIMENSIONS, "accuracy")
EXACT = 1e-15  # steps and descents smaller than this, relatively, end a fit
RIDGE = 1e-12  # of sums of products that fit alike it picks the smallest
FLOOR = 1e-30  # share of the squares that counts as an exact fit
DEFICIENT = 1e-9  # singular values below this share of the largest count as zero

Matrices = list[np.ndarray]  # one per dimension


class UnidentifiedWarning(UserWarning):
    """The points do not determine all parameters of the fit."""


@dataclass(frozen=True)
class Options:
    """What to fit and how, checked; see `fit`."""

    rank: int | None = 1
    degree: int = 3
    monotone: bool = False
    solver: str | None = None
    seed: int = 0
    starts: int = 8
    sweeps: int = 5000

    def __post_init__(self):
        for name in ("rank", "degree", "starts", "sweeps"):
            if name != "rank" or self.rank is not None:
                _check_count(name, getattr(self, name))
        count_parameters(self.rank, self.degree)
        if self.monotone and self.rank != 1:
            raise ValueError(
                f"monotone: only a product can be held monotone, got rank {self.rank}; "
                "use rank 1"
            )
        allowed = ("als",) if self.monotone else ("lm", "als")
        allowed = ("lstsq",) if self.rank is None else allowed
        object.__setattr__(self, "solver", self.solver or allowed[0])
        if self.solver not in allowed:
            raise ValueError(
                f"solver: rank {self.rank}, monotone {self.monotone} is solved by "
                f"{' or '.join(allowed)}, got {self.solver!r}"
            )


def fit(
    points: ArrayLike | pd.DataFrame,
    *,
    rank: int | None = 1,
    degree: int = 3,
    monotone: bool = False,
    solver: str | None = None,
    weights: ArrayLike | None = None,
    seed: int = 0,
    starts: int = 8,
    sweeps: int = 5000,
) -> Map:
    """Least-squares polynomial of accuracy over depth, width and resolution.

    points: [N, 4], columns d, w, r in (0, 1] and accuracy in percent, or a DataFrame
    with these names ("top1" also serves as accuracy). rank: products in the sum, None
    for the full tensor. degree: K. solver: "lm" or "als", "lstsq" for the full tensor;
    None takes "lm" where it can. weights: [N], relative inverse variances; a large one
    pins its point, and `residual_sd` is that of a point of weight 1.
    monotone: H_m = 1 - sum over k of g_mk u^k with g >= 0, and H_m >= 0 in the box, by
    "als" with nnls: F never rises there as a share falls. Degrees of freedom are then
    counted by the g above 0.
    seed, starts: random starts of a rank above 1, the best is taken. sweeps: the most
    "als" may take; one that has not settled by then warns.
    A dimension that does not vary gets the factor 1.
    Where the points determine fewer parameters than the map has, `UnidentifiedWarning`
    tells how many, and the solution is one of small norm. Refused are fewer distinct
    points than rank 1 needs: 1 + K per dimension that varies, just what points that
    prune one dimension at a time can determine at any rank.
    ValueError: that; another shape, missing columns, shares outside (0, 1], accuracies
    outside [0, 100] or all 0, K levels or fewer in a dimension that varies, none that
    varies, weights that are not N positive numbers, options that do not go together.
    Source: Wang et al. 2021; the basis and the solvers are ours.
    """
    options = Options(rank, degree, monotone, solver, seed, starts, sweeps)
    return fit_table(read_points(points), options, weights)


def fit_table(
    table: np.ndarray, options: Options, weights: ArrayLike | None = None
) -> Map:
    """`fit` of a float64 table [N, 4] as `read_points` returns it, or one near it."""
    weights = _check_weights(weights, len(table))
    degrees = _check_design(table, options.degree)
    determined = _warn_unidentified(table, degrees, options)
    low, high = _find_box(table)
    root, scale = np.sqrt(weights), float(table[:, 3].max())
    bases = _make_bases(table, degrees, low)
    bases[0] = root[:, None] * bases[0]  # and so weighs every product of the three
    tensor, active = _solve(bases, root * table[:, 3] / scale, options)
    residual = root * table[:, 3] - scale * np.einsum("ni,nj,nk,ijk->n", *bases, tensor)
    freedom = len(table) - (determined if active is None else active)
    noise = math.sqrt(residual @ residual / freedom) if freedom > 0 else math.nan
    coefficients = np.zeros((options.degree + 1,) * 3)
    coefficients[tuple(map(slice, tensor.shape))] = scale * tensor
    return Map(coefficients, low, options.degree, options.rank, options.monotone,
               options.solver, len(table), noise, high)  # fmt: skip


# -- what the points determine ---------------------------------------------------------


def count_parameters(rank: int | None, degree: int) -> int:
    """Free parameters of a map: R (1 + 3K), or (K + 1)^3 for rank None.

    Of the 3R (K + 1) numbers in R products, 2R only move a constant from one factor to
    another. ValueError: rank or degree below 1, or a rank with as many parameters as
    the full tensor.
    """
    _check_count("degree", degree)
    if rank is None:
        return (degree + 1) ** 3
    _check_count("rank", rank)
    count, full = rank * (1 + 3 * degree), (degree + 1) ** 3
    if count >= full:
        raise ValueError(
            f"rank: {rank} has {count} parameters at degree {degree}, the full tensor "
            f"{full}; use rank None"
        )
    return count


def jacobian_rank(
    points: ArrayLike | pd.DataFrame, rank: int | None = 1, degree: int = 3
) -> int:
    """How many parameters of a map the places of the points can determine.

    points: [N, 3] or [N, 4] with columns d, w, r, or a DataFrame; accuracies are not
    read, so that a design can be judged before it is measured. Returned: the rank of
    the derivatives of F at the points in its parameters, at factors drawn at random
    (with a fixed seed), which almost all factors share. A fit that could determine all
    has `count_parameters` of them, less where a dimension does not vary.
    ValueError: as in `fit` for shares, shapes, rank and degree.
    """
    count_parameters(rank, degree)
    shares = _check_shares(_read_columns(points, DIMENSIONS))
    return _measure_rank(_make_level_bases(shares, _find_degrees(shares, degree)), rank)


def _warn_unidentified(
    table: np.ndarray, degrees: tuple[int, ...], options: Options
) -> int:
    """How many parameters the points determine; warns where there are more."""
    determined = _measure_rank(_make_level_bases(table[:, :3], degrees), options.rank)
    grid = np.indices([k + 1 for k in degrees]).reshape(3, -1)
    wanted = _measure_rank(
        [np.eye(k + 1)[at] for k, at in zip(degrees, grid, strict=True)], options.rank
    )
    if determined < wanted:
        warnings.warn(
            f"rank {options.rank}, degree {options.degree}: the {len(table)} points "
            f"determine {determined} of {wanted} parameters (rank of the Jacobian), "
            "the others are kept small; add points that prune two or three of d, w, r "
            "together, or lower rank or degree",
            UnidentifiedWarning,
            stacklevel=4,
        )
    return determined


def _measure_rank(bases: Matrices, rank: int | None) -> int:
    """Rank of the derivatives of the predictions, at factors drawn at random."""
    if rank is None:
        return int(np.linalg.matrix_rank(_cross(bases), rtol=DEFICIENT))
    draw = np.random.default_rng(0).standard_normal
    factors = [draw((rank, basis.shape[1])) for basis in bases]
    jacobian = np.hstack([_derive(bases, factors, m) for m in range(3)])
    return int(np.linalg.matrix_rank(jacobian, rtol=DEFICIENT))


# -- predictions are linear in the factor of one dimension -----------------------------


def _cross(bases: Matrices) -> np.ndarray:
    """All products of a column of each basis: [N, product of the K_m + 1]."""
    return np.einsum("ni,nj,nk->nijk", *bases).reshape(len(bases[0]), -1)


def _derive(bases: Matrices, factors: Matrices, m: int) -> np.ndarray:
    """d F(points) / d factors[m], [N, R (K_m + 1)]; F is this times factors[m]."""
    others = np.prod(
        [bases[n] @ factors[n].T for n in range(3) if n != m], axis=0
    )  # [N, R]
    return (others[:, :, None] * bases[m][:, None, :]).reshape(len(others), -1)


def _make_bases(
    table: np.ndarray, degrees: tuple[int, ...], low: tuple[float, ...]
) -> Matrices:
    """Powers 0..K_m of u_m at the points, [N, K_m + 1] each."""
    spans = [1 - x if k else 1.0 for x, k in zip(low, degrees, strict=True)]
    unit = (1 - table[:, :3]) / spans
    return [polyvander(u, k) for u, k in zip(unit.T, degrees, strict=True)]


def _make_level_bases(shares: np.ndarray, degrees: tuple[int, ...]) -> Matrices:
    """Polynomials orthonormal over the levels of each dimension, at the points.

    They span what the powers do, but their rank shows at any degree.
    """
    bases = []
    for x, k in zip(shares.T, degrees, strict=True):
        level, values = _find_levels(x)
        bases.append(np.linalg.qr(polyvander(1 - values, k))[0][level])
    return bases


# -- solvers ---------------------------------------------------------------------------


def _solve(
    bases: Matrices, target: np.ndarray, options: Options
) -> tuple[np.ndarray, int | None]:
    """The tensor in u; and how many of its parameters are free, if bounds hold some."""
    if options.rank is None:
        flat = np.linalg.lstsq(_cross(bases), target, rcond=None)[0]
        return flat.reshape([basis.shape[1] for basis in bases]), None
    factors = _start_product(bases, target)
    if options.solver == "als":
        factors = _alternate(bases, target, options)
    elif options.rank > 1:
        factors = _solve_sum(bases, target, factors, options)
    else:
        factors = _solve_product(bases, target, factors)
    active = None
    if options.monotone:
        active = 1 + sum(np.count_nonzero(factor[0, 1:]) for factor in factors)
    return np.einsum("qi,qj,qk->ijk", *factors), active


def _start_product(bases: Matrices, target: np.ndarray) -> Matrices:
    """Factors from the additive model a + sum of a c_mk u_m^k, linear in a and a c.

    On points that prune one dimension at a time it is the product exactly.
    """
    factors = [np.eye(1, basis.shape[1]) for basis in bases]
    columns = [_derive(bases, factors, m) for m in range(3)]
    design = np.hstack([columns[0][:, :1], *(c[:, 1:] for c in columns)])
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    if found[0] <= 0:  # no unpruned accuracy to start from
        return factors
    ends = np.cumsum([basis.shape[1] - 1 for basis in bases])[:-1]
    for factor, part in zip(factors, np.split(found[1:] / found[0], ends), strict=True):
        factor[0, 1:] = part
    factors[0] = found[0] * factors[0]
    return factors


def _solve_product(bases: Matrices, target: np.ndarray, factors: Matrices) -> Matrices:
    """Levenberg-Marquardt over a and the c_mk: 1 + 3K numbers, no constant to spare."""
    ends = np.cumsum([1] + [basis.shape[1] - 1 for basis in bases])[:-1]

    def split(theta):
        base, *parts = np.split(theta, ends)
        found = [np.concatenate([[1.0], part])[None] for part in parts]
        return [base * found[0], *found[1:]], found[0]

    def miss(theta):
        factors = split(theta)[0]
        return _derive(bases, factors, 0) @ factors[0][0] - target

    def derive(theta):
        factors, first = split(theta)
        columns = [_derive(bases, factors, m) for m in range(3)]
        columns[0] = np.column_stack(
            [columns[0] @ first[0], theta[0] * columns[0][:, 1:]]
        )
        return np.hstack([columns[0], *(c[:, 1:] for c in columns[1:])])

    base = factors[0][0, 0]
    start = [[base], factors[0][0, 1:] / base, *(f[0, 1:] for f in factors[1:])]
    found = least_squares(miss, np.concatenate(start), derive, method="lm",
                          xtol=EXACT, ftol=EXACT, gtol=EXACT)  # fmt: skip
    return split(found.x)[0]


def _solve_sum(
    bases: Matrices, target: np.ndarray, product: Matrices, options: Options
) -> Matrices:
    """The best of several random starts around the product, for a rank above 1."""
    rng, best, least = np.random.default_rng(options.seed), product, math.inf
    for _ in range(options.starts):
        start = [_scatter(factor, options.rank, rng) for factor in product]
        if options.solver == "lm":
            found = _descend(bases, target, start)
        else:
            found = _alternate(bases, target, start, options)
        residual = _derive(bases, found, 0) @ found[0].ravel() - target
        if residual @ residual < least:
            best, least = found, residual @ residual
    return best


def _scatter(factor: np.ndarray, rank: int, rng: np.random.Generator) -> np.ndarray:
    start = 0.3 * rng.standard_normal((rank, factor.shape[1]))
    start[0] += factor[0]
    return start


def _descend(bases: Matrices, target: np.ndarray, start: Matrices) -> Matrices:
    """Levenberg-Marquardt over all coefficients; a tiny ridge fixes what is free."""
    shapes = [factor.shape for factor in start]
    ends = np.cumsum([factor.size for factor in start])
    ridge = math.sqrt(RIDGE)

    def split(theta):
        parts = np.split(theta, ends[:-1])
        return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]

    def miss(theta):
        factors = split(theta)
        fitted = _derive(bases, factors, 0) @ factors[0].ravel()
        return np.concatenate([fitted - target, ridge * theta])

    def derive(theta):
        factors = split(theta)
        columns = [_derive(bases, factors, m) for m in range(3)]
        return np.vstack([np.hstack(columns), ridge * np.eye(ends[-1])])

    theta = np.concatenate([factor.ravel() for factor in start])
    found = least_squares(miss, theta, derive, method="lm", xtol=EXACT, ftol=EXACT,
                          gtol=EXACT, max_nfev=1000)  # fmt: skip
    return split(found.x)


def _alternate(
    bases: Matrices, target: np.ndarray, options: Options
) -> Matrices:
    """Alternating least squares: one dimension's factors at a time, never uphill."""
    factors, last = [np.eye(1, basis.shape[1]) for basis in bases], math.inf
    solve = _solve_falling if options.monotone else _solve_free
    for _ in range(options.sweeps):
        for m in range(3):
            design = _derive(bases, factors, m)
            factors[m] = solve(design, target).reshape(factors[m].shape)
        residual = design @ factors[2].ravel() - target
        squares = residual @ residual
        if last - squares <= EXACT * squares or squares <= FLOOR * (target @ target):
            return factors
        last = squares
    warnings.warn(
        f"als has not settled in {options.sweeps} sweeps; raise `sweeps`, or use lm",
        stacklevel=2,
    )
    return factors


def _solve_free(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(design, target, rcond=None)[0]


def _solve_falling(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """b_0 + sum over k of b_k (1 - u^k) with b >= 0: at least 0 on u <= 1, falling."""
    change = np.eye(design.shape[1])
    change[0, 1:], change[range(1, len(change)), range(1, len(change))] = 1, -1
    return change @ nnls(design @ change, target)[0]


# -- what is refused -------------------------------------------------------------------


def read_points(points: ArrayLike | pd.DataFrame) -> np.ndarray:
    """Measured points as float64 [N, 4]: d, w, r and accuracy; errors as in `fit`."""
    table = _read_columns(points, COLUMNS)
    _check_shares(table[:, :3])
    accuracy = table[:, 3]
    bad = np.flatnonzero(~((accuracy >= 0) & (accuracy <= 100)))
    if len(bad):
        raise ValueError(
            f"accuracy: point {bad[0]} has {accuracy[bad[0]]}, expected percent from 0 "
            "to 100; measure it again or leave it out"
        )
    if not accuracy.any():
        raise ValueError("accuracy: all are 0, there is nothing to fit; train longer")
    return table


def _read_columns(
    points: ArrayLike | pd.DataFrame, names: tuple[str, ...]
) -> np.ndarray:
    """The named columns, float64 [N, len(names)], of a table or an array."""
    if isinstance(points, pd.DataFrame):
        if "accuracy" not in points and "top1" in points:
            points = points.rename(columns={"top1": "accuracy"})
        if missing := [name for name in names if name not in points]:
            raise ValueError(
                f"points: missing columns {missing} among {list(points.columns)}; "
                f"expected {list(names)}"
            )
        points = points[list(names)]
    try:
        table = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"points: expected numbers ({error})") from None
    widths = (len(names), len(COLUMNS))
    if table.ndim != 2 or table.shape[1] not in widths or not len(table):
        raise ValueError(
            f"points: expected [N, {len(names)}] with columns {', '.join(names)}, got "
            f"{list(table.shape)}"
        )
    return table[:, : len(names)]


def _check_shares(shares: np.ndarray) -> np.ndarray:
    bad = np.argwhere(~((shares > 0) & (shares <= 1)))
    if len(bad):
        row, m = bad[0]
        raise ValueError(
            f"{DIMENSIONS[m]}: point {row} has {shares[row, m]}, expected a share in "
            "(0, 1] of the unpruned network; divide by its depth, width or side"
        )
    return shares


def _find_levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The level of each value [N], and the levels' values, ascending."""
    order = np.argsort(x, kind="stable")
    new = np.diff(x[order], prepend=-1.0) > SLACK
    level = np.empty(len(x), dtype=int)
    level[order] = np.cumsum(new) - 1
    return level, x[order][new]


def _find_degrees(shares: np.ndarray, degree: int) -> tuple[int, ...]:
    """The degree in each dimension: 0 where it does not vary."""
    return tuple(degree if len(_find_levels(x)[1]) > 1 else 0 for x in shares.T)


def _find_box(table: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest share seen, equal where a dimension does not vary."""
    ends = []
    for x in table[:, :3].T:
        values = _find_levels(x)[1]
        ends.append((x.min(), x.max()) if len(values) > 1 else (values[0], values[0]))
    low, high = zip(*ends, strict=True)
    return low, high


def _check_design(table: np.ndarray, degree: int) -> tuple[int, ...]:
    """The degree in each dimension; ValueError where the points are too few."""
    degrees = _find_degrees(table[:, :3], degree)
    if not any(degrees):
        raise ValueError(
            f"points: all {len(table)} lie at {tuple(table[0, :3])}; vary d, w or r"
        )
    levels = [_find_levels(x) for x in table[:, :3].T]
    for name, k, (_, values) in zip(DIMENSIONS, degrees, levels, strict=True):
        if len(values) < k + 1 and k:
            raise ValueError(
                f"{name}: degree {k} needs {k + 1} levels, the points have "
                f"{len(values)}; measure more of them or lower the degree"
            )
    distinct = len(np.unique([level for level, _ in levels], axis=1).T)
    if distinct < 1 + sum(degrees):
        raise ValueError(
            f"points: {distinct} distinct ones for {1 + sum(degrees)} parameters of a "
            f"product of degree {degree}; measure more or lower the degree"
        )
    return degrees


def _check_weights(weights: ArrayLike | None, count: int) -> np.ndarray:
    """Weights as float64 [N], ones for None."""
    if weights is None:
        return np.ones(count)
    found = np.asarray(weights, dtype=np.float64)
    if found.shape != (count,) or not np.all((found > 0) & (found < np.inf)):
        raise ValueError(
            f"weights: expected {count} positive numbers, one per point, got "
            f"{found.tolist()}; leave out a point that is not to count"
        )
    return found


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")
