"""Inf-FS: rank features by all paths through a graph of spread and correlation.

Roffo, Melzi & Cristani, "Infinite Feature Selection", ICCV 2015, as NISP uses it on the
final responses (Yu et al., CVPR 2018, section 3). Features are nodes; an edge is heavy
where its ends spread widely and correlate little; a feature scores the weight of all
walks that begin at it, a walk of length l counting r^l:

    s = (sum over l >= 1 of r^l A^l) 1 = ((I - r A)^-1 - I) 1,    r = 0.9 / rho(A)

which is Katz centrality less one. A is symmetric, so conjugate gradients give s from
products with A alone, with neither an inverse nor an eigendecomposition.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.kernels import centre_ranks

VARIANTS = ("default", "v4_2016", "raw2015", "y2020")
LOAD = 0.9  # r rho(A)
TILE = 2**16  # values measured at a time
CHUNK, BLOCK = 512, 128  # samples and features of one matrix product
EQUAL = 1e-6  # standard deviations that differ by less, relatively, count as equal
POWER_STEPS, LANCZOS_STEPS, SOLVER_STEPS = 60, 200, 10_000


def inf_fs(
    features: Tensor,
    *,
    alpha: float = 0.5,
    variant: str = "default",
    mask_dead: bool = True,
) -> Tensor:
    """Inf-FS scores of features, the higher the more important.

    features: [N, D], N samples of any real dtype, CPU or GPU, N >= 2; returned: float64
    [D], no unit, on the same device. alpha weighs spread against non-redundancy;
    `variant`, `mask_dead` and the edge weights: see `weigh_edges`. All edges zero (one
    feature; only copies at alpha 0) give zeros. "y2020" divides A by its largest row
    sum too, takes 1 - 5e-6 D for 0.9 and counts the empty walk, so that its scores are
    1.00... and follow the row sums of A. "v4_2016" can score below zero.
    Kept at the peak: a copy of the ranks (float32) and three float64 [D, D].
    ValueError: not [N, D], non-finite, N < 2, every feature constant, alpha outside
    [0, 1], an unknown variant. Source: Roffo et al. 2015; for the variants, the codes
    published under that name in 2016 and 2020 as we understand them.
    """
    matrix = build_graph_matrix(features, alpha, variant, mask_dead=mask_dead)
    return score_graph(matrix, variant=variant)


def score_graph(matrix: Tensor, *, variant: str = "default") -> Tensor:
    """Scores of the nodes of a graph, float64 [D], as `inf_fs` takes them.

    matrix: A, symmetric [D, D], as `build_graph_matrix` returns it. ValueError for
    an unknown variant, another shape, a matrix that is not symmetric or not finite.
    """
    check_options(0.5, variant)
    matrix = check_symmetric(matrix)
    rho = _measure_radius(matrix)
    if variant != "y2020":
        return _solve_paths(matrix, LOAD / rho if rho else 0.0)
    load = 1 - 5e-6 * len(matrix)
    scale = rho * float(matrix.sum(1).max())
    return 1 + _solve_paths(matrix, load / scale if rho else 0.0)


# -- the graph -------------------------------------------------------------------------


def build_graph_matrix(
    features: Tensor,
    alpha: float = 0.5,
    variant: str = "default",
    *,
    mask_dead: bool = True,
) -> Tensor:
    """The weighted adjacency A of features [N, D]: float64 [D, D], symmetric.

    Weights as in `weigh_edges`, errors as in `inf_fs`.
    """
    check_options(alpha, variant)
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
    """A from rank correlations [D, D] and standard deviations [D], float64 [D, D].

    With sigma_ij = max(sd_i, sd_j), sigma01 = (sigma - min) / (max - min) over the
    matrix (0 where all are equal) and c = 1 - |correlation|:
    default, "y2020": alpha sigma01 + (1 - alpha) c; "raw2015": alpha sigma +
    (1 - alpha) c, so the unit of the features matters; "v4_2016": alpha correlation +
    (1 - alpha) sigma01, signed, the roles of alpha exchanged.
    A dead feature (deviation 0) correlates with nothing, and 1 - 0 would make it the
    least redundant of all. mask_dead takes its c as 0, so that no living feature ranks
    below it; False leaves the 1, for showing the trap.
    ValueError: shapes that do not fit, alpha outside [0, 1], an unknown variant.
    """
    check_options(alpha, variant)
    if deviation.dim() != 1 or correlation.shape != (len(deviation),) * 2:
        raise ValueError(
            "expected correlation [D, D] and deviation [D], got "
            f"{list(correlation.shape)} and {list(deviation.shape)}"
        )
    deviation = deviation.double()
    dead = deviation == 0
    spread = deviation if variant == "raw2015" else _stretch(deviation)
    spread = torch.maximum(spread[:, None], spread)
    if variant == "v4_2016":
        edges = _fill(correlation.double().clone(), dead, 0.0)
        return edges.mul_(alpha).add_(spread, alpha=1 - alpha)
    edges = correlation.double().abs().neg_().add_(1)
    edges = _fill(edges, dead, 0.0 if mask_dead else 1.0)
    return edges.mul_(1 - alpha).add_(spread, alpha=alpha)


def _stretch(deviation: Tensor) -> Tensor:
    """Onto [0, 1]: the largest entry of max(sd_i, sd_j) to 1, the least to 0."""
    low, high = deviation.aminmax()
    if float(high - low) <= EQUAL * float(high):
        return torch.zeros_like(deviation)
    return (deviation - low) / (high - low)


def _fill(edges: Tensor, dead: Tensor, value: float) -> Tensor:
    """Set the rows and columns of dead features, in place."""
    edges[dead] = value
    edges[:, dead] = value
    return edges


def measure_deviation(features: Tensor) -> Tensor:
    """Standard deviation of each column, divisor N, float64 [D]; exactly 0 if constant.

    features: [N, D]. Two passes over values stretched to [0, 1], so that neither a
    large mean nor a tiny or huge unit costs digits. ValueError as in `inf_fs`.
    """
    features, found = check_features(features), []
    for columns in features.split(max(1, TILE // len(features)), 1):
        columns = columns.double()
        low, high = columns.aminmax(dim=0)
        width = high - low
        unit = (columns - low) / torch.where(width > 0, width, 1.0)
        found.append(unit.std(0, correction=0) * width)
    return torch.cat(found)


# -- rank correlation ------------------------------------------------------------------


def rank_columns(features: Tensor) -> Tensor:
    """Ranks 1..N within each column, ties sharing their mean: [N, D].

    features: [N, D]; returned: float32 up to N = 2^23, where half-integers are exact,
    float64 beyond. -0.0 ties with 0.0. As `scipy.stats.rankdata(features, axis=0)`.
    ValueError as in `inf_fs`.
    """
    features = check_features(features)
    return centre_ranks(features).add_(len(features) + 1).div_(2).T


def spearman(features: Tensor) -> Tensor:
    """Spearman's rank correlation of the columns, float64 [D, D]; nan for a constant.

    features: [N, D]. Up to N = 200,000 the products are sums of integers below 2^53:
    exact, whatever the order of samples, features or summation, and exactly 1 between
    columns of equal ranks. As `scipy.stats.spearmanr`. ValueError as in `inf_fs`.
    """
    ranks = centre_ranks(check_features(features))
    size = len(ranks)
    gram = torch.zeros(size, size, dtype=torch.float64, device=ranks.device)
    scratch = torch.empty(size, CHUNK, dtype=torch.float64, device=ranks.device)
    for chunk in ranks.split(CHUNK, 1):
        chunk = scratch[:, : chunk.shape[1]].copy_(chunk)
        for start in range(0, size, BLOCK):  # blocks on and above the diagonal
            rows = chunk[start : start + BLOCK]
            gram[start : start + BLOCK, start:].addmm_(rows, chunk[start:].T)
    for start in range(0, size, BLOCK):
        stop = start + BLOCK
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    energy = gram.diagonal().clone()
    for rows, own in zip(gram.split(BLOCK), energy.split(BLOCK), strict=True):
        rows /= own.outer(energy).sqrt()  # sqrt(a a) is a, sqrt(a) sqrt(a) may not be
    return gram


# -- all paths -------------------------------------------------------------------------


def sum_paths(matrix: Tensor, r: float) -> Tensor:
    """Row sums of (I - r A)^-1 - I, the weight of all walks from each node.

    matrix: A, symmetric [D, D]; 0 <= r < 1 / (largest eigenvalue of A); returned:
    float64 [D]. By conjugate gradients, to rounding times the condition number, which
    is (1 + r rho) / (1 - r rho) at most.
    ValueError: A not square, symmetric and finite; r negative or too large.
    """
    if not 0 <= r < float("inf"):
        raise ValueError(f"r: expected 0 <= r < 1 / spectral_radius(matrix), got {r}")
    return _solve_paths(check_symmetric(matrix), r)


def _solve_paths(matrix: Tensor, r: float) -> Tensor:
    """Conjugate gradients on (I - r A) s = r A 1."""
    residual = r * matrix.sum(1)
    solution, direction = torch.zeros_like(residual), residual.clone()
    energy = float(residual @ residual)
    goal = 1e-30 * energy
    for _ in range(SOLVER_STEPS):
        if energy <= goal:
            return solution
        image = direction - r * (matrix @ direction)
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        solution += energy / curvature * direction
        residual -= energy / curvature * image
        energy, before = float(residual @ residual), energy
        direction = residual + energy / before * direction
    raise ValueError(
        f"the sum over all paths diverges at r = {r:.6g}; choose r below "
        "1 / spectral_radius(matrix)"
    )


def spectral_radius(matrix: Tensor) -> float:
    """Largest |eigenvalue| of a symmetric matrix [D, D], by power iteration.

    |A v| / |v| grows towards it, also where -rho is an eigenvalue as well; it stops
    where the geometric rest is below 1e-14. The graphs of `weigh_edges` take some ten
    steps; where 60 are too few, Lanczos' method goes on from there. Relative error:
    rounding, but for eigenvalues within a thousandth of the largest up to 1e-4.
    ValueError: not square, symmetric and finite.
    """
    return _measure_radius(check_symmetric(matrix))


def _measure_radius(matrix: Tensor) -> float:
    low, high = matrix.aminmax()
    peak = max(-float(low), float(high))
    return peak and peak * _iterate_power(lambda v: matrix @ (v / peak), matrix[0])


def _iterate_power(multiply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Largest |eigenvalue| of the symmetric map, its largest entry being one."""
    v = 1 + torch.arange(len(like)).to(like).cos() / 2  # positive, yet of no symmetry
    v, size, change = v / v.norm(), 0.0, 0.0
    for k in range(POWER_STEPS):
        w = multiply(v)
        grown = float(w.norm())
        if grown == 0:
            return 0.0
        v, step = w / grown, grown - size
        # step q / (1 - q), with q = step / change, is still to come
        done = step <= 1e-15 * grown or step**2 <= 1e-14 * grown * (change - step)
        if k > 1 and done:
            return grown
        size, change = grown, step
    return max(grown, _iterate_lanczos(multiply, v))


def _iterate_lanczos(multiply: Callable[[Tensor], Tensor], v: Tensor) -> float:
    """Largest |eigenvalue| on the span of v, A v, A^2 v, ..., a tridiagonal map."""
    steps = min(LANCZOS_STEPS, len(v))
    small = torch.zeros(steps, steps, dtype=torch.float64)
    previous, link = torch.zeros_like(v), 0.0
    for k in range(steps):
        w = multiply(v) - link * previous
        level = float(w @ v)
        w, small[k, k] = w - level * v, level
        link = float(w.norm())
        if k + 1 == steps or link <= 1e-14:
            break
        small[k, k + 1] = small[k + 1, k] = link
        previous, v = v, w / link
    return float(torch.linalg.eigvalsh(small).abs().max())


# -- what is refused -------------------------------------------------------------------


def check_features(features: Tensor) -> Tensor:
    """features [N, D], detached and real; ValueError for what cannot be ranked."""
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
    features = features.detach()
    if features.sum().isfinite():  # the usual case, ten times as fast
        return features if features.is_floating_point() else features.double()
    bad = features.isfinite().all(0).logical_not().nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"features: {len(bad)} of {features.shape[1]} columns hold nan or inf, the "
            f"first is {int(bad[0])}; look for an overflow in the network or its input"
        )
    return features if features.is_floating_point() else features.double()


def check_symmetric(matrix: Tensor) -> Tensor:
    """The matrix in float64; ValueError unless it is square, finite and symmetric."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix: expected [D, D], got {list(matrix.shape)}")
    matrix = matrix.detach().double()
    probe = torch.arange(len(matrix), device=matrix.device).double().cos()
    rows, columns = matrix @ probe, matrix.T @ probe
    if not rows.isfinite().all():
        raise ValueError("matrix: holds nan or inf; mask constant features first")
    gap = 1e9 * float((rows - columns).norm())
    if gap > float(rows.norm()) and gap > float(matrix.norm() * probe.norm()):
        raise ValueError("matrix: expected a symmetric one; average it with its own T")
    return matrix


def check_options(alpha: float, variant: str) -> None:
    """ValueError for an alpha outside [0, 1] or an unknown variant."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}, expected one of {VARIANTS}")
