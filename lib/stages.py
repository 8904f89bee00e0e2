"""The stages between notebooks: a baseline, and recovery after pruning.

Each keeps what it makes in the folder of its profile and finds it there the next time;
what was found, and what had to be made, is printed.
"""

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from lib import cost, data, models, paths, settings, surgery, train
from lib.data import ImageSet
from lib.plan import Plan
from lib.train.recipe import pick_device

STARTED = time.monotonic()  # a notebook imports this module when it begins


@dataclass(frozen=True)
class Sets:
    """Images to train on, to decide by, and to report once."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def load_sets(dataset: str, *, n_train: int = 0, unseen: bool = False) -> Sets:
    """Training, validation (a tenth of the training images, fixed) and test images.

    `n_train` limits the training images (stratified); 0 means all of them. With
    `unseen` no training image is held out: for published weights, which have seen them
    all, validation is one half of the test images (stratified, fixed) and the other
    half is the test.
    """
    rest, test = data.load(dataset, "train"), data.load(dataset, "test")
    if unseen:
        test, val = data.split_validation(test, fraction=0.5)
    else:
        rest, val = data.split_validation(rest)
    if n_train:
        rest = rest.take(min(n_train, len(rest)))
    return Sets(rest, val, test)


def make_baseline(
    sets: Sets,
    *,
    run: str,
    net: str,
    pretrained: bool,
    epochs: int,
    lr: float,
    seed: int,
    warmup: float = 0.0,
    batch_size: int = 128,
    **options,
) -> nn.Module:
    """The unpruned network: published weights, or trained here, once per profile.

    `run` is the name of the run that asks; its first part is the profile. A stored
    baseline is used when its recipe, data and seed are the same. Throughput and the
    rows of its epochs go into a JSON file beside it. `warmup` is in epochs; `options`
    go on to `models.build`.
    """
    channels, classes = sets.train.shape[0], len(sets.train.classes)
    if pretrained:
        print(f"baseline: {net} with published weights")
        model = models.build(
            net, num_classes=classes, in_channels=channels, pretrained=True, **options
        )
        return model.to(pick_device(None))
    settings.seed_everything(seed)
    model = models.build(
        net, num_classes=classes, in_channels=channels,
        image_size=sets.train.shape[1], **options,
    )  # fmt: skip
    data_tag = f"{sets.train.name}-{len(sets.train)}images"
    net_tag = "-".join([net, *(f"{key}{value}" for key, value in options.items())])
    rate_tag = f"lr{lr:g}" + (f"-warmup{warmup:g}" if warmup else "")
    rate_tag += f"-batch{batch_size}" if batch_size != 128 else ""
    name = f"{data_tag}-{net_tag}-{epochs}epochs-{rate_tag}-seed{seed}.pt"
    path = profile_folder(run) / "baselines" / name
    known = path.is_file()
    print(f"baseline: {'reading' if known else 'training, into'} {paths.shown(path)}")
    history = train.fit(
        model, sets.train, sets.val, epochs=epochs, lr=lr, warmup=warmup, seed=seed,
        batch_size=batch_size, checkpoint=path, label=f"{net} baseline",
    )  # fmt: skip
    speed = {"images_per_s": history.images_per_s, "seconds": history.seconds}
    paths.write_json(path.with_suffix(".json"), {**speed, **asdict(history)})
    return model


@dataclass(frozen=True)
class Recovered:
    """A pruned and fine-tuned network, the row that describes it, its folder.

    `curve`: accuracy on the validation images (percent), before and after each epoch.
    """

    model: nn.Module
    row: dict
    folder: Path
    curve: list[float]


def recover(
    model: nn.Module,
    plan: Plan,
    sets: Sets,
    *,
    run: str,
    method: str,
    net: str,
    base_top1: float,
    seed: int,
    epochs: int,
    lr: float,
    warmup: float = 0.0,
    batch_size: int = 128,
    scratch: bool = False,
    **extra,
) -> Recovered:
    """Shrink, recalibrate, fine-tune, measure; everything is kept under `run`.

    Writes `plan.json` and `finetune.pt`, which together rebuild the network, into a
    folder named after method, extra columns and seed. The row has accuracy on the
    test set before pruning (`base_top1`, in percent), after recalibration over 100
    batches (`before`) and after fine-tuning (`after`, last epoch), MACs and parameters
    of the shrunk network, what the last epoch was trained with (device, torch and
    revision; a later run may have taken it up), and the `extra` columns. With `scratch`
    the shrunk network starts from new random weights, drawn from `seed`: what the small
    architecture is worth without the large one's weights.
    """
    tag = "-".join([method, *map(str, extra.values()), f"seed{seed}"])
    folder = run_folder(f"{run}/{tag}")
    shape = sets.train.shape
    base = cost.count(model, shape)
    plan.save(folder / "plan.json")
    small = surgery.shrink(model, plan, shape)
    side = plan.resolution
    if scratch:
        models.draw_weights(small, seed)
    train.recalibrate(small, sets.train, resolution=side, seed=seed, num_batches=100)
    before = train.evaluate(small, sets.test, resolution=side)["top1"]
    start = train.evaluate(small, sets.val, resolution=side)["top1"]
    history = train.fit(
        small, sets.train, sets.val, epochs=epochs, lr=lr, warmup=warmup, seed=seed,
        batch_size=batch_size, resolution=side, checkpoint=folder / "finetune.pt",
        label=folder.name,
    )  # fmt: skip
    after = before
    if epochs:
        after = train.evaluate(small, sets.test, resolution=side)["top1"]
    here = (shape[0], side, side) if side else shape
    spent = cost.count(small, here)
    row = {
        "method": method, "net": net, "dataset": sets.train.name, "seed": seed,
        "profile": run.split("/")[0], **extra, "epochs": epochs,
        "base": base_top1, "before": before, "after": after,
        "macs": spent.macs, "params": spent.params, **spent.down_from(base),
        "seconds": history.seconds, "images_per_s": history.images_per_s,
        "precision": history.precision, **history.made_with,
    }  # fmt: skip
    curve = [start, *(epoch["val_top1"] for epoch in history.rows)]
    return Recovered(small, row, folder, curve)


def write_metrics(
    run: str, cfg: settings.Settings, *, rows: list[dict], **measured
) -> Path:
    """Write the run's metrics.json: settings, environment, rows, what else counts."""
    content = {
        "run": run,
        "settings": cfg.as_dict(),
        "environment": settings.environment(),
        "wall_seconds": round(time.monotonic() - STARTED, 1),
        "rows": rows,
        **measured,
    }
    path = paths.write_json(run_folder(run) / "metrics.json", content)
    print(f"wrote {paths.shown(path)}")
    return path


def run_folder(run: str) -> Path:
    """The folder of a run, `PROFILE/NOTEBOOK[/VARIED]` below the runs."""
    if not re.fullmatch(r"[\w=-][\w.=-]*(/[\w=-][\w.=-]*)*", run):
        raise ValueError(f"a run needs a plain name such as 'quick/x', got {run!r}")
    return paths.runs_root() / run


def profile_folder(run: str) -> Path:
    """The folder of the profile that a run belongs to."""
    run_folder(run)  # refuses what is not a name
    return run_folder(run.split("/")[0])
