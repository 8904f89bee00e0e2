"""Importance of every neuron from that of the final responses, in one backward pass.

A neuron's score is s_in = |W|^T s_out, layer by layer from the final response layer
(FRL) to the input: the gradient of the absolute network (`lib.nisp.absolute`) for the
FRL's scores. Hooks at the layers read it off as it comes down, and take away what is
pruned. No data and no loss are needed.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lib.graph import Graph, build_graph
from lib.messages import suggest
from lib.nisp.absolute import run_absolute
from lib.nisp.frl import NO_ROW, find_classifier, pool
from lib.plan import from_scores
from lib.settings import CHW, check_float

ROOM = 1000  # powers of two that scores may grow or shrink by in float64


@torch.inference_mode(mode=False)
@torch.enable_grad()
def propagate(
    model: nn.Module,
    frl_scores: Tensor,
    input_shape: CHW,
    *,
    joint: float | Mapping[str, float] | None = None,
    neurons: bool = False,
    behind_norm: bool = False,
    activity: Mapping[str, Tensor] | None = None,
    graph: Graph | None = None,
) -> dict[str, Tensor]:
    """Importance of the outputs of every layer in front of the final response layer.

    `frl_scores`: float [D], >= 0, one for each number that the FRL, what the classifier
    reads, holds for an image of `input_shape` (C, H, W). Returned, by convolution and
    linear layer in forward order: float64 [channels] on the model's device, sums over
    positions of the neurons' scores at the layer's output, in front of its BatchNorm,
    whose |gamma| / sigma therefore counts; with `behind_norm` at the output of the
    BatchNorm that alone reads it (0 where gamma = 0). `neurons=True` gives the neurons'
    scores instead, in the shape of the output of one image ([C, H, W] or [C]).

    `joint` is the share of channels removed, for all layers that can be pruned or by
    name, as `plan.from_scores(..., rate=joint)` given the result removes them; what is
    removed passes nothing on. Tied layers are reached at different times, so they are
    decided first, by the sum of their scores in a pass without removal; those are the
    scores returned for them.

    `activity` puts back what the closed form replaces by one constant, the size of each
    neuron's output (`measure_activity`; [C, H, W] or [C] by layer): scores are
    multiplied by it before channels are summed and ranked, and handed on without. That
    is the sharper bound, which no scaling of a layer against its readers changes.

    All scores are on the scale of `frl_scores` if float64 can hold them; if not, all
    are divided by the same power of two. `graph`: that of the model, if known.

    `ValueError`: scores that do not fit the FRL, are negative, not finite or all zero;
    rates outside [0, 1) or of layers that cannot be pruned; weights that are not
    finite; nets so deep that float64 ends; activity that does not fit; and, by its
    name, an operation without a rule. Source: Yu et al. 2018, sec. 3.

    Step by step in notebooks/21_nisp_propagation.ipynb.
    """
    if behind_norm and activity is not None:
        raise ValueError("activity is measured before norms; leave behind_norm out")
    graph = graph or build_graph(model, input_shape)
    sweep = Sweep(model, input_shape, graph, behind_norm, activity)
    check_scores(frl_scores, sweep.target)
    seed = frl_scores.detach().to(sweep.target).reshape(sweep.target.shape)
    power = max(-ROOM, min(ROOM, math.frexp(float(seed.max()))[1]))
    seed = seed * 2.0**-power
    found = sweep.run(seed)
    if joint is not None:
        found = run_joint(sweep, seed, found, read_rates(graph, found, joint))
    join = sweep.join_calls if neurons else sweep.sum_channels
    scores = {n: join(n, calls) for n, calls in found.items()}
    factor = 2.0 ** fit_power(scores.values(), power)
    return {n: s * factor for n, s in scores.items()}


# -- the sweep ---------------------------------------------------------------------


class Sweep:
    """The absolute network run once, ready for passes back from its responses.

    `target` holds the final responses [1, ...] of its one image.
    """

    def __init__(self, model, input_shape, graph, behind_norm, activity):
        self.model, self.shape, self.graph = model, input_shape, graph
        self.layers = [n for n, layer in graph.layers.items() if layer.positions]
        self.activity = activity
        pairs = graph.pairs if behind_norm else {}
        scales = {n: model.get_submodule(norm).weight for n, norm in pairs.items()}
        self.alive = {n: s.detach() != 0 for n, s in scales.items() if s is not None}
        end = find_classifier(graph, model)
        read, self.starts = run_absolute(
            model, input_shape, layers=set(self.layers),
            places={pairs.get(n, n): n for n in self.layers}, end=end, visit=self.visit,
        )  # fmt: skip
        self.target = pool(model.get_submodule(end), read)
        if not self.target.requires_grad:
            raise ValueError(
                "no convolution or linear layer stands in front of the classifier"
            )

    def run(self, seed: Tensor, choose: Callable | None = None) -> dict:
        """Scores at each call of each layer, in forward order.

        `choose(name, scores)` says which channels pass something on (bool, or None).
        """
        self.found: dict[str, list[Tensor]] = defaultdict(list)
        self.choose = choose or (lambda name, own: None)
        torch.autograd.grad(
            self.target, self.starts, seed, retain_graph=True, allow_unused=True
        )
        return {n: self.found[n] for n in self.layers if n in self.found}

    def visit(self, name: str, grad: Tensor) -> Tensor | None:
        """Called by autograd at every layer: read scores off, cut what is removed."""
        if not bool(grad.sum().isfinite()):
            raise ValueError(f"'{name}': its scores are beyond the range of float64")
        own = self.weigh(name, grad)
        self.found[name].append(own)
        kept = self.choose(name, own)
        if kept is None:
            return None
        shape = [1] * grad.ndim
        shape[self.channel_dim(name)] = -1
        return grad * kept.to(grad).view(shape)

    def weigh(self, name: str, grad: Tensor) -> Tensor:
        """Scores of a layer's neurons as they are ranked."""
        if name in self.alive:
            return grad * self.alive[name].view(-1, *[1] * (grad.ndim - 2))
        if self.activity is None:
            return grad
        if name not in self.activity:
            raise ValueError(
                f"activity: '{name}' is missing; `measure_activity` has all layers"
            )
        values, shape = self.activity[name], tuple(grad.shape[1:])
        if tuple(values.shape) != shape:
            raise ValueError(
                f"activity: the output of '{name}' has the shape {shape} per image, "
                f"got {tuple(values.shape)}"
            )
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"activity: '{name}' needs finite values >= 0")
        return grad * values.to(grad)

    def channel_dim(self, name: str) -> int:
        """Where a layer's output has its channels."""
        return -1 if isinstance(self.model.get_submodule(name), nn.Linear) else 1

    def sum_channels(self, name: str, calls: list[Tensor]) -> Tensor:
        """Channel scores: sums over positions and calls."""
        dim = self.channel_dim(name)
        return sum(s.movedim(dim, 0).flatten(1).sum(1) for s in calls)

    def join_calls(self, name: str, calls: list[Tensor]) -> Tensor:
        """Neuron scores of one image, summed over calls of the same shape."""
        if len({s.shape for s in calls}) > 1 or len(calls[0]) != 1:
            raise ValueError(
                f"neurons=True: '{name}' has no single output per image; leave it out "
                "for sums per channel"
            )
        return sum(calls)[0]


def fit_power(scores: Iterable[Tensor], power: int) -> int:
    """The power of two nearest to this by which all scores stay within float64."""
    tops = [math.frexp(float(s.max()))[1] for s in scores if bool(s.any())]
    return max(min(power, ROOM - max(tops)), -ROOM - min(tops)) if tops else 0


# -- pruning while propagating -----------------------------------------------------


def run_joint(sweep: Sweep, seed: Tensor, whole: dict, rates: Mapping) -> dict:
    """One pass that ranks, prunes and propagates; tied layers are decided before it.

    `whole` is what a pass without removal found.
    """
    groups = {id(group): group for group in map(sweep.graph.group_of.get, rates)}
    alive: dict[str, Tensor] = {}
    decided: dict[str, list[Tensor]] = {}
    for group in groups.values():
        calls = {n: whole[n] for n in group.layers if n in whole}
        if sum(map(len, calls.values())) > 1:
            alive |= choose_channels(sweep, calls, rates)
            decided |= calls

    def choose(name: str, own: Tensor) -> Tensor | None:
        if name in alive or name not in rates:
            return alive.get(name)
        return choose_channels(sweep, {name: [own]}, rates)[name]

    return sweep.run(seed, choose) | decided


def choose_channels(sweep: Sweep, calls: Mapping, rates: Mapping) -> dict[str, Tensor]:
    """Kept channels, bool, of layers of one group by their scores at each call."""
    scores = {name: sweep.sum_channels(name, found) for name, found in calls.items()}
    rate = {name: rates[name] for name in scores}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a low rate may well remove nothing
        plan = from_scores(
            sweep.model, scores, sweep.shape, rate=rate, graph=sweep.graph
        )
    kept = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    for name in scores.keys() & plan.keep.keys():
        kept[name][:] = False
        kept[name][plan.keep[name]] = True
    return kept


def read_rates(
    graph: Graph, found: Mapping, joint: float | Mapping[str, float]
) -> dict[str, float]:
    """The rate of every layer that loses channels; tied layers have one rate."""
    if not isinstance(joint, Mapping):
        check_float("joint: the rate", joint, 0, 1)
        return {n: joint for n in found if joint > 0 and not graph.group_of[n].fixed}
    rates: dict[str, float] = {}
    for name, rate in joint.items():
        check_float(f"joint: '{name}': the rate", rate, 0, 1)
        if name not in graph.layers:
            near = suggest(name, graph.layers)
            raise ValueError(f"joint: the network has no layer '{name}'{near}")
        if name not in found:
            raise ValueError(
                f"joint: '{name}' does not stand in front of the final response layer, "
                "so it gets no scores; leave it out"
            )
        group = graph.group_of[name]
        if rate > 0 and group.fixed:
            raise ValueError(f"joint: '{name}' cannot be pruned: {group.fixed}")
        for other in group.layers:
            if rates.setdefault(other, rate) != rate:
                names = ", ".join(group.layers)
                raise ValueError(f"joint: tied layers need one rate: {names}")
    return {n: r for n, r in rates.items() if r > 0 and n in found}


# -- what is refused ---------------------------------------------------------------


def check_scores(frl_scores: Tensor, responses: Tensor) -> None:
    """Raise `ValueError` unless these can be scores of the final responses [1, ...]."""
    if len(responses) != 1:
        raise ValueError(f"the last layer {NO_ROW}")
    if tuple(frl_scores.shape) not in {(responses.numel(),), responses.shape[1:]}:
        raise ValueError(
            f"frl_scores: the final response layer has {responses.numel()} responses, "
            f"got scores of shape {tuple(frl_scores.shape)}; give one number for each"
        )
    sound = bool(((frl_scores >= 0) & frl_scores.isfinite()).all())
    if not sound or not bool(frl_scores.any()):
        raise ValueError("frl_scores: expected finite numbers >= 0, not all of them 0")
