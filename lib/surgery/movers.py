"""Small modules that move channels inside a pruned network by integer index maps."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scatter(nn.Module):
    """Write [N, kept, ...] back into [N, width, ...], zero elsewhere.

    Equal to the bit in both of its ways: zeros that the channels are copied into, in
    the layout of `x` (a gather would lose channels_last, for all layers behind it too);
    and compiled or exported a 1x1 convolution with ones and zeros, which compilers add
    into the stream in place and in a layout of their own (equal for finite values).
    """

    source: Tensor
    kept: Tensor

    def __init__(self, kept: Tensor, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("source", inverse(kept, width))
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        """[N, kept, ...] -> [N, width, ...]."""
        if torch.compiler.is_compiling() and x.ndim == 4:
            places = torch.arange(self.width, device=x.device)
            chosen = (places[:, None] == self.kept).to(x.dtype)
            return F.conv2d(x, chosen[:, :, None, None])
        if torch.compiler.is_compiling() or x.is_meta:
            return take(x, self.source)
        wide = (*x.shape[:1], self.width, *x.shape[2:])
        full = torch.empty(
            wide, dtype=x.dtype, device=x.device, memory_format=layout_of(x)
        )
        return full.zero_().index_copy_(1, self.kept, x)


class Remap(nn.Module):
    """A module that moves or mixes channels, run at the width that it had.

    Along `dim`, channels that were removed are zero when it reads them; of those that
    it hands on `write` are left.
    """

    source: Tensor
    write: Tensor

    def __init__(self, inner: nn.Module, read: Tensor, write: Tensor, dim: int = 1):
        super().__init__()
        self.inner, self.dim = inner, dim
        self.register_buffer("source", inverse(positions(read), len(read)))
        self.register_buffer("write", positions(write))

    def forward(self, x: Tensor) -> Tensor:
        """[N, read, ...] -> [N, written, ...]."""
        moved: Tensor = self.inner(take(x, self.source, self.dim))
        return moved.index_select(self.dim, self.write)


class Gate(nn.Module):
    """Zero the silenced channels before a module that reads across channels."""

    alive: Tensor

    def __init__(self, inner: nn.Module, alive: Tensor, dim: int = 1):
        super().__init__()
        self.inner, self.dim = inner, dim
        self.register_buffer("alive", alive, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> what the inner module gives."""
        layout = [1] * x.ndim
        layout[self.dim] = -1
        alive = self.alive.view(layout)
        result: Tensor = self.inner(x * alive.to(x.dtype))
        return result


class PinnedShuffleUnit(nn.Module):
    """ShuffleNetV2's unit with its split sizes and its shuffle as an index map.

    A unit of torchvision's takes this class; its branches and its stride stay its own.
    """

    stride: int
    split: list[int]
    order: Tensor
    branch1: nn.Module
    branch2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        if self.stride == 1:
            left, right = torch.split(x, self.split, 1)
            out = torch.cat((left, self.branch2(right)), 1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), 1)
        return out.index_select(1, self.order)


class Bridge(nn.Module):
    """A layer that reads and makes some channels of tensors that keep all of theirs.

    `read` are the channels that it reads, `source` where those that it makes go; each
    is None where that is all of them. Channels are dimension `dim`.
    """

    read: Tensor | None
    source: Tensor | None

    def __init__(
        self, inner: nn.Module, read: Tensor | None, source: Tensor | None, dim: int
    ):
        super().__init__()
        self.inner, self.dim = inner, dim
        self.register_buffer("read", read)
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, ...] -> [N, out, ...], zero where nothing is made."""
        if self.read is not None:
            x = x.index_select(self.dim, self.read)
        y: Tensor = self.inner(x)
        if self.source is None:
            return y
        return take(y, self.source, self.dim)


def on_cpu(index: Tensor) -> Tensor:
    """An index map where it can be computed with; one without values is refused."""
    if index.is_meta:
        raise ValueError(
            "a network on the meta device cannot be shrunk twice: the index maps of "
            "the first time have no values there"
        )
    return index.cpu()


def positions(alive: Tensor) -> Tensor:
    """Indices of the True entries of a bool row, int64."""
    return torch.nonzero(alive).flatten()


def inverse(kept: Tensor, width: int) -> Tensor:
    """For each of `width` places its index among `kept`, or len(kept) for a zero."""
    source = torch.full((width,), len(kept), device=kept.device)
    source[kept] = torch.arange(len(kept), device=kept.device)
    return source


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last where a tensor lies so in memory and in no other way."""
    last = torch.channels_last
    if x.ndim == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def take(x: Tensor, source: Tensor, dim: int = 1) -> Tensor:
    """Pick channels of `x`; an index behind the last picks a channel of zeros."""
    # One gather over an extra channel of zeros: nothing is written in place, so that
    # autograd, export and meta tensors follow it. The indices are buffers because no
    # slice says which channels are left, and a buffer goes with the network to a
    # device, into its state and into what is exported.
    padding = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, 1]
    return F.pad(x, padding).index_select(dim, source)


def device_of(module: nn.Module, otherwise: str | torch.device = "cpu") -> torch.device:
    """Where the parameters and buffers of a module lie, if it has any."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device(otherwise))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of `name`, and wherever else that instance stands.

    It takes over the mode of the old one, and its device.
    """
    # The instance may be registered under several names, of which the trace saw one.
    old = model.get_submodule(name)
    module.train(old.training).to(device_of(old, device_of(model)))
    for path, found in list(model.named_modules(remove_duplicate=False)):
        if found is old:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
