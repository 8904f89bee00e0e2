"""The accuracy predictor: a polynomial in depth, width and resolution.

Wang et al., "Accelerate CNNs from Three Dimensions: A Comprehensive Pruning Framework",
ICML 2021: accuracy as a polynomial F(d, w, r) of degree K in each of the three shares
that are kept, all in (0, 1] and 1 for the unpruned network. Here its basis is centred
at the unpruned network and scaled by the box of the data,

    F = sum over i, j, k of C_ijk u_d^i u_w^j u_r^k,   u_m = (1 - x_m) / span_m,

so that C_000 is the unpruned accuracy and u = 1 the lowest value seen: in powers of x
itself the same polynomial is a sum of large numbers that cancel.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval3d
from numpy.typing import ArrayLike

from lib import paths

SLACK = 1e-9  # shares closer than this are the same
FAR = 10.0  # percent outside 0..100 that a smooth fit may come to
KIND = "map of accuracy over (d, w, r)"  # the first entry of a saved map


@dataclass(frozen=True, eq=False)
class Map:
    """Accuracy in percent as a polynomial in (d, w, r); `fit` makes it.

    coefficients: C, float64 [K+1, K+1, K+1], read-only, in percent. low, high: the box
    of the data, three shares each. rank, monotone: as told to `fit`. residual_sd:
    standard deviation of a point's residual in points of accuracy, nan without degrees
    of freedom. ValueError: entries that do not fit together.
    """

    coefficients: np.ndarray = field(repr=False)
    low: tuple[float, float, float]
    high: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rank: int = 1
    monotone: bool = False
    residual_sd: float = math.nan

    def __post_init__(self):
        values = np.array(self.coefficients, dtype=np.float64)
        values.flags.writeable = False
        object.__setattr__(self, "coefficients", values)
        for name in ("low", "high"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        cube = values.ndim == 3 and len({*values.shape}) == 1
        if not cube or not np.isfinite(values).all():
            raise ValueError(
                f"coefficients: expected a finite cube, got {values.shape}"
            )
        pairs = list(zip(self.low, self.high, strict=True))
        if len(pairs) != 3 or not all(0 < low <= high <= 1 for low, high in pairs):
            raise ValueError(
                f"box: expected 0 < low <= high <= 1 three times, got {pairs}"
            )

    @property
    def degree(self) -> int:
        """K, per dimension."""
        return len(self.coefficients) - 1

    @property
    def span(self) -> np.ndarray:
        """The unit of u = (1 - x) / span, float64 [3]."""
        # 1 where a dimension did not vary: F does not depend on it, 1 - low may be 0
        low, high = np.array(self.low), np.array(self.high)
        return np.where(low < high, 1 - low, 1.0)

    # -- values ------------------------------------------------------------------------

    def predict(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> float | np.ndarray:
        """Accuracy in percent at shares d, w, r that broadcast to one shape.

        A float for three numbers, else float64 of that shape, nan at nan. Nothing is
        clipped: points outside the box of the data are extrapolated, see `covers`; a
        warning where that leaves 0..100 % by far. ValueError: what is no number.
        """
        u, v, t = self._centre(d, w, r)
        found = polyval3d(u, v, t, self.coefficients)
        low, high = np.nanmin(found, initial=0), np.nanmax(found, initial=100)
        if low < -FAR or high > 100 + FAR:
            warnings.warn(
                f"predicted accuracies from {low:,.0f} to {high:,.0f} %: the map knows "
                f"shares down to {self.low} and cannot tell beyond; see `covers`",
                stacklevel=2,
            )
        return float(found) if found.ndim == 0 else found

    def gradient(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> np.ndarray:
        """dF/dd, dF/dw and dF/dr, percent per unit of share: float64 [3, *shape]."""
        u, v, t = self._centre(d, w, r)
        slopes = [
            polyval3d(u, v, t, polyder(self.coefficients, axis=m)) / -span
            for m, span in enumerate(self.span)
        ]
        return np.stack(slopes)

    def elasticities(
        self, d: ArrayLike, w: ArrayLike, r: ArrayLike, exponents=(1, 2, 2)
    ) -> np.ndarray:
        """E_m = x_m F_m / (e_m F): relative accuracy per relative cost, [3, *shape].

        F_m is dF/dx_m; the cost is d^e1 w^e2 r^e3, by default the paper's d w^2 r^2.
        Where nothing bounds it, the best network of a cost has the three E_m equal.
        """
        shares = np.stack(_read_shares(d, w, r))
        powers = np.reshape(exponents, (3, *[1] * (shares.ndim - 1)))
        return shares * self.gradient(d, w, r) / (powers * self.predict(d, w, r))

    def covers(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> bool | np.ndarray:
        """Whether points lie in the box of the data; elsewhere F is extrapolated."""
        shares = np.stack(_read_shares(d, w, r), -1)
        low, high = np.array(self.low) - SLACK, np.array(self.high) + SLACK
        found = ((shares >= low) & (shares <= high)).all(-1)
        return bool(found) if found.ndim == 0 else found

    def _centre(self, d: ArrayLike, w: ArrayLike, r: ArrayLike) -> list[np.ndarray]:
        """The three u of points: 0 unpruned, 1 the lowest share seen."""
        shares = _read_shares(d, w, r)
        return [(1 - x) / span for x, span in zip(shares, self.span, strict=True)]

    # -- files -------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the map as JSON, atomically and to the last bit."""
        plain = asdict(self) | {"coefficients": self.coefficients.tolist()}
        if math.isnan(self.residual_sd):
            plain["residual_sd"] = None  # JSON has no nan
        return paths.write_json(path, {"kind": KIND, **plain})

    @classmethod
    def load(cls, path: str | Path) -> "Map":
        """Read a saved map; a damaged or foreign file is refused by name."""
        raw = paths.read_json(path)
        if not isinstance(raw, dict) or raw.pop("kind", None) != KIND:
            raise ValueError(f"{path}: not a map, expected an object of kind '{KIND}'")
        try:
            if raw["residual_sd"] is None:
                raw["residual_sd"] = math.nan
            return cls(**raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: a damaged map ({error}); fit and save it again"
            ) from None


def _read_shares(*shares: ArrayLike) -> list[np.ndarray]:
    """Shares d, w, r as float64 of one shape; ValueError for what is no number."""
    try:
        if any(x is None for x in shares):
            raise TypeError("one is None")
        plain = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in shares))
    except (TypeError, ValueError) as error:
        raise ValueError(f"d, w, r: expected numbers of one shape ({error})") from None
    return list(plain)
