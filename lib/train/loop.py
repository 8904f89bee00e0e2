"""The training loop: one `fit` for every stage.

A run that was killed takes up after its last whole epoch and, on a CPU, ends with
bit-identical weights. On a GPU the whole step is one CUDA graph and nothing is
synchronised before the epoch's end.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lib import paths
from lib.data import ImageSet, batches, count_batches
from lib.graph.watch import dtype_of, modes_kept
from lib.settings import made_with
from lib.train import checkpoint as checkpoints
from lib.train import processes, workers
from lib.train.measure import evaluate
from lib.train.progress import Report
from lib.train.recipe import (
    Recipe,
    make_optimizer,
    pick_device,
    pick_layout,
    pick_precision,
    rate_at,
    seeded,
)
from lib.train.update import Update, make_update

PARTS = ("model", "optimizer", "rows")  # of a checkpoint, beside its identity


@dataclass
class History:
    """What a fit did: one row per epoch, and on what.

    `rows`: epoch, loss, top1 and val_top1 in percent, lr, seconds, images_per_s.
    `resumed` is the number of epochs taken over from a checkpoint, `made_with` the
    device, torch and code revision that trained the last one, then or now.
    """

    rows: list[dict] = field(default_factory=list)
    device: str = "cpu"
    precision: str = "float32"
    resumed: int = 0
    made_with: dict = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Training time of all epochs, without validation."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def images_per_s(self) -> float:
        """Median training throughput over the epochs."""
        rates = [row["images_per_s"] for row in self.rows]
        return statistics.median(rates) if rates else 0.0


def fit(
    model: nn.Module,
    train_set: ImageSet,
    val_set: ImageSet | None = None,
    *,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    cuda_graph: bool | str = "auto",
    label: str = "fit",
    teacher: nn.Module | None = None,
    watch: Callable[[nn.Module], dict] | None = None,
    **settings,
) -> History:
    """Train `model` in place; the last epoch's weights are what counts.

    How: a `recipe`, or `epochs` and `settings`, the fields of one. `val_set` is
    measured after every epoch and decides nothing. `checkpoint`: written after every
    epoch, taken up for the same recipe, data and starting weights, else put aside.
    `watch` adds plain numbers to each epoch's row. `cuda_graph`: on a GPU "auto"
    captures the step where it can; True insists; False is for a network that branches
    in plain Python, of which a graph would repeat one branch. Parameters that do not
    require a gradient stay. `teacher`: a network of the same classes, for a recipe with
    `distill`. `ValueError`: bad settings, a loss that is not finite.

    Several `processes` of a recipe are started here, as children with as many threads
    each as torch has now (gloo on the CPU, NCCL on GPUs, not yet run there); in a
    process group that is there already, such as torchrun's, its own number counts. They
    step together down the gradient of the whole batch, as one process does, to
    rounding; but BatchNorms take the statistics of their process's part, and `dropout`
    is drawn for each. What they are handed must be importable, not defined in a
    notebook.
    """
    recipe = _pick_recipe(recipe, epochs, settings)
    job = Job(
        recipe, pick_device(device), checkpoint, cuda_graph, label, teacher, watch
    )
    _check_processes(recipe, train_set, job.device)
    if recipe.processes == 1 or processes.joined():
        return _fit_here(model, train_set, val_set, job)[1]
    state, history = workers.run(
        recipe.processes, _fit_here, model, train_set, val_set, job
    )
    _place(model, job.device)
    model.load_state_dict(state)
    return history


def _place(model: nn.Module, device: torch.device) -> None:
    model.to(device, memory_format=pick_layout(model, device))


@dataclass(frozen=True)
class Job:
    """What `fit` was asked for, beside the network and the images."""

    recipe: Recipe
    device: torch.device
    checkpoint: str | Path | None
    cuda_graph: bool | str
    label: str
    teacher: nn.Module | None
    watch: Callable[[nn.Module], dict] | None


def _fit_here(
    model: nn.Module, train_set: ImageSet, val_set: ImageSet | None, job: Job
) -> tuple[dict, History]:
    """`fit` as the only process or one of several: the state at the end, and how."""
    recipe, device = job.recipe, job.device
    teacher, told = _seat_teacher(job)
    precision = pick_precision(recipe.precision, device, model)
    _place(model, device)
    optimizer = make_optimizer(model, recipe, device)
    identity = _identify(model, recipe, train_set, precision) | told
    processes.check_agreed(identity)
    rows, before = _resume(job.checkpoint, identity, model, optimizer)
    done = len(rows)
    processes.check_agreed({"number of finished epochs": done})
    history = History(rows, str(device), precision, resumed=done)
    history.made_with = _made_here() if done < recipe.epochs else before
    update = make_update(
        model, optimizer, recipe, precision, cuda_graph=job.cuda_graph, teacher=teacher,
        images=max(train_set, val_set or train_set, key=lambda s: len(s.classes)),
    )  # fmt: skip
    steps = count_batches(train_set, recipe.batch_size, train=True)
    report = Report(recipe, steps, job.label, done)
    train_set = train_set.to(device)

    def keep() -> None:
        checkpoints.save(
            job.checkpoint, identity, model=model.state_dict(),
            optimizer=optimizer.state_dict(), rows=rows, made_with=history.made_with,
        )  # fmt: skip

    norms = processes.norms_synchronised(model, recipe.sync_norms)
    with report, _tuned_convolutions(), norms, modes_kept(model):
        for epoch in range(done, recipe.epochs):
            row = _run_epoch(train_set, update, epoch, report)
            if val_set is not None:
                measured = evaluate(model, val_set, resolution=recipe.resolution)
                row["val_top1"] = measured["top1"]
            row |= job.watch(model) if job.watch else {}
            rows.append(row)
            keep()
            report.epoch_done(row)
    if not rows:  # what comes after a recipe of no epochs looks for its file
        keep()
    return model.state_dict(), history


# -- checkpoints --------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of `fit`: identity, model, optimizer, rows; see `load`."""
    return checkpoints.load(path, PARTS)


def _identify(
    model: nn.Module, recipe: Recipe, train_set: ImageSet, precision: str
) -> dict:
    """What a checkpoint must agree on to be taken up.

    The weights at the start too: a run names a network, but not what was done to it,
    and one that was pruned by another plan may have the same name and shapes.
    """
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    state = model.state_dict()
    return {
        **recipe.identity,
        "precision": precision,
        "data": checkpoints.digest_images(train_set),
        "trained": checkpoints.digest_tensors(" ".join(trained)),
        "start": checkpoints.digest_tensors(" ".join(state), *state.values()),
    }


def _resume(
    checkpoint: str | Path | None, identity: dict, model: nn.Module, optimizer
) -> tuple[list[dict], dict]:
    """Load the last finished epoch; the rows so far and what they were made with."""
    state = checkpoints.take_up(checkpoint, identity, PARTS)
    if state is None:
        return [], {}
    # A file says how the optimizer ran where it was written; these belong to the device
    # and stay as they were made here (on a GPU the rate is a tensor).
    own = ("lr", "fused", "foreach", "capturable")
    groups = [{k: g[k] for k in own if k in g} for g in optimizer.param_groups]
    with paths.reading(checkpoint, "checkpoint"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update(kept)
    return state["rows"], state.get("made_with", {})


# -- one epoch ----------------------------------------------------------------------


def _run_epoch(train_set: ImageSet, update: Update, epoch: int, report: Report) -> dict:
    recipe, device = update.recipe, train_set.images.device
    stream = batches(
        train_set, recipe.batch_size, train=True, augment=recipe.augment,
        seed=recipe.seed, epoch=epoch, resolution=recipe.resolution, device=device,
        dtype=dtype_of(update.model), share=processes.share(),
    )  # fmt: skip
    steps = count_batches(train_set, recipe.batch_size, train=True)
    update.model.train()
    update.start_epoch()
    start = time.perf_counter()
    # Seeded anew in every epoch, or dropout would depend on whether those before it
    # were trained here or taken up. Each process has a stream of its own: its images
    # are others, and the same masks on all parts would make them alike.
    with seeded(recipe.seed, epoch + processes.stream(), device):
        for i, (x, y) in enumerate(stream):
            rate = rate_at(recipe, epoch + i / steps)
            update.set_rate(rate)
            update(x, y)
            report.step_done(update)
    # The epoch's only synchronisation on a GPU, and within the time: before it the
    # kernels are launched, not done.
    loss, top1, seen = update.totals(everywhere=True)
    processes.average_buffers(update.model)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise ValueError(
            f"diverged in epoch {epoch + 1} of {recipe.epochs}: the loss is {loss}. "
            f"Lower lr ({recipe.lr:g}) or add warmup epochs ({recipe.warmup:g})"
        )
    return {
        "epoch": epoch + 1, "loss": loss, "top1": top1, "val_top1": None, "lr": rate,
        "seconds": seconds, "images_per_s": seen / seconds,
    }  # fmt: skip


# -- checks and settings that are put back ------------------------------------------


def _pick_recipe(recipe: Recipe | None, epochs: int | None, settings: dict) -> Recipe:
    if recipe is None:
        if epochs is None:
            raise ValueError("fit needs a recipe, or epochs and the settings of one")
        return Recipe(epochs=epochs, **settings)
    given = [*settings, *(["epochs"] if epochs is not None else [])]
    if given:
        raise ValueError(f"fit takes a recipe or its settings, got both: {given}")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a train.Recipe, got {recipe!r}")
    return recipe


def _check_processes(recipe: Recipe, train_set: ImageSet, device: torch.device) -> None:
    number = processes.count() if processes.joined() else recipe.processes
    batch = min(recipe.batch_size, len(train_set))
    if number > max(batch, 1):
        raise ValueError(
            f"processes must be at most {batch}, the images of a batch, got {number}"
        )
    on_gpu = device.type == "cuda"
    if on_gpu and number > torch.cuda.device_count():
        raise ValueError(
            f"processes must be at most {torch.cuda.device_count()}, the GPUs that "
            f"torch sees, got {number}"
        )
    if recipe.sync_norms and not on_gpu:
        raise ValueError(
            "sync_norms=True: torch synchronises BatchNorms on GPUs only; leave it "
            "out, each process then normalises by the images of its own part"
        )


def _made_here() -> dict:
    """What trains, with the number of processes where there are several."""
    made, number = made_with(), processes.count()
    several = f", {number} processes" if number > 1 else ""
    return made | {"device": made["device"] + several}


def _seat_teacher(job: Job) -> tuple[nn.Module | None, dict]:
    """A copy of the teacher in evaluation on the device, and what identifies it."""
    if (job.teacher is None) != (job.recipe.distill == 0):
        raise ValueError("distill needs a teacher, and a teacher needs distill > 0")
    if job.teacher is None:
        return None, {}
    teacher = copy.deepcopy(job.teacher).to(job.device).eval()
    state = teacher.state_dict().values()
    return teacher, {"teacher": checkpoints.digest_tensors("", *state)}


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """cuDNN picks by timing while inside, unless torch was told to be deterministic."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
