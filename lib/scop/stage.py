"""The stage of this paper between notebooks: betas, learnt once per profile."""

from torch import nn

from lib import stages
from lib.scop.controls.build import build_control
from lib.scop.selection import Betas, select


def learn_betas(
    model: nn.Module,
    sets: stages.Sets,
    *,
    run: str,
    net: str,
    control: str,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 128,
    num_images: int = 0,
    control_epochs: int = 0,
) -> Betas:
    """Build the control named `control`, then select with it; both kept in the profile.

    The control is trained once, on all training images with seed 0, as the paper makes
    its knockoffs once; `seed` is that of the selection. `num_images` limits the images
    of the selection (stratified), 0 means all; `control_epochs` 0 means the arm's
    default. What is found in the folder of the profile is used, and said.
    """
    folder = stages.profile_folder(run)
    arm = build_control(
        control, sets.train, epochs=control_epochs or None, folder=folder / "controls"
    )
    images = sets.train
    if num_images:
        images = images.take(min(num_images, len(images)), seed)
    facts = f"{epochs}epochs-lr{lr:g}-batch{batch_size}-seed{seed}"
    name = f"{images.name}-{len(images)}images-{net}-{control}-{facts}.pt"
    return select(
        model, images, arm, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed,
        checkpoint=folder / "betas" / name, label=f"beta, {control}, seed {seed}",
    )  # fmt: skip
