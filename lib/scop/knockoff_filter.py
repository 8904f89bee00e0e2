"""The knockoff filter: which features to report at a false discovery rate.

SCOP ranks by the difference between a feature's weight and its control's, and never
uses the threshold; the filter is what that difference was made for, and its error rate
tells what a control that is no knockoff costs.
"""

import functools
import warnings

import torch
from torch import Tensor

from lib.scop.controls.gaussian import (
    GaussianKnockoffs,
    ar1_covariance,
    draw_normal,
    sample_ar1,
    solve_s,
)

CONTROLS = ("exact", "independent", "shuffled", "noise")


def knockoff_threshold(w: Tensor, q: float, *, plus: bool = True) -> float:
    """The least t among |w_j| > 0 with an estimated false discovery rate of at most q.

    w: [p], large and positive where a feature beats its control; the features w >= t
    are reported. The estimate is (a + #{w <= -t}) / max(1, #{w >= t}); a = 1 (`plus`)
    controls the rate, a = 0 a slightly weaker one (Barber & Candes 2015, sec. 1.2).
    inf where no t will do. ValueError: w not [p] and finite, q outside (0, 1).
    """
    if w.dim() != 1 or not bool(w.isfinite().all()) or not 0 < q < 1:
        raise ValueError(
            f"expected finite w [p] and 0 < q < 1, got {list(w.shape)} and q={q}"
        )
    w = w.detach().double()
    levels = w[w != 0].abs().unique()
    wrong = (w <= -levels[:, None]).sum(1) + int(plus)
    right = (w >= levels[:, None]).sum(1).clamp(min=1)
    fitting = levels[wrong <= q * right]
    return float(fitting[0]) if len(fitting) else float("inf")


def lasso_difference(x: Tensor, knock: Tensor, y: Tensor) -> Tensor:
    """|b_j| - |b~_j| of a lasso on [X, X~], its penalty cross-validated; float64 [p].

    x, knock: [n, p]; y: [n]. Columns are standardised (a constant one gets 0) and y
    centred; five folds of adjacent rows, 30 penalties down to 2 % of the largest.
    Solved to a relative duality gap of 1e-6, which bounds what the order of the columns
    can change. ValueError: shapes that do not fit. Candes et al. 2018, eq. 3.7.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV

    if x.dim() != 2 or x.shape != knock.shape or y.shape != x.shape[:1]:
        raise ValueError(
            "expected x, knock [n, p] and y [n], got "
            f"{list(x.shape)}, {list(knock.shape)} and {list(y.shape)}"
        )
    design = torch.cat([x, knock], 1).detach().double().cpu()
    design = design - design.mean(0)
    spread = design.square().mean(0).sqrt()
    design = design / torch.where(spread > 0, spread, 1.0)
    response = (y - y.mean()).detach().double().cpu()
    lasso = LassoCV(cv=5, alphas=30, eps=0.02, tol=1e-6, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lasso.fit(design.numpy(), response.numpy())
    own, control = torch.from_numpy(lasso.coef_).abs().chunk(2)
    return own - control


def simulate_filter(
    control: str,
    *,
    rho: float,
    n: int = 300,
    p: int = 100,
    signals: int = 20,
    amplitude: float = 4.0,
    q: float = 0.1,
    repetitions: int = 40,
    seed: int = 0,
) -> dict[str, float]:
    """False discovery rate and power of the filter with a control, by simulation.

    y = X b + N(0, 1), rows of X from N(0, rho^|i - j|), `signals` random entries of b
    +-amplitude / sqrt(n), the others 0. control: "exact" MVR knockoffs; "independent",
    a fresh copy; "shuffled", the rows of X in another order; "noise", white. X and y
    depend on `seed` and the repetition alone, so all controls meet the same data.
    Returned, as shares: `fdr`, `power` and their standard errors `fdr_se`, `power_se`
    (nan for one repetition). ValueError: unknown control, more signals than features.
    """
    if control not in CONTROLS:
        raise ValueError(f"unknown control {control!r}, expected one of {CONTROLS}")
    if not 1 <= signals <= p or repetitions < 1:
        raise ValueError(
            f"expected 1 <= signals <= p and repetitions >= 1, got signals={signals}, "
            f"p={p}, repetitions={repetitions}"
        )
    rates = []
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(1_000_003 * seed + repetition)
        x, y, true = _draw_problem(n, p, rho, signals, amplitude, generator)
        w = lasso_difference(x, _draw_control(control, x, rho, generator), y)
        rates.append(score_selection(w >= knockoff_threshold(w, q), true))
    shares = torch.tensor(rates, dtype=torch.float64)
    mean, error = shares.mean(0), shares.std(0) / len(shares) ** 0.5
    names = ("fdr", "power")
    errors = {f"{name}_se": float(e) for name, e in zip(names, error, strict=True)}
    return dict(zip(names, mean.tolist(), strict=True)) | errors


def score_selection(chosen: Tensor, true: Tensor) -> tuple[float, float]:
    """False share of the chosen and found share of the true; both bool [p]."""
    found = int((chosen & true).sum())
    wrong = int(chosen.sum()) - found
    return wrong / max(1, int(chosen.sum())), found / max(1, int(true.sum()))


def _draw_problem(
    n: int,
    p: int,
    rho: float,
    signals: int,
    amplitude: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """X [n, p], y [n] and the bool mask [p] of the features that matter."""
    x = sample_ar1(n, p, rho, generator)
    chosen = torch.randperm(p, generator=generator)[:signals]
    signs = torch.randint(0, 2, (signals,), generator=generator) * 2.0 - 1
    weight = torch.zeros(p, dtype=torch.float64)
    weight[chosen] = signs.double() * amplitude / n**0.5
    return x, x @ weight + draw_normal(n, 1, generator)[:, 0], weight != 0


def _draw_control(
    control: str, x: Tensor, rho: float, generator: torch.Generator
) -> Tensor:
    n, p = x.shape
    if control == "exact":
        return _make_sampler(p, rho).sample(x, generator)
    if control == "independent":
        return sample_ar1(n, p, rho, generator)
    if control == "shuffled":
        return x[torch.randperm(n, generator=generator)]
    return draw_normal(n, p, generator)


@functools.lru_cache(maxsize=8)
def _make_sampler(p: int, rho: float) -> GaussianKnockoffs:
    covariance = ar1_covariance(p, rho)
    mean = torch.zeros(p, dtype=torch.float64)
    return GaussianKnockoffs(mean, covariance, solve_s(covariance))
