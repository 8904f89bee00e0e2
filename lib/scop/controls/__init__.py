"""Controls: what stands in for an image, by name. Each says what it guarantees."""

from dataclasses import fields
from pathlib import Path
from typing import Any

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
    **options,
) -> Control:
    """The control `name`, ready to sample: in evaluation, frozen, on `device`.

    images: the training images; arms that learn never read the labels. epochs: of arms
    that are trained, None for their default. folder: where a trained arm keeps
    `<name>-<hash>.pt` after every epoch and finds it again, if arm, options, epochs,
    seed and images are the same. device: default a GPU where there is one. processes:
    that train the arm together, on a CPU. options: fields of the arm's `Options`.
    Torch's global generators are left as they were.

    ValueError: unknown names, values out of range, a damaged checkpoint, a loss that
    stops being finite.
    """
    check_known("control", [name], ARMS)
    arm_type, device = ARMS[name], pick_device(device)
    kind = getattr(arm_type, "Options", None)
    known = [option.name for option in fields(kind)] if kind else []
    check_known(f"control '{name}': option", options, known)
    control: Control
    if issubclass(arm_type, Trained):
        chosen: Any = arm_type.Options(**options)
        recipe = Recipe(
            arm_type.epochs if epochs is None or not arm_type.epochs else epochs,
            batch_size=getattr(chosen, "batch_size", 1), seed=seed, processes=processes,
        )  # fmt: skip
        control = train_control(arm_type, images, chosen, recipe, folder, device)
    else:
        control = arm_type(images.shape)
    return control.to(device).eval().requires_grad_(False)
