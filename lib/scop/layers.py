"""Which layers SCOP selects in: the convolutions inside blocks, found by tracing."""

from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.graph import Graph, Node, build_graph
from lib.settings import CHW


def block_layers(
    model: nn.Module, input_shape: CHW, *, ends: bool = True, graph: Graph | None = None
) -> list[str]:
    """Names of the convolutions with a BatchNorm inside residual blocks.

    Not among them: the stem, convolutions on a shortcut (the branch of an addition with
    fewer of them), a head behind the last block, and layers tied to one of those. A
    block is a module that adds, or of the same class as one that does (MobileNetV2's
    stride-2 blocks do not). `ends=False` leaves out the last convolution of each block.
    A network without additions gives every pair but those that read the images.

    `graph`: the model's, if known. ValueError: no convolution has a BatchNorm with a
    scale behind it. Source: Tang et al. 2020, official code (by name there).
    """
    graph = graph or build_graph(model, input_shape)
    pairs = find_pairs(graph, model)
    blocks = _find_blocks(graph, model)
    homes = tuple(f"{name}." for name in blocks)
    branches, shortcuts = _sort_branches(graph)
    inside = {n for n in graph.layers if n.startswith(homes)} | branches
    inside -= shortcuts
    # A tie through an addition is the residual stream, which a plan writes back
    # full-width; any other tie would prune the layer outside along with this one.
    groups = {name: graph.group_of[name] for name in inside}
    inside = {n for n, g in groups.items() if n in g.joined or inside >= {*g.layers}}
    if not _list_additions(graph):
        inside = pairs.keys() - _readers_of_images(graph)
    if not ends:
        inside = inside - _block_ends(graph, blocks, inside)
    return [name for name in pairs if name in inside]


def find_pairs(graph: Graph, model: nn.Module) -> dict[str, str]:
    """Convolutions with the BatchNorm (with a scale gamma) that reads them alone.

    It reads nothing else: it runs as often as they do.
    """
    modules = dict(model.named_modules())
    calls = Counter(node.module for node in graph.nodes)
    pairs = {
        name: norm
        for name, norm in graph.pairs.items()
        if isinstance(modules[norm], _BatchNorm) and modules[norm].weight is not None
        if not isinstance(modules[name], nn.Linear)
        if calls[name] == calls[norm] == len(graph.made[name])
    }
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no convolution followed by a BatchNorm with a "
            "scale; SCOP mixes between the two and cannot select here"
        )
    return pairs


def _list_additions(graph: Graph) -> list[Node]:
    """Additions of two features; that of a number joins nothing."""
    nodes = (node for node in graph.nodes if node.op in {"add", "add_"})
    return [node for node in nodes if len(set(node.inputs)) == 2]


def _find_blocks(graph: Graph, model: nn.Module) -> list[str]:
    """Modules of the classes that add; one that reads the images is a whole network."""
    modules = dict(model.named_modules())
    first = _readers_of_images(graph)
    adders = {node.module for node in _list_additions(graph)} - {""}
    adders = {a for a in adders if not any(n.startswith(f"{a}.") for n in first)}
    kinds = {type(modules[name]) for name in adders}
    return [name for name, module in modules.items() if type(module) in kinds]


def _sort_branches(graph: Graph) -> tuple[set[str], set[str]]:
    """Layers on the longer and on the shorter branch of each addition."""
    behind: dict[int, set[int]] = {}  # the operations that a value came through
    for i, node in enumerate(graph.nodes):
        came = {i}.union(*(behind.get(value, ()) for value in node.inputs))
        behind |= dict.fromkeys(node.outputs, came)
    branches, shortcuts = set(), set()
    for node in _list_additions(graph):
        first, second = (behind.get(value, set()) for value in node.inputs)
        # what both sides came through lies before the fork
        sides = [
            {graph.nodes[i].module for i in own} & graph.layers.keys()
            for own in (first - second, second - first)
        ]
        short, long = sorted(sides, key=len)
        branches |= long
        shortcuts |= short if len(short) < len(long) else set()
    return branches, shortcuts


def _readers_of_images(graph: Graph) -> set[str]:
    """Layers with no layer before them; the images may have been normalised."""
    found: set[str] = set()
    features: set[int] = set()
    for node in graph.nodes:
        later, layer = features & set(node.inputs), node.module in graph.layers
        if layer and not later:
            found.add(node.module)
        if layer or later:
            features |= set(node.outputs)
    return found


def _block_ends(graph: Graph, blocks: list[str], inside: set[str]) -> set[str]:
    """Layers whose channels are those that a block hands on, or that are added."""
    ends, homes = set(), tuple(f"{name}." for name in blocks)
    for name in graph.calls.keys() & set(blocks):
        target = graph.calls[name][1]
        units = graph.unit_of(graph.values[target].tags).unique()
        own = (n for n in graph.layers if n.startswith(f"{name}."))
        ends |= {n for n in own if bool(torch.isin(graph.rows[n], units).any())}
    loose = (n for n in inside if not n.startswith(homes))
    return ends | {n for n in loose if n in graph.group_of[n].joined}
