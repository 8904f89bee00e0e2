"""Controls by name."""

from dataclasses import fields
from pathlib import Path

import torch

from lib.data import ImageSet
from lib.messages import check_known
from lib.scop.controls.base import Constant, Control, NoControl, Noise, Shuffle
from lib.scop.controls.gan import Generator
from lib.scop.controls.reduced import Deep, Gaussian
from lib.scop.controls.swap_gan import SwapGAN
from lib.scop.controls.training import Options, Trained, train_control
from lib.settings import check_int
from lib.train.recipe import pick_device

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
    kind = getattr(arm_type, "Options", Options)
    known = [option.name for option in fields(kind)]
    check_known(f"control '{name}': option", options, known)
    if issubclass(arm_type, Trained):
        control = train_control(
            arm_type, images, kind(**options), epochs=epochs, seed=seed, folder=folder,
            device=device, several=check_int("processes", processes, 1),
        )  # fmt: skip
    else:
        control = arm_type(images.shape)
    return control.to(device).eval().requires_grad_(False)
