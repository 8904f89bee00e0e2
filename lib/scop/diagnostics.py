"""Is a control a knockoff? Two-sample tests, moments, and what layers leave of them.

Exchangeability says that [X, X~] keeps its distribution when any set of columns changes
places with their controls. Every independent copy passes the full swap (all columns); a
partial one it fails. Samples are [n, p], one row per image, in float64 inside.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.graph.watch import modes_kept, recorded
from lib.messages import check_finite, check_known
from lib.scop.controls.base import exchange
from lib.scop.controls.gaussian import check_covariance
from lib.settings import check_int

OCTAVES = tuple(2.0**k for k in range(8))  # 1, 2, ..., 128
SWAPS = ("full", "partial")


@dataclass(frozen=True)
class SwapTest:
    """What `two_sample_test` found.

    statistic: unbiased squared MMD, summed over the bandwidths; p_value: one-sided;
    z: the statistic over its root mean square in the permutations.
    """

    statistic: float
    p_value: float
    z: float
    bandwidths: tuple[float, ...]


# -- two-sample tests ------------------------------------------------------------------


def split_pairs(
    x: Tensor,
    knock: Tensor,
    *,
    swap: str = "full",
    groups: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """[X', X~'] of a random half of the rows, [X'', X~''] of the other half, swapped.

    x, knock: [n, p]; returned: two float64 [n // 2, 2 p], equally distributed where the
    swap leaves the distribution alone. swap "full": every column; "partial": each with
    probability 1/2, one draw from `seed` for all rows (Romano et al. 2020), but never
    all or none. groups: int [p], columns with one label swap as one unit.
    ValueError: fewer than 8 rows, an unknown swap, a partial swap of a single unit.
    """
    if x.dim() != 2 or x.shape != knock.shape:
        raise ValueError(
            "expected x and knock of one shape [n, p], got "
            f"{list(x.shape)} and {list(knock.shape)}"
        )
    if len(x) < 8 or swap not in SWAPS:
        raise ValueError(
            f"expected at least 8 rows and swap one of {SWAPS}, got {len(x)} rows and "
            f"swap={swap!r}"
        )
    check_finite("the sample", {"x": x, "knock": knock})
    # Halves of the rows, for the same ones before and after a swap are no two samples.
    generator, half = torch.Generator().manual_seed(seed), len(x) // 2
    mask = _draw_mask(x.shape[1], swap, groups, generator).to(x.device)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    x, knock = x.detach().double(), knock.detach().double()
    joint, other = torch.cat([x, knock], 1), torch.cat(exchange(x, knock, mask), 1)
    return joint[order[:half]], other[order[half : 2 * half]]


def _draw_mask(
    p: int, kind: str, groups: Tensor | None, generator: torch.Generator
) -> Tensor:
    if groups is not None and groups.shape != (p,):
        raise ValueError(f"groups: expected [{p}] labels, got {list(groups.shape)}")
    if kind == "full":
        return torch.ones(p, dtype=torch.bool)
    labels = torch.arange(p) if groups is None else groups.cpu()
    units, unit_of = labels.unique(return_inverse=True)
    if len(units) < 2:
        raise ValueError("a partial swap needs at least two columns or groups")
    while True:
        drawn = torch.rand(len(units), generator=generator) < 0.5
        if drawn.any() and not drawn.all():
            return drawn[unit_of]


def two_sample_test(
    x: Tensor,
    knock: Tensor,
    *,
    swap: str = "full",
    groups: Tensor | None = None,
    bandwidths: Iterable[float] | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> SwapTest:
    """Whether a swap changes the distribution of [X, X~], by a kernel permutation test.

    x, knock: [n, p], rows independent of one another (a batch shuffled in itself is not
    quite: z comes out low); halves, `swap`, `groups` as in `split_pairs`. The statistic
    is the unbiased squared MMD (Gretton et al. 2012, lemma 6) for the sum over sigma of
    exp(-|a - b|^2 / (2 sigma^2)). bandwidths: the sigmas in the data's units; default
    (1, 2, ..., 128) times an eighth of the root mean square distance of the pooled
    rows. Time and memory grow with n^2.
    ValueError: as `split_pairs`, no positive bandwidth, constant data.
    """
    pooled = torch.cat(split_pairs(x, knock, swap=swap, groups=groups, seed=seed))
    widths = _choose_bandwidths(pooled, bandwidths)
    check_int("permutations", permutations, 1)
    sides = _permute_sides(len(pooled), permutations, seed).to(pooled)
    observed, *null = _permuted_mmd(pooled, sides, widths).tolist()
    # Around 0, which is the mean of an unbiased statistic if there is no difference.
    null_sd = math.sqrt(sum(value**2 for value in null) / permutations)
    # The observed split is one of all the equally likely ones, hence the 1 + in both
    # places: the p value is exact for any number of permutations.
    above = sum(value >= observed for value in null)
    return SwapTest(
        statistic=observed,
        p_value=(1 + above) / (1 + permutations),
        z=observed / null_sd if null_sd else 0.0,
        bandwidths=widths,
    )


def _choose_bandwidths(
    pooled: Tensor, given: Iterable[float] | None
) -> tuple[float, ...]:
    if given is not None:
        widths = tuple(float(sigma) for sigma in given)
        if not widths or not all(0 < width < math.inf for width in widths):
            raise ValueError(f"bandwidths: expected positive numbers, got {widths}")
        return widths
    # 2 tr Cov is the mean squared distance of two rows. Of the pooled rows, so that no
    # permutation changes it, and bandwidths chosen by the data leave the test exact.
    unit = float((2 * pooled.var(0).sum()).sqrt()) / 8
    if not 0 < unit < float("inf"):
        raise ValueError("x and knock: expected finite rows that are not all equal")
    return tuple(unit * octave for octave in OCTAVES)


def _permute_sides(rows: int, permutations: int, seed: int) -> Tensor:
    """+1 for a half, -1 for the other, [rows, 1 + permutations]; first as they are."""
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(rows, 1 + permutations, generator=generator).argsort(0)
    order[:, 0] = torch.arange(rows)
    return torch.where(order < rows // 2, 1.0, -1.0)


def _permuted_mmd(pooled: Tensor, sides: Tensor, widths: tuple) -> Tensor:
    """Unbiased squared MMD for every column of `sides` [rows, splits]."""
    squares = torch.cdist(pooled, pooled).square()
    kernel = sum(torch.exp(squares / (-2 * sigma**2)) for sigma in widths)
    kernel.fill_diagonal_(0)  # a row's likeness to itself is what the bias consists of
    # The columns u are +-1, so that u'Ku is what pairs on one side have more than those
    # across: the kernel is built once, and one product serves all permutations.
    total, excess = kernel.sum(), (sides * (kernel @ sides)).sum(0)
    within, across, m = (total + excess) / 2, (total - excess) / 2, len(pooled) // 2
    return within / (m * (m - 1)) - across / m**2


# -- second moments --------------------------------------------------------------------


def covariance_gap(
    x: Tensor,
    knock: Tensor,
    *,
    swap: str = "full",
    groups: Tensor | None = None,
    seed: int = 0,
) -> float:
    """|S1 - S2|_F^2 of the joint covariances before and after a swap, unbiased.

    x, knock: [n, p]; halves, swaps and errors as in `split_pairs`. Zero in expectation
    for a knockoff, so of either sign. Li & Chen (2012), in the closed form of Himeno &
    Yamada (2014).
    """
    first, second = split_pairs(x, knock, swap=swap, groups=groups, seed=seed)
    # Multiplied out, as |S|^2 of a sample covariance is too large by its noise. The
    # halves are independent, so that their product needs no such correction.
    one, two = _estimate_energy(first), _estimate_energy(second)
    cross = (torch.cov(first.T) * torch.cov(second.T)).sum()
    return float(one + two - 2 * cross)


def _estimate_energy(x: Tensor) -> Tensor:
    """Unbiased |Sigma|_F^2 from the rows of x [n, p], n >= 4, whatever their law."""
    n = len(x)
    covariance = torch.cov(x.T)
    fourth = (x - x.mean(0)).square().sum(1).square().sum() / (n - 1)
    within = (n - 1) * (n - 2) * covariance.square().sum()
    total = within + covariance.trace() ** 2 - n * fourth
    return (n - 1) / (n * (n - 2) * (n - 3)) * total


def correlation_floor(covariance: Tensor) -> Tensor:
    """The lowest corr(x_j, x~_j) any second-order knockoff can have, float64 [p].

    covariance: [p, p], positive definite. Each bound alone is attained, not all at
    once. ValueError: a singular covariance.
    """
    # The correlation is 1 - s_j / Sigma_jj, and 2 Sigma - S >= 0 gives s_j <= 2 /
    # (Sigma^-1)_jj, twice the variance of x_j given the rest.
    covariance = check_covariance(covariance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return 1 - 2 / (inverse.diagonal() * covariance.diagonal())


# -- layers ----------------------------------------------------------------------------


def offdiagonal_energy(weight: Tensor, d: Tensor) -> float:
    """Share of |W D W'|_F^2 that lies off the diagonal, 0..1.

    weight: [out, in] or [out, in, kh, kw]; d: [in], or one value per weight of a filter
    [in * kh * kw], the diagonal of D = Cov(X) - Cov(X, X~). A linear map takes Cov(A) -
    Cov(A, A~) from D to W D W', so second-order exchangeability survives it iff this is
    0. A grouped convolution: give one group's rows at a time. ValueError: d does not
    fit.
    """
    check_finite("the map", {"weight": weight, "d": d})
    rows, d = weight.detach().double().flatten(1), d.detach().double().flatten()
    if weight.dim() > 2 and len(d) == weight.shape[1]:
        d = d.repeat_interleave(rows.shape[1] // weight.shape[1])
    if len(d) != rows.shape[1]:
        raise ValueError(
            f"d: expected {weight.shape[1]} or {rows.shape[1]} values for a weight "
            f"{list(weight.shape)}, got {len(d)}"
        )
    return _offdiagonal_share((rows * d) @ rows.T)


def _offdiagonal_share(matrix: Tensor) -> float:
    total = float(matrix.square().sum())
    rest = float((matrix - matrix.diagonal().diag()).square().sum())
    return rest / total if total else 0.0


def layer_energies(
    model: nn.Module,
    real: Tensor,
    knock: Tensor,
    layers: Iterable[str],
    *,
    samples: int = 20_000,
    seed: int = 0,
) -> dict[str, float]:
    """Off-diagonal share at the outputs of named layers, from 0 (exchangeable) to 1.

    real, knock: [B, C, H, W]. With channels as variables and positions as samples (at
    most `samples` of them, the same in both passes), M = Cov(A) - (Cov(A, A~) +
    Cov(A~, A)) / 2, and the value is the share of |M|_F^2 off the diagonal. Estimation
    noise adds to it, about channels / samples.
    ValueError: an unknown layer, or one that takes no part in the forward pass.
    """
    names, device = list(layers), next(model.parameters()).device
    check_known("layer", names, [name for name, _ in model.named_modules()])
    with modes_kept(model), recorded(model, names) as seen, torch.no_grad():
        model.eval()
        for batch in (real, knock):
            model(batch.to(device))
    shares = {}
    for name, outputs in seen.items():
        if not outputs:
            raise ValueError(f"layer '{name}' takes no part in the forward pass")
        last = outputs[len(outputs) // 2 - 1], outputs[-1]  # of each pass
        a, b = (_sample_positions(output, samples, seed) for output in last)
        shares[name] = _offdiagonal_share(a.T @ a - (a.T @ b + b.T @ a) / 2)
    return shares


def _sample_positions(output: Tensor, samples: int, seed: int) -> Tensor:
    """Float64 [positions, channels] of [B, C, H, W], centred; the same for one seed."""
    rows = output.flatten(2).transpose(1, 2).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:samples]
    rows = rows[chosen.to(rows.device)].double()
    return rows - rows.mean(0)
