"""MAP's optimum: costs, search and conditions, against other ways to get them."""

import dataclasses
import importlib
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import NonlinearConstraint, minimize

from lib import models
from lib.map3d.costs import (
    FORMULA,
    Measured,
    PowerLaw,
    equal_split,
    fit_exponents,
    inverse_compound,
    local_exponents,
    single_dimension,
)
from lib.map3d.optimum import (
    Optimum,
    bootstrap_optimum,
    check_kkt,
    optimum,
    rank_lattice,
    regret,
    trace_budget,
)
from lib.map3d.predictor import Map
from lib.map3d.space import Space

module = importlib.import_module("lib.map3d.optimum")
few = settings(max_examples=20, deadline=None)
ROOT = 0.5**0.5
LOW = (0.5, ROOT, ROOT)  # what each dimension alone comes to at half the cost
SMOOTH = [[0.01, 0.02, 0.02], [0.004, 0.02, 0.03], [0.005, 0.03, 0.02]]


def build_map(drops, low=LOW, top=93.0):
    """top times a product over d, w, r of 1 - sum over k of drops_mk u_m^k."""
    factors = [np.r_[1, -np.array(drop, dtype=float)] for drop in drops]
    tensor = top * np.einsum("i,j,k->ijk", *factors)
    return Map(tensor, low, len(tensor) - 1, 1, False, "lm", 13, 0.1)


def build_log_map(values, low=(0.3, 0.3, 0.3)):
    """A stand-in for a map: accuracy and gradient from a function of ln (d, w, r)."""

    def predict(d, w, r):
        return values(np.log([d, w, r]))[0]

    def gradient(d, w, r):
        return values(np.log([d, w, r]))[1] / np.array([d, w, r])

    def covers(d, w, r):
        return np.all(np.stack(np.broadcast_arrays(d, w, r), -1) >= 0.3 - 1e-9, -1)

    return SimpleNamespace(
        predict=predict, gradient=gradient, covers=covers, low=low, high=(1, 1, 1)
    )


def build_table(d, w, r, cost):
    rows = np.array(list(product(d, w, r)))
    table = pd.DataFrame(rows, columns=["d", "w", "r"])
    return table.assign(macs=1e6 * cost(table.d, table.w, table.r))


def cost_linear(d, w, r):
    """A stem and a head that depth does not shorten; kinks where it is tabulated."""
    return (0.1 + 0.9 * d) * w**1.9 * r**2


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


@few
@given(powers, st.tuples(*[st.floats(0.2, 1)] * 3), st.sampled_from("dwr"))
def test_solve_inverts_the_cost_in_every_dimension(exponents, point, name):
    cost, others = PowerLaw(exponents), dict(zip("dwr", point, strict=True))
    wanted = others.pop(name)
    assert cost.solve(cost(*point), **others) == pytest.approx(wanted, rel=1e-12)


def test_solve_where_a_dimension_costs_nothing():
    found = PowerLaw((1, 2, 0)).solve(0.5, d=np.array([0.4, 0.5, 0.6]), w=1)
    assert found.tolist() == [np.inf, np.inf, 0]


def test_floors_of_single_dimensions():
    floors = single_dimension(0.5)
    assert list(floors) == ["depth", "width", "resolution"]
    assert floors["depth"] == (0.5, 1, 1)
    assert floors["width"] == pytest.approx((1, ROOT, 1), rel=1e-15)
    assert floors["resolution"] == pytest.approx((1, 1, ROOT), rel=1e-15)
    assert list(single_dimension(0.5, PowerLaw((1, 2, 0)))) == ["depth", "width"]
    assert single_dimension(0.5, PowerLaw((1, 1, 2)))["width"] == (1, 0.5, 1)


def test_points_that_need_no_accuracy():
    assert equal_split(0.5) == pytest.approx((0.7937, 0.8909, 0.8909), abs=1e-4)
    assert inverse_compound(0.5) == pytest.approx((0.824, 0.904, 0.862), abs=5e-4)
    assert inverse_compound(0.25) == pytest.approx((0.679, 0.817, 0.743), abs=5e-4)
    assert equal_split(0.5, PowerLaw((1, 2, 0)))[2] == 1
    only_depth = inverse_compound(0.3, alpha=1.3, beta=1, gamma=1)
    assert only_depth == pytest.approx((0.3, 1, 1), rel=1e-12)


measured = Measured(
    build_table(
        np.linspace(0.2, 1, 9), np.linspace(0.4, 1, 7), [0.5, 0.75, 1], cost_linear
    )
)


@pytest.mark.parametrize("cost", [FORMULA, PowerLaw((0.8, 1.4, 1.9)), measured])
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.35])
def test_those_points_cost_what_is_kept(cost, keep):
    points = [*single_dimension(keep, cost).values()]
    points += [equal_split(keep, cost), inverse_compound(keep, cost)]
    for point in points:
        assert float(cost(*point)) == pytest.approx(keep, rel=1e-12)
        assert max(point) <= 1 and (keep < 1 or point == (1, 1, 1))


def test_an_equal_split_is_equal():
    for cost in (FORMULA, PowerLaw((0.8, 1.4, 1.9)), measured):
        d, w, r = equal_split(0.5, cost)
        alone = [float(cost(*p)) for p in ((d, 1, 1), (1, w, 1), (1, 1, r))]
        assert alone == pytest.approx([alone[0]] * 3, rel=1e-12)


# -- exponents and tables --------------------------------------------------------------

AXES = [(0.5, 1, 1), (0.8, 1, 1), (1, 0.6, 1), (1, 0.9, 1), (1, 1, 0.7), (1, 1, 1)]
# Depth, width and image side of EfficientNet B0 to B7, relative to B0: Tan & Le 2019
COMPOUND = np.array(
    [[1, 1, 224], [1.1, 1, 240], [1.2, 1.1, 260], [1.4, 1.2, 300], [1.8, 1.4, 380],
     [2.2, 1.6, 456], [2.6, 1.8, 528], [3.1, 2.0, 600]]
) / [1, 1, 224]  # fmt: skip


def tabulate(points, cost, scale=125_485_696.0):
    table = pd.DataFrame(np.array(points, dtype=float), columns=["d", "w", "r"])
    return table.assign(macs=scale * cost(table.d, table.w, table.r))


@few
@given(powers)
def test_exponents_are_recovered_from_an_exact_power_law(exponents):
    table = tabulate(AXES, PowerLaw(exponents))
    assert fit_exponents(table).exponents == pytest.approx(exponents, abs=1e-12)
    shares = table.assign(share=table.macs / table.macs.max()).drop(columns="macs")
    assert fit_exponents(shares[:5]).exponents == pytest.approx(exponents, abs=1e-12)


def test_exponents_of_a_free_dimension_are_zero_and_of_a_real_one_a_compromise():
    assert fit_exponents(tabulate(AXES, PowerLaw((1, 2, 0)))).exponents[2] == 0
    e = fit_exponents(tabulate(AXES, cost_linear)).exponents
    x = np.log(np.array(AXES))
    y = np.log([cost_linear(*p) for p in AXES])
    np.testing.assert_allclose(np.linalg.solve(x.T @ x, x.T @ y), e, rtol=1e-12)
    assert 0.7 < e[0] < 0.95 and e[1] == pytest.approx(1.9)


def test_a_staircase_fixes_the_exponents_but_compound_scaling_does_not():
    steps, rows = [np.linspace(1, low, 5)[1:] for low in LOW], [[1, 1, 1]]
    for i, m in product(range(4), range(3)):
        rows.append([*rows[-1][:m], steps[m][i], *rows[-1][m + 1 :]])
    found = fit_exponents(tabulate(rows, PowerLaw((0.9, 1.8, 2))))
    assert found.exponents == pytest.approx((0.9, 1.8, 2), abs=1e-12)
    with pytest.raises(ValueError, match=r"move together .*compound"):
        fit_exponents(tabulate(COMPOUND, FORMULA))


def test_only_the_dimensions_that_move_together_are_named():
    tied = [(1, 1, 1), (0.5, 0.8, 0.8), (0.7, 0.6, 0.6), (0.9, 0.7, 0.7)]
    with pytest.raises(ValueError, match=r"^width and resolution move together"):
        fit_exponents(tabulate(tied, FORMULA))


def test_a_measured_cost_is_its_table_at_the_nodes_and_a_power_law_between():
    table = measured.table.sample(frac=1, random_state=0)
    cost, shares = Measured(table), table.macs / 1e6
    np.testing.assert_allclose(cost(table.d, table.w, table.r), shares, rtol=1e-14)
    assert cost(1, 1, 1) == 1 and cost(0.3, [[0.4], [0.5]], [0.5, 0.6]).shape == (2, 2)
    a, b = cost_linear(0.4, 0.5, 0.75), cost_linear(0.5, 0.5, 0.75)
    assert cost(0.2**0.5, 0.5, 0.75) == pytest.approx((a * b) ** 0.5, rel=1e-12)
    assert cost.low == pytest.approx((0.2, 0.4, 0.5))
    assert cost.exponents == fit_exponents(table).exponents


@few
@given(st.tuples(*[st.floats(0.41, 0.99)] * 3), st.integers(0, 2))
def test_local_exponents_are_differences_of_logs(point, m):
    point = np.maximum(point, (0.2, 0.4, 0.51))
    for k, step in ((0, -1e-5), (1, 1e-5)):
        moved = point.copy()
        moved[m] *= np.exp(step)
        slope = np.log(measured(*moved) / measured(*point)) / step
        assume(len(measured.list_cells(moved)) == 1)
        assume(len(measured.list_cells((point * moved) ** 0.5)) == 1)
        assert local_exponents(measured, *point)[k, m] == pytest.approx(slope, rel=1e-4)


def test_local_exponents_differ_on_the_two_sides_of_a_node_only():
    below, above = local_exponents(measured, 0.6, 0.55, 0.8)
    np.testing.assert_allclose([below[1:], above[1:]], [[1.9, 2]] * 2, rtol=1e-12)
    costs = [cost_linear(d, 1, 1) for d in (0.5, 0.6, 0.7)]
    assert below[0] == pytest.approx(np.log(costs[1] / costs[0]) / np.log(0.6 / 0.5))
    assert above[0] == pytest.approx(np.log(costs[2] / costs[1]) / np.log(0.7 / 0.6))
    assert (np.ptp(local_exponents(measured, 0.63, 0.55, 0.8), axis=0) == 0).all()
    assert len(measured.list_cells((0.6, 0.5, 0.75))) == 8
    assert len(measured.list_cells((1, 0.4, 0.75))) == 2
    corner = local_exponents(measured, 1, 1, 1)
    np.testing.assert_array_equal(corner[0], corner[1])


@few
@given(st.sampled_from("dwr"), st.tuples(*[st.floats(0, 1)] * 3))
def test_solve_inverts_a_measured_cost(name, part):
    low = np.array(measured.low)
    others = dict(zip("dwr", low + (1 - low) * np.array(part), strict=True))
    share = float(measured(*others.values()))
    wanted = others.pop(name)
    assert measured.solve(share, **others) == pytest.approx(wanted, rel=1e-8)
    grid = {key: np.array([[x], [1.0]]) for key, x in others.items()}
    assert measured.solve(share, **grid).shape == (2, 1)
    assert measured.solve(0.01, **others) == 0 and measured.solve(2, **others) == np.inf


def test_a_table_of_a_power_law_is_that_power_law():
    cost = Measured(build_table([0.3, 0.6, 1], [0.5, 1], [0.5, 0.7, 1], FORMULA))
    assert cost(0.47, 0.81, 0.9) == pytest.approx(FORMULA(0.47, 0.81, 0.9), rel=1e-13)
    found, wanted = (optimum(build_map(SMOOTH), 0.5, c) for c in (cost, FORMULA))
    assert found.point == pytest.approx(wanted.point, abs=1e-6)
    assert found.multiplier == pytest.approx(wanted.multiplier, rel=1e-6)


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
        np.log(found.point), np.log(keep) * e / g / total, rtol=1e-7
    )
    assert found.interior and found.others == () and found.unused == 0
    assert found.accuracy == pytest.approx(93 - np.log(keep) ** 2 / total, rel=1e-12)
    slope = -2 * np.log(keep) / total / keep
    assert found.multiplier == pytest.approx(slope, rel=1e-6)
    assert found.elasticity == pytest.approx(slope * keep / found.accuracy, rel=1e-6)
    assert found.elasticities == pytest.approx([found.elasticity] * 3, rel=1e-6)


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
    assert found.point == pytest.approx(point, rel=1e-9)
    assert found.cost == pytest.approx(keep, rel=1e-12)
    ratios = p / FORMULA.exponents
    at_low = np.isclose(found.point, 0.3)
    for m, bound in enumerate(found.bounds):
        assert bound == ("low" if at_low[m] else "high" if point[m] == 1 else None)
    rest = ratios[[bound is None for bound in found.bounds]]
    assert found.elasticity == pytest.approx(rest[0], rel=1e-9)
    assert found.elasticities == pytest.approx(ratios, rel=1e-9)


@few
@given(drops, keeps, powers)
def test_slsqp_and_brute_force_agree(drops, keep, exponents):
    map, cost = build_map(drops), PowerLaw(exponents)
    assume(keep > cost(*LOW))
    found = optimum(map, keep, cost, num=101)
    assert found.brute.accuracy <= found.accuracy + 1e-9
    axes = [np.geomspace(low, 1, 25) for low in LOW]
    grid = np.meshgrid(*axes, indexing="ij")
    heights = np.where(cost(*grid) <= keep, map.predict(*grid), -np.inf)
    gains = np.abs(np.array(map.gradient(*grid)) * grid).max((1, 2, 3))
    lost = (gains * -np.log(LOW)).sum() / 24  # a cell in every dimension
    assert heights.max() - 1e-9 <= found.accuracy <= heights.max() + 2 * lost + 1e-9
    assert found.accuracy <= found.brute.accuracy + lost + 1e-9
    assert map.predict(*found.point) == pytest.approx(found.accuracy, rel=1e-14)


@few
@given(drops, keeps, powers)
def test_the_conditions_hold_with_the_right_signs(drops, keep, exponents):
    map, cost = build_map(drops), PowerLaw(exponents)
    assume(keep > cost(*LOW))
    found = optimum(map, keep, cost, num=101)
    assert found.kkt_residual < 1e-6
    assert found.cost <= keep * (1 + 1e-9) and map.covers(*found.point)
    pull, e = np.array(found.bound_multipliers), np.array(found.elasticities)
    own = map.elasticities(*found.point, cost.exponents)
    np.testing.assert_allclose(e, own, rtol=1e-9, atol=1e-15)
    for m, bound in enumerate(found.bounds):
        sign = {"low": -1, "high": 1, None: 0}[bound]
        assert pull[m] * sign >= -1e-5 and (sign or pull[m] == 0)
        assert abs(e[m] - found.elasticity) < 1e-6 or sign
        assert sign * (e[m] - found.elasticity) > -1e-6
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


def test_bound_multipliers_are_what_moving_a_bound_gains():
    steep = build_map([[0.1, 0.05, 0], [0.001, 0, 0.001], [0.02, 0.02, 0]])
    found, step = optimum(steep, 0.3), 1e-5
    assert found.bounds == ("high", "low", None)
    low = optimum(steep, 0.3, low=(0.5, ROOT + step, ROOT)).accuracy
    slope = (low - found.accuracy) / step
    assert slope == pytest.approx(found.bound_multipliers[1], rel=1e-3) and slope < 0
    shorter = dataclasses.replace(steep, high=(1 - step, 1, 1))
    slope = (found.accuracy - optimum(shorter, 0.3).accuracy) / step
    assert slope == pytest.approx(found.bound_multipliers[0], rel=1e-3) and slope > 0


@pytest.mark.filterwarnings("ignore:delta_grad")
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8])
def test_trust_constr_finds_the_same(keep):
    map = build_map([[0.012, 0.02, 0.02], [0.01, 0.02, 0.03], [0.02, 0.01, 0.02]])
    found = optimum(map, keep)
    other = minimize(
        lambda x: -map.predict(*x),
        equal_split(keep),
        jac=lambda x: -np.array(map.gradient(*x)),
        method="trust-constr",
        bounds=list(zip(LOW, (1, 1, 1), strict=True)),
        constraints=NonlinearConstraint(lambda x: FORMULA(*x), 0, keep),
        options={"gtol": 1e-10, "xtol": 1e-12, "barrier_tol": 1e-10, "maxiter": 500},
    )
    assert found.accuracy == pytest.approx(-other.fun, abs=1e-6)
    assert found.point == pytest.approx(other.x, abs=1e-3)


# Depth hurts at once and then no more: two ways to spend half the cost.
TWO = [[0.032, -0.03, 0.01], [0.01, 0.012, 0], [0.01, 0.012, 0]]


def test_inferior_points_that_meet_the_conditions_are_listed():
    map = build_map(TWO)
    found = optimum(map, 0.5)
    assert found.bounds[0] == "low" and found.point == pytest.approx((0.5, 1, 1))
    assert len(found.others) == 1
    other = found.others[0]
    assert other.d == 1 and other.accuracy < found.accuracy - 0.1
    assert other.w == pytest.approx(other.r, abs=1e-6)
    again = check_kkt(map, other, 0.5)
    assert again.kkt_residual < 1e-6 and again.bounds == ("high", None, None)
    pinned = optimum(map, 0.5, low=(1, ROOT, ROOT))
    assert pinned.accuracy == pytest.approx(other.accuracy, rel=1e-12)
    assert optimum(map, 0.5, starts=1).others == ()


def test_a_cubic_that_is_not_monotone_leaves_budget_unused_and_says_so():
    # H = 1 + 0.02 u - 0.04 u^2 has its peak of 1.0025 at u = 1/4.
    map = build_map([[-0.02, 0.04], [-0.02, 0.04], [-0.02, 0.04]])
    found = optimum(map, 0.9)
    peak = [1 - (1 - low) / 4 for low in LOW]
    assert found.point == pytest.approx(peak, abs=1e-6)
    assert found.accuracy == pytest.approx(93 * 1.0025**3, rel=1e-12)
    assert found.cost == pytest.approx(FORMULA(*peak), rel=1e-6)
    assert found.unused == pytest.approx(0.9 - FORMULA(*peak), rel=1e-5)
    assert found.multiplier == found.elasticity == 0 and found.kkt_residual < 1e-6
    tight = optimum(map, 0.5)
    assert tight.unused == 0 and tight.multiplier > 0
    assert optimum(map, 1.0).point == pytest.approx(peak, abs=1e-6)


def test_the_ends_of_the_budget():
    map = build_map(SMOOTH)
    whole = optimum(map, 1.0)
    assert whole.point == (1, 1, 1) and whole.accuracy == 93 and whole.cost == 1
    assert whole.bounds == ("high",) * 3 and whole.kkt_residual == 0
    step = 1e-6  # no dimension can grow: what a little less would cost
    less = (93 - optimum(map, 1 - step).accuracy) / step
    assert whole.multiplier == pytest.approx(less, rel=1e-3)
    least = FORMULA(*LOW)
    found = optimum(map, least)
    assert found.point == pytest.approx(LOW, rel=1e-9) and found.bounds == ("low",) * 3
    more = (optimum(map, least + 1e-7).accuracy - found.accuracy) / 1e-7
    assert found.multiplier == pytest.approx(more, rel=1e-2)
    with pytest.raises(ValueError, match=r"0\.12 is out of reach.* nearest .* 0\.125"):
        optimum(map, 0.12)


def test_at_a_corner_the_multiplier_is_what_more_budget_buys():
    found, step = optimum(build_map(TWO), 0.5), 1e-6
    more = optimum(build_map(TWO), 0.5 + step).accuracy - found.accuracy
    assert found.bounds == ("low", "high", "high")
    assert found.multiplier == pytest.approx(more / step, rel=1e-3)


@pytest.mark.parametrize("low", [(0.2, 0.9, 0.3), (0.9, 0.4, 0.6), (0.45, 0.97, 0.98)])
@pytest.mark.parametrize("keep", [0.45, 0.6, 0.97])
def test_boxes_whose_corners_lie_off_the_budget(low, keep):
    map = build_map(SMOOTH, low)
    found = optimum(map, keep)
    grid = np.meshgrid(*[np.linspace(x, 1, 61) for x in low], indexing="ij")
    feasible = np.where(FORMULA(*grid) <= keep, map.predict(*grid), -np.inf)
    assert found.accuracy >= feasible.max() - 1e-9 and found.kkt_residual < 1e-6
    assert map.covers(*found.point) and found.cost == pytest.approx(keep, rel=1e-9)


def test_data_that_stop_short_of_the_unpruned_network():
    map = dataclasses.replace(build_map(SMOOTH), high=(0.9, 0.95, 1.0))
    found = optimum(map, 0.95)
    assert found.point == pytest.approx((0.9, 0.95, 1)) and found.kkt_residual == 0
    assert found.unused == pytest.approx(0.95 - 0.9 * 0.95**2) and not found.multiplier
    assert max(optimum(map, 0.5).d, optimum(map, 0.5).brute.d) <= 0.9


def test_a_dimension_that_costs_nothing_stays_whole():
    found = optimum(build_map(SMOOTH), 0.5, PowerLaw((1, 2, 0)))
    assert (
        found.r == 1 and found.bounds[2] == "high" and found.elasticities[2] == np.inf
    )
    assert found.elasticities[:2] == pytest.approx([found.elasticity] * 2, abs=1e-6)
    d, w, r, accuracy = trace_budget(build_map(SMOOTH), 0.5, PowerLaw((1, 2, 0)))
    inside = ~np.isnan(accuracy)
    np.testing.assert_allclose((d * w**2)[inside], 0.5, rtol=1e-12)
    assert accuracy[inside].max() == pytest.approx(found.accuracy, abs=1e-4)
    assert np.ptp(r) > 0.2 and np.isnan(w[~inside]).all()


def test_a_map_without_slope_has_no_price():
    found = optimum(build_map([[0.0]] * 3), 0.5)
    assert found.accuracy == 93 and found.multiplier == 0 and found.kkt_residual == 0
    assert str(found.multiplier) == "0.0"  # not -0.0


def test_conditions_at_points_that_are_no_optimum():
    map = build_map(SMOOTH)
    best = optimum(map, 0.5)
    assert check_kkt(map, best.point, 0.5).kkt_residual == best.kkt_residual
    off = check_kkt(map, (0.5, 1, 1), 0.5)
    assert off.kkt_residual > 0.01 and off.bounds == ("low", "high", "high")
    over = check_kkt(map, (1, 1, 1), 0.5)
    assert over.kkt_residual >= np.log(2)
    idle = check_kkt(map, (0.8, 0.8, 0.8), 0.5)
    assert idle.multiplier == 0 and idle.kkt_residual > 0.01
    outside = check_kkt(map, (0.45, 0.999, 0.999), 0.5)
    assert outside.kkt_residual > np.log(0.5 / 0.45) - 1e-9


@pytest.mark.parametrize("cost", [FORMULA, measured])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_the_surface_is_the_budget_inside_the_box(cost, keep):
    map = build_map(SMOOTH)
    d, w, r, accuracy = trace_budget(map, keep, cost, num=60)
    inside = ~np.isnan(accuracy)
    assert d.shape == accuracy.shape == (60, 60) and 0.3 < inside.mean()
    np.testing.assert_array_equal(np.isnan(r), ~inside)
    np.testing.assert_allclose(cost(d[inside], w[inside], r[inside]), keep, rtol=1e-8)
    assert map.covers(d[inside], w[inside], r[inside]).all()
    values = map.predict(d[inside], w[inside], r[inside])
    np.testing.assert_array_equal(accuracy[inside], values)
    assert (np.diff(d, axis=0) > 0).all() and (np.diff(w, axis=1) > 0).all()
    whole, least = (cost(d[~inside], w[~inside], r) for r in (1, ROOT))
    assert ((whole < keep * (1 + 1e-9)) | (least > keep * (1 - 1e-9))).all()
    best = optimum(map, keep, cost).accuracy
    assert best - 0.02 < accuracy[inside].max() <= best + 1e-9


# -- measured costs --------------------------------------------------------------------


def draw_measured(rng, low):
    """Monotone costs with kinks of both kinds, over a box a little wider than `low`."""
    axes, total = [], 0.0
    for m, x in enumerate(low):
        nodes = np.r_[x - 0.01, np.sort(rng.uniform(x, 1, 3)), 1]
        slopes = np.array(FORMULA.exponents)[m] * rng.uniform(0.3, 2, len(nodes) - 1)
        logs = np.r_[0, np.cumsum(slopes * np.diff(np.log(nodes)))]
        shape = [1, 1, 1]
        shape[m] = -1
        total = total + (logs - logs[-1]).reshape(shape)
        axes.append(nodes)
    table = pd.DataFrame(list(product(*axes)), columns=["d", "w", "r"])
    return Measured(table.assign(share=np.exp(total).ravel())), axes


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_of_a_kinked_cost(seed):
    rng = np.random.default_rng(seed)
    cost, axes = draw_measured(rng, LOW)
    map = build_map(rng.uniform(0, 0.04, (3, 3)))
    found = optimum(map, 0.5, cost)
    assert found.kkt_residual < 1e-6 and found.cost == pytest.approx(0.5, rel=1e-9)
    grid = [
        np.unique(np.r_[np.geomspace(low, 1, 41), nodes[nodes > low]])
        for low, nodes in zip(LOW, axes, strict=True)
    ]
    grid = np.meshgrid(*grid, indexing="ij")
    feasible = np.where(cost(*grid) <= 0.5, map.predict(*grid), -np.inf)
    assert feasible.max() - 1e-9 <= found.accuracy <= feasible.max() + 1


@pytest.mark.parametrize(
    "start", [LOW, (0.5, 1, 0.8), (1, ROOT, 0.9), (0.9, 0.75, 0.8)]
)
def test_a_climb_crosses_the_cells_of_a_table(start):
    map, keep = build_map(SMOOTH), 0.5
    box = module.find_box(map, keep, measured)
    point = module.Point(*start, map.predict(*start))
    found = module._climb(map, point, keep, measured, box)
    assert check_kkt(map, found, keep, measured).kkt_residual < 1e-6
    best = optimum(map, keep, measured)
    assert found.accuracy == pytest.approx(best.accuracy, rel=1e-10)


def test_an_optimum_that_sticks_to_a_kink():
    # Below r = 0.9 the cost hardly falls, above it it rises steeply: stay there.
    def cost(d, w, r):
        return d * w**2 * np.where(r < 0.9, 0.9**4 * (r / 0.9) ** 0.2, r**4)

    table = build_table([0.4, 1], [0.6, 1], [0.6, 0.9, 1], cost)
    map, kinked = build_map(SMOOTH), Measured(table)
    found = optimum(map, 0.5, kinked)
    assert found.r == pytest.approx(0.9, rel=1e-7) and found.kkt_residual < 1e-6
    below, above = local_exponents(kinked, *found.point)[:, 2]
    gain = found.r * map.gradient(*found.point)[2] / found.accuracy
    assert below * found.elasticity < gain < above * found.elasticity
    assert found.bounds[2] is None and found.elasticities[:2] == pytest.approx(
        [found.elasticity] * 2, abs=1e-6
    )
    moved = check_kkt(map, (found.d, found.w, found.r * 0.99), 0.5, kinked)
    assert moved.kkt_residual > 1e-3


def test_the_lattice_of_a_real_network():
    space = Space(models.build("resnet20"), (3, 32, 32))
    table = space.lattice(models.build("resnet20"))
    cost, share = Measured(table), table.macs / table.macs.max()
    np.testing.assert_allclose(cost(table.d, table.w, table.r), share, rtol=1e-12)
    assert fit_exponents(table).exponents == pytest.approx((1.05, 1.98, 2), abs=0.06)
    found = optimum(build_map(SMOOTH), 0.5, cost)
    assert found.cost == pytest.approx(0.5, rel=1e-9) and found.kkt_residual < 1e-6
    ranked = rank_lattice(
        table[(table.w > 0.7) & (table.r > 0.7)], build_map(SMOOTH), 0.5
    )
    assert ranked.iloc[0].predicted < found.accuracy + 1e-9
    assert ((0.48 <= ranked.share) & (ranked.share <= 0.5)).all()


# -- what an optimum is worth ----------------------------------------------------------


def test_bootstrapped_optima():
    rng = np.random.default_rng(0)
    maps = [build_map(np.abs(SMOOTH + rng.normal(0, 0.02, (3, 3)))) for _ in range(8)]
    maps.append(build_map(TWO))
    table = bootstrap_optimum(iter(maps), 0.5)
    ends = [f"{name}_{end}" for name in "dwr" for end in ("low", "high")]
    assert list(table.columns) == ["d", "w", "r", "accuracy", "cost", *ends]
    assert len(table) == 9 and all(table[end].dtype == bool for end in ends)
    np.testing.assert_allclose(table.cost, 0.5)
    for (_, row), map in zip(table.iterrows(), maps, strict=True):
        best = optimum(map, 0.5)
        assert row.accuracy == pytest.approx(best.accuracy, rel=1e-10)
    last = table.iloc[-1]
    assert last.d_low and last.w_high and not last.d_high and not last.w_low
    lost = regret(build_map(SMOOTH), table, 0.5)
    assert lost.shape == (9,) and (lost > -1e-9).all() and lost[-1] > 0.1
    assert lost[-1] == pytest.approx(regret(build_map(SMOOTH), (0.5, 1, 1), 0.5))


def test_regret_is_what_a_wrong_point_loses():
    map = build_map(SMOOTH)
    best = optimum(map, 0.5)
    assert isinstance(best, Optimum) and regret(map, best, 0.5) == pytest.approx(0)
    point = equal_split(0.5)
    lost = best.accuracy - map.predict(*point)
    assert regret(map, point, 0.5) == pytest.approx(lost) and lost > 0
    assert regret(map, best.brute, 0.5) == pytest.approx(
        best.accuracy - best.brute.accuracy, abs=1e-9
    )


def test_networks_that_exist_are_ranked_within_the_true_budget():
    sides = np.array([16, 20, 24, 28, 32]) / 32
    table = build_table(np.arange(14, 28) / 27, np.arange(11, 17) / 16, sides, FORMULA)
    table["blocks"] = (27 * table.d).round().astype(int)
    table = table[table.r > 0.7].sample(frac=1, random_state=1)
    map = build_map(SMOOTH, low=(0.5, 0.6, 0.7))
    found = rank_lattice(table, map, 0.5)
    shares = table.macs / 1e6
    wanted = table[(shares <= 0.5) & (shares >= 0.48)]
    assert set(found.index) == set(wanted.index) and 3 < len(found) < len(table)
    assert (np.diff(found.predicted) <= 0).all() and found.covered.all()
    np.testing.assert_allclose(found.predicted, map.predict(found.d, found.w, found.r))
    pd.testing.assert_frame_equal(found[table.columns], table.loc[found.index])
    assert list(found.columns) == [*table.columns, "share", "predicted", "covered"]
    wider = rank_lattice(table, map, 0.5, tolerance=0.1)
    assert len(wider) > len(found) and wider.share.min() >= 0.4
    assert rank_lattice(table, map, 1.0, tolerance=0).index.tolist() == [
        table.macs.idxmax()
    ]


def test_a_share_column_goes_before_macs_and_ties_go_to_the_cheaper():
    rows = {"d": [0.9, 0.9], "w": [1.0, 1], "r": [0.8, 0.8], "macs": [5.0, 1]}
    table = pd.DataFrame(rows | {"share": [0.5, 0.49]})
    found = rank_lattice(table, build_map(SMOOTH), 0.5)
    assert found.share.tolist() == [0.49, 0.5]


def test_networks_outside_the_data_are_marked():
    table = tabulate([(0.4, 1, 1), (0.6, 0.9, 1), (1, 1, 1)], FORMULA)
    with pytest.warns(UserWarning, match="1 of 2 networks lie outside"):
        found = rank_lattice(table, build_map(SMOOTH), 0.5, tolerance=0.2)
    assert found.covered.tolist() == [bool(d > 0.5) for d in found.d]


def test_the_floors_are_also_found_here():
    assert module.single_dimension is single_dimension
    assert module.equal_split is equal_split
    assert module.inverse_compound is inverse_compound


# -- what is refused -------------------------------------------------------------------

table = measured.table
smooth = build_map(SMOOTH)
wide = table.assign(d=table.d * 2, share=table.macs / 1e6 / cost_linear(0.5, 1, 1))
lone = table.assign(r=1.0).drop_duplicates(["d", "w", "r"])
flat = build_table([0.5, 1], [0.5, 1], [0.5, 1], lambda d, w, r: d * w**2 + 0 * r)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLaw((1, 2)), "three finite numbers >= 0"),
        (lambda: PowerLaw((1, 2, -1)), r">= 0 .* got \(1, 2, -1\)"),
        (lambda: PowerLaw((0, 0, 0)), "not all zero"),
        (lambda: PowerLaw((1, np.nan, 2)), "finite"),
        (lambda: FORMULA(0.5, 0, 1), "must be > 0, got 0"),
        (lambda: FORMULA(np.array([1, np.nan]), 1, 1), "must be > 0, got nan"),
        (lambda: FORMULA.solve(0.5, d=1), r"expected two of .* got \['d'\]"),
        (lambda: FORMULA.solve(0.5, d=1, x=1), "expected two of"),
        (lambda: FORMULA.solve(0.5, d=1, w=1, x=1), "expected two of"),
        (lambda: FORMULA.solve(-0.5, d=1, w=1), "share of the cost must be > 0"),
        (lambda: FORMULA.solve(0.5, d=-1, w=1), "must be > 0, got -1"),
        (lambda: fit_exponents(tabulate(AXES[:1] + AXES[5:], FORMULA)), "1 points bes"),
        (lambda: fit_exponents(tabulate(AXES[:4] + AXES[5:], FORMULA)),
         "resolution does not vary; measure"),
        (lambda: fit_exponents(tabulate(AXES[2:], FORMULA)), "depth does not vary"),
        (lambda: fit_exponents(tabulate(AXES[:5], FORMULA)), "no row has d = w = r"),
        (lambda: fit_exponents(tabulate(AXES, lambda d, w, r: d / w * r)), "-1"),
        (lambda: fit_exponents({"d": [1], "w": [1]}), r"\['r'\] not among \['d', 'w'"),
        (lambda: fit_exponents(tabulate(AXES, FORMULA).drop(columns="macs")),
         r"\['macs'\] not among"),
        (lambda: fit_exponents(tabulate(AXES, FORMULA).assign(share=[2.0] * 6)),
         "share is 2 at d = w = r = 1"),
        (lambda: fit_exponents(tabulate(AXES, FORMULA, scale=-1)),
         r"\['macs'\]: expected finite numbers > 0, got \[-0.5\] in row 0 \(6 such"),
        (lambda: Measured(table[1:]), "9 x 7 x 3 d, w, r: 1 are missing, 0 doubled"),
        (lambda: Measured(pd.concat([table, table[:2]])), "0 are missing, 2 doubled"),
        (lambda: Measured(lone), r"r takes the values \(1\); expected two or more"),
        (lambda: Measured(table[table.w < 1].assign(share=0.5)), "w takes .* last of"),
        (lambda: Measured(wide), "d takes the value"),
        (lambda: Measured(flat), "does not grow with r everywhere"),
        (lambda: measured(0.1, 1, 1), r"known from d, w, r = \(0.2, 0.4, 0.5\) to 1"),
        (lambda: measured(0.5, [0.5, 1.01], 1), r"got \(0.5, 1.01, 1\): measure"),
        (lambda: measured.solve(0.5, d=0.1, w=1), "measure there too"),
        (lambda: single_dimension(0), r"keep: expected .* in \(0, 1\], got 0"),
        (lambda: equal_split(1.1), r"in \(0, 1\], got 1.1"),
        (lambda: inverse_compound(np.nan), "got nan"),
        (lambda: single_dimension(0.25, measured),
         r"depth alone does not reach 0.25 .* nearest measured is 0.28, at \(0.2, 1,"),
        (lambda: equal_split(0.01, measured), r"less than the table's least .*0.4, 0"),
        (lambda: inverse_compound(0.01, measured), "less than the table's least"),
        (lambda: inverse_compound(0.25, measured, beta=1, gamma=1), "table's least"),
        (lambda: inverse_compound(0.5, alpha=0.9), "expected numbers >= 1"),
        (lambda: inverse_compound(0.5, alpha=1, beta=1, gamma=1), "exceeds 1"),
        (lambda: inverse_compound(0.5, PowerLaw((1, 2, 0)), alpha=1, beta=1), "exceed"),
        (lambda: inverse_compound(0.5, alpha=np.inf), "got .*inf"),
        (lambda: optimum(smooth, 0), r"in \(0, 1\], got 0"),
        (lambda: optimum(smooth, 50), r"in \(0, 1\], got 50"),
        (lambda: optimum(smooth, 0.5, num=1), "num, starts: expected >= 2 and >= 1"),
        (lambda: optimum(smooth, 0.5, starts=0), "got 201, 0"),
        (lambda: optimum(smooth, 0.1), r"nearest feasible is 0.125.*\[0.5, 0.707"),
        (lambda: optimum(smooth, 0.5, low=(0.4, 0.8, 0.8)), r"low: .*got \[0.4, 0.8"),
        (lambda: optimum(smooth, 0.5, low=(0.8, 1.2, 0.8)), "low: expected three"),
        (lambda: optimum(smooth, 0.5, low=(0.8, 0.8)), "low: expected three"),
        (lambda: optimum(smooth, 0.5, low=(0.8, np.nan, 0.8)), "low: expected three"),
        (lambda: optimum(build_map(SMOOTH, (0.1, 0.5, 0.5)), 0.5, measured),
         r"box begins at .*\[0.1, 0.5, 0.5\], the table of costs"),
        (lambda: trace_budget(smooth, 0.1), "out of reach"),
        (lambda: check_kkt(smooth, (0.5, 1, 1), 2), "got 2"),
        (lambda: bootstrap_optimum([smooth], 0.1), "out of reach"),
        (lambda: regret(smooth, (0.4, 1, 1), 0.5), "expected one in the map's box"),
        (lambda: regret(smooth, (0.9, 1, 1), 0.5), "0.5 at most; the dearest costs 0."),
        (lambda: regret(smooth, pd.DataFrame({"d": [1]}), 0.5), r"\['w', 'r'\] not am"),
        (lambda: rank_lattice(table, smooth, 1.5), "got 1.5"),
        (lambda: rank_lattice(table, smooth, 0.5, tolerance=-1), "tolerance: expected"),
        (lambda: rank_lattice(table, smooth, 0.5, tolerance=np.nan), "got nan"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 0.6, tolerance=0.01),
         "no network costs 0.59 to 0.6; the nearest share below is 0.5, above 0.8:"),
        (lambda: rank_lattice(tabulate(AXES, FORMULA), smooth, 0.1), "below is none"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
