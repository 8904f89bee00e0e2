"""Training, evaluation and recalibration: one `fit` for every stage.

A checkpoint is written after every epoch; a run that was killed takes up there and, on
a CPU, ends with bit-identical weights. On a GPU the whole step is one CUDA graph and
nothing is synchronised before the epoch's end.
"""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.data import ImageSet, batches, count_batches
from lib.graph.watch import dtype_of, modes_kept
from lib.messages import check_finite
from lib.settings import check_int, made_with
from lib.train import checkpoint as checkpoints
from lib.train.progress import Report
from lib.train.recipe import (
    Recipe,
    make_optimizer,
    pick_device,
    pick_layout,
    pick_precision,
    rate_at,
)
from lib.train.update import Update, at_least_float32, make_update

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
    """
    recipe = _pick_recipe(recipe, epochs, settings)
    device = pick_device(device)
    teacher, told = _seat_teacher(teacher, recipe, device)
    precision = pick_precision(recipe.precision, device, model)
    model.to(device, memory_format=pick_layout(model, device))
    optimizer = make_optimizer(model, recipe, device)
    identity = _identify(model, recipe, train_set, precision) | told
    rows, before = _resume(checkpoint, identity, model, optimizer)
    history = History(rows, str(device), precision, resumed=len(rows))
    history.made_with = made_with() if len(rows) < recipe.epochs else before
    update = make_update(
        model, optimizer, recipe, precision, cuda_graph=cuda_graph, teacher=teacher,
        images=max(train_set, val_set or train_set, key=lambda s: len(s.classes)),
    )  # fmt: skip
    steps = count_batches(train_set, recipe.batch_size, train=True)
    report = Report(recipe, steps, label, done=history.resumed)
    train_set = train_set.to(device)
    everything = checkpoint, identity, model, optimizer, history
    with report, _tuned_convolutions(), modes_kept(model):
        for epoch in range(history.resumed, recipe.epochs):
            row = _run_epoch(train_set, update, epoch, report)
            if val_set is not None:
                measured = evaluate(model, val_set, resolution=recipe.resolution)
                row["val_top1"] = measured["top1"]
            row |= watch(model) if watch else {}
            history.rows.append(row)
            _keep(*everything)
            report.epoch_done(row)
    if not history.rows:
        _keep(*everything)
    return history


def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """`top1`, `top5` in percent and mean cross-entropy `loss`, in its own precision.

    Every image counts once, whatever the size of the last batch. The model's device
    and train/eval mode stay; with fewer than 6 classes top5 is 100 by definition.
    ValueError: outputs that are not numbers, with the tensor that is to blame.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for output, y in forward(
        model, images, resolution=resolution, batch_size=batch_size
    ):
        totals = totals.to(y.device) + _count_batch(output, y)
    loss, top1, top5 = (totals / len(images)).tolist()
    if math.isnan(loss):  # every guess is then the first class
        check_finite("the tensor", _list_floats(model))
        raise ValueError(f"{images.name}: the outputs of the network are not numbers")
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}


def find_hits(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 500,
) -> Tensor:
    """Which images are classified rightly, bool [N] on the CPU; else as `evaluate`."""
    outputs = forward(model, images, resolution=resolution, batch_size=batch_size)
    return torch.cat([(output.argmax(1) == y).cpu() for output, y in outputs])


def forward(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 500,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run every image through `model` once, in order: (output, labels) batch by batch.

    In evaluation mode, without gradients, on the model's device and in its precision;
    each module's own mode is put back when the iteration ends or is left.
    """
    device = next(model.parameters()).device
    layout = pick_layout(model, device)
    stream = batches(
        images, batch_size, resolution=resolution, device=device, dtype=dtype_of(model)
    )
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for x, y in stream:
            yield model(x.contiguous(memory_format=layout)), y


def recalibrate(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 128,
    num_batches: int | None = None,
    augment: bool = True,
    seed: int = 0,
) -> None:
    """Measure the running statistics of every BatchNorm anew, over one pass.

    The exact average over the batches of one epoch (or of `num_batches`), under the
    training augmentation: plain images give statistics that training never saw. Only
    BatchNorms are put in training mode, weights stay bit-identical. A BatchNorm that
    does not run keeps what it has; so do all of them if this is interrupted, or comes
    to a statistic that is not finite (ValueError, by name).
    """
    if num_batches is not None:
        num_batches = check_int("num_batches", num_batches, 1)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = {norm: norm.momentum for norm in norms if norm.track_running_stats}
    if not momenta:
        return
    device = next(model.parameters()).device
    layout = pick_layout(model, device)
    stream = batches(
        images, batch_size, train=True, augment=augment, seed=seed,
        resolution=resolution, device=device, dtype=dtype_of(model),
    )  # fmt: skip
    with modes_kept(model), torch.no_grad(), _statistics_measured(momenta):
        model.eval()
        for norm in momenta:
            norm.train()
        for x, _ in itertools.islice(stream, num_batches):
            model(x.contiguous(memory_format=layout))
        check_finite("the tensor", _list_floats(model))


def _list_floats(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that can be NaN, by name."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point()}


@contextmanager
def _statistics_measured(momenta: dict) -> Iterator[None]:
    """BatchNorms average anew while inside; what was not measured is put back."""
    before = {
        norm: [(b, b.clone()) for b in norm._buffers.values() if b is not None]
        for norm in momenta
    }
    measured: set[nn.Module] = set()
    try:
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        yield
        measured = {norm for norm in momenta if int(norm.num_batches_tracked)}
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            for buffer, kept in before[norm] if norm not in measured else ():
                buffer.copy_(kept)


# -- checkpoints --------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of `fit`: identity, model, optimizer, rows.

    A missing or damaged file is one error that names it; pickled code is never run.
    """
    return checkpoints.load(path, PARTS)


def _identify(
    model: nn.Module, recipe: Recipe, train_set: ImageSet, precision: str
) -> dict:
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    state = model.state_dict()
    return {
        **asdict(recipe),
        "precision": precision,
        "data": checkpoints.digest_images(train_set),
        "trained": checkpoints.digest_tensors(" ".join(trained)),
        "start": checkpoints.digest_tensors(" ".join(state), *state.values()),
    }


def _keep(checkpoint, identity: dict, model, optimizer, history: History) -> None:
    checkpoints.save(
        checkpoint, identity, model=model.state_dict(),
        optimizer=optimizer.state_dict(), rows=history.rows,
        made_with=history.made_with,
    )  # fmt: skip


def _resume(
    checkpoint: str | Path | None, identity: dict, model: nn.Module, optimizer
) -> tuple[list[dict], dict]:
    """Load the last finished epoch; the rows so far and what they were made with."""
    state = checkpoints.take_up(checkpoint, identity, PARTS)
    if state is None:
        return [], {}
    own = ("lr", "fused", "foreach", "capturable")  # belong to the device, not the run
    groups = [{k: g[k] for k in own if k in g} for g in optimizer.param_groups]
    with checkpoints.reading(checkpoint):
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
        dtype=dtype_of(update.model),
    )  # fmt: skip
    steps = count_batches(train_set, recipe.batch_size, train=True)
    update.model.train()
    update.start_epoch()
    start = time.perf_counter()
    # The same dropout, whether or not the run was taken up before this epoch.
    with seeded(recipe.seed, epoch, device):
        for i, (x, y) in enumerate(stream):
            rate = rate_at(recipe, epoch + i / steps)
            update.set_rate(rate)
            update(x, y)
            report.step_done(update)
    loss, top1, seen = update.totals()  # the epoch's only synchronisation on a GPU
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


@contextmanager
def seeded(seed: int, stream: int, device: torch.device) -> Iterator[None]:
    """torch's generators, set from (seed, stream) while inside and put back after."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device.index or 0] if on_gpu else []):
        torch.default_generator.manual_seed(seed * 1_000_003 + stream)
        if on_gpu:
            torch.cuda.manual_seed(seed * 1_000_003 + stream)
        yield


def _count_batch(output: Tensor, y: Tensor) -> Tensor:
    """[sum of losses, hits at rank 1, hits up to rank 5] of one batch."""
    output = at_least_float32(output)  # the network's own numbers, summed exactly
    loss = F.cross_entropy(output, y, reduction="sum")
    ranks = output.topk(min(5, output.shape[1]), dim=1).indices == y[:, None]
    return torch.stack([loss.double(), ranks[:, 0].sum(), ranks.any(1).sum()])


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


def _seat_teacher(
    teacher: nn.Module | None, recipe: Recipe, device: torch.device
) -> tuple[nn.Module | None, dict]:
    """A copy of the teacher in evaluation on the device, and what identifies it."""
    if (teacher is None) != (recipe.distill == 0):
        raise ValueError("distill needs a teacher, and a teacher needs distill > 0")
    if teacher is None:
        return None, {}
    teacher = copy.deepcopy(teacher).to(device).eval()
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
