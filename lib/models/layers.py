"""What several nets need: He initialisation, flat sizes, another number of channels."""

import copy
from collections.abc import Iterable

import torch
from torch import nn


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
            if reset := getattr(module, "reset_parameters", None):
                reset()
        init_he(net)


def count_values(layers: Iterable[nn.Module], in_channels: int, side: int) -> int:
    """Values that `layers`, in a row, make of one square image of `side` pixels.

    Raises ValueError where a window is larger than its map.
    """
    # A copy on the meta device knows shapes only: no memory, no arithmetic.
    body = copy.deepcopy(nn.Sequential(*layers)).to("meta")
    try:
        return body(torch.empty(1, in_channels, side, side, device="meta")).numel()
    except RuntimeError:
        raise ValueError(f"image_size={side} is too small for these layers") from None


def set_input_channels(net: nn.Module, channels: int) -> None:
    """Let the first convolution read `channels` channels, in place.

    Where it did not before, its weights are drawn anew from torch's global generator,
    He-normal, whatever rule the net has; its bias and its settings stay.
    """
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return
    kernel = first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
    first.in_channels, first.weight = channels, nn.Parameter(kernel)
    nn.init.kaiming_normal_(first.weight, nonlinearity="relu")
