"""DenseNet-40 for CIFAR-10 (Huang et al. 2017, sec. 3 and table 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.layers import init_he

BLOCKS = 3
LAYERS = 12
STEM = 16


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution; its `growth` new maps join the input.

    `[N, in_channels, H, W]` to `[N, in_channels + growth, H, W]`, so that an
    `nn.Identity` in its place drops the layer (its maps then miss further down).
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv(F.relu(self.bn(x)))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution of the same width, 2x2 average pool.

    `[N, channels, H, W]` to `[N, channels, H // 2, W // 2]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.bn(x))))


class CifarDenseNet(nn.Module):
    """DenseNet-40, `[N, in_channels, H, W]` to `[N, num_classes]`.

    3 blocks of 12 layers, without bottleneck, compression or dropout; at least 4
    pixels, published for 32. Source: Huang et al. 2017, DenseNet with k = 12, L = 40.
    """

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, growth: int = 12
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, STEM, kernel_size=3, padding=1, bias=False)
        gain = LAYERS * growth
        self.block1 = make_block(STEM, growth)
        self.trans1 = Transition(STEM + gain)
        self.block2 = make_block(STEM + gain, growth)
        self.trans2 = Transition(STEM + 2 * gain)
        self.block3 = make_block(STEM + 2 * gain, growth)
        self.bn = nn.BatchNorm2d(STEM + BLOCKS * gain)
        self.linear = nn.Linear(STEM + BLOCKS * gain, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.trans2(self.block2(x))
        x = F.relu(self.bn(self.block3(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def make_block(in_channels: int, growth: int) -> nn.Sequential:
    """A dense block: each layer reads all maps made before it."""
    widths = [in_channels + layer * growth for layer in range(LAYERS)]
    return nn.Sequential(*(DenseLayer(width, growth) for width in widths))
