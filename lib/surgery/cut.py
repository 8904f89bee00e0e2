"""`shrink`: a physically smaller copy in which nothing removed is left."""

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lib.graph import Graph, Layer, build_graph
from lib.graph.leaves import filters_of
from lib.graph.tracing import Move
from lib.plan import Kept, Plan, resolve
from lib.settings import CHW
from lib.surgery.checks import check_result
from lib.surgery.copying import copy_model
from lib.surgery.movers import (
    Bridge,
    PinnedShuffleUnit,
    Remap,
    Scatter,
    device_of,
    inverse,
    on_cpu,
    positions,
    replace,
)

MARK = "pruned_by"  # a buffer of the network: a digest of the plans that made it
Modules = dict[str, Any]  # modules by name; their attributes differ by type


def shrink(
    model: nn.Module, plan: Plan, input_shape: CHW, *, graph: Graph | None = None
) -> nn.Module:
    """A physically smaller copy of the same class.

    Parameters keep their names (a scattered layer's BatchNorm becomes the first item of
    a pair), `requires_grad`, dtype, device and memory format; train/eval mode is kept.
    `plan.resolution`, if set, is checked to pass through the result. Warns when the
    plan removes nothing. Raises `ValueError` for a plan that does not fit, and for a
    forward that would compute something else with fewer channels. `graph`, if given, is
    that of `build_graph(model, input_shape)`.

    Step by step in notebooks/02_surgery.ipynb.
    """
    graph = graph or build_graph(model, input_shape)
    kept = resolve(graph, plan, model)
    if kept.is_whole() and plan.resolution is None:
        warnings.warn("the plan removes nothing", stacklevel=2)
    small = cut_out(model, graph, kept)
    check_result(graph, kept, small, input_shape, plan.resolution)
    if not kept.is_whole():
        mark(small, kept)
    return small


def cut_out(model: nn.Module, graph: Graph, kept: Kept) -> nn.Module:
    """The smaller copy itself, not yet checked."""
    norms = _norm_rows(graph, kept)
    cuts = _cut_tensors(graph, kept, norms, dict(model.named_modules()))
    # Cut first and copied around the cuts: nothing is copied to be thrown away, and a
    # parameter that two modules share is one parameter in the copy, too.
    small = copy_model(model, cuts)
    # Names are those of the trace: what is put in below wraps modules and renames them.
    modules = dict(small.named_modules())
    _resize_modules(graph, kept, norms, modules)
    _replace_movers(graph, kept, small, modules)
    _insert_scatters(graph, kept, small, modules)
    _insert_bridges(graph, kept, small)
    for block in kept.dropped:
        replace(small, block, nn.Identity())
    return small


def shrunk_from(
    model: nn.Module,
    plan: Plan,
    input_shape: CHW,
    state: dict[str, Tensor],
    *,
    graph: Graph | None = None,
) -> nn.Module:
    """The pruned network of a checkpoint: `plan` applied to `model`, then `state`.

    Raises `ValueError` for the state of another plan, also one of the same sizes.
    """
    small = shrink(model, plan, input_shape, graph=graph)
    small.load_state_dict(state)
    return small


# -- tensors ---------------------------------------------------------------------------


def _norm_rows(graph: Graph, kept: Kept) -> dict[str, Tensor]:
    """Channels left at every norm; behind a scattered layer, those of that layer."""
    # Channels that code picks by number stay in the tensors, with whatever a norm makes
    # of them: nobody reads them any more.
    left = kept.units | graph.wide
    alive = {n: left[graph.unit_of(x)] for n, x in graph.norms.items()}
    for name in kept.scatter & graph.pairs.keys():
        alive[graph.pairs[name]] = kept.rows[name]
    return alive


@torch.no_grad()
def _cut_tensors(
    graph: Graph, kept: Kept, norms: dict[str, Tensor], modules: Modules
) -> dict[int, Tensor]:
    """Every parameter and buffer that loses channels, already cut, by its id."""
    found: list[tuple[Tensor, Tensor]] = []
    for name, rows in kept.rows.items():
        module, layer = modules[name], graph.layers[name]
        columns = kept.units.index_select(0, graph.columns[name])
        cut = _cut_weight(filters_of(module), layer, rows, columns)
        if isinstance(module, _ConvTransposeNd):
            cut = cut.transpose(0, 1).contiguous()
        found.append((module.weight, cut))
        if module.bias is not None:
            found.append((module.bias, _cut(module.bias, _choose(rows), 0)))
    for name, alive in norms.items():
        chosen = _choose(alive)
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(modules[name], attribute, None)
            if tensor is not None and tensor.numel() > 1:
                found.append((tensor, _cut(tensor, chosen, 0)))
    left = kept.units | graph.wide
    for path, (dim, tags) in graph.vectors.items():
        owner, _, attribute = path.rpartition(".")
        tensor = getattr(modules[owner], attribute)
        chosen = _choose(left[graph.unit_of(tags)])
        found.append((tensor, _cut(tensor, chosen, dim)))
    return {id(x): _like(x, cut) for x, cut in found if cut.shape != x.shape}


def _cut_weight(weight: Tensor, layer: Layer, rows: Tensor, columns: Tensor) -> Tensor:
    """Kept filters, each with the inputs that are kept in its own group."""
    if layer.groups == 1:
        return _cut(_cut(weight, _choose(rows), 0), _choose(columns), 1)
    if layer.depthwise:
        return _cut(weight, _choose(rows), 0)
    # Columns are numbered within a group, so each group is cut on its own.
    parts = zip(*(x.chunk(layer.groups) for x in (weight, rows, columns)), strict=True)
    return torch.cat([_cut(_cut(w, _choose(r), 0), _choose(c), 1) for w, r, c in parts])


def _choose(alive: Tensor) -> Tensor | None:
    """Indices of what is kept; None where that is everything."""
    return None if bool(alive.all()) else positions(alive)


def _cut(tensor: Tensor, chosen: Tensor | None, dim: int) -> Tensor:
    if chosen is None:
        return tensor
    return tensor.index_select(dim, chosen.to(tensor.device))


def _like(tensor: Tensor, cut: Tensor) -> Tensor:
    """What is cut as what it was cut from: a parameter, in the same layout."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        cut = cut.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(cut, requires_grad=tensor.requires_grad)
    return cut


# -- modules ---------------------------------------------------------------------------


def _resize_modules(
    graph: Graph, kept: Kept, norms: dict[str, Tensor], modules: Modules
) -> None:
    """The sizes that modules keep beside their tensors, read from what was cut."""
    for name in kept.rows:
        module, layer = modules[name], graph.layers[name]
        rows, inputs = filters_of(module).shape[:2]
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = rows, inputs
            continue
        if layer.depthwise:  # as many groups as channels are read
            module.groups = rows * layer.groups // len(layer.outputs)
        module.out_channels, module.in_channels = rows, inputs * module.groups
    for name, alive in norms.items():
        module = modules[name]
        if hasattr(module, "num_features"):
            module.num_features = int(alive.sum())
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            module.num_parameters = int(alive.sum())


def _replace_movers(
    graph: Graph, kept: Kept, small: nn.Module, modules: Modules
) -> None:
    """Modules that move or mix channels get index maps in the place of their code."""
    for name, move in (graph.moves | graph.mixes).items():
        read, write = _ends(graph, kept, move)
        if not (read.all() and write.all()):
            replace(small, name, Remap(modules[name], read, write, move.dim))
    for name, move in graph.shuffles.items():
        _pin_shuffle(modules[name], *_ends(graph, kept, move))


def _ends(graph: Graph, kept: Kept, move: Move) -> tuple[Tensor, Tensor]:
    """Which of the channels that a module reads and hands on are kept, bool."""
    read, write = (kept.units[graph.unit_of(x)] for x in (move.inputs, move.outputs))
    return read, write


def _pin_shuffle(module: Any, read: Tensor, write: Tensor) -> None:
    """Turn split sizes and shuffle of one ShuffleNetV2 unit into numbers."""
    if isinstance(module, PinnedShuffleUnit):
        left = module.split[0] if module.split else 0
        order = on_cpu(module.order)
    elif bool(read.all()) and bool(write.all()):
        return
    else:
        left = len(read) // 2
        order = torch.arange(len(write)).view(2, -1).t().flatten()
    # `order` picks from the concatenation; numbers of what is left of that come from
    # counting, in its order, the channels that are kept.
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    joined = write[place]  # kept channels in the order of the concatenation
    rank = (joined.cumsum(0) - 1)[order][write].to(device_of(module))
    sizes = [int(read[:left].sum()), int(read[left:].sum())]
    module.split = sizes if module.stride == 1 else []
    module.register_buffer("order", rank)
    module.__class__ = PinnedShuffleUnit


def _insert_scatters(
    graph: Graph, kept: Kept, small: nn.Module, modules: Modules
) -> None:
    for name in sorted(kept.scatter):
        rows = kept.rows[name]
        if not rows.all():
            end = graph.pairs.get(name, name)
            scatter = Scatter(positions(rows), len(rows))
            replace(small, end, nn.Sequential(modules[end], scatter))


def _insert_bridges(graph: Graph, kept: Kept, small: nn.Module) -> None:
    """Layers whose tensors keep channels that they themselves no longer have."""
    left = kept.units | graph.wide
    for name, rows in kept.rows.items():
        columns = graph.columns[name]
        read = kept.units[columns][left[columns]]
        made = rows if name in kept.scatter else rows[left[graph.rows[name]]]
        source = None
        if not made.all() and name not in kept.scatter:
            source = inverse(positions(made), len(made))
        if source is not None or not read.all():
            inner = small.get_submodule(name)  # a scatter may stand there by now
            dim = -1 if isinstance(inner, nn.Linear) else 1
            replace(small, name, Bridge(inner, _choose(read), source, dim))


# -- a shrunk network knows its plan, and so does its state ----------------------------


def mark(small: nn.Module, kept: Kept) -> None:
    """Write the digest of what is kept, and of the plan before, into the network.

    Sizes alone do not tell two plans apart: a state of other channels would load.
    """
    before = getattr(small, MARK, None)
    found = hashlib.sha256(str(_read(before)).encode())
    for name, rows in sorted(kept.rows.items()):
        found.update(f"{name} {name in kept.scatter} {rows.tolist()}".encode())
    found.update(str(sorted(kept.dropped)).encode())
    number = int.from_bytes(found.digest()[:8], signed=True)
    small.register_buffer(MARK, torch.tensor(number).to(device_of(small)))
    if before is None:
        small._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            refuse_other_plan, with_module=True
        )


def refuse_other_plan(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """While a state is loaded, before anything is: one of another plan is an error."""
    own, given = _read(getattr(module, MARK, None)), _read(state.get(prefix + MARK))
    if own is not None and given is not None and own != given:
        raise ValueError(
            f"the state is that of a network pruned by another plan ({given:x}, this "
            f"one's is {own:x}): load it with the plan that it was saved with"
        )


def _read(mark: Tensor | None) -> int | None:
    if mark is None or mark.is_meta:
        return None
    return int(mark.cpu()) % 2**64  # int64 keeps it with a sign
