"""The accuracy predictor: a polynomial in depth, width and resolution.

Wang et al., "Accelerate CNNs from Three Dimensions: A Comprehensive Pruning Framework",
ICML 2021: accuracy as a polynomial F(d, w, r) of degree K in each of the three shares
that are kept, all in (0, 1] and 1 for the unpruned network. Here its basis is centred
at the unpruned network and scaled by the box of the data,

    F = sum over i, j, k of C_ijk u_d^i u_w^j u_r^k,   u_m = (1 - x_m) / span_m,

so that C_000 is the unpruned accuracy and u = 1 the lowest value seen. `lib.map3d.fit`
makes such maps; of rank 1 they are products F = a H_d H_w H_r.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval3d
from numpy.typing import ArrayLike

from lib import paths

DIMENSIONS = ("d", "w", "r")
SLACK = 1e-9  # shares closer than this are the same
CHUNK = 2**14  # points evaluated at a time
KIND = "map of accuracy over (d, w, r)"  # the first entry of a saved map


@dataclass(frozen=True, eq=False)
class Map:
    """Accuracy in percent as a polynomial in (d, w, r); `fit` makes it.

    coefficients: C, float64 [K+1, K+1, K+1], read-only, in percent. low, high: the box
    of the data, three shares each; span_m is 1 - low_m, and 1 where low_m = high_m, as
    F does not depend on such a dimension. degree: K, per dimension. rank: products in
    the sum, None for the full tensor. monotone: F was fitted so as not to rise inside
    the box as a share falls. solver: "lm", "als" or "lstsq". num_points: points it was
    fitted to. residual_sd: standard deviation of a point's residual in points of
    accuracy, nan without degrees of freedom.
    ValueError: entries that do not fit together. Source: Wang et al. 2021.
    """

    coefficients: np.ndarray = field(repr=False)
    low: tuple[float, float, float]
    degree: int
    rank: int | None
    monotone: bool
    solver: str
    num_points: int
    residual_sd: float
    high: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        values = np.array(self.coefficients, dtype=np.float64)
        values.flags.writeable = False
        object.__setattr__(self, "coefficients", values)
        for name in ("low", "high"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        for name in ("degree", "num_points"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        object.__setattr__(self, "residual_sd", float(self.residual_sd))
        _check_map(self)

    @property
    def span(self) -> np.ndarray:
        """The unit of u = (1 - x) / span, float64 [3]."""
        low, high = np.array(self.low), np.array(self.high)
        return np.where(low < high, 1 - low, 1.0)

    # -- values ------------------------------------------------------------------------

    def predict(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> float | np.ndarray:
        """Accuracy in percent at shares d, w, r that broadcast to one shape.

        A float for three numbers, else float64 of that shape. Nothing is clipped:
        points outside the box of the data are extrapolated, see `covers`.
        ValueError: shapes that do not broadcast.
        """
        found = evaluate(self.coefficients, self.centre(d, w, r))
        return float(found) if found.ndim == 0 else found

    def gradient(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> np.ndarray:
        """dF/dd, dF/dw and dF/dr, percent per unit of share: float64 [3, *shape]."""
        unit, span = self.centre(d, w, r), self.span
        return np.stack(
            [
                evaluate(polyder(self.coefficients, axis=m), unit) / -span[m]
                for m in range(3)
            ]
        )

    def elasticities(
        self,
        d: ArrayLike,
        w: ArrayLike,
        r: ArrayLike,
        exponents: tuple[float, float, float] = (1, 2, 2),
    ) -> np.ndarray:
        """E_m = x_m F_m / (e_m F): relative accuracy per relative cost, [3, *shape].

        F_m is dF/dx_m; the cost is d^e1 w^e2 r^e3, by default the paper's d w^2 r^2.
        Where nothing bounds it, the best network of a cost has the three E_m equal.
        ValueError: exponents that are not three positive numbers.
        """
        powers = np.array(exponents, dtype=np.float64)
        if powers.shape != (3,) or not np.all((powers > 0) & (powers < np.inf)):
            raise ValueError(
                f"exponents: expected three positive numbers, got {exponents}; pass "
                "those of d, w and r in the cost"
            )
        shares = np.stack(_spread(d, w, r))
        powers = powers.reshape(3, *[1] * (shares.ndim - 1))
        return shares * self.gradient(d, w, r) / (powers * self.predict(d, w, r))

    def covers(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> bool | np.ndarray:
        """Whether points lie in the box of the data; elsewhere F is extrapolated."""
        shares = np.stack(_spread(d, w, r), -1)
        inside = (shares >= np.array(self.low) - SLACK) & (
            shares <= np.array(self.high) + SLACK
        )
        found = inside.all(-1)
        return bool(found) if found.ndim == 0 else found

    def centre(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> np.ndarray:
        """u of points, float64 [3, *shape]: 0 unpruned, 1 the lowest share seen."""
        shares = _spread(d, w, r)
        return np.stack([(1 - x) / s for x, s in zip(shares, self.span, strict=True)])

    # -- coefficients ------------------------------------------------------------------

    def factors(self) -> tuple[float, list[np.ndarray]]:
        """a in percent and three c_m, float64 [K+1] with c_m0 = 1, of a map of rank 1.

        F = a H_d H_w H_r with H_m = sum over k of c_mk u_m^k. ValueError: another rank,
        or an unpruned accuracy of 0, which no product can start from.
        """
        base = float(self.coefficients[0, 0, 0])
        if self.rank != 1 or base == 0:
            raise ValueError(
                "only a map of rank 1 with an unpruned accuracy above 0 has factors, "
                f"this one has rank {self.rank} and {base} %; read `coefficients`"
            )
        tensor = self.coefficients
        return base, [
            v / base for v in (tensor[:, 0, 0], tensor[0, :, 0], tensor[0, 0])
        ]

    def monomials(self) -> np.ndarray:
        """The paper's lambda_ijk, F = sum of lambda_ijk d^i w^j r^k: [K+1, K+1, K+1].

        In percent. Large numbers that cancel: for reading, not for computing.
        """
        tensor = self.coefficients
        for m, span in enumerate(self.span):
            change = np.zeros((self.degree + 1, self.degree + 1))
            for i in range(self.degree + 1):  # ((1 - x) / span)^i in powers of x
                for j in range(i + 1):
                    change[j, i] = math.comb(i, j) * (-1) ** j / span**i
            tensor = np.moveaxis(np.tensordot(change, tensor, (1, m)), 0, m)
        return tensor

    # -- files -------------------------------------------------------------------------

    def as_dict(self) -> dict:
        """Plain data for JSON: nested lists, None for a residual_sd that is nan."""
        plain = asdict(self) | {"coefficients": self.coefficients.tolist()}
        plain |= {"low": list(self.low), "high": list(self.high)}
        if math.isnan(self.residual_sd):
            plain["residual_sd"] = None
        return {"kind": KIND, **plain}

    def save(self, path: str | Path) -> Path:
        """Write the map as JSON, atomically and to the last bit."""
        return paths.write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Map":
        """Read a saved map; a damaged or foreign file is refused by name."""
        raw = paths.read_json(path)
        if not isinstance(raw, dict) or raw.pop("kind", None) != KIND:
            raise ValueError(f"{path}: not a map, expected an object of kind '{KIND}'")
        fields = cls.__dataclass_fields__.keys()
        if raw.keys() != fields:
            raise ValueError(
                f"{path}: a damaged map, missing {sorted(fields - raw.keys())}, "
                f"unknown {sorted(raw.keys() - fields)}; fit and save it again"
            )
        if raw["residual_sd"] is None:
            raw["residual_sd"] = math.nan
        try:
            return cls(**raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: a damaged map ({error})") from None


def evaluate(coefficients: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The polynomial at u [3, *shape], float64 of that shape, by Horner's rule.

    In chunks: `polyval3d` alone would hold (K+1)^2 values per point.
    """
    flat = unit.reshape(3, -1)
    starts = range(0, flat.shape[1], CHUNK)
    found = [polyval3d(*flat[:, s : s + CHUNK], coefficients) for s in starts]
    return np.concatenate([np.empty(0), *found]).reshape(unit.shape[1:])


def _spread(d: ArrayLike, w: ArrayLike, r: ArrayLike) -> list[np.ndarray]:
    """Three float64 arrays of one shape; ValueError for shapes that do not go."""
    shares = [np.asarray(x, dtype=np.float64) for x in (d, w, r)]
    try:
        return list(np.broadcast_arrays(*shares))
    except ValueError:
        raise ValueError(
            "d, w, r: expected shapes that broadcast, got "
            f"{', '.join(str(x.shape) for x in shares)}; see np.meshgrid"
        ) from None


def check_count(name: str, value: object) -> int:
    """The value as an int; ValueError unless it is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r}")
    return int(value)


def _check_map(found: Map) -> None:
    """ValueError for a map whose entries do not fit together."""
    shape, sides = found.coefficients.shape, (found.degree + 1,) * 3
    if shape != sides or not np.isfinite(found.coefficients).all():
        raise ValueError(f"coefficients: expected finite {sides}, got {shape}")
    if len(found.low) != 3 or len(found.high) != 3:
        raise ValueError(f"low, high: expected 3 each, got {found.low}, {found.high}")
    pairs = zip(found.low, found.high, strict=True)
    if not all(0 < low <= high <= 1 for low, high in pairs):
        raise ValueError(
            f"box: expected 0 < low <= high <= 1, got {found.low}, {found.high}"
        )
    if found.rank is not None:
        check_count("rank", found.rank)
    if not isinstance(found.monotone, bool) or not isinstance(found.solver, str):
        raise ValueError("monotone, solver: expected a bool and a name")
    if math.isinf(found.residual_sd) or found.residual_sd < 0:
        raise ValueError(f"residual_sd: expected 0 or more, got {found.residual_sd}")
