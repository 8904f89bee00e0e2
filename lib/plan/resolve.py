"""Checking a plan against a traced network: what exactly stays."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.graph import Graph, Group, droppable_blocks, dropped_units
from lib.plan.record import Plan, nearest_name


@dataclass(frozen=True)
class Kept:
    """A checked plan: kept units (bool, one more for constants) and rows per layer."""

    units: Tensor
    rows: dict[str, Tensor]
    scatter: frozenset[str]
    dropped: tuple[str, ...]

    def is_whole(self) -> bool:
        """Nothing is removed."""
        rows = all(bool(r.all()) for r in self.rows.values())
        return rows and bool(self.units.all()) and not self.dropped


def resolve(
    graph: Graph, plan: Plan, model: nn.Module | None = None, *, check: bool = True
) -> Kept:
    """The units and rows that `plan` keeps, or a `ValueError` that names the layers."""
    if check:
        _check_plan(graph, plan, model)
    units = torch.ones(graph.num_units + 1, dtype=torch.bool)
    for block in plan.drop:
        units[dropped_units(graph, block)] = False
    for name, kept in plan.keep.items():
        if name not in plan.scatter:
            row = graph.unit_of(graph.layers[name].outputs)
            gone = torch.ones(len(row), dtype=torch.bool)
            gone[kept] = False
            units[row[gone]] = False
    rows = {}
    for name, layer in graph.layers.items():
        if not any(name.startswith(f"{block}.") for block in plan.drop):
            rows[name] = units[graph.unit_of(layer.outputs)]
    for name in plan.scatter:
        rows[name] = torch.zeros_like(rows[name]).index_fill_(
            0, torch.tensor(plan.keep[name]), True
        )
    return Kept(units, rows, frozenset(plan.scatter), tuple(plan.drop))


def _check_plan(graph: Graph, plan: Plan, model: nn.Module | None) -> None:
    for name, kept in plan.keep.items():
        _check_indices(graph, name, kept)
        if any(name.startswith(f"{block}.") for block in plan.drop):
            raise ValueError(f"plan: '{name}' is kept in part but its block is dropped")
    _check_blocks(graph, plan, model)
    for group in graph.groups:
        _check_group(graph, group, plan)


def _check_indices(graph: Graph, name: str, kept: list[int]) -> None:
    if name not in graph.layers:
        nearest = nearest_name(name, graph.layers)
        raise ValueError(f"plan: no layer '{name}' runs in the net{nearest}")
    size = len(graph.layers[name].outputs)
    if not kept:
        raise ValueError(f"plan: '{name}' would keep no channel at all")
    if kept[0] < 0 or kept[-1] >= size or len(set(kept)) < len(kept):
        raise ValueError(
            f"plan: '{name}' has channels 0..{size - 1}, each to be named once; "
            f"got {kept[:3]}...{kept[-1]}"
        )


def _check_blocks(graph: Graph, plan: Plan, model: nn.Module | None) -> None:
    if not plan.drop:
        return
    possible = droppable_blocks(graph, model) if model is not None else plan.drop
    for block in plan.drop:
        if block not in possible:
            raise ValueError(
                f"plan: '{block}' cannot be dropped, its output is not its input plus "
                f"something; possible: {', '.join(possible) or 'none'}"
            )


def _check_group(graph: Graph, group: Group, plan: Plan) -> None:
    dropped = tuple(f"{block}." for block in plan.drop)
    layers = [n for n in group.layers if not n.startswith(dropped or "\0")]
    tied = [n for n in layers if n not in plan.scatter]
    named = [n for n in tied if n in plan.keep]
    cut = [n for n in named if len(plan.keep[n]) < len(group.index[n])]
    scattered = [n for n in layers if n in plan.scatter]
    if (cut or scattered) and group.fixed:
        raise ValueError(
            f"plan: {', '.join(cut + scattered)} cannot be pruned: {group.fixed}"
        )
    for name in scattered:
        _check_scatter(graph, group, name, plan, cut)
    if not cut:
        return
    alive = _intersect(group, cut, plan)
    for name in tied:
        index, kept = group.index[name], plan.keep.get(name)
        wanted = torch.nonzero(alive[index]).flatten().tolist()
        if kept is None and name in graph.followers:
            continue  # a depthwise convolution has no say of its own
        if wanted != (kept if kept is not None else list(range(len(index)))):
            more = ", ..." if len(tied) > 6 else ""
            raise ValueError(
                f"plan: {', '.join(tied[:6])}{more} are tied and must keep the same "
                f"channels, but '{name}' does not agree with "
                f"'{next((n for n in cut if n != name), cut[0])}'"
            )
    counts = [int(alive[block].sum()) for block in group.unit_blocks]
    if len(set(counts)) > 1:
        raise ValueError(
            f"plan: {', '.join(cut)} feed or form a grouped convolution and must "
            f"keep as many channels in each of its groups, got {sorted(set(counts))}"
        )


def _intersect(group: Group, cut: list[str], plan: Plan) -> Tensor:
    alive = torch.ones(group.size, dtype=torch.bool)
    for name in cut:
        gone = torch.ones(len(group.index[name]), dtype=torch.bool)
        gone[plan.keep[name]] = False
        alive[group.index[name][gone]] = False
    return alive


def _check_scatter(graph, group: Group, name: str, plan: Plan, cut: list[str]) -> None:
    if name not in group.joined:
        raise ValueError(f"plan: '{name}' feeds no addition, so it cannot be scattered")
    if name not in group.scatterable:
        raise ValueError(
            f"plan: '{name}' cannot be scattered: more than its own BatchNorm stands "
            "between it and the addition"
        )
    if cut:
        raise ValueError(
            f"plan: '{name}' is scattered into the stream that {', '.join(cut)} "
            "narrow; scatter all of them or none"
        )
    groups = graph.layers[name].groups
    width = len(graph.layers[name].outputs) // groups
    counts = [sum(k // width == g for k in plan.keep[name]) for g in range(groups)]
    if len(set(counts)) > 1:
        raise ValueError(f"plan: '{name}' needs as many channels in each of its groups")
