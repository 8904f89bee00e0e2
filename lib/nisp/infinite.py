"""Inf-FS: rank features by all paths through a graph of spread and correlation.

Roffo, Melzi & Cristani, "Infinite Feature Selection", ICCV 2015, as NISP uses it on the
final responses (Yu et al., CVPR 2018, section 3). Features are nodes; an edge is heavy
where its ends spread widely and correlate little; a feature scores the weight of all
walks that begin at it, a walk of length l counting r^l:

    s = (sum over l >= 1 of r^l A^l) 1 = ((I - r A)^-1 - I) 1,    r = 0.9 / rho(A)

which is Katz centrality less one.
"""

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import eigsh
from scipy.stats import rankdata
from torch import Tensor

from lib.messages import check_choice
from lib.settings import ABOVE_ONE, check_float

VARIANTS = ("default", "v4_2016", "raw2015", "y2020")
LOAD = 0.9  # r rho(A)


def inf_fs(
    features: Tensor,
    *,
    alpha: float = 0.5,
    variant: str = "default",
    mask_dead: bool = True,
) -> Tensor:
    """Inf-FS scores of features, the higher the more important.

    features: [N, D], N samples of any real dtype, CPU or GPU, N >= 2; returned: float64
    [D], no unit, on the same device. alpha, variant, mask_dead: see `weigh_edges`. All
    edges zero (one feature; only copies at alpha 0) give zeros. "y2020" divides A by
    its largest row sum too, takes 1 - 5e-6 D for 0.9 and counts the empty walk, so that
    its scores are 1.00... and follow the row sums of A. "v4_2016" can score below zero.
    ValueError: not [N, D], non-finite, N < 2, every feature constant, alpha outside
    [0, 1], an unknown variant. Source: Roffo et al. 2015; for the variants, the codes
    published under that name in 2016 and 2020 as we understand them.

    Step by step in notebooks/20_nisp_inf_fs.ipynb.
    """
    matrix = build_graph_matrix(features, alpha, variant, mask_dead=mask_dead)
    return score_graph(matrix, variant=variant).to(features.device)


def score_graph(matrix: Tensor, *, variant: str = "default") -> Tensor:
    """Scores of the nodes of a graph, float64 [D], as `inf_fs` takes them.

    matrix: A, symmetric [D, D], as `build_graph_matrix` returns it, else ValueError.
    """
    check_choice("variant", variant, VARIANTS)
    rho, degree = spectral_radius(matrix), matrix.sum(1).double()
    if not rho:
        return torch.full_like(degree, float(variant == "y2020"))
    if variant == "y2020":
        load = 1 - 5e-6 * len(matrix)
        return 1 + sum_paths(matrix, load / (rho * float(degree.max())))
    return sum_paths(matrix, LOAD / rho)


# -- the graph -------------------------------------------------------------------------


def build_graph_matrix(
    features: Tensor,
    alpha: float = 0.5,
    variant: str = "default",
    *,
    mask_dead: bool = True,
) -> Tensor:
    """A of features [N, D], see `weigh_edges`; errors as in `inf_fs`."""
    deviation = measure_deviation(features)
    if not deviation.any():
        raise ValueError(
            f"all {len(deviation)} features are constant over the {len(features)} "
            "samples; there is nothing to rank: give other inputs or another layer"
        )
    return weigh_edges(
        spearman(features), deviation, alpha=alpha, variant=variant, mask_dead=mask_dead
    )


def weigh_edges(
    correlation: Tensor,
    deviation: Tensor,
    *,
    alpha: float = 0.5,
    variant: str = "default",
    mask_dead: bool = True,
) -> Tensor:
    """The adjacency A from rank correlations [D, D] and standard deviations [D].

    float64 [D, D], symmetric. With sigma_ij = max(sd_i, sd_j), sigma01 = (sigma - min)
    / (max - min) over the matrix (0 where all are equal) and c = 1 - |correlation|:
    default, "y2020": alpha sigma01 + (1 - alpha) c; "raw2015": alpha sigma +
    (1 - alpha) c, so the unit of the features matters; "v4_2016": alpha correlation +
    (1 - alpha) sigma01, signed, the roles of alpha exchanged.
    A dead feature (deviation 0) correlates with nothing, and 1 - 0 would make it the
    least redundant of all. mask_dead takes its c as 0, so that no living feature ranks
    below it; False leaves the 1, for showing the trap.
    """
    check_choice("variant", variant, VARIANTS)
    alpha = check_float("alpha", alpha, 0, ABOVE_ONE)
    if deviation.dim() != 1 or correlation.shape != (len(deviation),) * 2:
        raise ValueError(
            "expected correlation [D, D] and deviation [D], got "
            f"{list(correlation.shape)} and {list(deviation.shape)}"
        )
    deviation, correlation = deviation.double(), correlation.double()
    dead = (deviation == 0)[:, None] | (deviation == 0)
    spread = deviation if variant == "raw2015" else stretch(deviation)
    spread = torch.maximum(spread[:, None], spread)
    if variant == "v4_2016":
        return (1 - alpha) * spread + alpha * correlation.masked_fill(dead, 0.0)
    new = (1 - correlation.abs()).masked_fill(dead, 0.0 if mask_dead else 1.0)
    return alpha * spread + (1 - alpha) * new


def stretch(deviation: Tensor) -> Tensor:
    """Onto [0, 1]: the largest entry of max(sd_i, sd_j) to 1, the least to 0."""
    low, high = deviation.aminmax()
    if float(high - low) <= 1e-6 * float(high):  # equal but for rounding
        return torch.zeros_like(deviation)
    return (deviation - low) / (high - low)


def measure_deviation(features: Tensor) -> Tensor:
    """Standard deviation of each column, divisor N, float64 [D]; exactly 0 if constant.

    Of values stretched to [0, 1], so that neither a large mean nor a tiny or huge unit
    costs digits.
    """
    values = check_features(features).double()
    low, high = values.aminmax(dim=0)
    width = high - low
    unit = torch.where(width > 0, width, 1.0)
    return ((values - low) / unit).std(0, correction=0) * width


# -- rank correlation ------------------------------------------------------------------


def spearman(features: Tensor) -> Tensor:
    """Spearman's rank correlation of the columns, float64 [D, D]; nan for a constant.

    As `scipy.stats.spearmanr`. Up to N = 200,000 the products are sums of integers
    below 2^53: exact, whatever the order of samples, features or summation, and exactly
    1 between columns of equal ranks.
    """
    values = np.ascontiguousarray(to_numpy(check_features(features)).T)
    ranks = 2 * rankdata(values, axis=1) - (values.shape[1] + 1)  # integers around 0
    products = torch.from_numpy(ranks @ ranks.T)
    energy = products.diagonal().clone()
    products /= torch.sqrt(energy[:, None] * energy)
    return products.clamp_(-1, 1).to(features.device)


# -- all paths -------------------------------------------------------------------------


def sum_paths(matrix: Tensor, r: float) -> Tensor:
    """Row sums of (I - r A)^-1 - I, float64 [D]: all walks from each node.

    matrix: A, symmetric [D, D]. ValueError unless 0 <= r < 1 / (largest eigenvalue of
    A), for which I - r A is positive definite.
    """
    a = to_numpy(check_symmetric(matrix))
    try:
        if not r >= 0:
            raise np.linalg.LinAlgError
        found = scipy.linalg.solve(np.eye(len(a)) - r * a, r * a.sum(1), assume_a="pos")
    except np.linalg.LinAlgError:
        raise ValueError(
            f"the sum over all paths diverges at r = {r:.6g}; choose r from 0 to below "
            "1 / spectral_radius(matrix)"
        ) from None
    return torch.from_numpy(found).to(matrix.device)


def spectral_radius(matrix: Tensor) -> float:
    """Largest |eigenvalue| of a symmetric matrix, by Lanczos' method (ARPACK)."""
    a = to_numpy(check_symmetric(matrix))
    peak = float(np.abs(a).max())
    if not peak:
        return 0.0
    if len(a) < 3:  # fewer than ARPACK takes
        return peak * float(np.abs(np.linalg.eigvalsh(a / peak)).max())
    start = 1 + np.cos(np.arange(len(a))) / 2  # positive, yet of no symmetry
    found = eigsh(a / peak, k=1, which="LM", v0=start, return_eigenvectors=False)
    return peak * float(np.abs(found[0]))


# -- what is refused -------------------------------------------------------------------


def to_numpy(values: Tensor) -> np.ndarray:
    """On the CPU, in float32 or else float64."""
    values = values.detach().cpu()
    return (values if values.dtype == torch.float32 else values.double()).numpy()


def check_features(features: Tensor) -> Tensor:
    """features [N, D], detached; ValueError for what cannot be ranked."""
    if features.dim() != 2 or features.is_complex():
        raise ValueError(
            "features: expected a real [N, D], samples by features, got "
            f"{features.dtype} {list(features.shape)}; average or flatten the rest"
        )
    if len(features) < 2 or features.shape[1] < 1:
        raise ValueError(
            "features: expected at least 2 samples of at least 1 feature, got "
            f"{list(features.shape)}; collect more"
        )
    if not bool(features.sum().isfinite()):  # seldom, so the columns can wait
        bad = features.isfinite().all(0).logical_not().nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"features: {len(bad)} of {features.shape[1]} columns hold nan or inf, "
                f"the first is {bad[0]}; look for an overflow in the network or its "
                "input"
            )
    return features.detach()


def check_symmetric(matrix: Tensor) -> Tensor:
    """The matrix in float64; ValueError unless it is square, finite and symmetric."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix: expected [D, D], got {list(matrix.shape)}")
    matrix = matrix.detach().double()
    peak = float(matrix.abs().max())
    if not np.isfinite(peak):
        raise ValueError("matrix: holds nan or inf; mask constant features first")
    if float((matrix - matrix.T).abs().max()) > 1e-9 * peak:
        raise ValueError("matrix: expected a symmetric one; average it with its own T")
    return matrix
