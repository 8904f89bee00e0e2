"""torchvision's classification nets by name, and MobileNetV2 with strides for CIFAR."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lib import paths
from lib.messages import check_known
from lib.models.layers import set_input_channels
from lib.models.weights import find_or_fetch

# expansion, channels, blocks, stride (Sandler et al. 2018, table 2); the 24-channel
# stage keeps the size, as usual at 32 pixels
CIFAR_STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def library() -> Any:
    """`torchvision.models`, imported when first asked for: as slow to load as torch."""
    import torchvision

    return torchvision.models


def list_classifiers() -> list[str]:
    """torchvision's names of image classification nets."""
    return library().list_models(module=library())


def get_published_size(name: str) -> int:
    """Side in pixels that the net's published weights were evaluated at."""
    weights = library().get_model_weights(name).DEFAULT
    return weights.transforms().crop_size[0]


def build_torchvision(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | None = None,
    pretrained: bool | str = False,
    **options: Any,
) -> nn.Module:
    """The torchvision net `name`, `[N, in_channels, H, W]` to `[N, num_classes]`.

    GoogLeNet and Inception come without auxiliary heads unless `aux_logits=True` asks
    for them, so that every net returns one tensor. Raises FileNotFoundError where
    weights are asked for and can neither be found nor fetched.
    """
    side = image_size or get_published_size(name)
    # Transformers need their input size at construction.
    if name.startswith("vit_"):
        options.setdefault("image_size", side)
    if name.startswith("maxvit_"):
        options.setdefault("input_size", (side, side))
    if pretrained:
        return load_published(name, pretrained, num_classes=num_classes, **options)
    if name in WITH_AUXILIARY_HEADS:
        # torchvision warns about, and only when told applies, their initialisation.
        options = {"init_weights": True, "aux_logits": False} | options
    net = library().get_model(name, num_classes=num_classes, **options)
    set_input_channels(net, in_channels)
    return net


def find_weights(name: str, which: bool | str = True) -> Any:
    """torchvision's weights of the net `name`: True is its DEFAULT, or by their name.

    `ResNet18_Weights.IMAGENET1K_V1` or the part behind the dot. What they were
    evaluated with is `.transforms()`. ValueError for another name.
    """
    known = library().get_model_weights(name)
    if which is True:
        return known.DEFAULT
    names = [*known.__members__, *(f"{known.__name__}.{n}" for n in known.__members__)]
    check_known(f"{name}: weights", [str(which)], names)
    return known[str(which).rpartition(".")[2]]


def load_published(name: str, which: bool | str = True, **options: Any) -> nn.Module:
    """`name` with torchvision's weights, see `find_weights` and `read_published`."""
    weights = find_weights(name, which)
    heads = options.get("aux_logits", False)
    if not heads:
        # torchvision loads them in any case, and refuses to be told otherwise.
        options.pop("aux_logits", None)
    state = read_published(weights)
    # Its builders know what else goes with weights, but check only what they download.
    with mock.patch.object(type(weights), "get_state_dict", lambda *_, **__: state):
        net = library().get_model(name, weights=weights, **options)
    if name == "inception_v3" and not heads:
        net.aux_logits, net.AuxLogits = False, None
    return net


def read_published(weights: Any) -> dict[str, Tensor]:
    """The state dict of torchvision's weights; its digest is in the file's name.

    Looked for where torch keeps them (`TORCH_HOME`) and in `<data root>/weights`, else
    fetched to the former. ValueError on a wrong digest, FileNotFoundError where the
    file can be neither found nor fetched; one line that names it.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    with suppress(ValueError):  # no checkout, so no data root
        folders.append(paths.data_root() / "weights")
    (digest,) = re.findall(r"-([0-9a-f]{8,})\.pth$", weights.url)
    return find_or_fetch(weights.url, digest, folders)


def build_mobilenet(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> nn.Module:
    """MobileNetV2 for CIFAR, `[N, in_channels, H, W]` to `[N, num_classes]`.

    torchvision's class; the stem and the 24-channel stage have stride 1. Source:
    Sandler et al. 2018, table 2.
    """
    net = library().MobileNetV2(
        num_classes=num_classes,
        width_mult=width_mult,
        inverted_residual_setting=CIFAR_STAGES,
        dropout=dropout,
    )
    net.features[0][0].stride = (1, 1)
    set_input_channels(net, in_channels)
    return net
