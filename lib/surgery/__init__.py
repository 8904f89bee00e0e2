"""Acting on a plan: `mask` silences what a plan removes, `shrink` cuts it out.

Both return a copy of the model. Their outputs agree in evaluation for every plan; the
shrunk network holds no mask, no hook and no zeroed channel. Where channels are moved
about inside a network (zero-padded shortcuts, channel shuffles, responses normalised
across channels), small modules with integer index maps take that step's place.
"""

from torch import nn

from lib.graph import Graph, Group, build_graph, droppable_blocks, list_prunable
from lib.settings import CHW
from lib.surgery.cut import shrink, shrunk_from
from lib.surgery.silence import mask

__all__ = ["channel_groups", "droppable", "mask", "prunable", "shrink", "shrunk_from"]


def channel_groups(
    model: nn.Module, input_shape: CHW, *, graph: Graph | None = None
) -> list[Group]:
    """The groups of layers whose output channels must be kept together.

    `input_shape` is (C, H, W). See `lib.graph.Group`; `group.fixed` says why a group
    cannot be pruned at all.
    """
    return (graph or build_graph(model, input_shape)).groups


def droppable(
    model: nn.Module, input_shape: CHW, *, graph: Graph | None = None
) -> list[str]:
    """Names of the blocks that `Plan.drop` may replace by the identity."""
    return droppable_blocks(graph or build_graph(model, input_shape), model)


def prunable(
    model: nn.Module, input_shape: CHW, *, graph: Graph | None = None
) -> dict[str, str | None]:
    """Every convolution and linear layer with None, or the reason to leave it whole.

    The reason names the module and the operation to change. Layers that are tied to
    one another have one reason.
    """
    return list_prunable(graph or build_graph(model, input_shape), model)
