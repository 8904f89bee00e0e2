"""Inf-FS: ranks, graph and path sums against SciPy, networkx and dense formulas."""

import networkx as nx
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.nisp import inf_fs
from lib.nisp.infinite import (
    VARIANTS,
    build_graph_matrix,
    measure_deviation,
    score_graph,
    spearman,
    spectral_radius,
    sum_paths,
    weigh_edges,
)

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=40, deadline=None)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_features(n=120, d=12, *, seed=0, dead=(), dtype=torch.float32):
    """Correlated responses after a ReLU, more than half of them zero."""
    hidden = torch.randn(n, 4, generator=seeded(seed))
    mix = torch.randn(4, d, generator=seeded(seed + 1))
    noise = torch.randn(n, d, generator=seeded(seed + 2))
    scale = torch.linspace(0.5, 3, d)[torch.randperm(d, generator=seeded(seed + 3))]
    features = torch.relu(hidden @ mix + 0.7 * noise - 0.3) * scale
    features[:, list(dead)] = 0
    return features.to(dtype)


# Few values: ties of every length; both signs, so that -0.0 comes up as well.
tied = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
    elements=st.sampled_from([0.0, -0.0, 1.0, -1.5, 2.0, 1e-40, -3e38]),
)
wild = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
    elements=st.floats(-1e300, 1e300, allow_nan=False),
)


def textbook(x: np.ndarray, alpha: float, variant: str, mask: bool) -> np.ndarray:
    """The scores in dense linear algebra, one formula a line."""
    sd = x.std(0)
    live = sd > 0
    rho = np.zeros((len(sd), len(sd)))
    ranks = scipy.stats.rankdata(x[:, live], axis=0)
    rho[np.ix_(live, live)] = np.corrcoef(ranks.T)
    c = 1 - abs(rho)
    if mask:
        c[~live], c[:, ~live] = 0, 0
    sigma = np.maximum.outer(sd, sd)
    sigma01 = (sigma - sigma.min()) / (sigma.max() - sigma.min())
    a = {
        "default": alpha * sigma01 + (1 - alpha) * c,
        "y2020": alpha * sigma01 + (1 - alpha) * c,
        "raw2015": alpha * sigma + (1 - alpha) * c,
        "v4_2016": alpha * rho + (1 - alpha) * sigma01,
    }[variant]
    r, identity = 0.9 / np.linalg.eig(a)[0].real.max(), np.eye(len(a))
    if variant == "y2020":
        small = a / a.sum(1).max()
        r = (1 - 5e-6 * len(a)) / np.linalg.eig(a)[0].real.max()
        return np.linalg.inv(identity - r * small).sum(1)
    return (np.linalg.inv(identity - r * a) - identity).sum(1)


# -- ranks and correlation -------------------------------------------------------------


@few
@given(tied)
def test_spearman_is_scipys_with_many_ties(x):
    found = spearman(torch.from_numpy(x)).numpy()
    with np.errstate(invalid="ignore"):
        expected = np.atleast_2d(np.corrcoef(scipy.stats.rankdata(x, axis=0).T))
    dead = (x == x[:1]).all(0)
    np.testing.assert_array_equal(np.isnan(found), dead[:, None] | dead)
    np.testing.assert_allclose(found[~dead][:, ~dead], expected[~dead][:, ~dead],
                               rtol=0, atol=1e-13)  # fmt: skip


def test_equal_ranks_correlate_at_exactly_one_whatever_the_unit():
    x = draw_features(501, 6)
    x = torch.cat([x, 3 * x[:, :1] + 1, -x[:, :1], x[:, :1]], 1)
    found = spearman(x)
    assert found[0, 6] == found[0, 8] == 1 and found[0, 7] == -1
    assert (found[0, 1:6].abs() < 1).all()


# -- path sums -------------------------------------------------------------------------


def katz(matrix, r: float) -> np.ndarray:
    """Katz centrality with beta 1, not normalised, self-loops included."""
    graph = nx.from_numpy_array(matrix.numpy())
    found = nx.katz_centrality_numpy(
        graph, alpha=r, beta=1.0, normalized=False, weight="weight"
    )
    return np.array([found[i] for i in range(len(matrix))])


@pytest.mark.parametrize("variant", ["default", "raw2015", "v4_2016"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_scores_are_katz_centrality_less_one(variant, alpha):
    x = draw_features(dead=[7])
    matrix = build_graph_matrix(x, alpha, variant)
    r = 0.9 / np.linalg.eigvalsh(matrix)[-1]
    found = inf_fs(x, alpha=alpha, variant=variant)
    assert found.dtype == torch.float64 and found.shape == (12,)
    np.testing.assert_allclose(found, katz(matrix, r) - 1, **EXACT)


def test_scores_are_the_truncated_power_series():
    x = draw_features()
    matrix = build_graph_matrix(x).numpy()
    step, total = np.ones(12), np.zeros(12)
    for _ in range(400):
        step = 0.9 / np.linalg.eigvalsh(matrix)[-1] * matrix @ step
        total += step
    np.testing.assert_allclose(inf_fs(x), total, **EXACT)


def test_a_walk_on_two_nodes_by_hand():
    # A = [[0, w], [w, 0]] and x = r w: s = x + x^2 + ... = x / (1 - x).
    matrix = torch.tensor([[0.0, 2], [2, 0]])
    torch.testing.assert_close(
        sum_paths(matrix, 0.25), torch.ones(2).double(), rtol=1e-14, atol=0
    )
    assert spectral_radius(matrix) == pytest.approx(2, rel=1e-15)
    assert score_graph(matrix).tolist() == pytest.approx([9, 9], rel=1e-12)
    assert sum_paths(matrix, 0.0).tolist() == [0, 0]
    for r in (0.5, 0.6, 50.0):
        with pytest.raises(ValueError, match="diverges"):
            sum_paths(matrix, r)


@few
@given(st.integers(1, 30), st.integers(0, 999), st.sampled_from(["abs", "any", "psd"]))
def test_spectral_radius_is_the_largest_eigenvalue(size, seed, kind):
    root = torch.randn(size, size, generator=seeded(seed)).double()
    matrix = {"abs": (root + root.T).abs(), "any": root + root.T, "psd": root @ root.T}
    expected = np.abs(np.linalg.eigvalsh(matrix[kind])).max()
    assert spectral_radius(matrix[kind]) == pytest.approx(expected, rel=1e-9)
    huge = spectral_radius(1e250 * matrix[kind])
    assert huge == pytest.approx(1e250 * expected, rel=1e-9)


@pytest.mark.parametrize("gap", [0.5, 0.1, 0.01, 1e-4])
def test_spectral_radius_where_eigenvalues_crowd(gap):
    basis = torch.linalg.qr(torch.randn(40, 40, generator=seeded(0)).double())[0]
    values = torch.cat([torch.tensor([-1.0]), torch.linspace(0, 1 - gap, 39)]).double()
    found = spectral_radius(basis * values @ basis.T)
    assert found == pytest.approx(1, rel=1e-10)


# -- the graph and its variants --------------------------------------------------------


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_variants_are_their_dense_formulas(variant, alpha, mask):
    x = draw_features(dead=[2, 9], dtype=torch.float64)
    found = inf_fs(x, alpha=alpha, variant=variant, mask_dead=mask)
    expected = textbook(x.numpy(), alpha, variant, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_variants_differ_and_the_2020_one_ranks_by_row_sums():
    x = draw_features(500, 40)
    scores = {variant: inf_fs(x, alpha=0.4, variant=variant) for variant in VARIANTS}
    orders = {tuple(s.argsort().tolist()) for s in scores.values()}
    assert len(orders) >= 3
    degree = build_graph_matrix(x, 0.4).sum(1)
    assert scipy.stats.spearmanr(scores["y2020"], degree).statistic > 0.999
    assert 1 < scores["y2020"].min() and scores["y2020"].max() < 1.05


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_dead_features_rank_last_unless_the_mask_is_off(alpha):
    x = draw_features(400, 60, dead=[5, 31])
    x[:, 31] = 0.1  # constant, but not zero
    scores = inf_fs(x, alpha=alpha)
    assert sorted(scores.argsort()[:2].tolist()) == [5, 31]
    assert scores[[5, 31]].max() < scores.sort()[0][2]
    trap = inf_fs(x, alpha=alpha, mask_dead=False)
    if alpha == 0:
        assert sorted(trap.argsort()[-2:].tolist()) == [5, 31]
    elif alpha == 1:
        assert torch.equal(trap, scores)
    else:
        assert (trap > trap[5]).sum() < 45


def test_alpha_one_ranks_by_spread_and_alpha_zero_by_redundancy():
    x = draw_features(400, 8)
    x[:, 7] = 0.01 * torch.rand(400, generator=seeded(8))  # new, but hardly spreads
    x[:, 0] = x[:, 1]
    spread = measure_deviation(x)
    ranked = spread[inf_fs(x, alpha=1.0).argsort()]  # of the two alike either is first
    assert (ranked.diff() > -1e-9).all()
    matrix = build_graph_matrix(x, 0.0)
    assert matrix[0, 1] == 0 and (matrix.diagonal() == 0).all()
    assert inf_fs(x, alpha=0.0).argmax() == 7 and inf_fs(x, alpha=1.0).argmin() == 7


# -- invariance and input --------------------------------------------------------------


@few
@given(st.integers(0, 999), st.sampled_from(VARIANTS), st.sampled_from([0.2, 0.5, 1.0]))
def test_scores_move_with_their_features(seed, variant, alpha):
    x = draw_features(60, 15, seed=seed, dead=[3])
    columns = torch.randperm(15, generator=seeded(seed))
    rows = torch.randperm(60, generator=seeded(seed + 1))
    scores = inf_fs(x, alpha=alpha, variant=variant)
    moved = inf_fs(x[rows][:, columns], alpha=alpha, variant=variant)
    torch.testing.assert_close(moved, scores[columns], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [2.0**-80, 0.01, 1024.0, 2.0**90])
def test_a_common_unit_matters_to_raw2015_only(variant, scale):
    x = draw_features(dtype=torch.float64)
    scores = inf_fs(x, alpha=0.5, variant=variant)
    scaled = inf_fs(scale * x + 0.0, alpha=0.5, variant=variant)
    same = torch.allclose(scaled, scores, rtol=1e-9)
    assert same == (variant != "raw2015")


def test_a_large_mean_costs_no_digits():
    x = draw_features(dtype=torch.float64).round(decimals=2)
    torch.testing.assert_close(inf_fs(x + 2**20), inf_fs(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        measure_deviation(x + 2**20), measure_deviation(x), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_floats_count_as_the_numbers_they_are(dtype):
    x = draw_features(200, 10, dtype=dtype)
    scores = inf_fs(x)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, inf_fs(x.double()), rtol=1e-12, atol=0)


def test_integers_views_and_gradients_are_taken_and_nothing_is_written():
    x = draw_features(90, 8).round()
    expected, before = inf_fs(x), x.clone()
    assert torch.equal(inf_fs(x.long()), expected)
    assert torch.equal(inf_fs(x.T.contiguous().T), expected)
    wide = torch.zeros(180, 16)
    wide[::2, ::2] = x
    assert torch.equal(inf_fs(wide[::2, ::2]), expected)
    scores = inf_fs(x.clone().requires_grad_())
    assert torch.equal(scores, expected) and not scores.requires_grad
    view = x.double().T.contiguous().T  # its transpose is contiguous already
    assert torch.equal(inf_fs(view), expected) and torch.equal(view, before.double())
    assert torch.equal(x, before)


def test_the_smallest_inputs():
    two = torch.tensor([[0.0, 3, 1], [1, 1, 1]])
    assert spearman(two)[0, 1] == -1 and torch.isnan(spearman(two)[2, 2])
    assert inf_fs(two).argsort().tolist() == [2, 0, 1]
    assert inf_fs(two, alpha=0.0).tolist() == [0, 0, 0]  # only a copy and a dead one
    one = torch.tensor([[1.0], [2.0], [4.0]])
    assert inf_fs(one).tolist() == [0]
    assert inf_fs(one, variant="raw2015").tolist() == pytest.approx([9])
    assert inf_fs(one, variant="y2020").tolist() == [1]


def test_equal_spreads_do_not_become_noise():
    x = draw_features(400, 9)
    x = (x - x.mean(0)) / x.std(0)  # equal but for rounding
    torch.testing.assert_close(
        build_graph_matrix(x), 0.5 * build_graph_matrix(x, 0.0), rtol=0, atol=0
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_gives_the_same(variant):
    x = draw_features(700, 90, dead=[11])
    found = inf_fs(x.cuda(), variant=variant)
    assert found.is_cuda
    assert torch.equal(
        spearman(x.cuda()).cpu().nan_to_num(9), spearman(x).nan_to_num(9)
    )
    torch.testing.assert_close(found.cpu(), inf_fs(x, variant=variant), **EXACT)


def broken(value):
    x = draw_features()
    x[3, 5] = value
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inf_fs(broken(float("nan"))), "1 of 12 columns .* first is 5"),
        (lambda: inf_fs(broken(float("-inf"))), "nan or inf.*look for"),
        (lambda: spearman(broken(float("inf"))), "nan or inf"),
        (lambda: inf_fs(torch.ones(1, 4)), "at least 2 samples"),
        (lambda: inf_fs(torch.ones(5, 0)), "at least 1 feature"),
        (lambda: inf_fs(torch.full((5, 4), 0.1)), "all 4 features are constant"),
        (lambda: inf_fs(torch.ones(2, 3, 4, 4)), r"\[N, D\].*\[2, 3, 4, 4\]"),
        (lambda: inf_fs(torch.ones(4)), r"\[N, D\]"),
        (lambda: inf_fs(torch.ones(4, 2, dtype=torch.cfloat)), "a real"),
        (lambda: inf_fs(draw_features(), alpha=1.1), "alpha must lie"),
        (lambda: inf_fs(draw_features(), alpha=-0.1), "alpha must lie"),
        (lambda: inf_fs(draw_features(), alpha=float("nan")), "alpha must lie"),
        (
            lambda: inf_fs(draw_features(), variant="2015"),
            "variant must be one of .*'2015'",
        ),
        (lambda: score_graph(torch.eye(3), variant="2015"), "variant must be one of"),
        (lambda: weigh_edges(torch.eye(3), torch.ones(2)), r"\[3, 3\] and \[2\]"),
        (lambda: sum_paths(torch.ones(2, 3), 0.1), r"expected \[D, D\]"),
        (lambda: sum_paths(torch.tensor([[0.0, 1], [0, 0]]), 0.1), "symmetric"),
        (lambda: sum_paths(torch.eye(2) * float("nan"), 0.1), "mask constant"),
        (lambda: sum_paths(torch.eye(2), -0.1), "choose r from 0"),
        (lambda: sum_paths(torch.eye(2), float("nan")), "choose r from 0"),
        (lambda: spectral_radius(torch.ones(2, 3)), r"expected \[D, D\]"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
