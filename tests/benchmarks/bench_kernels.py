"""Time, bytes and memory of the fused kernels against what one would write without.

    .venv/bin/python tests/benchmarks/bench_kernels.py [--rounds 30] [--threads 1]
    .venv/bin/python tests/benchmarks/bench_kernels.py --large [--threads 1]

`--large` writes mmd.csv: the MMD of two samples of 10,000 rows, plain and in tiles,
time and memory beyond the samples, each in a process of its own. Plain and with
gradients it takes some 9 GB.

On a GPU: plain PyTorch, `torch.compile` of it, and Triton, forward with backward, by
CUDA events; bytes are counted on paper and set against the memory bandwidth of the
device. Without a GPU the PyTorch implementations are timed against plain PyTorch on
small shapes, which says nothing about the Triton kernels.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _gpu import find_bandwidth, find_peak, time_on_gpu
from torch import Tensor, nn

from lib.kernels import backend, mix_norm_relu, mmd2

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)  # in units of the root of twice the features
ON_GPU = {
    "ResNet-50 layer1 conv3, N=256": ((256, 256, 56, 56), torch.bfloat16),
    "ResNet-56 stage 1, N=128": ((128, 16, 32, 32), torch.bfloat16),
    "ResNet-56 stage 2, N=128": ((128, 32, 16, 16), torch.bfloat16),
    "ResNet-56 stage 3, N=128": ((128, 64, 8, 8), torch.bfloat16),
}
ON_CPU = {
    "16 channels": ((64, 16, 32, 32), torch.float32),
    "64 channels": ((64, 64, 8, 8), torch.float32),
    "16 channels, bfloat16": ((64, 16, 32, 32), torch.bfloat16),
}
SAMPLES_ON_GPU = [(1024, 3072), (4096, 2048)]
SAMPLES_ON_CPU = [(256, 256), (1024, 64)]
LARGE = 10_000, 64


def mix_plainly(x: Tensor, beta: Tensor, norm: nn.Module) -> Tensor:
    real, knock = x.chunk(2)
    share = beta.to(x.dtype).view(-1, 1, 1)
    return norm(torch.cat([share * real + (1 - share) * knock, knock])).relu()


def mmd2_plainly(x: Tensor, y: Tensor, bandwidths) -> Tensor:
    """Three whole matrices, float32."""

    def total(a, b):
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        squares = (norms - 2 * a @ b.T).clamp(min=0)
        return sum(torch.exp(-squares / (2 * s * s)) for s in bandwidths)

    def within(a):
        kernel = total(a, a)
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y).mean()


def clock(calls: dict, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns."""
    spent = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            found = time_on_gpu(call) if device == "cuda" else time_on_cpu(call)
            if turn > 2:
                spent[name].append(found)
    return {name: statistics.median(found) for name, found in spent.items()}


def time_on_cpu(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def make_step(function, leaves: list[Tensor], grad: Tensor | None):
    def step():
        torch.autograd.grad(function(*leaves), leaves, grad)

    return step


def report(title: str, calls: dict, rounds: int, device: str, moved: dict, peak: float):
    """Print and give back a row for each version of a call.

    moved: bytes of a call on paper. peak: bandwidth of the device in GB/s.
    """
    print(f"\n{title}")
    found, rows = clock(calls, rounds, device), []
    for name, spent in found.items():
        row = {"call": title, "version": name, "ms": spent}
        line = f"  {name:14} {spent:9.3f} ms   {found['plain'] / spent:5.2f} x plain"
        if name in moved and device == "cuda":
            row["MB"] = moved[name] / 1e6
            row["share of bandwidth"] = row["MB"] / spent / peak
            line += f"   {row['MB']:8.1f} MB"
            line += f"   {row['share of bandwidth']:4.0%} of bandwidth"
        if device == "cuda":
            row["peak MiB"] = find_peak(calls[name])
            line += f"   peak {row['peak MiB']:8.1f} MiB"
        print(line)
        rows.append(row)
    return rows


def bench_mix(shapes: dict, rounds: int, device: str, peak: float) -> list[dict]:
    rows = []
    for name, (shape, dtype) in shapes.items():
        x = torch.randn(shape, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        grad = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
        beta = torch.rand(shape[1], device=device, requires_grad=True)
        norm = nn.BatchNorm2d(shape[1], track_running_stats=False).to(device)

        def plain(x, beta, norm=norm):
            return mix_plainly(x, beta, norm)

        def ours(x, beta, norm=norm):
            return mix_norm_relu(x, beta, norm.weight, norm.bias)

        calls = {"plain": make_step(plain, [x, beta], grad)}
        if device == "cuda":
            calls["torch.compile"] = make_step(torch.compile(plain), [x, beta], grad)
        calls[f"ours, {backend(x)}"] = make_step(ours, [x, beta], grad)
        size = x.numel() * x.element_size()
        # reads: x twice; x and its gradient twice. writes: y, the gradient to x
        moved = {"ours, triton": 8 * size}
        title = f"mix_norm_relu, {name}, {dtype}"
        rows += report(title, calls, rounds, device, moved, peak)
    return rows


def bench_mmd2(samples: list, rounds: int, device: str, peak: float) -> list[dict]:
    rows = []
    for n, d in samples:
        x, y = (torch.randn(n, d, device=device, requires_grad=True) for _ in "xy")
        widths = [s * (2 * d) ** 0.5 for s in BANDWIDTHS]

        def plain(x, y, widths=widths):
            return mmd2_plainly(x, y, widths)

        def ours(x, y, widths=widths):
            return mmd2(x, y, widths)

        calls = {"plain": make_step(plain, [x, y], None)}
        if device == "cuda":
            calls["torch.compile"] = make_step(torch.compile(plain), [x, y], None)
        calls[f"ours, {backend(x)}"] = make_step(ours, [x, y], None)
        title = f"mmd2, n = m = {n}, d = {d}, {len(widths)} bandwidths, float32"
        rows += report(title, calls, rounds, device, {}, peak)
        if backend(x) == "triton":
            work = 5 * (2 * n) ** 2 * d / 1e9  # half a product forward, two backward
            print(f"  Triton does {work:.1f} GFLOP of products without tensor cores")
    return rows


def measure_large(version: str, passes: str) -> None:
    """Print seconds and MiB of one MMD of large samples."""
    device, (n, d) = "cuda" if torch.cuda.is_available() else "cpu", LARGE
    torch.manual_seed(0)
    x, y = (torch.randn(n, d, device=device, requires_grad="+" in passes) for _ in "xy")
    widths = [s * (2 * d) ** 0.5 for s in BANDWIDTHS]
    function = mmd2_plainly if version == "plain" else mmd2

    def call(x=x, y=y):
        found = function(x, y, widths)
        return torch.autograd.grad(found, (x, y)) if "+" in passes else found

    call(x[:500], y[:500])  # what the libraries need for themselves
    if device == "cuda":
        print(time_on_gpu(call) / 1e3, find_peak(call))
        return
    before, spent = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time_on_cpu(call),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(spent / 1e3, peak / 1024)


def bench_large(threads: int) -> None:
    """Both versions, forward and with gradients, into mmd.csv."""
    import pandas as pd

    rows = []
    for passes in ("forward", "forward + backward"):
        for version in ("plain", "tiled"):
            command = [sys.executable, __file__, "--threads", str(threads)]
            command += ["--child", version, passes]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, mib = map(float, found.stdout.split())
            rows.append([*LARGE, passes, version, round(seconds, 2), round(mib)])
    names = ["n", "d", "passes", "version", "seconds", "peak_mib"]
    table = pd.DataFrame(rows, columns=names)
    table["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"cpu, {threads} threads")  # fmt: skip
    table.to_csv(Path(__file__).with_name("mmd.csv"), index=False)
    print(table.to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    parser.add_argument("--large", action="store_true", help="write mmd.csv")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        measure_large(*options.child)
        return
    if options.large:
        bench_large(torch.get_num_threads())
        return
    if torch.cuda.is_available():
        peak = find_bandwidth()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at "
              f"{peak:.0f} GB/s")  # fmt: skip
        bench_mix(ON_GPU, options.rounds, "cuda", peak)
        bench_mmd2(SAMPLES_ON_GPU, options.rounds, "cuda", peak)
        return
    print(f"no GPU: PyTorch implementations only, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; the Triton kernels are not timed")  # fmt: skip
    bench_mix(ON_CPU, options.rounds, "cpu", 0.0)
    bench_mmd2(SAMPLES_ON_CPU, options.rounds, "cpu", 0.0)


if __name__ == "__main__":
    main()
