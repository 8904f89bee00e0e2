"""The list of steps, and what each of them tells: checks, times, blocks of networks.

A step is a function of a `Bench`; it gives back one `Found` or several. A check finds a
difference and its limit; a time has no limit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

STEPS: dict[str, tuple[str, Callable]] = {}  # name -> kind and function, in order


@dataclass(frozen=True)
class Bench:
    """Where the steps run. small: sizes for a quick look; bases: their folder."""

    device: str
    small: bool
    bases: Path
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Found:
    """One measured number: its name, value and unit, and the limit of a check."""

    what: str
    value: float
    unit: str = "difference"
    limit: float | None = None

    @property
    def fine(self) -> bool:
        """Whether the value keeps its limit; NaN does not."""
        return self.limit is None or self.value <= self.limit


class NotHere(Exception):
    """The step cannot run on this device or with these packages; says why."""


def step(kind: str) -> Callable:
    """Put a function into the list, named by its own name and its first line."""

    def enter(function: Callable[[Bench], Iterable[Found]]) -> Callable:
        STEPS[function.__name__] = kind, function
        return function

    return enter


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
