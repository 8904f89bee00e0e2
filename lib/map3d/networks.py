"""Networks that exist, within a budget: the best predicted, and rival ways to spend it.

No network has 5.5 blocks. Rounding the shares of an optimum one by one misses the
budget by several percent; choosing from the list of all networks (`Space.lattice`) with
their counted multiply-adds does not.
"""

import warnings

import numpy as np
import pandas as pd

from lib.map3d.costs import (
    NAMES,
    ROUNDING,
    PowerLaw,
    check_keep,
    equal_split,
    fit_exponents,
    inverse_compound,
    read_numbers,
)
from lib.map3d.predictor import Map
from lib.settings import check_float

SINGLE = {"depth": "d", "width": "w", "resolution": "r"}
RIVALS = (*SINGLE, "equal", "compound")


def rank_lattice(
    table: pd.DataFrame, predictor: Map, keep: float, *, tolerance: float = 0.02
) -> pd.DataFrame:
    """Networks that exist and use the budget up, the best predicted first.

    table: d, w, r, `share` and whatever else describes a network, as `Space.lattice`
    makes it. Kept, with their index: rows of a share in [keep - tolerance, keep];
    added: predicted (percent), covered (inside the map's box; a warning where not all
    are). Of equal predictions the cheaper network is first, of equally cheap ones that
    higher up in the table. ValueError: keep outside (0, 1], tolerance < 0, no row in
    reach, columns that are missing or not > 0.
    """
    found = _take_affordable(table, keep, tolerance)
    x = read_numbers(found)
    covered = np.asarray(predictor.covers(*x.T))
    if not covered.all():
        warnings.warn(
            f"{(~covered).sum()} of {len(found)} networks lie outside the box of the "
            f"map's data, from {predictor.low}; their accuracy is extrapolated",
            stacklevel=2,
        )
    found = found.assign(predicted=predictor.predict(*x.T), covered=covered)
    return found.iloc[np.lexsort((found["share"], -found["predicted"]))]


def pick_rivals(
    lattice: pd.DataFrame,
    keep: float,
    *,
    cost: PowerLaw | None = None,
    tolerance: float = 0.02,
) -> pd.DataFrame:
    """The network of the lattice that each rival strategy ends at, indexed by name.

    "depth", "width", "resolution": that dimension alone, the network whose MACs come
    nearest to `keep`, below or above it: where a dimension has coarse steps, none may
    fit, and a rival that spends a little more is the harder one to beat (see `share`).
    "equal": all three take the same share of the cost; "compound":
    EfficientNet's scaling reversed. Both are rounded to the nearest network in the logs
    of d, w, r whose share lies in [keep - tolerance, keep]. `cost`: the law by which
    equal and compound reckon (default: fitted to the lattice). ValueError where a
    strategy cannot meet the budget, a single dimension by a tenth of `keep`.
    """
    cost = cost or fit_exponents(lattice)
    rows = {name: _pick_single(lattice, keep, name) for name in SINGLE}
    near = _take_affordable(lattice, keep, tolerance)
    rows["equal"] = _pick_nearest(near, equal_split(keep, cost))
    rows["compound"] = _pick_nearest(near, inverse_compound(keep, cost))
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="strategy"))


def _take_affordable(table, keep: float, tolerance: float) -> pd.DataFrame:
    """Rows of a share in [keep - tolerance, keep]; ValueError where there is none."""
    keep, tolerance = check_keep(keep), check_float("tolerance", tolerance, 0)
    shares = read_numbers(table, ["share"])[:, 0]
    within = shares <= keep * (1 + ROUNDING)
    fitting = within & (shares >= keep - tolerance - ROUNDING)
    if not fitting.any():
        below = f"{shares[within].max():.4g}" if within.any() else "none"
        above = f"{shares[~within].min():.4g}" if not within.all() else "none"
        raise ValueError(
            f"no network costs {keep - tolerance:.4g} to {keep:.4g}; the nearest share "
            f"below is {below}, above {above}: change keep or tolerance"
        )
    return pd.DataFrame(table)[fitting]


def _pick_single(lattice: pd.DataFrame, keep: float, name: str) -> pd.Series:
    others = [axis for axis in NAMES if axis != SINGLE[name]]
    line = lattice[(lattice[others] == 1).all(axis=1)]
    if line["share"].min() > keep * 1.1:
        raise ValueError(
            f"{name} alone cannot reach {keep:.4g} of the MACs; the least it reaches "
            f"is {line['share'].min():.4f}"
        )
    return line.loc[(line["share"] - keep).abs().idxmin()]


def _pick_nearest(rows: pd.DataFrame, point) -> pd.Series:
    away = np.log(read_numbers(rows) / np.array(point))
    return rows.iloc[int((away**2).sum(axis=1).argmin())]
