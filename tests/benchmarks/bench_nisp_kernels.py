"""Time and memory of NISP's kernels against what one would write without.

    .venv/bin/python tests/benchmarks/bench_nisp_kernels.py [--rounds 5] [--threads 1]

On a GPU: plain PyTorch, `torch.compile` of it, and Triton, by CUDA events, with the
bytes that have to be read set against the memory bandwidth of the device. Without a GPU
the PyTorch and NumPy implementations are timed in turns with plain PyTorch and with
SciPy, which says nothing about the Triton kernels. `--clock cpu --threads 1` leaves out
the waiting on a machine with other work. Equal results are asserted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.stats
import torch
from _gpu import find_bandwidth, find_peak, time_on_gpu
from torch import Tensor

from lib.kernels import abs_matmul, backend, centre_ranks

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LINEAR = {
    "ResNet-50 fc": (1, 1000, 2048),
    "AlexNet fc7": (1, 4096, 4096),
    "AlexNet fc6": (1, 4096, 9216),
    "AlexNet fc7, 16 rows": (16, 4096, 4096),
}
LINEAR_ON_GPU = {"VGG-16 fc6": (1, 4096, 25088), "VGG-16 fc7": (1, 4096, 4096)}
SAMPLES = [(5000, 256), (5000, 1024), (50_000, 64)]
SAMPLES_ON_GPU = [(5000, 1024), (50_000, 4096)]
KINDS = {
    "rectified": lambda x: torch.relu(x - 0.3),
    "normal": lambda x: x,
    "few values": lambda x: (4 * x).round(),
}


def multiply_plainly(s: Tensor, weight: Tensor) -> Tensor:
    return s @ weight.double().abs()


def rank_plainly(x: Tensor) -> Tensor:
    """By sorting and searching, with the tensors and waits of library calls."""
    rows = x.T.contiguous()
    keys = rows.sort(1).values
    first = torch.searchsorted(keys, rows)
    last = torch.searchsorted(keys, rows, right=True)
    return (first + last - len(x)).float()


def rank_with_scipy(x: Tensor) -> Tensor:
    ranks = scipy.stats.rankdata(x.numpy(), axis=0).T
    return torch.from_numpy(np.ascontiguousarray(2 * ranks - (len(x) + 1)))


def time_call(call: Callable, clock: str) -> float:
    """Milliseconds, by events on a GPU."""
    if torch.cuda.is_available():
        return time_on_gpu(call)
    start = CLOCKS[clock]()
    call()
    return 1e3 * (CLOCKS[clock]() - start)


def report(title: str, calls: dict, options, moved: int, peak: float) -> None:
    """Medians and ratios to the first call; moved: bytes that have to be read."""
    print(f"\n{title}")
    results = [call() for call in calls.values()]  # warms up as well
    for found in results[1:]:
        torch.testing.assert_close(
            found, results[0], rtol=1e-13, atol=0, check_dtype=False
        )
    spent = [
        [time_call(call, options.clock) for call in calls.values()]
        for _ in range(options.rounds)
    ]
    for k, (name, call) in enumerate(calls.items()):
        took = statistics.median(row[k] for row in spent)
        ratio = statistics.median(row[0] / row[k] for row in spent)
        line = f"  {name:14} {took:9.3f} ms   {ratio:6.2f} x {next(iter(calls))}"
        if torch.cuda.is_available():
            rate = moved / took / 1e6
            line += f"   {rate / peak:4.0%} of bandwidth"
            line += f"   peak {find_peak(call):8.1f} MiB"
        print(line)


def bench_product(shapes: dict, options, device: str, peak: float) -> None:
    for name, (count, depth, width) in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            s = torch.rand(count, depth, dtype=torch.float64, device=device)
            weight = torch.randn(depth, width, device=device).to(dtype)

            def plain(s=s, weight=weight):
                return multiply_plainly(s, weight)

            def ours(s=s, weight=weight):
                return abs_matmul(s, weight)

            calls = {"plain": plain}
            if device == "cuda":
                calls["torch.compile"] = torch.compile(plain)
            calls[f"ours, {backend(s)}"] = ours
            title = f"abs_matmul, {name}: {list(s.shape)} x {list(weight.shape)}"
            report(f"{title}, {dtype}", calls, options, weight.nbytes, peak)


def bench_ranks(samples: list, options, device: str, peak: float) -> None:
    for n, d in samples:
        for kind, change in KINDS.items():
            x = change(torch.randn(n, d, device=device))

            def plain(x=x):
                return rank_plainly(x)

            def scipys(x=x):
                return rank_with_scipy(x)

            def ours(x=x):
                return centre_ranks(x)

            calls = {"plain": plain} if device == "cuda" else {"scipy": scipys}
            if device == "cuda":
                calls["torch.compile"] = torch.compile(plain)
                calls["ours, torch"] = lambda x=x: centre_ranks(x, backend="torch")
            calls[f"ours, {backend(x)}"] = ours
            title = f"centre_ranks, {list(x.shape)} float32, {kind}"
            report(title, calls, options, 2 * x.nbytes, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        peak = find_bandwidth()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at "
              f"{peak:.0f} GB/s")  # fmt: skip
        bench_product({**LINEAR_ON_GPU, **LINEAR}, options, "cuda", peak)
        bench_ranks(SAMPLES_ON_GPU, options, "cuda", peak)
        return
    print(f"no GPU: {torch.get_num_threads()} threads, torch {torch.__version__}; the "
          "Triton kernels are not timed")  # fmt: skip
    bench_product(LINEAR, options, "cpu", 0.0)
    bench_ranks(SAMPLES, options, "cpu", 0.0)


if __name__ == "__main__":
    main()
