"""The plan itself: plain data on what a pruned network keeps."""

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import paths
from lib.settings import check_int

LARGEST = 16_384  # pixels; of more, the mere check that a network runs takes minutes


@dataclass
class Plan:
    """Kept output channels per layer, and more.

    `keep[layer]`: sorted indices of the output channels that stay; a layer that is not
    named stays whole. `scatter`: layers whose kept outputs are written back into the
    full-width residual stream. `drop`: blocks replaced by the identity. `resolution`:
    side of the square input in pixels, None for the native one.
    """

    keep: dict[str, list[int]] = field(default_factory=dict)
    scatter: set[str] = field(default_factory=set)
    drop: list[str] = field(default_factory=list)
    resolution: int | None = None

    def __post_init__(self) -> None:
        self.keep = {name: _read_indices(name, k) for name, k in self.keep.items()}
        self.scatter = set(_read_names("scatter", self.scatter))
        self.drop = _read_names("drop", self.drop)
        if self.resolution is not None:
            side = check_int("plan: resolution", self.resolution, 1, LARGEST + 1)
            self.resolution = side
        for name in self.scatter - self.keep.keys():
            raise ValueError(f"plan: '{name}' is to be scattered but keeps everything")

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, atomically."""
        return paths.write_json(
            path,
            {
                "keep": self.keep,
                "scatter": sorted(self.scatter),
                "drop": self.drop,
                "resolution": self.resolution,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan; a file that is not one is refused by name."""
        raw = paths.read_json(path)
        known = {"keep", "scatter", "drop", "resolution"}
        if not isinstance(raw, dict) or not isinstance(raw.get("keep"), dict):
            raise ValueError(f"{path}: not a plan, expected an object with 'keep'")
        if extra := raw.keys() - known:
            raise ValueError(f"{path}: unknown plan entries {sorted(extra)}")
        try:
            return cls(**raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a plan ({error})") from None


def _read_indices(name: str, indices: Any) -> list[int]:
    """Channel indices as sorted plain integers; numpy's and torch's are welcome.

    A mask of True and False is refused: read as indices it would keep channels 0 and 1.
    """
    try:
        if isinstance(indices, str):
            raise TypeError
        found = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        if set(map(type, found)) <= {int}:
            return sorted(found)
        found = [i.item() if hasattr(i, "item") else i for i in found]
        if any(isinstance(i, bool) for i in found):
            raise ValueError(
                f"plan: '{name}' must keep a list of integers, got a mask of True and "
                "False; give the indices (`mask.nonzero().flatten()`)"
            )
        return sorted(operator.index(i) for i in found)
    except TypeError:
        raise ValueError(
            f"plan: '{name}' must keep a list of integers, got {indices!r}"
        ) from None


def _read_names(entry: str, names: Any) -> list[str]:
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"plan: '{entry}' must be a list of names, got {names!r}")
    return list(names)
