"""The stages between notebooks: a baseline, and recovery after pruning.

Each keeps what it makes in the folder of its profile and finds it there the next time;
what was found, and what had to be made, is printed.
"""

import copy
import re
import time
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from lib import cost, data, latency, models, paths, settings, surgery, train
from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.plan import Plan
from lib.train import Recipe, checkpoint
from lib.train.recipe import pick_device


@dataclass(frozen=True)
class Sets:
    """Images to train on, to decide by, and to report once."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def load_sets(
    dataset: str,
    *,
    n_train: int = 0,
    resolution: int = 0,
    size: int = 0,
    unseen: bool = False,
) -> Sets:
    """Training, validation (a tenth of the training images, fixed) and test images.

    `n_train` limits the training images (stratified), `resolution` is the side to which
    all images are scaled; 0 means all of them, as they are. `size`: to which a folder
    of images of several sizes is brought when read (scaled, centre cropped). With
    `unseen` no training image is held out: for published weights, which have seen them
    all, validation is one half of the test images (stratified, fixed) and the other
    half is the test.
    """
    rest = data.load(dataset, "train", size=size or None)
    test = data.load(dataset, "test", size=size or None, like=rest)
    if unseen:
        test, val = data.split_validation(test, fraction=0.5)
    else:
        rest, val = data.split_validation(rest)
    if n_train:
        rest = rest.take(min(n_train, len(rest)))
    sets = rest, val, test
    return Sets(*(part.scale(resolution) if resolution else part for part in sets))


def make_baseline(
    sets: Sets,
    *,
    run: str,
    net: str,
    recipe: Recipe,
    pretrained: bool = False,
    **options,
) -> nn.Module:
    """The unpruned network: published weights, or trained here, once per profile.

    `run` is the name of the run that asks; its first part is the profile. A baseline of
    the profile is used when recipe, data and starting weights (drawn from the recipe's
    seed) are the same; where there is none, the committed one of the same name, which
    tells data, net and recipe. Throughput and the rows of its epochs go into a JSON
    file beside it. `options` go on to `models.build`.
    """
    settings.seed_everything(recipe.seed)
    model = models.build(
        net, num_classes=len(sets.train.classes), in_channels=sets.train.shape[0],
        image_size=recipe.resolution or sets.train.shape[1], pretrained=pretrained,
        **options,
    )  # fmt: skip
    if pretrained:
        print(f"baseline: {net} with published weights")
        return model.to(pick_device(None))
    data_tag = f"{sets.train.name}-{len(sets.train)}images"
    net_tag = "-".join([net, *(f"{key}{value}" for key, value in options.items())])
    name = f"{data_tag}-{net_tag}-{recipe.tag}.pt"
    path = profile_folder(run) / "baselines" / name
    committed = paths.BASES / name
    if committed.is_file() and not path.is_file():
        print(f"baseline: reading {paths.shown(committed)}")
        state = train.load_checkpoint(committed)["model"]
        with paths.reading(committed, "checkpoint"):
            model.load_state_dict(state)
        return model.to(pick_device(None))
    known = path.is_file()
    print(f"baseline: {'reading' if known else 'training, into'} {paths.shown(path)}")
    history = train.fit(
        model, sets.train, sets.val, recipe=recipe, checkpoint=path,
        label=f"{net} baseline",
    )  # fmt: skip
    speed = {"images_per_s": history.images_per_s, "seconds": history.seconds}
    paths.write_json(path.with_suffix(".json"), {**speed, **asdict(history)})
    return model


@dataclass(frozen=True)
class Base:
    """A network before pruning, beside all that scoring and recovery ask about it.

    `run`: the name of the run that asks; `net`: that of the network in
    `models.names()`. Leave the model as it is: its graph and accuracy are found once.
    """

    model: nn.Module
    sets: Sets
    _: KW_ONLY
    run: str
    net: str

    @cached_property
    def graph(self) -> Graph:
        """Traced at the size of the images."""
        return build_graph(self.model, self.sets.train.shape)

    @cached_property
    def top1(self) -> float:
        """Of the test images, in percent."""
        return train.evaluate(self.model, self.sets.test)["top1"]


def train_longer(base: Base, recipe: Recipe) -> Base:
    """The base after more training, as a base of its own; kept under the base's run."""
    model = copy.deepcopy(base.model)
    folder = run_folder(f"{base.run}/longer-{recipe.tag}")
    train.fit(
        model, base.sets.train, recipe=recipe, checkpoint=folder / "finetune.pt",
        label=folder.name,
    )  # fmt: skip
    return replace(base, model=model)


@dataclass(frozen=True)
class Recovered:
    """A pruned and fine-tuned network, the row that describes it, its folder.

    `hits`: which test images it gets right, bool [N]. `curve`: accuracy on the
    validation images (percent), before and after each epoch; empty unless it was asked
    for.
    """

    model: nn.Module
    row: dict
    folder: Path
    hits: Tensor
    curve: list[float]


def recover(
    base: Base,
    plan: Plan,
    *,
    method: str,
    recipe: Recipe,
    scratch: bool = False,
    curve: bool = False,
    **extra,
) -> Recovered:
    """Shrink, recalibrate, fine-tune, measure; everything is kept under the base's run.

    Writes `plan.json` and `finetune.pt`, which together rebuild the network, into a
    folder named after method, `extra` columns, epochs and seed. The row has top-1 in
    percent, on the test images unpruned (`base`), recalibrated (`before`) and
    fine-tuned (`after`, last epoch; `val` on the validation images, for choices), MACs
    and parameters of the shrunk network, its time (`latency.compare`), what the last
    epoch was trained with, then or now, and `extra`. The images' side is the plan's; an
    empty plan is that of the unpruned network.

    With `scratch` the shrunk network starts from new random weights, drawn from the
    recipe's seed: what the small architecture is worth without the large one's weights.
    A recipe with `distill` has the unpruned network as its teacher. `curve` also
    measures the validation images, before and after every epoch.
    """
    side, model, sets = plan.resolution, base.model, base.sets
    shape = sets.train.shape
    recipe = _at_side(recipe, side)
    tag = "-".join([method, *map(str, extra.values()), f"{recipe.epochs}epochs"])
    folder = run_folder(f"{base.run}/{tag}-seed{recipe.seed}")
    _save_plan(plan, folder)
    small = _start_from(base, plan, recipe, scratch)

    def measure(images: ImageSet) -> float:
        return train.evaluate(small, images, resolution=side)["top1"]

    before = measure(sets.test)
    start = [measure(sets.val)] if curve else []
    history = train.fit(
        small, sets.train, sets.val if curve else None, recipe=recipe,
        checkpoint=folder / "finetune.pt", label=folder.name,
        teacher=model if recipe.distill else None,
    )  # fmt: skip
    hits = train.find_hits(small, sets.test, resolution=side)
    spent = cost.count(small, (shape[0], side, side) if side else shape)
    row = {
        "method": method, "net": base.net, "dataset": sets.train.name,
        "seed": recipe.seed, "profile": base.run.split("/")[0], **extra,
        "epochs": recipe.epochs, "lr": recipe.lr, "base": base.top1, "before": before,
        "after": 100 * float(hits.double().mean()), "val": measure(sets.val),
        **asdict(spent), **spent.down_from(cost.count(model, shape)),
        **latency.compare(model, small, shape, side=side),
        "seconds": history.seconds, "images_per_s": history.images_per_s,
        "precision": history.precision, **history.made_with,
    }  # fmt: skip
    steps = [epoch["val_top1"] for epoch in history.rows] if curve else []
    return Recovered(small, row, folder, hits, start + steps)


def _save_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json`; another one is put aside with the network that it rebuilds."""
    path = folder / "plan.json"
    if path.is_file() and Plan.load(path) != plan:
        known = [file for file in (path, folder / "finetune.pt") if file.is_file()]
        names = ", ".join(file.name for file in checkpoint.put_aside(*known))
        print(f"{paths.shown(path)} was another; kept as {names}, starting afresh")
    plan.save(path)


def _start_from(base: Base, plan: Plan, recipe: Recipe, scratch: bool) -> nn.Module:
    """The network that is fine-tuned: shrunk, or a copy of the whole; recalibrated."""
    images = base.sets.train
    if plan == Plan():
        small = copy.deepcopy(base.model)
    else:
        small = surgery.shrink(base.model, plan, images.shape, graph=base.graph)
    if scratch:
        models.draw_weights(small, recipe.seed)
    train.recalibrate(
        small, images, resolution=recipe.resolution, seed=recipe.seed, num_batches=100
    )
    return small


def _at_side(recipe: Recipe, side: int | None) -> Recipe:
    """The recipe at the plan's side of the images, which may not contradict it."""
    if recipe.resolution not in (None, side):
        raise ValueError(
            f"the recipe trains at {recipe.resolution} pixels, the plan at "
            f"{side or 'the native side'}: leave the recipe's resolution out"
        )
    return replace(recipe, resolution=side)


def write_metrics(
    run: str, cfg: settings.Settings, *, rows: list[dict], **measured
) -> Path:
    """Write the run's metrics.json: settings, environment, rows, what else counts."""
    content = {
        "run": run,
        "settings": dict(vars(cfg)),
        "environment": settings.environment(),
        "wall_seconds": round(time.monotonic() - cfg.started, 1),
        "rows": rows,
        **measured,
    }
    path = paths.write_json(run_folder(run) / "metrics.json", content)
    print(f"wrote {paths.shown(path)}")
    return path


def run_folder(run: str) -> Path:
    """The folder of a run, `PROFILE/NOTEBOOK[/VARIED]` below the runs."""
    if not re.fullmatch(r"[\w=+-][\w.=+ -]*(/[\w=+-][\w.=+ -]*)*", run):
        raise ValueError(f"a run needs a plain name such as 'quick/x', got {run!r}")
    return paths.runs_root() / run


def profile_folder(run: str) -> Path:
    """The folder of the profile that a run belongs to."""
    run_folder(run)  # refuses what is not a name
    return run_folder(run.split("/")[0])
