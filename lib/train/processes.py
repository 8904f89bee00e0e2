"""Several processes that train one network: which one this is, and what they share.

The only module that knows `torch.distributed`. Without a process group this process is
the first of one, and everything here is the identity. Sums come out of the group as the
same bits in every process, so networks that start alike stay alike.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

PATIENCE = timedelta(minutes=30)  # with a process that has stopped; a dead one shows
STREAM = 1 << 52  # seeds of training lie below


def joined() -> bool:
    """Whether there is a process group, of `join` or of torchrun."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0; the first one writes and reports."""
    return dist.get_rank() if joined() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if joined() else 1


def share() -> tuple[int, int]:
    """Which part of a batch is this process's, for `lib.data.batches`."""
    return rank(), count()


def stream() -> int:
    """To be added to a seed: what each process draws for its own images differs."""
    return rank() * STREAM


@contextmanager
def join(rank: int, count: int, store: str | Path) -> Iterator[None]:
    """Be one of the processes that meet at the file `store`, while inside.

    gloo on the CPU; on GPUs NCCL, one process for each GPU.
    """
    backend = None if torch.cuda.is_available() else "gloo"
    if backend is None:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    meeting = dist.FileStore(str(store), count)
    dist.init_process_group(
        backend, store=meeting, rank=rank, world_size=count, timeout=PATIENCE
    )
    yield  # a process that fails does not wait for the others
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process goes through alone, then the others; none goes on before all
    are through, or the others could find what the first has done since."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()
    barrier()


def check_agreed(facts: dict) -> None:
    """ValueError, by name, where a fact is not the same in every process."""
    told = _hand_round(facts)
    differs = [name for name in facts if any(o.get(name) != facts[name] for o in told)]
    if differs:
        raise ValueError(
            f"the processes train with another {', '.join(differs)}; give all of them "
            "the same"
        )


def gather(items: list) -> list:
    """The whole of a sequence of which each process has every `count()`-th item."""
    dealt = itertools.zip_longest(*_hand_round(items))
    return [item for turn in dealt for item in turn if item is not None]


def _hand_round(mine: Any) -> list:
    """What each process has, in order of their numbers."""
    if count() == 1:
        return [mine]
    hands = [None] * count()
    dist.all_gather_object(hands, mine)
    return hands


def add(*tensors: Tensor) -> None:
    """Sum each over the processes, in place; exact for whole numbers."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def average(tensors: list[Tensor], weight: float = 1.0) -> None:
    """Average each over the processes, in place; `weight`: of this one's.

    With no weight anywhere nothing changes.
    """
    if count() == 1 or not tensors:
        return
    # in float64, so that what is the same everywhere comes out as it went in
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    flat = torch.cat([flat.mul_(weight), flat.new_tensor([weight])])
    dist.all_reduce(flat)
    total = flat[-1].item()
    parts = flat[:-1].div_(total).split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, mean in zip(tensors, parts, strict=True) if total else ():
            tensor.copy_(mean.view(tensor.shape))


def average_buffers(module: nn.Module) -> None:
    """Floating buffers (BatchNorms' statistics) become their mean over processes."""
    average([b for b in module.buffers() if b.is_floating_point()])


def merge_gradients(parameters: list[nn.Parameter], images: int) -> None:
    """Each gradient becomes that of the mean over the images of all processes.

    images: how many the present ones are the mean over. A parameter without a gradient
    counts as zeros where another process has one.
    """
    # Not DistributedDataParallel: it weighs all processes alike, however few images
    # the last batch left one of them, and wants a gradient of every parameter.
    if count() == 1 or not parameters:
        return
    # In one sum, of one flat buffer, with the counts that it is to be divided by.
    own = [p.grad is not None for p in parameters]
    sizes = [p.numel() for p in parameters]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tail = torch.tensor([images, *own], dtype=torch.float32, device=parts[0].device)
    flat = torch.cat([*(part.flatten() for part in parts), tail])  # float32 or more
    flat[: -len(tail)] *= images
    dist.all_reduce(flat)
    *sums, tail = flat.split([*sizes, len(tail)])
    for i, (p, total) in enumerate(zip(parameters, sums, strict=True)):
        if p.grad is not None:
            p.grad.copy_(total.div_(tail[0]).view(p.shape))
        elif tail[1 + i]:
            p.grad = total.div_(tail[0]).view(p.shape).to(p.dtype)


@contextmanager
def norms_synchronised(model: nn.Module, wanted: bool) -> Iterator[None]:
    """BatchNorms use the statistics of the whole batch while inside, if `wanted`."""
    if not wanted:
        yield
        return
    places = [(parent, name, child) for parent in model.modules()
              for name, child in parent._modules.items()
              if isinstance(child, _BatchNorm)]  # fmt: skip
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
