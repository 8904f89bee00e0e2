"""What NISP is compared with: other final rankings, and layers ranked on their own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib import baselines
from lib.data import ImageSet
from lib.graph import build_graph
from lib.nisp.activity import measure_activity, undo_norms
from lib.nisp.chains import find_chain, replay
from lib.nisp.frl import score_frl, stream_layers
from lib.nisp.inf_fs import inf_fs
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
) -> dict[str, Tensor]:
    """Channel scores by one of `METHODS`, for every layer that can be pruned.

    "nisp": Inf-FS on the final responses, propagated; "nisp-norm": the same read behind
    the BatchNorm of each layer instead of in front (`undo_norms`); "nisp-sharp": those
    scores times the size of each neuron's output (`measure_activity`), the bound that
    NISP's closed form loosens, not a method of the paper; "nisp-mag", "nisp-uniform":
    the plain propagation of other final scores (`score_frl`); "layerwise": Inf-FS in
    every layer by itself; "l1", "bn_scale", "random": `lib.baselines`.

    `joint` (only for those propagated): rates of pruning while propagating, see
    `propagate`. Raises `ValueError` for an unknown method.
    """
    if method in FRL_RANKINGS:
        final = score_frl(
            model, images, FRL_RANKINGS[method], alpha=alpha, num_images=num_images,
            seed=seed,
        )  # fmt: skip
        sizes = None
        if method == "nisp-sharp":
            sizes = measure_activity(model, images, num_images=num_images, seed=seed)
        elif method == "nisp-norm":
            sizes = undo_norms(model, images.shape)
        scores = propagate(model, final, images.shape, joint=joint, activity=sizes)
    elif method == "layerwise":
        scores = rank_layerwise(
            model, images, alpha=alpha, num_images=num_images, seed=seed
        )
    elif method == "random":
        scores = baselines.random(model, seed)
    elif method in METHODS:
        scores = getattr(baselines, method)(model)
    else:
        raise ValueError(f"unknown method {method!r}, expected one of {METHODS}")
    graph = build_graph(model, images.shape)
    free = {n for n in graph.layers if not graph.group_of[n].fixed}
    return {name: values for name, values in scores.items() if name in free}


def rank_layerwise(
    model: nn.Module,
    images: ImageSet,
    *,
    alpha: float = 0.5,
    num_images: int = 2000,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inf-FS on the responses of each layer by itself, float64 [channels].

    The layers are those of `baselines.prunable_layers` that run; one in which every
    channel is constant scores zero. Nothing is propagated: what a later layer makes of
    a channel has no part. Source: the layer-by-layer comparison of Yu et al. 2018,
    sec. 4.
    """
    features = collect_channels(model, images, num_images=num_images, seed=seed)
    scores = {}
    for name, values in features.items():
        still = bool((values == values[0]).all())
        flat = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        scores[name] = flat if still else inf_fs(values, alpha=alpha)
    return scores


def collect_channels(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """Mean response of every channel of every prunable layer, [N, C] each, in one pass.

    The response is the layer's output behind the BatchNorm and the activations that
    alone read it, averaged over positions (and over calls). Images, mode and N as in
    `collect_responses`.
    """
    graph = build_graph(model, images.shape)
    modules = dict(model.named_modules())
    names = [n for n in baselines.prunable_layers(model) if n in graph.layers]
    chains = {name: find_chain(graph, modules, name) for name in names}
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str, output: Tensor) -> None:
        response = replay(chains[name], modules, output)
        calls[name].append(mean_channels(modules[name], response))

    def join_calls(x: Tensor) -> None:
        for name, rows in calls.items():
            found[name].append(torch.stack(rows).mean(0))
            rows.clear()

    stream_layers(
        model, names, images, record, join_calls,
        num_images=num_images, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return {name: torch.cat(rows) for name, rows in found.items()}


def mean_channels(layer: nn.Module, response: Tensor) -> Tensor:
    """Mean over positions, [N, C]."""
    channel_dim = -1 if isinstance(layer, nn.Linear) else 1
    rows = response.movedim(channel_dim, 1)
    return rows.reshape(*rows.shape[:2], -1).mean(2)
