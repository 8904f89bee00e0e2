"""What a selection epoch costs, as a multiple of a plain training epoch.

    .venv/bin/python tests/benchmarks/bench_selection.py [--steps 9] [--threads 1]

ResNet-20 at CIFAR-10's shape, 128 images a step (and 128 controls), one process, steps
in turns, so that a busy machine slows all of them alike. `composed` is the selection
layer written as library calls, what `lib.kernels` replaces.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import models
from lib.graph import build_graph
from lib.scop import block_layers, selection
from lib.scop.controls.base import NoControl, Noise, Shuffle
from lib.scop.layers import find_pairs
from lib.train.recipe import Recipe, make_optimizer, pick_device, pick_precision
from lib.train.update import Update

BATCH, GOAL, SHAPE = 128, 2.2, (3, 32, 32)


def compose(x: Tensor, beta: Tensor, weight, bias, *, eps: float, **_) -> Tensor:
    """The selection layer as a composition of library calls."""
    real, control = x.chunk(2)
    mixed = torch.lerp(control, real, beta.to(x.dtype).view(1, -1, 1, 1))
    return F.batch_norm(
        torch.cat([mixed, control]), None, None, weight, bias, True, 0, eps
    )


class ComposedNet(selection.MixedNet):
    """The same network, its selection layers composed."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class above, with `compose` in place of the kernel."""
        kernel, selection.mix_norm_relu = selection.mix_norm_relu, compose
        try:
            return super().forward(x)
        finally:
            selection.mix_norm_relu = kernel


def make_step(net: nn.Module, device: torch.device, optimizer: str) -> Update:
    """A training step of `net` in the precision that `train.fit` would pick."""
    recipe = Recipe(epochs=1, lr=1e-3, optimizer=optimizer)
    net = net.to(device, memory_format=torch.channels_last).train()
    precision = pick_precision("auto", device, net)
    return Update(net, make_optimizer(net, recipe, device), recipe, precision)


def build_steps(device: torch.device) -> dict[str, Update]:
    """Training, and selection by arm."""
    model = models.build("resnet20")
    pairs = find_pairs(build_graph(model, SHAPE), model)
    norms = {name: pairs[name] for name in block_layers(model, SHAPE)}
    steps = {"training": make_step(models.build("resnet20"), device, "sgd")}
    for arm in (Shuffle, Noise, NoControl):
        net = selection.MixedNet(model, arm(SHAPE), norms)
        steps[arm.name] = make_step(net, device, "adam")
    composed = ComposedNet(model, Shuffle(SHAPE), norms)
    return steps | {"shuffle, composed": make_step(composed, device, "adam")}


def time_steps(steps: dict[str, Update], rounds: int, device) -> dict[str, list]:
    """Seconds of each step, in turns; the first two rounds warm up."""
    x = torch.randn(BATCH, *SHAPE, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    spent = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step(x, y)
            wait()
            if turn > 1:
                spent[name].append(time.perf_counter() - start)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own")
    options: SimpleNamespace = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(None)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    spent = time_steps(build_steps(device), options.steps, device)
    for name, found in spent.items():
        pairs = zip(found, spent["training"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        took = 1e3 * statistics.median(found)
        print(f"{name:20} {took:8.1f} ms a step   {ratio:.2f} of a training step")
    pairs = zip(spent["shuffle"], spent["training"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    verdict = "met" if ratio <= GOAL else "MISSED"
    print(f"selection / training: {ratio:.2f}, budget {GOAL}: {verdict}")


if __name__ == "__main__":
    main()
