"""The Caffe nets of NISP's experiments, layer by layer as in BVLC's model definitions.

`examples/mnist/lenet`, `examples/cifar10/cifar10_quick`,
`models/bvlc_reference_caffenet` and `models/bvlc_googlenet` of github.com/BVLC/caffe.
Caffe's pools round sizes up (`ceil_mode`), and its response normalisation has torch's
formula with k = 1. Weights start as in He et al. 2015, not from Caffe's fillers, some
of which (standard deviation 0.0001) only learn under Caffe's schedules. A net made for
one `image_size` S raises ValueError where S is too small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.layers import count_values, init_he

# 1x1; reduce and 3x3; reduce and 5x5; 1x1 after the pool (Szegedy et al. 2015, table 1)
INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class LeNet(nn.Module):
    """Caffe's LeNet, `[N, in_channels, S, S]` to `[N, num_classes]`, S = `image_size`.

    20-50 filters, 500 units, no ReLU after the convolutions. Source: BVLC
    `lenet_train_test.prototxt`, after LeCun et al. 1998.
    """

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 28
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, kernel_size=5)
        self.pool1 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.pool2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        size = count_values(self.children(), in_channels, image_size)
        self.ip1 = nn.Linear(size, 500)
        self.ip2 = nn.Linear(500, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = F.relu(self.ip1(torch.flatten(x, 1)))
        return self.ip2(x)


class CifarNet(nn.Module):
    """cifar10_quick, `[N, in_channels, S, S]` to `[N, num_classes]`, S = `image_size`.

    32-32-64 filters, 64 units and no ReLU after them. `extra_convs` puts that many
    further 5x5 convolutions of 32 filters, with ReLU, before the third: nets of growing
    depth, as Yu et al. 2018 compare them. Source: BVLC
    `cifar10_quick_train_test.prototxt`, after cuda-convnet.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        extra_convs: int = 0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, kernel_size=5, padding=2)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = nn.Conv2d(32, 32, kernel_size=5, padding=2)
        self.pool2 = nn.AvgPool2d(3, stride=2, ceil_mode=True)
        extra = [nn.Conv2d(32, 32, 5, padding=2) for _ in range(extra_convs)]
        self.extra = nn.Sequential(*extra)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.pool3 = nn.AvgPool2d(3, stride=2, ceil_mode=True)
        size = count_values(self.children(), in_channels, image_size)
        self.ip1 = nn.Linear(size, 64)
        self.ip2 = nn.Linear(64, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pool1(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        for conv in self.extra:
            x = F.relu(conv(x))
        x = self.pool3(F.relu(self.conv3(x)))
        x = self.ip1(torch.flatten(x, 1))
        return self.ip2(x)


class CaffeNet(nn.Module):
    """AlexNet with two groups, `[N, in_channels, S, S]` to `[N, num_classes]`.

    S = `image_size`; pools stand before the response normalisation. Source: BVLC
    `bvlc_reference_caffenet`, after Krizhevsky et al. 2012.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 227,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 96, kernel_size=11, stride=4)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.conv2 = nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=2)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.conv3 = nn.Conv2d(256, 384, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=2)
        self.pool5 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        size = count_values(self.children(), in_channels, image_size)
        self.fc6 = nn.Linear(size, 4096)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Linear(4096, 4096)
        self.drop7 = nn.Dropout(dropout)
        self.fc8 = nn.Linear(4096, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.pool1(F.relu(self.conv1(x))))
        x = self.norm2(self.pool2(F.relu(self.conv2(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = self.pool5(F.relu(self.conv5(x)))
        x = self.drop6(F.relu(self.fc6(torch.flatten(x, 1))))
        x = self.drop7(F.relu(self.fc7(x)))
        return self.fc8(x)


class Inception(nn.Module):
    """Four branches side by side, joined along the channels; the size stays.

    `[N, in_channels, H, W]` to `[N, C, H, W]`, C = `widths` 0 + 2 + 4 + 5. Source:
    Szegedy et al. 2015, fig. 2b.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, project = widths
        self.conv1x1 = nn.Conv2d(in_channels, one, kernel_size=1)
        self.reduce3x3 = nn.Conv2d(in_channels, reduce3, kernel_size=1)
        self.conv3x3 = nn.Conv2d(reduce3, three, kernel_size=3, padding=1)
        self.reduce5x5 = nn.Conv2d(in_channels, reduce5, kernel_size=1)
        self.conv5x5 = nn.Conv2d(reduce5, five, kernel_size=5, padding=2)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)
        self.pool_proj = nn.Conv2d(in_channels, project, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.conv1x1(x))
        three = F.relu(self.conv3x3(F.relu(self.reduce3x3(x))))
        five = F.relu(self.conv5x5(F.relu(self.reduce5x5(x))))
        pooled = F.relu(self.pool_proj(self.pool(x)))
        return torch.cat([one, three, five, pooled], 1)


class BvlcGoogLeNet(nn.Module):
    """GoogLeNet as in Caffe, `[N, in_channels, H, W]` to `[N, num_classes]`.

    Real 5x5 branches, response normalisation, no BatchNorm, no auxiliary heads; global
    average pooling, so other sizes than 224 run. Source: BVLC `bvlc_googlenet`, after
    Szegedy et al. 2015, table 1.
    """

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.conv2_reduce = nn.Conv2d(64, 64, kernel_size=1)
        self.conv2 = nn.Conv2d(64, 192, kernel_size=3, padding=1)
        self.norm2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stage3 = make_inceptions(192, ["3a", "3b"])
        self.pool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stage4 = make_inceptions(480, ["4a", "4b", "4c", "4d", "4e"])
        self.pool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stage5 = make_inceptions(832, ["5a", "5b"])
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(1024, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.pool1(F.relu(self.conv1(x))))
        x = F.relu(self.conv2(F.relu(self.conv2_reduce(x))))
        x = self.pool2(self.norm2(x))
        x = self.pool3(self.stage3(x))
        x = self.pool4(self.stage4(x))
        x = F.adaptive_avg_pool2d(self.stage5(x), 1)
        return self.linear(self.dropout(torch.flatten(x, 1)))


def make_inceptions(in_channels: int, labels: list[str]) -> nn.Sequential:
    """The modules `labels` of table 1 in a row, named `inception_3a` and so on."""
    stage = nn.Sequential()
    for label in labels:
        widths = INCEPTIONS[label]
        stage.add_module(f"inception_{label}", Inception(in_channels, widths))
        in_channels = widths[0] + widths[2] + widths[4] + widths[5]
    return stage
