"""What it costs on the device: kernels, training, surgery, pruned networks."""

import sys
import time
from pathlib import Path

import torch
from checks import SHAPE, build, make_images
from steps import Bench, Found, NotHere, step

from lib import baselines, cost, models, plan, surgery, train
from lib.graph import build_graph

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_kernels


@step("time")
def kernels(bench: Bench):
    """Fused kernels against plain PyTorch and torch.compile, forward with backward."""
    device = bench.device
    peak = bench_kernels.find_bandwidth() if bench.on_gpu else 0.0
    if bench.on_gpu:
        yield Found("copy", peak, "GB/s")
    shapes = bench_kernels.ON_GPU if bench.on_gpu else bench_kernels.ON_CPU
    sizes = bench_kernels.SAMPLES_ON_GPU if bench.on_gpu else [(64, 16)]
    rounds = 30 if bench.on_gpu else 1
    tables = (
        bench_kernels.bench_mix(shapes, rounds, device, peak),
        bench_kernels.bench_mmd2(sizes, rounds, device, peak),
    )
    for rows in tables:
        for row in rows:
            for unit in ("ms", "MB", "share of bandwidth", "peak MiB"):
                if unit in row:
                    yield Found(f"{row['call']}, {row['version']}", row[unit], unit)


@step("time")
def epochs(bench: Bench):
    """ResNet-56 at 32 x 32: images a second, step by step and as a CUDA graph."""
    images = make_images(512 if bench.small else 50_000)
    net_name = "resnet8" if bench.small else "resnet56"
    for precision in ("float32", "bfloat16"):
        for graph in (False, True) if bench.on_gpu else (False,):
            torch.manual_seed(0)
            history = train.fit(
                models.build(net_name), images, epochs=1 if bench.small else 2, lr=0.01,
                batch_size=128, device=bench.device, precision=precision,
                cuda_graph=graph,
            )  # fmt: skip
            rate = max(row["images_per_s"] for row in history.rows)
            how = "CUDA graph" if graph else "step by step"
            yield Found(f"{net_name}, {precision}, {how}", rate, "images/s")


@step("time")
def surgery_seconds(bench: Bench):
    """Graph, plan and shrinking of one network that lies on the device."""
    name = "resnet20" if bench.small else "resnet110"
    net = build(name, dtype=torch.float32).to(bench.device)
    for what, act in list_surgery(net).items():
        act()  # once to warm up
        bench.wait()
        begin = time.perf_counter()
        act()
        bench.wait()
        yield Found(f"{name}, {what}", time.perf_counter() - begin, "s")


def list_surgery(net) -> dict:
    graph = build_graph(net, SHAPE)
    scored = baselines.l1(net)

    def choose():
        return plan.from_scores(net, scored, SHAPE, rate=0.4, residual="scatter",
                                graph=graph)  # fmt: skip

    cut = choose()
    return {
        "graph": lambda: build_graph(net, SHAPE),
        "plan": choose,
        "shrink": lambda: surgery.shrink(net, cut, SHAPE, graph=graph),
    }


@step("time")
def pruned_networks(bench: Bench):
    """Half of the MACs: which share of the milliseconds stays, batches of 256."""
    if not bench.on_gpu:
        raise NotHere("times of pruned networks on a CPU are lib.latency's")
    for name in ("resnet56", "resnet110", "densenet40", "mobilenet_v2_cifar"):
        net = build(name, dtype=torch.float32).to(bench.device)
        for residual in ("keep", "scatter", "tie"):
            for multiple in (1, 8):
                yield from time_pruned(bench, name, net, residual, multiple)


def time_pruned(bench: Bench, name: str, net, residual: str, multiple: int):
    cut = plan.from_scores(
        net, baselines.l1(net), SHAPE, macs=0.5, residual=residual, multiple=multiple,
        skip_fixed=True,
    )  # fmt: skip
    small = surgery.shrink(net, cut, SHAPE)
    x = torch.randn(256, *SHAPE, device=bench.device)
    x = x.contiguous(memory_format=torch.channels_last)
    spent = {}
    for what, made in (("whole", net), ("pruned", small)):
        made = made.to(memory_format=torch.channels_last).eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            spent[what] = lambda made=made: made(x)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found = bench_kernels.clock(spent, 20, bench.device)
    macs = cost.count(small, SHAPE).macs / cost.count(net, SHAPE).macs
    how = f"{name}, {residual}, multiples of {multiple}"
    yield Found(f"{how}, MACs", macs, "share")
    yield Found(f"{how}, time", found["pruned"] / found["whole"], "share")
    yield Found(f"{how}, whole", found["whole"], "ms")
