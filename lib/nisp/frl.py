"""The final response layer (FRL): which it is, what it answers, how it is ranked.

NISP measures importance once, on what the classifier reads; `propagate` hands it on.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lib.data import ImageSet, batches
from lib.graph import Graph, build_graph
from lib.graph.watch import dtype_of, modes_kept
from lib.nisp.inf_fs import inf_fs
from lib.plan.record import nearest_name

RANKINGS = ("inf_fs", "magnitude", "uniform")


def score_frl(
    model: nn.Module,
    images: ImageSet,
    by: str = "inf_fs",
    *,
    alpha: float = 0.5,
    frl: str | None = None,
    num_images: int = 2000,
    seed: int = 0,
) -> Tensor:
    """Importance of each final response, float64 [D], >= 0, on the model's device.

    by "inf_fs": Inf-FS on the responses to `num_images` images (`collect_responses`,
    `inf_fs` with `alpha`). "magnitude": the absolute weights with which the classifier
    reads the response, summed over classes. "uniform": all ones. Only the first looks
    at images. Source: Yu et al. 2018, sec. 3 and 4 (NISP-FS and NISP-Mag).
    """
    if by not in RANKINGS:
        raise ValueError(f"by must be one of {RANKINGS}, got {by!r}")
    if by == "inf_fs":
        features = collect_responses(
            model, images, frl=frl, num_images=num_images, seed=seed
        )
        return inf_fs(features, alpha=alpha)
    graph, modules = build_graph(model, images.shape), dict(model.named_modules())
    if by == "uniform":
        shape = graph.values[find_frl(graph, modules, frl)].shape[1:]
        weight = next(model.parameters())
        size = math.prod(shape)
        return torch.ones(size, dtype=torch.float64, device=weight.device)
    if frl is not None:
        raise ValueError(
            "by='magnitude' ranks what the classifier reads; leave `frl` out"
        )
    classifier = modules[find_classifier(graph, modules)]
    return classifier.weight.detach().double().abs().sum(0)


def collect_responses(
    model: nn.Module,
    images: ImageSet,
    *,
    frl: str | None = None,
    num_images: int = 2000,
    seed: int = 0,
    batch_size: int = 500,
) -> Tensor:
    """Responses of the FRL to images: [N, D] on the model's device, in one pass.

    The FRL is what the last linear layer reads (behind its activation), or with `frl`
    what the module of that name makes, flattened. N = `num_images` images, stratified
    and fixed by `seed`, or all where there are fewer; unaugmented, in evaluation mode.
    The model is left as found. Raises `ValueError` for an FRL that cannot be found or
    that does not hold one row per image, and for fewer than 2 images.
    """
    modules = dict(model.named_modules())
    graph = build_graph(model, images.shape)
    find_frl(graph, modules, frl)  # refuses what cannot be found
    rows: list[Tensor] = []

    def keep_input(module: nn.Module, inputs: tuple) -> None:
        rows.append(inputs[0])

    def keep_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows.append(output)

    if frl is None:
        reader = modules[find_classifier(graph, modules)]
        hook = reader.register_forward_pre_hook(keep_input)
    else:
        hook = modules[frl].register_forward_hook(keep_output)
    found: list[Tensor] = []

    def keep_last(x: Tensor) -> None:
        if rows[-1].shape[0] != len(x):
            raise ValueError(
                "the final response layer does not hold one row per image; name "
                "another with `frl`"
            )
        found.append(rows[-1].flatten(1).clone())
        rows.clear()

    try:
        stream(model, images, keep_last, num_images, seed, batch_size)
    finally:
        hook.remove()
    return torch.cat(found)


def stream(
    model: nn.Module,
    images: ImageSet,
    after: Callable[[Tensor], None],
    num_images: int,
    seed: int,
    batch_size: int = 500,
) -> None:
    """Run images through the model in evaluation; `after` is called behind each batch.

    `num_images` stratified images fixed by `seed`, or all where there are fewer.
    """
    if num_images < 2:
        raise ValueError(f"num_images must be at least 2 to rank by, got {num_images}")
    if num_images < len(images):
        images = images.take(num_images, seed)
    device = next(model.parameters()).device
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for x, _ in batches(images, batch_size, device=device, dtype=dtype_of(model)):
            model(x)
            after(x)


def stream_layers(
    model: nn.Module,
    names: Iterable[str],
    images: ImageSet,
    record: Callable[[str, Tensor], None],
    after: Callable[[Tensor], None],
    **sample,
) -> None:
    """`stream`, with `record(name, output)` at every call of the layers named."""
    modules = dict(model.named_modules())

    def make_hook(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            record(name, output)

        return hook

    hooks = [modules[name].register_forward_hook(make_hook(name)) for name in names]
    try:
        stream(model, images, after, **sample)
    finally:
        for hook in hooks:
            hook.remove()


# -- where it is -------------------------------------------------------------------


def find_classifier(graph: Graph, modules: Mapping[str, nn.Module]) -> str:
    """Name of the last linear layer that runs."""
    linear = [n for n in graph.nodes
              if n.inputs and isinstance(modules[n.module], nn.Linear)]  # fmt: skip
    if linear:
        return linear[-1].module
    raise ValueError(
        "the network has no linear layer, so its final response layer must be "
        "named: frl='...', a module whose output it is"
    )


def find_frl(graph: Graph, modules: Mapping[str, nn.Module], frl: str | None) -> int:
    """The value that the last linear layer reads, or that the module `frl` makes."""
    if frl is None:
        name = find_classifier(graph, modules)
        return [n.inputs[0] for n in graph.nodes if n.module == name and n.inputs][-1]
    if frl not in modules:
        raise ValueError(
            f"frl: the network has no module '{frl}'{nearest_name(frl, modules)}"
        )
    if frl in graph.calls:
        return graph.calls[frl][1]
    made = [node.outputs[0] for node in graph.nodes if node.outputs
            and f"{node.module}.".startswith(f"{frl}.")]  # fmt: skip
    if made:
        return made[-1]
    raise ValueError(f"frl: '{frl}' makes nothing in evaluation; name another module")
