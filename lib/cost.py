"""What a network costs: multiply-adds and parameters (`lib.latency`: milliseconds).

One MAC is one multiply-add of a convolution or linear layer, half of what
`torch.utils.flop_counter` counts. BatchNorm, activations and additions cost nothing.
"""

import warnings
from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import flop_registry

from lib.graph.dry_run import Node, run_dry
from lib.graph.tags import CONSTANTS, ELEMENTWISE, MOVES, REDUCTIONS
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
    record = run_dry(model, check_shape(input_shape), training=False)
    uncounted: dict[str, str] = {}
    for node in record.events:
        if isinstance(node, Node) and not _is_known(node):
            for x in node.operands:
                if x.parameter is not None and len(x.shape) > 1:
                    uncounted.setdefault(x.parameter, node.op)
    for weight, operation in uncounted.items():
        warnings.warn(
            f"cost.count: '{operation}' with '{weight}' is not counted, torch's "
            "counter does not know it",
            stacklevel=2,
        )
    params = sum(p.numel() for p in model.parameters())
    return Cost(macs=record.macs, params=params)


def _is_known(node: Node) -> bool:
    """Is it a leaf, in torch's counter, or without work?"""
    counted = getattr(node.function, "_overloadpacket", None) in flop_registry
    return node.function is None or counted or node.op in WORKLESS
