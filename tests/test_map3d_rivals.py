"""Rivals of a joint pruning: which network each strategy ends at, and refusals."""

import itertools

import numpy as np
import pandas as pd
import pytest

from lib import map3d, models


@pytest.fixture(scope="module")
def lattice() -> pd.DataFrame:
    """A made-up space whose cost is d w^2 r^2 to the digit."""
    d = [k / 9 for k in range(3, 10)]
    w = [k / 16 for k in range(8, 17)]
    r = [k / 8 for k in range(4, 9)]
    table = pd.DataFrame(list(itertools.product(d, w, r)), columns=["d", "w", "r"])
    table["share"] = table["d"] * table["w"] ** 2 * table["r"] ** 2
    return table.sample(frac=1, random_state=0)


def test_each_strategy_is_there_once_and_is_a_network_of_the_lattice(lattice):
    rivals = map3d.pick_rivals(lattice, 0.5)
    assert tuple(rivals.index) == map3d.RIVALS
    known = set(map(tuple, lattice[["d", "w", "r", "share"]].to_numpy()))
    assert all(
        tuple(row) in known for row in rivals[["d", "w", "r", "share"]].to_numpy()
    )


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7])
def test_one_dimension_alone_comes_nearest_to_the_budget(lattice, keep):
    rivals = map3d.pick_rivals(lattice, keep)
    for name, axis, power in (
        ("depth", "d", 1),
        ("width", "w", 2),
        ("resolution", "r", 2),
    ):
        row = rivals.loc[name]
        assert all(row[x] == 1 for x in "dwr" if x != axis)
        away = np.abs(lattice[axis].unique() ** power - keep)
        assert abs(row["share"] - keep) == pytest.approx(away.min())


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.7])
def test_rounded_strategies_stay_within_the_budget(lattice, keep):
    rivals = map3d.pick_rivals(lattice, keep).loc[["equal", "compound"]]
    assert rivals["share"].between(keep - 0.02, keep + 1e-9).all()


def test_the_equal_split_is_the_nearest_network_in_logs(lattice):
    target = np.log([0.5 ** (1 / 3), 0.5 ** (1 / 6), 0.5 ** (1 / 6)])
    near = lattice[lattice["share"].between(0.48, 0.5)]
    away = ((np.log(near[["d", "w", "r"]]) - target) ** 2).sum(axis=1)
    chosen = map3d.pick_rivals(lattice, 0.5, cost=map3d.FORMULA).loc["equal"]
    assert chosen[["d", "w", "r"]].tolist() == near.loc[
        away.idxmin(), ["d", "w", "r"]].tolist()  # fmt: skip


def test_a_budget_that_nothing_meets_is_refused_with_the_nearest(lattice):
    coarse = lattice[lattice["share"] > 0.6]
    with pytest.raises(ValueError, match="depth alone cannot reach"):
        map3d.pick_rivals(coarse, 0.5)
    gaps = lattice[~lattice["share"].between(0.45, 0.52)]
    with pytest.raises(ValueError, match=r"\[0.48, 0.5\]; the nearest: 0\.\d{4}"):
        map3d.pick_rivals(gaps, 0.5)


def test_blocks_leave_evenly_over_the_stages():
    model = models.build("densenet40")
    order = map3d.Space(model, (3, 32, 32)).spread_removal()
    assert order[:4] == ["block3.11", "block2.11", "block1.11", "block3.10"]
    assert len(order) == len(set(order)) == 33
    for end in range(3, 34, 3):
        stages = [name.split(".")[0] for name in order[:end]]
        assert stages.count("block1") == stages.count("block2") == end // 3
