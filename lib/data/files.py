"""Sets of one's own on disk: npz files or folders of images, read and checked."""

import functools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lib.data.images import ImageSet, check_tensors

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
BROKEN_NPZ = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(KeyError, TypeError, ValueError, MemoryError),
)
BROKEN_IMAGE = (
    *(OSError, SyntaxError, EOFError, ValueError),
    Image.DecompressionBombError,
)


def read_own(
    folder: Path, split: str, *, size: int | None = None, like: ImageSet | None = None
) -> ImageSet:
    """Read a set of the user's own; without `like`, test has train read as well."""
    trees = any((folder / part).is_dir() for part in SPLITS)
    if trees and any(find_shards(folder, part) for part in SPLITS):
        raise ValueError(f"{folder}: holds both npz files and image folders, keep one")
    read: Callable[..., ImageSet] = read_shards
    if trees:
        read = functools.partial(read_tree, size=size)
    if like is None and split == "test":
        # Its images are let go of before those of test come.
        like = read(folder, "train").subset([])
    return read(folder, split, like=like)


def measure(
    folder: Path, images: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> ImageSet:
    """A train split with its own mean and population s.d. per channel.

    Exact, from counts of the 256 values; ValueError for a constant channel.
    """
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


def map_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list:
    """`[function(item) ...]`, in threads: inflating and decoding let go of the GIL."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


# -- npz files -------------------------------------------------------------------------


def find_shards(folder: Path, split: str) -> list[Path]:
    """The npz files of one split, in name order."""
    return sorted(folder.glob(f"{split}*.npz"))


def read_shards(folder: Path, split: str, *, like: ImageSet | None = None) -> ImageSet:
    """Join the npz files of a split.

    Without `like` the shape is the first file's and the classes are 0..max.
    """
    files = find_shards(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder}: no {split}*.npz or {split}/ folder in it")
    check_memory(folder, sum(map(inflated_size, files)))
    parts = map_threads(read_npz, files)
    shape = (parts[0][0] if like is None else like.images).shape[1:]
    high = 2**31 if like is None else len(like.classes)
    for file, (images, labels) in zip(files, parts, strict=True):
        check_shape(file, images.shape[1:], shape)
        low, top = labels.min(), labels.max()
        if low < 0 or top >= high:
            raise ValueError(
                f"{file}: labels run from {low} to {top}, expected 0..{high - 1}"
            )
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
    names = getattr(os, "sysconf_names", ())  # Windows has none
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise ValueError(
                f"{where}: {size / 1e9:,.1f} GB of images do not fit into "
                f"{memory / 1e9:,.1f} GB of memory{hint}"
            )


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


# -- folders of images -----------------------------------------------------------------


def read_tree(
    folder: Path, split: str, *, size: int | None = None, like: ImageSet | None = None
) -> ImageSet:
    """Decode `<folder>/<split>/<class>/*`, all of one size or brought to `size`."""
    files, classes, labels = list_tree(folder / split)
    if like is not None and classes != like.classes:
        differ = ", ".join(sorted(set(classes) ^ set(like.classes)))
        raise ValueError(
            f"{folder / split}: its classes differ from those of train: {differ}"
        )
    shape = find_shape(folder / split, files, size=size, like=like)
    pixels = np.empty((len(files), *shape), dtype=np.uint8)

    def decode(i: int) -> None:
        pixels[i] = read_image(files[i], functools.partial(fit_image, shape=shape))

    map_threads(decode, range(len(files)))
    images = torch.from_numpy(pixels)
    if like is None:
        return measure(folder, images, labels, classes)
    return replace(like, name=folder.name, images=images, labels=labels)


def list_tree(folder: Path) -> tuple[list[Path], tuple[str, ...], Tensor]:
    """Image files in order of their names, the names of classes, and labels [N].

    A class is a folder, with all below it. Hidden files and folders are none
    (torchvision's ImageFolder takes them up); what else is no image is named in print.
    """
    found = [path for path in sorted(folder.glob("[!.]*")) if path.is_dir()]
    classes = tuple(path.name for path in found)
    files, labels = [], []
    others = [path for path in sorted(folder.glob("[!.]*")) if path.is_file()]
    for label, inside in enumerate(map(walk, found)):
        images = [file for file in inside if file.suffix.lower() in SUFFIXES]
        others += [file for file in inside if file.suffix.lower() not in SUFFIXES]
        if not images:
            raise ValueError(
                f"{found[label]}: no image ({', '.join(SUFFIXES)}) in it; class "
                f"{classes[label]!r} needs one"
            )
        files += images
        labels += [label] * len(images)
    if not files:
        raise FileNotFoundError(f"{folder}: no class folders, expected <class>/*.png")
    if others:
        names = ", ".join(str(file.relative_to(folder)) for file in others[:5])
        rest = ", ..." if len(others) > 5 else ""
        print(f"{folder}: left out {len(others)} files, no images: {names}{rest}")
    return files, classes, torch.tensor(labels)


def walk(folder: Path) -> list[Path]:
    """The files below a folder in order of their paths, nothing hidden."""
    below = (path for path in folder.rglob("*") if path.is_file())
    seen = [p for p in below if not any(x[0] == "." for x in p.relative_to(folder).parts)]
    return sorted(seen)


def find_shape(
    folder: Path, files: list[Path], *, size: int | None, like: ImageSet | None
) -> tuple[int, int, int]:
    """(H, W, C) all files are brought to: one channel only where all are grey."""
    found = map_threads(functools.partial(read_image, use=describe_image), files)
    height, width, _ = found[0]
    for file, shape in zip(files, found, strict=True):
        if size is None and shape[:2] != (height, width):
            raise ValueError(
                f"{files[0]} has {height} x {width} pixels, {file} {shape[0]} x "
                f"{shape[1]}; pass size= to bring all to one size"
            )
    channels = max(shape[2] for shape in found)
    if like is not None:
        channels = max(channels, like.shape[0])  # grey images of a set in colour
    shape = (size or height, size or width, channels)
    if like is not None:
        check_shape(folder, shape, like.images.shape[1:])
    check_memory(folder, len(files) * math.prod(shape), "; pass a smaller size=")
    return shape


def read_image(path: Path, use: Callable[[Image.Image], Any]) -> Any:
    """`use(image)` on an opened file; ValueError that names a file that is broken."""
    try:
        with Image.open(path) as image:
            return use(image)
    except BROKEN_IMAGE as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def describe_image(image: Image.Image) -> tuple[int, int, int]:
    """(H, W, C) from the header: C = 1 for grey, else 3."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
    return image.height, image.width, 1 if image.mode in ("1", "L") else 3


def fit_image(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Scale the shorter side and crop the centre to [H, W, C] = `shape`."""
    height, width, channels = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)
