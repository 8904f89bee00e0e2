"""Fit the accuracy predictor to measured points (d, w, r, accuracy).

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021, regress a polynomial of
degree K = 3 on pruned networks and find a product of three univariate ones (rank R = 1)
to suffice. How they solve for it is not known to us; here it is least squares.

    rank 1     F = a H_d H_w H_r, H_m = 1 + sum over k of c_mk u_m^k: 1 + 3K numbers,
               by Levenberg-Marquardt ("lm") or alternating least squares ("als")
    rank R     a sum of R such products: R (1 + 3K) numbers, by "lm" from several starts
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

from lib.map3d import solvers
from lib.map3d.predictor import DIMENSIONS, SLACK, Map, check_count

COLUMNS = (*DIMENSIONS, "accuracy")
RIDGE = 1e-8  # picks a small one among sums of products that fit alike
DEFICIENT = 1e-9  # singular values below this share of the largest count as zero

Levels = list[tuple[np.ndarray, np.ndarray]]  # per dimension, see `find_levels`


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
                check_count(name, getattr(self, name))
        count_parameters(self.rank, self.degree)
        if self.monotone and self.rank != 1:
            raise ValueError(
                f"monotone: only a product can be held monotone, got rank {self.rank}; "
                "use rank 1"
            )
        object.__setattr__(self, "solver", self.solver or self._solvers[0])
        if self.solver not in self._solvers:
            raise ValueError(
                f"solver: rank {self.rank}, monotone {self.monotone} is solved by "
                f"{' or '.join(self._solvers)}, got {self.solver!r}"
            )

    @property
    def _solvers(self) -> tuple[str, ...]:
        if self.rank is None:
            return ("lstsq",)
        if self.monotone:
            return ("als",)
        return ("lm", "als") if self.rank == 1 else ("lm",)


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
    for the full tensor. degree: K. solver: "lm" (taken for None) or "als" of rank 1,
    "lm" of a higher one, "lstsq" of the full tensor. weights: [N], relative inverse
    variances; a large one pins its point, and `residual_sd` is that of weight 1.
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
    return fit_table(check_points(points), options, weights)


def fit_table(
    table: np.ndarray, options: Options, weights: ArrayLike | None = None
) -> Map:
    """`fit` of a float64 table [N, 4], whose accuracies may lie outside [0, 100]."""
    weights = _check_weights(weights, len(table))
    levels = [find_levels(x) for x in table[:, :3].T]
    degrees = _check_levels(levels, options.degree)
    determined, wanted = count_determined(levels, degrees, options.rank)
    if determined < wanted:
        _warn_unidentified(options, len(table), determined, wanted)
    box = [tuple(values[end] for _, values in levels) for end in (0, -1)]
    root, scale = np.sqrt(weights), np.abs(table[:, 3]).max()
    bases = _make_bases(table, degrees, box[0])
    bases[0] = root[:, None] * bases[0]  # and so weighs every product of the three
    tensor, bound = _solve(
        bases, root * table[:, 3] / scale, options, determined < wanted
    )
    residual = root * table[:, 3] - scale * solvers.cross(bases) @ tensor.ravel()
    freedom = len(table) - determined + bound
    noise = math.sqrt(residual @ residual / freedom) if freedom > 0 else math.nan
    coefficients = np.zeros((options.degree + 1,) * 3)
    coefficients[tuple(map(slice, tensor.shape))] = scale * tensor
    return Map(coefficients, box[0], options.degree, options.rank, options.monotone,
               options.solver, len(table), noise, box[1])  # fmt: skip


def _solve(
    bases: solvers.Matrices, target: np.ndarray, options: Options, loose: bool
) -> tuple[np.ndarray, int]:
    """The tensor in u, and how many of its parameters a bound holds.

    loose: the points do not determine all.
    """
    if options.rank is None:
        flat = np.linalg.lstsq(solvers.cross(bases), target, rcond=None)[0]
        return flat.reshape([basis.shape[1] for basis in bases]), 0
    if options.rank > 1:
        factors = solvers.solve_sum(
            bases, target, rank=options.rank, ridge=RIDGE if loose else 0.0,
            starts=options.starts, seed=options.seed,
        )  # fmt: skip
    elif options.solver == "lm":
        factors = solvers.solve_product(bases, target)
    else:
        factors = solvers.alternate(
            bases, target, monotone=options.monotone, sweeps=options.sweeps
        )
    bound = sum(np.count_nonzero(factor == 0) for factor in factors)
    return solvers.combine(factors), bound if options.monotone else 0


def _make_bases(
    table: np.ndarray, degrees: tuple[int, ...], low: tuple[float, ...]
) -> solvers.Matrices:
    """Powers 0..K_m of u_m at the points, [N, K_m + 1] each."""
    spans = [1 - x if k else 1.0 for x, k in zip(low, degrees, strict=True)]
    unit = (1 - table[:, :3]) / spans
    return [polyvander(u, k) for u, k in zip(unit.T, degrees, strict=True)]


# -- what the points determine ---------------------------------------------------------


def count_parameters(rank: int | None, degree: int) -> int:
    """Free parameters of a map: R (1 + 3K), or (K + 1)^3 for rank None.

    Of the 3R (K + 1) numbers in R products, 2R only move a constant from one factor to
    another. ValueError: rank or degree below 1, or a rank with as many parameters as
    the full tensor.
    """
    check_count("degree", degree)
    full = (degree + 1) ** 3
    if rank is None:
        return full
    check_count("rank", rank)
    count = rank * (1 + 3 * degree)
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
    the derivatives of F at the points in all coefficients of the factors, which are
    drawn at random (with a fixed seed): almost all factors have this rank. Compare
    `count_parameters`; a dimension that does not vary takes its own from both.
    ValueError: as in `fit` for shares, shapes, rank and degree.
    """
    count_parameters(rank, degree)
    shares = _check_shares(_read_columns(points, DIMENSIONS))
    levels = [find_levels(x) for x in shares.T]
    return count_determined(levels, _find_degrees(levels, degree), rank)[0]


def count_determined(
    levels: Levels, degrees: tuple[int, ...], rank: int | None
) -> tuple[int, int]:
    """Parameters that the points determine, and that a full grid would.

    Powers of u are replaced by polynomials orthonormal over the levels: they span the
    same, and their rank shows at any degree.
    """
    pairs = zip(levels, degrees, strict=True)
    bases = [np.linalg.qr(polyvander(1 - x, k))[0][level] for (level, x), k in pairs]
    places = np.indices([k + 1 for k in degrees]).reshape(3, -1)
    grid = [np.eye(k + 1)[at] for k, at in zip(degrees, places, strict=True)]
    return _measure_rank(bases, rank), _measure_rank(grid, rank)


def _measure_rank(bases: solvers.Matrices, rank: int | None) -> int:
    """Rank of the derivatives of the predictions, at factors drawn at random."""
    if rank is None:
        jacobian = solvers.cross(bases)
    else:
        draw = np.random.default_rng(0).standard_normal
        factors = [draw((rank, basis.shape[1])) for basis in bases]
        jacobian = np.hstack([solvers.derive(bases, factors, m) for m in range(3)])
    return int(np.linalg.matrix_rank(jacobian, rtol=DEFICIENT))


def find_levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The level of each share [N], and the levels' values, ascending.

    Shares closer than 1e-9 are on one level.
    """
    order = np.argsort(x, kind="stable")
    new = np.diff(x[order], prepend=-1.0) > SLACK
    level = np.empty(len(x), dtype=int)
    level[order] = np.cumsum(new) - 1
    return level, x[order][new]


def _find_degrees(levels: Levels, degree: int) -> tuple[int, ...]:
    """The degree in each dimension: 0 where it does not vary."""
    return tuple(degree if len(values) > 1 else 0 for _, values in levels)


def _warn_unidentified(
    options: Options, count: int, determined: int, wanted: int
) -> None:
    warnings.warn(
        f"rank {options.rank}, degree {options.degree}: the {count} points determine "
        f"{determined} of {wanted} parameters (rank of the Jacobian), the others are "
        "kept small; add points that prune two or three of d, w, r together, or lower "
        "rank or degree",
        UnidentifiedWarning,
        stacklevel=4,
    )


# -- what is refused -------------------------------------------------------------------


def check_points(points: ArrayLike | pd.DataFrame) -> np.ndarray:
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
        if "accuracy" not in points:
            points = points.rename(columns={"top1": "accuracy"})
        if missing := [name for name in names if name not in points]:
            raise ValueError(
                f"points: missing columns {missing} among {list(points.columns)}; "
                f"expected {list(names)}"
            )
        points = points[list(names)]
    try:
        table = np.array(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"points: expected a table of numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] not in (len(names), 4) or not len(table):
        raise ValueError(
            f"points: expected [N, {len(names)}], columns {', '.join(names)}, got "
            f"{list(table.shape)}; one row per measured network"
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


def _check_levels(levels: Levels, degree: int) -> tuple[int, ...]:
    """The degree in each dimension; ValueError where the points are too few."""
    degrees = _find_degrees(levels, degree)
    if not any(degrees):
        place = ", ".join(f"{values[0]:g}" for _, values in levels)
        raise ValueError(
            f"points: all {len(levels[0][0])} lie at ({place}); vary d, w or r"
        )
    for name, (_, values) in zip(DIMENSIONS, levels, strict=True):
        if 1 < len(values) <= degree:
            raise ValueError(
                f"{name}: degree {degree} needs {degree + 1} levels, the points have "
                f"{len(values)}; measure more of them or lower the degree"
            )
    distinct, needed = len({*zip(*(level for level, _ in levels), strict=True)}), 1
    needed += sum(degrees)
    if distinct < needed:
        raise ValueError(
            f"points: {distinct} different ones, but a product of degree {degree} has "
            f"{needed} parameters; measure more or lower the degree"
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
