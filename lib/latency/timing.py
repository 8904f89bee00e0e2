"""Networks timed in turns: what one takes beside another, on one thread."""

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lib import cost, settings
from lib.graph.watch import dtype_of
from lib.latency.runtimes import (
    NEEDS,
    Call,
    check_runtime,
    load_onnx,
    one_thread,
    prepare,
    read_onnx,
    version_of,
)
from lib.settings import CHW

WARMUP = 2  # calls before the clock runs
ORIGINAL = "original"
BATCH = 8  # images, of what a results table says


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, one number per turn: of the CPU, and on the wall."""

    cpu: np.ndarray
    wall: np.ndarray

    def quartiles(self, clock: str = "cpu") -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        low, middle, high = np.percentile(getattr(self, clock), [25, 50, 75])
        return float(low), float(middle), float(high)


def interleave(
    calls: Mapping[str, Call], *, turns: int = 11, least: float = 0.02
) -> dict[str, Timing]:
    """Time calls in turns, each turn as many calls as take `least` CPU seconds.

    ValueError for fewer than one turn.
    """
    if turns < 1 or not calls:
        raise ValueError(f"need a call and turns >= 1, got {len(calls)} and {turns}")
    found: dict[str, list] = {name: [] for name in calls}
    # In turns, so that what the machine does meanwhile meets all alike, and each turn
    # in the opposite order to the one before: who comes first finds colder caches and
    # clocks, and would pay for it every time.
    with one_thread():
        counts = {name: _warm_up(call, least) for name, call in calls.items()}
        for turn in range(turns):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                found[name].append(_time(calls[name], counts[name]))
    return {name: Timing(*np.array(rows).T) for name, rows in found.items()}


def _warm_up(call: Call, least: float) -> int:
    """How many calls one turn takes."""
    for _ in range(WARMUP):  # the first ones allocate, compile and pick algorithms
        call()
    # By the slower clock: on a GPU the CPU has next to nothing to do.
    cpu, wall = _time(call, 1)
    return max(1, round(1e3 * least / max(cpu, wall, 1e-3)))


def _time(call: Call, count: int) -> tuple[float, float]:
    """CPU and wall milliseconds of one of `count` calls."""
    # The clock of the process stands still while other programs run, the wall's does
    # not; it has ticks of its own, hence many calls between two looks.
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    ends = time.process_time() - cpu, time.perf_counter() - wall
    return 1e3 * ends[0] / count, 1e3 * ends[1] / count


def measure(
    model: nn.Module,
    pruned: nn.Module | Mapping[str, nn.Module],
    input_shape: CHW,
    *,
    batches: Sequence[int] = (1, 8, 64),
    runtimes: Sequence[str] = ("eager",),
    turns: int = 11,
) -> pd.DataFrame:
    """Original and pruned networks side by side: one row for each of them, by cell.

    `pruned` is a network or several by name, `input_shape` (C, H, W). A cell is a
    runtime and a number of images in a batch; in it all networks run in turns on one
    thread, in evaluation, where the model's tensors lie.

    Columns: net, runtime, version, batch; ms with its quartiles ms_low and ms_high (CPU
    milliseconds for one batch; of the wall on a GPU), wall_ms; speedup with quartiles,
    the median over turns of original over pruned; macs_share, the share of MACs kept;
    efficiency, speedup * macs_share: 1 where time falls as MACs do; cpu, its model
    name; threads; load, of the machine. Raises `ValueError` for what cannot run.
    """
    nets = {"pruned": pruned} if isinstance(pruned, nn.Module) else dict(pruned)
    for batch in batches:
        settings.check_int("batches", batch, 1)
    if not nets or ORIGINAL in nets:
        raise ValueError(f"pruned: name one network or more, none '{ORIGINAL}'")
    for runtime in runtimes:
        check_runtime(runtime)
    nets = {ORIGINAL: model, **nets}
    macs = {name: cost.count(net, input_shape).macs for name, net in nets.items()}
    rows: list[dict] = []
    files: dict[str, bytes] = {}
    for runtime in runtimes:
        if runtime in NEEDS and not files:
            files = {name: read_onnx(net, input_shape) for name, net in nets.items()}
        for batch in batches:
            cell = _measure_cell(nets, files, input_shape, runtime, batch, turns)
            for name, row in cell.items():
                share = macs[name] / macs[ORIGINAL]
                efficiency = row["speedup"] * share
                rows.append(row | {"macs_share": share, "efficiency": efficiency})
    return pd.DataFrame(rows).assign(cpu=settings.cpu_model(), threads=1)


def compare(
    model: nn.Module, pruned: nn.Module, input_shape: CHW, *, side: int | None = None
) -> dict:
    """What a results table says of time, as columns of a row, in a second or less.

    ms: milliseconds of `pruned` for 8 images, of `side` pixels if told; time_share:
    those over the model's; timed: what on (runtime, batch, model name of the CPU or
    GPU). Eager, one thread; the clock is that of `measure`.
    """
    small_shape = (input_shape[0], side, side) if side else input_shape
    calls = {
        ORIGINAL: prepare(model, _draw_batch(model, input_shape, BATCH), "eager"),
        "pruned": prepare(pruned, _draw_batch(model, small_shape, BATCH), "eager"),
    }
    times = interleave(calls, turns=7)
    on_gpu = next(model.parameters()).is_cuda
    clock = "wall" if on_gpu else "cpu"
    # Turn by turn, then the median: both calls of a turn met the same machine.
    ratio = getattr(times["pruned"], clock) / getattr(times[ORIGINAL], clock)
    machine = settings.device_name() if on_gpu else settings.cpu_model()
    return {
        "ms": times["pruned"].quartiles(clock)[1],
        "time_share": float(np.median(ratio)),
        "timed": f"eager, batch {BATCH}, {machine}",
    }


def _draw_batch(model: nn.Module, shape: CHW, batch: int) -> Tensor:
    """The same random images each time, where the model lies."""
    g, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    return torch.randn(batch, *shape, generator=g).to(device, dtype_of(model))


def _measure_cell(
    nets: Mapping[str, nn.Module],
    files: Mapping[str, bytes],
    input_shape: CHW,
    runtime: str,
    batch: int,
    turns: int,
) -> dict[str, dict]:
    """The rows of one runtime and batch, by net, without their MACs."""
    x = _draw_batch(nets[ORIGINAL], input_shape, batch)
    clock = "wall" if x.is_cuda else "cpu"
    calls = {
        name: load_onnx(files[name], x, runtime)
        if runtime in NEEDS
        else prepare(net, x, runtime)
        for name, net in nets.items()
    }
    gc.collect()  # nobody sweeps up after another
    times = interleave(calls, turns=turns)
    base = getattr(times[ORIGINAL], clock)
    rows = {}
    for name, timing in times.items():
        low, middle, high = timing.quartiles(clock)
        gain = np.percentile(base / getattr(timing, clock), [25, 50, 75])
        rows[name] = {
            "net": name, "runtime": runtime, "version": version_of(runtime),
            "batch": batch, "ms": middle, "ms_low": low, "ms_high": high,
            "wall_ms": timing.quartiles("wall")[1], "speedup": float(gain[1]),
            "speedup_low": float(gain[0]), "speedup_high": float(gain[2]),
            "load": round(os.getloadavg()[0], 2),
        }  # fmt: skip
    return rows
