"""Is a control a knockoff? Two-sample tests, moments, and what layers leave of them.

Exchangeability says that [X, X~] keeps its distribution when any set of columns changes
places with their controls. The full swap (all columns) is the weak half of it: every
independent copy passes. A partial swap is what an independent copy fails. Sample
matrices are [n, p], one row per image, in float64 inside.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.graph.watch import modes_kept
from lib.scop.controls.gaussian import check_covariance

OCTAVES = tuple(2.0**k for k in range(8))  # 1, 2, ..., 128
SWAPS = ("full", "partial")
TILE = 512


@dataclass(frozen=True)
class SwapTest:
    """What `two_sample_test` found; `z` is statistic / null_sd, the null mean being 0.

    statistic: unbiased squared MMD, summed over the bandwidths; p_value: one-sided;
    null_sd: root mean square of the statistic over the permutations; rows: in a half.
    """

    statistic: float
    p_value: float
    null_sd: float
    z: float
    swap: str
    rows: int
    bandwidths: tuple[float, ...]


def swap(x: Tensor, knock: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(x', knock') with the masked columns of x and knock [n, p] exchanged.

    columns: bool [p], or [n, p] for another set in each row.
    ValueError: shapes that differ, or a mask that is not bool.
    """
    check_pair(x, knock)
    if columns.dtype != torch.bool or columns.shape[-1:] != x.shape[1:]:
        raise ValueError(
            f"columns: expected a bool mask ending in {x.shape[1]}, got "
            f"{columns.dtype} {list(columns.shape)}"
        )
    columns = columns.to(x.device)
    return torch.where(columns, knock, x), torch.where(columns, x, knock)


def check_pair(x: Tensor, knock: Tensor) -> None:
    """ValueError unless both are [n, p] of one shape."""
    if x.dim() != 2 or x.shape != knock.shape:
        raise ValueError(
            "expected x and knock of one shape [n, p], got "
            f"{list(x.shape)} and {list(knock.shape)}"
        )


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
    check_pair(x, knock)
    if len(x) < 8 or swap not in SWAPS:
        raise ValueError(
            f"expected at least 8 rows and swap one of {SWAPS}, got {len(x)} rows and "
            f"swap={swap!r}"
        )
    generator, half = torch.Generator().manual_seed(seed), len(x) // 2
    mask = _draw_mask(x.shape[1], swap, groups, generator).to(x.device)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    joint = torch.cat([x, knock], 1).detach().double()
    other = torch.cat([torch.where(mask, knock, x), torch.where(mask, x, knock)], 1)
    return joint[order[:half]], other[order[half : 2 * half]].detach().double()


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
    rows, which no permutation changes. p_value: (1 + those not below) / (1 +
    permutations), exact. Time grows with n^2, memory with n.
    ValueError: as `split_pairs`, no positive bandwidth, constant data.
    """
    first, second = split_pairs(x, knock, swap=swap, groups=groups, seed=seed)
    pooled = torch.cat([first, second])
    widths = _choose_bandwidths(pooled, bandwidths)
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}")
    member = _permute_members(len(pooled), permutations, seed).to(pooled)
    observed, *null = _permuted_mmd(pooled, member, widths).tolist()
    null_sd = math.sqrt(sum(value**2 for value in null) / permutations)
    above = sum(value >= observed for value in null)
    return SwapTest(
        statistic=observed,
        p_value=(1 + above) / (1 + permutations),
        null_sd=null_sd,
        z=observed / null_sd if null_sd else 0.0,
        swap=swap,
        rows=len(first),
        bandwidths=widths,
    )


def _choose_bandwidths(
    pooled: Tensor, given: Iterable[float] | None
) -> tuple[float, ...]:
    if given is not None:
        widths = tuple(float(sigma) for sigma in given)
        if not widths or min(widths) <= 0:
            raise ValueError(f"bandwidths: expected positive numbers, got {widths}")
        return widths
    unit = float((2 * pooled.var(0).sum()).sqrt()) / 8
    if not 0 < unit < float("inf"):
        raise ValueError("x and knock: expected finite rows that are not all equal")
    return tuple(unit * octave for octave in OCTAVES)


def _permute_members(rows: int, permutations: int, seed: int) -> Tensor:
    """Bool [rows, 1 + permutations]: the first half, then random halves."""
    generator = torch.Generator().manual_seed(seed + 1)
    keys = torch.rand(rows, 1 + permutations, generator=generator)
    member = keys.argsort(0) < rows // 2
    member[:, 0] = torch.arange(rows) < rows // 2
    return member


def _permuted_mmd(pooled: Tensor, member: Tensor, widths: tuple) -> Tensor:
    """Unbiased squared MMD for every column of `member` [rows, splits], in tiles.

    With K of zero diagonal, b a column and r the row sums: within the first half
    b'K b, across b'r - b'K b, within the second the rest of the total.
    """
    inside, sums, squares = torch.zeros_like(member[0]), [], pooled.square().sum(1)
    for start in range(0, len(pooled), TILE):
        tile = slice(start, start + TILE)
        kernel = _sum_kernels(pooled, squares, tile, widths)
        inside += (member[tile] * (kernel @ member)).sum(0)
        sums.append(kernel.sum(1))
    rows = torch.cat(sums)
    across = rows @ member - inside
    other = rows.sum() - 2 * across - inside
    m = len(pooled) // 2
    return (inside + other) / (m * (m - 1)) - 2 * across / m**2


def _sum_kernels(pooled: Tensor, squares: Tensor, tile: slice, widths: tuple) -> Tensor:
    """Rows `tile` of the kernel matrix of the pooled rows, the diagonal zero."""
    distance = squares[tile, None] + squares - 2 * pooled[tile] @ pooled.T
    distance.clamp_(min=0)
    kernel = sum(torch.exp(distance / (-2 * sigma**2)) for sigma in widths)
    kernel.diagonal(tile.start).zero_()
    return kernel


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

    x, knock: [n, p]; halves and swaps as in `split_pairs`. <S1, S2> is estimated by the
    sample covariances of the two independent halves, |S|^2 in each half by the
    U-statistic of Li & Chen (2012) in the closed form of Himeno & Yamada (2014). Zero
    in expectation for a knockoff, so of either sign. ValueError as `split_pairs`.
    """
    first, second = split_pairs(x, knock, swap=swap, groups=groups, seed=seed)
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


def cross_covariance(x: Tensor, knock: Tensor) -> Tensor:
    """Cov(x_i, knock_j), divisor n - 1, float64 [p, p], for x and knock [n, p]."""
    check_pair(x, knock)
    x, knock = x.detach().double(), knock.detach().double()
    return (x - x.mean(0)).T @ (knock - knock.mean(0)) / (len(x) - 1)


def coordinate_correlation(x: Tensor, knock: Tensor) -> Tensor:
    """corr(x_j, knock_j), float64 [p], for x and knock [n, p]; nan for a constant.

    The lower, the easier a control is to tell from the original, hence the power; for
    second-order knockoffs it cannot be below `correlation_floor`.
    """
    check_pair(x, knock)
    x, knock = x.detach().double(), knock.detach().double()
    x, knock = x - x.mean(0), knock - knock.mean(0)
    scale = (x.square().sum(0) * knock.square().sum(0)).sqrt()
    return (x * knock).sum(0) / scale


def exchangeability_gap(x: Tensor, knock: Tensor) -> dict[str, float]:
    """How far second moments are from a knockoff's, on the correlation scale of x.

    x, knock: [n, p], p >= 2. `covariance_max`, `covariance_mean`: of
    |Cov(X) - Cov(X~)|; `cross_max`, `cross_mean`: of |Cov(X) - Cov(X, X~)| off its
    diagonal. Each entry ij is divided by sd(x_i) sd(x_j), a constant column taking the
    mean sd. Sampling noise alone gives about 1 / sqrt(n).
    """
    own = cross_covariance(x, x)
    spread = own.diagonal().sqrt()
    spread = torch.where(spread > 0, spread, spread.mean())
    scale = spread.outer(spread)
    gap = ((own - cross_covariance(knock, knock)) / scale).abs()
    cross = ((own - cross_covariance(x, knock)) / scale).abs()
    off = cross[~torch.eye(len(own), dtype=torch.bool, device=own.device)]
    return {
        f"{name}_{kind}": float(getattr(value, kind)())
        for name, value in (("covariance", gap), ("cross", off))
        for kind in ("max", "mean")
    }


def correlation_floor(covariance: Tensor) -> Tensor:
    """The lowest corr(x_j, x~_j) any second-order knockoff can have, float64 [p].

    covariance: [p, p], positive definite. 2 Sigma - S >= 0 gives s_j <= 2 /
    (Sigma^-1)_jj, twice the variance of x_j given the rest, and the correlation is
    1 - s_j / Sigma_jj; each bound alone is attained, not all of them at once.
    ValueError for a singular covariance.
    """
    covariance = check_covariance(covariance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return 1 - 2 / (inverse.diagonal() * covariance.diagonal())


# -- layers ----------------------------------------------------------------------------


def offdiagonal_energy(weight: Tensor, d: Tensor) -> float:
    """Share of |W D W'|_F^2 that lies off the diagonal, 0..1.

    weight: [out, in] or [out, in, kh, kw]; d: [in], or one value per weight of a filter
    [in * kh * kw], the diagonal of D = Cov(X) - Cov(X, X~). A linear map takes Cov(A) -
    Cov(A, A~) from D to W D W', so second-order exchangeability survives it iff this is
    0. A grouped convolution: give one group's rows at a time. 0 where W D W' vanishes.
    ValueError where d does not fit.
    """
    rows = weight.detach().double().flatten(1)
    d = d.detach().double().flatten()
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
    if total == 0:
        return 0.0
    return float((matrix - matrix.diagonal().diag()).square().sum()) / total


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
    noise adds to it, about channels / samples. The model keeps its modes and hooks.
    ValueError: other shapes, an unknown layer, fewer than 2 samples.
    """
    names = list(layers)
    if real.shape != knock.shape or real.dim() != 4:
        raise ValueError(
            "expected real and knock of one shape [B, C, H, W], got "
            f"{list(real.shape)} and {list(knock.shape)}"
        )
    features = _read_features(model, real, names, samples, seed)
    controls = _read_features(model, knock, names, samples, seed)
    shares = {}
    for name in names:
        cross = cross_covariance(features[name], controls[name])
        own = cross_covariance(features[name], features[name])
        shares[name] = _offdiagonal_share(own - (cross + cross.T) / 2)
    return shares


def _read_features(
    model: nn.Module, batch: Tensor, names: list[str], samples: int, seed: int
) -> dict[str, Tensor]:
    """Float64 [positions, channels] at the output of each layer, in evaluation."""
    found: dict[str, Tensor] = {}
    with modes_kept(model), _hooked(model, names, found, samples, seed):
        model.eval()
        with torch.no_grad():
            model(batch)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"layers {missing} take no part in the forward pass")
    return found


@contextmanager
def _hooked(
    model: nn.Module, names: list[str], found: dict, samples: int, seed: int
) -> Iterator[None]:
    """Keep a sample of each layer's output while the block runs."""
    modules = {module: name for name, module in model.named_modules()}
    if unknown := sorted(set(names) - set(modules.values())):
        raise ValueError(f"layers {unknown} are not in the model")

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows = output.flatten(2).transpose(1, 2).flatten(0, 1)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows), generator=generator)[:samples]
        found[modules[module]] = rows[chosen.to(rows.device)].double()

    handles = [
        module.register_forward_hook(keep)
        for module, name in modules.items()
        if name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
