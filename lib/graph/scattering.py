"""Which layers can be narrowed on their own and written back before an addition."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib.graph.dry_run import Node
from lib.graph.tags import ADDITIONS, ELEMENTWISE, MOVES, REDUCTIONS, SPATIAL
from lib.graph.tracing import Trace

if TYPE_CHECKING:
    from lib.graph.structure import Graph

# Zero in the first operand is zero in the result, whatever the others are.
KEEP_ZERO = set("mul mul_ div div_ clone detach alias contiguous to _to_copy".split())
# What makes zeros of zeros and of nothing else: positions move, maps are averaged.
PASS_ON = SPATIAL | MOVES | REDUCTIONS | {"PReLU", "cat"}


def find_readers(nodes: list[Node]) -> dict[int, list[Node]]:
    """The operations that read each value."""
    readers = defaultdict(list)
    for node in nodes:
        for value in node.inputs:
            readers[value].append(node)
    return readers


def find_pairs(found: Trace, readers: dict[int, list[Node]]) -> dict[str, str]:
    """Each convolution or linear layer with the BatchNorm that alone reads it.

    In every call: a layer that runs twice, only once before its BatchNorm, has none.
    """
    pairs = {}
    for name, made in found.made.items():
        norms = {found.normed.get(v) if len(readers[v]) == 1 else None for v in made}
        norm = norms.pop() if len(norms) == 1 else None
        if norm is not None:
            pairs[name] = norm
    return pairs


def writes_zeros(found: "Graph", name: str) -> bool:
    """Is a channel that is zero behind the layer (and its BatchNorm) zero when added?

    The channels that are removed are written back as zeros, right behind the layer or
    its BatchNorm: an activation between there and the addition must keep them so.
    """
    norm = found.pairs.get(name)
    for value in found.made.get(name, ()):
        if norm is not None:  # what it makes, unless its own module goes on from there
            value = found.readers[value][0].outputs[0]
            if found.calls.get(norm, (0, value))[1] != value:
                return False
        if not _stays_zero(found, value):
            return False
    return True


def _stays_zero(found: "Graph", start: int) -> bool:
    """Follow a value to the additions and layers that end its way, over zeros alone.

    What has no rule, a GroupNorm say, may make anything of zeros.
    """
    made = {value for values in found.made.values() for value in values}
    waiting, seen = [start], {start}
    while waiting:
        value = waiting.pop()
        for node in found.readers[value]:
            others = [v for v in node.inputs if v != value]
            if (node.op in ADDITIONS and others) or not made.isdisjoint(node.outputs):
                continue
            plain = node.op in PASS_ON or node.op.startswith("Dropout")
            if not plain and not (node.op in ELEMENTWISE and _keeps_zero(node, value)):
                return False
            waiting += [v for v in node.outputs if v not in seen]
            seen.update(node.outputs)
    return True


def _keeps_zero(node: Node, value: int) -> bool:
    """Does the operation make zero of zero? With numbers alone it is asked."""
    if node.op in KEEP_ZERO:
        return node.operands[0].place == value or node.op.startswith("mul")
    if len(node.operands) > 1 or node.function is None:
        return False
    zero: Tensor = node.function(torch.zeros(1, 1, 1, 1), *node.args[1:], **node.kwargs)
    return not bool(zero.any())
