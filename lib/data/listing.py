"""Which pictures there are: folders of classes, tar shards, ImageNet's flat `val`."""

import io
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lib import paths

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SYNSET = re.compile(r"n\d{8}")
LARGEST = 2**28  # bytes of one picture's file
DEVKIT = "ILSVRC2012_devkit_t12"
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


@dataclass(frozen=True, eq=False)
class Files:
    """Files below a folder, or members of the uncompressed tars in it.

    labels: int32 [N]. places: int64 [N, 2], offset and bytes in a tar.
    """

    root: Path
    names: Names
    labels: np.ndarray
    places: np.ndarray | None = None

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
    ids = [re.search(r"_val_(\d{8})\.", name) for name in found]
    for name, number in zip(found, ids, strict=True):
        if number is None or not 1 <= int(number[1]) <= len(synsets):
            raise ValueError(
                f"{folder / name}: not ILSVRC2012_val_00000001.JPEG to "
                f"{len(synsets):08}, which the devkit labels"
            )
    told = [synsets[int(number[1]) - 1] for number in ids if number]
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
    from torchvision.datasets import imagenet

    told = root / DEVKIT / "data"
    if (told / TRUTH).is_file():
        from scipy.io import loadmat

        with paths.reading(told, "devkit of ImageNet"):
            rows = loadmat(told / "meta.mat", squeeze_me=True)["synsets"]
            known = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
            return [known[int(line)] for line in (told / TRUTH).read_text().split()]
    if (root / f"{DEVKIT}.tar.gz").is_file():
        with paths.reading(root / f"{DEVKIT}.tar.gz", "devkit of ImageNet"):
            with tempfile.TemporaryDirectory() as folder:
                link = Path(folder) / f"{DEVKIT}.tar.gz"
                link.symlink_to((root / link.name).resolve())
                imagenet.parse_devkit_archive(folder)
                return imagenet.load_meta_file(folder)[1]
    if (root / imagenet.META_FILE).is_file():
        with paths.reading(root / imagenet.META_FILE, "meta file of ImageNet"):
            return imagenet.load_meta_file(root)[1]
    raise ValueError(
        f"{root}: its validation images lie in no folders of classes; put them there, "
        f"or {DEVKIT} (folder or .tar.gz) beside them, which labels them"
    )


# -- tar shards ------------------------------------------------------------------------


def list_shards(folder: Path, files: list[Path]) -> Files:
    """The samples `KEY.jpg` (or another image) with `KEY.cls`, in the shards' order.

    The layout is WebDataset's; other members are left alone. ValueError names the file
    and the member that does not fit.
    """
    # Read once, from header to header, and then from the middle, which the library
    # `webdataset` cannot: it has one order a shard.
    labels, places = array("i"), array("q")

    def find() -> Iterator[str]:
        for file in files:
            try:
                with tarfile.open(file, "r:") as tar, open(file, "rb") as raw:
                    for image, label in pair_members(file, tar):
                        raw.seek(label.offset_data)
                        labels.append(parse_label(file, label, raw.read(20)))
                        places.extend((image.offset_data, image.size))
                        yield f"{file.name}/{image.name}"
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(
                    f"{file}: not a readable tar ({' '.join(str(error).split())}); "
                    "shards must be whole, and not compressed"
                ) from None

    names = Names(find())
    if not len(names):
        raise ValueError(f"{files[0]}: no KEY.jpg with KEY.cls in it")
    table = np.array(places, np.int64).reshape(-1, 2)
    return Files(folder, names, np.array(labels, np.int32), table)


def pair_members(
    file: Path, tar: tarfile.TarFile
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """(image, label) of each sample: members in a row with one name before the dot."""
    sample: dict[str, tarfile.TarInfo] = {}
    key, end = "", file.stat().st_size
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        found = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]*)", member.name)
        if not member.isreg() or found is None:
            continue
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise ValueError(f"{file}: {member.name} leads out of the shard")
        if member.size > LARGEST or member.offset_data + member.size > end:
            raise ValueError(f"{file}: {member.name} claims {member.size:,} bytes")
        if found[1] != key:
            yield from finish_sample(file, key, sample)
            sample = {}
        key, part = found[1], found[2].lower()
        part = "image" if f".{part}" in SUFFIXES else part
        if part in sample:
            raise ValueError(f"{file}: {member.name} is the second {part} of {key}")
        sample[part] = member
    yield from finish_sample(file, key, sample)


def finish_sample(
    file: Path, key: str, sample: dict[str, tarfile.TarInfo]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """Its image and its label, if it has any; ValueError where it has only one."""
    lacks = [part for part in ("image", "cls") if part not in sample]
    if len(lacks) == 1:
        name = {"image": f"image {key}.jpg", "cls": f"label {key}.cls"}[lacks[0]]
        raise ValueError(f"{file}: no {name} beside the other members of {key}")
    if not lacks:
        yield sample["image"], sample["cls"]


def parse_label(file: Path, member: tarfile.TarInfo, content: bytes) -> int:
    """The whole number in a `.cls`."""
    text = content[: member.size].decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(
            f"{file}: {member.name} holds {text!r}, expected the number of a class"
        )
    return int(text)
