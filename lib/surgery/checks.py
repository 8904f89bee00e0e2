"""A shrunk network is checked by running it beside the whole one, on shapes.

Every operation of the one must be there in the other, in the same order, with the same
numbers, parameters and constants, reading the corresponding values and making what is
left of theirs. A forward that looks at the number of channels shows up here.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from lib.graph import Graph, Node
from lib.graph.dry_run import Call, DryRun, run_dry
from lib.graph.tags import Value
from lib.plan import Kept
from lib.settings import CHW
from lib.surgery.movers import Bridge, PinnedShuffleUnit, Remap

# Operations that hand on what they read; the views are names for one and the same.
COPIES = {"clone", "contiguous", "alias", "detach", "lift_fresh", "lift"}
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand"}

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
Step = tuple[Any, ...]  # what should be the same in both networks


def check_result(
    graph: Graph, kept: Kept, small: nn.Module, input_shape: CHW, resolution: int | None
) -> None:
    """Raises `ValueError` if `small` does not run, or would compute something else."""
    after = _run_result(small, input_shape, "the shrunk network does not run")
    found = _find_difference(graph, kept, after)
    if found is not None:
        op = found.op if isinstance(found, Node) else "forward"
        raise ValueError(
            f"{graph.record.locate(found.module)} computes with the number of its "
            f"channels (in '{op}'), so a smaller copy of it would compute something "
            "else"
        )
    if resolution is not None:
        shape = (input_shape[0], resolution, resolution)
        _run_result(small, shape, f"resolution {resolution} does not fit this network")


def _run_result(small: nn.Module, input_shape: CHW, problem: str) -> DryRun:
    try:
        return run_dry(small, input_shape)
    except ValueError as error:
        raise ValueError(f"{problem}; {error}") from error


def _find_difference(graph: Graph, kept: Kept, after: DryRun) -> Node | Call | None:
    """The first step in which the shrunk network is not what is left of the whole."""
    put_in = {
        name
        for name, module in after.modules.items()  # one slope is no leaf any more
        if isinstance(module, (Bridge, Remap))
        or getattr(module, "num_parameters", 0) == 1
    }
    ends = {graph.pairs.get(n, n) for n in kept.scatter}
    surgery = _Surgery(
        {*put_in, *ends, *kept.dropped},
        {n for n, m in after.modules.items() if isinstance(m, PinnedShuffleUnit)},
        kept,
    )
    left, units = (kept.units | graph.wide).numpy(), graph.units.numpy()
    before = _Reading(graph.record, surgery, lambda x: _shape_left(x, left, units))
    found = _Reading(after, surgery, lambda x: x.shape)
    twice = all(len(r.events) > r.evaluated for r in (graph.record, after))
    for training in (False, True) if twice else (False,):
        steps = before.list_steps(training), found.list_steps(training)
        for old, new in itertools.zip_longest(*steps):
            if old is None or new is None or old[1] != new[1]:
                return (old or new)[0]
    return None


def _shape_left(value: Value, left: np.ndarray, units: np.ndarray) -> tuple[int, ...]:
    """The shape without the channels whose units are gone."""
    tags = value.tags
    if tags is None or tags.numel() == 1:
        return value.shape
    alive, shape = left[units[tags.numpy()]], list(value.shape)
    for dim, size in enumerate(tags.shape):
        if size > 1:  # in a tensor of tags a place lives if any along it does
            others = tuple(d for d in range(tags.ndim) if d != dim)
            shape[dim] = int(np.count_nonzero(alive.any(others)))
    return tuple(shape)


@dataclass
class _Surgery:
    """What was taken out, put in (`apart`) or written anew (`units`), by name."""

    apart: set[str]
    units: set[str]
    kept: Kept


class _Reading:
    """The steps of one record as they look from outside of what surgery put in.

    Values go by the numbers in which they are met, so that equal steps of two records
    are equal tuples; `shape_of` says what shape a value should have at the end.
    """

    def __init__(
        self,
        record: DryRun,
        surgery: _Surgery,
        shape_of: Callable[[Value], tuple[int, ...]],
    ):
        self.record, self.surgery, self.shape_of = record, surgery, shape_of
        self.inside = tuple(f"{name}." for name in surgery.apart)
        self.count = itertools.count()
        self.numbers = {place: next(self.count) for place in record.images[:1]}
        self.roots: dict[int, int] = {}  # of copies and views: what they are views of

    def list_steps(self, training: bool) -> Iterator[tuple[Node | Call, Step]]:
        """What happens in a pass, and where; views of the same shape do not count."""
        surgery, end = self.surgery, self.record.evaluated
        for event in self.record.events[end:] if training else self.record.events[:end]:
            name = event.module
            if self.inside and name.startswith(self.inside):
                continue
            if isinstance(event, Call):
                if name in surgery.apart or name in surgery.units:
                    yield event, self._read_ends(event.inputs, event.output, name)
            elif name in surgery.apart:
                if event.function is None:
                    yield event, self._read_ends(event.inputs, event.outputs[0], name)
            elif name not in surgery.units and not self._is_copy(event):
                yield event, self._read_node(event)

    def _read_ends(
        self, inputs: tuple[int | None, ...], output: int | None, name: str
    ) -> Step:
        """What surgery took out or put in: what it reads and makes."""
        read = [None if place is None else self._number(place) for place in inputs]
        if output is None:
            return name, read, None
        if name in self.surgery.kept.dropped and (source := inputs[0]) is not None:
            self.roots[output] = self.roots.get(source, source)
        else:
            self._give_number(output)
        return name, read, self.shape_of(self.record.values[output])

    def _read_node(self, node: Node) -> Step:
        """An operation: with which numbers and on what it runs, and what it makes."""
        read = [self._describe(x) for x in node.operands]
        for place in node.outputs:
            self._give_number(place)
        # A transpose shows in what reads it; a scattered layer is narrow for a while.
        hidden = node.op == "t" or node.module in self.surgery.kept.scatter
        values = () if hidden else (self.record.values[p] for p in node.outputs)
        made = [self.shape_of(value) for value in values]
        op = "view" if node.op in VIEWS else node.op
        return node.module, op, _list_numbers(node), read, len(node.outputs), made

    def _describe(self, x: Value) -> Any:
        if x.place >= 0:
            return self._number(x.place)
        if x.parameter is not None:
            return x.parameter
        return x.shape if x.content is None else (x.content.dtype, x.content.tolist())

    def _number(self, place: int) -> int:
        # Unknown ones were made inside of a module that stands for a whole step: they
        # get a number where they are met first.
        root = self.roots.get(place, place)
        if root not in self.numbers:
            self._give_number(root)
        return self.numbers[root]

    def _give_number(self, place: int) -> None:
        self.numbers[self.roots.get(place, place)] = next(self.count)

    def _is_copy(self, node: Node) -> bool:
        # Whether `reshape` copies depends on the layout, and the layout on how many
        # channels are left: one of two equal forwards may have a step more.
        if node.op not in COPIES | VIEWS or node.operands[0].place < 0:
            return False
        source, target = node.operands[0].place, node.outputs[0]
        values = self.record.values
        if node.op in VIEWS and values[source].shape != values[target].shape:
            return False
        self.roots[target] = self.roots.get(source, source)
        return True


def _list_numbers(node: Node) -> Step:
    """The numbers with which an operation runs, but for those that are sizes."""
    if node.function is None:
        return node.args
    sizes = SIZES.get(node.op, ())
    own = [_plain(a) for i, a in enumerate(node.args) if i not in sizes]
    named = [(k, _plain(v)) for k, v in node.kwargs.items() if k not in PLACES]
    return own, named


def _plain(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return list(map(_plain, argument))
    return None if isinstance(argument, Tensor) else argument
