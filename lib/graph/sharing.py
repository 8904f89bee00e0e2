"""Tensors of a model that are used in two ways: they stay whole, or go together."""

from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lib.graph.trace import Trace


def settle_tensors(found: "Trace") -> None:
    """Freeze or tie the channels of every tensor that more than its owner uses."""
    _freeze_shared(found)
    _tie_vectors(found)


def _freeze_shared(found: "Trace") -> None:
    """A tensor that is used in two ways cannot be cut: whatever owns it stays whole."""
    vectors, owners = found.ledger.vectors, defaultdict(list)
    for name, module in found.record.modules.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[id(tensor)].append((name, f"{name}.{key}" if name else key))
    for owned in owners.values():
        names, paths = zip(*owned, strict=True)
        users = [n for n in names if n in found.layers or n in found.norms]
        users += [p for p in paths if p in vectors and _find_along(found, p) is None]
        reason = next((found.uses[path] for path in paths if path in found.uses), None)
        if reason is None and len(users) > 1:
            quoted = " and ".join(f"'{user}'" for user in users)
            reason = f"a parameter is shared by {quoted}"
        if reason is None:
            continue
        for user in users:
            layer = found.layers.get(user)
            rows = [layer.inputs, layer.outputs] if layer else [found.norms.get(user)]
            for row in (*rows, vectors.get(user, (0, None))[1]):
                found.ledger.freeze(row, reason)


def _tie_vectors(found: "Trace") -> None:
    """Parameters of a layer or a norm that are also used beside it go with it."""
    for path, (_, tags) in list(found.ledger.vectors.items()):
        row = _find_along(found, path)
        if row is not None:
            found.ledger.tie(tags, row)


def _find_along(found: "Trace", path: str) -> Tensor | None:
    """The channels along which a parameter lies by being the bias or the like."""
    owner, _, key = path.rpartition(".")
    layer, norm = found.layers.get(owner), found.norms.get(owner)
    if layer is not None:
        return layer.outputs if key == "bias" else None
    tags = found.ledger.vectors[path][1]
    return norm if norm is not None and len(norm) == tags.numel() else None
