"""The knockoff filter: which features to report at a false discovery rate.

SCOP ranks by the difference between a feature's weight and its control's, and never
uses the threshold; the filter is what that difference was made for, and its error rate
tells what a control that is no knockoff costs.
"""

import warnings
from collections.abc import Callable

import torch
from scipy.linalg import toeplitz
from torch import Tensor

from lib.messages import check_choice
from lib.scop.controls.gaussian import GaussianKnockoffs, draw_normal, solve_s
from lib.settings import ABOVE_ZERO, check_float, check_int


def knockoff_threshold(w: Tensor, q: float) -> float:
    """The least t among |w_j| > 0 with an estimated false discovery rate of at most q.

    w: [p], large and positive where a feature beats its control; the features w >= t
    are reported. The estimate is (1 + #{w <= -t}) / max(1, #{w >= t}) (knockoff+,
    Barber & Candes 2015, sec. 1.2). inf where no t will do. ValueError: w not [p] and
    finite, q outside (0, 1).

    Step by step in notebooks/10_scop_knockoffs.ipynb.
    """
    # A feature that does not matter wins or loses against its knockoff by a fair coin,
    # so that the losses beyond -t stand for the wins beyond t that are only luck. The 1
    # is for a t behind the last loss: none seen does not mean that none was to come,
    # and without it the rate itself is not controlled, only a milder one.
    q = check_float("q", q, ABOVE_ZERO, 1.0)
    if not isinstance(w, Tensor) or w.dim() != 1 or not bool(w.isfinite().all()):
        raise ValueError(f"expected finite w [p], got {list(getattr(w, 'shape', w))}")
    w = w.detach().double()
    levels = w[w != 0].abs().unique()
    wrong = (w <= -levels[:, None]).sum(1) + 1
    right = (w >= levels[:, None]).sum(1).clamp(min=1)
    # Divided, not multiplied: a share of exactly q is then the same float as q.
    fitting = levels[wrong.double() / right <= q]
    return float(fitting[0]) if len(fitting) else float("inf")


def lasso_difference(x: Tensor, knock: Tensor, y: Tensor) -> Tensor:
    """|b_j| - |b~_j| of a lasso on [X, X~], its penalty cross-validated; float64 [p].

    x, knock: [n, p]; y: [n]. Columns are standardised (a constant one gets 0) and y
    centred; five folds of adjacent rows, 30 penalties down to 2 % of the largest.
    ValueError: shapes that do not fit. Source: Candes et al. 2018, eq. 3.7.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV
    from sklearn.preprocessing import scale

    if x.dim() != 2 or x.shape != knock.shape or y.shape != x.shape[:1]:
        raise ValueError(
            "expected x, knock [n, p] and y [n], got "
            f"{list(x.shape)}, {list(knock.shape)} and {list(y.shape)}"
        )
    design, response = torch.cat([x, knock], 1).detach().double(), (y - y.mean())
    # Coordinate descent visits columns in order, and a knockoff must not lose for being
    # the second of a pair: the tolerance bounds what the order can change.
    lasso = LassoCV(cv=5, alphas=30, eps=0.02, tol=1e-6, max_iter=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lasso.fit(scale(design.cpu().numpy()), response.detach().double().cpu().numpy())
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
    check_choice("control", control, ("exact", "independent", "shuffled", "noise"))
    repetitions = check_int("repetitions", repetitions, 1)
    if not 1 <= signals <= p:
        raise ValueError(f"expected 1 <= signals <= p, got signals={signals}, p={p}")
    draw, rates = _find_control(control, p, rho), []
    for repetition in range(repetitions):
        generator = torch.Generator().manual_seed(1_000_003 * seed + repetition)
        x = sample_ar1(n, p, rho, generator)
        chosen = torch.randperm(p, generator=generator)[:signals]
        signs = torch.randint(0, 2, (signals,), generator=generator).double() * 2 - 1
        size = amplitude / n**0.5
        weight = torch.zeros(p).double().index_copy(0, chosen, signs * size)
        y = x @ weight + draw_normal(n, 1, generator)[:, 0]
        w = lasso_difference(x, draw(x, generator), y)
        rates.append(score_selection(w >= knockoff_threshold(w, q), weight != 0))
    shares = torch.tensor(rates, dtype=torch.float64)
    fdr, power = shares.mean(0).tolist()
    fdr_se, power_se = (shares.std(0) / len(shares) ** 0.5).tolist()
    return {"fdr": fdr, "power": power, "fdr_se": fdr_se, "power_se": power_se}


def score_selection(chosen: Tensor, true: Tensor) -> tuple[float, float]:
    """False share of the chosen and found share of the true; both bool [p]."""
    found = int((chosen & true).sum())
    wrong = int(chosen.sum()) - found
    return wrong / max(1, int(chosen.sum())), found / max(1, int(true.sum()))


def ar1_covariance(p: int, rho: float) -> Tensor:
    """rho^|i - j|, float64 [p, p]: a first-order autoregression of unit variance."""
    return torch.from_numpy(toeplitz(float(rho) ** torch.arange(p).double().numpy()))


def sample_ar1(n: int, p: int, rho: float, generator: torch.Generator) -> Tensor:
    """n draws from N(0, `ar1_covariance(p, rho)`), float64 [n, p]."""
    factor = torch.linalg.cholesky(ar1_covariance(p, rho))
    return draw_normal(n, p, generator) @ factor.T


def _find_control(name: str, p: int, rho: float) -> Callable:
    """The function of X and a generator that draws the control."""
    if name == "exact":
        covariance = ar1_covariance(p, rho)
        return GaussianKnockoffs(torch.zeros(p), covariance, solve_s(covariance)).sample
    return {
        "independent": lambda x, g: sample_ar1(*x.shape, rho, g),
        "shuffled": lambda x, g: x[torch.randperm(len(x), generator=g)],
        "noise": lambda x, g: draw_normal(*x.shape, g),
    }[name]
