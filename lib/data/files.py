"""Sets of one's own on disk: npz files, folders of images, tar shards."""

import contextlib
import functools
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib.data.images import ImageSet, check_tensors
from lib.data.listing import (
    SYNSET,
    Files,
    is_image,
    list_flat,
    list_shards,
    list_tree,
)
from lib.data.pictures import BROKEN_IMAGE, Fit, describe_image, explain
from lib.data.streaming import Stream
from lib.settings import check_float

SPLITS = ("train", "test")
TREES = {"train": ("train",), "test": ("test", "val")}  # folders, by split
IMAGENET = SimpleNamespace(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
BROKEN_NPZ = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(KeyError, TypeError, ValueError, MemoryError),
)


@dataclass(frozen=True)
class Reading:
    """How folders of images and tar shards are read: see `data.load`."""

    size: int | None
    stream: bool | None
    transforms: Any
    broken: float


def read_own(
    folder: Path, split: str, how: Reading, *, like: ImageSet | None = None
) -> ImageSet:
    """Read a set of the user's own; without `like`, test has train read as well."""
    kinds = {
        "npz files": any(find_shards(folder, part) for part in SPLITS),
        "image folders": any((folder / d).is_dir() for d in sum(TREES.values(), ())),
        "tar shards": any(find_shards(folder, part, "tar") for part in SPLITS),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise ValueError(f"{folder}: holds both {' and '.join(found)}, keep one")
    read: Callable[..., ImageSet] = functools.partial(read_pictures, how=how)
    if found in ([], ["npz files"]):
        if how.stream:
            raise ValueError(f"{folder}: stream=True is for image folders and tars")
        read = read_shards
    if like is None and split == "test" and how.transforms is None:
        # Its images are let go of before those of test come.
        like = read(folder, "train").subset([])
    return read(folder, split, like=like)


def measure(
    folder: Path, images: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> ImageSet:
    """A train split with its own mean and population s.d. per channel.

    ValueError: a constant channel.
    """
    # From counts of the 256 values: exact, and no copy of the pixels in floats.
    channels = images.flatten(0, 2).T
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels])
    shares = counts.double() / channels.shape[1]
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    if not std.all():
        raise ValueError(f"{folder}: channel {int(std.argmin())} of train is constant")
    rest = tuple(mean.tolist()), tuple(std.tolist()), images.shape[1] // 8, True
    return ImageSet(images, labels, classes, folder.name, *rest)


# -- npz files -------------------------------------------------------------------------


def find_shards(folder: Path, split: str, kind: str = "npz") -> list[Path]:
    """The npz files (or tars) of one split, in name order."""
    names = TREES[split] if kind == "tar" else (split,)
    return sorted(path for name in names for path in folder.glob(f"{name}*.{kind}"))


def read_shards(folder: Path, split: str, *, like: ImageSet | None = None) -> ImageSet:
    """Join the npz files of a split.

    Without `like` the shape is the first file's and the classes are 0..max.
    """
    files = find_shards(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder}: no {split}*.npz or {split}/ folder in it")
    # before reading: a machine out of memory ends the process without a word
    hint = "; image folders and tar shards are streamed"
    check_memory(folder, sum(map(inflated_size, files)), hint)
    with ThreadPoolExecutor() as pool:  # inflating lets go of the GIL
        parts = list(pool.map(read_npz, files))
    shape = (parts[0][0] if like is None else like.images).shape[1:]
    for file, (images, labels) in zip(files, parts, strict=True):
        check_shape(file, images.shape[1:], shape)
        check_labels(file, labels, like)
    images, labels = parts[0]
    if len(parts) > 1:
        images, labels = map(torch.cat, zip(*parts, strict=True))
    if like is None:
        return measure(folder, images, labels, name_classes(folder, labels))
    return replace(like, name=folder.name, images=images, labels=labels)


def inflated_size(path: Path) -> int:
    """Bytes that an npz file inflates to, by its own word; 0 if it is none."""
    try:
        with zipfile.ZipFile(path) as file:
            return sum(part.file_size for part in file.infolist())
    except BROKEN_NPZ:
        return 0  # refused when it is read


def check_memory(where: Path, size: int, hint: str = "") -> None:
    """Refuse a split of `size` bytes that is larger than the machine's memory."""
    memory = memory_size()
    if size > memory:
        raise ValueError(
            f"{where}: {size / 1e9:,.1f} GB of images do not fit into "
            f"{memory / 1e9:,.1f} GB of memory{hint}"
        )


def memory_size() -> float:
    """Bytes of memory that the machine has; infinite where it cannot be asked."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has none
        return math.inf


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """One file's `images` and `labels`, checked for type, shape and count."""
    expected = "expected an npz with images uint8 [N, H, W, C] and labels int64 [N]"
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels, labels = file["images"], file["labels"]
        if labels.dtype.kind in "iu":
            labels = labels.astype(np.int64, copy=False)
        tensors = torch.from_numpy(pixels), torch.from_numpy(labels)
    except BROKEN_NPZ as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason}), {expected}") from None
    check_tensors(path, *tensors)
    if not len(labels):
        raise ValueError(f"{path}: holds no images")
    return tensors


def check_shape(where: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse images that do not have the [H, W, C] of the rest of their set."""
    if shape != expected:
        raise ValueError(
            f"{where}: images are {list(shape)} [H, W, C], the rest of the set is "
            f"{list(expected)}"
        )


def check_labels(where: Path, labels: Tensor, like: ImageSet | None) -> None:
    """Refuse labels that are no classes of the set."""
    low, top = int(labels.min()), int(labels.max())
    high = 2**31 if like is None else len(like.classes)
    if low < 0 or top >= high:
        raise ValueError(
            f"{where}: labels run from {low} to {top}, expected 0..{high - 1}"
        )


def name_classes(folder: Path, labels: Tensor) -> tuple[str, ...]:
    """Names "0".."max"; ValueError for a class without an image."""
    seen = labels.unique()
    gaps = torch.nonzero(seen != torch.arange(len(seen)))
    if len(gaps):
        raise ValueError(
            f"{folder}: no train image of class {int(gaps[0])}, but labels go up to "
            f"{seen[-1]}; every class 0..max needs one"
        )
    return tuple(str(label) for label in seen.tolist())


# -- folders of images and tar shards --------------------------------------------------


def read_pictures(
    folder: Path, split: str, how: Reading, *, like: ImageSet | None = None
) -> ImageSet:
    """Pictures of `<split>/<class>/*` or of `<split>*.tar`, in memory or streamed."""
    where, source, classes = list_pictures(folder, split, like)
    source.share = how.broken
    imagenet = all(SYNSET.fullmatch(name) for name in classes)
    fit = find_fit(where, source, how, imagenet=imagenet, like=like)
    labels = torch.from_numpy(source.labels.astype(np.int64))
    images = Stream(source, np.arange(len(source)), fit)
    bytes_needed = len(source) * math.prod(fit.shape)
    stream = how.stream
    if stream is None:
        stream = imagenet or bytes_needed > memory_limit()
    if stream:
        print(f"{where}: streamed from disk, {bytes_needed / 1e9:,.2f} GB of pixels")
    pixels: Any = images if stream else images.load()
    told = how.transforms or (IMAGENET if imagenet else None)
    if told is not None:
        # a random crop by area, which only a stream can make, takes the padding's place
        pad = 0 if stream and fit.area else fit.height // 8
        rest = told.mean, told.std, pad, True
        return ImageSet(pixels, labels, classes, folder.name, *rest)
    if like is None:
        some = np.linspace(0, len(labels) - 1, min(2000, len(labels))).astype(int)
        sample = (images[some].load(), labels[some]) if stream else (pixels, labels)
        like = measure(folder, *sample, classes)
    return replace(like, name=folder.name, images=pixels, labels=labels)


def list_pictures(
    folder: Path, split: str, like: ImageSet | None
) -> tuple[Path, Files, tuple[str, ...]]:
    """Where the pictures of a split lie, which they are, and their classes."""
    if shards := find_shards(folder, split, "tar"):
        source = list_shards(folder, shards)
        labels = torch.from_numpy(source.labels)
        check_labels(folder / f"{split}*.tar", labels, like)
        classes = name_classes(folder, labels) if like is None else like.classes
        return folder, source, classes
    where = next((p for name in TREES[split] if (p := folder / name).is_dir()), None)
    if where is None:
        raise FileNotFoundError(f"{folder / split}: no such folder, nor {split}*.tar")
    flat = not any(p.is_dir() for p in where.glob("[!.]*"))
    if flat and split == "test" and any(map(is_image, os.listdir(where))):
        return where, *list_flat(where, None if like is None else like.classes)
    source, classes = list_tree(where)
    if like is not None and classes != like.classes:
        differ = ", ".join(sorted(set(classes) ^ set(like.classes)))
        raise ValueError(f"{where}: its classes differ from those of train: {differ}")
    return where, source, classes


def find_fit(
    where: Path, source: Files, how: Reading, *, imagenet: bool, like: ImageSet | None
) -> Fit:
    """What all pictures are brought to: one channel only where all are grey."""
    if how.transforms is not None:
        size, shorter = how.transforms.crop_size[0], how.transforms.resize_size[0]
        mode = how.transforms.interpolation.value
        return Fit(size, size, 3, shorter, mode, area=imagenet)
    if imagenet:
        size = how.size or (224 if like is None else like.images.shape[1])
        return Fit(size, size, 3, round(size * 256 / 224), area=True)
    # A sample tells what the headers of a million pictures would; but grey ones have to
    # be grey without exception, and without `size` all must have one size.
    count, size = len(source), how.size
    shapes = scan(source, np.linspace(0, count - 1, min(64, count)).astype(int))
    channels = max((shape[2] for shape in shapes.values()), default=1)
    if size is None or channels == 1:
        shapes = scan(source, np.arange(count))
        channels = max(shape[2] for shape in shapes.values())
    first, (height, width, _) = next(iter(shapes.items()))
    for i, shape in shapes.items():
        if size is None and shape[:2] != (height, width):
            raise ValueError(
                f"{source.name(first)} has {height} x {width} pixels, "
                f"{source.name(i)} {shape[0]} x {shape[1]}; pass size= to bring "
                "all to one size"
            )
    if like is not None:
        channels = max(channels, like.shape[0])  # grey images of a set in colour
    shape = (size or height, size or width, channels)
    if like is not None:
        check_shape(where, shape, tuple(like.images.shape[1:]))
    check_memory(where, math.prod(shape), "; pass a smaller size=")
    return Fit(*shape, shorter=min(shape[:2]))


def scan(source: Files, numbers: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """(H, W, C) of pictures by number, from their headers."""

    def describe(i: int) -> Any:
        try:
            with source.open(i) as file, Image.open(file) as image:
                return describe_image(image)
        except BROKEN_IMAGE as error:
            return explain(error)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(numbers.tolist(), pool.map(describe, numbers), strict=True))
    broken = {i: reason for i, reason in found.items() if isinstance(reason, str)}
    source.add_broken(broken.items())
    return {i: shape for i, shape in found.items() if i not in broken}


def memory_limit() -> float:
    """Bytes of pixels that a split may take: PRUNING_MEMORY (GB), or half of all."""
    told: Any = os.environ.get("PRUNING_MEMORY")
    if told:
        with contextlib.suppress(ValueError):
            told = float(told)
        return 1e9 * check_float("PRUNING_MEMORY", told, 0)
    return memory_size() / 2
