"""Controls: what stands in for an image, by name. Each says what it guarantees."""

from pathlib import Path

import torch

from lib.data import ImageSet
from lib.messages import check_known
from lib.scop.controls.base import Constant, Control, NoControl, Noise, Shuffle
from lib.scop.controls.gan import Generator
from lib.scop.controls.reduced import Deep, Gaussian
from lib.scop.controls.swap_gan import SwapGAN
from lib.scop.controls.training import Trained, train_control
from lib.train.recipe import Recipe, pick_device

ARMS: dict[str, type[Control]] = {
    arm.name: arm
    for arm in (Generator, SwapGAN, Deep, Gaussian, Shuffle, Noise, Constant, NoControl)
}


def build_control(
    name: str,
    images: ImageSet,
    *,
    seed: int = 0,
    epochs: int | None = None,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    processes: int = 1,
) -> Control:
    """The control `name`, ready to sample: in evaluation, frozen, on `device`.

    images: the training images; arms that learn never read the labels. epochs: of arms
    that are trained, None for their default. folder: where a trained arm keeps
    `<name>-<hash>.pt` after every epoch and finds it again, if arm, epochs, seed and
    images are the same. device: default a GPU where there is one. processes: that train
    the arm together, on a CPU. Torch's global generators are left as they were.

    ValueError: unknown names, values out of range, a damaged checkpoint, a loss that
    stops being finite.
    """
    check_known("control", [name], ARMS)
    arm_type, device = ARMS[name], pick_device(device)
    control: Control
    if issubclass(arm_type, Trained):
        recipe = Recipe(
            arm_type.epochs if epochs is None or not arm_type.epochs else epochs,
            batch_size=arm_type.batch_size, seed=seed, processes=processes,
        )  # fmt: skip
        control = train_control(arm_type, images, recipe, folder, device)
    else:
        control = arm_type(images.shape)
    return control.to(device).eval().requires_grad_(False)
