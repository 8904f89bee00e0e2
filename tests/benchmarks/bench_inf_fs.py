"""What Inf-FS costs beside the textbook way: SciPy's ranks, an eig and an inverse.

    .venv/bin/python tests/benchmarks/bench_inf_fs.py [--features 1024] [--threads 1]

Correlated responses after a ReLU (about 60 % zeros), one process, both ways in turns,
so that a busy machine slows them alike. The same ranking is asserted. `spearmanr`
computes p-values as well; `corrcoef` is SciPy's ranks and NumPy's correlation of them,
without. On a machine with other work, `--clock cpu --threads 1` leaves out the waiting.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from lib.nisp.inf_fs import measure_deviation, score_graph, spearman, weigh_edges

ALPHA = 0.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GOALS = {"ranks and correlation": 5, "after the ranks": 50}


def draw_features(samples: int, features: int) -> Tensor:
    """Float32 [samples, features] of 32 hidden causes and noise, rectified."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(samples, 32, generator=generator)
    mix = torch.randn(32, features, generator=generator) / 6
    noise = torch.randn(samples, features, generator=generator)
    return torch.relu(hidden @ mix + 0.7 * noise - 0.3)


def score_textbook(correlation: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Scores from eigenvalues and the inverse."""
    sigma = np.maximum.outer(deviation, deviation)
    sigma = (sigma - sigma.min()) / (sigma.max() - sigma.min())
    edges = ALPHA * sigma + (1 - ALPHA) * (1 - abs(correlation))
    r = 0.9 / np.linalg.eig(edges)[0].real.max()
    identity = np.eye(len(edges))
    return (np.linalg.inv(identity - r * edges) - identity).sum(1)


def score_here(correlation: Tensor, deviation: Tensor) -> Tensor:
    """Scores from power iteration and conjugate gradients."""
    return score_graph(weigh_edges(correlation, deviation, alpha=ALPHA))


def time_call(clock: str, call: Callable, *args) -> tuple[float, object]:
    """Seconds, and what came back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    found = call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start, found


def time_round(x: Tensor, device: torch.device, clock: str) -> dict[str, float]:
    """Seconds of every part, once each, and the proof that both ways agree."""
    plain, ours, spent = x.numpy(), x.to(device), {}
    spent["spearmanr"], theirs = time_call(clock, scipy.stats.spearmanr, plain)
    spent["corrcoef"], _ = time_call(
        clock, lambda: np.corrcoef(scipy.stats.rankdata(plain, axis=0).T)
    )
    spent["spearman"], found = time_call(clock, spearman, ours)
    deviation = measure_deviation(ours)
    spent["eig, inv"], expected = time_call(
        clock, score_textbook, theirs.statistic, deviation.cpu().numpy()
    )
    spent["score"], scores = time_call(clock, score_here, found, deviation)
    np.testing.assert_allclose(found.cpu(), theirs.statistic, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.cpu(), expected, rtol=1e-9)
    assert (scores.cpu().numpy().argsort() == expected.argsort()).all(), "other ranking"
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options: SimpleNamespace = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    x = draw_features(options.samples, options.features)
    print(f"{list(x.shape)} float32, {float((x == 0).float().mean()):.0%} zeros")
    time_round(x[:200, :64], device, options.clock)  # warms up
    report([time_round(x, device, options.clock) for _ in range(options.rounds)])


def report(rounds: list[dict[str, float]]) -> None:
    """Print medians, and the ratios beside their goals."""
    for name in rounds[0]:
        took = statistics.median(spent[name] for spent in rounds)
        print(f"{name:12} {1e3 * took:9.1f} ms")
    for title, slow, fast in (
        ("ranks and correlation", "spearmanr", "spearman"),
        ("the same, no p-values", "corrcoef", "spearman"),
        ("after the ranks", "eig, inv", "score"),
    ):
        ratio = statistics.median(spent[slow] / spent[fast] for spent in rounds)
        goal = GOALS.get(title)
        verdict = (
            f", goal {goal}: {'met' if ratio >= goal else 'MISSED'}" if goal else ""
        )
        print(f"{title}: {ratio:.1f} times as fast{verdict}")


if __name__ == "__main__":
    main()
