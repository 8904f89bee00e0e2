"""What a network of depth d, width w and resolution r costs, and which fit a budget.

d, w and r are the shares kept of a network's depth, width and image side; C(d, w, r) is
the share kept of its cost, C(1, 1, 1) = 1. Wang et al., "Accelerate CNNs from Three
Dimensions", ICML 2021, take C = d w^2 r^2 (`FORMULA`); a network's own exponents come
from `fit_exponents`, and `optimum` takes any function of (d, w, r) besides.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.map3d.predictor import Map
from lib.settings import ABOVE_ONE, ABOVE_ZERO, check_float

NAMES = ("d", "w", "r")
COMPOUND = (1.2, 1.1, 1.15)  # EfficientNet's bases of d, w, r: Tan & Le, ICML 2019
COLLINEAR = 0.1  # least singular value of three unit columns that count as independent
ROUNDING = 1e-9  # relative excess over a bound or a budget that counts as none


@dataclass(frozen=True)
class PowerLaw:
    """C = d^a w^b r^c with (a, b, c) = `exponents`, finite and >= 0, not all zero.

    (1, 2, 0) counts parameters, (1, 1, 2) activation memory or a width that leaves the
    residual stream whole. ValueError for other exponents.
    """

    exponents: tuple[float, float, float] = (1.0, 2.0, 2.0)

    def __post_init__(self):
        e = np.asarray(self.exponents, dtype=float)
        if e.shape != (3,) or not (np.isfinite(e).all() and e.min() >= 0 < e.max()):
            raise ValueError(
                f"exponents: expected three finite numbers >= 0 for {NAMES}, not all "
                f"zero, got {self.exponents}"
            )
        object.__setattr__(self, "exponents", tuple(e.tolist()))

    def __call__(self, d, w, r):
        """Share of the cost at shares d, w, r, which broadcast."""
        a, b, c = self.exponents
        return np.power(d, a) * np.power(w, b) * np.power(r, c)


FORMULA = PowerLaw()  # Wang et al. 2021: C = d w^2 r^2


def fit_exponents(points) -> PowerLaw:
    """The power law, C(1, 1, 1) = 1, nearest to measured costs in logs.

    points: a table of d, w, r and `share`, all > 0. ValueError: another table, a share
    other than 1 at d = w = r = 1, dimensions that do not move or move together, as
    under compound scaling; an exponent below 0.
    """
    logs = np.log(read_numbers(points, (*NAMES, "share")))
    x, y = logs[:, :3], logs[:, 3]
    pruned = x.any(axis=1)
    if np.abs(y[~pruned]).max(initial=0) > 1e-6:
        raise ValueError("share is not 1 at d = w = r = 1; divide all by it")
    x, y = x[pruned], y[pruned]
    still = [name for name, column in zip(NAMES, x.T, strict=True) if not column.any()]
    if still:
        raise ValueError(
            f"{', '.join(still)} never below 1; measure networks where it is"
        )
    # Least squares would split among exponents what moves together, in a way that no
    # cost decides. Only the directions of the columns tell them apart, so lengths are
    # taken out; norm -2 is the least singular value, 0 where one is made of the others.
    if len(x) < 3 or np.linalg.norm(x / np.linalg.norm(x, axis=0), -2) < COLLINEAR:
        raise ValueError(
            f"d, w and r move together in these {len(x)} pruned networks, as under "
            "compound scaling, so their exponents cannot be told apart; add points "
            "that move one dimension alone"
        )
    e = np.linalg.lstsq(x, y, rcond=None)[0]
    return PowerLaw(tuple(np.where(np.abs(e) < ROUNDING, 0.0, e)))


def equal_split(keep: float, cost: PowerLaw = FORMULA) -> tuple[float, float, float]:
    """The (d, w, r) at `keep` whose shares would each alone leave the same cost.

    For 0.5 of the formula (0.794, 0.891, 0.891). A dimension that costs nothing stays
    at 1. ValueError: keep outside (0, 1].
    """
    keep = check_keep(keep)
    e = np.array(cost.exponents)
    costly = e > 0
    shares = np.ones(3)
    shares[costly] = keep ** (1 / (costly.sum() * e[costly]))
    return tuple(shares.tolist())


def inverse_compound(
    keep: float, cost: PowerLaw = FORMULA
) -> tuple[float, float, float]:
    """EfficientNet's compound scaling run backwards: `COMPOUND`^-phi with C = keep.

    For 0.5 of the formula (0.824, 0.904, 0.862). ValueError: keep outside (0, 1].
    """
    keep = check_keep(keep)
    phi = -np.log(keep) / (np.log(COMPOUND) @ cost.exponents)
    return tuple((np.array(COMPOUND) ** -phi).tolist())


# -- any function as a cost ------------------------------------------------------------


def make_relative(cost: Callable, box: np.ndarray) -> Callable:
    """`cost` over cost(1, 1, 1), for arrays: what an optimum is searched with.

    cost: any function of three numbers d, w, r, in any unit, called point by point; it
    is tried, and refused, on 5 x 5 x 5 points of box, low and high (d, w, r) [2, 3].
    """
    if isinstance(cost, PowerLaw):
        return cost
    if not callable(cost):
        raise ValueError(
            f"cost: expected a PowerLaw or a function of (d, w, r), got {cost!r}"
        )
    ask = np.vectorize(cost, otypes=[float])
    grid = np.meshgrid(*np.linspace(box[0], box[1], 5).T, indexing="ij")
    tried, whole = ask(*grid), float(ask(1.0, 1.0, 1.0))
    bad = [x for x in (whole, *tried.flat) if not 0 < x < np.inf]
    if bad:
        raise ValueError(f"cost: expected finite numbers > 0, got {bad[0]:.4g}")
    for m, name in enumerate(NAMES):
        if np.diff(np.log(tried), axis=m).min() < -ROUNDING:
            raise ValueError(f"cost: falls as {name} grows; it must not, in any share")
    if np.ptp(np.log(tried)) <= ROUNDING:
        raise ValueError("cost: the same all over the box, there is nothing to save")
    return lambda d, w, r: ask(d, w, r) / whole


# -- what is read and refused ----------------------------------------------------------


def read_numbers(table, columns=NAMES) -> np.ndarray:
    """Columns of a table, float64 [N, columns]; ValueError unless finite and > 0."""
    table = pd.DataFrame(table)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"columns {missing} are not among {list(table.columns)}")
    values = table[list(columns)].to_numpy(dtype=float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)).all(axis=1))
    if len(bad):
        raise ValueError(
            f"columns {list(columns)}: expected finite numbers > 0, got "
            f"{values[bad[0]].tolist()} in row {bad[0]} ({len(bad)} such rows)"
        )
    return values


def check_keep(keep: float) -> float:
    """The share of the cost as a float; ValueError unless 0 < keep <= 1."""
    return check_float("keep, the share of the cost,", keep, ABOVE_ZERO, ABOVE_ONE)


# -- networks that exist ---------------------------------------------------------------

# No network has 5.5 blocks, and rounding the shares of an optimum one by one misses the
# budget by several percent: these choose from the list of all (`Space.lattice`).
SINGLE = {"depth": "d", "width": "w", "resolution": "r"}
RIVALS = (*SINGLE, "equal", "compound")


def rank_lattice(
    table: pd.DataFrame, predictor: Map, keep: float, *, tolerance: float = 0.02
) -> pd.DataFrame:
    """Networks that exist and use the budget up, the best predicted first.

    table: d, w, r, `share` and whatever else describes a network, as `Space.lattice`
    makes it. Kept, with their index: rows of a share in [keep - tolerance, keep];
    added: predicted (percent), covered (inside the map's box; a warning where not all
    are). Of equal predictions the cheaper network is first. ValueError: keep
    outside (0, 1], tolerance < 0, no row in reach, another table.
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
    nearest to `keep`, below or above it. "equal", "compound": `equal_split` and
    `inverse_compound`, rounded to the nearest network in the logs of d, w, r whose
    share lies in [keep - tolerance, keep]. `cost`: the law by which those two reckon
    (default: fitted to the lattice). ValueError where a strategy cannot meet the
    budget, a single dimension by a tenth of `keep`.
    """
    cost = cost or fit_exponents(lattice)
    # A single dimension has coarse steps, none of which may fit: a rival that spends a
    # little more than the budget is the harder one to beat.
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
