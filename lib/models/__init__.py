"""The nets the papers prune, by name: `build`, `names`, `input_shape`.

`build("resnet56", pretrained=True)`, `build("lenet", in_channels=1)` or any torchvision
classification net, `build("resnet50", num_classes=1000)`.
"""

from lib.models.caffe import LeNet
from lib.models.densenet import DenseLayer
from lib.models.layers import draw_weights
from lib.models.registry import build, input_shape, names
from lib.models.resnet import BasicBlock, CifarResNet, PadShortcut
from lib.models.vision import find_weights
