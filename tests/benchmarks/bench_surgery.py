"""Plan and surgery against Torch-Pruning in CPU time, and how long the import takes.

Run from the repository's root: `python tests/benchmarks/bench_surgery.py [NET ...]`.
Both sides halve the channels of the same net at 224 pixels, in one process on one
thread, in turns; what counts is the process's CPU time, of which a busy machine or a
spinning thread takes nothing. Ours: `build_graph`, `from_scores` on given scores and
`shrink`, its check included. Theirs: dependency graph, `BasePruner` (group L2, ratio
0.5) and one step on a copy made before; it runs the net once, so the ratio is smaller
on a CPU that convolves fast. `--write` puts the ratios into surgery.csv, beside those
of other CPUs; `--profile` prints where our time goes.
"""

import argparse
import copy
import cProfile
import csv
import gc
import pstats
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import baselines, models, settings, surgery
from lib import plan as plans
from lib.graph import build_graph

NETS = ["resnet50", "googlenet", "mobilenet_v2", "densenet121", "alexnet"]
SHAPE = (3, 224, 224)
TABLE = Path(__file__).with_name("surgery.csv")
IMPORTS = ("import torch", "from lib import surgery")


def prune_ours(model: nn.Module, scores: dict) -> nn.Module:
    """From given scores to the smaller net."""
    graph = build_graph(model, SHAPE)
    plan = plans.from_scores(model, scores, SHAPE, rate=0.5, graph=graph)
    return surgery.shrink(model, plan, SHAPE, graph=graph)


def prune_theirs(tp, model: nn.Module) -> nn.Module:
    """The same by Torch-Pruning, which changes the model it is given."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(1, *SHAPE),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    return model


def time_in_turns(ours: Callable, theirs: Callable, copies: list) -> tuple[list, list]:
    """CPU milliseconds of each round; the first of the rounds warms up."""
    found: tuple[list, list] = ([], [])
    for fresh in copies:
        for times, step, model in ((found[0], ours, None), (found[1], theirs, fresh)):
            gc.collect()  # nobody sweeps up after the other
            start = time.process_time()
            step(model)
            times.append(1e3 * (time.process_time() - start))
    return found[0][1:], found[1][1:]


def bench(name: str, tp, repeats: int) -> dict:
    """One row of the table."""
    model = models.build(name, num_classes=1000).eval()
    scores = baselines.l1(model)
    copies = [copy.deepcopy(model) for _ in range(repeats + 1)]
    times = time_in_turns(
        lambda _: prune_ours(model, scores), lambda m: prune_theirs(tp, m), copies
    )
    ours, theirs = map(statistics.median, times)
    return {
        "net": name,
        "ours_ms": round(ours, 1),
        "theirs_ms": round(theirs, 1),
        "ratio": round(theirs / ours, 2),
        "torch": torch.__version__,
        "torch_pruning": version("torch_pruning"),
        "cpu": settings.cpu_model(),
    }


def time_imports(repeats: int) -> str:
    """Wall seconds of each import in fresh processes, in turns, and their ratio."""
    found: dict[str, list[float]] = {line: [] for line in IMPORTS}
    for _ in range(repeats):
        for line in IMPORTS:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True)
            found[line].append(time.perf_counter() - start)
    torch_s, ours_s = (statistics.median(found[line]) for line in IMPORTS)
    return (
        f"import: torch {torch_s:.2f} s, ours {ours_s:.2f} s, {ours_s / torch_s:.2f}x"
    )


def profile(name: str) -> None:
    """Our functions by own time."""
    model = models.build(name, num_classes=1000).eval()
    scores = baselines.l1(model)
    prune_ours(model, scores)
    with cProfile.Profile() as profiler:
        prune_ours(model, scores)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Print the table, or profiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=NETS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.profile:
        for name in options.nets:
            profile(name)
        return
    import torch_pruning as tp  # pip install -e .[bench]

    rows = []
    for name in options.nets:
        rows.append(bench(name, tp, options.repeats))
        print(*(f"{value!s:>13}" for value in rows[-1].values()), flush=True)
    print(time_imports(options.repeats))
    if options.write:
        with TABLE.open(encoding="utf-8") as file:  # of other CPUs: ratios differ
            ours = {(row["net"], row["cpu"]) for row in rows}
            before = list(csv.DictReader(file))
        rows = [r for r in before if (r["net"], r["cpu"]) not in ours] + rows
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
