"""What a network costs: multiply-adds and parameters (`lib.latency`: milliseconds).

One MAC is one multiply-add of a convolution or linear layer, half of what
`torch.utils.flop_counter` counts. BatchNorm, activations and additions cost nothing.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lib.graph.on_meta import meta_tensors, run_operation, tensors_in
from lib.graph.tags import CONSTANTS, ELEMENTWISE, MOVES, REDUCTIONS
from lib.graph.watch import dtype_of
from lib.settings import CHW, check_shape

# What may be done to a weight without multiplying by it as a layer does.
WORKLESS = ELEMENTWISE | MOVES | REDUCTIONS | CONSTANTS | {"embedding", "copy_", "cat"}


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


def count(model: nn.Module, input_shape: CHW) -> Cost:
    """MACs of one evaluation pass over one image, and all parameters.

    `input_shape` is (C, H, W). Runs on the meta device: nothing is computed, and the
    model is left as found. Warns of operations with weights that torch's counter does
    not know (a deformable convolution, a bilinear layer), which count nothing.
    """
    x = torch.empty(1, *check_shape(input_shape), device="meta", dtype=dtype_of(model))
    counter = FlopCounterMode(display=False)
    with (
        meta_tensors(dict(model.named_modules())) as names,
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        model.eval()
        with counter, _OnMeta(names) as seen:
            model(x)
    for weight, operation in seen.uncounted.items():
        warnings.warn(
            f"cost.count: '{operation}' with '{weight}' is not counted, torch's "
            "counter does not know it",
            stacklevel=2,
        )
    params = sum(p.numel() for p in model.parameters())
    return Cost(macs=counter.get_total_flops() // 2, params=params)


class _OnMeta(TorchDispatchMode):
    """Constants that a model makes on the CPU follow everything else to "meta".

    `uncounted` maps weights to operations that read them and are in no counter.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.uncounted: dict[str, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation with all its tensors on the meta device."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func._overloadpacket not in flop_registry and name not in WORKLESS:
            for tensor in tensors_in(args):
                if tensor.ndim > 1 and id(tensor) in self.names:
                    self.uncounted.setdefault(self.names[id(tensor)], name)
        return run_operation(name, func, args, kwargs)
