"""Sets that stay on disk: the same batches as in memory, whatever the workers do."""

import hashlib
import io
import itertools
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision.datasets import imagenet

from lib import data, models, paths, stages, train
from lib.data import listing, pictures

SPLITS = ("train", "test")


def picture(seed, height=40, width=48, base=90):
    """Smooth colours with some noise: a small photograph."""
    mix = np.random.default_rng(seed)
    coarse = Image.fromarray(mix.integers(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noise = mix.integers(-6, 7, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def write_tree(folder, counts, *, classes=("ant", "bee", "cat"), suffix="jpg", **size):
    """`<split>/<class>/<i>.jpg`, so many of each class."""
    for split, count in counts.items():
        for (c, name), i in itertools.product(enumerate(classes), range(count)):
            file = folder / split / name / f"{i:04}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * c + i + 10**6 * (split != "train"), **size).save(file)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tree(root / "own", {"train": 20, "test": 7})
    return root


@pytest.fixture
def broken(tmp_path):
    """A tree of 60 and, of those, four files that are no pictures."""
    tree = write_tree(tmp_path / "own", {"train": 20, "test": 1}) / "train"
    (tree / "ant/0003.jpg").write_bytes(b"")
    whole = (tree / "ant/0004.jpg").read_bytes()
    (tree / "ant/0004.jpg").write_bytes(whole[: len(whole) // 2])
    (tree / "bee/0005.jpg").write_text("a text")
    (tree / "cat/0006.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(500))
    (tree / "cat/x.jpg").mkdir()
    return tmp_path


def load(root, split="train", name="own", size=32, **options):
    return data.load(name, split, root=root, size=size, stream=True, **options)


def with_workers(images, workers):
    """The set, decoded by so many processes."""
    return replace(images, images=replace(images.images, workers=workers))


def drain(images, batch_size=8, **options):
    pairs = list(data.batches(images, batch_size, **options))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The same as in memory


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", [{}, {"train": True}, {"resolution": 12}])
def test_batches_are_those_of_the_set_in_memory(root, split, options):
    streamed, held = (
        data.load("own", split, root=root, size=32, stream=stream)
        for stream in (True, False)
    )
    assert streamed.streamed and not held.streamed
    assert (streamed.mean, streamed.std, streamed.pad) == (held.mean, held.std, 4)
    assert same(drain(streamed, **options), drain(held, **options))


def test_parts_of_a_set_are_those_of_the_set_in_memory(root):
    streamed, held = (
        data.load("own", "train", root=root, size=32, stream=stream)
        for stream in (True, False)
    )
    pairs = [data.split_validation(streamed), data.split_validation(held)]
    chosen = [images.take(17, seed=3).scale(14) for images, _ in pairs]
    assert chosen[0].shape == (3, 14, 14) and repr(chosen[0]) == repr(chosen[1])
    assert same(*(drain(images, train=True, epoch=2) for images in chosen))
    assert torch.equal(chosen[0].images[5], chosen[1].images[5])
    shown = torch.stack(list(chosen[0].images))
    assert torch.equal(shown, chosen[1].images)
    mask = torch.arange(17) % 3 == 0
    assert torch.equal(chosen[0].subset(mask).images.load(), shown[mask])


def test_training_and_evaluation_are_those_of_the_set_in_memory(root):
    results = []
    for stream in (True, False):
        sets = [
            data.load("own", split, root=root, size=32, stream=stream)
            for split in SPLITS
        ]
        torch.manual_seed(0)
        model = models.build("resnet8", num_classes=3)
        recipe = train.Recipe(epochs=1, lr=0.05, batch_size=16)
        train.fit(model, sets[0], sets[1], recipe=recipe)
        train.recalibrate(model, sets[0], batch_size=16)
        measured = train.evaluate(model, sets[1], batch_size=8)
        hits = train.find_hits(model, sets[1], batch_size=5)
        results.append((model.state_dict(), measured, hits))
    for key, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][key], rtol=1e-6, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert torch.equal(results[0][2], results[1][2])


def test_a_thousand_pictures_come_once_each(tmp_path):
    """JPEG files of 32 x 40 pixels, each told by its colour."""
    for i in range(1000):
        file = tmp_path / f"own/train/c{i % 4}/{i:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = (i % 10 * 25, i // 10 % 10 * 25, i // 100 * 25)
        Image.new("RGB", (40, 32), colour).save(file, quality=95, subsampling=0)
    images = load(tmp_path)
    x, y = drain(images, 50, train=True, augment=False)
    values = x * torch.tensor(images.std).view(3, 1, 1)
    values = 255 * (values + torch.tensor(images.mean).view(3, 1, 1))
    assert (values - values.mean((2, 3), keepdim=True)).abs().max() < 1
    found = (values.mean((2, 3)) / 25).round().long() @ torch.tensor([1, 10, 100])
    assert found.sort().values.tolist() == list(range(1000))
    assert torch.equal(found % 4, y) and not torch.equal(found, found.sort().values)


# Order and draws


@pytest.mark.parametrize("classes", [("ant", "bee", "cat"), ("n00000001", "n00000002")])
def test_nothing_depends_on_the_number_of_workers(tmp_path, classes):
    write_tree(tmp_path / "own", {"train": 12}, classes=classes)
    images = load(tmp_path)
    state = torch.get_rng_state()
    streams = [
        drain(with_workers(images, workers), 5, train=True, seed=1, epoch=2)
        for workers in (0, 1, 2)
    ]
    assert same(streams[0], streams[1]) and same(streams[0], streams[2])
    assert torch.equal(torch.get_rng_state(), state)
    other = drain(images, 5, train=True, seed=1, epoch=3)
    assert not torch.equal(streams[0][0], other[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_stream_that_begins_at_a_batch_is_the_tail(root, monkeypatch, stream):
    images = data.load("own", "train", root=root, size=32, stream=stream)
    whole = list(data.batches(images, 8, train=True, epoch=1))
    assert len(whole) == 7
    asked, read = [], listing.Files.open
    monkeypatch.setattr(
        listing.Files, "open", lambda self, i: asked.append(i) or read(self, i)
    )
    if stream:
        images = with_workers(images, 0)
    tail = list(data.batches(images, 8, train=True, epoch=1, start=4))
    assert len(tail) == 3 and all(map(same, tail, whole[4:]))
    assert len(asked) == (24 if stream else 0)
    assert list(data.batches(images, 8, train=True, start=7)) == []


def test_crops_by_area_follow_seed_epoch_and_picture(tmp_path):
    write_tree(tmp_path / "own", {"train": 6}, classes=("n00000001", "n00000002"))
    images = load(tmp_path)
    assert (
        images.images.fit.area and images.pad == 0 and images.images.fit.shorter == 37
    )
    index = images.images.index
    key = (4, 7, int(index[3]))
    content = images.images.source.open(3).read()
    first, again, other = (
        pictures.show(content, images.images.fit, k) for k in (key, key, (4, 8, 3))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    batch = next(images.images.read([[3, 1]], (4, 7)))
    assert torch.equal(batch[0], first)
    shares = list(images.images.read([[3], [], [1]], (4, 7)))  # of batches, by rank
    assert torch.equal(torch.cat(shares), batch) and shares[1].shape == (0, 32, 32, 3)
    part = images.subset([5, 3]).images  # a picture keeps its crops in a part
    assert torch.equal(next(part.read([[1]], (4, 7)))[0], first)


# Broken files


def test_broken_files_are_named_and_replaced_within_their_class(broken, capsys):
    images = load(broken, broken=0.1)
    assert len(images) == 60
    capsys.readouterr()
    for workers in (0, 2):
        x, y = drain(with_workers(images, workers), 8)
        assert x.shape == (60, 3, 32, 32) and torch.equal(y, images.labels)
        for lost, stand_in in ((3, 5), (4, 5), (25, 26), (46, 47)):
            assert torch.equal(x[lost], x[stand_in])
    out = capsys.readouterr().out.strip()
    assert len(out.splitlines()) <= 1
    mine = broken / "own/train"
    named = [str(mine / n) for n in ("ant/0003.jpg", "ant/0004.jpg", "bee/0005.jpg")]
    text = images.images.source.describe_broken()
    assert all(f"{name}: not a readable image (" in text for name in named)
    assert text.endswith("...: 4 of 60 files cannot be read")
    last = images.subset([6]), images.subset([4, 6, 3])  # none after it, in its part
    assert torch.equal(last[0].images[0], last[1].images[0])


@pytest.mark.parametrize("stream", [True, False])
def test_too_many_broken_files_are_an_error(broken, stream):
    with pytest.raises(
        ValueError, match=r"0003\.jpg: not .* files cannot be read, abo"
    ):
        images = data.load("own", "train", root=broken, size=32, stream=stream)
        drain(images)


def test_a_class_without_a_readable_picture_is_an_error(tmp_path):
    tree = write_tree(tmp_path / "own", {"train": 2}) / "train"
    images = load(tmp_path, broken=0.9)
    for file in (tree / "bee").glob("*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bee/0000.*none is left of a class"):
        drain(images)


def test_a_disk_that_goes_away_is_one_line(tmp_path):
    write_tree(tmp_path / "own", {"train": 5})
    images = load(tmp_path)
    (tmp_path / "own/train").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"No such file or directory.*cannot be read"):
        drain(with_workers(images, 2))


# Which sets are streamed


def test_a_set_that_does_not_fit_is_streamed(root, monkeypatch, capsys):
    needed = 60 * 32 * 32 * 3 / 1e9
    for limit, streamed in ((needed * 1.001, False), (needed * 0.999, True)):
        monkeypatch.setenv("PRUNING_MEMORY", f"{limit:.9f}")
        assert data.load("own", "train", root=root, size=32).streamed == streamed
    assert "own/train: streamed from disk, 0.00 GB" in capsys.readouterr().out
    held = data.load("own", "train", root=root, size=32, stream=False)
    assert not held.streamed
    monkeypatch.setenv("PRUNING_MEMORY", "8 GB")
    with pytest.raises(ValueError, match="PRUNING_MEMORY must be a float"):
        data.load("own", "train", root=root, size=32)
    monkeypatch.setenv("PRUNING_WORKERS", "-1")
    with pytest.raises(ValueError, match="PRUNING_WORKERS must be"):
        drain(load(root))


def test_half_of_the_memory_is_the_limit(root, monkeypatch):
    monkeypatch.setattr(data.files, "memory_size", lambda: 2 * 60 * 32 * 32 * 3 - 2)
    assert data.load("own", "train", root=root, size=32).streamed


def test_stages_run_on_a_streamed_set_of_mixed_sizes(tmp_path, monkeypatch):
    write_tree(tmp_path / "own", {"train": 9, "test": 4})
    write_tree(tmp_path / "own", {"train": 3}, height=52, width=33, suffix="png")
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PRUNING_MEMORY", "0.0000001")
    sets = stages.load_sets("own", size=24, n_train=20)
    assert sets.train.streamed and sets.test.streamed
    recipe = train.Recipe(epochs=1, batch_size=10)
    kept = [
        stages.make_baseline(sets, run="own/x", net="resnet8", recipe=recipe)
        for _ in range(2)
    ]
    assert same(*(model.state_dict().values() for model in kept))
    with pytest.raises(ValueError, match="pass size="):
        stages.load_sets("own")


def test_grey_sets_have_one_channel_as_in_memory(tmp_path):
    for name in ("ant", "bee"):
        for i in range(3):
            file = tmp_path / "own/train" / name / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i).convert("L").save(file)
    streamed, held = (
        data.load("own", "train", root=tmp_path, size=20, stream=stream)
        for stream in (True, False)
    )
    assert streamed.shape == (1, 20, 20)
    assert same(drain(streamed), drain(held))


def test_checkpoints_tell_streamed_sets_apart(root, tmp_path):
    write_tree(tmp_path / "own", {"train": 20})
    sets = load(root), load(tmp_path), load(tmp_path, size=24)
    digests = [train.checkpoint.digest_images(images) for images in sets]
    assert digests[0] == digests[1] != digests[2]
    some = load(tmp_path).subset(range(59))
    assert train.checkpoint.digest_images(some) != digests[1]
    picture(99).save(tmp_path / "own/train/ant/0000.jpg")
    changed = train.checkpoint.digest_images(load(tmp_path))
    assert changed != digests[1]


# ImageNet as people have it


SYNSETS = ("n01440764", "n01443537", "n02129604")
IDS = {"n02129604": 1, "n01440764": 2, "n01443537": 3}  # not the alphabet's order
TRUTH = [2, 1, 3, 3, 1]


def write_devkit(folder):
    """The two files that count, with an inner node that has children."""
    rows = [(i, w, "a cat, a dog", "gloss", 0) for w, i in IDS.items()]
    rows.append((4, "n00000001", "an animal", "gloss", 3))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    table = np.empty((len(rows), 1), dtype=[*kinds, ("num_children", "O")])
    for i, row in enumerate(rows):
        table[i, 0] = row
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data/meta.mat", {"synsets": table})
    text = "".join(f"{number}\n" for number in TRUTH)
    (folder / "data" / listing.TRUTH).write_text(text)
    return folder


@pytest.fixture
def miniature(tmp_path):
    """train/<synset> and a flat val of five; the last is not there."""
    write_tree(tmp_path / "imagenet", {"train": 4}, classes=SYNSETS, suffix="JPEG")
    (tmp_path / "imagenet/val").mkdir()
    for i in range(1, 5):
        name = f"val/ILSVRC2012_val_{i:08}.JPEG"
        picture(i, 300, 280).save(tmp_path / "imagenet" / name)
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "archive", "meta.bin"])
def test_a_flat_val_is_labelled_by_the_devkit(miniature, monkeypatch, kind):
    home = miniature / "imagenet"
    devkit = write_devkit(home / listing.DEVKIT)
    if kind != "folder":
        archive = home / f"{listing.DEVKIT}.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            file.add(devkit, listing.DEVKIT)
        devkit.rename(home / "elsewhere")
        digest = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (archive.name, digest))
    if kind == "meta.bin":
        imagenet.parse_devkit_archive(home)
        archive.unlink()
    before = sorted(home.iterdir())
    train_set = data.load("imagenet", "train", root=miniature)
    val = data.load("imagenet", "test", root=miniature, like=train_set)
    assert train_set.classes == val.classes == SYNSETS and val.streamed
    assert [val.classes[label] for label in val.labels] == [
        "n01440764", "n02129604", "n01443537", "n01443537"
    ]  # fmt: skip
    assert val.shape == (3, 224, 224) and val.mean == (0.485, 0.456, 0.406)
    assert sorted(home.iterdir()) == before


def test_val_in_folders_needs_no_devkit_and_a_flat_one_says_so(miniature):
    with pytest.raises(
        ValueError, match=r"lie in no folders of classes; .*labels them"
    ):
        data.load("imagenet", "test", root=miniature)
    flat = miniature / "imagenet/val"
    for synset, file in zip(SYNSETS, sorted(flat.glob("*")), strict=False):
        (flat / synset).mkdir()
        file.rename(flat / synset / file.name)
    assert data.load("imagenet", "test", root=miniature).labels.tolist() == [0, 1, 2]
    (miniature / "imagenet/train").rename(miniature / "aside")
    told = models.find_weights("resnet18").transforms()
    alone = data.load("imagenet", "test", root=miniature, transforms=told)
    assert alone.classes == SYNSETS


def test_a_devkit_that_does_not_fit_is_one_line(miniature):
    devkit = write_devkit(miniature / "imagenet" / listing.DEVKIT)
    truth = devkit / "data" / listing.TRUTH
    truth.write_text("1\n2\n3\n")
    with pytest.raises(ValueError, match=r"val_00000004\.JPEG: not ILSVRC2012.*0003,"):
        data.load("imagenet", "test", root=miniature)
    truth.write_text("1\n2\n9\n")
    with pytest.raises(ValueError, match="data: not a readable devkit"):
        data.load("imagenet", "test", root=miniature)


@pytest.mark.parametrize("name", ["ResNet18_Weights", "EfficientNet_B0_Weights"])
def test_pictures_are_prepared_as_the_weights_say(miniature, name):
    """decode_jpeg and PIL differ by some grey levels at edges; scaling by rounding."""
    write_devkit(miniature / "imagenet" / listing.DEVKIT)
    weights = torchvision.models.get_weight(f"{name}.IMAGENET1K_V1")
    prepare = weights.transforms()
    images = data.load("imagenet", "test", root=miniature, transforms=prepare)
    x, _ = drain(images, 2)
    std = torch.tensor(prepare.std).view(3, 1, 1)
    for i, ours in enumerate(x):
        file = miniature / f"imagenet/val/ILSVRC2012_val_{i + 1:08}.JPEG"
        raw = torchvision.io.decode_jpeg(torchvision.io.read_file(str(file)))
        levels = (255 * std * (ours - prepare(raw))).abs()
        assert levels.max() < 1.01  # one grey level
        levels = (255 * std * (ours - prepare(Image.open(file).convert("RGB")))).abs()
        assert levels.max() < 8 and levels.mean() < 0.7


def test_published_weights_are_evaluated_by_name(miniature, monkeypatch):
    write_devkit(miniature / "imagenet" / listing.DEVKIT)
    weights = models.find_weights(
        "squeezenet1_1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    )
    torch.manual_seed(0)
    trained = torchvision.models.squeezenet1_1().eval()
    (miniature / "weights").mkdir()
    torch.save(trained.state_dict(), miniature / "weights/x.pth")
    digest = hashlib.sha256((miniature / "weights/x.pth").read_bytes()).hexdigest()
    file = (miniature / "weights/x.pth").rename(
        miniature / f"weights/squeezenet1_1-{digest[:8]}.pth"
    )
    monkeypatch.setattr(weights.value, "url", f"https://made.up/{file.name}")
    monkeypatch.setenv("PRUNING_DATA", str(miniature))
    monkeypatch.setenv("TORCH_HOME", str(miniature / "torch"))
    images = data.load("imagenet", "test", transforms=weights.transforms())
    model = models.build("squeezenet1_1", num_classes=1000, pretrained=str(weights))
    measured = train.evaluate(model, images, batch_size=3)
    prepare, losses = weights.transforms(), []
    for i, label in enumerate(images.labels):
        name = f"imagenet/val/ILSVRC2012_val_{i + 1:08}.JPEG"
        raw = torchvision.io.decode_jpeg(
            torchvision.io.read_file(str(miniature / name))
        )
        with torch.inference_mode():
            output = trained(prepare(raw)[None])
        losses.append(nn.functional.cross_entropy(output, label[None]).item())
    assert measured["loss"] == pytest.approx(np.mean(losses), abs=1e-3)


# Tar shards


def write_shards(folder, tree, split, *, per_shard=25):
    """The pictures of a tree's split as WebDataset's writer lays them out."""
    source, _ = listing.list_tree(tree / split)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(source)):
        if i % per_shard == 0:
            tar = tarfile.open(folder / f"{split}-{i // per_shard:06}.tar", "w")
        add(tar, f"{i:06}.cls", str(source.labels[i]).encode())
        add(tar, f"{i:06}.jpg", source.open(i).read())
        if i % per_shard == per_shard - 1 or i == len(source) - 1:
            tar.close()
    return folder


def add(tar, name, content=b"", **changes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content) if content else None)


@pytest.fixture(scope="module")
def shards(root):
    for split in SPLITS:
        write_shards(root / "tars", root / "own", split)
    return root


def test_tars_give_the_tensors_of_the_folder(shards):
    for split in SPLITS:
        tars, tree = (load(shards, split, name) for name in ("tars", "own"))
        assert tars.classes == ("0", "1", "2") and len(tars) == len(tree)
        for options in ({}, {"train": True, "epoch": 3}):
            assert same(drain(tars, **options), drain(tree, **options))
    held = data.load("tars", "train", root=shards, size=32, stream=False)
    assert torch.equal(held.images, load(shards).images.load())


def test_webdataset_reads_the_same_samples(shards):
    webdataset = pytest.importorskip("webdataset", reason="extra bench not installed")
    source = load(shards, name="tars").images.source
    files = sorted(map(str, (shards / "tars").glob("train*.tar")))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [int(sample["cls"]) for sample in samples] == source.labels.tolist()
    for i, sample in enumerate(samples):
        assert sample["jpg"] == source.open(i).read()
        assert sample["__key__"] == source.names[i].partition("/")[2].removesuffix(
            ".jpg"
        )


JPEG = io.BytesIO()
picture(0).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()
HOSTILE = {
    "no label": ([("a.jpg", JPEG)], "a has 1 images and 0 labels"),
    "no image": ([("a.cls", b"0")], "a has 0 images and 1 labels"),
    "unpaired": (
        [("a.jpg", JPEG), ("b.cls", b"0"), ("a.cls", b"0"), ("b.jpg", JPEG)],
        "a has 1 images and 0 labels",
    ),
    "twice": ([("a.jpg", JPEG), ("a.png", JPEG), ("a.cls", b"0")], "2 images and 1 l"),
    "two labels": ([("a.jpg", JPEG), ("a.cls", b"0"), ("a.CLS", b"1")], "and 2 labels"),
    "word": ([("a.jpg", JPEG), ("a.cls", b"ant")], "a.cls holds 'ant', expected"),
    "negative": ([("a.jpg", JPEG), ("a.cls", b"-1")], "a.cls holds '-1', expected"),
    "gap": ([("a.jpg", JPEG), ("a.cls", b"2")], "no train image of class 0"),
    "nothing": ([("readme.txt", b"?")], "no KEY.jpg with KEY.cls in it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tars_that_do_not_fit_are_one_line(tmp_path, case):
    members, expected = HOSTILE[case]
    (tmp_path / "own").mkdir()
    with tarfile.open(tmp_path / "own/train.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    with pytest.raises(ValueError, match=expected) as caught:
        load(tmp_path)
    assert str(tmp_path / "own") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["huge", "link", "cut", "compressed", "text", "label"])
def test_damaged_tars_are_one_line(tmp_path, case, shards):
    file = tmp_path / "own" / "train-0.tar"
    file.parent.mkdir()
    if case == "text":
        file.write_text("no tar")
    with tarfile.open(file, "w:gz" if case == "compressed" else "w") as tar:
        add(tar, "a.cls", b"0")
        if case == "link":
            add(tar, "a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        elif case == "huge":
            header = tarfile.TarInfo("a.jpg")
            header.size = 10**12
            tar.fileobj.write(header.tobuf())
            tar.offset += 512
        else:
            add(tar, "a.jpg", JPEG)
    expected = {
        "huge": "not a readable tar", "link": "a has 0 images and 1 labels",
        "cut": "train-0.tar: ", "compressed": "not a readable tar",
        "text": "not a readable tar", "label": "labels run from 3 to 3, expected 0..2",
    }[case]  # fmt: skip
    if case == "cut":
        file.write_bytes(file.read_bytes()[:1900])
    if case == "text":
        file.write_text("no tar" * 100)
    like, split = None, "train"
    if case == "label":
        file = file.rename(file.with_name("test.tar"))
        with tarfile.open(file, "w") as tar:
            add(tar, "a.jpg", JPEG)
            add(tar, "a.cls", b"3")
        like, split = load(shards), "test"
    with pytest.raises(ValueError, match=expected) as caught:
        load(tmp_path, split, like=like)
    assert str(tmp_path / "own") in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_of_one_set_are_not_mixed(tmp_path, shards):
    write_tree(tmp_path / "own", {"train": 1})
    (tmp_path / "own/train.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="both image folders and tar shards, keep one"):
        load(tmp_path)
    np.savez(tmp_path / "train.npz", images=np.zeros((1, 2, 2, 3), np.uint8))
    (tmp_path / "flat").mkdir()
    (tmp_path / "train.npz").rename(tmp_path / "flat/train.npz")
    with pytest.raises(ValueError, match="stream=True is for image folders and tars"):
        load(tmp_path, name="flat")


# Listing


def test_names_come_back_as_they_went_in():
    names = ["a/b.jpg", "", "ä/日本.png", "\udcff.jpg", "x" * 300]
    table = listing.Names(iter(names))
    assert [table[i] for i in range(len(table))] == names


def test_links_and_hidden_files(tmp_path):
    tree = write_tree(tmp_path / "own", {"train": 2}, classes=("ant",)) / "train"
    (tree / "bee").symlink_to(tree / "ant")  # a class may be a link
    (tree / "ant/loop").symlink_to(tree)  # what is below may not be a folder's
    (tree / "ant/.hidden.jpg").write_bytes(b"")
    (tree / "ant/lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source, classes = listing.list_tree(tree)
    assert classes == ("ant", "bee") and source.labels.tolist() == [0] * 3 + [1] * 3
    assert [source.names[i] for i in range(3)] == [
        "ant/0000.jpg", "ant/0001.jpg", "ant/lost.jpg"
    ]  # fmt: skip
    assert paths.shown(source.name(0))
