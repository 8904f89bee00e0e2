"""Batches drawn from an image set: cropped, flipped, normalised, resized as a whole.

For a set in memory no per-image Python and no worker processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data.images import ImageSet
from lib.graph.watch import dtype_of
from lib.settings import check_int


class Draws(NamedTuple):
    """The random choices of one epoch, by position: tensors [N] on the CPU."""

    order: Tensor
    top: Tensor
    left: Tensor
    flipped: Tensor


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    train: bool = False,
    seed: int = 0,
    epoch: int = 0,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augment: bool | None = None,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch: x [B, C, h, w] normalised, channels_last, and y [B].

    train: shuffle, zero-padded random crop, random flip, and drop the last partial
    batch (unless it is the only one); otherwise in order, unchanged, to the last image.
    `augment` overrides that default. start: the batch to begin with; nothing is read or
    decoded of those before. resolution: bilinear, antialiased resize to a square of
    that many pixels; None or the native size is no resize. The order and every crop
    depend on (seed, epoch) only, not on the batch size, the device or the number of
    workers; torch's own generators are not touched. Keep the set on `device`
    (`images.to(device)`) to spare a copy per epoch. share: (i, n) gives part i of n of
    every batch, cut as evenly as it can be, or with `whole` every n-th batch from the
    i-th on. ValueError: an empty set, an argument out of range, too many broken files.
    """
    start = check_int("start", start, 0)
    count = count_batches(images, batch_size, train=train)
    if resolution is not None:
        resolution = check_int("resolution", resolution, 1)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type, got {dtype}")
    augment = train if augment is None else augment
    draws = draw_epoch(images, shuffle=train, augment=augment, seed=seed, epoch=epoch)
    # Drawn for the whole set at once and cut afterwards: an image has the same crop in
    # whatever batch, process or worker it comes up.
    steps = range(start * batch_size, count * batch_size, batch_size)
    parts = list(cut_batches(steps, len(images), share, whole))
    key = (seed, epoch) if augment else None
    cut = _generate(images, device, parts, draws, key)
    layout = {"memory_format": torch.channels_last}
    return ((resize(x, resolution).to(dtype).contiguous(**layout), y) for x, y in cut)


def batches_for(
    model: nn.Module, images: ImageSet, batch_size: int, **how
) -> Iterator[tuple[Tensor, Tensor]]:
    """`batches` where the model lies and in its precision; `how` goes on."""
    device = next(model.parameters()).device
    return batches(images, batch_size, device=device, dtype=dtype_of(model), **how)


def _generate(
    images: ImageSet,
    device: torch.device | str,
    parts: list[slice],
    draws: Draws,
    key: tuple[int, int] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pixels and labels of each part; `key`: of an augmented epoch."""
    images = images.to(device)
    order, *offsets = (draw.to(images.labels.device) for draw in draws)
    # Whole rows rather than 3 channels: a loop long enough to vectorise.
    rows = torch.tensor([images.mean, images.std], device=order.device)
    mean, std = rows.repeat(1, images.images.shape[2])
    if images.streamed:
        pixels = images.images.read([draws.order[part] for part in parts], key)
    else:
        pixels = (images.images.index_select(0, order[part]) for part in parts)
    for part, x in zip(parts, pixels, strict=True):
        if key is not None:
            x = crop_flip(x, *(draw[part] for draw in offsets), pad=images.pad)
        yield normalise(x, mean, std), images.labels.index_select(0, order[part])


def cut_batches(
    steps: range, n: int, share: tuple[int, int], whole: bool
) -> Iterator[slice]:
    """The positions of each batch, or of one's share of it, see `batches`.

    steps: where batches of `n` images begin, one batch apart.
    """
    index, parts = share
    for start in steps[index::parts] if whole else steps:
        stop = min(start + steps.step, n)
        edges = (start + (stop - start) * i // parts for i in (index, index + 1))
        yield slice(start, stop) if whole else slice(*edges)


def count_batches(images: ImageSet, batch_size: int, *, train: bool = False) -> int:
    """How many batches `batches` gives with the same arguments; its ValueErrors."""
    batch_size = check_int("batch_size", batch_size, 1)
    if len(images) == 0:
        raise ValueError(f"{images.name}: no images to make batches of")
    full = len(images) // batch_size
    return full if train and full else -(-len(images) // batch_size)


def draw_epoch(
    images: ImageSet, *, shuffle: bool, augment: bool, seed: int, epoch: int
) -> Draws:
    """Draw one epoch's order, crop offsets and flips from (seed, epoch), both >= 0."""
    seed, epoch = check_int("seed", seed, 0), check_int("epoch", epoch, 0)
    # SeedSequence mixes: neither seed + epoch nor nearby pairs share a stream.
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    n = len(images)
    # The order first, so that it is the same with and without augmentation.
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    if not augment:
        zeros = torch.zeros(n, dtype=torch.int64)
        return Draws(order, zeros, zeros, zeros.bool())
    offsets = torch.randint(0, 2 * images.pad + 1, (2, n), generator=generator)
    flipped = torch.rand(n, generator=generator) < (0.5 if images.flip else 0.0)
    return Draws(order, offsets[0], offsets[1], flipped)


def crop_flip(
    batch: Tensor, top: Tensor, left: Tensor, flipped: Tensor, *, pad: int
) -> Tensor:
    """Crop each zero-padded image at (top, left), 0..2 pad, and mirror the flipped.

    batch: uint8 [B, H, W, C]; top, left: int64 [B]; flipped: bool [B].
    """
    # Crop and flip in one gather over whole pixels: row and column of each one in the
    # padded batch, laid out flat.
    count, height, width, channels = batch.shape
    padded = F.pad(batch, (0, 0, pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(height, device=batch.device)
    columns = torch.arange(width, device=batch.device)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    first = torch.arange(count, device=batch.device) * padded.shape[1]
    starts = (first[:, None] + rows) * padded.shape[2]
    index = starts[:, :, None] + (left[:, None] + columns)[:, None, :]
    pixels = padded.view(-1, channels).index_select(0, index.view(-1))
    return pixels.view(batch.shape)


def normalise(batch: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W], channels_last.

    mean, std: [W * C], of a row of pixels scaled to 0..1.
    """
    rows = batch.reshape(-1, len(mean)).float()
    return rows.div_(255).sub_(mean).div_(std).view(batch.shape).permute(0, 3, 1, 2)


def resize(batch: Tensor, resolution: int | None) -> Tensor:
    """Resize [B, C, H, W] to a square; the very tensor where there is none to do."""
    if resolution is None or tuple(batch.shape[2:]) == (resolution, resolution):
        return batch
    size = (resolution, resolution)
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)
