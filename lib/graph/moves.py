"""Where channels go in an operation that reshapes, picks or pads: run on their tags."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.graph.dry_run import Node
from lib.graph.tags import CONSTANT, compress


def move_tags(node: Node, tags: Tensor) -> tuple[list[Tensor], bool]:
    """Tags after a reshaping or indexing operation, one row per output.

    The flag says whether removing channels before the operation gives the same as
    removing them after it: true for flattening, false for picking and shuffling.
    """
    name, args, shape = node.op, node.args[1:], node.operands[0].shape
    if name == "constant_pad_nd":
        return _pad(tags, shape, args[0])
    # The operation itself says where channels go: it is run on tags in the place of
    # values, at full size, since a view may mix dimensions in which they do not vary.
    full = tags.expand(shape)
    if name in {"view", "_unsafe_view", "_reshape_alias", "reshape"}:
        moved = full.reshape(args[0])
    else:
        assert node.function is not None
        moved = node.function(full, *args, **node.kwargs)
    pieces = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    pieces = [compress(piece) for piece in pieces]
    return pieces, all(_keeps_order(tags, piece) for piece in pieces)


def _pad(
    before_padding: Tensor, shape: Sequence[int], amounts: Sequence[int]
) -> tuple[list[Tensor], bool]:
    """Zero padding: new constants along the channels, nothing new along the pixels."""
    tags = before_padding
    for i, dim in enumerate(range(tags.ndim - 1, -1, -1)[: len(amounts) // 2]):
        before, after = amounts[2 * i], amounts[2 * i + 1]
        # Size 1 means "does not vary", but a single channel beside new ones does.
        if tags.shape[dim] > 1 or (dim == 1 and shape[1] == 1):
            widths = [0] * (2 * (tags.ndim - 1 - dim)) + [before, after]
            tags = torch.nn.functional.pad(tags, widths, value=CONSTANT)
    return [tags], tags is before_padding


def _keeps_order(before: Tensor, after: Tensor) -> bool:
    """Dropping channels before the move equals dropping them after it."""
    if sum(n > 1 for n in after.shape) > 1:
        return False
    before, after = before.flatten(), after.flatten()
    if before.numel() <= 1:
        return True
    # Flattening repeats each tag for the pixels in a row, spreading the row of tags.
    times, rest = divmod(after.numel(), before.numel())
    if rest or not times:
        return False
    return torch.equal(after, before.repeat(times)) or torch.equal(
        after, before.repeat_interleave(times)
    )
