"""Nets by name: `build`, `names`, `input_shape`, and what they refuse."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lib.messages import check_known
from lib.models import vision, weights
from lib.models.caffe import BvlcGoogLeNet, CaffeNet, CifarNet, LeNet
from lib.models.densenet import CifarDenseNet
from lib.models.resnet import DEPTHS, CifarResNet
from lib.settings import CHW, check_int

LARGEST_TRIED = 512

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "cifarnet": CifarNet,
    **{  # "_b": with projection shortcuts
        f"resnet{depth}{ending}": partial(CifarResNet, depth, projection=bool(ending))
        for ending in ("", "_b")
        for depth in DEPTHS
    },
    "densenet40": CifarDenseNet,
    "mobilenet_v2_cifar": vision.build_mobilenet,
    "caffenet": CaffeNet,
    "googlenet_bvlc": BvlcGoogLeNet,
}
# Options that `build` names itself, or that the name already decides.
DECIDED = {"depth", "projection", "num_classes", "in_channels", "image_size"}
SIZES = {"lenet": 28, "caffenet": 227, "googlenet_bvlc": 224}


def names() -> list[str]:
    """Names of the nets defined here; `build` also takes torchvision's classifiers."""
    return list(BUILDERS)


def input_shape(name: str, in_channels: int = 3, image_size: int | None = None) -> CHW:
    """`(C, H, W)` in channels and pixels; H = W = the published size if not given.

    torchvision's nets: the size that their DEFAULT weights were evaluated at. Raises
    ValueError on an unknown name or a number below 1.
    """
    find_builder(name)
    check_at_least_one(name, in_channels=in_channels, image_size=image_size)
    if image_size is None and name in BUILDERS:
        image_size = SIZES.get(name, 32)
    side = image_size or vision.get_published_size(name)
    return in_channels, side, side


def build(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    pretrained: bool | str = False,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """The net `name`, `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    `image_size` (pixels) sets the input size where a net's first linear layer fixes it
    and is checked for all; `None` is the published size, see `input_shape`. `options`
    go on to the net. Weights start from torch's global generator, or with `pretrained`
    are the published ones: CIFAR-10 for resnet20/32/56, ImageNet for torchvision's,
    of which a name chooses (`pretrained="ResNet18_Weights.IMAGENET1K_V1"`, else the
    DEFAULT).

    Raises ValueError on an unknown name or option, a number below 1, a size that the
    net cannot take (naming the smallest it can), `pretrained` where nothing was
    published, or a file of weights with the wrong digest; FileNotFoundError where
    weights cannot be fetched.
    """
    builder = find_builder(name)
    check_at_least_one(
        name, num_classes=num_classes, in_channels=in_channels, image_size=image_size
    )
    known = set(inspect.signature(builder).parameters)
    if name in BUILDERS:
        check_known(f"{name}: option", options, known - DECIDED)
    options |= {"num_classes": num_classes, "in_channels": in_channels}

    def make(side: int | None, **more: Any) -> nn.Module:
        if side and "image_size" in known:  # a net that is made for one size
            more["image_size"] = side
        return builder(**options, **more)

    if image_size is not None:
        check_image_size(make, name, image_size, in_channels)
    if not pretrained:
        return make(image_size)
    check_pretrained(name, pretrained, num_classes, in_channels)
    if name not in BUILDERS:
        return make(image_size, pretrained=pretrained)
    net = make(image_size)
    net.load_state_dict(weights.load_weights(name))
    return net


def find_builder(name: str) -> Callable[..., nn.Module]:
    """What makes the net `name`; ValueError, with the nearest name, for an unknown."""
    if name in BUILDERS:
        return BUILDERS[name]
    check_known("net", [name], [*BUILDERS, *vision.list_classifiers()])
    return partial(vision.build_torchvision, name)


def check_at_least_one(name: str, **numbers: int | None) -> None:
    """Raise ValueError unless each of `numbers` is a whole number >= 1 (or None)."""
    for what, number in numbers.items():
        if number is not None:
            check_int(f"{name}: {what}", number, 1)


def check_pretrained(
    name: str, which: bool | str, num_classes: int, in_channels: int
) -> None:
    """Raise ValueError unless weights of just this net were published."""
    published = name in weights.FILES or name not in BUILDERS
    classes = 10 if name in weights.FILES else 1000
    if not published or (num_classes, in_channels) != (classes, 3):
        raise ValueError(
            f"{name} with num_classes={num_classes}, in_channels={in_channels} has no "
            f"published weights; these have: {', '.join(weights.FILES)} (10 classes, 3 "
            "channels) and torchvision's nets (1000 classes, 3 channels)"
        )
    if isinstance(which, str) and name in BUILDERS:
        raise ValueError(f"{name} has one file of weights: pretrained=True")


def check_image_size(
    make: Callable[[int], nn.Module], name: str, side: int, in_channels: int
) -> None:
    """Raise ValueError, with the smallest size that works, if this one does not."""
    sides = (side, *range(1, LARGEST_TRIED + 1))
    least = next((trial for trial in sides if runs_at(make, trial, in_channels)), None)
    if least != side:
        raise ValueError(
            f"{name}: image_size={side} does not work; the smallest that does "
            f"is {least or f'above {LARGEST_TRIED}'}"
        )


def runs_at(make: Callable[[int], nn.Module], side: int, in_channels: int) -> bool:
    """Whether one image of `side` pixels goes through, tried without any memory.

    The meta device knows shapes only and leaves the global generator alone.
    """
    try:
        try:
            with torch.device("meta"):
                net = make(side)
        except NotImplementedError:
            # RegNets work out their widths with tensors, whose values meta lacks.
            with torch.random.fork_rng(devices=[]):
                net = make(side).to("meta")
        with torch.inference_mode():
            net.eval()(torch.empty(1, in_channels, side, side, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True
