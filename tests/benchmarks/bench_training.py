"""Training throughput: `lib.train.fit` against a plain PyTorch loop, on one CPU.

    .venv/bin/python tests/benchmarks/bench_training.py [--images 1280] [--rounds 3]

ResNet-20 on CIFAR-10 (random pixels of its shape where it is not under the data root),
batches of 128, crop and flip. The plain loop is what tutorials show: float32,
torchvision transforms on PIL images and a DataLoader, in this process and with two
workers. Rounds alternate, so that a busy machine slows all of them alike; `--profile`
also prints where one step of ours spends its time and what each choice is worth. On a
machine that others use too, `--threads 1`: two threads that wait for each other on a
busy core can be 40 times slower than one.
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import time

os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lib import data, models, paths, train
from lib.data import ImageSet
from lib.train.recipe import Recipe, make_optimizer, pick_precision
from lib.train.update import Update

BATCH, GOAL = 128, 1.8


def load_images(count: int) -> ImageSet:
    """CIFAR-10 where it is there, else random pixels of its shape."""
    if (paths.data_root() / "cifar10").is_dir():
        return data.load("cifar10", "train").take(count)
    print("no CIFAR-10 under the data root: random pixels")
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=g)
    names = tuple(map(str, range(10)))
    stats = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    return ImageSet(images, labels, names, "random", *stats, 4, True)


class Pictures(Dataset):
    """The same images as torchvision's data sets give them: PIL, then transforms."""

    def __init__(self, images: ImageSet):
        self.labels = images.labels.tolist()
        to_picture = transforms.ToPILImage()
        self.pictures = [to_picture(x.permute(2, 0, 1)) for x in images.images]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=images.pad),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(images.mean, images.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(self.pictures[i]), self.labels[i]


def build_net() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet20")


class Ours:
    """Epochs of `fit`; its own clock is not used."""

    def __init__(self, images: ImageSet):
        self.images, self.net = images, build_net()

    def epoch(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train.fit(self.net, self.images, epochs=1, lr=0.01, batch_size=BATCH)


class Plain:
    """The loop of a tutorial."""

    def __init__(self, images: ImageSet, workers: int):
        self.net = build_net().train()
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True
        )
        self.loader = DataLoader(
            Pictures(images), BATCH, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip

    def epoch(self) -> None:
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()


def compare(images: ImageSet, rounds: int) -> None:
    runs = {
        "ours": Ours(images),
        "plain, num_workers=0": Plain(images, 0),
        "plain, num_workers=2": Plain(images, 2),
    }
    trained = len(images) // BATCH * BATCH
    rates = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run.epoch()
            if turn:  # the first one warms up
                rates[name].append(trained / (time.perf_counter() - start))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{name:22} {medians[name]:7.0f} images/s   ({spread})")
    best = max(rate for name, rate in medians.items() if name != "ours")
    for name in list(runs)[1:]:
        pairs = zip(rates["ours"], rates[name], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"ours / {name}: {ratio:.2f}")
    verdict = "reached" if medians["ours"] / best >= GOAL else "MISSED"
    print(f"ours / best plain: {medians['ours'] / best:.2f}, goal {GOAL}: {verdict}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, all loops together: {peak:.0f} MiB")


# -- where a step spends its time ------------------------------------------------------


def make_step(precision: str, *, fused=True, channels_last=True) -> Update:
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = build_net().to(memory_format=form).train()
    recipe = Recipe(1, lr=0.01)
    optimizer = make_optimizer(net, recipe, torch.device("cpu"))
    if not fused:
        optimizer = torch.optim.SGD(
            net.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, foreach=True
        )
    made = Update(net, optimizer, recipe, precision)
    made.layout = torch.channels_last  # of the images, as batches make them
    return made


def time_alternating(calls: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns."""
    spent = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in spent.items()}


def profile(images: ImageSet, rounds: int) -> None:
    precision = pick_precision("auto", torch.device("cpu"), nn.Linear(1, 1))
    x, y = next(data.batches(images, BATCH, train=True))
    steps = {
        "as it is": make_step(precision),
        "foreach SGD": make_step(precision, fused=False),
        "float32": make_step("float32"),
        "float32, NCHW": make_step("float32", channels_last=False),
        "NCHW weights": make_step(precision, channels_last=False),
    }
    calls = {name: lambda s=step: s(x, y) for name, step in steps.items()}
    calls["batch only"] = lambda: next(data.batches(images, BATCH, train=True))
    ours = steps["as it is"]
    logits = torch.randn(BATCH, 10, requires_grad=True)
    calls["cross-entropy"] = lambda: ours._loss(logits, y)[0].backward()
    calls["update only"] = ours.optimizer.step
    calls["forward only"] = lambda: forward(ours, x)
    threads = torch.get_num_threads()

    def on_one_thread():
        torch.set_num_threads(1)
        ours(x, y)
        torch.set_num_threads(threads)

    calls["one thread"] = on_one_thread
    found = time_alternating(calls, rounds)
    for name, spent in found.items():
        share = spent / found["as it is"]
        print(f"{name:16} {spent:8.2f} ms   {share:.3f} of a step")
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as recorded:
        ours(x, y)
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=14)
    print(table)


def forward(step: Update, x) -> None:
    with torch.autocast("cpu", torch.bfloat16, step.autocast, cache_enabled=False):
        step.model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    images = load_images(options.images)
    print(f"{images}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    compare(images, options.rounds)
    if options.profile:
        profile(images, 10 * options.rounds)


if __name__ == "__main__":
    main()
