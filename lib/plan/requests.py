"""What `from_scores` is asked for: its types, and what of it is refused."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib.graph import Graph
from lib.messages import check_choice, suggest
from lib.plan.resolve import Kept
from lib.settings import ABOVE_ONE, ABOVE_ZERO, check_float, check_int

Scores = Mapping[str, Tensor]
Rate = float | Mapping[str, float]
Timetable = Callable[[Graph, Kept], float]  # milliseconds of what is kept


def check_request(
    rate: Rate | None,
    macs: float | None,
    latency: float | None,
    table: Timetable | None,
    scope: str,
) -> None:
    """`ValueError` unless one target is given, in bounds, with what it needs."""
    check_choice("scope", scope, ("layer", "global"))
    if sum(x is not None for x in (rate, macs, latency)) != 1:
        raise ValueError(
            "give either rate (share removed), macs or latency (shares kept)"
        )
    if (latency is None) != (table is None):
        raise ValueError("latency needs a table, and a table latency: see lib.latency")
    if isinstance(rate, Mapping) and scope == "global":
        raise ValueError("scope='global' takes one rate, not one per layer")
    rates = rate if isinstance(rate, Mapping) else {"rate": rate or 0.0}
    for name, value in rates.items():
        check_float(f"{name}: the rate", value, 0.0, 1.0)
    for what, share in (("macs", macs), ("latency", latency)):
        if share is not None:
            what += ", the share of " + ("MACs" if what == "macs" else "time")
            check_float(f"{what} to keep", share, ABOVE_ZERO, ABOVE_ONE)


def check_manner(residual: str, multiple: int) -> None:
    """`ValueError` for an unknown treatment of streams, or no number of channels."""
    check_choice("residual", residual, ("tie", "scatter", "keep"))
    check_int("multiple", multiple, 1)


def check_rates(rate: Rate | None, scores: Scores) -> None:
    """`ValueError` for a rate of a layer that has no scores."""
    if not isinstance(rate, Mapping) or not isinstance(scores, Mapping):
        return
    for name in rate.keys() - scores.keys():
        raise ValueError(f"rate: '{name}' has no scores{suggest(name, scores)}")


def _refuse_name(graph: Graph, name: str, model: nn.Module) -> None:
    module = dict(model.named_modules()).get(name)
    if module is None:
        near = suggest(name, graph.layers)
        raise ValueError(f"scores: the network has no layer '{name}'{near}")
    raise ValueError(
        f"scores: '{name}' ({type(module).__name__}) does not run as a plain "
        "convolution or linear layer, so it cannot be pruned; leave it out of "
        "the scores"
    )


def check_scores(graph: Graph, scores: Scores, model: nn.Module) -> None:
    """`ValueError`, naming the layer, for scores of none, of another size, or NaN."""
    if not isinstance(scores, Mapping):
        kind = type(scores).__name__
        raise ValueError(f"scores: expected a dict of tensors by layer, got a {kind}")
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.is_complex():
            kind = type(values).__name__
            raise ValueError(f"scores: '{name}' needs a tensor of reals, got a {kind}")
        if name not in graph.layers:
            _refuse_name(graph, name, model)
        size = len(graph.layers[name].outputs)
        if tuple(values.shape) != (size,):
            raise ValueError(
                f"scores: '{name}' has {size} output channels, got scores of shape "
                f"{tuple(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"scores: '{name}' has scores that are not finite")
