"""A shrunk network is checked by running it beside the whole one, on shapes.

Every operation of the one must be there in the other, in the same order, with the same
numbers, parameters and constants, reading the corresponding values and making what is
left of theirs. A forward that looks at the number of channels shows up here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib.graph import Graph, Node
from lib.graph.dry_run import Call, DryRun, run_dry
from lib.graph.tags import Operand, Value
from lib.plan import Kept
from lib.settings import CHW
from lib.surgery.movers import Bridge, PinnedShuffleUnit, Remap

# Operations that hand on what they read, and names for one and the same.
COPIES = {"clone", "contiguous", "alias", "detach", "lift_fresh", "lift"}
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand"}
ALIKE = dict.fromkeys(VIEWS, "view")

# Arguments that are sizes: these follow the channels, and what is made shows them.
SIZES = {
    **{op: (1,) for op in (*VIEWS, "new_zeros", "new_ones", "new_empty", "new_full")},
    **{op: (0,) for op in ("zeros", "ones", "empty", "full", "rand", "randn")},
    "_reshape_alias": (1, 2),
    "slice": (3,),
    "convolution": (8,),  # the groups of a depthwise one
    "split": (1,),
    "split_with_sizes": (1,),
}
PLACES = {"device", "layout", "pin_memory", "memory_format"}  # change no number


def check_result(
    graph: Graph, kept: Kept, small: nn.Module, input_shape: CHW, resolution: int | None
) -> None:
    """Raises `ValueError` if `small` does not run, or would compute something else."""
    after = _run_result(small, input_shape, "the shrunk network does not run")
    found = _Comparison(graph, kept, after).find_difference()
    if found is not None:
        raise ValueError(
            f"{graph.record.locate(found.module)} computes with the number of its "
            f"channels (in '{found.op}'), so a smaller copy of it would compute "
            "something else"
        )
    if resolution is not None:
        shape = (input_shape[0], resolution, resolution)
        _run_result(small, shape, f"resolution {resolution} does not fit this network")


def _run_result(small: nn.Module, input_shape: CHW, problem: str) -> DryRun:
    try:
        return run_dry(small, input_shape)
    except ValueError as error:
        raise ValueError(f"{problem}; {error}") from error


@dataclass
class _Edge:
    """What surgery took out or put in, seen from outside: what it reads and makes."""

    module: str
    inputs: tuple[int | None, ...]
    output: int | None
    op: str = "forward"


class _Comparison:
    """Two records side by side; `same` maps values of the one to those of the other."""

    def __init__(self, graph: Graph, kept: Kept, after: DryRun):
        self.graph, self.kept = graph, kept
        self.before, self.after = graph.record, after
        self.left = kept.units | graph.wide
        put_in = {
            name
            for name, module in after.modules.items()  # one slope is no leaf any more
            if isinstance(module, (Bridge, Remap))
            or getattr(module, "num_parameters", 0) == 1
        }
        ends = {graph.pairs.get(n, n) for n in kept.scatter}
        self.apart = {*put_in, *ends, *kept.dropped}
        self.inside = tuple(f"{name}." for name in self.apart)
        self.units = {
            n for n, m in after.modules.items() if isinstance(m, PinnedShuffleUnit)
        }
        self.same = dict(zip(self.before.images, after.images, strict=False))
        self.alias: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def find_difference(self) -> Node | _Edge | None:
        """The first step in which the two differ."""
        for training in (False, True):
            parts = [
                r.events[r.evaluated :] if training else r.events[: r.evaluated]
                for r in (self.before, self.after)
            ]
            if training and not all(parts):
                break  # the one pass reached every layer that is left
            steps = [self._list_steps(part, side) for side, part in enumerate(parts)]
            for old in steps[0]:
                new = next(steps[1], None)
                if new is None or not self._agree(old, new):
                    return old
            extra = next(steps[1], None)
            if extra is not None:
                return extra
        return None

    def _list_steps(
        self, events: list[Node | Call], side: int
    ) -> Iterator[Node | _Edge]:
        """Nodes and edges; copies and views of the same shape are looked through."""
        values = (self.before, self.after)[side].values
        for event in events:
            name = event.module
            if name.startswith(self.inside or ("\0",)):
                continue
            if isinstance(event, Call):
                if name in self.apart or name in self.units:
                    yield _Edge(name, event.inputs, event.output)
            elif name in self.apart:
                if event.function is None:
                    yield _Edge(name, event.inputs, event.outputs[0])
            elif name not in self.units and not self._is_copy(event, values, side):
                yield event

    def _is_copy(self, node: Node, values: list[Value], side: int) -> bool:
        # Whether `reshape` copies depends on the layout, and the layout on how many
        # channels are left: one of two equal forwards may have a step more.
        if node.op not in COPIES | VIEWS or node.operands[0].place < 0:
            return False
        source, target = node.operands[0].place, node.outputs[0]
        if node.op in VIEWS and values[source].shape != values[target].shape:
            return False
        self.alias[side][target] = self._root(source, side)
        return True

    def _root(self, place: int, side: int) -> int:
        return self.alias[side].get(place, place)

    # -- one step ------------------------------------------------------------------

    def _agree(self, old: Node | _Edge, new: Node | _Edge) -> bool:
        if old.module != new.module or len(old.inputs) != len(new.inputs):
            return False
        if isinstance(old, Node) and isinstance(new, Node):
            return self._agree_nodes(old, new)
        if not isinstance(old, _Edge) or not isinstance(new, _Edge):
            return False
        pairs = zip(old.inputs, new.inputs, strict=True)
        known = all(self._corresponds(a, b) for a, b in pairs)
        if old.output is not None and new.output is not None:
            self.same[self._root(old.output, 0)] = self._root(new.output, 1)
            return known and self._is_left_of(old.output, new.output)
        return known and old.output is new.output

    def _agree_nodes(self, old: Node, new: Node) -> bool:
        if ALIKE.get(old.op, old.op) != ALIKE.get(new.op, new.op):
            return False
        counts = ((len(x.operands), len(x.outputs)) for x in (old, new))
        if len(set(counts)) > 1 or _numbers(old) != _numbers(new):
            return False
        if not all(map(self._agree_operands, old.operands, new.operands)):
            return False
        narrow = old.module in self.kept.scatter  # until it is written back
        for a, b in zip(old.outputs, new.outputs, strict=True):
            self.same[self._root(a, 0)] = self._root(b, 1)
            if not (narrow or old.op == "t" or self._is_left_of(a, b)):
                return False
        return True

    def _agree_operands(self, old: Operand, new: Operand) -> bool:
        if old.place >= 0 and new.place >= 0:
            return self._corresponds(old.place, new.place)
        if old.parameter is not None or new.parameter is not None:
            return old.parameter == new.parameter
        if old.content is None or new.content is None:
            return old.shape == new.shape
        return old.content.dtype == new.content.dtype and torch.equal(
            old.content.cpu(), new.content.cpu()
        )

    def _corresponds(self, old: int | None, new: int | None) -> bool:
        """Are they the same value, or made inside of what surgery put in?"""
        if old is None or new is None:
            return old is new
        # Unknown ones were made inside of a module that stands for a whole step: where
        # they meet first they become a pair.
        a, b = self._root(old, 0), self._root(new, 1)
        return self.same.setdefault(a, b) == b

    def _is_left_of(self, old: int, new: int) -> bool:
        """Has the new value the shape that is left of the old one?"""
        whole, small = self.before.values[old], self.after.values[new]
        return self._shape_left(whole) == small.shape

    def _shape_left(self, value: Value) -> tuple[int, ...]:
        tags = value.tags
        if tags is None or tags.numel() == 1:
            return value.shape
        alive: Tensor = self.left[self.graph.unit_of(tags)]
        left = list(value.shape)
        for dim, size in enumerate(tags.shape):
            if size > 1:  # in a tensor of tags a place lives if any along it does
                others = [d for d in range(tags.ndim) if d != dim]
                left[dim] = int((alive.any(others) if others else alive).sum())
        return tuple(left)


def _numbers(node: Node) -> tuple[Any, ...]:
    """The numbers with which an operation runs, but for those that are sizes."""
    sizes = SIZES.get(node.op, ())
    own = tuple(_plain(a) for i, a in enumerate(node.args) if i not in sizes)
    named = ((k, _plain(v)) for k, v in node.kwargs.items() if k not in PLACES)
    return own, tuple(named)


def _plain(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(map(_plain, argument))
    return None if isinstance(argument, Tensor) else argument
