"""Labelled images, in memory or streamed: checked, limited, split off for choices."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.data.pictures import scale_pixels
from lib.data.streaming import Stream
from lib.settings import ABOVE_ZERO, check_float, check_int


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labelled images of one size; treat the tensors as read-only.

    images: uint8 [N, H, W, C], C = 1 or 3: a tensor, or a `Stream` that decodes them
    from disk, with the same fields, methods and batches.
    labels: int64 [N], indices into `classes`, in memory in any case.
    mean, std: per channel, of pixels scaled to 0..1. pad: zero padding in pixels of
    the random crop; flip: whether a mirror image keeps its label.
    ValueError where dtypes, shapes or counts do not fit.
    """

    images: Any
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def __post_init__(self) -> None:
        check_tensors(self.name, self.images, self.labels)
        for what, low in (("mean", -math.inf), ("std", ABOVE_ZERO)):
            values = getattr(self, what)
            if not isinstance(values, (list, tuple)):
                raise ValueError(f"{self.name}: {what} must be a tuple, got {values!r}")
            name = f"{self.name}: {what}"
            plain = tuple(check_float(name, value, low) for value in values)
            object.__setattr__(self, what, plain)
        if not len(self.mean) == len(self.std) == self.images.shape[-1]:
            raise ValueError(f"{self.name}: mean and std need one value per channel")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = f"{len(self):,} images {list(self.shape)}"
        return f"ImageSet({self.name}: {size}, {len(self.classes)} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), as models take it."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> Tensor:
        """What tells its pictures from others: the pixels, or what a stream says."""
        return self.images.fingerprint() if self.streamed else self.images

    @property
    def streamed(self) -> bool:
        """Whether its images stay on disk."""
        return isinstance(self.images, Stream)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on `device`; no copy where it lies there already."""
        moved = self.images.to(device), self.labels.to(device)
        return replace(self, images=moved[0], labels=moved[1])

    def subset(self, indices: Any) -> "ImageSet":
        """The images at `indices` (integers or a mask [N]), copied in that order."""
        index = torch.as_tensor(indices, device=self.labels.device)
        if index.numel() == 0:
            index = index.long()
        if index.dtype.is_floating_point or index.dim() != 1:
            raise ValueError(f"{self.name}: indices must be a list of integers")
        index = index if index.dtype == torch.bool else index.long()
        return replace(self, images=self.images[index], labels=self.labels[index])

    def take(self, n: int, seed: int = 0) -> "ImageSet":
        """A stratified subset of `n` images, in the set's order, fixed by `seed`.

        Each class gets its share of `n`, rounded down or up. ValueError: `n` outside
        1..N.
        """
        n = check_int(f"{self.name}: the number of images", n, -math.inf)
        if not 1 <= n <= len(self):
            raise ValueError(f"{self.name}: cannot take {n} of {len(self)} images")
        # In whole numbers, the largest remainders rounded up: floats would let the
        # last bits decide which class gets one more.
        groups = shuffle_classes(self, seed)
        shares = np.array([n * len(group) for group in groups])
        counts = shares // len(self)
        first = np.argsort(-(shares % len(self)), kind="stable")
        counts[first[: n - counts.sum()]] += 1
        return self.subset(join_sorted(groups, counts))

    def scale(self, side: int) -> "ImageSet":
        """The set with images of `side` x `side` pixels, and so much in its name.

        The padding of crops goes along. The very set where there is nothing to do.
        """
        side = check_int(f"{self.name}: the side in pixels", side, 1)
        if self.shape[1:] == (side, side):
            return self
        streamed, pixels = self.streamed, self.images
        scaled = pixels.scale(side) if streamed else scale_pixels(pixels, side)
        pad = round(self.pad * side / self.shape[1])
        return replace(self, images=scaled, name=f"{self.name}-{side}px", pad=pad)


def split_validation(
    images: ImageSet, *, fraction: float = 0.1, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Split into (train, validation): disjoint, covering, stratified, fixed by `seed`.

    Each class gives `fraction` of its images, rounded, to validation; at least one
    image stays on either side. Both parts keep the set's order. ValueError: fraction
    outside (0, 1), a class with fewer than 2 images.
    """
    fraction = check_float(f"{images.name}: fraction", fraction, ABOVE_ZERO, 1.0)
    groups = shuffle_classes(images, seed)
    for name, group in zip(images.classes, groups, strict=True):
        if len(group) < 2:
            raise ValueError(
                f"{images.name}: class {name!r} has {len(group)} image(s), "
                "a validation split needs at least 2"
            )
    counts = [min(max(round(fraction * len(g)), 1), len(g) - 1) for g in groups]
    held = join_sorted(groups, counts)
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[held] = False
    return images.subset(kept), images.subset(held)


def check_tensors(where: Any, images: Any, labels: Tensor) -> None:
    """Refuse anything but uint8 [N, H, W, C], C = 1 or 3, with int64 labels [N]."""
    kind, shape = str(images.dtype).removeprefix("torch."), images.shape
    if kind != "uint8" or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        raise ValueError(
            f"{where}: images are {kind} {list(shape)}, expected uint8 [N, H, W, C] "
            "with C = 1 or 3"
        )
    if labels.dtype != torch.int64 or labels.shape != shape[:1]:
        raise ValueError(
            f"{where}: labels are {labels.dtype} {list(labels.shape)}, expected int64 "
            f"[{len(images)}]"
        )


def shuffle_classes(images: ImageSet, seed: int) -> list[Tensor]:
    """The indices of each class, shuffled by `seed`."""
    labels = images.labels.cpu()
    mix = torch.Generator().manual_seed(seed)
    groups = [torch.nonzero(labels == c)[:, 0] for c in range(len(images.classes))]
    return [group[torch.randperm(len(group), generator=mix)] for group in groups]


def join_sorted(groups: list[Tensor], counts: Iterable[int]) -> Tensor:
    """The first `counts[c]` indices of each group, sorted."""
    parts = [g[: int(n)] for g, n in zip(groups, counts, strict=True)]
    return torch.cat(parts).sort().values
