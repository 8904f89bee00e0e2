"""Which points to measure: chains of (d, w, r), each pruned from the one before.

A design is a list of chains. A chain starts at the unpruned network; each of its points
is pruned from the network that the point before it left, and fine-tuned.
"""

from collections.abc import Sequence
from itertools import product

from lib.map3d.costs import check_keep
from lib.messages import check_choice
from lib.settings import ABOVE_ONE, ABOVE_ZERO, check_float, check_int

Point = tuple[float, ...]  # (d, w, r)
Chain = list[Point]
DESIGNS = ("axis", "grid")
WHOLE: Point = (1.0, 1.0, 1.0)


def find_floors(keep: float, exponents: Sequence[float] = (1.0, 2.0, 2.0)) -> Point:
    """The share at which one dimension alone meets the budget, for d, w and r.

    `keep`: share of the cost that stays, in (0, 1]; the cost is d^a w^b r^c with
    `exponents` (a, b, c), all positive. Half of the paper's: (.5, .707, .707).
    ValueError for other values.
    """
    keep = check_keep(keep)
    if len(exponents) != 3:
        raise ValueError(f"exponents must be three positive numbers, got {exponents}")
    return tuple(
        keep ** (1 / check_float("exponents", e, ABOVE_ZERO)) for e in exponents
    )


def make_design(
    name: str,
    floors: Point,
    *,
    rounds: int = 4,
    levels: int = 3,
    interior: bool = False,
) -> list[Chain]:
    """A design by name, with the unpruned network as its first chain.

    "axis", the paper's (Wang et al. 2021, algorithm 1, as far as readers' notes tell):
    a chain per dimension, in `rounds` equal steps to its floor; tells the dimensions'
    own curves, and nothing about how they act together. "grid": all combinations of
    `levels` equal steps from 1 to the floors, each pruned in one go.
    `interior` adds four points off the axes, pruned in one go, that hold the budget
    together: two dimensions take half of the log cost each, then all three a third.
    """
    check_choice("design", name, DESIGNS)
    steps = check_int("rounds", rounds, 1)
    if name == "grid":
        steps = check_int("levels", levels, 2) - 1
    floors = tuple(check_float("floors", x, ABOVE_ZERO, ABOVE_ONE) for x in floors)
    ladders = [[1 - (1 - x) * (i / steps) for i in range(steps + 1)] for x in floors]
    chains = [[point] for point in product(*ladders)]
    if name == "axis":
        axes = [[(*WHOLE[:m], x, *WHOLE[m + 1 :]) for x in ladders[m][1:]]
                for m in range(3)]  # fmt: skip
        chains = [[WHOLE], *axes]
    return chains + (_list_interior(floors) if interior else [])


def _list_interior(floors: Point) -> list[Chain]:
    """Points off the axes: those on them cannot tell a product from a sum."""
    pruned = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    return [
        [tuple(f ** (on / sum(row)) for f, on in zip(floors, row, strict=True))]
        for row in pruned
    ]
