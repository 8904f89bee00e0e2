"""Other ways to spend the same budget: the baselines of a joint pruning."""

import numpy as np
import pandas as pd

from lib.map3d.costs import PowerLaw, equal_split, fit_exponents, inverse_compound

SINGLE = ("depth", "width", "resolution")
RIVALS = (*SINGLE, "equal", "compound")


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
    of d, w, r whose share lies in [keep - tolerance, keep]. `lattice` is what
    `Space.lattice` makes, `cost` the law by which equal and compound reckon (default:
    fitted to the lattice). Raises `ValueError` where a strategy cannot meet the budget,
    naming the least share that it reaches: a single dimension by a tenth of `keep`.
    """
    cost = cost or fit_exponents(lattice)
    rows = {name: _pick_single(lattice, keep, name) for name in SINGLE}
    near = lattice[lattice["share"].between(keep - tolerance, keep + 1e-9)]
    if near.empty:
        raise ValueError(
            f"no network has a share of MACs in [{keep - tolerance:.4g}, {keep:.4g}]; "
            f"the nearest: {_find_nearest(lattice['share'], keep):.4f}"
        )
    rows["equal"] = _pick_nearest(near, equal_split(keep, cost))
    rows["compound"] = _pick_nearest(near, inverse_compound(keep))
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="strategy"))


def _pick_single(lattice: pd.DataFrame, keep: float, name: str) -> pd.Series:
    others = [x for x in "dwr" if x != dict(zip(SINGLE, "dwr", strict=True))[name]]
    line = lattice[(lattice[others] == 1).all(axis=1)]
    if line["share"].min() > keep * 1.1:
        raise ValueError(
            f"{name} alone cannot reach {keep:.4g} of the MACs; the least it reaches "
            f"is {line['share'].min():.4f}"
        )
    return line.loc[(line["share"] - keep).abs().idxmin()]


def _pick_nearest(rows: pd.DataFrame, point) -> pd.Series:
    away = np.log(rows[["d", "w", "r"]].to_numpy() / np.array(point))
    return rows.iloc[int((away**2).sum(1).argmin())]


def _find_nearest(shares: pd.Series, keep: float) -> float:
    return float(shares.iloc[(shares - keep).abs().argmin()])
