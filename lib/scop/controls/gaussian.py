"""Second-order knockoffs: exact for Gaussian data, the reference for every other arm.

Throughout, Sigma is the covariance of X, S = diag(s), and [X, X~] has the covariance
[[Sigma, Sigma - S], [Sigma - S, Sigma]], which is one iff s >= 0 and 2 Sigma - S has no
negative eigenvalue. Everything is computed in float64.
"""

import torch
from torch import Tensor

ROUNDING = 1e-10  # eigenvalues are compared with this times the largest variance
SWEEPS = 200
METHODS = ("mvr", "equi")


def solve_s(covariance: Tensor, *, method: str = "mvr") -> Tensor:
    """The diagonal s that sets how far knockoffs may be from their originals.

    covariance: [p, p], positive definite; returned: float64 [p], in its units.
    "equi": s_j = min(1, 2 lambda_min) Sigma_jj, lambda_min the smallest eigenvalue of
    the correlation matrix (Barber & Candes 2015). "mvr": least trace of the inverse
    joint covariance, on the correlation scale, by coordinate descent (Spector & Janson
    2022, minimum variance-based reconstructability).
    ValueError: not symmetric, singular, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {METHODS}")
    covariance = check_covariance(covariance)
    variance = covariance.diagonal()
    correlation = covariance / variance.outer(variance).sqrt()
    least = float(torch.linalg.eigvalsh(correlation)[0])
    if method == "equi":
        return min(1.0, 2 * least) * variance
    start = torch.full_like(variance, min(1.0, least))
    return _descend(correlation, start) * variance


def mvr_objective(covariance: Tensor, s: Tensor) -> float:
    """Trace of the inverse joint covariance, correlation scale; inf where singular.

    covariance: [p, p]; s: [p]. Along (X - X~, X + X~) / sqrt 2 the joint covariance is
    diag(S, 2 Sigma - S), so this is tr S^-1 + tr (2 Sigma - S)^-1.
    """
    covariance = check_covariance(covariance)
    variance = covariance.diagonal()
    s = s.double() / variance
    rest = 2 * covariance / variance.outer(variance).sqrt() - s.diag()
    values = torch.linalg.eigvalsh(rest)
    if float(s.min()) <= 0 or float(values[0]) <= 0:
        return float("inf")
    return float((1 / s).sum() + (1 / values).sum())


def _descend(correlation: Tensor, s: Tensor, *, tol: float = 1e-9) -> Tensor:
    """Sweep over the coordinates until none moves by more than `tol`."""
    s = s.clone()
    for _ in range(SWEEPS):
        before = s.clone()
        inverse = torch.linalg.inv(2 * correlation - s.diag())
        for j in range(len(s)):
            _move_coordinate(inverse, s, j)
        if float((s - before).abs().max()) < tol:
            break
    return s


def _move_coordinate(inverse: Tensor, s: Tensor, j: int) -> None:
    """Set s_j to its optimum, and the inverse of 2R - S with it, in place.

    A step t makes the objective 1 / (s_j + t) + t c / (1 - t d) + constant, with
    d = A_jj, c = |A_j|^2, A the inverse. It is convex on (-s_j, 1 / d), and its slope
    is zero where 1 - t d = sqrt(c) (s_j + t).
    """
    column = inverse[:, j].clone()
    norm, entry = float(column.norm()), float(column[j])
    step = (1 - norm * float(s[j])) / (entry + norm)
    s[j] += step
    inverse.addr_(column, column, alpha=step / (1 - step * entry))


class GaussianKnockoffs:
    """Knockoffs of N(mean, covariance), or second-order knockoffs of anything else.

    mean: [p]; covariance: [p, p], positive definite; s: [p] as from `solve_s`.
    ValueError: shapes that do not fit, a singular covariance (add a ridge, see
    `estimate_moments`), or an s outside 0 <= s, 2 Sigma - S >= 0 by more than rounding.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, s: Tensor):
        self.covariance = check_covariance(covariance)
        self.mean, self.s = mean.detach().double(), s.detach().double()
        size = self.covariance.shape[:1]
        for name, value in (("mean", self.mean), ("s", self.s)):
            if value.shape != size:
                raise ValueError(
                    f"{name}: expected shape {list(size)} to go with the covariance, "
                    f"got {list(value.shape)}"
                )
        self._check_feasible()
        root = torch.linalg.cholesky(self.covariance)
        solved = torch.cholesky_solve(self.s.diag(), root)
        self.coefficients: Tensor = solved  # Sigma^-1 S, [p, p]
        joint = 2 * self.s.diag() - self.s[:, None] * solved
        self.conditional_covariance: Tensor = (joint + joint.T) / 2
        self._factor = factorise(self.conditional_covariance, scale=self._scale)

    @property
    def _scale(self) -> float:
        return float(self.covariance.diagonal().max())

    def _check_feasible(self) -> None:
        margin = ROUNDING * self._scale
        least = torch.linalg.eigvalsh(2 * self.covariance - self.s.diag())[0]
        if not (float(self.s.min()) >= -margin and float(least) >= -margin):
            raise ValueError(
                "s: expected 0 <= s and 2 covariance - diag(s) without negative "
                f"eigenvalue, got least s {float(self.s.min()):.3g} and least "
                f"eigenvalue {float(least):.3g}"
            )

    def conditional_mean(self, x: Tensor) -> Tensor:
        """E[X~ | X = x] = x - (x - mean) Sigma^-1 S, float64 [n, p], for x [n, p].

        Candes et al. 2018, eq. 3.2; `conditional_covariance` [p, p] is the second half
        of it, 2 S - S Sigma^-1 S. ValueError where x has another width.
        """
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"x: expected shape [n, {len(self.mean)}], got {list(x.shape)}"
            )
        x = x.to(self.mean)
        return x - (x - self.mean) @ self.coefficients

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One knockoff for each row of x [n, p]; same shape, dtype and device.

        Gaussian noise comes from `generator`, wherever it lies.
        """
        mean = self.conditional_mean(x)
        noise = draw_normal(*mean.shape, generator).to(mean.device)
        return (mean + noise @ self._factor.T).to(x)


def factorise(matrix: Tensor, *, scale: float) -> Tensor:
    """A factor F [p, p] with F F' = matrix [p, p], Cholesky's where there is one.

    A singular matrix goes through its eigenvalues, those negative at rounding level
    (against `scale`) set to zero. ValueError where one is more negative than that.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    if float(values[0]) < -ROUNDING * scale * len(values):
        raise ValueError(f"not a covariance: least eigenvalue {float(values[0]):.3g}")
    return vectors * values.clamp(min=0).sqrt()


def check_covariance(covariance: Tensor) -> Tensor:
    """The matrix [p, p] in float64 if it is symmetric and positive definite.

    ValueError says what it is instead. Definite means: on the correlation scale the
    smallest eigenvalue is above 1e-10.
    """
    matrix = covariance.detach().double()
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"covariance: expected [p, p], got {list(matrix.shape)}")
    if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * _peak(matrix)):
        raise ValueError("covariance: expected a symmetric, finite matrix")
    matrix = (matrix + matrix.T) / 2
    variance = matrix.diagonal()
    if float(variance.min()) <= 0:
        raise ValueError("covariance: expected positive variances, got a constant")
    least = torch.linalg.eigvalsh(matrix / variance.outer(variance).sqrt())[0]
    if float(least) <= ROUNDING:
        raise ValueError(
            "covariance: expected a positive definite matrix, got one whose smallest "
            f"correlation eigenvalue is {float(least):.3g}; drop dependent coordinates "
            "or add a ridge (estimate_moments)"
        )
    return matrix


def _peak(matrix: Tensor) -> float:
    return float(matrix.abs().max())


def estimate_moments(x: Tensor, *, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean [p] and covariance [p, p] (divisor n - 1) of the rows of x [n, p], float64.

    ridge: added to the diagonal, as a share of the mean variance; with it the
    covariance is definite for n <= p too, and knockoffs hold for x plus such noise.
    ValueError: fewer than two rows, or a negative ridge.
    """
    if x.dim() != 2 or len(x) < 2 or ridge < 0:
        raise ValueError(
            f"expected x [n, p] with n >= 2 and ridge >= 0, got {list(x.shape)} and "
            f"ridge {ridge}"
        )
    x = x.detach().double()
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / (len(x) - 1)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    return mean, covariance


def ar1_covariance(p: int, rho: float) -> Tensor:
    """rho^|i - j|, float64 [p, p]: a first-order autoregression of unit variance.

    ValueError unless p >= 1 and -1 < rho < 1.
    """
    if p < 1 or not -1 < rho < 1:
        raise ValueError(f"expected p >= 1 and -1 < rho < 1, got p={p}, rho={rho}")
    places = torch.arange(p, dtype=torch.float64)
    return torch.tensor(rho, dtype=torch.float64) ** (places[:, None] - places).abs()


def sample_ar1(n: int, p: int, rho: float, generator: torch.Generator) -> Tensor:
    """n draws from N(0, `ar1_covariance(p, rho)`), float64 [n, p]."""
    factor = torch.linalg.cholesky(ar1_covariance(p, rho))
    return draw_normal(n, p, generator) @ factor.T


def draw_normal(n: int, p: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64 [n, p], on the generator's device."""
    return torch.randn(
        n, p, generator=generator, dtype=torch.float64, device=generator.device
    )
