"""Plan and surgery against Torch-Pruning: seconds per step, side by side.

Run from the repository's root: `python tests/benchmarks/bench_surgery.py [NET ...]`.
Both sides halve the channels of the same net in one process at 224 pixels on two
threads. Ours: `from_scores` on given scores and `shrink`, all tracing included.
Theirs: dependency graph, `BasePruner` (group L2, ratio 0.5) and one step.
`--profile` prints where our time goes.
"""

import argparse
import copy
import cProfile
import pstats
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import baselines, models, surgery
from lib import plan as plans
from lib.graph import build_graph

NETS = ["densenet121", "alexnet", "resnet50", "googlenet", "mobilenet_v2"]
SHAPE = (3, 224, 224)
RATE = 0.5


def time_all(steps: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in `steps`, which take turns; one round warms up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def prune_ours(model: nn.Module, scores: dict) -> nn.Module:
    """From given scores to the smaller net."""
    plan = plans.from_scores(model, scores, SHAPE, rate=RATE)
    return surgery.shrink(model, plan, SHAPE)


def prune_theirs(tp, model: nn.Module) -> nn.Module:
    """The same by Torch-Pruning, which changes the model it is given."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(1, *SHAPE),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATE,
        ignored_layers=[last],
    )
    pruner.step()
    return model


def list_steps(model: nn.Module, tp, copies: list[nn.Module]) -> dict[str, Callable]:
    """What is timed; each round of Torch-Pruning takes one of `copies`."""
    scores = baselines.l1(model)
    plan = plans.from_scores(model, scores, SHAPE, rate=RATE)
    steps = {
        "ours": lambda: prune_ours(model, scores),
        "trace": lambda: build_graph(model, SHAPE),
        "plan": lambda: plans.from_scores(model, scores, SHAPE, rate=RATE),
        "shrink": lambda: surgery.shrink(model, plan, SHAPE),
    }
    if tp is not None:
        steps["theirs"] = lambda: prune_theirs(tp, copies.pop())
    return steps


def bench(name: str, tp, repeats: int) -> None:
    """One row of the table."""
    model = models.build(name, num_classes=1000).eval()
    copies = [copy.deepcopy(model) for _ in range(repeats + 1 if tp else 0)]
    times = time_all(list_steps(model, tp, copies), repeats)
    median = {n: statistics.median(t) for n, t in times.items()}
    row = [f"{median[n]:8.3f}" for n in ("ours", "trace", "plan", "shrink")]
    row.append(f"{min(times['ours']):8.3f}")
    if tp is not None:
        ratio = median["theirs"] / median["ours"]
        row += [f"{median['theirs']:8.3f}", f"{min(times['theirs']):8.3f}"]
        row.append(f"{ratio:7.1f}x")
    print(f"{name:14}", *row, flush=True)


def profile(name: str) -> None:
    """Our functions by cumulative and by own time."""
    model = models.build(name, num_classes=1000).eval()
    scores = baselines.l1(model)
    prune_ours(model, scores)
    with cProfile.Profile() as profiler:
        prune_ours(model, scores)
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats(35)
    stats.sort_stats("tottime").print_stats(20)


def find_torch_pruning():
    """The package, or None with a line that says so."""
    try:
        import torch_pruning
    except ImportError:
        print("torch_pruning is not installed (pip install -e .[bench]): ours alone")
        return None
    return torch_pruning


def main() -> None:
    """Print the table, or profiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=NETS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.profile:
        for name in options.nets:
            profile(name)
        return
    tp = find_torch_pruning()
    heads = ["ours", "trace", "plan", "shrink", "ours min"]
    heads += ["theirs", "min", "ratio"] if tp else []
    threads = torch.get_num_threads()
    print(f"seconds, median of {options.repeats}, {SHAPE[1]} px, {threads} threads")
    print(f"{'net':14}", *(f"{head:>8}" for head in heads))
    for name in options.nets:
        bench(name, tp, options.repeats)


if __name__ == "__main__":
    main()
