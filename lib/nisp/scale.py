"""Scores with a power of two beside them, and the one scale they are returned on.

In |W| scores grow by the fan-in of every layer: by 1e71 through ResNet-50. A power of
two taken out after a step changes no digit and no ratio.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.graph.trace import BATCH

LARGEST = 128  # powers of two a step's scores may leave 1 by before they are rescaled
HIGHEST, LOWEST = 1000, -900  # powers of two that returned scores stay between


@dataclass(frozen=True)
class Scores:
    """Scores `values * 2**power`; powers of two rescale without rounding."""

    values: Tensor
    power: int = 0

    def at(self, power: int) -> Tensor:
        """The values under another power; in two steps, since 2**1024 overflows."""
        half, rest = (self.power - power) // 2, -(-(self.power - power) // 2)
        return self.values * 2.0**half * 2.0**rest if half or rest else self.values

    def __add__(self, other: "Scores") -> "Scores":
        power = max(self.power, other.power)
        a, b = self.at(power), other.at(power)
        if a.shape != b.shape:
            a, b = (x.expand(torch.broadcast_shapes(a.shape, b.shape)) for x in (a, b))
        return Scores(a + b, power)


def rescale(values: Tensor, power: int, where: str) -> Scores:
    """Take a power of two out of scores that have become very large or very small."""
    top = float(values.amax())
    if not math.isfinite(top):
        raise ValueError(f"{where}: its parameters give scores that are not finite")
    shift = math.frexp(top)[1]
    if abs(shift) <= LARGEST or top == 0:
        return Scores(values, power)
    return Scores(Scores(values, power).at(power + shift), power + shift)


def fold(values: Tensor) -> Tensor:
    """One image's scores where they are the same for each image of the traced batch."""
    if values.shape[0] == BATCH and torch.equal(values[0], values[1]):
        return values[:1]
    return values


def add_up(rows: list[Scores]) -> Scores:
    """The sum of scores under different powers."""
    return sum(rows[1:], start=rows[0])


def common_power(rows: Iterable[Scores]) -> int:
    """The power of two to divide all returned scores by: 0 wherever float64 allows.

    Raises `ValueError` where no power keeps the largest and the smallest layer.
    """
    tops = [(s.power, float(s.values.max())) for s in rows]
    tops = [power + math.frexp(top)[1] for power, top in tops if top > 0]
    if not tops:  # nothing is active
        return 0
    least, most = max(tops) - HIGHEST, min(tops) - LOWEST
    if least > most:
        raise ValueError(
            "the scores of the first and the last layers are too far apart for one "
            "scale in float64; ask for scale='layer'"
        )
    return min(max(0, least), most)


def sum_to_one(s: Scores, total: Scores) -> Tensor:
    """A layer's scores over the sum of its channels' scores."""
    return s.values / (total.at(s.power).sum() or 1)
