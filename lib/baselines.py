"""Scores to compare the papers with: L1, |gamma|, FPGM, Taylor, random, uniform.

Each returns `dict[layer name -> float tensor [output channels]]` for every convolution
and linear layer but the classifiers, whose outputs are the classes.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.fx
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lib.data import ImageSet, batches_for
from lib.graph import Graph
from lib.graph.leaves import filters_of
from lib.graph.watch import modes_kept
from lib.messages import check_finite

OF_WEIGHTS = ("l1", "bn_scale", "fpgm", "random", "uniform")  # no images needed


def l1(model: nn.Module) -> dict[str, Tensor]:
    """L1 norm of each filter, the sum of its absolute weights (Li et al. 2017, eq. 1).

    Larger filters have larger norms: fit to rank within a layer, not between layers.

    Step by step in notebooks/03_criteria.ipynb.
    """
    return _checked({name: w.abs().sum(1) for name, w in _list_filters(model).items()})


def bn_scale(model: nn.Module, *, graph: Graph | None = None) -> dict[str, Tensor]:
    """|gamma| of the BatchNorm behind each convolution (Liu et al. 2017, Slimming).

    A BatchNorm that does not follow directly upon a convolution (DenseNet's), or not
    upon it alone, scores nothing. The pairs are those of `graph`
    (`build_graph(model, input_shape)`), or without one what torch.fx finds. Raises
    `ValueError` where there is no pair, or where torch.fx cannot trace the forward.
    """
    modules = dict(model.named_modules())
    scores = {}
    for name, norm in (graph.pairs if graph else _find_pairs(model)).items():
        gamma = modules[norm].weight
        if isinstance(modules[name], _ConvNd) and gamma is not None:
            scores[name] = gamma.detach().abs()
    if not scores:
        raise ValueError("no convolution with a BatchNorm behind it; use another score")
    return _checked(scores)


def _list_filters(model: nn.Module) -> dict[str, Tensor]:
    """The filters of each layer as rows [output channels, weights of one]."""
    layers = prunable_layers(model)
    return {name: filters_of(m).detach().flatten(1) for name, m in layers.items()}


def _checked(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scores; ValueError that names the layer where one is NaN or infinite."""
    check_finite("the score", scores)
    return scores


def trace_with_fx(model: nn.Module, advice: str = "") -> torch.fx.GraphModule:
    """The network as a graph of its steps; ValueError where fx cannot follow it."""
    try:
        return torch.fx.symbolic_trace(model)
    except Exception as error:  # fx raises many kinds; none of them means damage
        raise ValueError(
            f"the forward of {type(model).__name__} cannot be traced by torch.fx "
            f"({error}){advice}"
        ) from error


def _find_pairs(model: nn.Module) -> dict[str, str]:
    """Each module with the BatchNorm that alone reads it, in every call."""
    # By torch.fx, as a dry run needs the images' shape, which a score of weights lacks.
    nodes = trace_with_fx(model, "; give `graph`, or use another score").graph.nodes
    modules = dict(model.named_modules())
    calls = [node for node in nodes if node.op == "call_module"]
    norms = {node for node in calls if isinstance(modules[node.target], _BatchNorm)}
    read_by: dict[str, set] = defaultdict(set)
    for node in calls:
        alone = len(node.users) == 1 and node.users.keys() <= norms
        read_by[node.target].add(next(iter(node.users)).target if alone else None)
    alone = {name: found for name, found in read_by.items() if len(found) == 1}
    return {name: norm for name, (norm,) in alone.items() if norm is not None}


def fpgm(model: nn.Module) -> dict[str, Tensor]:
    """Sum of the distances of each filter to the others of its layer (He et al. 2019).

    A filter near the geometric median of its layer can be made of the others: low.

    Step by step in notebooks/03_criteria.ipynb.
    """
    filters = _list_filters(model).items()
    return _checked({name: torch.cdist(w, w).sum(1) for name, w in filters})


def taylor(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    batch_size: int = 100,
    seed: int = 0,
    graph: Graph | None = None,
) -> dict[str, Tensor]:
    """First-order estimate of the loss that a channel's absence costs, squared.

    Molchanov et al. 2019, eq. 8: `(sum of g w)^2` with the gradient g of the loss, over
    scale and shift of the BatchNorm that reads the layer alone, else over its own
    filter and bias; summed over batches of `num_images` images (stratified, fixed by
    `seed`). In evaluation mode: through the statistics of a batch the filter in front
    of a BatchNorm would get no gradient along itself. float32 [channels], `graph` as in
    `bn_scale`. ValueError: `num_images` or `batch_size` out of range.
    """
    parameters = dict(model.named_parameters())
    norms = graph.pairs if graph else _find_pairs(model)
    layers = prunable_layers(model)
    gates, scores = {}, {}
    for name, layer in layers.items():
        scores[name] = torch.zeros(len(filters_of(layer)))
        reader = norms.get(name, name)
        reader = reader if f"{reader}.weight" in parameters else name
        names = (f"{reader}.weight", f"{reader}.bias")
        gates[name] = [p for p in names if p in parameters]
    own = {p: parameters[p].detach() for found in gates.values() for p in found}
    own = {p: value.requires_grad_() for p, value in own.items()}
    sample = images.take(min(num_images, len(images)), seed)
    with modes_kept(model), torch.enable_grad():
        model.eval()
        for x, y in batches_for(model, sample, batch_size):
            output = torch.func.functional_call(model, own, x)
            output = output[0] if isinstance(output, tuple) else output
            loss = F.cross_entropy(output, y)
            grads = torch.autograd.grad(loss, [*own.values()], materialize_grads=True)
            pairs = zip(own.items(), grads, strict=True)
            moved = {p: value.detach() * grad for (p, value), grad in pairs}
            for name, found in gates.items():
                sums = (_sum_rows(moved[p], layers[name]) for p in found)
                scores[name] += sum(sums).square().float().cpu()
    return _checked(scores)


def _sum_rows(product: Tensor, layer: _ConvNd | nn.Linear) -> Tensor:
    """Over each filter of the layer; a vector has one number a channel as it is."""
    return filters_of(layer, product).flatten(1).sum(1) if product.ndim > 1 else product


def random(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Uniform random scores in [0, 1), from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    filters = _list_filters(model).items()
    return {name: torch.rand(len(w), generator=generator) for name, w in filters}


def uniform(model: nn.Module) -> dict[str, Tensor]:
    """Equal scores: a plan then removes the first channels of each layer."""
    return {name: torch.ones(len(w)) for name, w in _list_filters(model).items()}


def rank_agreement(
    scores: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, float]:
    """Spearman's rank correlation of two sets of scores, layer by layer.

    0 where either is constant: it says nothing about order.
    """
    found = {}
    for name, worth in truth.items():
        constant = min(len(scores[name].unique()), len(worth.unique())) < 2
        pair = scores[name].double().cpu(), worth.cpu()
        found[name] = 0.0 if constant else float(spearmanr(*pair).statistic)
    return found


def prunable_layers(model: nn.Module) -> dict[str, _ConvNd | nn.Linear]:
    """Convolutions and linear layers that run, but the classifiers.

    A classifier is a layer whose output reaches the network's without passing another
    one, in evaluation or in training (an auxiliary head). torch.fx sees that; where it
    cannot follow the forward, it is the layer that was registered last, and any linear
    layer that ends its parent module with as many outputs.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer")
    try:
        run, heads = _follow(model, layers)
    except Exception:  # fx raises many kinds; none of them means damage
        run, heads = set(layers), _guess_heads(layers)
    return {n: m for n, m in layers.items() if n in run and n not in heads}


class _Tracer(torch.fx.Tracer):
    """Layers stay whole, also those of classes of one's own."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Is `module` a step of its own?"""
        layer = isinstance(module, (_ConvNd, nn.Linear))
        return layer or super().is_leaf_module(module, name)


def _follow(model: nn.Module, layers: Mapping) -> tuple[set[str], set[str]]:
    """The layers that run, and those that nothing but the output reads."""
    run: set[str] = set()
    heads: set[str] = set()
    with modes_kept(model):
        for training in (False, True):
            if training and run >= layers.keys():
                break
            graph = _Tracer().trace(model.train(training))
            owners = {n: _find_owner(n, layers) for n in graph.nodes}
            run |= _find_reached(graph, layers)
            waiting = [n for n in graph.nodes if n.op == "output"]
            seen = set(waiting)
            while waiting:
                node = waiting.pop()
                owner = owners[node]
                if owner is not None:
                    heads.add(owner)
                    continue
                waiting += [n for n in node.all_input_nodes if n not in seen]
                seen.update(node.all_input_nodes)
    return run, heads


def _find_reached(graph: torch.fx.Graph, layers: Mapping) -> set[str]:
    """The layers that are called, or lie in a module that is, or give a tensor."""
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    fetched = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    within = {path.rpartition(".")[0] for path in fetched} | called
    return {
        name
        for name in layers
        if within & {name, *itertools.accumulate(name.split("."), "{}.{}".format)}
    }


def _find_owner(node: torch.fx.Node, layers: Mapping) -> str | None:
    """The layer that a step is, as a module or as a function of its tensors."""
    if node.op == "call_module":
        return str(node.target) if node.target in layers else None
    fetched = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    owners = (target.rpartition(".")[0] for target in fetched)
    return next((owner for owner in owners if owner in layers), None)


def _guess_heads(layers: Mapping) -> set[str]:
    last = next(reversed(layers))
    classes = layers[last].weight.shape[0]
    ends = {name.rpartition(".")[0]: name for name in layers}
    return {last} | {
        name
        for name in ends.values()
        if isinstance(layers[name], nn.Linear) and layers[name].out_features == classes
    }
