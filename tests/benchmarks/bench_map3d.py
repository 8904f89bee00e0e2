"""Time of MAP's own steps: fit, optimum, lattice of real networks; one thread.

    .venv/bin/python tests/benchmarks/bench_map3d.py

Medians of repeated calls in one process.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib import map3d, models

REPEATS = 7


def measure(action, repeats: int = REPEATS) -> float:
    """Median milliseconds of a call, after one to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def make_points() -> pd.DataFrame:
    """13 points of the axis design with a little noise, percent."""
    floors = map3d.find_floors(0.5)
    design = [p for chain in map3d.make_design("axis", floors) for p in chain]
    points = pd.DataFrame(design, columns=["d", "w", "r"])
    u = 1 - points.to_numpy()
    truth = (
        93 * (1 - 0.2 * u[:, 0] ** 3) * (1 - 0.4 * u[:, 1] ** 2) * (1 - u[:, 2] ** 3)
    )
    noise = np.random.default_rng(0).normal(0, 0.2, len(points))
    return points.assign(accuracy=truth + noise)


def cost_numbers(d: float, w: float, r: float) -> float:
    """The paper's formula for numbers only: called point by point."""
    return float(d) * math.pow(w, 2) * math.pow(r, 2)


def main() -> None:
    torch.set_num_threads(1)
    points = make_points()
    fitted = map3d.fit(points)
    times = {
        "fit, lm": measure(lambda: map3d.fit(points)),
        "fit, monotone": measure(lambda: map3d.fit(points, monotone=True)),
        "optimum, formula": measure(lambda: map3d.optimum(fitted, 0.5)),
        "optimum, function": measure(lambda: map3d.optimum(fitted, 0.5, cost_numbers)),
    }
    for name in ("resnet20", "resnet56", "densenet40"):
        model = models.build(name)
        space = map3d.Space(model, (3, 32, 32))
        times[f"space, {name}"] = measure(
            lambda model=model: map3d.Space(model, (3, 32, 32)), 3
        )
        times[f"lattice, {name}"] = measure(
            lambda space=space, model=model: space.lattice(model), 3
        )
        table = space.lattice(model).query("d >= 0.5")
        times[f"rank, {name}"] = measure(
            lambda table=table: map3d.rank_lattice(table, fitted, 0.5)
        )
    for name, milliseconds in times.items():
        print(f"{name:24s} {milliseconds:9.1f} ms")
    total = sum(
        times[name]
        for name in ("fit, lm", "optimum, formula", "lattice, resnet56",
                     "rank, resnet56")
    )  # fmt: skip
    print(f"fit + optimum + lattice of ResNet-56: {total / 1e3:.2f} s (goal 1 s)")


if __name__ == "__main__":
    main()
