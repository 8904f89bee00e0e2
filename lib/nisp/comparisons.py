"""What NISP is compared with, and how far pruning moves the final responses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib import baselines
from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.messages import check_choice
from lib.nisp.activity import collect_channels, measure_activity
from lib.nisp.frl import collect_responses, find_classifier, score_frl
from lib.nisp.infinite import inf_fs
from lib.nisp.propagation import propagate
from lib.plan import Plan
from lib.plan.resolving import resolve
from lib.settings import CHW

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
    `propagate`. `graph`: that of `build_graph(model, images.shape)`, if known.
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
    elif method == "bn_scale":
        scores = baselines.bn_scale(model, graph=graph)
    else:
        scores = baselines.l1(model)
    free = {n for n in graph.layers if not graph.group_of[n].fixed}
    return {name: values for name, values in scores.items() if name in free}


def rank_layerwise(
    model: nn.Module, images: ImageSet, *, alpha: float = 0.5, **options
) -> dict[str, Tensor]:
    """Inf-FS on the responses of each layer by itself, float64 [channels].

    The layers are those of `baselines.prunable_layers` that run; one in which every
    channel is constant scores zero. What a later layer makes of a channel has no part.
    `options`: of `collect_channels`. Source: Yu et al. 2018, sec. 4.

    Step by step in notebooks/22_nisp_pruning.ipynb.
    """
    scores = {}
    for name, values in collect_channels(model, images, **options).items():
        still = bool((values == values[0]).all())
        flat = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        scores[name] = flat if still else inf_fs(values, alpha=alpha)
    return scores


# -- errors before any fine-tuning -----------------------------------------------------


def measure_errors(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    images: ImageSet,
    scores: Tensor,
    *,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> dict[str, float]:
    """Errors of the final responses that `plan` keeps, between `model` and `small`.

    `small` is the network shrunk by `plan`; `scores` [D] are the importances s of all D
    final responses, scaled here to mean 1 over those kept; `graph` is that of `model`.
    With y a response of `model`, d what it differs by in `small`, and N kept responses:

    "ware": mean of s |d| / |y| over the pairs with |y| above a hundredth of its mean
    (a response of zero, common behind a ReLU, has no relative error); "share_counted"
    is their share. "weighted": sum of s |d| / sum of s |y|, which needs no such rule.
    "mae": mean of |d|, in units of the responses. "retained": N.

    Compare methods at equal retained responses and equal scores: a network whose
    responses collapse to zero has a "ware" of only 1. `ValueError` where sizes do not
    fit. Source: WARE, Yu et al. 2018, sec. 4; its treatment of zeros is ours.
    """
    graph = graph or build_graph(model, images.shape)
    kept = find_retained(model, plan, images.shape, graph=graph)
    if scores.shape != kept.shape:
        raise ValueError(
            f"scores: the final response layer has {len(kept)} responses, got scores "
            f"of shape {tuple(scores.shape)}"
        )
    options = {"num_images": num_images, "seed": seed}
    y = collect_responses(model, images, graph=graph, **options).double()
    y = y[:, kept.to(y.device)]
    there = collect_responses(small, images, **options).double()
    if there.shape != y.shape:
        raise ValueError(
            f"small: has {there.shape[1]} final responses where the plan keeps "
            f"{y.shape[1]}; shrink the same model by the same plan"
        )
    s = scores.double()[kept.to(scores.device)]
    if not bool((s > 0).any()):
        raise ValueError("scores: all responses kept have importance zero")
    return describe(y.cpu(), there.cpu(), (s / s.mean()).cpu())


def describe(y: Tensor, there: Tensor, s: Tensor) -> dict[str, float]:
    """The errors of `measure_errors` from responses [M, N] and scores [N]."""
    moved, size = (there - y).abs(), y.abs()
    counted = size > 0.01 * size.mean()  # nearer to zero there is no relative error
    ratio = torch.where(counted, s * moved / size.where(counted, 1.0), 0.0)
    return {
        "ware": float(ratio.sum() / counted.sum().clamp_min(1)),
        "share_counted": float(counted.double().mean()),
        "weighted": float((s * moved).sum() / (s * size).sum()),
        "mae": float(moved.mean()),
        "retained": y.shape[1],
    }


def find_retained(
    model: nn.Module, plan: Plan, input_shape: CHW, *, graph: Graph | None = None
) -> Tensor:
    """Which of the D responses that the classifier reads a plan keeps, bool [D]."""
    graph = graph or build_graph(model, input_shape)
    read = graph.layers[find_classifier(graph, model)].inputs
    return resolve(graph, plan, model).units[graph.unit_of(read)]
