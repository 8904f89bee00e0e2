"""The most accurate depth, width and resolution that a budget buys.

Wang et al., "Accelerate CNNs from Three Dimensions", ICML 2021: maximise the predicted
accuracy F(d, w, r) subject to C(d, w, r) <= keep, by Lagrange multipliers. Inside the
box of the data (`Map.low` to `Map.high`) that means: with elasticities
G_m = d ln F / d ln x_m and local cost exponents e_m = d ln C / d ln x_m,

    G_m = mu e_m,  but G_m >= mu e_m where x_m is at its high bound
                   and G_m <= mu e_m where it is at its low bound;  mu >= 0,

so dimensions that are free all gain the same accuracy per cost. The conditions can hold
at inferior points too: a grid of what the budget buys finds where to start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.optimize import minimize

from lib.map3d.costs import FORMULA, ROUNDING, PowerLaw, check_keep, make_relative
from lib.map3d.predictor import Map

ACTIVE = 1e-7  # relative distance from a bound or the budget that counts as on it
STATIONARY = 1e-5  # residual of the conditions up to which a point meets them
SPACING = 21  # values per dimension of the grid
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


def optimum(predictor: Map, keep: float, cost: Callable = FORMULA) -> Optimum:
    """The point of highest predicted accuracy with C <= keep inside the data's box.

    keep: share of the cost that stays, in (0, 1]; at 1 a monotone F stays unpruned.
    cost: a `PowerLaw`, or any function of three numbers d, w, r that is positive and
    does not fall with any of them; C is its value over that at (1, 1, 1), its slopes
    are differences. ValueError: keep outside (0, 1] or below the cost of the box's
    lower corner; a cost that is not so.

    Step by step in notebooks/31_map_fit.ipynb.
    """
    problem = Problem(predictor, keep, cost)
    climbed = [_climb(problem, start) for start in _list_starts(problem)]
    best, *others = _drop_copies(climbed)
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


# -- the search ------------------------------------------------------------------------


def _list_starts(problem: Problem) -> list[Point]:
    """The highest peaks of F on a grid of what the budget buys."""
    axes = [np.geomspace(low, high, SPACING) for low, high in problem.box.T]
    grid = np.array(np.meshgrid(*axes, indexing="ij"))
    bought = problem.cost(*grid) <= problem.keep * (1 + ROUNDING)
    height = np.full(bought.shape, -np.inf)
    height[bought] = problem.predictor.predict(*grid[:, bought])
    top = bought & (height == maximum_filter(height, 5))
    peaks = np.stack([*grid, height])[:, top].T.tolist()
    return _drop_copies([Point(*peak) for peak in peaks])


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
    # still ends at the best point of the grid.
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
