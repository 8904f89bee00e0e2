"""MAP's predictor: recovered truths, other solvers, automatic differentiation."""

import itertools
import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib import map3d, paths
from lib.map3d import solvers
from lib.map3d.fitting import (
    UnidentifiedWarning,
    check_points,
    count_parameters,
    fit,
    jacobian_rank,
)
from lib.map3d.predictor import Map
from lib.map3d.uncertainty import bootstrap_maps, leave_one_out

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=25, deadline=None)

FLOORS = (0.5, 0.7071, 0.7071)
STEPS = [[0.875, 0.75, 0.625, 0.5], *[[0.9268, 0.8536, 0.7804, 0.7071]] * 2]
AXIS = np.array(
    [[1.0, 1, 1]]
    + [[x if n == m else 1 for n in range(3)] for m in range(3) for x in STEPS[m]]
)
OFF = np.random.default_rng(9).uniform(FLOORS, 1, (300, 3))
VARIANTS = [{}, {"monotone": True}]
IDS = ["free", "monotone"]


def make_grid(sides=4, low=FLOORS):
    levels = [np.linspace(x, 1, sides) for x in low]
    return np.array(list(itertools.product(*levels)))


def truth(p):
    """A falling product of cubics in plain d, w, r, accuracy in percent."""
    d, w, r = (1 - p[:, m] for m in range(3))
    return 93.4 * (1 - 0.02 * d - 0.2 * d**3) * (1 - 0.06 * w - 0.9 * w**2) * (
        1 - 0.1 * r - 0.3 * r**2 - 2 * r**3
    )  # fmt: skip


def wavy_truth(p):
    """A product that no falling factors make: accuracy rises with the first pruning."""
    d, w, r = p.T
    return 90 * (1 + 0.3 * (1 - d) - 0.9 * (1 - d) ** 2) * (0.6 + 0.4 * w**3) * (
        1.4 * r - 0.4 * r**2
    )  # fmt: skip


def measure(places, *, sd=0.0, seed=0, surface=truth):
    noise = np.random.default_rng(seed).normal(0, sd, len(places)) if sd else 0
    return np.column_stack([places, np.clip(surface(places) + noise, 0, 100)])


def sum_squares(found, points):
    return float(((found.predict(*points.T[:3]) - points[:, 3]) ** 2).sum())


def quiet_fit(points, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnidentifiedWarning)
        return fit(points, **options)


def draw_map(seed=0, degree=3, low=FLOORS):
    """Any polynomial, of no particular shape."""
    tensor = np.random.default_rng(seed).normal(0, 3, (degree + 1,) * 3)
    tensor[0, 0, 0] = 90
    return Map(tensor, low, residual_sd=0.25)


# -- rank 1 ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_a_product_of_cubics_is_recovered_off_the_axes_from_13_points(options):
    found = fit(measure(AXIS), **options)
    np.testing.assert_allclose(found.predict(*OFF.T), truth(OFF), rtol=0, atol=1e-10)
    assert found.residual_sd < 1e-10
    assert found.low == FLOORS and found.high == (1, 1, 1)


@pytest.mark.parametrize("places", [AXIS, make_grid(), OFF[:40]], ids=len)
def test_a_product_that_is_not_monotone_is_recovered_too(places):
    found = fit(measure(places, surface=wavy_truth))
    np.testing.assert_allclose(
        found.predict(*OFF.T), wavy_truth(OFF), rtol=0, atol=1e-8
    )


def test_a_falling_fit_is_no_fit_of_a_rising_truth():
    points = measure(make_grid(), surface=wavy_truth)
    assert sum_squares(fit(points, monotone=True), points) > 1


def alternate_by_hand(points, degree, sweeps=3000):
    """One factor after the other by linear least squares: the fitted values."""
    unit = (1 - points[:, :3]) / (1 - points[:, :3].min(axis=0))
    powers = [np.vander(u, degree + 1, increasing=True) for u in unit.T]
    curves = [np.ones(len(points))] * 3
    for _ in range(sweeps):
        for m in range(3):
            others = curves[m - 1] * curves[m - 2]
            design = powers[m] * others[:, None]
            curves[m] = powers[m] @ np.linalg.lstsq(design, points[:, 3])[0]
    return np.prod(curves, axis=0)


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("places", [AXIS, make_grid(), OFF[:25]], ids=len)
def test_alternating_least_squares_by_hand_ends_at_the_same(places, degree):
    points = measure(places, sd=0.3, seed=degree)
    by_hand, found = alternate_by_hand(points, degree), fit(points, degree=degree)
    np.testing.assert_allclose(found.predict(*places.T), by_hand, rtol=0, atol=1e-5)
    squares = ((by_hand - points[:, 3]) ** 2).sum()
    assert sum_squares(found, points) == pytest.approx(squares, rel=1e-9)


def test_axis_points_of_rank_1_are_three_univariate_fits_of_one_unpruned_accuracy():
    points = measure(AXIS, sd=0.4, seed=5)
    columns = [1 - points[:, m] for m in range(3)]
    design = np.column_stack([np.ones(13)] + [u**k for u in columns for k in (1, 2, 3)])
    by_hand = design @ np.linalg.lstsq(design, points[:, 3], rcond=None)[0]
    found = fit(points)
    np.testing.assert_allclose(found.predict(*AXIS.T), by_hand, rtol=0, atol=1e-9)
    rest = ((by_hand - points[:, 3]) ** 2).sum() / (13 - 10)
    assert found.residual_sd == pytest.approx(math.sqrt(rest), rel=1e-9)


def test_the_monotone_fit_never_goes_uphill(monkeypatch):
    points, squares = measure(AXIS, sd=0.5, seed=2), []
    for sweeps in range(1, 16):
        monkeypatch.setattr(solvers, "SWEEPS", sweeps)
        with pytest.warns(UserWarning, match=f"not settled in {sweeps} sweeps"):
            squares.append(sum_squares(fit(points, monotone=True), points))
    assert np.all(np.diff(squares) <= 1e-12 * squares[0])
    assert squares[-1] < squares[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_random_start_finds_a_better_product(seed, monkeypatch):
    points = measure(AXIS, sd=0.5, seed=seed)
    least, rng = sum_squares(fit(points), points), np.random.default_rng(seed)

    def draw(bases):
        parts = [np.r_[1, rng.normal(0, 0.5, 3)][None] for _ in bases]
        return [rng.uniform(0.3, 2) * parts[0], *parts[1:]]

    monkeypatch.setattr(solvers, "start_flat", draw)
    for _ in range(20):
        assert sum_squares(fit(points), points) >= least * (1 - 1e-9)


# -- gauge and derivatives -------------------------------------------------------------


def raw_surface(theta, unit):
    """A product of three raw cubics, theta [12], at u [N, 3]."""
    value = 1
    for m, part in enumerate(theta.split(4)):
        powers = torch.stack([unit[:, m] ** k for k in range(4)], 1)
        value = value * (powers @ part)
    return value


@pytest.mark.parametrize("places", [AXIS, make_grid()], ids=len)
def test_two_of_the_twelve_raw_coefficients_are_gauge(places):
    unit = torch.tensor((1 - places) / (1 - np.array(FLOORS)))
    theta = torch.randn(12, dtype=torch.float64, generator=torch.manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda t: raw_surface(t, unit), theta)
    assert jacobian.shape[1] == 12
    assert torch.linalg.matrix_rank(jacobian) == 10 == count_parameters(1, 3)
    assert jacobian_rank(places, 1, 3) == 10
    moved = theta.reshape(3, 4) * torch.tensor([[4.0], [-0.5], [-0.5]])
    torch.testing.assert_close(
        raw_surface(moved.flatten(), unit), raw_surface(theta, unit)
    )


@pytest.mark.parametrize("options", [{}, {"rank": 2}], ids=["product", "sum"])
def test_the_solvers_jacobians_are_the_derivatives(options, monkeypatch):
    seen, inner = [], solvers.least_squares

    def spy(fun, start, jac, **settings):
        seen.append((fun, jac, start))
        return inner(fun, start, jac, **settings)

    monkeypatch.setattr(solvers, "least_squares", spy)
    fit(measure(make_grid(), sd=0.5), **options)
    fun, jac, start = seen[-1]
    theta = start + np.random.default_rng(4).normal(0, 0.2, len(start))
    for k, step in enumerate(1e-6 * np.eye(len(theta))):
        slope = (fun(theta + step) - fun(theta - step)) / 2e-6
        np.testing.assert_allclose(jac(theta)[:, k], slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_matches_autograd_and_differences(seed):
    found = draw_map(seed)
    for place in OFF[:5]:
        x = torch.tensor(place, requires_grad=True)
        u = [(1 - x[m]) / (1 - FLOORS[m]) for m in range(3)]
        value = sum(
            c * u[0] ** i * u[1] ** j * u[2] ** k
            for (i, j, k), c in np.ndenumerate(found.coefficients)
        )
        assert found.predict(*place) == pytest.approx(value.item(), rel=1e-12)
        value.backward()
        np.testing.assert_allclose(found.gradient(*place), x.grad, rtol=1e-10)


def test_elasticities_are_slopes_in_log_space():
    found = draw_map(4)
    for exponents in ((1, 2, 2), (1.8, 1, 2)):
        got = found.elasticities(*OFF[0], exponents)
        for m in range(3):
            step = np.eye(3)[m] * 1e-6 / exponents[m]  # one millionth of the cost
            up, down = (found.predict(*(OFF[0] * np.exp(s))) for s in (step, -step))
            assert got[m] == pytest.approx(math.log(up / down) / 2e-6, rel=1e-5)
    np.testing.assert_array_equal(
        found.elasticities(*OFF[0]), found.elasticities(*OFF[0], (1, 2, 2))
    )


# -- the map ---------------------------------------------------------------------------


def test_shapes_broadcast():
    found = draw_map(2)
    d, w = np.linspace(0.5, 1, 300)[:, None], np.linspace(0.7, 1, 200)
    assert isinstance(found.predict(0.5, 1, 1), float)
    values = found.predict(d, w, 0.8)
    assert values.shape == (300, 200)
    assert values[7, 11] == found.predict(d[7, 0], w[11], 0.8)
    assert values[-1, -1] == found.predict(1.0, 1.0, 0.8)
    assert found.gradient(d, w, 0.8).shape == (3, 300, 200)
    assert found.gradient(0.5, 1, 1).shape == (3,)
    assert found.elasticities(d, w, 0.8).shape == (3, 300, 200)
    np.testing.assert_array_equal(
        found.elasticities(d, w, 0.8)[:, 7, 11],
        found.elasticities(d[7, 0], w[11], 0.8),
    )
    assert found.predict([], 1, 1).shape == (0,)
    assert found.predict(pd.Series([0.5, 1.0]), 1, 1).shape == (2,)


def test_the_box_tells_where_a_prediction_is_extrapolated():
    found = fit(measure(AXIS))
    assert found.covers(0.5, 0.7071, 1) is True and found.covers(0.49, 1, 1) is False
    assert found.covers([0.5, 0.4], 1, [[0.8], [0.7]]).tolist() == [
        [True, False],
        [False, False],
    ]
    assert math.isfinite(found.predict(0.3, 1, 1))
    inner = fit(measure(make_grid()[make_grid().max(1) < 1]), degree=1)
    assert max(inner.high) < 1 and not inner.covers(1, 1, 1)


def test_a_dimension_that_does_not_vary_keeps_the_factor_one():
    places = AXIS[AXIS[:, 2] == 1]
    for constant in (1.0, 0.8):
        points = measure(places, sd=0.2)
        points[:, 2] = constant
        for options in (*VARIANTS, {"rank": 2}):
            found = quiet_fit(points, **options)
            assert not found.coefficients[:, :, 1:].any()
            assert found.low[2] == found.high[2] == constant
            assert found.predict(0.7, 0.8, 0.3) == found.predict(0.7, 0.8, 1)
            assert found.gradient(0.7, 0.8, 1)[2] == 0
            assert found.covers(0.7, 0.8, constant)
            assert not found.covers(0.7, 0.8, 0.9)
    assert jacobian_rank(places, 1, 3) == 7
    line = measure(AXIS[:5])
    curve = np.polyfit(line[:, 0], line[:, 3], 3)
    assert fit(line).predict(0.6, 1, 1) == pytest.approx(np.polyval(curve, 0.6))


@pytest.mark.parametrize("options", [*VARIANTS, {"degree": 1}, {"rank": 2}])
def test_a_saved_map_is_the_same_to_the_last_bit(options, tmp_path):
    found = quiet_fit(measure(AXIS, sd=0.3), **options)
    again = Map.load(found.save(tmp_path / "map.json"))
    assert again.coefficients.tobytes() == found.coefficients.tobytes()
    facts = [[m.low, m.high, m.rank, m.monotone, m.residual_sd] for m in (again, found)]
    assert facts[0] == facts[1] and again.degree == options.get("degree", 3)
    assert again.predict(0.6, 0.8, 0.9) == found.predict(0.6, 0.8, 0.9)


def test_a_map_without_degrees_of_freedom_has_no_noise_and_still_saves(tmp_path):
    ten = np.delete(measure(AXIS, sd=0.3), [1, 6, 11], 0)
    found = fit(ten)
    assert math.isnan(found.residual_sd) and sum_squares(found, ten) < 1e-18
    assert math.isnan(Map.load(found.save(tmp_path / "map.json")).residual_sd)
    assert "null" in (tmp_path / "map.json").read_text()


def test_coefficients_cannot_be_written_and_are_a_copy():
    tensor = np.ones((2, 2, 2))
    found = Map(tensor, (0.5, 0.5, 0.5))
    tensor[:] = 5
    assert found.coefficients.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        found.coefficients[0] = 2


# -- sums of products ------------------------------------------------------------------


def interacting_truth(p):
    """Rank 2: a product, less a loss where depth and width are pruned together."""
    return truth(p) - 60 * (1 - p[:, 0]) * (1 - p[:, 1]) * (2 - p[:, 2])


def test_a_sum_of_two_products_is_recovered_from_a_full_grid():
    points = measure(make_grid(), surface=interacting_truth)
    two = fit(points, rank=2)
    np.testing.assert_allclose(
        two.predict(*OFF.T), interacting_truth(OFF), rtol=0, atol=1e-7
    )
    assert fit(points).residual_sd > 0.3 > two.residual_sd
    again = fit(points, rank=2)
    assert again.coefficients.tobytes() == two.coefficients.tobytes()


@pytest.mark.parametrize("rank", [2, 3])
def test_axis_points_tell_nothing_about_the_rank(rank):
    points = measure(AXIS, sd=0.2)
    message = rf"determine 10 of {10 * rank} parameters.*two or three of d, w, r"
    with pytest.warns(UnidentifiedWarning, match=message) as caught:
        found = fit(points, rank=rank)
    assert len(caught) == 1 and caught[0].filename == __file__
    alone = fit(points)
    np.testing.assert_allclose(
        found.predict(*AXIS.T), alone.predict(*AXIS.T), rtol=0, atol=1e-3
    )
    assert np.abs(found.predict(*OFF.T) - alone.predict(*OFF.T)).max() < 10
    assert jacobian_rank(AXIS, rank, 3) == jacobian_rank(AXIS, None, 3) == 10


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_grid_of_three_levels_determines_degree_2(rank):
    points = measure(make_grid(3), sd=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit(points, rank=rank, degree=2)
    assert jacobian_rank(points, rank, 2) == count_parameters(rank, 2)
    assert found.residual_sd > 0
    with pytest.raises(ValueError, match="d: degree 3 needs 4 levels"):
        fit(points, rank=rank)


def test_parameters_and_ranks_are_counted():
    counts = [count_parameters(rank, 3) for rank in (1, 2, 6, None)]
    assert counts == [10, 20, 60, 64] and count_parameters(1, 2) == 7
    grid = make_grid()
    assert [jacobian_rank(grid, rank, 3) for rank in (1, 2, 6, None)] == counts
    assert jacobian_rank(AXIS[:, :3], 1, 3) == 10  # before anything is measured
    frame = pd.DataFrame(AXIS, columns=["d", "w", "r"])
    assert jacobian_rank(frame, 2, 2) == 7
    line = np.repeat(np.linspace(0.5, 1, 4)[:, None], 3, 1)
    assert jacobian_rank(line, None, 3) == 4


def factors(found):
    """a and the three c_m of a product, which starts each at 1."""
    tensor = found.coefficients
    base = tensor[0, 0, 0]
    return base, [v / base for v in (tensor[:, 0, 0], tensor[0, :, 0], tensor[0, 0])]


# -- a falling fit ---------------------------------------------------------------------


@few
@given(st.integers(0, 10**6), st.sampled_from([0.3, 3.0, 30.0]), st.booleans())
def test_a_monotone_map_never_rises_when_something_is_pruned(seed, sd, axis):
    places = AXIS if axis else OFF[seed % 200 :][:30]
    found = fit(measure(places, sd=sd, seed=seed), monotone=True)
    grid = make_grid(12, found.low).reshape(12, 12, 12, 3)
    values = found.predict(*np.moveaxis(grid, -1, 0))
    for m in range(3):
        assert np.diff(values, axis=m).min() >= -1e-10  # from pruned to whole
    assert values.min() >= -1e-10
    base, parts = factors(found)
    assert base > 0 and all(np.all(part[1:] <= 0) for part in parts)


def test_a_monotone_map_does_not_fall_below_zero_in_the_box():
    points = measure(AXIS)
    points[1:5, 3] = 60, 20, 0, 0  # a line or parabola through these goes on falling
    for degree in (1, 2, 3):
        found = fit(points, monotone=True, degree=degree)
        values = found.predict(*make_grid(8).T).reshape(8, 8, 8)
        assert values.min() >= -1e-10 and values.max() > 50
        for m in range(3):
            assert np.diff(values, axis=m).min() >= -1e-10
    assert fit(points, degree=1).predict(0.5, 1, 1) < -1


def test_a_monotone_map_counts_the_drops_it_uses():
    points = measure(AXIS, sd=0.4, seed=1)
    found = fit(points, monotone=True)
    used = sum(np.count_nonzero(part[1:]) for part in factors(found)[1])
    assert used < 9
    rest = sum_squares(found, points) / (13 - 1 - used)
    assert found.residual_sd == pytest.approx(math.sqrt(rest), rel=1e-9)
    assert sum_squares(found, points) > sum_squares(fit(points), points)


# -- equivariance ----------------------------------------------------------------------

ANY = [*VARIANTS, {"degree": 1}]


@few
@given(st.integers(0, 10**6), st.sampled_from(ANY))
def test_the_order_of_points_does_not_matter(seed, options):
    points = measure(AXIS, sd=0.3, seed=seed)
    moved = np.random.default_rng(seed).permutation(points)
    a, b = (quiet_fit(p, **options) for p in (points, moved))
    np.testing.assert_allclose(a.predict(*OFF.T), b.predict(*OFF.T), rtol=0, atol=2e-5)
    assert a.residual_sd == pytest.approx(b.residual_sd, rel=1e-8)


@few
@given(st.integers(0, 10**6), st.floats(0.02, 1), st.sampled_from(ANY))
def test_scaling_accuracies_scales_the_map(seed, factor, options):
    points = measure(AXIS, sd=0.3, seed=seed)
    a = quiet_fit(points, **options)
    b = quiet_fit(points * [1, 1, 1, factor], **options)
    np.testing.assert_allclose(
        b.predict(*OFF.T), factor * a.predict(*OFF.T), rtol=1e-6, atol=0
    )
    assert b.residual_sd == pytest.approx(factor * a.residual_sd, rel=1e-8)


# -- held-out errors and the bootstrap -------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"monotone": True}, {"degree": 2}])
def test_leave_one_out_is_the_loop_by_hand(options):
    points = measure(AXIS, sd=0.3)
    expected = []
    for n in range(13):
        found = fit([p for k, p in enumerate(points) if k != n], **options)
        d, w, r, accuracy = points[n]
        expected.append(found.predict(d, w, r) - accuracy)
    np.testing.assert_array_equal(leave_one_out(points, **options), expected)


def test_the_bootstrap_has_the_covariance_of_the_linear_fit_that_axes_allow():
    """On axis points a product is linear in a and a c_mk: sd^2 (X'X)^-1."""
    points = measure(AXIS, sd=0.3)
    base = fit(points, degree=1)
    maps = bootstrap_maps(points, repeats=500, seed=3, sd=0.8, degree=1)
    unit = (1 - AXIS) / (1 - np.array(FLOORS))
    design = np.column_stack([np.ones(13), unit])
    spread = 0.8 * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))

    def linear(found):
        c = found.coefficients
        return [c[0, 0, 0], c[1, 0, 0], c[0, 1, 0], c[0, 0, 1]]

    drawn = np.array([linear(found) for found in maps])
    np.testing.assert_allclose(np.std(drawn, axis=0, ddof=1), spread, rtol=0.12)
    drift = (drawn.mean(0) - linear(base)) / spread
    assert np.abs(drift).max() < 4 / math.sqrt(500)


def test_the_bootstrap_takes_the_residual_noise_and_repeats_itself():
    points = measure(AXIS, sd=0.3)
    a = bootstrap_maps(points, repeats=3, seed=5)
    b = bootstrap_maps(points, repeats=3, seed=5, sd=fit(points).residual_sd)
    c = bootstrap_maps(points, repeats=3, seed=6)
    still = bootstrap_maps(points, repeats=2, sd=0.0, monotone=True)
    for one, same, other in zip(a, b, c, strict=True):
        np.testing.assert_array_equal(one.coefficients, same.coefficients)
        assert np.abs(one.coefficients - other.coefficients).max() > 1e-3
    expected = fit(points, monotone=True).predict(*OFF.T)
    np.testing.assert_allclose(still[1].predict(*OFF.T), expected, atol=1e-4)
    assert still[1].residual_sd < 1e-5 < fit(points, monotone=True).residual_sd
    perfect = np.column_stack([AXIS, np.full(13, 100.0)])  # noise goes beyond 100 %
    assert len(bootstrap_maps(perfect, repeats=4, sd=1.0)) == 4


def test_what_cannot_be_determined_is_warned_of_once():
    points = measure(AXIS, sd=0.3)
    with pytest.warns(UnidentifiedWarning) as caught:
        errors = leave_one_out(points, rank=2)
    assert len(caught) == 1 and np.isfinite(errors).all()


# -- real data -------------------------------------------------------------------------


def read_deit() -> np.ndarray:
    """The 22 points (a, t, accuracy) of the page on BoundaryDPT."""
    rows = pd.read_csv(paths.PUBLISHED / "deit_b.csv").query("quantity == 'top1'")
    shares = rows["variant"].str.extract(r"^a ([\d.]+), t ([\d.]+)$").astype(float)
    return np.column_stack([shares, rows["value"].astype(float)])


def test_deit_b_pruned_both_ways_is_worse_than_its_axes_say():
    a, t, accuracy = read_deit().T
    a, t = np.round(12 * a) / 12, np.round(12 * t) / 12  # layers; print rounds them
    points = np.column_stack([a, t, np.ones(22), accuracy])
    axes, inner = points[(a == 1) | (t == 1)], points[(a < 1) & (t < 1)]
    assert (len(axes), len(inner)) == (17, 5)
    for degree, rmse in ((2, 0.604), (3, 0.621)):
        errors = fit(axes, degree=degree).predict(*inner.T[:3]) - inner[:, 3]
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(rmse, abs=5e-4)
        assert errors.mean() > 0.4
    errors = leave_one_out(points)
    assert np.abs(errors).mean() == pytest.approx(0.397, abs=5e-4)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(0.547, abs=5e-4)


# -- input -----------------------------------------------------------------------------


def test_lists_and_tables_in_any_order_of_columns_are_taken():
    points = measure(AXIS, sd=0.2)
    expected = fit(points).coefficients
    frame = pd.DataFrame(points, columns=["d", "w", "r", "accuracy"])
    frame["seed"] = "a"
    for same in (
        points.tolist(),
        frame,
        frame[["accuracy", "r", "seed", "d", "w"]],
        frame.rename(columns={"accuracy": "top1"}),
        frame.assign(top1=1e9),
    ):
        assert fit(same).coefficients.tobytes() == expected.tobytes()
    before = points.copy()
    fit(points)
    np.testing.assert_array_equal(points, before)
    np.testing.assert_array_equal(check_points(frame), points)


def changed(row, column, value):
    points = measure(AXIS)
    points[row, column] = value
    return points


def framed(*names):
    return pd.DataFrame(measure(AXIS)[:, : len(names)], columns=list(names))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(measure(AXIS)[:, :3]), r"expected \[N: .*got \[13, 3\]"),
        (lambda: fit(measure(AXIS)[0]), r"got \[4\]"),
        (lambda: fit(np.empty((0, 4))), r"got \[0, 4\]"),
        (lambda: fit([["a"] * 4] * 13), "table of numbers"),
        (lambda: fit([[1, 1, 1, 90], [1, 1]]), "table of numbers"),
        (lambda: fit(framed("d", "w", "accuracy")), r"no columns \['r'\]"),
        (lambda: fit(framed("d", "w", "r")), r"no columns \['accuracy'\]"),
        (lambda: fit(changed(3, 0, 0.0)), r"d: point 3 has 0.0, .*\(0, 1\]"),
        (lambda: fit(changed(5, 1, 1.01)), "w: point 5 has 1.01"),
        (lambda: fit(changed(12, 2, np.nan)), "r: point 12 has nan"),
        (lambda: fit(changed(12, 2, 28)), "divide by its depth, width or side"),
        (lambda: fit(changed(2, 3, np.nan)), "accuracy: point 2 has nan"),
        (lambda: fit(changed(2, 3, np.inf)), "accuracy: point 2 has inf"),
        (lambda: fit(changed(2, 3, 100.5)), "percent from 0 to 100"),
        (lambda: fit(changed(2, 3, -0.1)), "point 2 has -0.1"),
        (lambda: fit(measure(AXIS) * [1, 1, 1, 0]), "all are 0"),
        (lambda: fit([[0.5, 1, 1, 90]] * 20), r"all lie at \[0.5, 1.0, 1.0\]"),
        (
            lambda: fit(np.repeat(measure(AXIS)[[0, 1, 2]], 9, 0)),
            "d: degree 3 needs 4 levels, the points have 3",
        ),
        (
            lambda: fit(np.repeat(measure(make_grid()[::21]), 5, 0)),
            "4 different ones, .* degree 3 has 10 parameters",
        ),
        (lambda: fit(measure(OFF[:9]), rank=2), "9 different ones"),
        (lambda: fit(measure(AXIS), degree=0), r"degree must lie in \[1"),
        (lambda: fit(measure(AXIS), degree=2.0), "degree must be an int"),
        (lambda: fit(measure(AXIS), rank=0), r"rank must lie in \[1"),
        (lambda: fit(measure(AXIS), rank=True), "rank must be an int"),
        (lambda: fit(measure(AXIS), rank=7), "rank: 7 has 70 .*64; take fewer"),
        (lambda: fit(measure(AXIS), monotone=True, rank=2), "1 if monotone, got 2"),
        (lambda: fit(measure(AXIS), rank=None), "expected a number.* got None"),
        (lambda: count_parameters(4, 2), "rank: 4 has 28 parameters at degree 2"),
        (lambda: jacobian_rank(AXIS[:, :2]), r"expected \[N: d, w, r\]"),
        (lambda: jacobian_rank(AXIS, 0), "rank must lie"),
        (lambda: jacobian_rank(2 * AXIS), "d: point 0 has 2.0"),
        (
            lambda: leave_one_out(measure(np.delete(AXIS, [1, 5, 9], 0))),
            "without point 0: points: 9 different",
        ),
        (
            lambda: bootstrap_maps(measure(np.delete(AXIS, [1, 5, 9], 0))),
            "sd: expected .* got nan",
        ),
        (lambda: bootstrap_maps(measure(AXIS), sd=-1), "sd: expected 0 or more"),
        (lambda: bootstrap_maps(measure(AXIS), repeats=0), "repeats must lie"),
        (lambda: draw_map().predict([1, 1], [1, 1, 1], 1), "broadcast"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "not a map"),
        (lambda d: d | {"kind": "plan"}, "not a map"),
        (lambda d: {k: v for k, v in d.items() if k != "low"}, "damaged .*'low'"),
        (lambda d: d | {"extra": 1}, "damaged map .*'extra'"),
        (lambda d: d | {"coefficients": [[1, 2], [3]]}, "damaged map"),
        (lambda d: d | {"coefficients": [[1, 2], [3, 4]]}, "expected a finite cube"),
        (lambda d: d | {"low": [0.5, 0.5]}, "damaged map"),
        (lambda d: d | {"low": [0.5, 0.5, 0]}, "0 < low <= high <= 1"),
        (lambda d: d | {"high": [0.4, 1, 1]}, "0 < low <= high <= 1"),
        (lambda d: d | {"low": None}, "damaged map"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(change, message, tmp_path):
    path = fit(measure(AXIS)).save(tmp_path / "some_map.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        Map.load(path)
    assert re.search(r"some_map\.json", str(error.value))


def test_half_a_file_and_no_file_are_refused_by_name(tmp_path):
    path = fit(measure(AXIS)).save(tmp_path / "map.json")
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"map\.json: not valid JSON"):
        Map.load(path)
    text = fit(measure(AXIS)).save(path).read_text()
    first = re.search(r"\d+\.\d+", text).group()
    path.write_text(text.replace(first, "NaN", 1))
    with pytest.raises(ValueError, match=r"map\.json: a damaged map .*finite"):
        Map.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Map.load(tmp_path / "none.json")


# -- what a form misses ----------------------------------------------------------------

LEVELS = (1.0, 0.75, 0.5)


def draw_grid(accuracy, bases=4, sd=0.0, seed=0) -> pd.DataFrame:
    """A grid of 27 networks on several bases, `accuracy(d, w, r)` and noise."""
    draw = np.random.default_rng(seed)
    return pd.DataFrame([
        {"base_id": base, "d": d, "w": w, "r": r,
         "top1": (accuracy(d, w, r) + draw.normal(0, sd)) * (1 + 0.01 * base)}
        for base in range(bases) for d, w, r in itertools.product(LEVELS, repeat=3)
    ])  # fmt: skip


def test_the_misfit_of_a_product_is_the_sums_of_squares_of_a_table():
    points = draw_grid(lambda d, w, r: 80 * d**0.1 * w**0.2 - 4 * (1 - r) * (1 - d),
                       sd=0.5)  # fmt: skip
    found = map3d.find_misfit(points)
    # by hand: logs in a table [base, d, w, r], less all its margins
    y = np.log(points["top1"].to_numpy()).reshape(4, 3, 3, 3)
    mean = y.mean(axis=0)
    added = sum(
        mean.mean(axis=axes, keepdims=True) for axes in ((1, 2), (0, 2), (0, 1))
    )
    lack = ((mean - added + 2 * mean.mean()) ** 2).sum() / (27 - 7)
    free = y - mean - y.mean(axis=(1, 2, 3), keepdims=True) + mean.mean()
    error = (free**2).sum() / (26 * 3) / 4
    scale = points["top1"].mean()
    assert found["misfit"] == pytest.approx(scale * lack**0.5)
    assert found["noise"] == pytest.approx(scale * error**0.5)
    assert found["p"] == pytest.approx(stats.f.sf(lack / error, 20, 78))
    assert found["n"] == 4


def test_a_product_is_seldom_refused_and_an_interaction_is_found():
    def product(d, w, r):
        return 80 * d**0.1 * w**0.2 * r**0.3

    small = [
        map3d.find_misfit(draw_grid(product, sd=0.5, seed=s))["p"] for s in range(60)
    ]
    assert np.mean(np.less(small, 0.05)) < 0.15
    coupled = draw_grid(
        lambda d, w, r: product(d, w, r) - 6 * (1 - d) * (1 - w), sd=0.5
    )
    assert map3d.find_misfit(coupled)["p"] < 1e-4


def test_lines_are_judged_on_the_axes_alone():
    def bent(d, w, r):  # a line on each axis, whatever lies between
        return 80 - 10 * (1 - d) - 20 * (1 - w) - 5 * (1 - r) - 300 * (1 - d) * (1 - w)

    straight = map3d.find_misfit(draw_grid(bent, sd=0.3), "lines")
    assert straight["p"] > 0.01 and straight["misfit"] < 0.6
    curve = draw_grid(lambda d, w, r: 80 - 40 * (1 - w) ** 2, sd=0.3)
    curved = map3d.find_misfit(curve, "lines")
    assert curved["p"] < 1e-4 and curved["misfit"] > 2 * curved["noise"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t[t["base_id"] == 0], "two bases"),
    (lambda t: t.drop(index=5), "every network"),
    (lambda t: t.assign(top1=t["top1"].where(t.index != 5, 0)), "above 0 %"),
    (lambda t: t[(t[["w", "r"]] == 1).all(axis=1)], "none tests"),
])  # fmt: skip
def test_points_that_cannot_test_a_form_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        map3d.find_misfit(change(draw_grid(lambda d, w, r: 80 * d * w * r)))
    with pytest.raises(ValueError, match="form must be one of"):
        map3d.find_misfit(draw_grid(lambda d, w, r: 80 * d), "sum")
