"""What stands right behind a layer and alone reads it: its norm, its activations."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lib.graph import Graph
from lib.graph.trace import Node
from lib.nisp.rules import ACTIVATIONS

UNCHANGED = set(
    "native_dropout dropout _to_copy to clone detach alias contiguous lift_fresh"
    "".split()
)


def find_chain(graph: Graph, modules: Mapping, name: str) -> list[Node]:
    """Norm and activations behind a layer, each the only reader of what is before."""
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    own = [node for node in graph.nodes if node.module == name and node.outputs]
    value, chain = own[0].outputs[0], []
    while len(readers.get(value, [])) == 1:
        node = readers[value][0]
        module = modules[node.module]
        norm = isinstance(module, _BatchNorm) and node.op == type(module).__name__
        if not norm and node.op not in ACTIVATIONS:
            break
        chain.append(node)
        value = node.outputs[0]
    return chain


def replay(chain: list[Node], modules: Mapping, x: Tensor) -> Tensor:
    """The operations of `find_chain` on a layer's output, which stays as it is."""
    for node in chain:
        if node.op == type(modules[node.module]).__name__:
            x = modules[node.module](x)
        elif node.op not in UNCHANGED:
            operation = getattr(torch.ops.aten, node.op.removesuffix("_"))
            x = operation(x, *node.args[1:], **node.kwargs)
    return x
