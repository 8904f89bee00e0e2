"""Knockoffs: exact algebra, tests that expose a control that is none, the filter."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.scop import diagnostics, knockoff_filter
from lib.scop.controls.base import correlate, exchange
from lib.scop.controls.gaussian import GaussianKnockoffs, draw_normal, solve_s
from lib.scop.diagnostics import two_sample_test
from lib.scop.knockoff_filter import ar1_covariance, sample_ar1

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=15, deadline=None)
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def covariances(draw):
    """Random positive definite matrices with variances from 0.01 to 100."""
    p, seed = draw(st.integers(2, 8)), draw(st.integers(0, 10_000))
    root = draw_normal(p, p + draw(st.integers(1, 6)), seeded(seed))
    scale = 10 ** torch.empty(p).double().uniform_(-1, 1, generator=seeded(seed))
    matrix = root @ root.T
    return matrix / matrix.diagonal().mean() * scale.outer(scale)


def equicorrelated(covariance):
    """s_j = min(1, 2 lambda_min) Sigma_jj (Barber & Candes 2015): on the boundary."""
    spread = covariance.diagonal().sqrt()
    least = torch.linalg.eigvalsh(covariance / spread.outer(spread))[0]
    return (2 * least).clamp(max=1) * covariance.diagonal()


def mvr_objective(covariance, s):
    """Trace of the inverse of the whole joint covariance, on the correlation scale."""
    spread = covariance.diagonal().sqrt()
    own, rest = covariance / spread.outer(spread), (s / spread.square()).diag()
    joint = torch.cat([torch.cat([own, own - rest]), torch.cat([own - rest, own])], 1)
    values = torch.linalg.eigvalsh(joint)
    return float((1 / values).sum()) if values[0] > 0 else math.inf


def make_sampler(covariance, *, method="mvr"):
    mean = torch.linspace(-1, 1, len(covariance)).double()
    s = {"mvr": solve_s, "equi": equicorrelated}[method](covariance)
    return GaussianKnockoffs(mean, covariance, s)


# -- Gaussian knockoffs ----------------------------------------------------------------


@few
@given(covariances(), st.sampled_from(["mvr", "equi"]))
def test_the_joint_covariance_is_that_of_knockoffs(covariance, method):
    sampler = make_sampler(covariance, method=method)
    p, scale = len(covariance), float(covariance.diagonal().max())
    take = sampler.conditional_mean(sampler.mean + torch.eye(p)) - sampler.mean
    cross = covariance @ take
    own = take.T @ cross + sampler.conditional_covariance
    noise = sampler._factor @ sampler._factor.T
    torch.testing.assert_close(cross, covariance - sampler.s.diag(), **EXACT)
    torch.testing.assert_close(own, covariance, **EXACT)
    torch.testing.assert_close(
        noise, sampler.conditional_covariance, rtol=1e-8, atol=1e-9 * scale
    )


@few
@given(covariances())
def test_s_is_feasible_and_mvr_is_stationary_and_beats_equi(covariance):
    best, equi = solve_s(covariance), equicorrelated(covariance)
    for s in (best, equi):
        least = torch.linalg.eigvalsh(2 * covariance - s.diag())[0]
        assert s.min() > 0 and least > -1e-10 * covariance.diagonal().max()
    objective = mvr_objective(covariance, best)
    for share in (0.3, 0.6, 0.9, 0.99):
        assert objective <= mvr_objective(covariance, share * equi) * (1 + 1e-9)
    for j in range(len(best)):
        for factor in (0.99, 1.01):
            moved = best.clone()
            moved[j] *= factor
            assert objective <= mvr_objective(covariance, moved) * (1 + 1e-9)


def test_s_of_independent_coordinates_is_their_variance():
    variance = torch.tensor([1.0, 4.0, 0.25]).double()
    torch.testing.assert_close(solve_s(variance.diag()), variance)


def test_samples_have_the_stated_mean_and_spread():
    sampler = make_sampler(ar1_covariance(3, 0.7))
    x = torch.tensor([[0.5, -2.0, 1.0]]).expand(40_000, 3)
    knock = sampler.sample(x, seeded(1))
    assert knock.dtype == x.dtype and knock.shape == x.shape
    mean, covariance = knock.double().mean(0), torch.cov(knock.double().T)
    expected = sampler.conditional_mean(x[:1])[0]
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(
        covariance, sampler.conditional_covariance, rtol=0, atol=0.02
    )
    assert torch.equal(knock, sampler.sample(x, seeded(1)))
    assert not torch.equal(knock, sampler.sample(x, seeded(2)))


def test_ar1_covariance_is_what_its_samples_have():
    covariance = ar1_covariance(4, 0.6)
    assert covariance[0].tolist() == pytest.approx([1, 0.6, 0.36, 0.216])
    found = torch.cov(sample_ar1(40_000, 4, 0.6, seeded(0)).T)
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.03)
    assert torch.equal(ar1_covariance(3, 0.0), torch.eye(3).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solve_s(torch.ones(2, 2)), "positive definite"),
        (lambda: solve_s(torch.tensor([[1.0, 0.5], [0, 1]])), "symmetric"),
        (lambda: solve_s(torch.zeros(2, 2)), "positive variances"),
        (lambda: solve_s(torch.ones(2, 3)), r"\[p, p\]"),
        (lambda: build(s=torch.tensor([2.1, 0.1])), "without negative"),
        (lambda: build(s=torch.tensor([-0.1, 0.1])), "0 <= s"),
        (lambda: build(s=torch.ones(3)), "expected shape"),
        (lambda: build().conditional_mean(torch.ones(4, 3)), r"\[n, 2\]"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def build(s=None):
    s = torch.ones(2) if s is None else s
    return GaussianKnockoffs(torch.zeros(2), torch.eye(2), s)


# -- against an independent implementation ---------------------------------------------


@pytest.fixture(scope="module")
def knockpy():
    return pytest.importorskip("knockpy")


def quiet(call, *args, **kwargs):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_s_is_as_good_as_knockpys(knockpy, rho):
    covariance = 4 * ar1_covariance(25, rho)
    other = quiet(
        knockpy.smatrix.compute_smatrix, Sigma=covariance.numpy(), method="mvr"
    )
    theirs = torch.from_numpy(np.diag(other).copy())
    ours = solve_s(covariance)
    assert mvr_objective(covariance, ours) <= mvr_objective(covariance, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)


def test_conditional_law_is_knockpys(knockpy, monkeypatch):
    sampler = make_sampler(ar1_covariance(15, 0.6))
    x = sample_ar1(20, 15, 0.6, seeded(0))
    shape = (20, 15, 1)

    def produce(normal):
        monkeypatch.setattr(np.random, "randn", lambda *shape: normal)
        return knockpy.knockoffs.produce_MX_gaussian_knockoffs(
            X=x.numpy(), mu=sampler.mean.numpy(), sample_tol=1e-5, copies=1,
            invSigma=np.linalg.inv(sampler.covariance.numpy()),
            S=np.diag(sampler.s.numpy()),
        )[:, :, 0]  # fmt: skip

    mean = produce(np.zeros(shape))
    np.testing.assert_allclose(sampler.conditional_mean(x), mean, atol=1e-8)
    unit = np.zeros(shape)
    unit[:15, :, 0] = np.eye(15)
    factor = (produce(unit) - mean)[:15]
    np.testing.assert_allclose(
        sampler.conditional_covariance, factor.T @ factor, atol=1e-8
    )


def test_threshold_is_knockpys(knockpy):
    finite = 0
    for seed in range(200):
        w = draw_normal(1, 40, seeded(seed))[0] + 0.9
        theirs = knockpy.knockoff_stats.data_dependent_threshhold(w.numpy(), fdr=0.2)
        ours = knockoff_filter.knockoff_threshold(w, 0.2)
        assert ours == pytest.approx(theirs, rel=1e-8)
        finite += math.isfinite(ours)
    assert 20 < finite


# -- swaps and two-sample tests --------------------------------------------------------


def make_controls(x, seed, *, rho=0.5):
    """The control arms of an AR(1) sample x [n, p]."""
    n, p = x.shape
    generator = seeded(seed)
    covariance = ar1_covariance(p, rho)
    exact = GaussianKnockoffs(torch.zeros(p), covariance, solve_s(covariance))
    return {
        "exact": exact.sample(x, generator),
        "independent": sample_ar1(n, p, rho, generator),
        "shuffled": x[torch.randperm(n, generator=generator)],
        "noise": draw_normal(n, p, generator),
    }


@pytest.mark.parametrize(
    ("control", "swap", "passes"),
    [
        ("exact", "full", True),
        ("exact", "partial", True),
        ("independent", "full", True),
        ("independent", "partial", False),
        ("shuffled", "full", True),
        ("shuffled", "partial", False),
        ("noise", "full", False),
        ("noise", "partial", False),
    ],
)
def test_only_a_partial_swap_exposes_an_independent_copy(control, swap, passes):
    x = sample_ar1(900, 20, 0.5, seeded(2))
    found = two_sample_test(x, make_controls(x, 3)[control], swap=swap, seed=2)
    assert (found.p_value > 0.05) == passes, found
    assert (found.z < 2) if passes else (found.z > 2), found
    if (control, swap) == ("independent", "partial"):
        assert 3.5 < found.z < 8 and 0.003 < found.statistic < 0.008


def test_p_values_are_uniform_under_the_null():
    values = []
    for seed in range(60):
        x = sample_ar1(80, 4, 0.5, seeded(seed))
        knock = make_controls(x, 1000 + seed)["exact"]
        values.append(
            two_sample_test(
                x, knock, swap="partial", permutations=99, seed=seed
            ).p_value
        )
    values = np.array(values)
    steps = (np.arange(60) + 1) / 60
    assert np.abs(np.sort(values) - steps).max() < 0.2  # 1 % point of the K-S distance
    assert (values <= 0.1).sum() <= 13


def naive_mmd(first, second, bandwidths):
    def kernel(a, b):
        return sum(
            np.exp(-((a - b) ** 2).sum() / (2 * sigma**2)) for sigma in bandwidths
        )

    def within(rows):
        values = [kernel(a, b) for i, a in enumerate(rows)
                  for j, b in enumerate(rows) if i != j]  # fmt: skip
        return np.mean(values)

    across = np.mean([kernel(a, b) for a in first for b in second])
    return within(first) + within(second) - 2 * across


@pytest.mark.parametrize("swap", ["full", "partial"])
def test_statistic_is_the_double_loop(swap):
    x, knock = draw_normal(31, 3, seeded(0)), draw_normal(31, 3, seeded(1)) * 2
    found = two_sample_test(x, knock, swap=swap, seed=5, permutations=3)
    halves = diagnostics.split_pairs(x, knock, swap=swap, seed=5)
    assert [len(h) for h in halves] == [15, 15]
    expected = naive_mmd(*(h.numpy() for h in halves), found.bandwidths)
    assert found.statistic == pytest.approx(expected, abs=1e-10)
    ratios = np.array(found.bandwidths) / found.bandwidths[0]
    assert ratios.tolist() == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128])


def test_statistic_is_that_of_the_shared_kernels():
    kernels = pytest.importorskip("lib.kernels")
    x, knock = draw_normal(60, 5, seeded(0)), draw_normal(60, 5, seeded(1)) * 2
    widths = (1.0, 3.0, 9.0)
    found = two_sample_test(x, knock, bandwidths=widths, permutations=1)
    halves = diagnostics.split_pairs(x, knock)
    expected = float(kernels.mmd2(*halves, widths, unbiased=True))
    assert found.statistic == pytest.approx(expected, abs=1e-9)


def test_permutations_are_halves_of_the_same_pool():
    rows = draw_normal(40, 3, seeded(0))
    sides = diagnostics._permute_sides(40, 20, seed=0).double()
    assert (sides.sum(0) == 0).all() and sides.unique(dim=1).shape[1] == 21
    assert sides[:20, 0].eq(1).all()
    values = diagnostics._permuted_mmd(rows, sides, (2.0,))
    for column in (0, 1, 20):
        mask = sides[:, column] > 0
        expected = naive_mmd(rows[mask].numpy(), rows[~mask].numpy(), (2.0,))
        assert float(values[column]) == pytest.approx(expected, abs=1e-10)


def test_swap_exchanges_the_masked_columns():
    x, knock = torch.zeros(2, 3), torch.ones(2, 3)
    one, two = exchange(x, knock, torch.tensor([True, False, True]))
    assert one.tolist() == [[1, 0, 1]] * 2 and two.tolist() == [[0, 1, 0]] * 2
    rows = torch.tensor([[True, False, False], [False, False, True]])
    assert exchange(x, knock, rows)[0].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_groups_swap_as_one_unit():
    groups = torch.tensor([7, 3, 7, 3, 9, 9])
    x, seen = torch.zeros(8, 6), set()
    for seed in range(20):
        halves = diagnostics.split_pairs(
            x, x + 1, swap="partial", groups=groups, seed=seed
        )
        mask = halves[1][0, :6]
        assert torch.equal(halves[1][0, 6:], 1 - mask)
        for label in groups.unique():
            assert len(mask[groups == label].unique()) == 1
        seen.add(tuple(mask.tolist()))
    assert len(seen) == 6  # every subset of three groups but none and all


def test_the_halves_are_a_partition_of_the_rows():
    x = torch.arange(10.0)[:, None].expand(10, 2)
    first, second = diagnostics.split_pairs(x, x + 100, swap="full")
    assert sorted(first[:, 0].tolist() + second[:, 2].tolist()) == list(range(10))
    assert torch.equal(second[:, 0], second[:, 2] + 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap": "half"}, "swap one of"),
        ({"swap": "partial", "groups": torch.zeros(3)}, "at least two"),
        ({"swap": "partial", "groups": torch.zeros(2)}, "labels"),
        ({"bandwidths": (1.0, 0.0)}, "positive"),
        ({"bandwidths": ()}, "positive"),
        ({"permutations": 0}, "permutations must lie"),
        ({"x": torch.zeros(4, 3), "knock": torch.zeros(4, 3)}, "8 rows"),
        ({"x": torch.zeros(9, 3), "knock": torch.zeros(9, 3)}, "not all equal"),
        ({"knock": torch.zeros(9, 2)}, "one shape"),
    ],
)
def test_tests_that_cannot_be_run_are_refused(options, message):
    pair = {"x": torch.randn(9, 3, generator=seeded(0)), "knock": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match=message):
        two_sample_test(**pair | options)


# -- second moments --------------------------------------------------------------------


def test_covariance_energy_is_its_u_statistic():
    x = draw_normal(6, 3, seeded(0)).exp()
    total, count = 0.0, 0
    for i, j, k, m in np.ndindex(6, 6, 6, 6):
        if len({i, j, k, m}) == 4:
            total += float(((x[i] - x[j]) @ (x[k] - x[m])) ** 2) / 4
            count += 1
    found = float(diagnostics._estimate_energy(x))
    assert found == pytest.approx(total / count, rel=1e-10)


def test_covariance_gap_is_zero_for_knockoffs_and_known_for_copies():
    gaps = {"exact": [], "independent": []}
    for seed in range(10):
        x = sample_ar1(1200, 8, 0.7, seeded(seed))
        controls = make_controls(x, 50 + seed, rho=0.7)
        for name, values in gaps.items():
            values.append(
                diagnostics.covariance_gap(x, controls[name], swap="partial", seed=seed)
            )
    covariance = ar1_covariance(8, 0.7)
    expected = []
    for seed in range(10):
        mask = diagnostics.split_pairs(
            torch.zeros(8, 8), torch.ones(8, 8), swap="partial", seed=seed
        )[1][0, :8].bool()
        apart = mask[:, None] != mask
        expected.append(4 * float(covariance[apart].square().sum()))
    assert abs(np.mean(gaps["exact"])) < 0.3
    np.testing.assert_allclose(gaps["independent"], expected, atol=6)
    assert np.mean(gaps["independent"]) == pytest.approx(np.mean(expected), abs=1.5)


def test_correlations_against_numpy():
    x = draw_normal(50, 4, seeded(0)) @ draw_normal(4, 4, seeded(1))
    knock = 0.5 * x + draw_normal(50, 4, seeded(2))
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, knock.T, strict=True)]
    np.testing.assert_allclose(correlate(x, knock), pairs)
    near = correlate(x, knock, eps=1e-6)
    np.testing.assert_allclose(near, pairs, atol=1e-4)
    assert correlate(x, 0 * x).isnan().all()
    assert correlate(x, 0 * x, eps=1e-6).eq(0).all()


def test_no_feasible_s_goes_below_the_correlation_floor():
    covariance = 3 * ar1_covariance(9, 0.8)
    floor = diagnostics.correlation_floor(covariance)
    for s in (solve_s(covariance), equicorrelated(covariance)):
        reached = 1 - s / covariance.diagonal()
        assert (reached >= floor - 1e-12).all()
    rest = [j for j in range(9) if j != 4]  # the bound is attained one at a time
    block = covariance[rest][:, rest]
    given = covariance[4, 4] - covariance[4, rest] @ torch.linalg.solve(
        block, covariance[rest, 4]
    )
    assert float(floor[4]) == pytest.approx(1 - 2 * float(given / covariance[4, 4]))
    single = torch.zeros(9).double()
    single[4] = 2 * given
    values = torch.linalg.eigvalsh(2 * covariance - single.diag())
    assert abs(float(values[0])) < 1e-10


# -- layers ----------------------------------------------------------------------------


def test_offdiagonal_energy_against_numpy():
    weight, d = draw_normal(4, 6, seeded(0)), torch.rand(6, generator=seeded(1))
    moved = weight.numpy() @ np.diag(d.double().numpy()) @ weight.numpy().T
    off = moved - np.diag(moved.diagonal())
    expected = (off**2).sum() / (moved**2).sum()
    assert expected > 0.01
    assert diagnostics.offdiagonal_energy(weight, d) == pytest.approx(expected)
    kernel = weight.reshape(4, 3, 2, 1)
    assert diagnostics.offdiagonal_energy(kernel, d) == pytest.approx(expected)
    short = d[:3]
    assert diagnostics.offdiagonal_energy(kernel, short) == pytest.approx(
        diagnostics.offdiagonal_energy(weight, short.repeat_interleave(2))
    )


def test_diagonal_and_orthogonal_layers_keep_exchangeability():
    d = torch.rand(5, generator=seeded(0))
    energy = diagnostics.offdiagonal_energy
    assert energy(torch.diag(torch.arange(5.0)), d) == 0
    rows = torch.linalg.qr(draw_normal(5, 5, seeded(1)))[0]
    assert energy(rows, torch.ones(5)) < 1e-25
    assert energy(rows, d) > 1e-3  # orthogonal rows, but not for this D
    assert energy(rows / d.sqrt(), d) < 1e-12
    assert energy(torch.zeros(2, 5), d) == 0
    with pytest.raises(ValueError, match="expected 5"):
        energy(rows, torch.ones(4))


class Toy(nn.Module):
    """A depthwise, then a dense 1x1 convolution; an unused layer; may fail."""

    def __init__(self):
        super().__init__()
        self.own = nn.Conv2d(4, 4, 1, groups=4, bias=False)
        self.mix = nn.Conv2d(4, 4, 1, bias=False)
        self.spare, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout(0.9)
        self.fail = False

    def forward(self, x):
        x = self.mix(self.drop(self.own(x)))
        if self.fail:
            raise RuntimeError("on purpose")
        return x


def make_images(seed):
    """Pixels AR(1) over 4 channels, and exact knockoffs of every position."""
    x = sample_ar1(4000, 4, 0.7, seeded(seed))
    knock = make_controls(x, seed + 1, rho=0.7)["exact"]
    return (v.reshape(10, 20, 20, 4).permute(0, 3, 1, 2).float() for v in (x, knock))


def test_layer_energies_are_those_of_the_weights():
    torch.manual_seed(0)
    model = Toy().train()
    real, knock = make_images(0)
    found = diagnostics.layer_energies(model, real, knock, ["own", "mix"])
    s = solve_s(ar1_covariance(4, 0.7))
    expected = diagnostics.offdiagonal_energy(
        model.mix.weight * model.own.weight.flatten()[None, :, None, None], s
    )
    assert found["own"] < 0.01 < 0.1 < expected
    assert found["mix"] == pytest.approx(expected, abs=0.05)
    assert model.training and model.drop.training
    again = diagnostics.layer_energies(model, real, knock, ["own", "mix"])
    assert again == found  # no dropout
    part = diagnostics.layer_energies(model, real, knock, ["mix"], samples=50)
    assert part["mix"] != found["mix"]


def test_hooks_and_modes_are_left_as_found_after_an_error():
    model, images = Toy().train(), torch.randn(2, 4, 3, 3)
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        diagnostics.layer_energies(model, images, images, ["own"])
    model.fail = False
    for layers, message in ((["spare"], "no part"), (["spar"], "mean 'spare'")):
        with pytest.raises(ValueError, match=message):
            diagnostics.layer_energies(model, images, images, layers)
    assert all(not m._forward_hooks and m.training for m in model.modules())


# -- the filter ------------------------------------------------------------------------


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=30),
    st.sampled_from([0.05, 0.1, 0.2, 0.5]),
)
def test_threshold_against_brute_force(values, q):
    fitting = [
        t
        for t in sorted({abs(v) for v in values} - {0})
        if (1 + sum(v <= -t for v in values)) / max(1, sum(v >= t for v in values)) <= q
    ]
    w = torch.tensor(values).float()
    found = knockoff_filter.knockoff_threshold(w, q)
    assert found == (fitting[0] if fitting else math.inf)


def test_threshold_of_small_cases():
    find = knockoff_filter.knockoff_threshold
    w = torch.tensor([5.0, 4, 3, 2, -1])
    assert find(w, 0.25) == 2 and find(w, 0.24) == math.inf
    assert find(torch.zeros(3), 0.5) == math.inf
    exactly = torch.tensor([2.0] * 300 + [-2.0] * 62)  # 63 / 300 is .21, .21 * 300 less
    assert find(exactly, 0.21) == 2
    for bad, q in ((w[None], 0.1), (w / 0, 0.1), (w, 0.0), (w, 1.0)):
        with pytest.raises(ValueError, match=r"expected finite|q must lie"):
            find(bad, q)


def test_lasso_difference_finds_signals_in_any_order_of_columns():
    x = sample_ar1(120, 12, 0.5, seeded(0))
    knock = make_controls(x, 1)["exact"]
    y = 2 * x[:, 3] - 2 * x[:, 8] + draw_normal(120, 1, seeded(2))[:, 0]
    w = knockoff_filter.lasso_difference(x, knock, y)
    assert sorted(w.argsort(descending=True)[:2].tolist()) == [3, 8] and w[3] > 0.5
    order = torch.randperm(12, generator=seeded(3))
    moved = knockoff_filter.lasso_difference(x[:, order], knock[:, order], y)
    torch.testing.assert_close(moved, w[order], rtol=0, atol=5e-3)
    mask = torch.arange(12) % 2 == 0
    flipped = knockoff_filter.lasso_difference(*exchange(x, knock, mask), y)
    torch.testing.assert_close(
        flipped, torch.where(mask, -w, w), rtol=0, atol=5e-3
    )  # antisymmetric
    scaled = knockoff_filter.lasso_difference(x * 7 + 1, knock * 7, y + 5)
    torch.testing.assert_close(scaled, w, rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match="expected x, knock"):
        knockoff_filter.lasso_difference(x, knock, y[:-1])


def test_score_selection_counts():
    chosen = torch.tensor([True, True, True, False, False])
    true = torch.tensor([True, False, True, True, True])
    assert knockoff_filter.score_selection(chosen, true) == pytest.approx((1 / 3, 0.5))
    assert knockoff_filter.score_selection(chosen & False, true) == (0, 0)


def test_controls_meet_the_same_data_and_repeat():
    options = {"n": 60, "p": 10, "signals": 3, "rho": 0.5, "repetitions": 2, "q": 0.4}
    found = knockoff_filter.simulate_filter("independent", amplitude=20.0, **options)
    again = knockoff_filter.simulate_filter("independent", amplitude=20.0, **options)
    assert found == again and found["power"] > 0.9
    assert found.keys() == {"fdr", "fdr_se", "power", "power_se"}
    with pytest.raises(ValueError, match="control must be one of"):
        knockoff_filter.simulate_filter("copy", **options)
    with pytest.raises(ValueError, match="signals <= p"):
        knockoff_filter.simulate_filter("exact", **options | {"signals": 11})


def test_an_independent_copy_breaks_the_error_rate_where_features_correlate():
    options = {"n": 200, "p": 50, "signals": 10, "rho": 0.8, "amplitude": 7.0,
               "repetitions": 10, "q": 0.2}  # fmt: skip
    exact = knockoff_filter.simulate_filter("exact", **options)
    copy = knockoff_filter.simulate_filter("independent", **options)
    assert exact["fdr"] < options["q"] < copy["fdr"] - copy["fdr_se"]
    assert exact["power"] > 0.1
