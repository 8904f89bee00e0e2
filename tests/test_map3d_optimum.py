"""MAP's optimum: costs, search and conditions, against other ways to get them."""

import dataclasses
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.map3d.costs import (
    FORMULA,
    RIVALS,
    PowerLaw,
    equal_split,
    fit_exponents,
    inverse_compound,
    pick_rivals,
    rank_lattice,
)
from lib.map3d.predictor import Map
from lib.map3d.search import Problem, check_conditions, optimum
from lib.map3d.uncertainty import bootstrap_optimum, regret

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=12, deadline=None)
ROOT = 0.5**0.5
LOW = (0.5, ROOT, ROOT)  # what each dimension alone comes to at half the cost
SMOOTH = [[0.01, 0.02, 0.02], [0.004, 0.02, 0.03], [0.005, 0.03, 0.02]]
# Depth hurts at once and then no more: two ways to spend half the cost.
TWO = [[0.032, -0.03, 0.01], [0.01, 0.012, 0], [0.01, 0.012, 0]]


def build_map(drops, low=LOW, high=(1, 1, 1), top=93.0):
    """top times a product over d, w, r of 1 - sum over k of drops_mk u_m^k."""
    factors = [np.r_[1, -np.array(drop, dtype=float)] for drop in drops]
    return Map(top * np.einsum("i,j,k->ijk", *factors), low, high)


def build_log_map(values, low=(0.3, 0.3, 0.3)):
    """A stand-in for a map: accuracy and gradient from a function of ln (d, w, r)."""

    def predict(d, w, r):
        return values(np.log([d, w, r]))[0]

    def gradient(d, w, r):
        return values(np.log([d, w, r]))[1] / np.array([d, w, r])

    return SimpleNamespace(predict=predict, gradient=gradient, low=low, high=(1, 1, 1))


def rebox(found, low=LOW, high=(1, 1, 1)):
    """The same surface in another box."""
    surface = {"predict": found.predict, "gradient": found.gradient}
    return SimpleNamespace(**surface, low=low, high=high)


def tabulate(points, cost):
    table = pd.DataFrame(np.array(points, dtype=float), columns=["d", "w", "r"])
    return table.assign(share=cost(table.d, table.w, table.r))


def with_stem(d, w, r):
    """A stem and a head that depth does not shorten: no power law."""
    return (0.1 + 0.9 * d) * w**1.9 * r**2


def brute_force(found, keep, cost, sides=41):
    """The best accuracy of a grid of the box within the budget."""
    axes = [
        np.geomspace(*ends, sides) for ends in zip(found.low, found.high, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.where(cost(*grid) <= keep, found.predict(*grid), -np.inf).max()


drops = st.lists(
    st.lists(st.floats(0, 0.03), min_size=3, max_size=3), min_size=3, max_size=3
)
keeps = st.floats(0.2, 0.98)
powers = st.tuples(*[st.floats(0.5, 2.5)] * 3)


# -- costs -----------------------------------------------------------------------------


def test_the_unpruned_network_costs_one_and_the_formula_is_the_papers():
    assert FORMULA(1, 1, 1) == 1 and FORMULA.exponents == (1, 2, 2)
    d, w = np.array([[0.5], [1.0]]), np.array([0.5, 0.7, 1.0])
    np.testing.assert_allclose(FORMULA(d, w, 0.8), d * w**2 * 0.64, rtol=1e-15)
    assert PowerLaw([1, 2, 0])(0.5, 0.5, 0.1) == 0.125
    assert PowerLaw((1, 2, 0)) == PowerLaw(np.array([1, 2, 0]))


def test_points_that_need_no_accuracy():
    assert equal_split(0.5) == pytest.approx((0.7937, 0.8909, 0.8909), abs=1e-4)
    assert inverse_compound(0.5) == pytest.approx((0.824, 0.904, 0.862), abs=5e-4)
    assert inverse_compound(0.25) == pytest.approx((0.679, 0.817, 0.743), abs=5e-4)
    assert equal_split(0.5, PowerLaw((1, 2, 0)))[2] == 1


@few
@given(powers, st.floats(0.1, 1))
def test_those_points_cost_what_is_kept(exponents, keep):
    cost = PowerLaw(exponents)
    for point in (equal_split(keep, cost), inverse_compound(keep, cost)):
        assert cost(*point) == pytest.approx(keep, rel=1e-12) and max(point) <= 1
    d, w, r = equal_split(keep, cost)
    alone = [cost(*p) for p in ((d, 1, 1), (1, w, 1), (1, 1, r))]
    assert alone == pytest.approx([alone[0]] * 3, rel=1e-12)


AXES = [(0.5, 1, 1), (0.8, 1, 1), (1, 0.6, 1), (1, 0.9, 1), (1, 1, 0.7), (1, 1, 1)]
# Depth, width and image side of EfficientNet B0 to B7, relative to B0: Tan & Le 2019
EFFICIENT = np.array(
    [[1, 1, 224], [1.1, 1, 240], [1.2, 1.1, 260], [1.4, 1.2, 300], [1.8, 1.4, 380],
     [2.2, 1.6, 456], [2.6, 1.8, 528], [3.1, 2.0, 600]]
) / [1, 1, 224]  # fmt: skip


@few
@given(powers)
def test_exponents_are_recovered_from_an_exact_power_law(exponents):
    table = tabulate(AXES, PowerLaw(exponents))
    assert fit_exponents(table).exponents == pytest.approx(exponents, abs=1e-12)
    assert fit_exponents(table[:5]).exponents == pytest.approx(exponents, abs=1e-12)


def test_exponents_of_a_free_dimension_are_zero_and_of_a_real_one_a_compromise():
    assert fit_exponents(tabulate(AXES, PowerLaw((1, 2, 0)))).exponents[2] == 0
    e = fit_exponents(tabulate(AXES, with_stem)).exponents
    x, y = np.log(np.array(AXES)), np.log([with_stem(*p) for p in AXES])
    np.testing.assert_allclose(np.linalg.solve(x.T @ x, x.T @ y), e, rtol=1e-12)
    assert 0.7 < e[0] < 0.95 and e[1] == pytest.approx(1.9)


def test_a_staircase_fixes_the_exponents_but_compound_scaling_does_not():
    steps, rows = [np.linspace(1, low, 5)[1:] for low in LOW], [[1, 1, 1]]
    for i, m in product(range(4), range(3)):
        rows.append([*rows[-1][:m], steps[m][i], *rows[-1][m + 1 :]])
    found = fit_exponents(tabulate(rows, PowerLaw((0.9, 1.8, 2))))
    assert found.exponents == pytest.approx((0.9, 1.8, 2), abs=1e-12)
    with pytest.raises(ValueError, match=r"move together .*compound"):
        fit_exponents(tabulate(EFFICIENT, FORMULA))


# -- any function as a cost ------------------------------------------------------------


def in_macs(d, w, r):
    """An absolute cost, of arrays."""
    return 125_485_696 * d * w**2 * r**2


def of_numbers(d, w, r):
    """The same, of numbers only."""
    if d < 0 or math.isnan(d):
        raise ValueError
    return float(d) * math.pow(w, 2) * math.exp(2 * math.log(r))


class Counted:
    """The same as an object that is called, with an int for an answer."""

    def __call__(self, d, w, r):
        return int(1e12 * d * w**2 * r**2)


@pytest.mark.parametrize("cost", [in_macs, of_numbers, Counted()])
@pytest.mark.parametrize("shape", [SMOOTH, TWO])
def test_a_plain_function_is_as_good_a_cost_as_the_power_law(cost, shape):
    wanted = optimum(build_map(shape), 0.5)
    found = optimum(build_map(shape), 0.5, cost)
    assert found.point == pytest.approx(wanted.point, abs=1e-5)
    assert found.accuracy == pytest.approx(wanted.accuracy, abs=1e-8)
    assert found.multiplier == pytest.approx(wanted.multiplier, rel=1e-3)
    assert found.elasticity == pytest.approx(wanted.elasticity, rel=1e-3)
    assert found.bounds == wanted.bounds and found.cost == pytest.approx(0.5, rel=1e-9)
    assert len(found.others) == len(wanted.others)


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.9])
def test_the_optimum_of_a_cost_that_is_no_power_law(keep):
    found = optimum(build_map(SMOOTH), keep, with_stem)
    best = brute_force(build_map(SMOOTH), keep, with_stem)
    assert best - 1e-9 <= found.accuracy <= best + 0.05
    assert found.kkt_residual < 1e-6 and found.cost == pytest.approx(keep, rel=1e-9)
    # at d: d ln C / d ln d = .9 d / (.1 + .9 d), by hand
    e = np.array([0.9 * found.d / (0.1 + 0.9 * found.d), 1.9, 2])
    own = build_map(SMOOTH).elasticities(*found.point, e)
    np.testing.assert_allclose(found.elasticities, own, rtol=1e-6)
    more = optimum(build_map(SMOOTH), keep + 1e-5, with_stem).accuracy
    assert (more - found.accuracy) / 1e-5 == pytest.approx(found.multiplier, rel=1e-2)


def test_a_cost_with_kinks_or_steps_ends_at_the_best_of_the_grids_at_least():
    def kinked(d, w, r):
        return np.maximum(d * w**2, r**4)

    def stepped(d, w, r):
        return np.ceil(9 * d) / 9 * np.ceil(16 * w) ** 2 / 256 * r**2

    for cost in (kinked, stepped):
        found = optimum(build_map(SMOOTH), 0.5, cost)
        assert found.cost <= 0.5 * (1 + 1e-9)
        assert found.accuracy > brute_force(build_map(SMOOTH), 0.5, cost) - 0.1


def test_all_that_takes_a_cost_takes_a_function():
    best = optimum(build_map(SMOOTH), 0.5)
    table = bootstrap_optimum([build_map(SMOOTH)], 0.5, in_macs)
    assert table.loc[0, ["d", "w", "r"]].tolist() == pytest.approx(best.point, abs=1e-5)
    assert regret(build_map(SMOOTH), table, 0.5, of_numbers) == pytest.approx(
        0, abs=1e-8
    )


# -- the optimum -----------------------------------------------------------------------


def test_the_closed_form_of_a_bowl_in_logs():
    # F = a - sum g y^2 on sum e y = ln keep: y_m proportional to e_m / g_m.
    g, e, keep = np.array([3.0, 5, 9]), np.array([1, 1.4, 2]), 0.4
    bowl = build_log_map(
        lambda y: (93 - np.tensordot(g, y**2, 1), -2 * (g * y.T).T),
    )
    found = optimum(bowl, keep, PowerLaw(e))
    total = (e**2 / g).sum()
    np.testing.assert_allclose(
        np.log(found.point), np.log(keep) * e / g / total, rtol=1e-6
    )
    assert found.interior and found.others == () and found.unused == 0
    assert found.accuracy == pytest.approx(93 - np.log(keep) ** 2 / total, rel=1e-12)
    slope = -2 * np.log(keep) / total / keep
    assert found.multiplier == pytest.approx(slope, rel=1e-6)
    assert found.elasticity == pytest.approx(slope * keep / found.accuracy, rel=1e-6)
    assert found.elasticities == pytest.approx([found.elasticity] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("p", "keep", "point"),
    [
        # F = 93 d^p w^q r^s: whatever loses least per cost goes first, to its bound.
        ((0.1, 0.3, 0.4), 0.5, (0.5, 1, 1)),
        ((0.3, 0.1, 0.4), 0.5, (1, ROOT, 1)),
        ((0.3, 0.4, 0.1), 0.5, (1, 1, ROOT)),
        ((0.1, 0.3, 0.4), 0.18, (0.3, 0.6**0.5, 1)),
        ((0.1, 0.4, 0.3), 0.015, (0.3, 0.05**0.5 / 0.3, 0.3)),
    ],
)
def test_a_constant_elasticity_prunes_one_dimension_after_the_other(p, keep, point):
    p = np.array(p)

    def values(y):
        height = 93 * np.exp(np.tensordot(p, y, 1))
        return height, (p * np.multiply.outer(height, np.ones(3))).T

    found = optimum(build_log_map(values), keep)
    assert found.point == pytest.approx(point, rel=1e-8)
    assert found.cost == pytest.approx(keep, rel=1e-9)
    ratios = p / FORMULA.exponents
    at_low = np.isclose(found.point, 0.3)
    for m, bound in enumerate(found.bounds):
        assert bound == ("low" if at_low[m] else "high" if point[m] == 1 else None)
    rest = ratios[[bound is None for bound in found.bounds]]
    assert found.elasticity == pytest.approx(rest[0], rel=1e-9)
    assert found.elasticities == pytest.approx(ratios, rel=1e-9)


@few
@given(drops, keeps, powers)
def test_slsqp_and_brute_force_agree_and_the_conditions_have_the_right_signs(
    drops, keep, exponents
):
    surface, cost = build_map(drops), PowerLaw(exponents)
    assume(keep > cost(*LOW))
    found, best = (
        optimum(surface, keep, cost),
        brute_force(surface, keep, cost),
    )
    assert best - 1e-9 <= found.accuracy <= best + 93 * 0.4 / 40
    assert found.accuracy == pytest.approx(surface.predict(*found.point), rel=1e-14)
    assert found.kkt_residual < 1e-6
    assert found.cost <= keep * (1 + 1e-9) and surface.covers(*found.point)
    e = np.array(found.elasticities)
    own = surface.elasticities(*found.point, cost.exponents)
    np.testing.assert_allclose(e, own, rtol=1e-9, atol=1e-15)
    for m, bound in enumerate(found.bounds):
        sign = {"low": -1, "high": 1, None: 0}[bound]
        assert abs(e[m] - found.elasticity) < 2e-6 or sign
        assert sign * (e[m] - found.elasticity) > -2e-6
    assert found.interior == (found.bounds == (None, None, None))
    price = found.elasticity * found.accuracy / found.cost
    assert found.multiplier == pytest.approx(price, rel=1e-12)


@few
@given(drops, st.floats(0.3, 0.9))
def test_the_multiplier_is_the_slope_of_the_best_accuracy_over_keep(drops, keep):
    drops = np.array(drops) + np.array([0.005, 0.005, 0])  # strictly monotone
    found, step = optimum(build_map(drops), keep), 1e-5
    more = optimum(build_map(drops), keep + step).accuracy
    assert (more - found.accuracy) / step == pytest.approx(found.multiplier, rel=1e-2)


def test_inferior_points_that_meet_the_conditions_are_listed():
    found = optimum(build_map(TWO), 0.5)
    assert found.bounds[0] == "low" and found.point == pytest.approx((0.5, 1, 1))
    (other,) = found.others
    assert other.d == 1 and other.accuracy < found.accuracy - 0.1
    assert other.w == pytest.approx(other.r, abs=1e-6)
    pinned = optimum(rebox(build_map(TWO), low=(1, ROOT, ROOT)), 0.5)
    assert pinned.accuracy == pytest.approx(other.accuracy, rel=1e-12)
    step = 1e-6  # at a corner the multiplier is what more budget buys
    more = optimum(build_map(TWO), 0.5 + step).accuracy - found.accuracy
    assert found.bounds == ("low", "high", "high")
    assert found.multiplier == pytest.approx(more / step, rel=1e-3)


def test_a_cubic_that_is_not_monotone_leaves_budget_unused_and_says_so():
    # H = 1 + 0.02 u - 0.04 u^2 has its peak of 1.0025 at u = 1/4.
    surface = build_map([[-0.02, 0.04], [-0.02, 0.04], [-0.02, 0.04]])
    found = optimum(surface, 0.9)
    peak = [1 - (1 - low) / 4 for low in LOW]
    assert found.point == pytest.approx(peak, abs=1e-6)
    assert found.accuracy == pytest.approx(93 * 1.0025**3, rel=1e-12)
    assert found.unused == pytest.approx(0.9 - FORMULA(*peak), rel=1e-5)
    assert found.multiplier == found.elasticity == 0 and found.kkt_residual < 1e-6
    tight = optimum(surface, 0.5)
    assert tight.unused == 0 and tight.multiplier > 0
    assert optimum(surface, 1.0).point == pytest.approx(peak, abs=1e-6)


def test_the_ends_of_the_budget():
    surface = build_map(SMOOTH)
    whole = optimum(surface, 1.0)
    assert whole.point == (1, 1, 1) and whole.accuracy == 93 and whole.cost == 1
    assert whole.bounds == ("high",) * 3 and whole.kkt_residual == 0
    step = 1e-6  # no dimension can grow: what a little less would cost
    less = (93 - optimum(surface, 1 - step).accuracy) / step
    assert whole.multiplier == pytest.approx(less, rel=1e-3)
    least = FORMULA(*LOW)
    found = optimum(surface, least)
    assert found.point == pytest.approx(LOW, rel=1e-8) and found.bounds == ("low",) * 3
    more = (optimum(surface, least + 1e-7).accuracy - found.accuracy) / 1e-7
    assert found.multiplier == pytest.approx(more, rel=1e-2)
    with pytest.raises(ValueError, match=r"0\.12 is out of reach.* nearest .* 0\.125"):
        optimum(surface, 0.12)


@pytest.mark.parametrize("low", [(0.2, 0.9, 0.3), (0.9, 0.4, 0.6), (0.45, 0.97, 0.98)])
@pytest.mark.parametrize("keep", [0.45, 0.97])
def test_boxes_whose_corners_lie_off_the_budget(low, keep):
    surface = build_map(SMOOTH, low)
    found = optimum(surface, keep)
    assert found.accuracy >= brute_force(surface, keep, FORMULA) - 1e-9
    assert found.kkt_residual < 1e-6 and surface.covers(*found.point)
    assert found.cost == pytest.approx(keep, rel=1e-9)


def test_data_that_stop_short_of_the_unpruned_network():
    surface = dataclasses.replace(build_map(SMOOTH), high=(0.9, 0.95, 1.0))
    found = optimum(surface, 0.95)
    assert found.point == pytest.approx((0.9, 0.95, 1)) and found.kkt_residual == 0
    assert found.unused == pytest.approx(0.95 - 0.9 * 0.95**2) and not found.multiplier
    assert optimum(surface, 0.5).d <= 0.9


@pytest.mark.parametrize("cost", [PowerLaw((1, 2, 0)), lambda d, w, r: d * w**2])
def test_a_dimension_that_costs_nothing_stays_whole(cost):
    found = optimum(build_map(SMOOTH), 0.5, cost)
    assert found.r == pytest.approx(1, rel=1e-12) and found.bounds[2] == "high"
    assert found.elasticities[2] == np.inf
    assert found.elasticities[:2] == pytest.approx([found.elasticity] * 2, abs=1e-6)


def test_a_dimension_that_does_not_vary_stays_where_it_is():
    surface = build_map([SMOOTH[0], SMOOTH[1], [0, 0, 0]], (0.5, ROOT, 1), (1, 1, 1))
    found = optimum(surface, 0.6)
    assert found.r == 1 and found.kkt_residual < 1e-6
    assert found.accuracy >= brute_force(surface, 0.6, FORMULA) - 1e-9


def test_a_map_without_slope_has_no_price():
    found = optimum(build_map([[0.0]] * 3), 0.5)
    assert found.accuracy == 93 and found.multiplier == 0 and found.kkt_residual == 0
    assert str(found.multiplier) == "0.0"  # not -0.0


def test_conditions_at_points_that_are_no_optimum():
    problem = Problem(build_map(SMOOTH), 0.5, FORMULA)

    def ask(*x):
        return check_conditions(problem, problem.point(np.array(x, dtype=float)))

    off = ask(0.5, 1, 1)
    assert off["kkt_residual"] > 0.01 and off["bounds"] == ("low", "high", "high")
    assert ask(1, 1, 1)["kkt_residual"] >= np.log(2)  # twice the budget
    idle = ask(0.8, 0.8, 0.8)
    assert idle["multiplier"] == 0 and idle["kkt_residual"] > 0.01


# -- what an optimum is worth ----------------------------------------------------------


def test_bootstrapped_optima_and_their_regret():
    rng = np.random.default_rng(0)
    maps = [build_map(np.abs(SMOOTH + rng.normal(0, 0.02, (3, 3)))) for _ in range(8)]
    maps.append(build_map(TWO))
    table = bootstrap_optimum(iter(maps), 0.5)
    ends = [f"{name}_{end}" for name in "dwr" for end in ("low", "high")]
    assert list(table.columns) == ["d", "w", "r", "accuracy", "cost", *ends]
    assert len(table) == 9 and all(table[end].dtype == bool for end in ends)
    np.testing.assert_allclose(table.cost, 0.5)
    for (_, row), surface in zip(table.iterrows(), maps, strict=True):
        best = optimum(surface, 0.5)
        assert row.accuracy == pytest.approx(best.accuracy, rel=1e-10)
    last = table.iloc[-1]
    assert last.d_low and last.w_high and not last.d_high and not last.w_low
    truth = build_map(SMOOTH)
    lost = regret(truth, table, 0.5)
    by_hand = optimum(truth, 0.5).accuracy - truth.predict(0.5, 1, 1)
    assert lost.shape == (9,) and (lost > -1e-9).all()
    assert lost[-1] == pytest.approx(by_hand, abs=1e-6) and by_hand > 0.1


# -- networks that exist ---------------------------------------------------------------


def test_networks_that_exist_are_ranked_within_the_true_budget():
    sides = np.array([16, 20, 24, 28, 32]) / 32
    rows = list(product(np.arange(14, 28) / 27, np.arange(11, 17) / 16, sides))
    table = tabulate(rows, FORMULA)
    table["blocks"] = (27 * table.d).round().astype(int)
    table = table[table.r > 0.7].sample(frac=1, random_state=1)
    surface = build_map(SMOOTH, low=(0.5, 0.6, 0.7))
    found = rank_lattice(table, surface, 0.5)
    wanted = table[(table.share <= 0.5) & (table.share >= 0.48)]
    assert set(found.index) == set(wanted.index) and 3 < len(found) < len(table)
    assert (np.diff(found.predicted) <= 0).all() and found.covered.all()
    np.testing.assert_allclose(
        found.predicted, surface.predict(found.d, found.w, found.r)
    )
    pd.testing.assert_frame_equal(found[table.columns], table.loc[found.index])
    assert list(found.columns) == [*table.columns, "predicted", "covered"]
    wider = rank_lattice(table, surface, 0.5, tolerance=0.1)
    assert len(wider) > len(found) and wider.share.min() >= 0.4
    whole = rank_lattice(table, surface, 1.0, tolerance=0)
    assert whole.index.tolist() == [table.share.idxmax()]


def test_of_equally_good_networks_the_cheaper_goes_first_then_the_earlier_row():
    rows = {"d": [0.9] * 3, "w": [1.0] * 3, "r": [0.8] * 3, "share": [0.5, 0.49, 0.49]}
    found = rank_lattice(pd.DataFrame(rows), build_map(SMOOTH), 0.5)
    assert found.index.tolist() == [1, 2, 0]


def test_networks_outside_the_data_are_marked():
    table = tabulate([(0.4, 1, 1), (0.6, 0.9, 1), (1, 1, 1)], FORMULA)
    with pytest.warns(UserWarning, match="1 of 2 networks lie outside"):
        found = rank_lattice(table, build_map(SMOOTH), 0.5, tolerance=0.2)
    assert found.covered.tolist() == [bool(d > 0.5) for d in found.d]


# -- rivals ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lattice() -> pd.DataFrame:
    """A made-up space whose cost is d w^2 r^2 to the digit."""
    d = [k / 9 for k in range(3, 10)]
    w = [k / 16 for k in range(8, 17)]
    r = [k / 8 for k in range(4, 9)]
    return tabulate(list(product(d, w, r)), FORMULA).sample(frac=1, random_state=0)


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7])
def test_rivals_are_networks_of_the_lattice_near_the_budget(lattice, keep):
    rivals = pick_rivals(lattice, keep)
    assert tuple(rivals.index) == RIVALS
    columns = ["d", "w", "r", "share"]
    known = set(map(tuple, lattice[columns].to_numpy()))
    assert all(tuple(row) in known for row in rivals[columns].to_numpy())
    for name, axis, power in zip(RIVALS, "dwr", (1, 2, 2), strict=False):
        row = rivals.loc[name]
        assert all(row[x] == 1 for x in "dwr" if x != axis)
        away = np.abs(lattice[axis].unique() ** power - keep)
        assert abs(row["share"] - keep) == pytest.approx(away.min())
    both = rivals.loc[["equal", "compound"]]
    assert both["share"].between(keep - 0.02, keep + 1e-9).all()


def test_the_equal_split_is_the_nearest_network_in_logs(lattice):
    target = np.log([0.5 ** (1 / 3), 0.5 ** (1 / 6), 0.5 ** (1 / 6)])
    near = lattice[lattice["share"].between(0.48, 0.5)]
    away = ((np.log(near[["d", "w", "r"]]) - target) ** 2).sum(axis=1)
    chosen = pick_rivals(lattice, 0.5, cost=FORMULA).loc["equal"]
    assert chosen.tolist() == near.loc[away.idxmin()].tolist()


def test_a_budget_that_nothing_meets_is_refused_with_the_nearest(lattice):
    coarse = lattice[lattice["share"] > 0.6]
    with pytest.raises(ValueError, match="depth alone cannot reach"):
        pick_rivals(coarse, 0.5)
    gaps = lattice[~lattice["share"].between(0.45, 0.52)]
    with pytest.raises(ValueError, match=r"costs 0.48 to 0.5; the nearest .* 0\.44"):
        pick_rivals(gaps, 0.5)


# -- what is refused -------------------------------------------------------------------

smooth = build_map(SMOOTH)


def shy(d, w, r):
    """Only numbers from 0.6 on are known."""
    return math.nan if min(d, r) < 0.6 else d * w * r


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLaw((1, 2)), "three finite numbers >= 0"),
        (lambda: PowerLaw((1, 2, -1)), r">= 0 .* got \(1, 2, -1\)"),
        (lambda: PowerLaw((0, 0, 0)), "not all zero"),
        (lambda: PowerLaw((1, np.nan, 2)), "finite"),
        (lambda: fit_exponents(tabulate(AXES[:1] + AXES[2:3] + AXES[5:], FORMULA)),
         "r never below 1"),
        (lambda: fit_exponents(tabulate(AXES[2:], FORMULA)), "d never below 1"),
        (lambda: fit_exponents(tabulate(AXES, lambda d, w, r: d / w * r)), "-1"),
        (lambda: fit_exponents({"d": [1], "w": [1]}), r"\['r', 'share'\] are"),
        (lambda: fit_exponents(tabulate(AXES, FORMULA).drop(columns="share")),
         r"\['share'\] are not among"),
        (lambda: fit_exponents(tabulate(AXES, FORMULA).assign(share=[2.0] * 6)),
         "share is not 1 at d = w = r = 1"),
        (lambda: fit_exponents(tabulate(AXES, lambda d, w, r: -d)),
         r"'share'\]: expected finite numbers > 0, got .* in row 0 \(6 such"),
        (lambda: equal_split(1.1), r"in \(0, 1\], got 1.1"),
        (lambda: inverse_compound(np.nan), "got nan"),
        (lambda: optimum(smooth, 0), r"in \(0, 1\], got 0"),
        (lambda: optimum(smooth, 50), r"in \(0, 1\], got 50"),
        (lambda: optimum(smooth, 0.1), r"nearest feasible is 0.125.*\[0.5, 0.707"),
        (lambda: optimum(smooth, 0.5, 3.0), r"cost: expected .* function .* got 3.0"),
        (lambda: optimum(smooth, 0.5, "macs"), "cost: expected .* got 'macs'"),
        (lambda: optimum(smooth, 0.5, lambda d, w, r: -d), "expected finite .*-1"),
        (lambda: optimum(smooth, 0.5, lambda d, w, r: d - 0.5), "numbers > 0, got 0"),
        (lambda: optimum(smooth, 0.5, shy), "cost: expected finite .* got nan"),
        (lambda: optimum(smooth, 0.5, lambda d, w, r: d * w / r), "cost: falls as r"),
        (lambda: optimum(smooth, 0.5, lambda d, w, r: 1), "cost: the same all over"),
        (lambda: bootstrap_optimum([smooth], 0.1), "out of reach"),
        (lambda: regret(smooth, tabulate([(0.4, 1, 1)], FORMULA), 0.5), "map's box"),
        (lambda: regret(smooth, tabulate([(0.9, 1, 1)], FORMULA), 0.5),
         "0.5 at most; the dearest costs 0.9"),
        (lambda: regret(smooth, pd.DataFrame({"d": [1]}), 0.5), r"\['w', 'r'\] are"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 1.5), "got 1.5"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 0.5, tolerance=-1),
         "tolerance must lie"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 0.6, tolerance=0.01),
         "no network costs 0.59 to 0.6; the nearest share below is 0.5, above 0.8:"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 0.1), "below is none"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
