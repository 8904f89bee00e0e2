"""The most accurate depth, width and resolution that a budget buys.

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021: maximise the predicted
accuracy F(d, w, r) subject to C(d, w, r) <= keep, by Lagrange multipliers. Inside the
box of the data (`Map.low` to `Map.high`) that means: with elasticities
G_m = d ln F / d ln x_m and local cost exponents e_m = d ln C / d ln x_m,

    G_m = mu e_m,  but G_m >= mu e_m where x_m is at its high bound
                   and G_m <= mu e_m where it is at its low bound;  mu >= 0,

so dimensions that are free all gain the same accuracy per cost (`check_kkt`). The
conditions can hold at inferior points too: a grid over the budget finds where to start.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.ndimage import maximum_filter
from scipy.optimize import minimize

from lib.map3d.costs import (  # noqa: F401, some are only handed on
    FORMULA,
    NAMES,
    ROUNDING,
    check_keep,
    equal_split,
    inverse_compound,
    local_exponents,
    read_numbers,
    read_shares,
    single_dimension,
)
from lib.map3d.predictor import Map

ACTIVE = 1e-7  # relative distance from a bound or the budget that counts as on it
STATIONARY = (
    1e-5  # residual of the conditions up to which a point counts as meeting them
)
SPACING = 21  # values per dimension of the coarse grid inside the budget
APART = 0.05  # of the box, in logs: nearer starts are one start
COPY = 1e-4  # in logs: nearer optima are one


class Point(NamedTuple):
    """Shares d, w, r and the accuracy predicted there, in percent."""

    d: float
    w: float
    r: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Kkt:
    """How well a point meets the conditions of an optimum.

    multiplier: lambda of F - lambda (C - keep), percent per unit of relative cost: the
    slope of the best accuracy over keep. elasticity: mu = lambda C / F, percent of
    accuracy per percent of cost. At a corner both are an interval; given is its lower
    end, what a little more budget buys (its upper end where no dimension can grow).
    elasticities: G_m / e_m of d, w, r, equal to mu where free (inf where e_m = 0).
    bounds: "low", "high" or None. bound_multipliers: F_m - lambda C_m, percent per unit
    of share, what raising that bound gains: >= 0 at high, <= 0 at low, 0 where free.
    kkt_residual: the largest violation, in units of G_m; of ln C or ln x where outside.
    """

    multiplier: float
    elasticity: float
    elasticities: tuple[float, float, float]
    bounds: tuple[str | None, str | None, str | None]
    bound_multipliers: tuple[float, float, float]
    kkt_residual: float

    @property
    def interior(self) -> bool:
        """Whether no dimension is at a bound."""
        return self.bounds == (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Optimum(Kkt):
    """Shares d, w, r of the highest predicted accuracy (percent) at C <= keep.

    cost: C there, below `keep` where F, not monotone, falls with more of anything.
    others: inferior points that meet the conditions too, best first; those found, not
    all that may exist. brute: the best point of the grids, without any derivative.
    """

    d: float
    w: float
    r: float
    accuracy: float
    keep: float
    cost: float
    others: tuple[Point, ...]
    brute: Point

    @property
    def point(self) -> tuple[float, float, float]:
        return (self.d, self.w, self.r)

    @property
    def unused(self) -> float:
        """keep - cost, the share of the cost left over; 0 where less than rounding."""
        return self.keep - self.cost if self.cost < self.keep * (1 - ACTIVE) else 0.0


def optimum(
    map: Map, keep: float, cost=FORMULA, *, low=None, num: int = 201, starts: int = 6
) -> Optimum:
    """The point of highest predicted accuracy with C <= keep inside the data's box.

    keep: share of the cost that stays, in (0, 1]; at 1 a monotone F stays unpruned.
    cost: a `PowerLaw` or `Measured`. low: (d, w, r) for `map.low`, at least as high; 1
    pins a dimension. SLSQP climbs from the `starts` best peaks of two grids, num x num
    on the budget surface and a coarse one inside it; `kkt_residual`, `others` and
    `brute` say how well that went. ValueError: keep outside (0, 1] or below the cost of
    the box's lower corner; a `low` outside the box; costs not measured all over it.
    """
    if num < 2 or starts < 1:
        raise ValueError(f"num, starts: expected >= 2 and >= 1, got {num}, {starts}")
    box = find_box(map, keep, cost, low)
    seeds = _list_starts(map, keep, cost, box, num, starts)
    climbed = [_climb(map, seed, keep, cost, box) for seed in seeds]
    points = _keep_apart(climbed, COPY, starts)
    checks = [check_kkt(map, p, keep, cost, low=low) for p in points]
    pairs = zip(points[1:], checks[1:], strict=True)
    return Optimum(
        **vars(checks[0]),
        **points[0]._asdict(),
        keep=float(keep),
        cost=float(cost(*points[0][:3])),
        others=tuple(p for p, check in pairs if check.kkt_residual < STATIONARY),
        brute=seeds[0],
    )


def check_kkt(map: Map, point, keep: float, cost=FORMULA, *, low=None) -> Kkt:
    """The conditions at a point (d, w, r), whoever found it. Errors as in `optimum`.

    Where a measured cost has a kink, e_m may be any number between its two slopes.
    """
    box, x = find_box(map, keep, cost, low), np.array(point[:3], dtype=float)
    scale, spent = abs(map.predict(*x)) or 1.0, float(cost(*x))
    gains = x * np.array(map.gradient(*x)) / scale
    left, right = local_exponents(cost, *x)
    falls, rises = x > box[0] * (1 + ACTIVE), x < box[1] * (1 - ACTIVE)
    mu = 0.0
    if spent > keep * (1 - ACTIVE):
        mu = _find_price(gains, left, right, falls, rises)
    up, down = gains - mu * right, mu * left - gains  # gained by moving, at price mu
    outside = np.log([spent / keep, *(box[0] / x), *(x / box[1])])
    pull = np.select([falls & rises, falls], [0.0, -down], up) + 0.0
    names = np.select([~rises, ~falls], ["high", "low"], "")
    with np.errstate(divide="ignore", invalid="ignore"):
        elasticities = 2 * gains / (left + right)
    return Kkt(
        multiplier=mu * scale / spent,
        elasticity=mu,
        elasticities=tuple(elasticities.tolist()),
        bounds=tuple(name or None for name in names.tolist()),
        bound_multipliers=tuple((pull * scale / x).tolist()),
        kkt_residual=float(max(0, *outside, *up[rises], *down[falls])),
    )


def _find_price(gains, left, right, falls, rises) -> float:
    """The mu >= 0 that meets all three conditions, or comes nearest."""
    rises, falls = rises & (right > 0), falls & (left > 0)
    least = max(gains[rises] / right[rises], default=0.0)
    most = min(gains[falls] / left[falls], default=least)
    mu = (least + most) / 2 if least > most else least if rises.any() else most
    return max(0.0, float(mu))


# -- the budget ------------------------------------------------------------------------


def find_box(map: Map, keep: float, cost, low=None) -> np.ndarray:
    """The box to search, float64 [2, 3] of low and high; errors as in `optimum`."""
    check_keep(keep)
    low = np.array(map.low if low is None else low, dtype=float)
    if low.shape != (3,) or not (low <= map.high).all() or not map.covers(*low):
        raise ValueError(
            f"low: expected three shares in the box of the map's data, {map.low} to "
            f"{map.high}, got {low.tolist()}"
        )
    if (low < np.array(cost.low) * (1 - ROUNDING)).any():
        raise ValueError(
            f"the box begins at (d, w, r) = {low.tolist()}, the table of costs at "
            f"{list(cost.low)}; measure smaller networks, or pass a larger `low`"
        )
    least = float(cost(*low))
    if keep < least * (1 - ROUNDING):
        raise ValueError(
            f"keep {keep:.6g} is out of reach; the nearest feasible is {least:.6g}, at "
            f"the lower corner of the box, (d, w, r) = {low.tolist()}"
        )
    return np.array([low, map.high])


def trace_budget(
    map: Map, keep: float, cost=FORMULA, *, num: int = 201, low=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d, w, r and accuracy in percent over the surface C = keep, four [num, num].

    d varies along the first axis and w along the second, evenly in logs over what the
    budget leaves of the box; r follows, nan with the accuracy where it leaves the box.
    (Where r costs nothing, it varies and w or d follows.) Errors as in `optimum`.
    """
    box = find_box(map, keep, cost, low)
    *_, last = np.flatnonzero(cost.exponents)
    axes = [m for m in range(3) if m != last]
    spans = [_find_span(m, keep, cost, box) for m in axes]
    grids = np.meshgrid(*(np.geomspace(*s, num) for s in spans), indexing="ij")
    x = dict(zip(axes, grids, strict=True))
    found = cost.solve(keep, **{NAMES[m]: x[m] for m in axes})
    limits = box[:, last]
    inside = np.abs(found / found.clip(*limits) - 1) <= ROUNDING
    x[last] = np.where(inside, found.clip(*limits), np.nan)
    accuracy = np.full((num, num), np.nan)
    accuracy[inside] = map.predict(*(x[m][inside] for m in range(3)))
    return x[0], x[1], x[2], accuracy


def _find_span(m: int, keep: float, cost, box: np.ndarray) -> np.ndarray:
    """Least and largest share of dimension m on the budget surface inside the box."""
    if cost.exponents[m] == 0:
        return box[:, m]
    rest = [n for n in range(3) if n != m]
    ends = [cost.solve(keep, **{NAMES[n]: x[n] for n in rest}) for x in box[::-1]]
    return np.clip(ends, *box[:, m])


# -- the search ------------------------------------------------------------------------


def _list_starts(map, keep, cost, box, num, starts) -> list[Point]:
    """Peaks of F on the budget surface and on a grid inside it, apart, best first."""
    surface = trace_budget(map, keep, cost, num=num, low=box[0])
    axes = [np.geomspace(*box[:, m], SPACING) for m in range(3)]
    inner = np.array(np.meshgrid(*axes, indexing="ij"))
    feasible = cost(*inner) <= keep * (1 + ROUNDING)
    inner = [*inner, np.where(feasible, map.predict(*inner), np.nan)]
    peaks = np.concatenate([_find_peaks(surface, num // 10), _find_peaks(inner, 3)])
    width = np.log(box[1] / box[0])
    return _keep_apart(peaks, np.maximum(APART * width, COPY), starts)


def _find_peaks(values, window: int) -> np.ndarray:
    """The 200 highest of the points [4, ...] whose last entry none nearby exceeds."""
    values = np.array(values)
    height = np.nan_to_num(values[3], nan=-np.inf)
    top = (height == maximum_filter(height, max(window, 3))) & np.isfinite(height)
    return values[:, top].T[np.argsort(-height[top], kind="stable")][:200]


def _keep_apart(points, gap, limit: int) -> list[Point]:
    """The best points, best first, none within `gap` (in logs) of a better one."""
    kept = []
    for p in sorted(points, key=lambda p: -p[3]):
        near = (np.abs(np.log(np.divide(p[:3], q[:3]))) <= gap for q in kept)
        if len(kept) < limit and not any(np.all(close) for close in near):
            kept.append(Point(*(float(x) for x in p)))
    return kept


def _climb(map, start: Point, keep: float, cost, box: np.ndarray) -> Point:
    """The local maximum above `start`: climb in every cell it touches, and again."""
    best, before, done = start, start.accuracy - 1, None
    while best.accuracy > before + 1e-13 * abs(before):
        if done and check_kkt(map, best, keep, cost, low=box[0]).kkt_residual < ACTIVE:
            break
        before, trials = best.accuracy, [(best, done)]
        for cell in cost.list_cells(best[:3]):
            bounds = np.array([cell.low, cell.high]).clip(*np.log(box))
            if cell.low.tolist() != done:
                found = _climb_cell(map, best, keep, cell, bounds)
                trials.append((found, cell.low.tolist()))
        best, done = max(trials, key=lambda trial: trial[0].accuracy)
    return best


def _climb_cell(map, start: Point, keep: float, cell, bounds) -> Point:
    """SLSQP in y = ln (d, w, r) from `start` within one cell, where C is smooth."""
    wanted = np.log(keep)
    scale = np.abs(start[:3] * np.array(map.gradient(*start[:3]))).max() or 1.0

    def descend(y):
        x = np.exp(y)
        return -map.predict(*x) / scale, -x * np.array(map.gradient(*x)) / scale

    found = minimize(
        descend,
        np.log(start[:3]).clip(*bounds),
        jac=True,
        method="SLSQP",
        bounds=bounds.T,
        constraints={
            "type": "ineq",
            "fun": lambda y: wanted - cell.log_cost(y),
            "jac": lambda y: -cell.exponents(y),
        },
        options={"ftol": 1e-16, "maxiter": 100},
    )
    return _step_back(map, found.x, cell, bounds, wanted) or start


def _step_back(map, y, cell, bounds, wanted: float) -> Point | None:
    """The point y, moved back by rounding onto the budget; None if it is far above."""
    y = np.clip(y, *bounds)
    if not np.isfinite(y).all() or cell.log_cost(y) > wanted + ACTIVE:
        return None
    excess, slopes = max(cell.log_cost(y) - wanted, 0.0), cell.exponents(y)
    m = int(np.argmax((y - bounds[0]) * slopes))
    y[m] -= min(excess / slopes[m] if excess else 0.0, y[m] - bounds[0, m])
    x = np.exp(y)
    return Point(*x.tolist(), float(map.predict(*x)))


# -- what an optimum is worth ----------------------------------------------------------


def bootstrap_optimum(
    maps: Iterable[Map], keep: float, cost=FORMULA, *, num: int = 101
) -> pd.DataFrame:
    """The optimum of each of many maps, as fitted to resampled or noisy points.

    One row a map: d, w, r, accuracy (percent), cost, and d_low, d_high, w_low, ...,
    whether that share is at a bound of the box. Errors as in `optimum`.
    """
    rows = []
    for map in maps:
        best = optimum(map, keep, cost, num=num)
        row = {key: getattr(best, key) for key in (*NAMES, "accuracy", "cost")}
        for name, bound in zip(NAMES, best.bounds, strict=True):
            row |= {f"{name}_{end}": bound == end for end in ("low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def regret(map_true: Map, point, keep: float, cost=FORMULA):
    """Accuracy lost by taking `point` for the optimum of `map_true`, in percent.

    point: (d, w, r) or an `Optimum`, for a float; a table with columns d, w, r, as
    `bootstrap_optimum` returns, for float64 [N]. ValueError: points outside the box of
    the map or over the budget, what `optimum` refuses.
    """
    table = isinstance(point, pd.DataFrame)
    point = point.point if isinstance(point, Optimum) else point
    x = read_numbers(point) if table else np.array([point], dtype=float)[:, :3]
    spent = cost(*x.T)
    if not np.all(map_true.covers(*x.T)) or (spent > keep * (1 + ACTIVE)).any():
        raise ValueError(
            f"point: expected one in the map's box, from {map_true.low}, at a cost of "
            f"{keep:.6g} at most; the dearest costs {spent.max():.6g}"
        )
    lost = optimum(map_true, keep, cost).accuracy - map_true.predict(*x.T)
    return lost if table else float(lost[0])


def rank_lattice(
    table: pd.DataFrame, map: Map, keep: float, *, tolerance: float = 0.02
) -> pd.DataFrame:
    """Networks that exist and use the budget up, the best predicted first.

    table: d, w, r, `share` (or `macs` with a row d = w = r = 1) and whatever else
    describes a network, as `Space.lattice` makes it. Kept, with their index: rows of a
    true share in [keep - tolerance, keep]; added: share, predicted (percent), covered
    (inside the map's box; a warning where not all are). ValueError: keep outside
    (0, 1], tolerance < 0, no row in reach, what `read_shares` refuses.
    """
    check_keep(keep)
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a share >= 0, got {tolerance}")
    shares, x = read_shares(table), read_numbers(table)
    within = shares <= keep * (1 + ROUNDING)
    fit = within & (shares >= keep - tolerance - ROUNDING)
    if not fit.any():
        below = f"{shares[within].max():.4g}" if within.any() else "none"
        above = f"{shares[~within].min():.4g}" if not within.all() else "none"
        raise ValueError(
            f"no network costs {keep - tolerance:.4g} to {keep:.4g}; the nearest share "
            f"below is {below}, above {above}: change keep or tolerance"
        )
    covered = np.asarray(map.covers(*x[fit].T))
    if not covered.all():
        warnings.warn(
            f"{(~covered).sum()} of {fit.sum()} networks lie outside the box of the "
            f"map's data, from {map.low}; their accuracy is extrapolated",
            stacklevel=2,
        )
    found = pd.DataFrame(table)[fit].assign(
        share=shares[fit], predicted=map.predict(*x[fit].T), covered=covered
    )
    return found.iloc[np.lexsort((found["share"], -found["predicted"]))]
