"""`mask`: a full-size copy in which a plan's channels are silent."""

from typing import Any

import torch
from torch import Tensor, nn

from lib.graph import Graph, build_graph, dropped_units
from lib.graph.leaves import filters_of
from lib.graph.structure import block_units
from lib.plan import Kept, Plan, resolve
from lib.settings import CHW
from lib.surgery.checks import check_result
from lib.surgery.copying import copy_model
from lib.surgery.cut import cut_out
from lib.surgery.movers import Gate, replace


def mask(
    model: nn.Module, plan: Plan, input_shape: CHW, *, graph: Graph | None = None
) -> nn.Module:
    """A full-size copy in which every removed channel is zero and read by nobody.

    `graph`, if given, is that of `build_graph(model, input_shape)`. Raises `ValueError`
    for a plan that does not fit, naming the layers, and where the shrunk network would
    compute something else.
    """
    graph = graph or build_graph(model, input_shape)
    kept = resolve(graph, plan, model)
    # What shrinking would refuse is refused here as well: a mask stands for a network
    # that can be built.
    small = cut_out(model, graph, kept)
    check_result(graph, kept, small, input_shape, plan.resolution)
    masked = copy_model(model)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        _zero_rows(graph, _rows_when_masked(graph, kept), modules)
        _zero_columns(graph, kept, modules)
    for name, move in (graph.moves | graph.mixes).items():
        alive = kept.units[graph.unit_of(move.inputs)]
        if not alive.all():
            replace(masked, name, Gate(modules[name], alive, move.dim))
    for block in kept.dropped:
        if not len(dropped_units(graph, block)):  # a residual block
            replace(masked, block, nn.Identity())
    return masked


def _rows_when_masked(graph: Graph, kept: Kept) -> dict[str, Tensor]:
    """Rows per layer; a dropped block's last layers fall silent altogether."""
    rows = {
        n: torch.ones(len(x.outputs), dtype=torch.bool) for n, x in graph.layers.items()
    }
    rows |= kept.rows
    for block in kept.dropped:
        _, ends = block_units(graph, block)
        for name in graph.layers:
            if name.startswith(f"{block}."):
                rows[name] = rows[name] & ~torch.isin(graph.rows[name], ends)
    return rows


def _zero_rows(graph: Graph, rows: dict[str, Tensor], modules: dict[str, Any]) -> None:
    dead = torch.zeros(graph.num_tags + 1, dtype=torch.bool)  # constants: the last
    for name, alive in rows.items():
        for tensor in (filters_of(modules[name]), modules[name].bias):
            if tensor is not None:
                tensor[~alive] = 0
        dead[graph.layers[name].outputs[~alive]] = True
    for name, tags in graph.norms.items():
        module = modules[name]
        if isinstance(module, nn.PReLU):
            continue  # nothing in, nothing out
        # Without a scale a norm of zeros is zero if its mean is, or has no mean kept.
        shift = (module.running_mean,) if module.weight is None else ()
        for tensor in (module.weight, module.bias, *shift):
            if tensor is not None:
                tensor[dead[tags]] = 0


def _zero_columns(graph: Graph, kept: Kept, modules: dict[str, Any]) -> None:
    for name, layer in graph.layers.items():
        alive = kept.units[graph.columns[name]]
        if layer.depthwise or bool(alive.all()):
            continue  # a depthwise filter reads its own channel, whose row is gone
        blocks = filters_of(modules[name]).chunk(layer.groups)
        for block, part in zip(blocks, alive.chunk(layer.groups), strict=True):
            block[:, ~part] = 0
