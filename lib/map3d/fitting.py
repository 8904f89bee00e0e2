"""Fit the accuracy predictor to measured points (d, w, r, accuracy).

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021, regress a polynomial of
degree K = 3 on pruned networks and find a product of three univariate ones (rank R = 1)
to suffice. How they solve for it is not known to us; here it is least squares.

    rank 1     F = a H_d H_w H_r, H_m = 1 + sum over k of c_mk u_m^k: 1 + 3K numbers
    rank R     a sum of R such products: R (1 + 3K) numbers, from several starts

where u = (1 - x) / span as in `lib.map3d.predictor`. Points that prune one dimension at
a time identify 1 + 3K numbers, whatever the rank: a fit that asks for more warns.
"""

import math
import warnings

import numpy as np
import pandas as pd
from numpy.polynomial.legendre import legvander
from numpy.polynomial.polynomial import polyvander
from numpy.typing import ArrayLike

from lib.map3d import solvers
from lib.map3d.costs import NAMES
from lib.map3d.predictor import SLACK, Map
from lib.settings import check_int

COLUMNS = (*NAMES, "accuracy")
RIDGE = 1e-8  # picks a small one among sums of products that fit alike
DEFICIENT = 1e-9  # singular values below this share of the largest count as zero


class UnidentifiedWarning(UserWarning):
    """The points do not determine all parameters of the fit."""


def fit(
    points: ArrayLike | pd.DataFrame,
    *,
    rank: int = 1,
    degree: int = 3,
    monotone: bool = False,
) -> Map:
    """Least-squares polynomial of accuracy over depth, width and resolution.

    points: [N, 4], columns d, w, r in (0, 1] and accuracy in percent, or a DataFrame
    with these names ("top1" also serves as accuracy). rank: products in the sum.
    degree: K. monotone (rank 1): F never rises in the box of the data as a share falls.
    A dimension that does not vary gets the factor 1. Where the points determine fewer
    parameters than the map has, `UnidentifiedWarning` tells how many, and the solution
    is one of small norm.
    ValueError: a table that is none of shares and percents, fewer distinct points than
    rank 1 needs (1 + K per dimension that varies), K levels or fewer in a dimension
    that varies, none that varies, options that do not go together.
    Source: Wang et al. 2021; the basis and the solvers are ours.

    Step by step in notebooks/31_map_fit.ipynb.
    """
    return fit_table(check_points(points), rank=rank, degree=degree, monotone=monotone)


def fit_table(
    table: np.ndarray, *, rank: int = 1, degree: int = 3, monotone: bool = False
) -> Map:
    """`fit` of a float64 table [N, 4], whose accuracies may lie outside [0, 100]."""
    if rank is None or (monotone and rank != 1):
        raise ValueError(f"rank: expected a number, 1 if monotone, got {rank}")
    count_parameters(rank, degree)  # refuses what is no rank and no degree
    degrees = _check_levels(table, degree)
    determined, wanted = _count_determined(table, degrees, rank)
    if determined < wanted:
        warnings.warn(
            f"rank {rank}, degree {degree}: the {len(table)} points determine "
            f"{determined} of {wanted} parameters, the others are kept small; add "
            "points that prune two or three of d, w, r together, or lower either",
            UnidentifiedWarning,
            stacklevel=3,
        )
    low, high = table[:, :3].min(axis=0), table[:, :3].max(axis=0)
    spans = [1 - x if k else 1.0 for x, k in zip(low, degrees, strict=True)]
    units = ((1 - table[:, :3]) / spans).T
    bases = [polyvander(u, k) for u, k in zip(units, degrees, strict=True)]
    scale = np.abs(table[:, 3]).max()
    target, held = table[:, 3] / scale, 0
    if monotone:
        factors = solvers.alternate(bases, target)
        # What the constraint holds at 0 was not free to fit noise.
        held = sum(int((f == 0).sum()) for f in factors)
    else:
        ridge = RIDGE if determined < wanted else 0.0
        factors = solvers.solve_sum(bases, target, rank=rank, ridge=ridge)
    residual = scale * (target - solvers.predict(bases, factors))
    # By what the points determine, not by what the map has: the rest fits nothing.
    freedom = len(table) - determined + held
    noise = math.sqrt(residual @ residual / freedom) if freedom > 0 else math.nan
    tensor = np.einsum("qi,qj,qk->ijk", *factors)
    coefficients = np.zeros((degree + 1,) * 3)
    coefficients[tuple(map(slice, tensor.shape))] = scale * tensor
    return Map(coefficients, low, high, rank, monotone, noise)


# -- what the points determine ---------------------------------------------------------


def count_parameters(rank: int | None, degree: int) -> int:
    """Free parameters of a map: R (1 + 3K), or (K + 1)^3 for rank None.

    ValueError: rank or degree below 1, a rank with as many parameters as the full
    tensor.
    """
    check_int("degree", degree, 1)
    full = (degree + 1) ** 3
    if rank is None:
        return full
    # Of the 3R (K + 1) numbers in R products, 2R only move a constant from one factor
    # to another.
    count = check_int("rank", rank, 1) * (1 + 3 * degree)
    if count >= full:
        raise ValueError(
            f"rank: {rank} has {count} parameters at degree {degree}, the full tensor "
            f"{full}; take fewer products"
        )
    return count


def jacobian_rank(
    points: ArrayLike | pd.DataFrame, rank: int | None = 1, degree: int = 3
) -> int:
    """How many parameters of a map the places of the points can determine.

    points: [N, 3] or [N, 4] with columns d, w, r, or a DataFrame; accuracies are not
    read, so that a design can be judged before it is measured. Compare
    `count_parameters`; a dimension that does not vary takes its own from both. Errors
    as in `fit`.
    """
    count_parameters(rank, degree)
    shares = _check_shares(_read_columns(points, NAMES))
    return _count_determined(shares, _find_degrees(shares, degree), rank)[0]


def _count_determined(
    table: np.ndarray, degrees: tuple[int, ...], rank: int | None
) -> tuple[int, int]:
    """Parameters that the points determine, and that a full grid would."""
    # With Legendre polynomials instead of powers of u: they span the same, and are so
    # far from parallel that their rank shows at any degree.
    low, high = table[:, :3].min(axis=0), table[:, :3].max(axis=0)
    centred = (2 * table[:, :3] - low - high) / np.where(low < high, high - low, 1)
    grid = np.indices([k + 1 for k in degrees]).reshape(3, -1).T
    grid = np.cos(np.pi * grid / np.maximum(degrees, 1))  # in [-1, 1], K + 1 levels
    counts = []
    for places in (centred, grid):
        bases = [legvander(x, k) for x, k in zip(places.T, degrees, strict=True)]
        counts.append(_measure_rank(bases, rank))
    return counts[0], counts[1]


def _measure_rank(bases: solvers.Matrices, rank: int | None) -> int:
    """Rank of the derivatives of F at the points, which is what they determine of it.

    Of a sum of products it depends on the factors, but is the same for almost all of
    them: one random draw is as good as any.
    """
    if rank is None:
        jacobian = np.einsum("ni,nj,nk->nijk", *bases).reshape(len(bases[0]), -1)
    else:
        draw = np.random.default_rng(0).standard_normal
        factors = [draw((rank, basis.shape[1])) for basis in bases]
        jacobian = np.hstack([solvers.derive(bases, factors, m) for m in range(3)])
    return int(np.linalg.matrix_rank(jacobian, rtol=DEFICIENT))


def _find_degrees(table: np.ndarray, degree: int) -> tuple[int, ...]:
    """The degree in each dimension: 0 where shares are the same to 1e-9."""
    return tuple(degree if np.ptp(x) > SLACK else 0 for x in table[:, :3].T)


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
    if accuracy.any() and accuracy.max() <= 1:
        raise ValueError(
            f"accuracy: all are at most {accuracy.max():g}, as shares are; expected "
            "percent from 0 to 100, multiply by 100"
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
            raise ValueError(f"points: no columns {missing} in {list(points.columns)}")
        points = points[list(names)]
    try:
        table = np.array(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"points: expected a table of numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] not in (len(names), 4) or not len(table):
        wanted = ", ".join(names)
        raise ValueError(f"points: expected [N: {wanted}], got {list(table.shape)}")
    return table[:, : len(names)]


def _check_shares(shares: np.ndarray) -> np.ndarray:
    bad = np.argwhere(~((shares > 0) & (shares <= 1)))
    if len(bad):
        row, m = bad[0]
        raise ValueError(
            f"{NAMES[m]}: point {row} has {shares[row, m]}, expected a share in "
            "(0, 1] of the unpruned network; divide by its depth, width or side"
        )
    return shares


def _check_levels(table: np.ndarray, degree: int) -> tuple[int, ...]:
    """The degree in each dimension; ValueError where the points are too few."""
    degrees, shares = _find_degrees(table, degree), table[:, :3].round(9)
    if not any(degrees):
        raise ValueError(f"points: all lie at {shares[0].tolist()}; vary d, w or r")
    for name, column in zip(NAMES, shares.T, strict=True):
        levels = len(np.unique(column))
        if 1 < levels <= degree:
            raise ValueError(
                f"{name}: degree {degree} needs {degree + 1} levels, the points have "
                f"{levels}; measure more of them or lower the degree"
            )
    distinct = len(np.unique(shares, axis=0))
    if distinct < 1 + sum(degrees):
        raise ValueError(
            f"points: {distinct} different ones, but a product of degree {degree} has "
            f"{1 + sum(degrees)} parameters; measure more or lower the degree"
        )
    return degrees
