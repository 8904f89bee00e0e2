"""Layers and norms with a forward of their own, known by the operation in it."""

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lib.graph.dry_run import Node

if TYPE_CHECKING:
    from lib.graph.trace import Trace

BATCH_NORMS = {"native_batch_norm", "cudnn_batch_norm"}


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
        known = known and weight is not None and weight.value is not None
    elif isinstance(module, _ConvNd) and node.op == "convolution":
        known = node.raw[6] is False and node.raw[8] == module.groups
        x, weight, bias = [*node.operands, None][:3]
    else:
        return False
    for key, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            known = known and given.parameter == f"{name}.{key}".removeprefix(".")
    if not known or weight is None or x is None or x.value is None:
        return False
    trace.read_layer_call(node, module, x.value, evaluating)
    return True


def _read_norm(trace: "Trace", node: Node) -> bool:
    """Statistics, scale and shift lie along the channels."""
    x, *rest = node.operands
    if x.value is None or x.tags is None or any(not y.parameter for y in rest):
        return False
    where = trace.record.locate(node.module)
    row = trace.ledger.row(x.value, 1, x.shape[1], where)
    owners = {str(y.parameter).rpartition(".")[0] for y in rest}
    owner = owners.pop() if len(owners) == 1 else None
    if owner is not None and isinstance(trace.record.modules[owner], _BatchNorm):
        trace.read_norm(owner, x.value)
        trace.normed[node.inputs[0]] = owner
    else:
        for y in rest:
            trace.ledger.lie_along(str(y.parameter), 0, row, where)
    for place in node.outputs:  # and the statistics of the batch
        value = trace.values[place]
        value.tags = row if len(value.shape) == 1 else x.tags
    return True
