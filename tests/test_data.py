"""lib.data against slow references, and every refusal by the file it names."""

import io
import itertools
import math
import re
import subprocess
import sys
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from lib import data, paths
from lib.data import batching, sources

HAS_CIFAR10 = (paths.data_root() / "cifar10" / "test.npz").is_file()


def make_set(n=64, *, classes=4, side=8, channels=3, seed=0, **changes):
    """Random images, each recognisable by its pixels; labels 0, 1, ... in turn."""
    mix = torch.Generator().manual_seed(seed)
    shape = (n, side, side, channels)
    images = data.ImageSet(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=mix),
        labels=torch.arange(n) % classes,
        classes=tuple(f"class{c}" for c in range(classes)),
        name="made",
        mean=(0.5, 0.4, 0.3)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        pad=2,
        flip=True,
    )
    return replace(images, **changes)


def write_npz(path, images=None, labels=None, **others):
    """A valid small file in the format, but for what is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = np.arange(len(images)) % 2 if labels is None else labels
    np.savez(path, **{"images": images, "labels": labels, **others})
    return path


def write_image(path, *, side=8, mode="RGB", colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (side, side) if isinstance(side, int) else side
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if colour is not None:
        pixels[...] = colour
    Image.fromarray(pixels).save(path)
    return pixels


def write_tree(folder, *, classes=("ant", "bee"), per_class=2, **image):
    for split, name in itertools.product(sources.SPLITS, classes):
        for i in range(per_class):
            write_image(folder / split / name / f"{i}.png", seed=i, **image)
    return folder


def named(*parts):
    """A pattern that finds these literal parts in this order."""
    return ".*".join(re.escape(str(part)) for part in parts)


def drain(*args, **kwargs):
    pairs = list(data.batches(*args, **kwargs))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


# The embedded set and the real one


def test_mnist5k_is_whole_balanced_and_disjoint():
    train, test = (data.load("mnist5k", split) for split in sources.SPLITS)
    assert (len(train), len(test), train.shape) == (4000, 1000, (1, 28, 28))
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000
    assert set(test.labels[:100].tolist()) == set(range(10))
    kept = train.images.clone()
    train.images.zero_()
    assert torch.equal(data.load("mnist5k", "train").images, kept)
    train = data.load("mnist5k", "train")
    assert not train.flip and train.classes == tuple("0123456789")
    x, _ = drain(train, 1000)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05


@pytest.mark.cifar10
@pytest.mark.skipif(not HAS_CIFAR10, reason="no cifar10/test.npz under PRUNING_DATA")
def test_cifar10_is_the_original():
    test = data.load("cifar10", "test")
    assert (len(test), test.shape) == (10_000, (3, 32, 32))
    assert test.labels.bincount().tolist() == [1000] * 10
    assert (test.classes[0], test.classes[9]) == ("airplane", "truck")
    own = test.images.float().div(255).mean(dim=(0, 1, 2))
    torch.testing.assert_close(
        own, torch.tensor([0.4942, 0.4851, 0.4504]), atol=1e-3, rtol=0
    )
    assert test.mean == (0.485, 0.456, 0.406) and test.pad == 4 and test.flip
    assert sum(len(y) for _, y in data.batches(test, 128)) == 10_000


def test_import_needs_no_library_that_few_calls_need():
    code = "import sys; from lib import data; found = {*sys.modules}"
    code += "; assert not {'torchvision', 'mlxtend', 'pandas'} & found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


def test_no_thread_imports_a_library(tmp_path):
    """Those that import one at a time find it half imported, now and then."""
    write_tree(tmp_path / "own", side=(12, 20))
    code = f"""
import builtins, sys, threading
from lib import data
def watch(name, *rest, real=builtins.__import__):
    known = {{*sys.modules}}
    found = real(name, *rest)
    new = [n for n in {{*sys.modules}} - known if n.startswith("torch")]
    assert not new or threading.current_thread() is threading.main_thread(), new
    return found
builtins.__import__ = watch
data.load("own", "train", root={str(tmp_path)!r}, size=8)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


# Sets of one's own


def test_npz_shards_join_in_name_order_and_measure_train(tmp_path):
    folder = tmp_path / "own"
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in (4, 2)]
    write_npz(folder / "train-1.npz", parts[1], np.array([2, 1], np.int16))
    write_npz(folder / "train-0.npz", parts[0], np.array([0, 1, 2, 0]))
    write_npz(folder / "test.npz", parts[1], np.array([0, 1]))
    train, test = (data.load("own", s, root=tmp_path) for s in sources.SPLITS)
    whole = np.concatenate(parts)
    assert np.array_equal(train.images, whole)
    assert train.labels.tolist() == [0, 1, 2, 0, 2, 1]
    assert train.classes == test.classes == ("0", "1", "2")
    np.testing.assert_allclose(train.mean, (whole / 255).mean((0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(train.std, (whole / 255).std((0, 1, 2)), atol=1e-9)
    assert (test.mean, test.std) == (train.mean, train.std)
    assert (train.pad, train.flip) == (2, True)


def test_test_split_takes_what_train_measured_unless_train_is_given(tmp_path):
    write_npz(tmp_path / "own/test.npz")
    train = make_set()
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "own", "train*.npz")):
        data.load("own", "test", root=tmp_path)
    test = data.load("own", "test", root=tmp_path, like=train)
    assert (test.mean, test.std, test.pad) == (train.mean, train.std, train.pad)
    assert (test.classes, len(test), test.name) == (train.classes, 6, "own")


def test_tree_reads_pixels_in_order_of_names(tmp_path):
    for split, (c, name) in itertools.product(sources.SPLITS, enumerate("ba")):
        write_image(tmp_path / "own" / split / name / "x.PNG", seed=c)
        write_image(tmp_path / "own" / split / name / "y.png", seed=c + 5)
    (tmp_path / "own/train/a/notes.txt").write_text("not an image")
    for hidden in ("a/._x.png", ".ipynb_checkpoints/x.png"):
        write_image(tmp_path / "own/train" / hidden)
    train = data.load("own", "train", root=tmp_path)
    assert (train.classes, train.labels.tolist()) == (("a", "b"), [0, 0, 1, 1])
    for image, seed in zip(train.images, (1, 6, 0, 5), strict=True):
        expected = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        assert np.array_equal(image, expected)
    test = data.load("own", "test", root=tmp_path)
    assert test.mean == train.mean and test.shape == (3, 8, 8)


def test_tree_of_several_sizes_is_scaled_and_cropped(tmp_path):
    write_tree(tmp_path / "own", side=(12, 20))
    write_image(tmp_path / "own/train/ant/0.png", side=(8, 8), seed=3)
    images = data.load("own", "train", root=tmp_path, size=8)
    assert images.shape == (3, 8, 8)
    kept = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(images.images[0], kept)


def test_grey_tree_has_one_channel_until_one_image_is_in_colour(tmp_path):
    write_tree(tmp_path / "own", mode="L")
    assert data.load("own", "train", root=tmp_path).shape == (1, 8, 8)
    write_image(tmp_path / "own/test/ant/0.png")
    with pytest.raises(ValueError, match=named("own/test", "[8, 8, 3]", "[8, 8, 1]")):
        data.load("own", "test", root=tmp_path)
    write_image(tmp_path / "own/train/ant/0.png")
    assert data.load("own", "test", root=tmp_path).shape == (3, 8, 8)


def test_jpeg_files_are_read(tmp_path):
    write_tree(tmp_path / "own")
    write_image(tmp_path / "own/train/ant/2.jpeg")
    write_image(tmp_path / "own/train/bee/2.jpg")
    assert len(data.load("own", "train", root=tmp_path)) == 6


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "TIFF", "png"])
def test_images_of_other_kinds_and_in_folders_of_a_class_are_read(tmp_path, suffix):
    write_tree(tmp_path / "own")
    for file in sorted((tmp_path / "own").glob("*/*/*.png")):
        image, inner = Image.open(file), file.parent / "inner" / "more"
        inner.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if suffix == "webp" else {}
        image.save(inner / f"{file.stem}.{suffix}", **options)
    train = data.load("own", "train", root=tmp_path)
    assert train.classes == ("ant", "bee") and len(train) == 8
    halves = train.images.view(2, 2, 2, 8, 8, 3)  # class, as png or not, image
    assert torch.equal(halves[:, 0], halves[:, 1])


def test_what_is_no_image_is_named(tmp_path, capsys):
    write_tree(tmp_path / "own")
    data.load("own", "train", root=tmp_path)
    assert capsys.readouterr().out == ""
    for name in ("ant/a.gif", "bee/deep/notes.txt", "loose.png"):
        file = tmp_path / "own/train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"?")
    assert len(data.load("own", "train", root=tmp_path)) == 4
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith(
            "own/train: left out 3 files, no images: loose.png, ant/a.gif, "
            "bee/deep/notes.txt"
        )
    )


def test_the_home_folder_can_be_written_as_a_tilde(tmp_path, monkeypatch):
    write_tree(tmp_path / "sets/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PRUNING_DATA", "~/sets")
    assert len(data.load("own", "train")) == 4
    assert len(data.load("own", "train", root="~/sets")) == 4


# Refusals while reading


@pytest.mark.parametrize("kind", ["inflates", "claims"])
def test_an_npz_larger_than_memory_is_one_line(tmp_path, kind):
    """A bomb: 100 TB by the word of the zip's directory, or of the array's header."""
    path = write_npz(tmp_path / "own/train.npz")
    if kind == "claims":
        header = io.BytesIO()
        shape = {"shape": (10**9, 8, 8, 3000), "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(header, shape)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", header.getvalue())
            file.writestr("labels.npy", b"")
    else:
        raw = bytearray(path.read_bytes())
        entry = raw.index(b"PK\x01\x02")  # the directory's first: images
        raw[entry + 24 : entry + 28] = (0xFFFFFFF0).to_bytes(4, "little")
        path.write_bytes(raw)
        for copy in range(30):  # 4 GB each, as far as such an entry goes
            (path.parent / f"train{copy}.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"memory|allocate") as caught:
        data.load("own", "train", root=tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "own") in str(caught.value)


BAD_FILES = {
    "float images": ({"images": np.zeros((4, 8, 8, 3))}, "float64"),
    "no channel axis": ({"images": np.zeros((4, 8, 8), np.uint8)}, "[4, 8, 8]"),
    "four channels": ({"images": np.zeros((4, 8, 8, 4), np.uint8)}, "C = 1 or 3"),
    "no pixels": ({"images": np.zeros((4, 0, 8, 3), np.uint8)}, "[4, 0, 8, 3]"),
    "empty": ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "no images"),
    "float labels": ({"labels": np.zeros(6)}, "float64"),
    "bool labels": ({"labels": np.zeros(6, bool)}, "bool"),
    "label column": ({"labels": np.zeros((6, 1), int)}, "[6, 1]"),
    "counts differ": ({"labels": np.zeros(5, int)}, "int64 [5], expected int64 [6]"),
    "negative": ({"labels": np.arange(6) - 1}, "-1 to 4"),
    "pickled": ({"images": np.array([{}, []], dtype=object)}, "allow_pickle=False"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_npz_is_refused_by_name(tmp_path, case):
    changes, expected = BAD_FILES[case]
    path = write_npz(tmp_path / "own/train.npz", **changes)
    with pytest.raises(ValueError, match=named(path, expected)) as caught:
        data.load("own", "train", root=tmp_path)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["images", "labels"])
def test_missing_key_is_refused(tmp_path, key):
    path = tmp_path / "own/train.npz"
    path.parent.mkdir()
    np.savez(path, **{"images" if key == "labels" else "labels": np.zeros(3, int)})
    with pytest.raises(ValueError, match=named(path, key, "expected an npz")):
        data.load("own", "train", root=tmp_path)


@pytest.mark.parametrize("damage", ["half", "text", "nothing", "flipped byte", "npy"])
def test_broken_npz_is_refused(tmp_path, damage):
    path = write_npz(tmp_path / "own/train-3.npz")
    whole = path.read_bytes()
    flipped = whole[:400] + bytes([whole[400] ^ 255]) + whole[401:]
    cases = {"half": whole[: len(whole) // 2], "text": b"hello", "nothing": b""}
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({**cases, "flipped byte": flipped}[damage])
    with pytest.raises(ValueError, match=named(path, "expected an npz")):
        data.load("own", "train", root=tmp_path)


def test_sets_that_do_not_fit_together_are_refused(tmp_path):
    own = tmp_path / "own"
    write_npz(own / "train-0.npz")
    small = write_npz(own / "train-1.npz", np.ones((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=named(small, "[4, 4, 3]", "[8, 8, 3]")):
        data.load("own", "train", root=tmp_path)
    small.unlink()
    test = write_npz(own / "test.npz", labels=np.arange(6))
    with pytest.raises(ValueError, match=named(test, "0 to 5", "0..1")):
        data.load("own", "test", root=tmp_path)
    write_npz(own / "train-0.npz", labels=np.array([0, 1, 3, 0, 1, 3]))
    with pytest.raises(ValueError, match=named(own, "class 2", "up to 3")):
        data.load("own", "train", root=tmp_path)
    write_npz(own / "train-0.npz", np.zeros((6, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=named(own, "channel 0", "constant")):
        data.load("own", "train", root=tmp_path)
    (own / "train").mkdir()
    with pytest.raises(ValueError, match=named(own, "npz files and image folders")):
        data.load("own", "train", root=tmp_path)


def test_missing_things_are_refused(tmp_path):
    write_npz(tmp_path / "own/train.npz")
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "own", "test*.npz")):
        data.load("own", "test", root=tmp_path)
    write_tree(tmp_path / "tree")
    for file in (tmp_path / "tree/test").glob("*/*"):
        file.unlink()
    with pytest.raises(ValueError, match=named(tmp_path / "tree/test/ant", "no image")):
        data.load("tree", "test", root=tmp_path)
    for folder in ("tree/test/ant", "tree/test/bee"):
        (tmp_path / folder).rmdir()
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "tree/test", "no cl")):
        data.load("tree", "test", root=tmp_path)
    (tmp_path / "tree/test").rmdir()
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "tree/test")):
        data.load("tree", "test", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar01", "did you mean 'cifar10'?"),
        ("flower", "did you mean 'flowers'?"),
        *((name, "known: cifar10, fashion_mnist, flow") for name in ("", "..", "a/b")),
    ],
)
def test_unknown_name_gives_the_nearest_or_all_and_the_place(tmp_path, name, hint):
    write_npz(tmp_path / "flowers/train.npz")
    with pytest.raises(ValueError, match=named(repr(name), hint, tmp_path / name)):
        data.load(name, "train", root=tmp_path)


@pytest.mark.parametrize(
    "name, split, size, expected",
    [
        ("mnist5k", "val", None, "split must be one of ['train', 'test'], got 'val'"),
        ("mnist5k", "train", 0, "size must lie in [1, inf), got 0"),
        ("mnist5k", "train", 14, "size=14 is for folders"),
    ],
)
def test_bad_arguments_of_load(name, split, size, expected):
    with pytest.raises(ValueError, match=named(name, expected)):
        data.load(name, split, size=size)


def test_tree_refusals(tmp_path):
    own = write_tree(tmp_path / "own")
    write_image(own / "train/bee/9.png", side=(4, 6))
    both = named(own / "train/ant/0.png", "8 x 8", own / "train/bee/9.png", "4 x 6")
    with pytest.raises(ValueError, match=both + ".*size="):
        data.load("own", "train", root=tmp_path)
    big = named(own / "train", "GB of images do not fit into", "smaller size=")
    with pytest.raises(ValueError, match=big):
        data.load("own", "train", root=tmp_path, size=10**7)
    (own / "train/bee/9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=named(own / "train/bee/9.png", "not a read")):
        data.load("own", "train", root=tmp_path)
    whole = (own / "train/bee/0.png").read_bytes()
    (own / "train/bee/9.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=named(own / "train/bee/9.png", "not a read")):
        data.load("own", "train", root=tmp_path)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(own / "train/bee/9.png")
    with pytest.raises(ValueError, match=named(own / "train/bee/9.png", "8 bits")):
        data.load("own", "train", root=tmp_path)
    (own / "train/bee/9.png").unlink()
    write_image(own / "test/cat/0.png")
    with pytest.raises(ValueError, match=named(own / "test", "differ from", "cat")):
        data.load("own", "test", root=tmp_path)


def test_test_images_of_another_size_are_refused(tmp_path):
    own = write_tree(tmp_path / "own")
    for file in (own / "test").glob("*/*"):
        write_image(file, side=6)
    with pytest.raises(ValueError, match=named(own / "test", "[6, 6, 3]", "[8, 8, 3]")):
        data.load("own", "test", root=tmp_path)
    assert data.load("own", "test", root=tmp_path, size=7).shape == (3, 7, 7)


def test_truncated_known_set_says_what_is_missing(tmp_path):
    for i in (0, 2):
        pixels = np.ones((20, 32, 32, 3), np.uint8)
        write_npz(tmp_path / f"cifar10/train-{i}.npz", pixels)
    expected = named("cifar10", "50,000", "train-0.npz, train-2.npz", "hold 40;")
    with pytest.raises(ValueError, match=expected):
        data.load("cifar10", "train", root=tmp_path)
    path = write_npz(tmp_path / "cifar10/train-2.npz", pixels, np.full(20, 10))
    with pytest.raises(ValueError, match=named(path, "10 to 10", "0..9")):
        data.load("cifar10", "train", root=tmp_path)
    path = write_npz(tmp_path / "mnist/test.npz")
    with pytest.raises(ValueError, match=named(path, "[8, 8, 3]", "[28, 28, 1]")):
        data.load("mnist", "test", root=tmp_path)


# Downloads


class FakeDownload:
    """Stands in for torchvision's CIFAR10: 20 train and 10 test images."""

    error: Exception | None = None

    def __init__(self, root, train, download):
        (Path(root) / "half-written.tar.gz").write_bytes(b"...")
        if self.error and not train:
            raise self.error
        n = 20 if train else 10
        self.data = np.full((n, 32, 32, 3), n, np.uint8)
        self.targets = [i % 10 for i in range(n)]


@pytest.fixture
def fake_cifar10(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeDownload)
    monkeypatch.setattr(FakeDownload, "error", None)
    monkeypatch.setitem(sources.COUNTS, "cifar10", {"train": 20, "test": 10})
    return FakeDownload


def test_download_becomes_npz(tmp_path, fake_cifar10):
    root = tmp_path / "new"
    train = data.load("cifar10", "train", root=root)
    assert (len(train), int(train.images[0, 0, 0, 0])) == (20, 20)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert files == ["cifar10", "cifar10/test.npz", "cifar10/train.npz"]
    before = (root / "cifar10/train.npz").stat().st_mtime_ns
    assert data.download("cifar10", root) == root / "cifar10"
    assert len(data.load("cifar10", "test", root=root)) == 10
    assert (root / "cifar10/train.npz").stat().st_mtime_ns == before


def test_download_adds_only_the_split_that_is_absent(tmp_path, fake_cifar10):
    kept = np.zeros((20, 32, 32, 3), np.uint8)
    write_npz(tmp_path / "cifar10/train-0.npz", kept, np.arange(20) % 10)
    assert len(data.load("cifar10", "test", root=tmp_path)) == 10
    names = sorted(path.name for path in (tmp_path / "cifar10").iterdir())
    assert names == ["test.npz", "train-0.npz"]


@pytest.mark.parametrize(
    "error, kind, expected",
    [
        (
            urllib.error.URLError("no name"),
            FileNotFoundError,
            "data.download('cifar10')",
        ),
        (RuntimeError("Error downloading\nx"), FileNotFoundError, "data.download("),
        (RuntimeError("File not found or corrupted."), ValueError, "wrong checksum"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (MemoryError("full"), MemoryError, "full"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, fake_cifar10, error, kind, expected):
    fake_cifar10.error = error
    with pytest.raises(kind, match=re.escape(expected)) as caught:
        data.load("cifar10", "train", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    if kind in (ValueError, FileNotFoundError):
        assert str(tmp_path / "cifar10") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_only_three_sets_can_be_downloaded(tmp_path):
    with pytest.raises(ValueError, match="imagenet: only cifar10, mnist"):
        data.download("imagenet", tmp_path)


# ImageSet


def test_image_set_checks_itself():
    images = make_set(8)
    assert (len(images), images.shape) == (8, (3, 8, 8)) and "made" in repr(images)
    for changes, expected in [
        ({"images": images.images.float()}, "float32"),
        ({"images": images.images[..., :2]}, "C = 1 or 3"),
        ({"labels": images.labels[1:]}, "expected int64 [8]"),
        ({"labels": images.labels.int()}, "torch.int32"),
        ({"mean": (0.5,)}, "one value per channel"),
    ]:
        with pytest.raises(ValueError, match=named("made", expected)):
            replace(images, **changes)


def test_subset_takes_indices_and_masks():
    images = make_set(8)
    for indices in ([5, 1], np.array([5, 1]), torch.tensor([5, 1], dtype=torch.uint8)):
        part = images.subset(indices)
        assert torch.equal(part.images, images.images[[5, 1]])
    mask = torch.arange(8) == 3
    assert torch.equal(images.subset(mask).images, images.images[3:4])
    assert len(images.subset([])) == 0
    with pytest.raises(ValueError, match="made: indices"):
        images.subset([0.5])


@pytest.mark.parametrize("side", [4, 5, 16])
def test_scaled_pixels_are_those_of_batches_rounded(side):
    images = make_set(8, mean=(0.0,) * 3, std=(1.0,) * 3)
    scaled = images.scale(side)
    ((wanted, _),) = data.batches(images, 8, resolution=side)
    expected = (255 * wanted).permute(0, 2, 3, 1)
    assert (scaled.images - expected).abs().max() <= 0.5 + 1e-3
    assert scaled.images.dtype == torch.uint8 and scaled.images.is_contiguous()
    assert (scaled.name, scaled.pad) == (f"made-{side}px", round(2 * side / 8))
    assert torch.equal(scaled.labels, images.labels)


def test_scaling_to_the_own_side_is_nothing_and_to_none_is_refused():
    images = make_set(8)
    assert images.scale(8) is images
    with pytest.raises(
        ValueError, match=r"made: the side in pixels must lie in \[1, inf\)"
    ):
        images.scale(0)


def make_counted(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mixed = labels[torch.randperm(len(labels), generator=torch.manual_seed(7))]
    images = make_set(len(labels), classes=len(counts), side=2, channels=1)
    # An image's number is written into its pixels, so that sets can be compared.
    numbers = torch.arange(len(labels))
    pixels = torch.stack([numbers // 256, numbers % 256, numbers * 0, numbers * 0], 1)
    shaped = pixels.to(torch.uint8).view(-1, 2, 2, 1)
    return replace(images, images=shaped, labels=mixed), numbers


def read_numbers(images):
    flat = images.images.view(-1, 4).long()
    return flat[:, 0] * 256 + flat[:, 1]


COUNTS = st.lists(st.integers(2, 60), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_split_validation_is_a_stratified_partition(counts, fraction, seed):
    images, numbers = make_counted(counts)
    parts = data.split_validation(images, fraction=fraction, seed=seed)
    again = data.split_validation(images, fraction=fraction, seed=seed)
    kept, held = map(read_numbers, parts)
    assert torch.equal(torch.cat([kept, held]).sort().values, numbers)
    for part, twin, index in zip(parts, again, (kept, held), strict=True):
        assert torch.equal(read_numbers(twin), index)
        assert torch.equal(part.labels, images.labels[index])
    for count, share in zip(counts, parts[1].labels.bincount(), strict=True):
        assert abs(int(share) - fraction * count) <= 1 and 1 <= share < count


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.data())
def test_take_is_stratified(counts, draw):
    images, _ = make_counted(counts)
    n = draw.draw(st.integers(1, sum(counts)))
    part = images.take(n, seed=3)
    index = read_numbers(part)
    assert len(part) == len(index.unique()) == n
    assert torch.equal(part.labels, images.labels[index])
    assert torch.equal(read_numbers(images.take(n, seed=3)), index)
    shares = part.labels.bincount(minlength=len(counts))
    for count, share in zip(counts, shares, strict=True):
        assert abs(int(share) - n * count / sum(counts)) < 1


def test_seeds_of_split_and_take_matter():
    images, _ = make_counted([40, 40])
    held = [read_numbers(data.split_validation(images, seed=s)[1]) for s in (0, 1)]
    assert not torch.equal(*held)
    assert not torch.equal(*(read_numbers(images.take(8, seed=s)) for s in (0, 1)))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan])
def test_fraction_outside_is_refused(fraction):
    with pytest.raises(ValueError, match=r"made: fraction must lie in \(0, 1\)"):
        data.split_validation(make_set(), fraction=fraction)


def test_small_classes_and_bad_counts_are_refused():
    images = make_set(8, classes=4).subset([0, 1, 2, 4, 5, 6, 7])
    lone = replace(images, labels=torch.tensor([0, 0, 1, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match=r"made: class 'class3' has 1 image"):
        data.split_validation(lone)
    for n in (0, 8):
        with pytest.raises(ValueError, match=f"made: cannot take {n} of 7"):
            images.take(n)


# Batches


def test_plain_batches_equal_torchvision_normalize():
    images = make_set(10)
    x, y = drain(images, 4)
    tensors = [
        transforms.functional.to_tensor(image.numpy()) for image in images.images
    ]
    reference = transforms.Normalize(images.mean, images.std)(torch.stack(tensors))
    assert torch.equal(x, reference) and torch.equal(y, images.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_equal_a_slow_reference(channels):
    images = make_set(40, channels=channels)
    x, y = drain(images, 20, train=True, seed=5, epoch=2)
    draws = batching.draw_epoch(images, shuffle=True, augment=True, seed=5, epoch=2)
    assert (
        draws.top.unique().tolist() == draws.left.unique().tolist() == [0, 1, 2, 3, 4]
    )
    assert set(draws.flipped.tolist()) == {True, False}
    for i, (order, top, left, flipped) in enumerate(zip(*draws, strict=True)):
        image = TF.pad(images.images[order].permute(2, 0, 1), [images.pad])
        image = TF.crop(image, int(top), int(left), 8, 8)
        image = TF.hflip(image) if flipped else image
        reference = TF.normalize(image / 255, images.mean, images.std)
        assert torch.equal(x[i], reference) and y[i] == images.labels[order]


def test_padding_is_black_before_normalisation():
    images = make_set(4, images=torch.full((4, 8, 8, 3), 255, dtype=torch.uint8))
    zero = torch.zeros(4, dtype=torch.int64)
    cropped = batching.crop_flip(images.images, zero, zero, zero.bool(), pad=2)
    assert cropped[:, :2].max() == cropped[:, :, :2].max() == 0
    assert cropped[:, 2:, 2:].min() == 255


def test_digits_are_never_mirrored():
    draws = batching.draw_epoch(
        make_set(flip=False), shuffle=True, augment=True, seed=0, epoch=0
    )
    assert not draws.flipped.any()


@pytest.mark.parametrize("resolution", [5, 12])
def test_resolution_is_antialiased_bilinear(resolution):
    images = make_set(6)
    x, _ = drain(images, 4, resolution=resolution)
    reference = transforms.functional.resize(
        drain(images, 6)[0], [resolution, resolution], antialias=True
    )
    torch.testing.assert_close(x, reference, atol=1e-5, rtol=1e-5)
    kwargs = {"train": True, "seed": 1}
    x, _ = drain(images, 3, resolution=resolution, **kwargs)
    full, _ = drain(images, 3, **kwargs)
    reference = F.interpolate(
        full, resolution, mode="bilinear", antialias=True, align_corners=False
    )
    torch.testing.assert_close(x, reference, atol=1e-5, rtol=1e-5)


def test_native_resolution_is_bit_identical():
    images = make_set(6)
    assert torch.equal(drain(images, 4, resolution=8)[0], drain(images, 4)[0])
    batch = torch.rand(2, 3, 8, 8)
    assert batching.resize(batch, 8) is batch and batching.resize(batch, None) is batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("resolution", [None, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_have_the_layout_asked_for(dtype, resolution, channels):
    images = make_set(10, channels=channels)
    kwargs = {"train": True, "dtype": dtype, "resolution": resolution}
    x, y = next(data.batches(images, 4, **kwargs))
    side = resolution or 8
    assert x.shape == (4, channels, side, side) and x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64 and y.shape == (4,)


def test_resumed_epoch_is_the_epoch_in_sequence():
    images = make_set(20)
    in_sequence = [drain(images, 6, train=True, seed=9, epoch=e) for e in range(4)]
    torch.rand(5)
    x, y = drain(images, 6, train=True, seed=9, epoch=3)
    assert torch.equal(x, in_sequence[3][0]) and torch.equal(y, in_sequence[3][1])
    for a, b in itertools.combinations(in_sequence, 2):
        assert not torch.equal(a[0], b[0])
    assert not torch.equal(drain(images, 6, train=True, seed=8, epoch=3)[0], x)
    swapped = drain(images, 6, train=True, seed=3, epoch=9)[0]
    assert not torch.equal(swapped, x)


@pytest.mark.parametrize("train", [False, True])
def test_stream_does_not_depend_on_the_batch_size(train):
    images = make_set(20)
    streams = [drain(images, b, train=train)[0] for b in (1, 5, 20, 99)]
    for stream in streams[1:]:
        assert torch.equal(stream, streams[0])


def test_global_random_state_is_untouched():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drain(make_set(), 16, train=True)
    data.split_validation(make_set())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_comes_once_with_its_label():
    images, numbers = make_counted([7, 9, 5])
    images = replace(images, mean=(0.0,), std=(1.0,))
    x, y = drain(images, 7, train=True, augment=False)
    flat = (x.flatten(1) * 255).round().long()
    index = flat[:, 0] * 256 + flat[:, 1]
    assert not torch.equal(index, numbers)
    assert torch.equal(index.sort().values, numbers)
    assert torch.equal(y, images.labels[index])


@pytest.mark.parametrize(
    "n, size, train, expected",
    [
        (10, 4, True, [4, 4]),
        (10, 4, False, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (3, 4, True, [3]),
    ],
)
def test_last_batch(n, size, train, expected):
    got = [len(y) for _, y in data.batches(make_set(n), size, train=train)]
    assert got == expected
    assert data.count_batches(make_set(n), size, train=train) == len(expected)


def test_augment_without_shuffling_keeps_the_order():
    images = make_set(8)
    x, y = drain(images, 8, augment=True)
    assert torch.equal(y, images.labels)
    assert not torch.equal(x, drain(images, 8)[0])


def test_changing_a_batch_does_not_change_the_set():
    images = make_set(4)
    kept = images.images.clone(), images.labels.clone()
    x, y = next(data.batches(images, 4))
    x.zero_(), y.zero_()
    assert torch.equal(images.images, kept[0]) and torch.equal(images.labels, kept[1])


def test_nothing_waits_for_the_device():
    # A meta tensor has no values: whatever asked for one would raise.
    images = make_set(10).to("meta")
    for x, y in data.batches(images, 4, train=True, resolution=5, device="meta"):
        assert x.shape == (4, 3, 5, 5) and x.is_meta and y.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stream_on_a_gpu_is_that_of_the_cpu():
    images = make_set(20)
    kwargs = {"train": True, "seed": 2, "epoch": 1}
    there = drain(images, 6, device="cuda", **kwargs)
    for a, b in zip(there, drain(images, 6, **kwargs), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"batch_size": 0}, "batch_size must lie in [1, inf), got 0"),
        ({"resolution": 0}, "resolution must lie in [1, inf), got 0"),
        ({"seed": -1}, "seed must lie in [0, inf), got -1"),
        ({"epoch": -1}, "epoch must lie in [0, inf), got -1"),
        ({"dtype": torch.uint8}, "floating type, got torch.uint8"),
        ({"images": make_set(4).subset([])}, "made: no images"),
    ],
)
def test_bad_arguments_of_batches(changes, expected):
    # Without drawing a batch: the error belongs to the call.
    with pytest.raises(ValueError, match=re.escape(expected)):
        data.batches(**{"images": make_set(4), "batch_size": 2, **changes})
