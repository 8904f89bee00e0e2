"""How far to trust a fitted accuracy predictor: held-out errors and a bootstrap.

Neither is in Wang et al. 2021. A residual says how well the points are met, which with
13 points and 10 parameters is no news; these say how well the next point would be.
"""

import math
import warnings

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lib.map3d.fit import Options, UnidentifiedWarning, check_points, fit, fit_table
from lib.map3d.predictor import Map


def leave_one_out(
    points: ArrayLike | pd.DataFrame, *, weights: ArrayLike | None = None, **options
) -> np.ndarray:
    """Prediction less measurement at each point, from a fit of all others: [N].

    In points of accuracy. points, weights, options: as in `fit`. Where only one point
    has the lowest share of a dimension, its own prediction is an extrapolation, as a
    rule the worst. Duplicates of a point stay in; average them first for an honest
    error. What the points do not determine is warned of once, for the whole table.
    ValueError: as in `fit`, also for the points without one of them, which it names.
    """
    table, settings = check_points(points), Options(**options)
    fit(table, weights=weights, **options)
    errors = []
    for n, held in enumerate(table):
        rest = None if weights is None else np.delete(np.asarray(weights), n)
        try:
            found = _fit_quietly(np.delete(table, n, 0), settings, rest)
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
    weights: ArrayLike | None = None,
    **options,
) -> list[Map]:
    """Maps fitted to the fitted values plus normal noise: a parametric bootstrap.

    points, weights, options: as in `fit`. repeats: how many. sd: standard deviation of
    the noise of a point of weight 1, in points of accuracy, e.g. over training seeds;
    None takes the residual one of the fit, which is itself rough with few degrees of
    freedom. A point of weight v gets sd / sqrt(v). seed: of the noise and the fits.
    What the points do not determine is warned of once.
    ValueError: as in `fit`; repeats below 1, a negative sd, none where the fit has no
    degrees of freedom.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats: expected an integer of 1 or more, got {repeats!r}")
    table, settings = check_points(points), Options(**options, seed=seed)
    base = fit(table, weights=weights, seed=seed, **options)
    sd = base.residual_sd if sd is None else float(sd)
    if not 0 <= sd < math.inf:
        raise ValueError(
            f"sd: expected 0 or more points of accuracy, got {sd}; a fit without "
            "degrees of freedom has none, pass that over training seeds"
        )
    spread = sd if weights is None else sd / np.sqrt(np.asarray(weights))
    rng, fitted, maps = np.random.default_rng(seed), base.predict(*table.T[:3]), []
    for _ in range(repeats):
        drawn = fitted + spread * rng.standard_normal(len(table))
        drawn = np.column_stack([table[:, :3], drawn])
        maps.append(_fit_quietly(drawn, settings, weights))
    return maps


def _fit_quietly(table: np.ndarray, options: Options, weights) -> Map:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnidentifiedWarning)
        return fit_table(table, options, weights)
