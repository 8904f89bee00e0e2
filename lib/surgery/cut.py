"""`shrink`: a physically smaller copy in which nothing removed is left."""

import copy
import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleUnit

from lib.graph import Graph, build_graph
from lib.graph.tags import ELEMENTWISE, REDUCTIONS
from lib.graph.trace import Node, trace
from lib.plan import Kept, Plan, resolve
from lib.surgery.movers import (
    GappedLRN,
    PinnedShuffleUnit,
    Remap,
    Scatter,
    positions,
    replace,
)

# A PReLU with one slope is an operation, with more it is a leaf: not compared.
COUNTED = (ELEMENTWISE | REDUCTIONS) - {"prelu", "_prelu_kernel"}


def shrink(
    model: nn.Module,
    plan: Plan,
    input_shape: tuple[int, int, int],
    *,
    graph: Graph | None = None,
) -> nn.Module:
    """A physically smaller copy of the same class.

    Parameters keep their names (a scattered layer's BatchNorm becomes the first item of
    a pair), `requires_grad`, dtype, device and memory format; train/eval mode is kept.
    `plan.resolution`, if set, is checked to pass through the result. Warns when the
    plan removes nothing. Raises `ValueError` for a plan that does not fit. `graph`, if
    given, is that of `build_graph(model, input_shape)`.
    """
    graph = graph or build_graph(model, input_shape)
    kept = resolve(graph, plan, model)
    if kept.is_whole() and plan.resolution is None:
        warnings.warn("the plan removes nothing", stacklevel=2)
    cuts = _cut_tensors(graph, kept, dict(model.named_modules()))
    small = copy.deepcopy(model, _memo_of(model, cuts))
    modules = dict(small.named_modules())
    _resize_modules(graph, kept, modules)
    _replace_movers(graph, kept, small, modules)
    _insert_scatters(graph, kept, small, modules)
    for block in kept.dropped:
        replace(small, block, nn.Identity())
    _check_runs(graph, kept, small, input_shape, plan.resolution)
    return small


def shrunk_from(
    model: nn.Module,
    plan: Plan,
    input_shape: tuple[int, int, int],
    state: dict,
    *,
    graph: Graph | None = None,
) -> nn.Module:
    """The pruned network of a checkpoint: `plan` applied to `model`, then `state`."""
    small = shrink(model, plan, input_shape, graph=graph)
    small.load_state_dict(state)
    return small


# -- shrink -------------------------------------------------------------------------


def _cut_tensors(graph: Graph, kept: Kept, modules: dict) -> dict[int, Tensor]:
    """Every parameter and buffer that changes size, already cut, by its id."""
    cuts: dict[int, Tensor] = {}
    for name, rows in kept.rows.items():
        columns = kept.units[graph.unit_of(graph.layers[name].inputs)]
        cuts.update(_cut_layer(modules[name], graph.layers[name], rows, columns))
    for name, alive in _norm_rows(graph, kept).items():
        for tensor in _channel_tensors(modules[name]):
            cuts[id(tensor)] = _cut(tensor, alive, 0)
    for path, (dim, tags) in graph.vectors.items():
        owner, _, attribute = path.rpartition(".")
        tensor = getattr(modules[owner], attribute)
        cuts[id(tensor)] = _cut(tensor, kept.units[graph.unit_of(tags)], dim)
    return cuts


def _cut_layer(module, layer, rows: Tensor, columns: Tensor) -> dict[int, Tensor]:
    cuts = {}
    if layer.groups == 1:
        weight = _cut(_cut(module.weight, rows, 0), columns, 1)
    elif layer.depthwise:
        weight = _cut(module.weight, rows, 0)
    else:
        parts = zip(
            module.weight.detach().chunk(layer.groups),
            rows.chunk(layer.groups),
            columns.chunk(layer.groups),
            strict=True,
        )
        weight = torch.cat([_cut(_cut(w, r, 0), c, 1) for w, r, c in parts])
    cuts[id(module.weight)] = weight
    if module.bias is not None:
        cuts[id(module.bias)] = _cut(module.bias, rows, 0)
    return cuts


def _cut(tensor: Tensor, alive: Tensor, dim: int) -> Tensor:
    if alive.all():
        return tensor.detach()
    return tensor.detach().index_select(dim, positions(alive).to(tensor.device))


def _norm_rows(graph: Graph, kept: Kept) -> dict[str, Tensor]:
    """Kept channels of every norm; behind a scattered layer, those of that layer."""
    alive = {n: kept.units[graph.unit_of(x)] for n, x in graph.norms.items()}
    pairs = graph.pairs
    for name in kept.scatter:
        if name in pairs:
            alive[pairs[name]] = kept.rows[name]
    return alive


def _channel_tensors(module: nn.Module) -> list[Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [getattr(module, name, None) for name in names]
    return [t for t in tensors if t is not None and t.numel() > 1]


def _memo_of(model: nn.Module, cuts: dict[int, Tensor]) -> dict:
    """A `deepcopy` memo that puts the cut tensors in place, each copied only once."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        cut = cuts.get(id(tensor))
        if cut is None or cut.shape == tensor.shape:
            continue
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            cut = cut.contiguous(memory_format=torch.channels_last)
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = cut
    return memo


def _resize_modules(graph: Graph, kept: Kept, modules: dict) -> None:
    for name in kept.rows:
        layer, module = graph.layers[name], modules[name]
        rows = int(kept.rows[name].sum())
        columns = int(kept.units[graph.unit_of(layer.inputs)].sum())
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = rows, columns
        else:
            module.out_channels, module.in_channels = rows, columns
            module.groups = columns if layer.depthwise else module.groups
    for name, alive in _norm_rows(graph, kept).items():
        module = modules[name]
        if hasattr(module, "num_features"):
            module.num_features = int(alive.sum())
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            module.num_parameters = int(alive.sum())


def _replace_movers(graph: Graph, kept: Kept, small: nn.Module, modules: dict) -> None:
    for name, move in graph.moves.items():
        read = kept.units[graph.unit_of(move.inputs)]
        write = kept.units[graph.unit_of(move.outputs)]
        if not (read.all() and write.all()):
            moved = Remap(modules[name], read, write)
            replace(small, name, moved.to(_device(small)))
    for name, tags in graph.norms.items():
        alive = kept.units[graph.unit_of(tags)]
        if isinstance(modules[name], nn.LocalResponseNorm) and not alive.all():
            thinned = GappedLRN(modules[name], alive)
            replace(small, name, thinned.to(_device(small)))
    for name, unit in graph.shuffles.items():
        _pin_shuffle(modules[name], graph, kept, unit)


def _pin_shuffle(module: ShuffleUnit, graph: Graph, kept: Kept, unit) -> None:
    """Turn split sizes and shuffle of one ShuffleNetV2 unit into numbers."""
    read = kept.units[graph.unit_of(unit.inputs)]
    write = kept.units[graph.unit_of(unit.outputs)]
    if isinstance(module, PinnedShuffleUnit):
        left, order = module.split[0] if module.split else 0, module.order.cpu()
    elif bool(read.all()) and bool(write.all()):
        return
    else:
        left = len(read) // 2
        order = torch.arange(len(write)).view(2, -1).t().flatten()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    joined = write[place]  # kept channels in the order of the concatenation
    rank = joined.cumsum(0) - 1
    module.split = (
        [int(read[:left].sum()), int(read[left:].sum())] if module.stride == 1 else []
    )
    device = _device(module)
    module.register_buffer("order", rank[order][write].to(device), persistent=False)
    module.__class__ = PinnedShuffleUnit


def _insert_scatters(graph: Graph, kept: Kept, small: nn.Module, modules: dict) -> None:
    pairs = graph.pairs
    for name in sorted(kept.scatter):
        rows = kept.rows[name]
        if rows.all():
            continue
        end = pairs.get(name, name)
        scatter = Scatter(positions(rows), len(rows)).to(_device(small))
        replace(small, end, nn.Sequential(modules[end], scatter))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check_runs(graph: Graph, kept: Kept, small, input_shape, resolution) -> None:
    """Trace the result: sizes written into the model's own code show up here."""
    try:
        after = trace(small, input_shape)
    except ValueError as error:
        raise ValueError(f"the shrunk network does not run; {error}") from error
    modules = dict(small.named_modules())
    same = {n for n in modules if not _is_changed(n, modules)} - set(kept.dropped)
    before, now = (_operations(x.nodes, same) for x in (graph, after))
    for module, operation in (before - now) + (now - before):
        raise ValueError(
            f"'{module}' computes with the number of its channels (in "
            f"'{operation[0]}'), so a smaller copy of it would compute something else"
        )
    if resolution is None:
        return
    try:
        trace(small, (input_shape[0], resolution, resolution))
    except ValueError as error:
        raise ValueError(
            f"resolution {resolution} does not fit this network; {error}"
        ) from error


def _is_changed(name: str, modules: dict[str, nn.Module]) -> bool:
    """Was it, or what holds it, put there by surgery?"""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    ours = (Remap, Scatter, GappedLRN, PinnedShuffleUnit)
    return any(isinstance(modules[path], ours) for path in paths if path in modules)


def _operations(nodes: list[Node], modules: set[str]) -> Counter:
    """How often each module runs which operation, with the numbers it uses."""
    found = Counter()
    for node in nodes:
        if node.module in modules and node.op in COUNTED:
            numbers = tuple(a for a in node.args if isinstance(a, (int, float)))
            found[node.module, (node.op, *numbers)] += 1
    return found
