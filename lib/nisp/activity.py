"""What layers answer to images: how large each neuron is, how active each channel.

The first is what the closed form's constant C_x leaves out; the second is what a layer
is ranked by on its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import baselines
from lib.data import ImageSet
from lib.graph import Graph, Node, build_graph
from lib.messages import check_finite
from lib.nisp.absolute import ACTIVATIONS
from lib.nisp.frl import take_sample
from lib.train import watch

Chain = list[Callable[[Tensor], Tensor]]


def measure_activity(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> dict[str, Tensor]:
    """Mean |output| of every neuron of every prunable layer, for `propagate`.

    The output is the layer's own behind the activations that alone read it, less what
    they make of zero, and in front of any BatchNorm: what a mask there takes away.
    Returns float64 [C, H, W] or [C], averaged over images (as in `collect_responses`)
    and, in a layer that runs more than once, over its calls. `ValueError` where those
    differ in shape. Source: the term |x| of the bound in Yu et al. 2018, sec. 3, before
    it is replaced by a constant.
    """
    chains = find_chains(model, graph or build_graph(model, images.shape), norms=False)
    sample, totals = take_sample(images, num_images, seed), dict.fromkeys(chains, 0.0)

    def measure(name: str, output: Tensor) -> Tensor:
        none = torch.zeros_like(output[:1])
        there, gone = (follow(chains[name], x) for x in (output, none))
        return (there - gone).abs().sum(0, dtype=torch.float64)

    for calls, _ in watch(model, sample, chains, keep=measure):
        for name, rows in calls.items():
            if len({row.shape for row in rows}) > 1:
                raise ValueError(
                    f"'{name}' runs on inputs of different sizes, so its neurons "
                    "have no mean; rank without `activity`"
                )
            totals[name] = totals[name] + torch.stack(rows).mean(0)
    means = {name: total / len(sample) for name, total in totals.items()}
    check_finite("the mean output", means)
    return means


def collect_channels(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> dict[str, Tensor]:
    """Mean response of every channel of every prunable layer, [N, C] each, in one pass.

    The response is the layer's output behind the BatchNorm and the activations that
    alone read it, averaged over positions (and over calls); N as in
    `collect_responses`.
    """
    chains = find_chains(model, graph or build_graph(model, images.shape), norms=True)
    sample = take_sample(images, num_images, seed)
    found: dict[str, list[Tensor]] = {name: [] for name in chains}

    def average(name: str, output: Tensor) -> Tensor:
        dim = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
        rows = follow(chains[name], output).movedim(dim, 1)
        return rows.reshape(*rows.shape[:2], -1).mean(2)

    for calls, _ in watch(model, sample, chains, keep=average):
        for name, rows in calls.items():
            found[name].append(torch.stack(rows).mean(0))
    return {name: torch.cat(rows) for name, rows in found.items()}


# -- what stands behind a layer --------------------------------------------------------


def find_chains(model: nn.Module, graph: Graph, *, norms: bool) -> dict[str, Chain]:
    """For each prunable layer that runs, what alone reads it: activations (and norms).

    In a layer that runs more than once, behind its first call.
    """
    modules = dict(model.named_modules())
    chains: dict[str, Chain] = {}
    for name in baselines.prunable_layers(model):
        if name not in graph.made:
            continue
        value, steps = graph.made[name][0], chains.setdefault(name, [])
        while len(graph.readers.get(value, [])) == 1:
            (node,) = graph.readers[value]
            plain = node.function is None
            if norms and plain and isinstance(modules[node.module], _BatchNorm):
                steps.append(modules[node.module])
            elif node.op.removesuffix("_") in ACTIVATIONS:
                steps.append(repeat(node))
            else:
                break
            value = node.outputs[0]
    return chains


def repeat(node: Node) -> Callable[[Tensor], Tensor]:
    """A traced activation, on a new tensor even where the net's own works in place."""
    function = getattr(torch.ops.aten, node.op.removesuffix("_"))
    return lambda x: function(x, *node.args[1:], **node.kwargs)


def follow(chain: Chain, x: Tensor) -> Tensor:
    """What the steps make of x, one after the other."""
    for step in chain:
        x = step(x)
    return x
