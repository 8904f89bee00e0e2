"""Modules that mix channels: norms over them run whole, attention counts its input."""

from typing import TYPE_CHECKING

from torch import nn

from lib.graph.dry_run import Call, DryRun

if TYPE_CHECKING:
    from lib.graph.trace import Trace


# ShuffleNetV2's unit, which splits and shuffles in its own forward, and what surgery
# makes of it: known by name, since torchvision takes longer to import than torch.
SHUFFLE_UNITS = {
    ("torchvision.models.shufflenetv2", "InvertedResidual"),
    ("lib.surgery.movers", "PinnedShuffleUnit"),
}


def is_shuffle_unit(module: nn.Module) -> bool:
    """Is it ShuffleNetV2's unit, as torchvision wrote it or rewritten by surgery?"""
    bases = type(module).__mro__
    return any((base.__module__, base.__name__) in SHUFFLE_UNITS for base in bases)


def is_product(op: str) -> bool:
    """Does it multiply one activation with another?"""
    return op in {"bmm", "baddbmm"} or op.startswith("_scaled_dot_product")


def freeze_attention(found: "Trace") -> None:
    """What goes into a module that multiplies activations between its own layers.

    Such a forward puts heads together by the size of its input (`reshape(B, N, C)`), so
    neither that nor what its layers make may change.
    """
    layers = found.layers.items()
    inner = {
        name: [x.outputs for n, x in layers if n.startswith(f"{name}.")]
        for name in found.attending - {""}
    }
    for event in found.record.events:
        if not isinstance(event, Call) or not inner.get(event.module):
            continue
        where = found.record.locate(event.module)
        reason = (
            f"{where} multiplies activations between its layers, and may count the "
            "channels that it is given"
        )
        given = [found.values[p].tags for p in event.inputs if p is not None]
        for tags in (*given, *inner[event.module]):
            found.ledger.freeze(tags, reason)


def find_mixers(record: DryRun, lossy: set[str]) -> frozenset[str]:
    """Modules that lose track of channels inside, but hand on as many as they read.

    They have parameters, vectors alone (a LayerNorm, a GroupNorm, a norm of responses),
    one input and one output of the same shape: run at full width, with zeros in the
    place of what is gone, they need not be understood. Of nested ones the outermost.
    """
    fits: dict[str, bool] = {}
    for event in record.events:
        if isinstance(event, Call) and event.module in lossy:
            ends = (*event.inputs, event.output)
            shapes = {None if e is None else record.values[e].shape for e in ends}
            same = len(event.inputs) == 1 and len(shapes) == 1 and None not in shapes
            fits[event.module] = fits.get(event.module, True) and same
    found: set[str] = set()
    for name in sorted(n for n, same in fits.items() if n and same):
        tensors = list(record.modules[name].parameters())
        vectors = all(sum(n > 1 for n in t.shape) <= 1 for t in tensors)
        outer = any(name.startswith(f"{other}.") for other in found)
        if tensors and vectors and not outer:
            found.add(name)
    return frozenset(found)
