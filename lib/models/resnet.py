"""ResNets for CIFAR-10: 16-32-64 channels, 6n + 2 layers (He et al. 2016, sec. 4.2).

Module names are those of github.com/akamaster/pytorch_resnet_cifar10, whose published
weights therefore load unchanged.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.layers import init_he

DEPTHS = (8, 14, 20, 32, 44, 56, 110)
WIDTHS = (16, 32, 64)
# it keeps the size, and a BatchNorm follows
make_conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Parameter-free shortcut: every `stride`-th pixel, zero channels on both sides.

    `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`.
    Half of the new channels stand before the old ones, half after; doubling the width
    puts `out_channels // 4` on each side. Raises ValueError if there are fewer output
    than input channels. Source: option A of He et al. 2016, sec. 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        if not 1 <= in_channels <= out_channels:
            raise ValueError(f"cannot pad {in_channels} channels to {out_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the shortcut, then ReLU.

    `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ...]`. `shortcut`
    is an empty Sequential where nothing happens, else `PadShortcut`, or with
    `projection` a bare 1x1 convolution (no BatchNorm, as in SCOP's released code).
    Source: He et al. 2016, fig. 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = make_conv3x3(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = make_conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            widths = in_channels, out_channels
            self.shortcut = (
                nn.Conv2d(*widths, kernel_size=1, stride=stride, bias=False)
                if projection
                else PadShortcut(*widths, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for small images, `[N, in_channels, H, W]` to `[N, num_classes]`.

    Any height and width; published for 32 pixels. `depth` is 6n + 2 (ValueError if
    not); `projection` picks the shortcut, see `BasicBlock`. Source: He et al. 2016,
    sec. 4.2; initialisation as He et al. 2015.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        projection: bool = False,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth}: a CIFAR ResNet has 6n + 2 layers, n >= 1")
        narrow, middle, wide = WIDTHS
        self.conv1 = make_conv3x3(in_channels, narrow)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.layer1 = make_stage(narrow, narrow, blocks, 1, projection)
        self.layer2 = make_stage(narrow, middle, blocks, 2, projection)
        self.layer3 = make_stage(middle, wide, blocks, 2, projection)
        self.linear = nn.Linear(wide, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def make_stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, projection: bool
) -> nn.Sequential:
    """`blocks` residual blocks, the first of which changes width and size."""
    first = BasicBlock(in_channels, out_channels, stride=stride, projection=projection)
    rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
