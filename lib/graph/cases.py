"""Cases apart: layers with a forward of their own, mixed channels, shared tensors."""

from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lib.graph.dry_run import Call, DryRun, Node

if TYPE_CHECKING:
    from lib.graph.tracing import Trace

BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm"}
# ShuffleNetV2's unit, which splits and shuffles in its own forward, and what surgery
# makes of it: known by name, since torchvision takes longer to import than torch.
SHUFFLE_UNITS = {
    ("torchvision.models.shufflenetv2", "InvertedResidual"),
    ("lib.surgery.movers", "PinnedShuffleUnit"),
}


# -- layers and norms with a forward of their own, known by the operation in it --------


def read_known_module(trace: "Trace", node: Node, evaluating: bool) -> bool:
    """A layer or BatchNorm whose own forward ends in the operation that it is.

    It may pad its input before, or have an activation behind: what counts is that this
    operation is given the parameters of the module, and as they are.
    """
    if node.op in BATCH_NORMS:
        return _read_norm(trace, node)
    return _read_layer(trace, node, evaluating)


def _read_layer(trace: "Trace", node: Node, evaluating: bool) -> bool:
    """Is it the module's own operation, with its own weight, bias and groups?"""
    name, module = node.module, trace.record.modules[node.module]
    if isinstance(module, nn.Linear):
        known = node.op in {"addmm", "mm"} and not node.kwargs
        bias, x, weight = [None, None, *node.operands][-3:]
        known = known and weight is not None and weight.place >= 0
    elif isinstance(module, _ConvNd) and node.op == "convolution":
        known = node.args[6] is False and node.args[8] == module.groups
        x, weight, bias = [*node.operands, None][:3]
    else:
        return False
    for key, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            known = known and given.parameter == f"{name}.{key}".removeprefix(".")
    if not known or weight is None or x is None or x.place < 0:
        return False
    trace.read_layer_call(node, module, x, evaluating)
    return True


def _read_norm(trace: "Trace", node: Node) -> bool:
    """Statistics, scale and shift lie along the channels."""
    x, *rest = node.operands
    if x.tags is None or any(not y.parameter for y in rest):
        return False
    where = trace.record.locate(node.module)
    row = trace.ledger.row(x, 1, x.shape[1], where)
    owners = {str(y.parameter).rpartition(".")[0] for y in rest}
    owner = owners.pop() if len(owners) == 1 else None
    if owner is not None and isinstance(trace.record.modules[owner], _BatchNorm):
        trace.read_norm(owner, x)
        trace.normed[node.inputs[0]] = owner
    else:
        for y in rest:
            trace.ledger.lie_along(str(y.parameter), 0, row, where)
    for place in node.outputs:  # and the statistics of the batch
        value = trace.values[place]
        value.tags = row if len(value.shape) == 1 else x.tags
    return True


# -- modules that mix channels ---------------------------------------------------------


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
    for event in found.record.events if inner else ():
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

    They have parameters, vectors alone (a LayerNorm, a GroupNorm), or hold torch's own
    LocalResponseNorm, and one input and one output of the same shape: run at full
    width, with zeros in the place of what is gone, they need not be understood. Of
    nested ones the outermost.
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
        module = record.modules[name]
        tensors = list(module.parameters())
        vectors = all(sum(n > 1 for n in t.shape) <= 1 for t in tensors)
        responses = any(type(m) is nn.LocalResponseNorm for m in module.modules())
        outer = any(name.startswith(f"{other}.") for other in found)
        if vectors and (tensors or responses) and not outer:
            found.add(name)
    return frozenset(found)


# -- tensors used in two ways: they stay whole, or go together ------------------------


def settle_tensors(found: "Trace") -> None:
    """Freeze or tie the channels of every tensor that more than its owner uses."""
    _freeze_shared(found)
    # Parameters of a layer or a norm that are also used beside it go with it.
    for path, (_, tags) in list(found.ledger.vectors.items()):
        row = _find_along(found, path)
        if row is not None:
            found.ledger.tie(tags, row)


def _freeze_shared(found: "Trace") -> None:
    """A tensor that is used in two ways cannot be cut: whatever owns it stays whole."""
    vectors, owners = found.ledger.vectors, defaultdict(list)
    for name, module in found.record.modules.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[id(tensor)].append((name, f"{name}.{key}" if name else key))
    for owned in owners.values():
        if len(owned) == 1 and not {owned[0][1]} & (vectors.keys() | found.uses.keys()):
            continue
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


def _find_along(found: "Trace", path: str) -> Tensor | None:
    """The channels along which a parameter lies by being the bias or the like."""
    owner, _, key = path.rpartition(".")
    layer, norm = found.layers.get(owner), found.norms.get(owner)
    if layer is not None:
        return layer.outputs if key == "bias" else None
    tags = found.ledger.vectors[path][1]
    return norm if norm is not None and len(norm) == tags.numel() else None
