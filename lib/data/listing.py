"""Which pictures there are: folders of classes, tar shards, ImageNet's flat `val`."""

import io
import itertools
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lib import paths

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SYNSET = re.compile(r"n\d{8}")
KEY = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")  # of a member: its sample, its part
DEVKIT = "ILSVRC2012_devkit_t12"
SHARE = 0.01  # of a set's files may be broken
NONE_LEFT = -1  # in place of a file's number: no other of its class can be read
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class Names:
    """Many names, as one array of bytes.

    A million strings would take more memory than their characters, and be copied into
    every worker as reference counts touch them. Listing a million peaks at 70 MiB
    (`tests/benchmarks/streaming.csv`).
    """

    def __init__(self, names: Iterable[str]):
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self.text = np.frombuffer(bytes(text), np.uint8)
        self.ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.text[start : self.ends[i]].tobytes())


@dataclass(eq=False)
class Files:
    """Files below a folder, or members of the uncompressed tars in it.

    labels: int32 [N]. places: int64 [N, 2], offset and bytes in a tar. broken: numbers
    of those that could not be read, and why; ValueError beyond `share` of all.
    """

    root: Path
    names: Names
    labels: np.ndarray
    places: np.ndarray | None = None
    share: float = SHARE
    broken: dict[int, str] = field(default_factory=dict)
    told: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Where picture `i` lies; of a member the tar's path goes before its name."""
        return str(self.root / self.names[i])

    def open(self, i: int) -> BinaryIO:
        """Its bytes, to be read from."""
        if self.places is None:
            return open(self.name(i), "rb")
        tar = self.names[i].partition(".tar/")[0]
        with open(self.root / f"{tar}.tar", "rb") as file:
            file.seek(self.places[i, 0])
            return io.BytesIO(file.read(self.places[i, 1]))

    def add_broken(self, found: Iterable[tuple[int, str]]) -> None:
        """Count those that cannot be read, each once."""
        self.broken.update(found)
        if self.broken.pop(NONE_LEFT, None) is not None:
            raise ValueError(f"{self.describe_broken()}, and none is left of a class")
        if len(self.broken) > self.share * len(self):
            raise ValueError(
                f"{self.describe_broken()}, above the share of {self.share:.2%}"
            )

    def tell_broken(self) -> None:
        """Print their count where it has grown since the last time."""
        if len(self.broken) > self.told:
            self.told = len(self.broken)
            print(f"{self.describe_broken()}; each is replaced by another of its class")

    def describe_broken(self) -> str:
        """The first three, and how many there are."""
        first = [
            f"{self.name(i)}: not a readable image ({reason})"
            for i, reason in itertools.islice(self.broken.items(), 3)
        ]
        rest = "; ..." if len(self.broken) > 3 else ""
        count = f"{len(self.broken):,} of {len(self):,} files cannot be read"
        return f"{'; '.join(first)}{rest}: {count}"


# -- folders ---------------------------------------------------------------------------


def list_tree(folder: Path) -> tuple[Files, tuple[str, ...]]:
    """Image files in order of their names, and the names of the classes.

    A class is a folder, with all below it. Hidden files and folders are none
    (torchvision's ImageFolder takes them up); what else is no image is named in print.
    """
    classes = tuple(p.name for p in sorted(folder.glob("[!.]*")) if p.is_dir())
    others = [p.name for p in sorted(folder.glob("[!.]*")) if p.is_file()]
    left, counts = len(others), np.zeros(len(classes), np.int64)
    del others[5:]

    def find() -> Iterator[str]:
        nonlocal left
        for label, name in enumerate(classes):
            for inner in sorted(walk(folder / name), key=lambda x: x.split("/")):
                if is_image(inner):
                    counts[label] += 1
                    yield f"{name}/{inner}"
                else:
                    left += 1
                    others.extend([f"{name}/{inner}"][: 5 - len(others)])
            if not counts[label]:
                raise ValueError(
                    f"{folder / name}: no image ({', '.join(SUFFIXES)}) in it; class "
                    f"{name!r} needs one"
                )

    names = Names(find())
    if not len(names):
        raise FileNotFoundError(f"{folder}: no class folders, expected <class>/*.png")
    if left:
        rest = ", ..." if left > len(others) else ""
        shown = ", ".join(others)
        print(f"{folder}: left out {left} files, no images: {shown}{rest}")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Files(folder, names, labels), classes


def is_image(name: str) -> bool:
    """Whether a file is taken for a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def walk(folder: str | Path, inner: str = "") -> Iterator[str]:
    """The files below a folder, `a/b.png`; nothing hidden, no folder behind a link."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, f"{inner}{entry.name}/")
            elif entry.is_file() or (entry.is_symlink() and not entry.is_dir()):
                yield inner + entry.name


# -- ImageNet's flat folder of validation images ---------------------------------------


def list_flat(
    folder: Path, classes: tuple[str, ...] | None
) -> tuple[Files, tuple[str, ...]]:
    """`val/ILSVRC2012_val_*.JPEG`, labelled by the devkit, and the classes.

    ValueError: no devkit, or a picture that it does not know.
    """
    # The devkit numbers classes as `meta.mat` does; weights, torchvision's too, have
    # them in the order of the alphabet of the synsets.
    synsets = read_truth(folder.parent)
    found = sorted(name for name in walk(folder) if is_image(name))
    told = []
    for name in found:
        number = re.search(r"_val_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(synsets):
            raise ValueError(
                f"{folder / name}: not ILSVRC2012_val_00000001.JPEG to "
                f"{len(synsets):08}, which the devkit labels"
            )
        told.append(synsets[int(number[1]) - 1])
    classes = classes or tuple(sorted({*synsets}))
    if lost := sorted({*told} - {*classes}):
        raise ValueError(f"{folder}: no folder of train is called {lost[0]}")
    places = {synset: i for i, synset in enumerate(classes)}
    labels = np.array([places[synset] for synset in told], np.int32)
    return Files(folder, Names(found), labels), classes


def read_truth(root: Path) -> list[str]:
    """The synset of each validation image in order of its number, by the devkit.

    From the folder or archive of the devkit, or torchvision's `meta.bin`, in `root`.
    """
    from scipy.io import loadmat
    from torchvision.datasets import imagenet

    folder, archive = root / DEVKIT / "data", root / f"{DEVKIT}.tar.gz"
    kinds = (folder / TRUTH, archive, root / imagenet.META_FILE)
    found = next((path for path in kinds if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{root}: its validation images lie in no folders of classes; put them "
            f"there, or {DEVKIT} (folder or .tar.gz) beside them, which labels them"
        )
    by_folder = found.name == TRUTH
    with paths.reading(folder if by_folder else found, "devkit of ImageNet"):
        if by_folder:
            rows = loadmat(folder / "meta.mat", squeeze_me=True)["synsets"]
            known = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
            return [known[int(line)] for line in found.read_text().split()]
        if found != archive:
            return imagenet.load_meta_file(root)[1]
        with tempfile.TemporaryDirectory() as aside:  # torchvision writes beside it
            (Path(aside) / archive.name).symlink_to(archive.resolve())
            imagenet.parse_devkit_archive(aside)
            return imagenet.load_meta_file(aside)[1]


# -- tar shards ------------------------------------------------------------------------


def list_shards(folder: Path, files: list[Path]) -> Files:
    """The samples `KEY.jpg` (or another image) with `KEY.cls`, in the shards' order.

    The layout is WebDataset's; other members are left alone. ValueError names the file
    and the member that does not fit.
    """
    # Read once, from header to header, and then from the middle, which the library
    # `webdataset` cannot: it has one order a shard.
    names, labels, places = [], [], []
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                for image, label in list_samples(file, tar):
                    labels.append(label)
                    places.append((image.offset_data, image.size))
                    names.append(f"{file.name}/{image.name}")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"{file}: not a readable tar ({' '.join(str(error).split())}); "
                "shards must be whole, and not compressed"
            ) from None
    if not names:
        raise ValueError(f"{files[0]}: no KEY.jpg with KEY.cls in it")
    table = np.array(places, np.int64)
    return Files(folder, Names(names), np.array(labels, np.int32), table)


def list_samples(
    file: Path, tar: tarfile.TarFile
) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(image, label) of each sample: members in a row with one name before the dot.

    A sample without either is left out; ValueError where it has not one of each.
    """
    named = ((m, found) for m in tar if m.isreg() and (found := KEY.fullmatch(m.name)))
    for key, members in itertools.groupby(named, lambda pair: pair[1][1]):
        parts = [(found[2].lower(), member) for member, found in members]
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        images = [member for part, member in parts if f".{part}" in SUFFIXES]
        labels = [member for part, member in parts if part == "cls"]
        if not images and not labels:
            continue
        if len(images) != 1 or len(labels) != 1:
            raise ValueError(
                f"{file}: {key} has {len(images)} images and {len(labels)} labels "
                f"({key}.cls), expected one of each"
            )
        content = tar.extractfile(labels[0]).read(20)  # type: ignore[union-attr]
        text = content.decode("ascii", "replace").strip()
        if not re.fullmatch(r"\d{1,9}", text):
            raise ValueError(
                f"{file}: {labels[0].name} holds {text!r}, expected the number of a "
                "class"
            )
        yield images[0], int(text)
