"""Which points to measure: chains of (d, w, r), each pruned from the one before.

A design is a list of chains. A chain starts at the unpruned network; each of its points
is pruned from the network that the point before it left, and fine-tuned.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float, float]
Chain = list[Point]
DESIGNS = ("axis", "interleaved", "both", "grid")
WHOLE: Point = (1.0, 1.0, 1.0)


def find_floors(keep: float, exponents: Sequence[float] = (1.0, 2.0, 2.0)) -> Point:
    """The share at which one dimension alone meets the budget, for d, w and r.

    `keep`: share of the cost that stays, in (0, 1]; the cost is d^a w^b r^c with
    `exponents` (a, b, c), all positive. Half of the paper's d w^2 r^2: (.5, .707,
    .707). ValueError for other values.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of cost that stays, in (0, 1], got {keep}")
    if len(exponents) != 3 or not all(0 < e < math.inf for e in exponents):
        raise ValueError(f"exponents must be three positive numbers, got {exponents}")
    d, w, r = (keep ** (1 / exponent) for exponent in exponents)
    return d, w, r


def design_axes(floors: Point, *, rounds: int = 4) -> list[Chain]:
    """The paper's design: one chain per dimension, in equal steps to its floor.

    3 rounds points and the unpruned one. Tells the three dimensions' own curves, and
    nothing about how they act together (Wang et al. 2021, algorithm 1, as far as
    readers' notes tell).
    """
    _check_rounds(rounds)
    chains = []
    for m in range(3):
        steps = [_step(floors[m], i / rounds) for i in range(1, rounds + 1)]
        chains.append([tuple(x if n == m else 1.0 for n in range(3)) for x in steps])
    return chains


def design_interleaved(floors: Point, *, rounds: int = 4) -> list[Chain]:
    """One chain that takes a step of depth, of width, of resolution, and again.

    As many points as the axes need, all on one staircase.
    """
    _check_rounds(rounds)
    here, chain = list(WHOLE), []
    for i in range(1, rounds + 1):
        for m in range(3):
            here[m] = _step(floors[m], i / rounds)
            chain.append(tuple(here))
    return [chain]


def design_interior(floors: Point) -> list[Chain]:
    """Points off the axes, pruned in one go: the four that hold a budget together.

    Two dimensions take half of the log cost each, then all three a third each.
    """
    parts = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    return [
        [tuple(f ** (on / sum(part)) for f, on in zip(floors, part, strict=True))]
        for part in parts
    ]


def design_grid(
    d: Sequence[float], w: Sequence[float], r: Sequence[float]
) -> list[Chain]:
    """All combinations of the levels, each pruned from the unpruned network at once."""
    return [[(x, y, z)] for x in d for y in w for z in r]


def make_design(
    name: str,
    floors: Point,
    *,
    rounds: int = 4,
    levels: int = 3,
    interior: bool = False,
) -> list[Chain]:
    """A design by name, with the unpruned network as its first chain.

    "axis", "interleaved", "both", or "grid" with `levels` equal steps from 1 to the
    floors, which contains the unpruned network itself.
    """
    if name not in DESIGNS:
        raise ValueError(f"design must be one of {DESIGNS}, got {name!r}")
    if name == "grid":
        if levels < 2:
            raise ValueError(f"a grid needs at least 2 levels, got {levels}")
        ladders = [[_step(f, i / (levels - 1)) for i in range(levels)] for f in floors]
        return design_grid(*ladders)
    chains: list[Chain] = [[WHOLE]]
    if name in ("axis", "both"):
        chains += design_axes(floors, rounds=rounds)
    if name in ("interleaved", "both"):
        chains += design_interleaved(floors, rounds=rounds)
    return chains + (design_interior(floors) if interior else [])


def _step(floor: float, part: float) -> float:
    """`part` of the way from 1 down to the floor."""
    return 1 - (1 - floor) * part


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
