"""How large each neuron's output is: what the closed form's constant C_x leaves out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import baselines
from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.graph.trace import Node
from lib.nisp.chains import find_chain, replay
from lib.nisp.frl import stream_layers
from lib.nisp.rules import Step, norm_scale


def measure_activity(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """Mean |output| of every neuron of every prunable layer, for `propagate`.

    The output is the layer's own behind the activations that alone read it, less what
    they make of zero, and in front of any BatchNorm: what a mask there takes away.
    Returns float64 [C, H, W] or [C] on the model's device, averaged over `num_images`
    images (stratified, fixed by `seed`, in evaluation mode) and, in a layer that runs
    more than once, over its calls. Raises `ValueError` where those calls differ in
    shape. Source: the term |x| of the bound in Yu et al. 2018, sec. 3, before it is
    replaced by a constant.
    """
    graph = build_graph(model, images.shape)
    modules = dict(model.named_modules())
    chains = {
        name: find_activations(graph, modules, name)
        for name in baselines.prunable_layers(model)
        if name in graph.layers
    }
    totals: dict[str, Tensor | float] = dict.fromkeys(chains, 0.0)
    calls: dict[str, list[Tensor]] = {name: [] for name in chains}
    seen = 0

    def record(name: str, output: Tensor) -> None:
        there = replay(chains[name], modules, output)
        gone = replay(chains[name], modules, torch.zeros_like(output[:1]))
        calls[name].append((there - gone).abs().sum(0, dtype=torch.float64))

    def add_batch(x: Tensor) -> None:
        nonlocal seen
        seen += len(x)
        for name, rows in calls.items():
            if len({row.shape for row in rows}) > 1:
                raise ValueError(
                    f"'{name}' runs on inputs of different sizes, so its neurons have "
                    "no mean; rank without `activity`"
                )
            totals[name] = totals[name] + torch.stack(rows).mean(0)
            rows.clear()

    stream_layers(
        model, chains, images, record, add_batch,
        num_images=num_images, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return {name: total / seen for name, total in totals.items()}


def undo_norms(
    model: nn.Module, input_shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """sigma / |gamma| of the BatchNorm that alone reads each prunable layer, or 1.

    As `activity` of `propagate` it gives the scores behind that BatchNorm instead of
    those in front of it. A channel with gamma = 0 is constant and gets 0. For a layer
    that runs more than once the BatchNorm of the first call counts. Raises `ValueError`
    for a BatchNorm that keeps no running statistics.
    """
    graph, modules = build_graph(model, input_shape), dict(model.named_modules())
    found = {}
    for name in baselines.prunable_layers(model):
        if name not in graph.layers:
            continue
        node = next(n for n in graph.nodes if n.module == name and n.outputs)
        shape = graph.values[node.outputs[0]].shape[1:]
        chain = find_chain(graph, modules, name)
        factor = torch.ones(shape[0], dtype=torch.float64)
        if chain and isinstance(modules[chain[0].module], _BatchNorm):
            gain = norm_scale(Step(chain[0], modules[chain[0].module], [], []))
            factor = torch.where(gain > 0, 1 / gain, 0.0)
        found[name] = factor.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return found


def find_activations(graph: Graph, modules: Mapping, name: str) -> list[Node]:
    """The activations right behind a layer that alone read it."""
    chain = find_chain(graph, modules, name)
    norms = [
        i for i, n in enumerate(chain) if isinstance(modules[n.module], _BatchNorm)
    ]
    return chain[: norms[0]] if norms else chain
