"""Second-order knockoffs: exact for Gaussian data, the reference for every other arm.

Throughout, Sigma is the covariance of X, S = diag(s), and [X, X~] has the covariance
[[Sigma, Sigma - S], [Sigma - S, Sigma]], which is one iff s >= 0 and 2 Sigma - S has no
negative eigenvalue. Everything is computed in float64.
"""

import torch
from torch import Tensor

ROUNDING = 1e-10  # eigenvalues are compared with this times the largest variance


def solve_s(covariance: Tensor) -> Tensor:
    """The diagonal s that sets how far knockoffs may be from their originals.

    covariance: [p, p], positive definite; returned: float64 [p], in its units. The s
    with the least trace of the inverse joint covariance, on the correlation scale
    (minimum variance-based reconstructability, Spector & Janson 2022). ValueError: not
    symmetric, or singular.
    """
    # Along (X - X~, X + X~) / sqrt 2 the joint covariance is diag(S, 2 Sigma - S): a
    # small s makes X~ a copy, a large one makes 2 Sigma - S singular, so that some
    # coordinate could be told from the others and all knockoffs. The trace,
    # tr S^-1 + tr (2 Sigma - S)^-1, keeps away from both.
    covariance = check_covariance(covariance)
    variance = covariance.diagonal()
    correlation = covariance / variance.outer(variance).sqrt()
    least = float(torch.linalg.eigvalsh(correlation)[0])
    s = torch.full_like(variance, min(1.0, least))  # strictly inside
    for _ in range(200):
        before = s.clone()
        # anew in each sweep: the updates by one coordinate add up their rounding
        inverse = torch.linalg.inv(2 * correlation - s.diag())
        for j in range(len(s)):
            _move_coordinate(inverse, s, j)
        if float((s - before).abs().max()) < 1e-9:
            break
    return s * variance


def _move_coordinate(inverse: Tensor, s: Tensor, j: int) -> None:
    """Set s_j to its optimum, and the inverse of 2R - S with it, in place.

    A step t makes the objective 1 / (s_j + t) + t c / (1 - t d) + constant, with
    d = A_jj, c = |A_j|^2, A the inverse (Sherman & Morrison). It is convex on
    (-s_j, 1 / d), and its slope is zero where 1 - t d = sqrt(c) (s_j + t).
    """
    column = inverse[:, j].clone()
    norm, entry = float(column.norm()), float(column[j])
    step = (1 - norm * float(s[j])) / (entry + norm)
    s[j] += step
    inverse.addr_(column, column, alpha=step / (1 - step * entry))


class GaussianKnockoffs:
    """Knockoffs of N(mean, covariance), or second-order knockoffs of anything else.

    mean: [p]; covariance: [p, p], positive definite; s: [p] as from `solve_s`.
    ValueError: shapes that do not fit, a singular covariance, an s outside 0 <= s,
    2 Sigma - S >= 0 by more than rounding.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, s: Tensor):
        self.covariance = check_covariance(covariance)
        self.mean, self.s = mean.detach().double(), s.detach().double()
        size = self.covariance.shape[:1]
        if not self.mean.shape == self.s.shape == size:
            raise ValueError(
                f"mean and s: expected shape {list(size)} to go with the covariance, "
                f"got {list(self.mean.shape)} and {list(self.s.shape)}"
            )
        margin = ROUNDING * float(self.covariance.diagonal().max())
        least = torch.linalg.eigvalsh(2 * self.covariance - self.s.diag())[0]
        if not (float(self.s.min()) >= -margin and float(least) >= -margin):
            raise ValueError(
                "s: expected 0 <= s and 2 covariance - diag(s) without negative "
                f"eigenvalue, got least s {float(self.s.min()):.3g} and least "
                f"eigenvalue {float(least):.3g}"
            )
        # Candes et al. 2018, eq. 3.2: the law of X~ given X = x
        solved = torch.linalg.solve(self.covariance, self.s.diag())
        joint = 2 * self.s.diag() - self.s[:, None] * solved
        self.coefficients: Tensor = solved  # Sigma^-1 S, [p, p]
        self.conditional_covariance: Tensor = (joint + joint.T) / 2
        # where s touches its bound this is singular, and Cholesky's factor fails
        values, vectors = torch.linalg.eigh(self.conditional_covariance)
        self._factor = vectors * values.clamp(min=0).sqrt()

    def conditional_mean(self, x: Tensor) -> Tensor:
        """E[X~ | X = x] = x - (x - mean) Sigma^-1 S, float64 [n, p], for x [n, p].

        The other half of the law is `conditional_covariance`, 2 S - S Sigma^-1 S.
        """
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"x: expected shape [n, {len(self.mean)}], got {list(x.shape)}"
            )
        x = x.to(self.mean)
        return x - (x - self.mean) @ self.coefficients

    def sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One knockoff for each row of x [n, p]; same shape, dtype and device."""
        mean = self.conditional_mean(x)
        noise = draw_normal(*mean.shape, generator).to(mean.device)
        return (mean + noise @ self._factor.T).to(x)


def check_covariance(covariance: Tensor) -> Tensor:
    """The matrix [p, p] in float64; ValueError: not symmetric and positive definite."""
    matrix = covariance.detach().double()
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"covariance: expected [p, p], got {list(matrix.shape)}")
    if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9):
        raise ValueError("covariance: expected a symmetric, finite matrix")
    matrix, variance = (matrix + matrix.T) / 2, matrix.diagonal()
    if float(variance.min()) <= 0:
        raise ValueError("covariance: expected positive variances, got a constant")
    least = torch.linalg.eigvalsh(matrix / variance.outer(variance).sqrt())[0]
    if float(least) <= ROUNDING:
        raise ValueError(
            "covariance: expected a positive definite matrix, got one whose smallest "
            f"correlation eigenvalue is {float(least):.3g}; drop dependent coordinates "
            "or add a ridge"
        )
    return matrix


def draw_normal(n: int, p: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64 [n, p], on the generator's device."""
    return torch.randn(
        n, p, generator=generator, dtype=torch.float64, device=generator.device
    )
