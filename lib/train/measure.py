"""What a network is worth: evaluation, and the statistics of its BatchNorms.

Several processes deal out the batches one by one and put together what they found, so
that every batch is what it would be in one process.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.data import ImageSet, batches_for
from lib.graph.watch import modes_kept, recorded
from lib.messages import check_finite
from lib.settings import check_int
from lib.train import processes
from lib.train.recipe import pick_layout
from lib.train.update import at_least_float32


def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """`top1`, `top5` in percent and mean cross-entropy `loss`, in its own precision.

    With fewer than 6 classes top5 is 100 by definition. ValueError: outputs that are
    not numbers, with the tensor that is to blame.
    """
    scores = _score(model, images, resolution, batch_size)
    loss, top1, top5 = scores.mean(0).tolist()
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
    return _score(model, images, resolution, batch_size)[:, 1].bool()


def _score(
    model: nn.Module, images: ImageSet, resolution: int | None, batch_size: int
) -> Tensor:
    """float64 [N, 3] on the CPU: loss, right at rank 1 and up to rank 5, by image."""
    outputs = forward(
        model, images, resolution=resolution, batch_size=batch_size,
        share=processes.share(),
    )  # fmt: skip
    found = [_score_batch(output, y) for output, y in outputs]  # a GPU need not wait
    return torch.cat(processes.gather([part.cpu() for part in found]))


def _score_batch(output: Tensor, y: Tensor) -> Tensor:
    output = at_least_float32(output)  # the network's own numbers, summed exactly
    loss = F.cross_entropy(output, y, reduction="none")
    five = output.topk(min(5, output.shape[1]), dim=1).indices == y[:, None]
    first = output.argmax(1) == y  # of equal outputs the first, on every device
    return torch.stack([loss.double(), first, five.any(1)], 1)


def forward(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    batch_size: int = 500,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run every image through `model` once, in order: (output, labels) batch by batch.

    In evaluation mode, without gradients, on the model's device and in its precision;
    each module's own mode is put back when the iteration ends or is left. share (i, n):
    every n-th batch from the i-th on.
    """
    layout = pick_layout(model, next(model.parameters()).device)
    how = {"resolution": resolution, "share": share, "whole": True}
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for x, y in batches_for(model, images, batch_size, **how):
            yield model(x.contiguous(memory_format=layout)), y


def watch(
    model: nn.Module,
    images: ImageSet,
    names: Iterable[str],
    *,
    inputs: bool = False,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[tuple[dict[str, list[Tensor]], Tensor]]:
    """`forward`, with what the modules named make of a batch, call by call, and labels.

    `inputs`: what they read instead. `keep(name, tensor)`: what is kept of each.
    """
    with recorded(model, names, inputs=inputs, keep=keep) as calls:
        for _, labels in forward(model, images):
            yield calls, labels
            for rows in calls.values():
                rows.clear()


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
    training augmentation: plain images give statistics that training never saw. A
    BatchNorm that does not run keeps what it has; so do all of them if this is
    interrupted, or comes to a statistic that is not finite (ValueError, by name).
    """
    if num_batches is not None:
        num_batches = check_int("num_batches", num_batches, 1)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = {norm: norm.momentum for norm in norms if norm.track_running_stats}
    if not momenta:
        return
    layout = pick_layout(model, next(model.parameters()).device)
    stream = batches_for(
        model, images, batch_size, train=True, augment=augment, seed=seed,
        resolution=resolution, share=processes.share(), whole=True,
    )  # fmt: skip
    rank, count = processes.share()
    own = num_batches and len(range(rank, num_batches, count))
    # torch.optim.swa_utils.update_bn would do, but that it also sets dropout to work
    # and leaves half a measurement behind when it is stopped.
    with modes_kept(model), torch.no_grad(), _statistics_measured(momenta):
        model.eval()
        for norm in momenta:
            norm.train()
        for x, _ in itertools.islice(stream, own):
            model(x.contiguous(memory_format=layout))
        # Batches are dealt out whole, so that a mean weighted by their number is what
        # one process would have measured.
        for norm in momenta:
            seen = norm.get_buffer("num_batches_tracked")
            measured = [norm.get_buffer(f"running_{what}") for what in ("mean", "var")]
            processes.average(measured, int(seen))
            processes.add(seen)
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
