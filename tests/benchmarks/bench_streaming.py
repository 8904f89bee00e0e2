"""What streaming costs: listing a million files, decoding by two libraries, workers.

Run from the repository's root: `python tests/benchmarks/bench_streaming.py`. Listing: a
tree of empty files below /tmp, made and removed here, listed by a process of its own;
peak memory is that process's above what it had before (Linux). Decoding: photographs of
500 x 375 pixels from noise that is smoothed, brought to 224 pixels. All seconds are CPU
seconds, those of the workers included. `--write` puts the rows into streaming.csv.
"""

import argparse
import io
import itertools
import multiprocessing
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import data, settings
from lib.data import listing, pictures

TABLE = Path(__file__).with_name("streaming.csv")


def make_photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels, some 50 KB."""
    mix = np.random.default_rng(seed)
    pixels = np.zeros((375, 500, 3))
    for size in (6, 24, 96):
        coarse = Image.fromarray(mix.integers(0, 256, (size, size, 3), np.uint8))
        pixels += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    noise = mix.normal(0, 5, pixels.shape)
    whole = (pixels / 3 + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(whole).save(file, "JPEG", quality=90)
    return file.getvalue()


def list_in_child(root: str, kind: str, pipe) -> None:
    """Send files, CPU seconds and peak MiB of listing `root`."""
    root = Path(root)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = read_status("VmRSS"), time.process_time()
    if kind == "folders":
        found, _ = listing.list_tree(root)
    else:
        found = listing.list_shards(root, sorted(root.glob("*.tar")))
    seconds = time.process_time() - start
    pipe.send((len(found), seconds, (read_status("VmHWM") - before) / 1024))


def read_status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0])


def measure_listing(root: Path, kind: str) -> dict:
    """One row: how long, and how much memory at most."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")  # nothing inherited
    child = context.Process(target=list_in_child, args=(str(root), kind, theirs))
    child.start()
    count, seconds, peak = ours.recv()
    child.join()
    return {"what": f"list {kind}", "count": count, "cpu_s": seconds, "peak_mib": peak}


def bench_listing(folder: Path, files: int, samples: int) -> list[dict]:
    """Folders of 1,000 classes as ImageNet names them, and shards of 10,000."""
    tree = folder / "train"
    for label in range(1000):
        name = f"n{label:08}"
        (tree / name).mkdir(parents=True)
        for i in range(files // 1000):
            open(f"{tree}/{name}/{name}_{i}.JPEG", "x").close()
    rows = [measure_listing(tree, "folders")]
    shutil.rmtree(tree)
    (folder / "tars").mkdir()
    for first in range(0, samples, 10_000):
        with tarfile.open(folder / f"tars/train-{first:07}.tar", "w") as tar:
            for i in range(first, min(first + 10_000, samples)):
                for suffix, text in (("cls", str(i % 1000)), ("jpg", "no picture")):
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text.encode()))
    return [*rows, measure_listing(folder / "tars", "tars")]


def bench_decoding(content: list[bytes], turns: int) -> list[dict]:
    """CPU seconds of the same work: decoding alone, and decoded, scaled, cut out."""
    fit = pictures.Fit(224, 224, 3, 256)
    crop = pictures.Fit(224, 224, 3, 256, area=True)

    def open_with_pil(raw: bytes) -> None:
        np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))

    ways = {
        "PIL": open_with_pil,
        "decode_jpeg": lambda raw: pictures.decode(raw, 3),
        "decode_jpeg, centre of 224": lambda raw: pictures.show(raw, fit),
        "decode_jpeg, random crop of 224": lambda raw: pictures.show(raw, crop, (0, 1)),
    }
    spent = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(turns), ways.items()):
        start = time.process_time()
        for raw in content:
            way(raw)
        spent[name].append(time.process_time() - start)
    return [
        {"what": name, "count": len(content), "cpu_s": min(seconds)}
        for name, seconds in spent.items()
    ]


def bench_workers(folder: Path, content: list[bytes]) -> list[dict]:
    """Passes over a folder with random crops, by so many processes."""
    for i, raw in enumerate(content):
        file = folder / f"own/train/n0000000{i % 2}/{i:05}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)
    images, rows = data.load("own", "train", root=folder), []
    for workers in (0, 1, 2):
        object.__setattr__(images.images, "workers", workers)
        start = spend()
        seen = sum(len(y) for _, y in data.batches(images, 32, train=True))
        row = {"what": f"batches, {workers} workers", "count": seen}
        rows.append(row | {"cpu_s": spend() - start})
    return rows


def spend() -> float:
    """CPU seconds so far, those of children that have ended included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    """Print the table; write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = [make_photograph(seed) for seed in range(options.pictures)]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        rows = bench_decoding(content, options.turns)
        rows += bench_workers(folder, content)
        rows += bench_listing(folder, options.files, options.samples)
    table = pd.DataFrame(rows).assign(
        bytes_each=round(sum(map(len, content)) / len(content)),
        torchvision=version("torchvision"), pillow=version("pillow"),
        cpu=settings.cpu_model(),
    )  # fmt: skip
    table["per_cpu_s"] = (table["count"] / table["cpu_s"]).round()
    table = table.round({"cpu_s": 2, "peak_mib": 0})
    print(table.to_string(index=False))
    if options.write:
        table.to_csv(TABLE, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
