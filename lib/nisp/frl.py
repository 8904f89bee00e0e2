"""The final response layer (FRL): which it is, what it answers, how it is ranked.

NISP measures importance once, on what the classifier reads; `propagate` hands it on.
"""

import torch
from torch import Tensor, nn

from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.messages import check_choice
from lib.nisp.infinite import inf_fs
from lib.settings import check_int
from lib.train import watch

NO_ROW = "does not read one row per image"


def score_frl(
    model: nn.Module,
    images: ImageSet,
    by: str = "inf_fs",
    *,
    alpha: float = 0.5,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> Tensor:
    """Importance of each final response, float64 [D], >= 0, on the model's device.

    by "inf_fs": Inf-FS on the responses of `collect_responses`. "magnitude": the
    absolute weights with which the classifier reads the response, summed over classes.
    "uniform": all ones. Source: Yu et al. 2018, sec. 3 and 4 (NISP-FS and NISP-Mag).
    """
    check_choice("by", by, ("inf_fs", "magnitude", "uniform"))
    graph = graph or build_graph(model, images.shape)
    if by == "inf_fs":
        features = collect_responses(
            model, images, num_images=num_images, seed=seed, graph=graph
        )
        return inf_fs(features, alpha=alpha)
    weight = model.get_submodule(find_classifier(graph, model)).weight.detach().double()
    weight = weight.flatten(1)  # [classes, D], of a 1 x 1 convolution too
    return weight.abs().sum(0) if by == "magnitude" else torch.ones_like(weight[0])


def collect_responses(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    graph: Graph | None = None,
) -> Tensor:
    """Responses of the FRL to images: [N, D] on the model's device, in one pass.

    The FRL is what the classifier reads: the row of a linear layer, flattened, or the
    channels of a 1 x 1 convolution, averaged over positions, as SqueezeNet averages its
    classes. N = `num_images` images, stratified and fixed by `seed`, or all where there
    are fewer; unaugmented, in evaluation mode. `ValueError`: an FRL that cannot be
    found or does not hold one row per image, fewer than 2 images.
    """
    name = find_classifier(graph or build_graph(model, images.shape), model)
    sample, found = take_sample(images, num_images, seed), []

    def copy(name: str, response: Tensor) -> Tensor:
        found = pool(model.get_submodule(name), response)
        return found.clone()  # what comes next may work in place

    for calls, labels in watch(model, sample, [name], inputs=True, keep=copy):
        if not calls[name] or len(calls[name][-1]) != len(labels):
            raise ValueError(f"'{name}', the last layer, {NO_ROW}")
        found.append(calls[name][-1].flatten(1))
    return torch.cat(found)


def take_sample(images: ImageSet, num_images: int, seed: int) -> ImageSet:
    """`num_images` images, stratified and fixed by `seed`, or all there are."""
    num_images = check_int("num_images", num_images, 2)
    return images.take(num_images, seed) if num_images < len(images) else images


# -- where it is -------------------------------------------------------------------


def pool(classifier: nn.Module, read: Tensor) -> Tensor:
    """The final responses in what the classifier reads: [N, D], or as it stands."""
    return read.mean((-2, -1)) if isinstance(classifier, nn.Conv2d) else read


def find_classifier(graph: Graph, model: nn.Module) -> str:
    """Name of the last layer that runs in evaluation: linear, or a 1 x 1 convolution.

    `ValueError` where it is anything else.
    """
    run = [name for name, layer in graph.layers.items() if layer.positions]
    layer = model.get_submodule(run[-1]) if run else None
    if isinstance(layer, nn.Linear):
        return run[-1]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        if layer.kernel_size == (1, 1):
            return run[-1]
    found = f"'{run[-1]}', {layer}" if run else "none"
    raise ValueError(
        "the final responses are what the last layer reads, if it is linear or a "
        f"1 x 1 convolution; here it is {found}: end the network in an nn.Linear"
    )
