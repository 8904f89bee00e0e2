"""torchvision's classification nets by name, and MobileNetV2 with strides for CIFAR."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import nn

from lib.models.layers import set_input_channels

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


def list_classifiers() -> list[str]:
    """torchvision's names of image classification nets."""
    return torchvision.models.list_models(module=torchvision.models)


def get_published_size(name: str) -> int:
    """Side in pixels that the net's published weights were evaluated at."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    return weights.transforms().crop_size[0]


def build_torchvision(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int | None = None,
    pretrained: bool = False,
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
        return load_published(name, num_classes=num_classes, **options)
    if name in WITH_AUXILIARY_HEADS:
        # torchvision warns about, and only when told applies, their initialisation.
        options = {"init_weights": True, "aux_logits": False} | options
    net = torchvision.models.get_model(name, num_classes=num_classes, **options)
    set_input_channels(net, in_channels)
    return net


def load_published(name: str, **options: Any) -> nn.Module:
    """`name` with torchvision's DEFAULT weights; without network, one readable line."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    heads = options.get("aux_logits", False)
    if not heads:
        # torchvision loads them in any case, and refuses to be told otherwise.
        options.pop("aux_logits", None)
    try:
        net = torchvision.models.get_model(name, weights=weights, **options)
    except (URLError, TimeoutError, ConnectionError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise FileNotFoundError(
            f"{name}: no weights, and {weights.url} did not answer ({error}); "
            f"put that file into {folder}"
        ) from None
    if name == "inception_v3" and not heads:
        net.aux_logits, net.AuxLogits = False, None
    return net


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
    net = torchvision.models.MobileNetV2(
        num_classes=num_classes,
        width_mult=width_mult,
        inverted_residual_setting=CIFAR_STAGES,
        dropout=dropout,
    )
    net.features[0][0].stride = (1, 1)
    set_input_channels(net, in_channels)
    return net
