"""What a network of depth d, width w and resolution r costs, relative to the unpruned.

d, w and r are the shares kept of a network's depth, width and image side; C(d, w, r) is
the share kept of its cost, C(1, 1, 1) = 1. Wang et al., "Accelerate CNNs from Three
Dimensions", ICML 2021, take C = d w^2 r^2 (`FORMULA`); a network's own exponents come
from `fit_exponents`, its own table from `Measured`.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from numpy.polynomial.polynomial import polyder, polyval3d
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import brentq

NAMES = ("d", "w", "r")
DIMENSIONS = ("depth", "width", "resolution")
COLLINEAR = 100.0  # variance inflation beyond which two dimensions count as one
ROUNDING = 1e-9  # relative excess over a bound or a budget that counts as none


class Cell(NamedTuple):
    """A box of y = ln (d, w, r) where ln C is a polynomial of t = (y - high) / unit."""

    low: np.ndarray
    high: np.ndarray
    unit: np.ndarray
    coefficients: np.ndarray  # [2, 2, 2], the others [3]

    def log_cost(self, y: np.ndarray) -> float:
        """ln C at y [3]."""
        return float(polyval3d(*((y - self.high) / self.unit), self.coefficients))

    def exponents(self, y: np.ndarray) -> np.ndarray:
        """d ln C / d y at y [3], float64 [3]."""
        t = (y - self.high) / self.unit
        slopes = [polyval3d(*t, polyder(self.coefficients, axis=m)) for m in range(3)]
        return np.array(slopes) / self.unit


@dataclass(frozen=True)
class PowerLaw:
    """C = d^a w^b r^c with (a, b, c) = `exponents`, finite and >= 0, not all zero.

    (1, 2, 0) counts parameters, (1, 1, 2) activation memory or a width that leaves the
    residual stream whole. ValueError for other exponents.
    """

    exponents: tuple[float, float, float] = (1.0, 2.0, 2.0)
    low: ClassVar = (0.0, 0.0, 0.0)  # the least shares it is known for

    def __post_init__(self):
        e = np.asarray(self.exponents, dtype=float)
        if e.shape != (3,) or not (np.isfinite(e).all() and e.min() >= 0 < e.max()):
            raise ValueError(
                f"exponents: expected three finite numbers >= 0 for {NAMES}, not all "
                f"zero, got {self.exponents}"
            )
        object.__setattr__(self, "exponents", tuple(e.tolist()))

    def __call__(self, d, w, r):
        """Share of the cost at shares d, w, r, which broadcast. ValueError: not > 0."""
        a, b, c = self.exponents
        d, w, r = check_positive(d, w, r)
        return d**a * w**b * r**c

    def solve(self, share: float, **others) -> np.ndarray:
        """The third of d, w, r where C is `share`, the two `others` given (broadcast).

        `solve(0.5, d=1, w=1)` is r. Above 1 where even 1 costs less; for an exponent of
        0, inf where the others cost no more than `share` and 0 where they cost more.
        """
        axis, known = sort_axes(share, others)
        one, other = (x ** self.exponents[m] for m, x in known.items())
        rest = one * other
        if self.exponents[axis] == 0:
            return np.where(rest <= share * (1 + ROUNDING), np.inf, 0.0)
        return (share / rest) ** (1 / self.exponents[axis])

    def list_cells(self, point) -> list[Cell]:
        """The one cell there is."""
        coefficients = np.zeros((2, 2, 2))
        coefficients[[1, 0, 0], [0, 1, 0], [0, 0, 1]] = self.exponents
        return [Cell(np.full(3, -np.inf), np.zeros(3), np.ones(3), coefficients)]


FORMULA = PowerLaw()  # Wang et al. 2021: C = d w^2 r^2


def local_exponents(cost, d: float, w: float, r: float) -> np.ndarray:
    """d ln C / d ln (d, w, r) below and above a point, [2, 3]; they differ at kinks."""
    cells = cost.list_cells((d, w, r))
    return np.array([cells[k].exponents(np.log([d, w, r])) for k in (0, -1)])


def fit_exponents(points) -> PowerLaw:
    """The power law, C(1, 1, 1) = 1, nearest to measured costs in logs.

    points: a table of d, w, r > 0 and `share`, or `macs` with a row d = w = r = 1 to
    divide by. ValueError: columns or the row missing, numbers not > 0, fewer than three
    other points, a dimension that does not vary or that others explain but for a
    hundredth of its variance, as under compound scaling; an exponent below 0.
    """
    x, shares = np.log(read_numbers(points)), read_shares(points)
    x, shares = x[x.any(1)], shares[x.any(1)]
    if len(x) < 3:
        raise ValueError(
            f"{len(x)} points besides d = w = r = 1 do not fix three exponents; "
            "measure at least three, moving one dimension at a time"
        )
    check_independent(x)
    e = np.linalg.lstsq(x, np.log(shares), rcond=None)[0]
    return PowerLaw(np.where(np.abs(e) < ROUNDING, 0.0, e))


def check_independent(logs: np.ndarray) -> None:
    """ValueError unless each column of ln (d, w, r) [N, 3] tells its own story."""
    for name, moves in zip(DIMENSIONS, logs.any(0), strict=True):
        if not moves:
            raise ValueError(f"{name} does not vary; measure networks where it does")
    scaled = logs / np.linalg.norm(logs, axis=0)
    _, sizes, axes = np.linalg.svd(scaled, full_matrices=False)
    if sizes[-1] ** 2 * COLLINEAR <= 1:
        involved = [n for n, a in zip(DIMENSIONS, axes[-1], strict=True) if a**2 > 0.05]
        raise ValueError(
            f"{' and '.join(involved)} move together (collinear in logs, as under "
            "compound scaling), so their exponents cannot be told apart; add points "
            "that move one dimension alone"
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """A cost read from a table of measured networks, interpolated between them.

    table: d, w, r and `share` or `macs`, a row for every combination of the values that
    each takes, two or more up to 1; `Space.lattice` makes one. ln C is linear in ln d,
    ln w, ln r: exact at the rows, a power law in between, with kinks at the rows.
    ValueError: rows missing or doubled, costs that do not grow with every dimension.
    """

    table: pd.DataFrame
    axes: tuple[np.ndarray, ...] = field(init=False, repr=False)  # ln d, ln w, ln r
    logs: np.ndarray = field(init=False, repr=False)  # ln C on their grid

    def __post_init__(self):
        axes, logs = _build_grid(read_numbers(self.table), read_shares(self.table))
        for m, name in enumerate(NAMES):
            if np.diff(logs, axis=m).min() <= 0:
                raise ValueError(
                    f"the cost does not grow with {name} everywhere; average repeated "
                    "measurements, or smooth them with `fit_exponents`"
                )
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "logs", logs)

    @property
    def low(self) -> tuple[float, float, float]:
        """The least (d, w, r) in the table."""
        return tuple(float(np.exp(axis[0])) for axis in self.axes)

    @property
    def exponents(self) -> tuple[float, float, float]:
        """Those of the power law nearest to the table (`fit_exponents`)."""
        return fit_exponents(self.table).exponents

    def __call__(self, d, w, r):
        """Share of the cost; d, w, r broadcast. ValueError: not within the table."""
        return np.exp(self._look_up(self._take_logs(d, w, r)))

    def solve(self, share: float, **others) -> np.ndarray:
        """The third of d, w, r where C is `share`, the two `others` given (broadcast).

        inf where even 1 costs less, 0 where even the table's least value costs more.
        """
        axis, known = sort_axes(share, others)
        nodes, wanted = self.axes[axis], np.log(share)
        costs = self._look_up(self._take_logs(*known.values(), axes=[*known]), [*known])
        costs = np.moveaxis(costs, -1, 0)
        below = np.clip((costs <= wanted).sum(0) - 1, 0, len(nodes) - 2)
        left = np.take_along_axis(costs, below[None], 0)[0]
        right = np.take_along_axis(costs, below[None] + 1, 0)[0]
        part = ((wanted - left) / (right - left)).clip(0, 1)
        found = np.exp(nodes[below] + part * np.diff(nodes)[below])
        found = np.where(costs[-1] < wanted - ROUNDING, np.inf, found)
        return np.where(costs[0] > wanted + ROUNDING, 0.0, found)

    def list_cells(self, point) -> list[Cell]:
        """Cells of the table that touch the point (d, w, r), 1 to 8, lowest first."""
        y, starts, cells = self._take_logs(*point), [], []
        for nodes, at in zip(self.axes, y, strict=True):
            k = np.searchsorted(nodes, [at - ROUNDING, at + ROUNDING]) - 1
            starts.append(np.unique(k.clip(0, len(nodes) - 2)))
        for corner in product(*starts):
            at = tuple(slice(k, k + 2) for k in corner)
            low, high = np.transpose([x[k] for x, k in zip(self.axes, at, strict=True)])
            values = self.logs[at]
            for m in range(3):  # v + (v - u) t, from u at t = -1 and v at t = 0
                u, v = np.moveaxis(values, m, 0)
                values = np.stack([v, v - u], m)
            cells.append(Cell(low, high, high - low, values))
        return cells

    def _take_logs(self, *shares, axes=(0, 1, 2)) -> np.ndarray:
        """ln of the shares, [..., 3], moved onto the table where rounding left it."""
        y = np.log(np.stack(np.broadcast_arrays(*check_positive(*shares)), -1))
        low = np.array([self.axes[m][0] for m in axes])
        outside = ((y < low - ROUNDING) | (y > ROUNDING)).any(-1)
        if outside.any():
            raise ValueError(
                f"the cost is known from d, w, r = {_write(self.low)} to 1, got "
                f"{_write(np.exp(y[outside][0]))}: measure there too"
            )
        return y.clip(low, 0.0)

    def _look_up(self, y: np.ndarray, known=(0, 1, 2)) -> np.ndarray:
        """ln C at ln shares of the `known` axes, along all nodes of one left out."""
        logs = np.moveaxis(self.logs, known, range(len(known)))
        found = RegularGridInterpolator([self.axes[m] for m in known], logs)(y)
        return found.reshape((*y.shape[:-1], *logs.shape[len(known) :]))


def _build_grid(x: np.ndarray, shares: np.ndarray):
    """Axes ln (d, w, r) and ln shares on their grid; ValueError where it has holes."""
    found = []
    for name, column in zip(NAMES, x.T, strict=True):
        _, first, where = np.unique(column.round(9), True, True)
        values = np.append(column[first[:-1]], round(column.max(), 9))
        found.append((values, where))
        if len(values) < 2 or values[-1] != 1:
            raise ValueError(
                f"{name} takes the values {_write(values)}; expected two or more, the "
                "last of them 1: measure networks there, or use a `PowerLaw`"
            )
    axes, where = zip(*found, strict=True)
    grid, counts = np.zeros((2, *map(len, axes)))
    np.add.at(counts, where, 1)
    if (counts != 1).any():
        first = np.argwhere(counts != 1)[0]
        raise ValueError(
            f"expected a row for each of {' x '.join(map(str, grid.shape))} d, w, r: "
            f"{(counts == 0).sum()} are missing, {(counts > 1).sum()} doubled, the "
            f"first at {_write(x[k] for x, k in zip(axes, first, strict=True))}"
        )
    grid[where] = np.log(shares)
    return tuple(map(np.log, axes)), grid


# -- points that only the cost decides -------------------------------------------------


def single_dimension(keep: float, cost=FORMULA) -> dict[str, tuple[float, ...]]:
    """The (d, w, r) that reach the budget by one dimension alone, by its name.

    For 0.5 of the formula: depth (0.5, 1, 1), width (1, 0.707, 1), resolution
    (1, 1, 0.707). A dimension that costs nothing (exponent 0) is left out. ValueError:
    keep outside (0, 1], or below what a measured dimension reaches.
    """
    check_keep(keep)
    found = {}
    for m in np.flatnonzero(cost.exponents):
        x, point = _solve_alone(keep, cost, m), np.ones(3)
        point[m] = min(max(x, cost.low[m]), 1)
        if x == 0:
            raise ValueError(
                f"{DIMENSIONS[m]} alone does not reach {keep:.4g} of the cost; the "
                f"nearest measured is {float(cost(*point)):.4g}, at {_write(point)}"
            )
        found[DIMENSIONS[m]] = tuple(point.tolist())
    return found


def equal_split(keep: float, cost=FORMULA) -> tuple[float, float, float]:
    """The (d, w, r) at `keep` whose shares would each alone leave the same cost.

    For 0.5 of the formula (0.794, 0.891, 0.891). A dimension that costs nothing stays
    at 1. ValueError: keep outside (0, 1], or below what a table reaches this way.
    """
    check_keep(keep)
    costly = np.flatnonzero(cost.exponents)

    def place(t: float) -> np.ndarray:
        point = np.ones(3)
        point[costly] = [_solve_alone(np.exp(t), cost, m) for m in costly]
        return point

    return _reach(keep, cost, place, np.log(keep))


def inverse_compound(
    keep: float, cost=FORMULA, *, alpha=1.2, beta=1.1, gamma=1.15
) -> tuple[float, float, float]:
    """EfficientNet's compound scaling run backwards: (alpha, beta, gamma)^-phi.

    phi solves C = keep, for the formula -ln keep / ln(alpha beta^2 gamma^2). For 0.5
    (0.824, 0.904, 0.862). ValueError: as in `equal_split`; a base below 1, or none
    above 1 in a dimension that costs anything. Bases: Tan & Le, ICML 2019.
    """
    check_keep(keep)
    bases = np.array([alpha, beta, gamma], dtype=float)
    rate = float(np.log(bases.clip(1)) @ cost.exponents)
    if not (np.isfinite(rate) and rate > 0 and bases.min() >= 1):
        raise ValueError(
            "alpha, beta, gamma: expected numbers >= 1 of which one that costs "
            f"something exceeds 1, got {bases.tolist()}"
        )
    return _reach(keep, cost, lambda t: bases**t, 4 * np.log(keep) / rate)


def _solve_alone(share: float, cost, m: int) -> float:
    return float(cost.solve(share, **{n: 1.0 for n in NAMES if n != NAMES[m]}))


def _reach(keep: float, cost, place, start: float) -> tuple[float, float, float]:
    """place(t) for the t in [start, 0] at which it costs `keep`."""
    low = np.array(cost.low)

    def exceed(t: float) -> float:
        return float(np.log(cost(*np.clip(place(t), low, 1))) - np.log(keep))

    t = brentq(exceed, start, 0.0, xtol=1e-15) if exceed(start) < 0 else start
    point = place(t)
    if exceed(t) > ROUNDING or (point < low * (1 - ROUNDING)).any():
        raise ValueError(
            f"keep {keep:.4g} asks for less than the table's least d, w, r, "
            f"{_write(low)} at {float(cost(*low)):.4g}; measure less or keep more"
        )
    return tuple(np.clip(point, low, 1).tolist())


# -- what is read and refused ----------------------------------------------------------


def read_shares(table) -> np.ndarray:
    """Shares of the cost [N], from `share` or from `macs` over that of d = w = r = 1.

    ValueError: neither column, no such row for `macs`, a `share` other than 1 there,
    numbers that are not > 0.
    """
    column = "share" if "share" in pd.DataFrame(table).columns else "macs"
    values = read_numbers(table, [column])[:, 0]
    whole = values[(np.abs(read_numbers(table) - 1) <= ROUNDING).all(1)]
    if column == "macs" and not len(whole):
        raise ValueError("no row has d = w = r = 1 to divide macs by; add it, or share")
    if column == "share" and len(whole) and np.abs(whole - 1).max() > 1e-6:
        raise ValueError(f"share is {whole[0]:.6g} at d = w = r = 1; divide all by it")
    return values / whole[0] if column == "macs" else values


def read_numbers(table, columns=NAMES) -> np.ndarray:
    """Columns of a table, float64 [N, columns]; ValueError unless finite and > 0."""
    table = pd.DataFrame(table)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(
            f"expected columns d, w, r and macs or share; {missing} not among "
            f"{list(table.columns)}"
        )
    values = table[list(columns)].to_numpy(dtype=float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)).all(1))
    if len(bad):
        raise ValueError(
            f"columns {list(columns)}: expected finite numbers > 0, got "
            f"{values[bad[0]].tolist()} in row {bad[0]} ({len(bad)} such rows)"
        )
    return values


def _write(point) -> str:
    return f"({', '.join(f'{x:.4g}' for x in point)})"


def check_positive(*shares) -> list[np.ndarray]:
    """Shares as float64 arrays; ValueError unless every one is > 0."""
    found = [np.asarray(x, dtype=float) for x in shares]
    if not all((x > 0).all() for x in found):
        least = min(float(np.min(x)) for x in found)
        raise ValueError(f"shares of d, w, r must be > 0, got {least:.4g}")
    return found


def check_keep(keep: float) -> None:
    """ValueError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected the share of the cost in (0, 1], got {keep}")


def sort_axes(share: float, others: dict) -> tuple[int, dict[int, np.ndarray]]:
    """The axis that is not among `others`, and the others by axis; ValueError."""
    if not share > 0:
        raise ValueError(f"share of the cost must be > 0, got {share}")
    left = [m for m, name in enumerate(NAMES) if name not in others]
    if len(left) != 1 or len(others) != 2:
        raise ValueError(f"expected two of {NAMES} to be given, got {sorted(others)}")
    known = [m for m in range(3) if m not in left]
    values = check_positive(*(others[NAMES[m]] for m in known))
    return left[0], dict(zip(known, values, strict=True))
