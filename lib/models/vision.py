"""torchvision's classification nets by name, and MobileNetV2 with strides for CIFAR."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import nn

from lib.models.layers import widen_first_convolution

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
    image_size: int | None,
    pretrained: bool,
    **options: Any,
) -> nn.Module:
    """The torchvision net `name`, `[N, in_channels, H, W]` to `[N, num_classes]`.

    GoogLeNet and Inception come without auxiliary heads unless `aux_logits=True` asks
    for them, so that every net returns one tensor. Raises FileNotFoundError where
    weights are asked for and can neither be found nor fetched.
    """
    options = fill_options(name, image_size, pretrained, options)
    if pretrained:
        return load_published(name, num_classes=num_classes, **options)
    other = in_channels != 3
    with widen_first_convolution(in_channels) if other else nullcontext():
        return torchvision.models.get_model(name, num_classes=num_classes, **options)


def fill_options(
    name: str, image_size: int | None, pretrained: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """`options` completed by what torchvision's own defaults leave open or warn about.

    Transformers need their input size at construction. torchvision warns about, and
    only then applies, the published initialisation of the two Inception nets.
    """
    filled: dict[str, Any] = {}
    side = image_size or get_published_size(name)
    if name.startswith("vit_"):
        filled["image_size"] = side
    if name.startswith("maxvit_"):
        filled["input_size"] = (side, side)
    if name in WITH_AUXILIARY_HEADS and not pretrained:
        filled |= {"init_weights": True, "aux_logits": False}
    return filled | options


def load_published(name: str, **options: Any) -> nn.Module:
    """`name` with torchvision's DEFAULT weights; without network, one readable line."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    heads = options.get("aux_logits", False)
    if name in WITH_AUXILIARY_HEADS and not heads:
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
    *, num_classes: int = 10, in_channels: int = 3, **options: Any
) -> nn.Module:
    """MobileNetV2 for CIFAR, `[N, in_channels, H, W]` to `[N, num_classes]`.

    torchvision's class; the stem and the 24-channel stage have stride 1. `width_mult`
    and `dropout` are its own. Source: Sandler et al. 2018, table 2.
    """
    other = in_channels != 3
    with widen_first_convolution(in_channels) if other else nullcontext():
        net = torchvision.models.MobileNetV2(
            num_classes=num_classes, inverted_residual_setting=CIFAR_STAGES, **options
        )
    net.features[0][0].stride = (1, 1)
    return net
