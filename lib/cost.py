"""What a network costs: multiply-adds, parameters, time per batch.

One MAC is one multiply-add of a convolution or linear layer, half of what
`torch.utils.flop_counter` counts. BatchNorm, activations and additions cost nothing.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lib.graph.on_meta import meta_tensors, move_all, tensors_in
from lib.graph.watch import dtype_of, modes_kept


@dataclass(frozen=True)
class Cost:
    """`macs` per image and `params` (trainable or not), both exact integers."""

    macs: int
    params: int

    def down_from(self, base: "Cost") -> dict[str, float]:
        """Reduction against `base` in percent, as papers print it ("FLOPs down")."""
        return {
            "macs_down": 100 * (1 - self.macs / base.macs),
            "params_down": 100 * (1 - self.params / base.params),
        }


def count(model: nn.Module, input_shape: tuple[int, int, int]) -> Cost:
    """MACs of one evaluation pass over one image, and all parameters.

    `input_shape` is (C, H, W). Runs on the meta device: nothing is computed, and the
    model is left as found.
    """
    x = torch.empty(1, *input_shape, device="meta", dtype=dtype_of(model))
    counter = FlopCounterMode(display=False)
    with (
        meta_tensors(dict(model.named_modules())),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        model.eval()
        with counter, _OnMeta():
            model(x)
    params = sum(p.numel() for p in model.parameters())
    return Cost(macs=counter.get_total_flops() // 2, params=params)


class _OnMeta(TorchDispatchMode):
    """Constants that a model makes on the CPU follow everything else to "meta"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation with all its tensors on the meta device."""
        kwargs = kwargs or {}
        devices = {t.device.type for t in tensors_in((*args, *kwargs.values()))}
        if len(devices) > 1:
            args, kwargs = move_all(args, "meta"), move_all(kwargs, "meta")
        return func(*args, **kwargs)


def latency(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    batch_size: int = 1,
    repeats: int = 20,
    warmup: int = 5,
) -> float:
    """Median milliseconds of an evaluation pass over a batch, after `warmup` passes.

    Timed on the device that holds the model; with CUDA events on a GPU.
    """
    if repeats < 1 or batch_size < 1:
        raise ValueError(
            f"need repeats and batch_size >= 1, got {repeats}, {batch_size}"
        )
    device = next(model.parameters()).device
    x = torch.randn(batch_size, *input_shape, device=device, dtype=dtype_of(model))
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for _ in range(warmup):
            model(x)
        timer = _time_cuda if device.type == "cuda" else _time_host
        return statistics.median(timer(model, x) for _ in range(repeats))


def _time_host(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return 1e3 * (time.perf_counter() - start)


def _time_cuda(model: nn.Module, x: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    model(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
