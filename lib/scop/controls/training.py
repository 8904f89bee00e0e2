"""How a control learns: one training loop, a checkpoint after every epoch.

A training that was killed takes up after its last whole epoch and, on a CPU, ends with
bit-identical weights. Several processes step together, each on its part of every batch;
a loss that compares the images of a batch with one another then compares those of a
part.
"""

import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import paths
from lib.data import ImageSet, batches, count_batches
from lib.scop.controls.base import Control
from lib.train import checkpoint, processes, workers
from lib.train.progress import Report
from lib.train.recipe import Recipe, seeded


class Game(nn.Module):
    """What is trained, by which optimizer, and one step of it.

    Parts that only the training needs are registered here beside the arm, so they stay
    out of the arm's own state.
    """

    def __init__(self, arm: "Trained"):
        super().__init__()
        self.arm = arm
        self.optimizer: torch.optim.Optimizer | None = None
        self.count = 1  # images of the step, of this process

    def make_optimizer(self) -> torch.optim.Optimizer | None:
        """For all players together; None for an arm that is only prepared."""
        return None

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        """Learn from images x [B, C, H, W], the `turn`-th batch of the whole training.

        Returns what to report, by name: scalars.
        """
        raise NotImplementedError

    def descend(self, loss: Tensor, player: nn.Module) -> None:
        """One step of `player` down `loss`."""
        # The optimizer holds both players but skips those without a gradient; `inputs`
        # keeps this loss from leaving one with the other.
        self.optimizer.zero_grad(set_to_none=True)
        taught = list(player.parameters())
        loss.backward(inputs=taught)
        processes.merge_gradients(taught, self.count)
        self.optimizer.step()


def make_adam(lr: float, *players: nn.Module) -> torch.optim.Optimizer:
    """For two players; a short memory of the mean, for the other one moves on."""
    taught = [p for player in players for p in player.parameters()]
    return torch.optim.Adam(taught, lr=lr, betas=(0.5, 0.9), fused=True)


class Trained(Control):
    """A control that learns from the training images; their labels are never read.

    `rows`: what each epoch of the training gave. What an arm is trained with are
    numbers of its class; a checkpoint knows them.
    """

    Game: type[Game] = Game
    epochs = 0
    least = 2  # images that it can learn from
    lr = 0.0
    batch_size = 1

    def __init__(self, images: ImageSet):
        super().__init__(images.shape)
        self.rows: list[dict] = []

    def prepare(self, images: ImageSet) -> None:
        """What is computed from the images before the first epoch."""


def train_control(
    arm_type: type[Trained],
    images: ImageSet,
    recipe: Recipe,
    folder: str | Path | None,
    device: torch.device,
) -> Trained:
    """An arm of `arm_type`, trained by `recipe` or read from `folder`."""
    if len(images) < arm_type.least:
        raise ValueError(
            f"control '{arm_type.name}' learns from {arm_type.least} images or more, "
            f"{images.name} has {len(images)}"
        )
    identity = identify(arm_type, images, recipe)
    path = locate(folder, identity)
    images = images.to(device)
    # stream 0 for the start, epoch e has stream e + 1
    with seeded(recipe.seed, 0, device):
        arm = arm_type(images)
        game = arm_type.Game(arm).to(device)
        game.optimizer = game.make_optimizer()
        if not take_up(path, identity, game):
            arm.prepare(images)
            save(path, identity, game)
    if len(arm.rows) == recipe.epochs:
        return arm
    rest = game, images, recipe, identity, path
    if recipe.processes > 1 and device.type == "cpu" and not processes.joined():
        return workers.run(recipe.processes, play, *rest)
    with torch.enable_grad():
        return play(*rest)


def play(
    game: Game, images: ImageSet, recipe: Recipe, identity: dict, path: Path | None
) -> Trained:
    """Run the epochs that are missing; each ends in a row and a checkpoint."""
    count, least = processes.count(), game.arm.least
    batch = min(recipe.batch_size, len(images))
    if count > 1 and batch < count * least:
        raise ValueError(
            f"control '{game.arm.name}' needs {least} images of every batch in each "
            f"process, {count} processes share {batch}"
        )
    steps = count_batches(images, recipe.batch_size, train=True)
    rows = game.arm.rows
    game.train()
    label = f"{game.arm.name} control"
    with Report(recipe, steps, label, done=len(rows)) as report:
        for epoch in range(len(rows), recipe.epochs):
            start = time.perf_counter()
            # Seeded anew in every epoch: the draws of this one do not depend on
            # whether those before it were made here or taken up from a checkpoint.
            own = epoch + 1 + processes.stream()
            with seeded(recipe.seed, own, images.images.device):
                losses = run_epoch(game, images, recipe, epoch, report)
            seconds = time.perf_counter() - start
            speed = min(steps * recipe.batch_size, len(images)) / seconds
            clock = {"seconds": seconds, "images_per_s": speed}
            rows.append({"epoch": epoch + 1, **losses, **clock})
            save(path, identity, game)
            line = "  ".join(f"{k} {v:.3f}" for k, v in sorted(losses.items()))
            report.tell(line, speed)
    return game.arm


def run_epoch(
    game: Game, images: ImageSet, recipe: Recipe, epoch: int, report: Report
) -> dict[str, float]:
    """One pass over the images: the mean of every loss. ValueError: not finite."""
    steps = count_batches(images, recipe.batch_size, train=True)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    stream = batches(
        images, recipe.batch_size, train=True, augment=False, seed=recipe.seed,
        epoch=epoch, device=images.images.device, share=processes.share(),
    )  # fmt: skip
    for i, (x, _) in enumerate(stream):
        game.count = len(x)
        for name, value in game.step(x, epoch * steps + i).items():
            seen[name].append(value.detach())  # read at the end: a GPU need not wait
        report.bar.update()
    means = {name: torch.stack(values).mean() for name, values in seen.items()}
    processes.average(list(means.values()))
    processes.average_buffers(game)
    losses = {name: value.item() for name, value in means.items()}
    for name, value in losses.items():
        if not math.isfinite(value):
            raise ValueError(
                f"control '{game.arm.name}' diverged in epoch {epoch + 1}: {name} is "
                f"{value}. Lower lr ({game.arm.lr:g})"
            )
    return losses


# -- checkpoints ---------------------------------------------------------------------


def identify(arm_type: type[Trained], images: ImageSet, recipe: Recipe) -> dict:
    """What a checkpoint must agree on to be taken up; labels do not matter."""
    every = {name: getattr(arm_type, name) for name in dir(arm_type) if name[0] != "_"}
    chosen = {k: v for k, v in every.items() if type(v) in (int, float)}
    scale = f"{images.mean} {images.std}"
    data = checkpoint.digest_tensors(scale, images.fingerprint())
    told = {"epochs": recipe.epochs, "seed": recipe.seed, "data": data}
    return {"arm": arm_type.name, **chosen, **told}


def locate(folder: str | Path | None, identity: dict) -> Path | None:
    """The checkpoint's path in `folder`; says whether it is there."""
    if folder is None:
        return None
    tag = checkpoint.digest_identity(identity)
    path = Path(folder, f"{identity['arm']}-{tag}.pt")
    what = "reading" if path.is_file() else "training, into"
    if processes.rank() == 0:
        print(f"control: {what} {paths.shown(path)}")
    return path


def save(path: Path | None, identity: dict, game: Game) -> None:
    """Write the state after an epoch, whole or not at all."""
    optimizer = game.optimizer.state_dict() if game.optimizer else {}
    state = {"modules": game.state_dict(), "optimizer": optimizer}
    checkpoint.save(path, identity, **state, rows=game.arm.rows)


def take_up(path: Path | None, identity: dict, game: Game) -> bool:
    """Put the last finished epoch into `game`; whether there was one."""
    state = checkpoint.take_up(path, identity, ("modules", "optimizer", "rows"))
    if state is None:
        return False
    with paths.reading(path, "checkpoint"):
        game.load_state_dict(state["modules"])
        if game.optimizer:
            game.optimizer.load_state_dict(state["optimizer"])
    game.arm.rows = list(state["rows"])
    return True
