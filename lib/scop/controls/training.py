"""How a control learns: options, one training loop, checkpoints.

A checkpoint is written after every epoch. A training that was killed takes up there
and, on a CPU, ends with bit-identical weights: randomness comes from (seed, epoch).
"""

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import paths
from lib.data import ImageSet, batches, count_batches
from lib.scop.controls.base import Control
from lib.train.progress import Report
from lib.train.recipe import Recipe

FACTS = {"epoch", "seconds", "images_per_s"}  # what a row has beside losses


def number(default, low, high=math.inf, *, above=False):
    """An option of the default's type in [low, high], or in (low, high] if `above`."""
    return field(default=default, metadata={"range": (low, high, above)})


@dataclass(frozen=True)
class Options:
    """What can be chosen about an arm; `ValueError` for a wrong type or range."""

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            value = value.item() if hasattr(value, "item") else value
            kind = type(option.default)
            value = float(value) if kind is float and type(value) is int else value
            object.__setattr__(self, option.name, value)
            low, high, above = option.metadata.get("range", (0, 1, False))
            fine = type(value) is kind and low <= value <= high
            if not fine or (above and value == low) or value == math.inf:
                bounds = f"{'(' if above else '['}{low}, {high}{')]'[high < math.inf]}"
                wanted = kind.__name__ + ("" if kind is bool else f" in {bounds}")
                raise ValueError(f"{option.name} must be {wanted}, got {value!r}")


class Game(nn.Module):
    """What is trained, by which optimizers, and one step of it.

    Parts that only the training needs are registered here beside the arm, so they stay
    out of the arm's own state.
    """

    def __init__(self, arm: "Trained"):
        super().__init__()
        self.arm = arm
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by name, once the parameters lie on their device."""
        return {}

    def step(self, x: Tensor, turn: int) -> dict[str, Tensor]:
        """Learn from images x [B, C, H, W], the `turn`-th batch of the whole training.

        Returns what to report, by name: scalars.
        """
        raise NotImplementedError


class Trained(Control):
    """A control that learns from the training images; their labels are never read.

    `options` holds an instance of `Options` of the class; `rows` what each epoch of the
    training gave. `sampling` names the options that training does not depend on.
    """

    Options: type[Options] = Options
    Game: type[Game] = Game
    epochs = 0
    least = 2
    sampling: tuple[str, ...] = ()

    def __init__(self, images: ImageSet, options: Options | None = None):
        super().__init__(images.shape)
        self.options = options or self.Options()
        self.rows: list[dict] = []

    def prepare(self, images: ImageSet) -> None:
        """What is computed from the images before the first epoch."""

    def extra_repr(self) -> str:
        """Every option, so that the digest tells arms of other options apart."""
        return ", ".join(f"{k}={v!r}" for k, v in asdict(self.options).items())


def train_control(
    arm_type: type[Trained],
    images: ImageSet,
    options: Options,
    *,
    epochs: int | None,
    seed: int,
    folder: str | Path | None,
    device: torch.device,
    label: str,
) -> Trained:
    """An arm of `arm_type`, trained or read from `folder`; see `build_control`."""
    epochs = arm_type.epochs if epochs is None or not arm_type.epochs else epochs
    check_run(arm_type, images, epochs, seed)
    identity = identify(arm_type, images, options, epochs, seed)
    path = locate(folder, identity)
    images = images.to(device)
    with seeded(seed, 0, device):
        arm = arm_type(images, options)
        game = arm_type.Game(arm).to(device)
        game.optimizers = game.make_optimizers()
        rows = take_up(path, identity, game)
        if rows is None:
            arm.prepare(images)
    arm.rows = rows or []
    if rows is None:
        save(path, identity, game)
    with torch.enable_grad():
        play(game, images, identity, path, label)
    return arm


def play(game: Game, images: ImageSet, identity: dict, path, label: str) -> None:
    """Run the epochs that are missing; each ends in a row and a checkpoint."""
    epochs, seed, rows = identity["epochs"], identity["seed"], game.arm.rows
    if len(rows) >= epochs:
        return
    steps = count_batches(images, game.arm.options.batch_size, train=True)
    game.train()
    with Report(Recipe(epochs=epochs), steps, label, done=len(rows)) as report:
        for epoch in range(len(rows), epochs):
            with seeded(seed, epoch + 1, images.images.device):
                row = run_epoch(game, images, seed, epoch, report)
            rows.append(row)
            save(path, identity, game)
            losses = {k: row[k] for k in row.keys() - FACTS}
            line = "  ".join(f"{k} {v:.3f}" for k, v in sorted(losses.items()))
            report.tell(line, row["images_per_s"])


def run_epoch(
    game: Game, images: ImageSet, seed: int, epoch: int, report: Report
) -> dict:
    """One pass over the images: the mean of every loss. ValueError: not finite."""
    size = game.arm.options.batch_size
    steps = count_batches(images, size, train=True)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    start = time.perf_counter()
    stream = batches(
        images, size, train=True, augment=False, seed=seed, epoch=epoch,
        device=images.images.device,
    )  # fmt: skip
    for i, (x, _) in enumerate(stream):
        for name, value in game.step(x, epoch * steps + i).items():
            seen[name].append(value.detach())
        report.bar.update()
    losses = {name: torch.stack(values).mean().item() for name, values in seen.items()}
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"control '{game.arm.name}' diverged in epoch {epoch + 1}: {bad[0]} is "
            f"{losses[bad[0]]}. Lower lr ({game.arm.options.lr:g})"
        )
    seconds = time.perf_counter() - start
    rate = min(steps * size, len(images)) / seconds
    return {"epoch": epoch + 1, **losses, "seconds": seconds, "images_per_s": rate}


@contextmanager
def seeded(seed: int, stream: int, device: torch.device) -> Iterator[None]:
    """The global generators, set from (seed, stream) inside and put back after."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device.index or 0] if cuda else []):
        torch.default_generator.manual_seed(seed * 1_000_003 + stream)
        if cuda:
            torch.cuda.manual_seed(seed * 1_000_003 + stream)
        yield


def check_run(arm_type: type[Trained], images: ImageSet, epochs: int, seed: int):
    """ValueError for what no arm can be trained with."""
    for name, value in {"epochs": epochs, "seed": seed}.items():
        if type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"{name} must be an int of 0 or more, got {value!r}")
    if len(images) < arm_type.least:
        raise ValueError(
            f"control '{arm_type.name}' learns from {arm_type.least} images or more, "
            f"{images.name} has {len(images)}"
        )


# -- checkpoints --------------------------------------------------------------------


def identify(
    arm_type: type[Trained], images: ImageSet, options: Options, epochs: int, seed: int
) -> dict:
    """What a checkpoint must agree on to be taken up."""
    chosen = {k: v for k, v in asdict(options).items() if k not in arm_type.sampling}
    facts = f"{images.mean} {images.std} {tuple(images.images.shape)}"
    digest = hashlib.sha256(facts.encode())
    digest.update(images.images.cpu().contiguous().numpy())
    return {
        "arm": arm_type.name, **chosen, "epochs": epochs, "seed": seed,
        "data": digest.hexdigest()[:16],
    }  # fmt: skip


def locate(folder: str | Path | None, identity: dict) -> Path | None:
    """The checkpoint's path in `folder`; says whether it is there."""
    if folder is None:
        return None
    code = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = Path(folder) / f"{identity['arm']}-{code[:12]}.pt"
    what = "reading" if path.is_file() else "training, into"
    print(f"control: {what} {paths.shown(path)}")
    return path


def save(path: Path | None, identity: dict, game: Game) -> None:
    """Write the state after an epoch, whole or not at all."""
    if path is None:
        return
    state = {
        "identity": identity,
        "modules": game.state_dict(),
        "optimizers": {k: o.state_dict() for k, o in game.optimizers.items()},
        "rows": game.arm.rows,
    }
    paths.write_atomic(path, lambda tmp: torch.save(state, tmp))


def take_up(path: Path | None, identity: dict, game: Game) -> list[dict] | None:
    """Put the last finished epoch into `game`; its rows, None where there is no file.

    ValueError names a file that is damaged or belongs to something else.
    """
    if path is None or not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        fits = state["identity"] == identity
        if fits:
            game.load_state_dict(state["modules"])
            for name, optimizer in game.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        rows = list(state["rows"])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{path}: not a readable control checkpoint ({type(error).__name__}); "
            "delete it to train afresh"
        ) from error
    if not fits:
        raise ValueError(
            f"{path}: belongs to another control than its name says; delete it to "
            "train afresh"
        )
    return rows
