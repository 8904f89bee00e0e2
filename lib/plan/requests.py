"""What `from_scores` is asked for: its types, and what of it is refused."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib.graph import Graph
from lib.messages import suggest
from lib.plan.resolving import Kept
from lib.settings import ABOVE_ONE, ABOVE_ZERO, check_float

Scores = Mapping[str, Tensor]
Rate = float | Mapping[str, float]
Timetable = Callable[[Graph, Kept], float]  # milliseconds of what is kept


def check_target(
    rate: Rate | None,
    macs: float | None,
    latency: float | None,
    table: Timetable | None,
) -> None:
    """`ValueError` unless one target is given, in bounds, with what it needs."""
    if sum(x is not None for x in (rate, macs, latency)) != 1:
        raise ValueError(
            "give either rate (share removed), macs or latency (shares kept)"
        )
    if (latency is None) != (table is None):
        raise ValueError("latency needs a table, and a table latency: see lib.latency")
    for what, share in (
        ("macs, the share of MACs", macs),
        ("latency, the share of time", latency),
    ):
        if share is not None:
            check_float(f"{what} to keep", share, ABOVE_ZERO, ABOVE_ONE)


def check_rates(rate: Rate | None, scores: Scores, scope: str) -> None:
    """`ValueError` for a rate out of bounds, or of a layer that has no scores."""
    if not isinstance(rate, Mapping):
        check_float("rate: the rate", 0.0 if rate is None else rate, 0.0, 1.0)
        return
    if scope == "global":
        raise ValueError("scope='global' takes one rate, not one per layer")
    for name, value in rate.items():
        check_float(f"{name}: the rate", value, 0.0, 1.0)
        if isinstance(scores, Mapping) and name not in scores:
            raise ValueError(f"rate: '{name}' has no scores{suggest(name, scores)}")


def check_scores(graph: Graph, scores: Scores, model: nn.Module) -> None:
    """`ValueError`, naming the layer, for scores of none, of another size, or NaN."""
    if not isinstance(scores, Mapping):
        kind = type(scores).__name__
        raise ValueError(f"scores: expected a dict of tensors by layer, got a {kind}")
    modules = dict(model.named_modules())
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.is_complex():
            kind = type(values).__name__
            raise ValueError(f"scores: '{name}' needs a tensor of reals, got a {kind}")
        if name not in modules:
            near = suggest(name, graph.layers)
            raise ValueError(f"scores: the network has no layer '{name}'{near}")
        if name not in graph.layers:
            raise ValueError(
                f"scores: '{name}' ({type(modules[name]).__name__}) does not run as a "
                "plain convolution or linear layer, so it cannot be pruned; leave it "
                "out of the scores"
            )
        size = len(graph.layers[name].outputs)
        if tuple(values.shape) != (size,):
            raise ValueError(
                f"scores: '{name}' has {size} output channels, got scores of shape "
                f"{tuple(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"scores: '{name}' has scores that are not finite")
