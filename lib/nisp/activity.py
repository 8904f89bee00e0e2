"""How large each neuron's output is: what the closed form's constant C_x leaves out."""

import torch
from torch import Tensor, nn

from lib import baselines
from lib.data import ImageSet
from lib.graph import build_graph
from lib.nisp.frl import stream


def measure_activity(
    model: nn.Module,
    images: ImageSet,
    *,
    num_images: int = 2000,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """Mean |output| of every neuron of every prunable layer, for `propagate`.

    The output is the layer's own, in front of BatchNorm and activation, where
    `propagate` takes its scores. Returns float64 [C, H, W] or [C] on the model's
    device, averaged over `num_images` images (stratified, fixed by `seed`, in
    evaluation mode) and, in a layer that runs more than once, over its calls. Raises
    `ValueError` where those calls differ in shape. Source: the term a_u of the bound in
    Yu et al. 2018, sec. 3, before it is replaced by a constant.
    """
    graph = build_graph(model, images.shape)
    modules = dict(model.named_modules())
    names = [n for n in baselines.prunable_layers(model) if n in graph.layers]
    totals: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    seen = 0

    def make_hook(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            calls[name].append(output.abs().sum(0, dtype=torch.float64))

        return hook

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

    hooks = [modules[name].register_forward_hook(make_hook(name)) for name in names]
    try:
        stream(model, images, add_batch, num_images, seed, batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / seen for name, total in totals.items()}
