"""What several nets need: He initialisation, map sizes, another number of channels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def init_he(net: nn.Module) -> None:
    """He-normal convolutions and linear layers, zero biases, in place.

    Draws from torch's global generator only. Source: He et al. 2015 (ICCV), sec. 2.2.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_weights(net: nn.Module, seed: int) -> None:
    """Start a network anew, in place: `init_he`, norms and the rest as torch has them.

    Drawn from `seed` alone; torch's global generator is left as found.
    """
    gpus = {p.device.index for p in net.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        init_he(net)


def map_side(side: int, modules: Iterable[nn.Module]) -> int:
    """Side of the square map, in pixels, after the convolutions and pools of `modules`.

    Other modules keep the size. Raises ValueError where a map would vanish.
    """
    for module in modules:
        if isinstance(module, WINDOWS):
            side = slide_window(side, module)
        if side < 1:
            raise ValueError(f"the map vanishes at {module}")
    return side


def slide_window(side: int, module: nn.Module) -> int:
    """Positions of a square window along one axis, by torch's own rounding rule."""
    kernel, stride, padding = (
        value if isinstance(value, int) else value[0]
        for value in (module.kernel_size, module.stride, module.padding)
    )
    span, ceil = side + 2 * padding - kernel, getattr(module, "ceil_mode", False)
    count = (span + (stride - 1 if ceil else 0)) // stride + 1
    # A last window that would start beyond the map and its left padding is dropped.
    if ceil and (count - 1) * stride >= side + padding:
        count -= 1
    return count


@contextmanager
def widen_first_convolution(channels: int) -> Iterator[None]:
    """Inside this block, the first convolution made for 3 channels takes `channels`.

    The net's own code then initialises it by its own rule, which a swap afterwards
    could not repeat. It changes `nn.Conv2d` while the block runs, so nothing else may
    be building nets in another thread. Raises ValueError if no such convolution came.
    """
    original = nn.Conv2d.__init__
    widened = False

    def init(conv: nn.Conv2d, in_channels: int, *args: Any, **options: Any) -> None:
        nonlocal widened
        if in_channels == 3 and not widened:
            in_channels, widened = channels, True
        original(conv, in_channels, *args, **options)

    nn.Conv2d.__init__ = init
    try:
        yield
    finally:
        nn.Conv2d.__init__ = original
    if not widened:
        raise ValueError("no convolution with 3 input channels to replace")
