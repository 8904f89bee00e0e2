"""Controls by name."""

import difflib
from dataclasses import fields
from pathlib import Path

import torch

from lib.data import ImageSet
from lib.scop.controls.base import Control, NoControl, Noise, Shuffle
from lib.scop.controls.gan import Generator
from lib.scop.controls.reduced import Deep, Gaussian
from lib.scop.controls.swap_gan import SwapGAN
from lib.scop.controls.training import Options, Trained, train_control
from lib.train.recipe import pick_device

ARMS: dict[str, type[Control]] = {
    arm.name: arm
    for arm in (Generator, SwapGAN, Deep, Gaussian, Shuffle, Noise, NoControl)
}


def build_control(
    name: str,
    images: ImageSet,
    *,
    seed: int = 0,
    epochs: int | None = None,
    folder: str | Path | None = None,
    device: torch.device | str | None = None,
    label: str | None = None,
    **options,
) -> Control:
    """The control `name`, ready to sample: in evaluation, frozen, on `device`.

    images: the training images; arms that learn never read the labels. epochs: of arms
    that are trained, None for their default; the others have none. folder: where a
    trained arm keeps `<name>-<hash>.pt` after every epoch and finds it again, if arm,
    options, epochs, seed and images are the same. device: default a GPU where there is
    one. label: what progress lines begin with. options: fields of the arm's `Options`.
    Torch's global generators are left as they were.

    ValueError: unknown names, values out of range, a damaged checkpoint, a loss that
    stops being finite.
    """
    arm_type = ARMS.get(name)
    if arm_type is None:
        raise ValueError(f"unknown control {name!r}{suggest(name, ARMS)}")
    device = pick_device(device)
    chosen = read_options(arm_type, options)
    if issubclass(arm_type, Trained):
        control = train_control(
            arm_type, images, chosen, epochs=epochs, seed=seed, folder=folder,
            device=device, label=label or f"{name} control",
        )  # fmt: skip
    else:
        control = arm_type(images.shape)
    return control.to(device).eval().requires_grad_(False)


def read_options(arm_type: type[Control], options: dict) -> Options:
    """The arm's options with `options` changed. ValueError: no such option."""
    kind = getattr(arm_type, "Options", Options)
    known = [option.name for option in fields(kind)]
    for option in options:
        if option not in known:
            rest = f"has no option {option!r}{suggest(option, known)}"
            raise ValueError(f"control '{arm_type.name}' {rest}")
    return kind(**options)


def suggest(word: str, known) -> str:
    """The nearest known name, and all of them."""
    nearest = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    hint = f", did you mean {nearest[0]!r}?" if nearest else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"
