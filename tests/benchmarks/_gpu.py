"""What the benchmarks of kernels share: time, memory and bandwidth of a GPU.

No benchmark itself: `make bench` runs the files whose names begin with a letter.
"""

import statistics
from collections.abc import Callable

import torch


def time_on_gpu(call: Callable) -> float:
    """Milliseconds of a call, by CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def find_peak(call: Callable) -> float:
    """MiB of a GPU that a call needs beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def find_bandwidth(rounds: int = 20) -> float:
    """GB/s of the device memory, measured by a large copy, after three to warm up."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [time_on_gpu(lambda: target.copy_(source)) for _ in range(rounds + 3)]
    return 2 * source.numel() / statistics.median(times[3:]) / 1e6
