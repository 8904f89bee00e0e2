"""How far to trust a fitted predictor and its optimum: held-out errors, a bootstrap.

None of it is in Wang et al. 2021. A residual says how well the points are met, which
with 13 points and 10 parameters is no news; these say how well the next would be.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from lib.map3d.costs import FORMULA, NAMES, read_numbers
from lib.map3d.fitting import UnidentifiedWarning, check_points, fit, fit_table
from lib.map3d.predictor import Map
from lib.map3d.search import ACTIVE, Problem, optimum
from lib.messages import check_choice
from lib.settings import check_int


def leave_one_out(points: ArrayLike | pd.DataFrame, **options: Any) -> np.ndarray:
    """Prediction less measurement at each point, from a fit of all others: [N].

    In points of accuracy; options and errors as in `fit`. A point that alone has the
    lowest share of a dimension is extrapolated. Duplicates of a point stay in; average
    them first for an honest error.
    """
    table = check_points(points)
    fit(table, **options)
    errors = []
    for n, held in enumerate(table):
        try:
            found = _fit_quietly(np.delete(table, n, 0), **options)
        except ValueError as error:
            raise ValueError(f"without point {n}: {error}") from None
        errors.append(found.predict(*held[:3]) - held[3])
    return np.array(errors)


def bootstrap_maps(
    points: ArrayLike | pd.DataFrame,
    *,
    repeats: int = 200,
    seed: int = 0,
    sd: float | None = None,
    **options: Any,
) -> list[Map]:
    """Maps fitted to the fitted values plus normal noise: a parametric bootstrap.

    points, options: as in `fit`. repeats: how many. sd: standard deviation of the noise
    in points of accuracy, e.g. over training seeds; None takes the residual one of the
    fit, which is itself rough with few degrees of freedom. seed: of the noise.
    ValueError: as in `fit`; repeats below 1, a negative sd, none where the fit has no
    degrees of freedom.
    """
    check_int("repeats", repeats, 1)
    table = check_points(points)
    base = fit(table, **options)
    sd = base.residual_sd if sd is None else float(sd)
    if not 0 <= sd < math.inf:
        raise ValueError(
            f"sd: expected 0 or more points of accuracy, got {sd}; a fit without "
            "degrees of freedom has none, pass that over training seeds"
        )
    # Not by drawing points again: with a dozen of them most draws miss a level of some
    # dimension, and determine no product.
    rng, fitted, maps = np.random.default_rng(seed), base.predict(*table.T[:3]), []
    for _ in range(repeats):
        drawn = fitted + sd * rng.standard_normal(len(table))
        maps.append(_fit_quietly(np.column_stack([table[:, :3], drawn]), **options))
    return maps


def _fit_quietly(table: np.ndarray, **options: Any) -> Map:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnidentifiedWarning)
        return fit_table(table, **options)


def bootstrap_optimum(
    maps: Iterable[Map], keep: float, cost: Callable = FORMULA
) -> pd.DataFrame:
    """The optimum of each of many maps, as fitted to resampled or noisy points.

    One row a map: d, w, r, accuracy (percent), cost, and d_low, d_high, w_low, ...,
    whether that share is at a bound of the box.
    """
    rows = []
    for fitted in maps:
        best = optimum(fitted, keep, cost)
        row = {key: getattr(best, key) for key in (*NAMES, "accuracy", "cost")}
        for name, bound in zip(NAMES, best.bounds, strict=True):
            row |= {f"{name}_{end}": bound == end for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def regret(
    truth: Map, points: pd.DataFrame, keep: float, cost: Callable = FORMULA
) -> np.ndarray:
    """Accuracy lost by taking each point for the optimum of `truth`: percent, [N].

    points: a table with columns d, w, r, as `bootstrap_optimum` returns. ValueError:
    points outside the box of the map or over the budget.
    """
    best, x = optimum(truth, keep, cost), read_numbers(points)
    spent = Problem(truth, keep, cost).cost(*x.T)
    if not np.all(truth.covers(*x.T)) or (spent > keep * (1 + ACTIVE)).any():
        raise ValueError(
            f"points: expected them in the map's box, from {truth.low}, at a cost of "
            f"{keep:.6g} at most; the dearest costs {spent.max():.6g}"
        )
    return best.accuracy - truth.predict(*x.T)


def find_misfit(points: pd.DataFrame, form: str = "product") -> dict[str, float]:
    """What a form misses on networks that several bases have measured: an F test.

    points: columns d, w, r, top1 (percent), base_id; every network on every base.
    form "product": accuracy is a curve of d times one of w times one of r, of any
    shape, and bases differ by a factor; "lines": on the axes it falls linearly in
    each, and bases differ by a constant. Returned: `misfit`, the root mean square (by
    degrees of freedom) of what the form leaves of the networks' mean accuracies, in
    points; `noise`, what chance alone would leave; `p`, of the test for lack of fit;
    `n`, the number of bases. ValueError: another form, one base, networks that some
    bases lack, as many parameters as networks.
    """
    check_choice("form", form, ("product", "lines"))
    if form == "lines":
        points = points[(points[list(NAMES)] < 1).sum(axis=1) <= 1]
    cells = points.pivot_table("top1", list(NAMES), "base_id", aggfunc="mean")
    networks, n = cells.shape
    if n < 2 or not (cells > 0).all(axis=None):  # NaN is not above 0
        raise ValueError(
            f"points: expected every network on two bases or more, above 0 %, got "
            f"{len(points)} measurements of {networks} networks on {n}"
        )
    value, shares, scale = cells.to_numpy(), cells.index.to_frame(index=False), 1.0
    if form == "product":  # in logs a sum, and a base's factor a constant
        value, scale = np.log(value), value.mean()
        shares = pd.get_dummies(shares.astype(str), drop_first=True)
    # Networks are the unit of the test: what is left of their means, against how bases
    # disagree about them.
    means = value.mean(axis=1)
    design = np.column_stack([np.ones(networks), shares.to_numpy(float)])
    left = means - design @ np.linalg.lstsq(design, means, rcond=None)[0]
    noise = value - means[:, None]
    noise = noise - noise.mean(axis=0)
    free, chance = networks - np.linalg.matrix_rank(design), (networks - 1) * (n - 1)
    if free == 0:
        raise ValueError(f"points: {networks} networks fix the form, none tests it")
    lack, error = (left**2).sum() / free, (noise**2).sum() / chance / n
    return {
        "misfit": scale * math.sqrt(lack), "noise": scale * math.sqrt(error),
        "p": float(stats.f.sf(lack / error, free, chance)), "n": n,
    }  # fmt: skip
