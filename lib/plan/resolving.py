"""Checking a plan against a traced network: what exactly stays."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.graph import Graph, Group, droppable_blocks, dropped_units
from lib.messages import suggest
from lib.plan.record import Plan


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
        _check_names(graph, plan)
        _check_blocks(graph, plan, model)
    # The order matters. Ties are checked on what the plan itself says of each layer:
    # afterwards, in units, all members of a group agree. Dropped blocks take their
    # units along, then layers those that they give up, but for scattered ones, whose
    # stream stays. Only then is it known what is left of layers that nobody named.
    marks = {n: _mark(kept, len(graph.rows[n])) for n, kept in plan.keep.items()}
    for group in graph.groups if check else ():
        if not marks.keys().isdisjoint(group.layers):
            _check_group(graph, group, plan, marks)
    units = torch.ones(graph.num_units + 1, dtype=torch.bool)
    for block in plan.drop:
        units[dropped_units(graph, block)] = False
    for name in plan.keep.keys() - plan.scatter:
        units[graph.rows[name][~marks[name]]] = False
    left = _list_left(plan, graph.rows)
    rows = {name: units.index_select(0, graph.rows[name]) for name in left}
    for name in left if check else ():
        _check_layer(graph, name, rows[name], units[graph.columns[name]])
    rows |= {name: marks[name] for name in plan.scatter}
    return Kept(units, rows, frozenset(plan.scatter), tuple(plan.drop))


def _check_layer(graph: Graph, name: str, makes: Tensor, reads: Tensor) -> None:
    """Something is left to make and to read, as much in each group of channels."""
    layer = graph.layers[name]
    for side, kept in (("make", makes), ("read", reads)):
        if not bool(kept.any()):
            raise ValueError(f"plan: '{name}' would {side} no channel at all")
        if not layer.grouped:
            continue
        counts = kept.view(layer.groups, -1).sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"plan: '{name}' is grouped and would {side} {counts} channels in its "
                "groups; they must be as many in each"
            )


def _mark(kept: list[int], size: int) -> Tensor:
    """A bool row [size], True at the indices kept."""
    row = torch.zeros(size, dtype=torch.bool)
    row[torch.tensor(kept, dtype=torch.long)] = True
    return row


def _list_left(plan: Plan, names: dict[str, Tensor] | tuple[str, ...]) -> list[str]:
    """The layers that do not go with a dropped block."""
    dropped = tuple(f"{block}." for block in plan.drop)
    return [n for n in names if not (dropped and n.startswith(dropped))]


def _check_names(graph: Graph, plan: Plan) -> None:
    for name, kept in plan.keep.items():
        _check_indices(graph, name, kept)
    left = _list_left(plan, tuple(plan.keep))
    for name in plan.keep.keys() - set(left):
        raise ValueError(f"plan: '{name}' is kept in part but its block is dropped")


def _check_indices(graph: Graph, name: str, kept: list[int]) -> None:
    if name not in graph.layers:
        near = suggest(name, graph.layers)
        raise ValueError(f"plan: no layer '{name}' runs in the net{near}")
    size = len(graph.layers[name].outputs)
    if not kept:
        raise ValueError(f"plan: '{name}' would keep no channel at all")
    if kept[0] < 0 or kept[-1] >= size or len(set(kept)) < len(kept):
        raise ValueError(
            f"plan: '{name}' has channels 0..{size - 1}, each to be named once; "
            f"got {kept[:3]}...{kept[-1]}"
        )


def _check_blocks(graph: Graph, plan: Plan, model: nn.Module | None) -> None:
    if not plan.drop or model is None:
        return
    possible = droppable_blocks(graph, model)
    for block in plan.drop:
        if block not in possible:
            raise ValueError(
                f"plan: '{block}' cannot be dropped, its output is not its input plus "
                f"something; possible: {', '.join(possible) or 'none'}"
            )


def _check_group(
    graph: Graph, group: Group, plan: Plan, marks: dict[str, Tensor]
) -> None:
    layers = _list_left(plan, group.layers)
    scattered = [n for n in layers if n in plan.scatter]
    tied = [n for n in layers if n not in plan.scatter]
    named = [n for n in tied if n in plan.keep]
    cut = [n for n in named if len(plan.keep[n]) < len(group.index[n])]
    if (cut or scattered) and group.fixed:
        raise ValueError(
            f"plan: {', '.join(cut + scattered)} cannot be pruned: {group.fixed}"
        )
    for name in scattered:
        _check_scatter(graph, group, name, plan, cut)
    if not cut:
        return
    alive = torch.ones(group.size, dtype=torch.bool)
    for name in cut:
        alive[group.index[name][~marks[name]]] = False
    _check_agreement(graph, group, marks, tied, cut, alive)
    blocks = group.unit_blocks
    counts = {int(alive[b].sum()) for b in blocks} if len(blocks) > 1 else set()
    if len(counts) > 1:
        raise ValueError(
            f"plan: {', '.join(cut)} feed or form a grouped convolution and must "
            f"keep as many channels in each of its groups, got {sorted(counts)}"
        )


def _check_agreement(
    graph: Graph,
    group: Group,
    marks: dict[str, Tensor],
    tied: list[str],
    cut: list[str],
    alive: Tensor,
) -> None:
    """Every tied layer keeps exactly the units that all of them keep."""
    for name in tied:
        wanted, kept = alive[group.index[name]], marks.get(name)
        if kept is None and graph.layers[name].depthwise:
            continue  # a depthwise convolution has no say of its own
        if not (wanted.all() if kept is None else torch.equal(wanted, kept)):
            more = ", ..." if len(tied) > 6 else ""
            raise ValueError(
                f"plan: {', '.join(tied[:6])}{more} are tied and must keep the same "
                f"channels, but '{name}' does not agree with "
                f"'{next((n for n in cut if n != name), cut[0])}'"
            )


def _check_scatter(
    graph: Graph, group: Group, name: str, plan: Plan, cut: list[str]
) -> None:
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
