"""What the tests know without asking `lib.surgery`: nets made hard, hooks, hand counts.

`hooked` computes a pruned network's output on the full-size one by zeroing the outputs
of modules from outside. It finds the BatchNorm behind a convolution by watching a real
forward pass, and shares no code with `lib.graph` or `lib.surgery`.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from lib import surgery
from lib.plan import Plan
from lib.surgery.movers import Gate

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Dense(nn.Module):
    """A dense layer: it adds four channels to those it reads."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(x).relu()], 1)


def roughen(model: nn.Module, seed: int = 0, *, neutral: bool = False) -> nn.Module:
    """Random BatchNorm scales, shifts and statistics, and random biases, in place.

    `neutral` leaves shifts and means at zero: then zero in is zero out, everywhere.
    """
    g, shift = torch.Generator().manual_seed(seed), 0.0 if neutral else 0.3
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                if module.running_var is not None:
                    module.running_var.uniform_(0.5, 2, generator=g)
                if module.running_mean is not None:
                    module.running_mean.normal_(0, shift, generator=g)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=g)
                    module.bias.normal_(0, shift, generator=g)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.1, generator=g)
    return model


def images(shape, dtype=torch.float64, *, count: int = 2, seed: int = 1):
    """`count` random images of `shape` (C, H, W)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=g, dtype=torch.float64).to(dtype)


def evaluate(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output in evaluation mode."""
    with torch.no_grad():
        return model.eval()(x)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest output of either."""
    scale = max(a.abs().max().item(), b.abs().max().item())
    return (a - b).abs().max().item() / (scale or 1.0)


def random_plan(groups, seed: int, *, share: float = 0.7) -> Plan:
    """Random channels of a random `share` of the groups, equal counts per block."""
    g = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        if group.fixed or torch.rand(1, generator=g) > share:
            continue
        blocks = group.unit_blocks
        kept = int(torch.randint(1, len(blocks[0]) + 1, (1,), generator=g))
        alive = torch.zeros(group.size, dtype=torch.bool)
        for block in blocks:
            alive[block[torch.randperm(len(block), generator=g)[:kept]]] = True
        for name in group.layers:
            keep[name] = torch.nonzero(alive[group.index[name]]).flatten().tolist()
    return Plan(keep=keep)


@contextmanager
def hooked(model: nn.Module, plan: Plan, x: torch.Tensor, extra=None, behind=True):
    """`model` with forward hooks that multiply by 0 or 1 what `plan` removes.

    `extra` maps further module names (zero-padded shortcuts) to their kept channels.
    Hooks sit on the BatchNorm behind a convolution, with `behind=False` (for `neutral`
    nets) on the convolution.
    """
    modules = dict(model.named_modules())
    ends = _watch(model, x) if behind else {}
    kept = {ends.get(name, name): k for name, k in plan.keep.items()}
    handles = []
    for name, channels in (kept | (extra or {})).items():
        handles.append(modules[name].register_forward_hook(_gate(channels)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _gate(channels):
    def hook(module, args, output):
        dim = -1 if isinstance(module, nn.Linear) else 1
        alive = torch.zeros(output.shape[dim], dtype=output.dtype)
        alive[channels] = 1
        return output * alive.view(
            [-1 if d == dim % output.ndim else 1 for d in range(output.ndim)]
        )

    return hook


def _watch(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Each layer with the BatchNorm that reads its output, in a real pass."""
    made, ends, alive, handles = {}, {}, [], []

    def hook(name, module):
        def watch(_, args, output):
            if isinstance(module, _BatchNorm) and id(args[0]) in made:
                ends[made[id(args[0])]] = name
            made[id(output)] = name
            alive.append((args, output))

        return watch

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
            handles.append(module.register_forward_hook(hook(name, module)))
    evaluate(model, x)
    for handle in handles:
        handle.remove()
    norms = dict(model.named_modules())
    return {k: v for k, v in ends.items() if not isinstance(norms[k], _BatchNorm)}


def pad_shortcuts(model: nn.Module, plan: Plan) -> dict[str, list[int]]:
    """Zero-padded shortcuts of a CIFAR ResNet with the kept channels they feed."""
    return {
        f"{stage}.0.shortcut": plan.keep[f"{stage}.0.conv2"]
        for stage in ("layer2", "layer3")
        if f"{stage}.0.conv2" in plan.keep and f"{stage}.0.conv2" not in plan.scatter
    }


def recount(model: nn.Module, shape) -> tuple[int, int]:
    """MACs and parameters of a real pass over one image, by torch's own counter."""
    counter = FlopCounterMode(display=False)
    parameter = next(model.parameters())
    with torch.no_grad(), counter:
        model.eval()(parameter.new_zeros(1, *shape))
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def train_step(model: nn.Module, x: torch.Tensor):
    """One SGD step in training mode; every gradient must exist and be finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output = model(x)
    parts = output if isinstance(output, tuple) else (output,)
    loss = sum(p.square().mean() + p.sum() * 1e-3 for p in parts)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name}: gradient not finite"
    optimizer.step()
    return output


def assert_exact(
    model, plan, shape, x, *, extra=None, hooks=True, behind=True
) -> nn.Module:
    """shrink == mask == hooks on `x`; the shrunk net is returned."""
    small = surgery.shrink(model, plan, shape)
    got, tolerance = evaluate(small, x), TOLERANCE[x.dtype]
    masked = evaluate(surgery.mask(model, plan, shape), x)
    assert difference(got, masked) < tolerance, "shrink differs from mask"
    if hooks:
        with hooked(model, plan, x, extra, behind):
            assert difference(got, evaluate(model, x)) < tolerance, "hooks differ"
    if any(len(k) < _width(model, n) for n, k in plan.keep.items()):
        assert difference(got, evaluate(model, x)) > 1e-9, "pruning changed nothing"
    assert_clean(small)
    return small


def assert_clean(small: nn.Module) -> None:
    """No hook, no mask and no zero filter in a shrunk network."""
    for name, module in small.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
        assert not isinstance(module, Gate), name
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = module.weight.detach().flatten(1).abs().sum(1)
            assert (rows > 0).all(), f"{name} has zero filters"
    assert not [n for n, _ in small.named_buffers() if "mask" in n]


def _width(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).weight.shape[0]
