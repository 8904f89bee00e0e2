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
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib import baselines, train
from lib.data import ImageSet
from lib.graph import RELUS, Graph, build_graph
from lib.kernels import mix_norm_relu
from lib.scop.controls.base import Control
from lib.scop.layers import block_layers, find_pairs
from lib.train.recipe import pick_device

RELU_CALLS = {
    torch.relu, torch.relu_, nn.functional.relu, Tensor.relu, Tensor.relu_,
}  # fmt: skip


class Betas(dict[str, Tensor]):
    """`beta` per layer (float32 [channels], in [0, 1]) and how it came about.

    `history`: one row per epoch with loss, top1 (of the mixed network, on the images),
    mean and s.d. of beta, the share below a half, the rank correlation of the statistic
    with |gamma| alone. `norms`: the BatchNorm of each layer. `paired`: whether there
    was a control to share with.
    """

    def __init__(self, values=(), *, history=(), norms=None, paired: bool = True):
        super().__init__(values)
        self.history: list[dict] = list(history)
        self.norms: dict[str, str] = dict(norms or {})
        self.paired = paired


def select(
    model: nn.Module,
    images: ImageSet,
    control: Control,
    *,
    epochs: int = 20,
    lr: float = 0.004,
    batch_size: int = 512,
    layers: list[str] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    label: str | None = None,
) -> Betas:
    """Learn `beta` for the channels of `layers` (default: those in residual blocks).

    Adam (betas .5, .9) at a constant `lr`, no weight decay, projected to [0, 1] after
    each step, from 1/2; `batch_size` images and as many controls a step. The defaults
    are those of the official code for ImageNet. `model` is left bit-identical: weights,
    running statistics, modes; the work is done on a copy whose BatchNorms use the
    statistics of the joint batch. `checkpoint`, `device`, `precision`: as in
    `train.fit`.

    Raises `ValueError` for a layer without a BatchNorm, a control of another shape, or
    a beta that is not finite, naming the layer.
    """
    norms = _pick_layers(model, images.shape, layers)
    device = pick_device(device)
    mixed = MixedNet(model, control.to(device), norms, images.shape)
    try:
        history = train.fit(
            mixed, images, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed,
            optimizer="adam", adam_betas=(0.5, 0.9), schedule="constant",
            weight_decay=0.0, checkpoint=checkpoint, device=device,
            precision=precision, label=label or f"beta, control {control.name}",
            watch=_describe,
        )  # fmt: skip
    finally:  # names the layer, also where the loss was the first to show it
        betas = mixed.read_betas()
        _check_finite(betas)
    return Betas(betas, history=history.rows, norms=norms, paired=control.paired)


def importance(model: nn.Module, betas: dict[str, Tensor]) -> dict[str, Tensor]:
    """`I = |gamma| (beta - beta~)`, float32 [channels] per layer (Tang et al. 2020).

    gamma is the scale of the BatchNorm behind the layer, `beta~ = 1 - beta`; for betas
    learnt without a control there is no `beta~`, and `I = |gamma| beta`. Raises
    `ValueError`, naming the layer, for betas that are not finite, leave [0, 1] or have
    another length than the layer has channels.
    """
    _check_finite(betas)
    paired = getattr(betas, "paired", True)
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
        scores[name] = gamma * (2 * beta - 1 if paired else beta)
    return scores


def read_scales(model: nn.Module, betas: dict[str, Tensor]) -> dict[str, Tensor]:
    """|gamma| of the BatchNorm behind each layer of `betas`, float32 on the CPU."""
    known, norms = dict(model.named_modules()), getattr(betas, "norms", None)
    if norms:
        found = {n: getattr(known.get(norms.get(n)), "weight", None) for n in betas}
        scales = {n: w.detach().abs() for n, w in found.items() if w is not None}
    else:
        scales = baselines.bn_scale(model)
    for name in betas:
        if name not in scales:
            raise ValueError(f"'{name}' has no BatchNorm with a scale behind it")
    return {name: scales[name].to("cpu", torch.float32) for name in betas}


# -- the network while betas are learnt ----------------------------------------------


class MixedNet(nn.Module):
    """A copy of `model` that is trained on `beta` alone: images in, their logits out.

    The control is no submodule (nothing of it is trained or saved), but its digest is
    in the state, so that a checkpoint made with another control is not taken up.
    """

    def __init__(self, model: nn.Module, control: Control, norms, input_shape):
        super().__init__()
        self.net = copy.deepcopy(model).requires_grad_(False)
        self._control = (control,)
        self.norms, self.paired = dict(norms), control.paired
        digest = torch.tensor(list(bytes.fromhex(control.digest())), dtype=torch.uint8)
        self.register_buffer("control_digest", digest)
        graph = build_graph(model, input_shape)
        for norm in norms.values():
            relu = _relu_follows(graph, norm) and control.paired
            kind = MixedNorm if control.paired else GatedNorm
            _put_around(self.net, norm, kind(self.net.get_submodule(norm), relu=relu))
        self.mode = _OnceRelu()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the images x [B, C, H, W] when mixed with controls."""
        (control,) = self._control
        both = torch.cat([x, control.sample(x)]) if control.paired else x
        with self.mode:
            output = self.net(both)
        if isinstance(output, tuple):  # auxiliary heads
            output = output[0]
        return output[: len(x)]

    def read_betas(self) -> dict[str, Tensor]:
        """`beta` of each layer, projected, on the CPU."""
        modules = {n: self.net.get_submodule(norm) for n, norm in self.norms.items()}
        betas = {n: m.beta.detach() for n, m in modules.items()}
        return {n: b.clamp(0, 1).float().cpu() for n, b in betas.items()}

    def read_scales(self) -> dict[str, Tensor]:
        """|gamma| of each layer, on the CPU."""
        modules = {n: self.net.get_submodule(norm) for n, norm in self.norms.items()}
        return {n: m.norm.weight.abs().float().cpu() for n, m in modules.items()}


class MixedNorm(nn.Module):
    """A BatchNorm that mixes the halves of its batch by `beta` before it normalises."""

    start = 0.5

    def __init__(self, norm: nn.Module, *, relu: bool):
        super().__init__()
        self.norm, self.relu = norm, relu
        self.beta = nn.Parameter(torch.full_like(norm.weight, self.start))

    def forward(self, x: Tensor) -> Tensor:
        """[2B, C, ...] to the same: the mixed images' half, then the control's."""
        if not self.training:
            return self.norm(x)
        with torch.no_grad():  # the projection after the step before
            self.beta.clamp_(0, 1)
        y = mix_norm_relu(
            x, self.beta, self.norm.weight, self.norm.bias, eps=self.norm.eps,
            relu=self.relu,
        )  # fmt: skip
        y.rectified = y._version if self.relu else None  # until changed in place
        return y


class GatedNorm(MixedNorm):
    """A BatchNorm with a gate behind it: what is left of the method without a control.

    Gates start at 1, the network as it is; a factor before the BatchNorm would cancel.
    """

    start = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same, each channel times its `beta`."""
        if not self.training:
            return self.norm(x)
        with torch.no_grad():
            self.beta.clamp_(0, 1)
        y = self.norm(x)
        return y * self.beta.to(y.dtype).view(1, -1, *[1] * (x.dim() - 2))


class _OnceRelu(TorchFunctionMode):
    """ReLU of what has been through the fused ReLU is the very tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RELU_CALLS:
            x = args[0] if args else kwargs["input"]
            if getattr(x, "rectified", None) == x._version:
                return x
        return func(*args, **kwargs)


def _put_around(net: nn.Module, name: str, outer: MixedNorm) -> None:
    """Put `outer` in the place of the norm inside it, under all names that this has."""
    inner = net.get_submodule(name)
    for path, module in list(net.named_modules(remove_duplicate=False)):
        if module is inner:
            net.set_submodule(path, outer)


def _relu_follows(graph: Graph, norm: str) -> bool:
    """Every reader of the BatchNorm's output is a ReLU."""
    made = {v for node in graph.nodes if node.module == norm for v in node.outputs}
    readers = [node for node in graph.nodes if made & set(node.inputs)]
    return bool(readers) and all(node.op in RELUS for node in readers)


def _describe(mixed: MixedNet) -> dict[str, float]:
    """The state of the betas in a few numbers, for the row of an epoch."""
    betas, scales = mixed.read_betas(), mixed.read_scales()
    every = torch.cat(list(betas.values()))
    return {
        "beta_mean": float(every.mean()),
        "beta_sd": float(every.std()),
        "below_half": float((every < 0.5).float().mean()),
        "rank_with_gamma": correlate_ranks(betas, scales, paired=mixed.paired),
    }


def correlate_ranks(
    betas: dict[str, Tensor], scales: dict[str, Tensor], *, paired: bool = True
) -> float:
    """Mean Spearman correlation over layers of the statistic with |gamma|.

    1: the control decides nothing, |gamma| alone would prune the same. A layer in which
    either of the two is constant counts 0. `paired` as in `Betas`.
    """
    found = [
        _spearman(scales[name] * (2 * beta - 1 if paired else beta), scales[name])
        for name, beta in betas.items()
    ]
    return sum(found) / max(len(found), 1)


def _spearman(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or len(a.unique()) < 2 or len(b.unique()) < 2:
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


# -- checks --------------------------------------------------------------------------


def _pick_layers(model, input_shape, layers: list[str] | None) -> dict[str, str]:
    pairs = find_pairs(build_graph(model, input_shape), model)
    chosen = block_layers(model, input_shape) if layers is None else list(layers)
    for name in chosen:
        if name not in pairs:
            raise ValueError(
                f"layers: '{name}' is not a convolution that a BatchNorm with a scale "
                "alone reads; SCOP mixes between the two"
            )
    if not chosen:
        raise ValueError("layers: nothing to select in")
    return {name: pairs[name] for name in chosen}


def _check_finite(betas: dict[str, Tensor]) -> None:
    for name, beta in betas.items():
        if not bool(torch.isfinite(beta).all()):
            raise ValueError(
                f"beta of '{name}' is not finite; lower lr or look at the control's "
                "images"
            )
