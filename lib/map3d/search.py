"""The most accurate depth, width and resolution that a budget buys.

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021: maximise the predicted
accuracy F(d, w, r) subject to C(d, w, r) <= keep, by Lagrange multipliers. Inside the
box of the data (`Map.low` to `Map.high`) that means: with elasticities
G_m = d ln F / d ln x_m and local cost exponents e_m = d ln C / d ln x_m,

    G_m = mu e_m,  but G_m >= mu e_m where x_m is at its high bound
                   and G_m <= mu e_m where it is at its low bound;  mu >= 0,

so dimensions that are free all gain the same accuracy per cost. The conditions can hold
at inferior points too: a grid over the budget finds where to start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.optimize import minimize
from scipy.optimize.elementwise import find_root

from lib.map3d.costs import FORMULA, ROUNDING, PowerLaw, check_keep, make_relative
from lib.map3d.predictor import Map
from lib.settings import check_int

ACTIVE = 1e-7  # relative distance from a bound or the budget that counts as on it
STATIONARY = 1e-5  # residual of the conditions up to which a point meets them
SPACING = 21  # values per dimension of the coarse grid inside the budget
STARTS = 5  # places to climb from
COPY = 1e-4  # in logs: nearer optima are one
STEP = 1e-6  # in logs, of the differences that stand in for the slopes of a cost


class Point(NamedTuple):
    """Shares d, w, r and the accuracy predicted there, in percent."""

    d: float
    w: float
    r: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Shares d, w, r of the highest predicted accuracy (percent) at C <= keep.

    cost: C there, below `keep` where F, not monotone, falls with more of anything.
    multiplier: lambda of F - lambda (C - keep), percent per unit of relative cost: the
    slope of the best accuracy over keep. elasticity: mu = lambda C / F, percent of
    accuracy per percent of cost; of the interval that both are at a corner, see
    `_find_price`. elasticities: G_m / e_m of d, w, r, equal to mu where free (inf where
    e_m = 0). bounds: "low", "high" or None per dimension. kkt_residual: the largest
    violation of the conditions, in units of G_m; not small where C has a kink or a
    step, at which no slope is right. others: inferior points that meet the conditions
    too, best first; those found, not all that may exist.
    """

    d: float
    w: float
    r: float
    accuracy: float
    keep: float
    cost: float
    multiplier: float
    elasticity: float
    elasticities: tuple[float, float, float]
    bounds: tuple[str | None, str | None, str | None]
    kkt_residual: float
    others: tuple[Point, ...]

    @property
    def point(self) -> tuple[float, float, float]:
        """(d, w, r)."""
        return (self.d, self.w, self.r)

    @property
    def interior(self) -> bool:
        """Whether no dimension is at a bound."""
        return self.bounds == (None, None, None)

    @property
    def unused(self) -> float:
        """keep - cost, the share of the cost left over; 0 where less than rounding."""
        return self.keep - self.cost if self.cost < self.keep * (1 - ACTIVE) else 0.0


def optimum(
    predictor: Map, keep: float, cost: Callable = FORMULA, *, num: int = 61
) -> Optimum:
    """The point of highest predicted accuracy with C <= keep inside the data's box.

    keep: share of the cost that stays, in (0, 1]; at 1 a monotone F stays unpruned.
    cost: a `PowerLaw`, or any function of three numbers d, w, r that is positive and
    does not fall with any of them; C is its value over that at (1, 1, 1), its slopes
    are differences. num: of the grid on the budget surface, per side. ValueError: keep
    outside (0, 1] or below the cost of the box's lower corner; a cost that is not so.

    Step by step in notebooks/31_map_fit.ipynb.
    """
    problem = Problem(predictor, keep, cost)
    starts = _list_starts(problem, check_int("num", num, 2))
    best, *others = _drop_copies([_climb(problem, start) for start in starts])
    residuals = [check_conditions(problem, p)["kkt_residual"] for p in others]
    pairs = zip(others, residuals, strict=True)
    return Optimum(
        **best._asdict(),
        **check_conditions(problem, best),
        keep=float(keep),
        cost=float(problem.cost(*best[:3])),
        others=tuple(p for p, residual in pairs if residual < STATIONARY),
    )


class Problem:
    """Maximise F over the data's box subject to C <= keep; errors as in `optimum`."""

    def __init__(self, predictor: Map, keep: float, cost: Callable):
        keep = check_keep(keep)
        if not hasattr(predictor, "low"):
            kind = type(predictor).__name__
            raise ValueError(f"predictor: expected a Map of `fit`, got a {kind}")
        self.predictor, self.keep = predictor, keep
        self.box = np.array([predictor.low, predictor.high], dtype=float)  # [2, 3]
        self.cost = make_relative(cost, self.box)
        least = float(self.cost(*self.box[0]))
        if keep < least * (1 - ROUNDING):
            raise ValueError(
                f"keep {keep:.6g} is out of reach; the nearest feasible is {least:.6g},"
                " at the lower corner of the box of the data, (d, w, r) = "
                f"{self.box[0].tolist()}"
            )

    def excess(self, y: np.ndarray) -> np.ndarray:
        """ln C - ln keep at y = ln (d, w, r), [3, ...]: above 0 over the budget."""
        return np.log(self.cost(*np.exp(y))) - np.log(self.keep)

    def exponents(self, y: np.ndarray) -> np.ndarray:
        """d ln C / d y at y [3], float64 [3]; a cost may be unknown outside the box."""
        if isinstance(self.cost, PowerLaw):
            return np.array(self.cost.exponents)
        ends = [np.diag((y + s).clip(*np.log(self.box)) - y) for s in (-STEP, STEP)]
        below, above = (self.excess(y[:, None] + end) for end in ends)
        spans = np.diag(ends[1] - ends[0])
        return np.divide(above - below, spans, where=spans > 0, out=np.zeros(3))

    def gains(self, x: np.ndarray, scale: float) -> np.ndarray:
        """x_m F_m / scale at x [3]: G_m where scale is F."""
        return x * np.array(self.predictor.gradient(*x)) / scale

    def point(self, x: np.ndarray) -> Point:
        """A place with its accuracy."""
        return Point(*(float(v) for v in x), float(self.predictor.predict(*x)))


def check_conditions(problem: Problem, point: Point) -> dict:
    """The conditions of an optimum at a point: the fields of `Optimum` about them."""
    x, (low, high) = np.array(point[:3]), problem.box
    y, scale = np.log(x), abs(point.accuracy) or 1.0
    gains, e, excess = problem.gains(x, scale), problem.exponents(y), problem.excess(y)
    # The active set: a bound or a budget that a point lies on pushes back, so only the
    # directions that are open have to gain nothing. A budget that is not used up has
    # no price.
    falls, rises = x > low * (1 + ACTIVE), x < high * (1 - ACTIVE)
    mu = _find_price(gains, e, falls, rises) if excess > -ACTIVE else 0.0
    pull = gains - mu * e  # gained by growing at price mu: 0 where free to move
    violations = [float(excess), *pull[rises], *-pull[falls]]
    bounds = [
        None if up and down else "low" if up else "high"
        for up, down in zip(rises, falls, strict=True)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        elasticities = gains / e
    return {
        "multiplier": mu * scale / float(problem.cost(*x)),
        "elasticity": mu,
        "elasticities": tuple(elasticities.tolist()),
        "bounds": tuple(bounds),
        "kkt_residual": max(0.0, *map(float, violations)),
    }


def _find_price(gains, e, falls, rises) -> float:
    """The mu >= 0 that meets all three conditions, or comes nearest.

    Every dimension that can still grow asks for mu >= G / e, or growing it would pay;
    every one that can still fall asks for mu <= G / e. At a corner an interval is left:
    its lower end is what a little more budget buys, the upper end where none can grow.
    """
    rises, falls = rises & (e > 0), falls & (e > 0)
    least = max(gains[rises] / e[rises], default=0.0)
    most = min(gains[falls] / e[falls], default=least)
    # least > most only away from an optimum: the middle violates both the least
    mu = (least + most) / 2 if least > most else least if rises.any() else most
    return max(0.0, float(mu))


# -- the budget ------------------------------------------------------------------------


def trace_budget(
    predictor: Map, keep: float, cost: Callable = FORMULA, *, num: int = 201
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d, w, r and accuracy in percent over the surface C = keep, four [num, num].

    d varies along the first axis and w along the second, evenly in logs over what the
    budget leaves of the box; r follows, nan with the accuracy where it leaves the box.
    (Where r costs nothing, it varies and w or d follows.) Errors as in `optimum`.
    """
    return _trace_surface(Problem(predictor, keep, cost), num)


def _trace_surface(problem: Problem, num: int):
    # The dimension that the others leave to the budget must cost something; a cost need
    # not say which do, so each is tried by itself at its low.
    low, high = np.log(problem.box)
    shorter = np.where(np.eye(3, dtype=bool), low, high)
    costly = problem.excess(shorter.T) < problem.excess(high) - ROUNDING
    last = int(max(np.flatnonzero(costly), default=2))
    axes = [m for m in range(3) if m != last]
    spans = []  # the ends of the surface: where the other two are at their bounds
    for m in axes:
        ends = [float(_solve(problem, m, place)) for place in (high, low)]
        spans.append(np.where(np.isnan(ends), (low[m], high[m]), ends))
    y = np.empty((3, num, num))
    y[axes] = np.meshgrid(*(np.linspace(*ends, num) for ends in spans), indexing="ij")
    y[last] = _solve(problem, last, y)
    d, w, r = np.exp(y)
    return d, w, r, problem.predictor.predict(d, w, r)  # nan in, nan out


def _solve(problem: Problem, m: int, y: np.ndarray) -> np.ndarray:
    """y_m that meets the budget, the others of y [3, ...] given; nan: none there."""
    others = [y[n] for n in range(3) if n != m]

    def exceed(t, *rest):
        place = [*rest[:m], t, *rest[m:]]
        found = problem.excess(np.stack(np.broadcast_arrays(*place)))
        return np.where(np.abs(found) <= ROUNDING, 0.0, found)  # met at a bound

    found = find_root(exceed, tuple(np.log(problem.box[:, m])), args=tuple(others))
    return np.where(found.success, found.x, np.nan)


# -- the search ------------------------------------------------------------------------


def _list_starts(problem: Problem, num: int) -> list[Point]:
    """The highest peaks of F on the budget surface, and the best of a grid inside."""
    surface = np.stack(_trace_surface(problem, num))
    height = np.nan_to_num(surface[3], nan=-np.inf)
    top = (height == maximum_filter(height, max(num // 10, 3))) & np.isfinite(height)
    peaks = [Point(*row) for row in surface[:, top].T.tolist()]
    axes = [np.geomspace(low, high, SPACING) for low, high in problem.box.T]
    inner = np.array(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    inner = inner[:, problem.cost(*inner) <= problem.keep * (1 + ROUNDING)]
    inside = problem.point(inner[:, problem.predictor.predict(*inner).argmax()])
    return [*_drop_copies(peaks)[: STARTS - 1], inside]


def _drop_copies(points: list[Point]) -> list[Point]:
    """Best first, none where a better one is already; at most `STARTS`."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: -p.accuracy):
        near = (np.abs(np.log(np.divide(p[:3], q[:3]))).max() <= COPY for q in kept)
        if len(kept) < STARTS and not any(near):
            kept.append(p)
    return kept


def _climb(problem: Problem, start: Point) -> Point:
    """The local maximum above `start`: SLSQP again and again, while it gains."""
    # Nothing below the start is taken, so a cost with steps, on which SLSQP is lost,
    # still ends at the best point of the grids.
    best, before = start, -np.inf
    while best.accuracy > before + 1e-13 * abs(best.accuracy):
        before = best.accuracy
        if check_conditions(problem, best)["kkt_residual"] < ACTIVE:
            break
        x = _run_slsqp(problem, best)
        if np.isfinite(x).all() and problem.excess(np.log(x)) <= ROUNDING:
            best = max(best, problem.point(x), key=lambda p: p.accuracy)
    return best


def _run_slsqp(problem: Problem, start: Point) -> np.ndarray:
    """Where SLSQP ends in y = ln (d, w, r), in which a power law's budget is linear."""
    # Of slope 1 at the start: SLSQP's tolerance is absolute.
    bounds = np.log(problem.box)
    scale = float(np.abs(problem.gains(np.array(start[:3]), 1.0)).max()) or 1.0

    def descend(y):
        x = np.exp(y)
        return -problem.predictor.predict(*x) / scale, -problem.gains(x, scale)

    found = minimize(
        descend,
        np.log(start[:3]).clip(*bounds),
        jac=True,
        method="SLSQP",
        bounds=bounds.T,
        constraints={
            "type": "ineq",
            "fun": lambda y: -problem.excess(y.clip(*bounds)),
            "jac": lambda y: -problem.exponents(y.clip(*bounds)),
        },
        options={"ftol": 1e-14, "maxiter": 100},
    )
    return np.exp(found.x).clip(*problem.box)
