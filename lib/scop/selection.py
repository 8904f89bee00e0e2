"""Selection: how much each channel relies on the image rather than on its control.

A batch of images and a batch of their controls go through the network together.
Between each convolution and its BatchNorm the features of the two are mixed, channel
by channel,

    A'  = beta * A + beta~ * A~,      beta + beta~ = 1,      A~' = A~,

and only `beta` is trained, by the loss on the images. Where `beta` falls below a half,
the network does better with the control's response than with the image's: the channel
does not carry what the label needs (Tang et al. 2020, sec. 3; order of mixing and
normalising from the official code).
"""

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib import baselines, stages, train
from lib.data import ImageSet
from lib.graph import Graph, build_graph
from lib.kernels import mix_norm_relu
from lib.messages import check_finite
from lib.scop.controls import build_control
from lib.scop.controls.base import Control
from lib.scop.layers import block_layers, find_pairs

OFFICIAL = train.Recipe(20, lr=0.004, batch_size=512)  # for ImageNet
METHOD: dict[str, Any] = {
    "optimizer": "adam", "adam_betas": (0.5, 0.9), "schedule": "constant",
    "weight_decay": 0.0,
}  # fmt: skip
ADVICE = "; lower lr or look at the control's images"


class Betas(dict[str, Tensor]):
    """`beta` per layer (float32 [channels], in [0, 1]) and how it came about.

    `history`: a row per epoch, see `_describe`, with the loss and top1 of the mixed
    network. `norms`: the BatchNorm of each layer. A plain dict of the same tensors has
    the same importance.
    """

    def __init__(self, values=(), *, history=(), norms=None):
        super().__init__(values)
        self.history: list[dict] = list(history)
        self.norms: dict[str, str] = dict(norms or {})


def select(
    model: nn.Module,
    images: ImageSet,
    control: Control,
    *,
    recipe: train.Recipe | None = None,
    layers: list[str] | None = None,
    graph: Graph | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    label: str | None = None,
    **settings,
) -> Betas:
    """Learn `beta` for the channels of `layers` (default: those in residual blocks).

    Adam (betas .5, .9) at a constant rate, no weight decay, projected to [0, 1] after
    each step, from 1/2; a batch of images and as many controls a step. `METHOD` takes
    the place of what a `recipe` says of these; the rest is that of the recipe, or of
    `settings`, the fields of one, beside `OFFICIAL`. A copy is trained; `model` is left
    bit-identical. `graph`: of `model` at the images' size, if known. `checkpoint`,
    `device`: as in `train.fit`. Several processes of a recipe mix, normalise and
    shuffle each within its part of the batch, so their betas are not quite those of one
    process.

    ValueError, naming the layer: no BatchNorm of its own, a beta that is not finite; a
    control of another shape; a setting that is not as in `METHOD`.

    Step by step in notebooks/11_scop_selection.ipynb.
    """
    for name, value in METHOD.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name} of a selection is {value!r}, got {settings[name]!r}"
            )
    recipe = replace(recipe or OFFICIAL, **(settings | METHOD))
    norms = _pick_layers(model, images.shape, layers, graph)
    mixed = MixedNet(model, control, norms)
    try:
        history = train.fit(
            mixed, images, recipe=recipe, checkpoint=checkpoint, device=device,
            label=label or f"beta, control {control.name}", watch=_describe,
        )  # fmt: skip
    finally:  # names the layer, also where the loss was the first to show it
        betas = mixed.read_betas()
        check_finite("beta", betas, ADVICE)
    return Betas(betas, history=history.rows, norms=norms)


def learn_betas(
    base: stages.Base,
    control: str,
    *,
    recipe: train.Recipe,
    num_images: int = 0,
    control_epochs: int = 0,
) -> Betas:
    """Build the control named `control`, then select with it; both kept in the profile.

    The control is trained once, on all training images with seed 0, as the paper makes
    its knockoffs once, for `control_epochs` (0: the arm's default). The selection goes
    by `recipe`, on `num_images` (stratified, 0: all). What is found in the folder of
    the profile is used, and said.
    """
    folder, images = stages.profile_folder(base.run), base.sets.train
    arm = build_control(
        control, images, epochs=control_epochs or None,
        folder=folder / "controls", processes=recipe.processes,
    )  # fmt: skip
    if num_images:
        images = images.take(min(num_images, len(images)), recipe.seed)
    # what `METHOD` replaces makes no other file
    usual: dict[str, Any] = {
        f.name: f.default for f in fields(recipe) if f.name in METHOD
    }
    tag = replace(recipe, **usual).tag
    name = f"{images.name}-{len(images)}images-{base.net}-{control}-{tag}.pt"
    return select(
        base.model, images, arm, recipe=recipe, graph=base.graph,
        checkpoint=folder / "betas" / name,
        label=f"beta, {control}, seed {recipe.seed}",
    )  # fmt: skip


def importance(model: nn.Module, betas: dict[str, Tensor]) -> dict[str, Tensor]:
    """`I = |gamma| (beta - beta~)`, float32 [channels] per layer (Tang et al. 2020).

    gamma is the scale of the BatchNorm behind the layer. ValueError, naming the layer:
    betas that are not finite, leave [0, 1] or are not as many as its channels.

    Step by step in notebooks/11_scop_selection.ipynb.
    """
    check_finite("beta", betas, ADVICE)
    scores = {}
    for name, gamma in read_scales(model, betas).items():
        beta = betas[name].detach().to("cpu", torch.float32)
        if beta.shape != gamma.shape:
            raise ValueError(
                f"beta of '{name}' has shape {list(beta.shape)}, the layer has "
                f"{len(gamma)} channels"
            )
        if bool((beta < 0).any() or (beta > 1).any()):
            raise ValueError(f"beta of '{name}' leaves [0, 1]")
        scores[name] = gamma * (2 * beta - 1)
    return scores


def read_scales(model: nn.Module, betas: dict[str, Tensor]) -> dict[str, Tensor]:
    """|gamma| of the BatchNorm behind each layer of `betas`, float32 on the CPU.

    Which BatchNorm that is, betas of `select` know; for others the model is traced.
    """
    norms, known = getattr(betas, "norms", {}), dict(model.named_modules())
    found = {n: getattr(known.get(norms.get(n)), "weight", None) for n in betas}
    if any(scale is None for scale in found.values()):
        traced = baselines.bn_scale(model)
        found = {n: traced.get(n, scale) for n, scale in found.items()}
    for name, scale in found.items():
        if scale is None:
            raise ValueError(f"'{name}' has no BatchNorm with a scale behind it")
    scales = {n: s.detach().abs().to("cpu", torch.float32) for n, s in found.items()}
    check_finite("the scale", scales)
    return scales


# -- the network while betas are learnt ----------------------------------------------


class MixedNet(nn.Module):
    """A copy of `model` that is trained on `beta` alone: images in, their logits out.

    norms: the BatchNorm of each layer to select in.
    """

    def __init__(self, model: nn.Module, control: Control, norms: dict[str, str]):
        super().__init__()
        self.net = copy.deepcopy(model).requires_grad_(False)
        # In a tuple, for a submodule would be trained and saved with the rest. Its
        # digest is saved instead: it is part of the starting state, by which `fit`
        # tells a checkpoint that was made with another control.
        self._control, self.norms = (control,), dict(norms)
        digest = torch.tensor(list(bytes.fromhex(control.digest())), dtype=torch.uint8)
        self.register_buffer("control_digest", digest)
        kind = MixedNorm if control.paired else GatedNorm
        for norm in norms.values():
            _put_around(self.net, norm, kind(self.net.get_submodule(norm)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the images x [B, C, H, W] when mixed with controls."""
        # One pass for both halves: an image is mixed with one and the same control in
        # every layer, and BatchNorms take one set of statistics of both.
        (control,) = self._control
        output = self.net(torch.cat([x, control.sample(x)]) if control.paired else x)
        if isinstance(output, tuple):  # auxiliary heads
            output = output[0]
        return output[: len(x)]

    def mixers(self) -> dict[str, "MixedNorm"]:
        """What stands in the place of the BatchNorm of each layer."""
        return {n: self.net.get_submodule(norm) for n, norm in self.norms.items()}

    def read_betas(self) -> dict[str, Tensor]:
        """`beta` of each layer, projected, on the CPU."""
        return {n: m.read_beta().float().cpu() for n, m in self.mixers().items()}


class MixedNorm(nn.Module):
    """A BatchNorm that mixes the halves of its batch by `beta` before it normalises."""

    start = 0.5

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.share = nn.Parameter(torch.full_like(norm.weight, self.start))

    def forward(self, x: Tensor) -> Tensor:
        """[2B, C, ...] to the same: the mixed images' half, then the control's."""
        if not self.training:
            return self.norm(x)
        # The projection onto beta + beta~ = 1, beta >= 0 that belongs to the step
        # before: made here, `train.fit` need not know of it. What the last step leaves
        # is projected by `read_beta`.
        with torch.no_grad():
            self.share.clamp_(0, 1)
        return self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        """What is done in training."""
        # The kernel could also do the ReLU behind it, but that is a module of the
        # network and would be done again, which costs more than the pass it saves.
        norm = self.norm
        return mix_norm_relu(
            x, self.share, norm.weight, norm.bias, eps=norm.eps, relu=False
        )

    def read_beta(self) -> Tensor:
        """`beta` [C], projected."""
        return self.share.detach().clamp(0, 1)


class GatedNorm(MixedNorm):
    """A BatchNorm with a gate behind it: what is left of the method without a control.

    The gate is `beta - beta~`, so that `I` is `|gamma|` times the gate, and one formula
    serves every arm.
    """

    start = 1.0  # the network as it is

    def mix(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same, each channel times its gate."""
        y = self.norm(x)  # first: it would undo a factor before it
        return y * self.share.to(y.dtype).view(1, -1, *[1] * (x.dim() - 2))

    def read_beta(self) -> Tensor:
        """`beta` [C] in [1/2, 1], from the gate `beta - beta~ = 2 beta - 1`."""
        return (1 + super().read_beta()) / 2


def _put_around(net: nn.Module, name: str, outer: MixedNorm) -> None:
    """Put `outer` in the place of the norm inside it, under all names that this has."""
    inner = net.get_submodule(name)
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if module is inner:
            net.set_submodule(path, outer)


def _describe(mixed: MixedNet) -> dict[str, float]:
    """The betas in a few numbers, for the row of an epoch; see `correlate_ranks`."""
    betas, mixers = mixed.read_betas(), mixed.mixers()
    scales = {n: m.norm.weight.abs().float().cpu() for n, m in mixers.items()}
    every = torch.cat(list(betas.values()))
    return {
        "beta_mean": float(every.mean()),
        "beta_sd": float(every.std()),
        "below_half": float((every < 0.5).float().mean()),
        "rank_with_gamma": correlate_ranks(betas, scales),
    }


def correlate_ranks(betas: dict[str, Tensor], scales: dict[str, Tensor]) -> float:
    """Mean Spearman correlation over layers of the statistic with |gamma|.

    1: the control decides nothing, |gamma| alone would prune the same. A layer in which
    either of the two is constant counts 0.
    """
    statistics = {name: scales[name] * (2 * beta - 1) for name, beta in betas.items()}
    found = baselines.rank_agreement(statistics, {name: scales[name] for name in betas})
    return sum(found.values()) / max(len(found), 1)


def _pick_layers(
    model: nn.Module, shape: tuple, layers: list[str] | None, graph: Graph | None = None
) -> dict[str, str]:
    """The BatchNorm of each layer to select in."""
    graph = graph or build_graph(model, shape)
    pairs = find_pairs(graph, model)
    chosen = block_layers(model, shape, graph=graph) if layers is None else layers
    for name in chosen:
        if name not in pairs:
            raise ValueError(
                f"layers: '{name}' is not a convolution that a BatchNorm with a scale "
                "alone reads; SCOP mixes between the two"
            )
    if not chosen:
        raise ValueError("layers: nothing to select in")
    return {name: pairs[name] for name in chosen}
