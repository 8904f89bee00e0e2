"""The nets the papers prune, by name: `build`, `names`, `input_shape`.

`build("resnet56", pretrained=True)`, `build("lenet", in_channels=1)` or any torchvision
classification net, `build("resnet50", num_classes=1000)`.
"""

from lib.models.caffe import LeNet as LeNet
from lib.models.densenet import DenseLayer as DenseLayer
from lib.models.layers import draw_weights as draw_weights
from lib.models.registry import build as build
from lib.models.registry import input_shape as input_shape
from lib.models.registry import names as names
from lib.models.resnet import BasicBlock as BasicBlock
from lib.models.resnet import CifarResNet as CifarResNet
from lib.models.resnet import PadShortcut as PadShortcut
from lib.models.vision import find_weights as find_weights
