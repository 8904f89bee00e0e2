"""What NISP is compared with: other final rankings, and layers ranked on their own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib import baselines
from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.messages import check_choice
from lib.nisp.activity import collect_channels, measure_activity
from lib.nisp.frl import score_frl
from lib.nisp.infinite import inf_fs
from lib.nisp.propagation import propagate

FRL_RANKINGS = {
    "nisp": "inf_fs",
    "nisp-norm": "inf_fs",
    "nisp-sharp": "inf_fs",
    "nisp-mag": "magnitude",
    "nisp-uniform": "uniform",
}
METHODS = (*FRL_RANKINGS, "layerwise", "l1", "bn_scale", "random")


def score_layers(
    method: str,
    model: nn.Module,
    images: ImageSet,
    *,
    joint: float | Mapping[str, float] | None = None,
    alpha: float = 0.5,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> dict[str, Tensor]:
    """Channel scores by one of `METHODS`, for every layer that can be pruned.

    "nisp": Inf-FS on the final responses, propagated; "nisp-norm": the same read behind
    the BatchNorm of each layer instead of in front; "nisp-sharp": those scores times
    the size of each neuron's output (`measure_activity`), the bound that NISP's closed
    form loosens, not a method of the paper; "nisp-mag", "nisp-uniform": the plain
    propagation of other final scores (`score_frl`); "layerwise": Inf-FS in every layer
    by itself; "l1", "bn_scale", "random": `lib.baselines`.

    `joint` (only for those propagated): rates of pruning while propagating, see
    `propagate`. `graph` is that of `build_graph(model, images.shape)`. Raises
    `ValueError` for an unknown method.
    """
    check_choice("method", method, METHODS)
    graph = graph or build_graph(model, images.shape)
    options = {"num_images": num_images, "seed": seed, "graph": graph}
    if method in FRL_RANKINGS:
        final = score_frl(model, images, FRL_RANKINGS[method], alpha=alpha, **options)
        sharp = method == "nisp-sharp"
        scores = propagate(
            model, final, images.shape, joint=joint, graph=graph,
            behind_norm=method == "nisp-norm",
            activity=measure_activity(model, images, **options) if sharp else None,
        )  # fmt: skip
    elif method == "layerwise":
        scores = rank_layerwise(model, images, alpha=alpha, **options)
    elif method == "random":
        scores = baselines.random(model, seed)
    else:
        scores = getattr(baselines, method)(model)
    free = {n for n in graph.layers if not graph.group_of[n].fixed}
    return {name: values for name, values in scores.items() if name in free}


def rank_layerwise(
    model: nn.Module, images: ImageSet, *, alpha: float = 0.5, **options
) -> dict[str, Tensor]:
    """Inf-FS on the responses of each layer by itself, float64 [channels].

    The layers are those of `baselines.prunable_layers` that run; one in which every
    channel is constant scores zero. Nothing is propagated: what a later layer makes of
    a channel has no part. `options` are those of `collect_channels`. Source: the
    layer-by-layer comparison of Yu et al. 2018, sec. 4.

    Step by step in notebooks/22_nisp_pruning.ipynb.
    """
    scores = {}
    for name, values in collect_channels(model, images, **options).items():
        still = bool((values == values[0]).all())
        flat = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        scores[name] = flat if still else inf_fs(values, alpha=alpha)
    return scores
