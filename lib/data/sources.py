"""Data sets on disk: downloads, npz files, folders of images; read and checked."""

import difflib
import functools
import http.client
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_BYTES = 8 * 10**9
BROKEN_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    Image.DecompressionBombError,
)
NO_NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


@dataclass(frozen=True)
class Facts:
    """What holds for both splits of a set; `shape` is (H, W, C)."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool


Arrays = tuple[np.ndarray, np.ndarray, Facts]  # uint8 [N, H, W, C], int64 [N]
DIGITS = Facts(tuple("0123456789"), (28, 28, 1), (0.1307,), (0.3081,), 2, False)
KNOWN = {
    "mnist5k": DIGITS,
    "cifar10": Facts(
        classes=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        shape=(32, 32, 3),
        # ImageNet's constants, not CIFAR-10's own: the published ResNet weights were
        # trained with these, and only with these do they give their accuracy.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        pad=4,
        flip=True,
    ),
    "mnist": DIGITS,
    "fashion_mnist": Facts(
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        shape=(28, 28, 1),
        mean=(0.2860,),
        std=(0.3530,),
        pad=2,
        flip=True,
    ),
}
COUNTS = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
}
TORCHVISION = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
# Facts of train splits read before, so that a test split need not read train again.
MEASURED: dict[tuple[int, int | None], Facts] = {}


def fetch_split(name: str, split: str, tmp: Path, root: Path) -> Path:
    """Let torchvision download into `tmp` and write `<tmp>/<split>.npz`."""
    source = getattr(torchvision.datasets, TORCHVISION[name])
    advice = (
        "put train.npz and test.npz (images uint8 [N, H, W, C], labels int64 [N]) "
        f"into {root / name}, or run data.download({name!r}) where there is a network"
    )
    try:
        dataset = source(root=tmp, train=split == "train", download=True)
    except (*NO_NETWORK, RuntimeError) as error:
        reason = " ".join(str(error).split())
        # torchvision has one error type for both; only a wrong checksum says so.
        if "corrupt" in reason:
            raise ValueError(
                f"{name}: the download into {root} has a wrong checksum ({reason}); "
                f"try again, or {advice}"
            ) from None
        raise FileNotFoundError(
            f"{name}: not in {root} and the download failed ({reason}); {advice}"
        ) from None
    pixels = np.asarray(dataset.data).reshape(-1, *KNOWN[name].shape)
    labels = np.asarray(dataset.targets, dtype=np.int64)
    # Uncompressed: photographs hardly shrink, and inflating would cost every start.
    np.savez(tmp / f"{split}.npz", images=pixels, labels=labels)
    return tmp / f"{split}.npz"


def read_known(name: str, split: str, *, root: Path) -> Arrays:
    """Read one of the sets with official names and counts."""
    folder, facts, expected = root / name, KNOWN[name], COUNTS[name][split]
    pixels, labels, _ = read_shards(folder, split, facts=facts)
    if len(labels) != expected:
        found = ", ".join(file.name for file in find_shards(folder, split))
        raise ValueError(
            f"{folder}: {name} has {expected:,} {split} images, but {found} hold "
            f"{len(labels):,}, {abs(expected - len(labels)):,} "
            f"{'missing' if len(labels) < expected else 'too many'}; complete the "
            f"{split}*.npz files, or delete them to have the set downloaded"
        )
    return pixels, labels, facts


def read_custom(name: str, split: str, *, root: Path, size: int | None) -> Arrays:
    """Read a set of the user's own; what train measures holds for test as well."""
    folder = find_folder(name, root)
    trees = any((folder / part).is_dir() for part in SPLITS)
    if trees and any(find_shards(folder, part) for part in SPLITS):
        raise ValueError(f"{folder}: holds both npz files and image folders, keep one")
    read: Callable[..., tuple] = read_shards
    if trees:
        read = functools.partial(read_tree, size=size)
    files = (folder / "train").glob("*/*") if trees else find_shards(folder, "train")
    key = fingerprint(files), size
    if split == "train" or key not in MEASURED:
        pixels, labels, classes = read(folder, "train")
        MEASURED[key] = measure_facts(folder, pixels, classes)
        if split == "train":
            return pixels, labels, MEASURED[key]
        del pixels, labels  # before the test images take their place
    pixels, labels, _ = read(folder, "test", facts=MEASURED[key])
    return pixels, labels, MEASURED[key]


def find_folder(name: str, root: Path) -> Path:
    """`<root>/<name>`, or a ValueError that lists the known names and the nearest."""
    folder = root / name
    if name and Path(name).name == name and folder.is_dir():
        return folder
    own = {path.parent.name for path in root.glob("*/train*")}
    near = difflib.get_close_matches(name, sorted(own | set(KNOWN)), n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ValueError(
        f"unknown data set {name!r}{hint}, known are {', '.join(KNOWN)}; a set of your "
        f"own would be the folder {folder} with train*.npz and test*.npz, or with "
        "train/<class>/*.png and test/<class>/*.png"
    )


def find_shards(folder: Path, split: str) -> list[Path]:
    """The npz files of one split, in name order."""
    return sorted(folder.glob(f"{split}*.npz"))


def map_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list:
    """`[function(item) ...]`, in threads: inflating and decoding let go of the GIL."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def fingerprint(files: Iterable[Path]) -> int:
    """Changes when a file is added, removed or written."""
    stats = ((file, file.stat()) for file in sorted(files))
    return hash(tuple((str(f), s.st_mtime_ns, s.st_size) for f, s in stats))


def measure_facts(folder: Path, pixels: np.ndarray, classes: tuple[str, ...]) -> Facts:
    """Mean and population std per channel, exact, from counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[-1]):
        flat = torch.from_numpy(pixels[..., channel]).reshape(-1)
        share = torch.bincount(flat, minlength=256).numpy() / len(flat)
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)))
        if share.max() == 1:
            raise ValueError(f"{folder}: channel {channel} of train is constant")
    shape = pixels.shape[1:]
    return Facts(classes, shape, tuple(mean), tuple(std), shape[0] // 8, True)


def read_shards(folder: Path, split: str, *, facts: Facts | None = None) -> tuple:
    """Join the npz files of a split: uint8 [N, H, W, C], int64 [N], class names.

    Without `facts` the shape is the first file's and the classes are 0..max.
    """
    files = find_shards(folder, split)
    if not files:
        raise FileNotFoundError(f"{folder}: no {split}*.npz or {split}/ folder in it")
    parts = map_threads(read_npz, files)
    shape = facts.shape if facts else parts[0][0].shape[1:]
    for file, part in zip(files, parts, strict=True):
        check_part(file, *part, shape=shape, classes=facts and len(facts.classes))
    pixels, labels = parts[0]
    if len(parts) > 1:
        pixels, labels = map(np.concatenate, zip(*parts, strict=True))
    return pixels, labels, facts.classes if facts else name_classes(folder, labels)


def check_part(
    file: Path,
    pixels: np.ndarray,
    labels: np.ndarray,
    *,
    shape: tuple[int, ...],
    classes: int | None,
) -> None:
    """Refuse a file whose images or labels do not fit the rest of its set."""
    if pixels.shape[1:] != shape:
        raise ValueError(
            f"{file}: images are {list(pixels.shape[1:])} [H, W, C], the rest of the "
            f"set is {list(shape)}"
        )
    low, high = labels.min(), labels.max()
    if low < 0 or (classes is not None and high >= classes):
        expected = "0 or above" if classes is None else f"0..{classes - 1}"
        raise ValueError(
            f"{file}: labels run from {low} to {high}, expected {expected}"
        )


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file's `images` and `labels`, checked for type, shape and count."""
    expected = "expected an npz with images uint8 [N, H, W, C] and labels int64 [N]"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("one bare array")
        with file:
            pixels, labels = file["images"], file["labels"]
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}, {expected}") from None
    except BROKEN_NPZ as error:
        raise ValueError(f"{path}: cannot be read ({error}), {expected}") from None
    check_pixels(path, str(pixels.dtype), pixels.shape)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}, "
            "expected int64 [N]"
        )
    if len(labels) != len(pixels):
        raise ValueError(f"{path}: {len(pixels)} images but {len(labels)} labels")
    if not len(labels):
        raise ValueError(f"{path}: holds no images")
    return pixels, labels.astype(np.int64, copy=False)


def check_pixels(where: Any, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse anything but uint8 [N, H, W, C] with 1 or 3 channels."""
    kind = dtype.removeprefix("torch.")
    if kind != "uint8" or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        raise ValueError(
            f"{where}: images are {kind} {list(shape)}, expected uint8 [N, H, W, C] "
            "with C = 1 or 3"
        )


def name_classes(folder: Path, labels: np.ndarray) -> tuple[str, ...]:
    """Names "0".."max"; ValueError for a class without an image."""
    seen = np.unique(labels)
    gaps = np.flatnonzero(seen != np.arange(len(seen)))
    if len(gaps):
        raise ValueError(
            f"{folder}: no train image of class {gaps[0]}, but labels go up to "
            f"{seen[-1]}; every class 0..max needs one"
        )
    return tuple(str(label) for label in seen)


def read_tree(
    folder: Path, split: str, *, size: int | None, facts: Facts | None = None
) -> tuple:
    """Decode `<folder>/<split>/<class>/*`: uint8 [N, H, W, C], int64 [N], classes."""
    groups = list_tree(folder / split)
    classes = tuple(groups)
    if facts and classes != facts.classes:
        differ = ", ".join(sorted(set(classes) ^ set(facts.classes)))
        raise ValueError(
            f"{folder / split}: its classes differ from those of train: {differ}"
        )
    files = [file for group in groups.values() for file in group]
    shape = find_shape(files, size=size, facts=facts)
    pixels = np.empty((len(files), *shape), dtype=np.uint8)
    fit = functools.partial(fit_image, shape=shape)

    def decode(i: int) -> None:
        pixels[i] = read_image(files[i], fit)

    map_threads(decode, range(len(files)))
    counts = [len(group) for group in groups.values()]
    return pixels, np.repeat(np.arange(len(classes)), counts), classes


def list_tree(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, both in name order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected <class>/*.png")
    groups = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = [f for f in sorted(path.iterdir()) if f.suffix.lower() in SUFFIXES]
            groups[path.name] = [f for f in files if not f.name.startswith(".")]
            if not groups[path.name]:
                raise ValueError(f"{path}: no image ({', '.join(SUFFIXES)}) in it")
    if not groups:
        raise ValueError(f"{folder}: holds no class folders, expected <class>/*.png")
    return groups


def find_shape(
    files: list[Path], *, size: int | None, facts: Facts | None
) -> tuple[int, int, int]:
    """(H, W, C) all files are brought to: one channel only where all are grey."""
    check_memory(files, read_image(files[0], describe_image), size)
    found = map_threads(functools.partial(read_image, use=describe_image), files)
    channels = max(shape[2] for shape in found)
    for file, (height, width, _) in zip(files, found, strict=True):
        if size is None and (height, width) != found[0][:2]:
            raise ValueError(
                f"{files[0]} has {found[0][0]} x {found[0][1]} pixels, {file} "
                f"{height} x {width}; pass size= to bring all to one size"
            )
    shape = (size or found[0][0], size or found[0][1], channels)
    if facts and (shape[:2] != facts.shape[:2] or channels > facts.shape[2]):
        raise ValueError(
            f"{files[0].parent.parent}: images are {list(shape)} [H, W, C], those of "
            f"train {list(facts.shape)}; {files[0]} is one of them"
        )
    shape = facts.shape if facts else shape
    check_memory(files, shape, size)
    return shape


def check_memory(files: list[Path], shape: tuple, size: int | None) -> None:
    """Refuse, before anything is decoded, what would not fit in memory."""
    height, width, channels = (size or shape[0], size or shape[1], shape[2])
    total = len(files) * height * width * channels
    if total > MAX_BYTES:
        raise ValueError(
            f"{files[0].parent.parent}: {len(files):,} images of {height} x {width} x "
            f"{channels} take {total / 1e9:,.1f} GB of memory, the limit is "
            f"{MAX_BYTES / 1e9:g} GB; pass a smaller size="
        )


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
