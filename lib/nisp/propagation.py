"""Importance of every neuron from that of the final responses, in one backward sweep.

A neuron's score is s_in = |W|^T s_out, layer by layer from the final response layer
(FRL) to the input, over whatever graph the network's forward pass draws. The sweep
needs no data and no gradients; `lib.nisp.rules` says what each operation does.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib.graph import Graph, Group, build_graph
from lib.graph.trace import BATCH, Node
from lib.nisp.frl import find_frl
from lib.nisp.rules import FACTORS, IN_PLACE, MOVES, SUMS, Step, pull
from lib.nisp.scale import Scores, add_up, common_power, fold, rescale, sum_to_one
from lib.plan.record import nearest_name


def propagate(
    model: nn.Module,
    frl_scores: Tensor,
    input_shape: tuple[int, int, int],
    *,
    joint: float | Mapping[str, float] | None = None,
    frl: str | None = None,
    neurons: bool = False,
    scale: str = "common",
    activity: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Importance of the outputs of every layer in front of the final response layer.

    `frl_scores` are float [D], >= 0, one for each number that the FRL holds for an
    image of `input_shape` (C, H, W). The FRL is what the last linear layer reads, or
    with `frl` what the module of that name makes. The result maps names of convolution
    and linear layers, in forward order, to float64 scores [channels] on the model's
    device: sums over positions of the neurons' scores at the layer's own output,
    in front of its BatchNorm, whose |gamma| / sigma therefore counts. `neurons=True`
    gives the neurons' scores instead, in the shape of the output of one image
    ([C, H, W] or [C]).

    `joint` is the share of channels removed, for all layers that can be pruned or by
    name; what is removed passes nothing on (one sweep ranks, prunes and propagates).
    Channels are removed as in `plan.from_scores(..., rate=joint)`, which given the
    result removes the same. Tied layers are decided first, by the sum of their scores
    in a sweep without removal; those are the scores returned for them. None removes
    nothing.

    `activity` puts back what the closed form replaces by one constant, the size of each
    neuron's output (`measure_activity`; [C, H, W] or [C] by layer): a neuron's score is
    multiplied by it before channels are summed and ranked, and handed on without. That
    is the sharper of the two bounds, and unlike the closed form it does not change when
    a layer's outputs are scaled up and its readers' weights down. (`undo_norms` gives
    factors that move the place of the scores behind each BatchNorm.)

    All scores are on one scale, that of `frl_scores`, if float64 can hold them; if not,
    all are divided by the same power of two. `scale="layer"` divides each layer's by
    their sum instead. Biases have no part. The model is left as found.

    Raises `ValueError` for scores that do not fit the FRL, are negative, not finite or
    all zero, an FRL that cannot be found, rates outside [0, 1) or for layers that
    cannot be pruned, weights that are not finite, activity that is missing for a layer
    or does not fit it, and, by its name, an operation without a rule.
    Source: Yu et al. 2018, sec. 3.
    """
    if scale not in {"common", "layer"}:
        raise ValueError(f"scale must be 'common' or 'layer', got {scale!r}")
    sweep = Sweep(model, build_graph(model, input_shape), frl, activity)
    seed = sweep.read_scores(frl_scores)
    rates = read_rates(sweep, joint)
    found = run_joint(sweep, seed, rates) if rates else sweep.run(seed)
    sums = {n: sweep.sum_channels(n, found[n]) for n in sweep.layers}
    if neurons:
        found = {n: sweep.join_calls(n, found[n]) for n in sweep.layers}
    else:
        found = sums
    if scale == "layer":
        return {n: sum_to_one(found[n], sums[n]) for n in found}
    power = common_power(sums.values())
    return {n: s.at(power) for n, s in found.items()}


# -- the sweep ---------------------------------------------------------------------


class Sweep:
    """What of a traced network leads to the final response layer, run backwards.

    `target` is the FRL's place in `graph.values`; `layers` names the layers in front
    of it, in forward order; `calls` counts how often each runs.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        frl: str | None,
        activity: Mapping[str, Tensor] | None = None,
    ):
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.target = find_frl(graph, self.modules, frl)
        self.features = find_features(graph)
        self.nodes = find_nodes(graph, self.target, self.features)
        self.calls = Counter(n.module for n in self.nodes if n.module in graph.layers)
        self.layers = [name for name in graph.layers if name in self.calls]
        if not self.layers:
            raise ValueError(
                "no convolution or linear layer stands in front of the final response "
                "layer; name a later one with `frl`"
            )
        refuse_writes(self)
        self.activity = None if activity is None else read_activity(self, activity)

    def step(self, node: Node) -> Step:
        """A node with what its rule needs to know."""
        inputs, outputs = (
            [self.graph.values[v].shape for v in places]
            for places in (node.inputs, node.outputs)
        )
        return Step(node, self.modules[node.module], inputs, outputs)

    def read_scores(self, frl_scores: Tensor) -> Scores:
        """The FRL's scores in the shape of one image's responses."""
        shape = self.graph.values[self.target].shape
        size = math.prod(shape[1:])
        check_scores(frl_scores, size, shape)
        device = self.modules[self.layers[0]].weight.device
        values = frl_scores.detach().to(device, torch.float64).reshape(1, *shape[1:])
        return rescale(values, 0, "the final response layer")

    def run(
        self,
        seed: Scores,
        alive: Mapping[str, Tensor] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> dict[str, list[Scores]]:
        """Scores at the output of each call of each layer, before anything is removed.

        `alive` holds the channels (bool) that pass something on, layer by layer;
        `rates` the shares of channels to remove where the sweep decides itself.
        """
        scores, found = {self.target: seed}, defaultdict(list)
        for node in reversed(self.nodes):
            made = [scores.pop(value, None) for value in node.outputs]
            if node.module in self.calls and made[0] is not None:
                own = self.weigh(node.module, made[0])
                found[node.module].append(own)
                kept = self.choose(node.module, own, alive or {}, rates or {})
                made = [self.gate(node.module, made[0], kept)]
            if any(value in self.features for value in node.inputs):
                self.hand_back(node, made, scores)
        return found

    def hand_back(self, node: Node, made: list, scores: dict[int, Scores]) -> None:
        """One operation: add what its inputs get to `scores`."""
        power = max(s.power for s in made if s is not None)
        values = [None if s is None else s.at(power) for s in made]
        pulled = pull(self.step(node), values)
        for value, part in zip(node.inputs, pulled, strict=True):
            if value in self.features:
                new = rescale(fold(part), power, f"'{node.module}' ({node.op})")
                scores[value] = scores[value] + new if value in scores else new

    def weigh(self, name: str, s: Scores) -> Scores:
        """Scores of a layer's neurons times how active they are."""
        if self.activity is None:
            return s
        return Scores(s.values * self.activity[name], s.power)

    def choose(
        self, name: str, own: Scores, alive: Mapping, rates: Mapping
    ) -> Tensor | None:
        """Which channels pass something on, bool; None for all."""
        if name in alive or name not in rates:
            return alive.get(name)
        group = self.graph.group_of[name]
        total = self.sum_channels(name, [own]).values
        return choose_units(group, {name: total}, rates[name])[group.index[name]]

    def gate(self, name: str, s: Scores, kept: Tensor | None) -> Scores:
        """Zero the scores of channels that are removed."""
        if kept is None:
            return s
        shape = [1] * s.values.ndim
        shape[self.channel_dim(name)] = -1
        return Scores(s.values * kept.to(s.values.device).view(shape), s.power)

    def channel_dim(self, name: str) -> int:
        """Where a layer's output has its channels."""
        return -1 if isinstance(self.modules[name], nn.Linear) else 1

    def sum_channels(self, name: str, calls: list[Scores]) -> Scores:
        """Channel scores: sums over positions and calls."""
        width = len(self.graph.layers[name].outputs)
        rows = []
        for s in calls:
            values = s.values.movedim(self.channel_dim(name), 0).reshape(width, -1)
            rows.append(Scores(values.sum(1) / self.count_images(s), s.power))
        return add_up(rows)

    def count_images(self, s: Scores) -> int:
        """1 where the scores of one image stand for the batch, else the batch."""
        return 1 if s.values.shape[0] == 1 else BATCH

    def join_calls(self, name: str, calls: list[Scores]) -> Scores:
        """Neuron scores of one image, summed over calls of the same shape."""
        if len({s.values.shape for s in calls}) > 1 or calls[0].values.shape[0] != 1:
            raise ValueError(
                f"neurons=True: '{name}' has no single output per image; leave it out "
                "for sums per channel"
            )
        total = add_up(calls)
        return Scores(total.values[0], total.power)


def find_features(graph: Graph) -> set[int]:
    """Values with a layer behind them; only they can have scores worth a name."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.module in graph.layers or not found.isdisjoint(node.inputs):
            found |= set(node.outputs)
    return found


def find_nodes(graph: Graph, target: int, features: set[int]) -> list[Node]:
    """The operations on features that lead to `target`, in forward order."""
    needed, nodes = {target}, []
    for node in reversed(graph.nodes):
        made = needed & features & set(node.outputs)
        if made:
            nodes.append(node)
            needed |= set(node.inputs)
    return nodes[::-1]


def refuse_writes(sweep: Sweep) -> None:
    """Writing into a tensor that is also known by another name would lose scores."""
    nodes, roots = sweep.graph.nodes, {}
    last = max((i for i, n in enumerate(nodes) if sweep.target in n.outputs), default=0)
    for node in nodes:
        for value in node.outputs:
            start = node.inputs[0] if node.op in MOVES and node.inputs else value
            roots[value] = roots.get(start, start)
    for i, node in enumerate(nodes[:last]):
        if not node.op.endswith("_") or sweep.features.isdisjoint(node.inputs):
            continue
        if node.op in IN_PLACE and node.op not in SUMS | FACTORS:
            continue  # a score passes through on either name
        later = {value for n in nodes[i + 1 :] for value in n.inputs}
        source, made = node.inputs[0], node.outputs[0]
        stale = (
            roots.get(v, v) == roots.get(source, source) for v in later if v < made
        )
        if node.op not in IN_PLACE or any(stale):
            raise sweep.step(node).refuse("writes into a tensor with a second name")


# -- pruning while propagating -----------------------------------------------------


def run_joint(
    sweep: Sweep, seed: Scores, rates: Mapping[str, float]
) -> dict[str, list[Scores]]:
    """One sweep that ranks, prunes and propagates; tied layers are decided before it.

    Layers that share channels are reached at different times, so a sweep without
    removal gives the sum of their scores, their common mask and what is returned.
    """
    groups = {id(g): g for g in map(sweep.graph.group_of.get, rates)}
    tied = [g for g in groups.values() if sum(sweep.calls[n] for n in g.layers) > 1]
    if not tied:
        return sweep.run(seed, rates=rates)
    whole, alive, decided = sweep.run(seed), {}, {}
    for group in tied:
        names = [n for n in group.layers if n in sweep.calls]
        sums = [sweep.sum_channels(n, whole[n]) for n in names]
        power = max(s.power for s in sums)
        totals = {n: s.at(power) for n, s in zip(names, sums, strict=True)}
        kept = choose_units(group, totals, rates[names[0]])
        alive |= {n: kept[group.index[n]] for n in names}
        decided |= {n: whole[n] for n in names}
    return sweep.run(seed, alive, rates) | decided


def choose_units(group: Group, scores: Mapping[str, Tensor], rate: float) -> Tensor:
    """Kept units of a group, bool [size]: `plan.from_scores`'s rule for one rate."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, values in scores.items():
        total.index_add_(0, group.index[name], values.cpu())
    blocks = group.unit_blocks
    order = [b[torch.sort(total[b], stable=True).indices] for b in blocks]
    count = min(int(rate * len(order[0])), len(order[0]) - 1)
    kept = torch.ones(group.size, dtype=torch.bool)
    for units in order:
        kept[units[:count]] = False
    return kept


def read_rates(sweep: Sweep, joint: float | Mapping[str, float] | None) -> dict:
    """The rate of every layer that loses channels; tied layers have one rate."""
    if joint is None:
        return {}
    group_of = sweep.graph.group_of
    if not isinstance(joint, Mapping):
        check_rate("joint", joint)
        free = (n for n in sweep.layers if not group_of[n].fixed)
        return {n: joint for n in free if joint > 0}
    rates: dict[str, float] = {}
    for name, rate in joint.items():
        check_rate(f"joint: '{name}'", rate)
        check_name(sweep, name)
        group = group_of[name]
        if rate > 0 and group.fixed:
            raise ValueError(f"joint: '{name}' cannot be pruned: {group.fixed}")
        for other in group.layers:
            if rates.setdefault(other, rate) != rate:
                names = ", ".join(group.layers)
                raise ValueError(f"joint: tied layers need one rate: {names}")
    return {n: r for n, r in rates.items() if r > 0 and n in sweep.calls}


def check_name(sweep: Sweep, name: str) -> None:
    """Raise `ValueError` unless the layer stands in front of the FRL."""
    if name not in sweep.graph.layers:
        near = nearest_name(name, sweep.graph.layers)
        raise ValueError(f"joint: the network has no layer '{name}'{near}")
    if name not in sweep.calls:
        raise ValueError(
            f"joint: '{name}' does not stand in front of the final response layer, so "
            "it gets no scores; leave it out"
        )


def check_rate(what: str, rate: float) -> None:
    """Raise `ValueError` unless the rate lies in [0, 1)."""
    if not math.isfinite(rate) or not 0 <= rate < 1:
        raise ValueError(f"{what}: the rate must lie in [0, 1), got {rate}")


def read_activity(sweep: Sweep, activity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Activity of the sweep's layers, float64, in the shape of one image's output."""
    found = {}
    for name in sweep.layers:
        if name not in activity:
            raise ValueError(
                f"activity: '{name}' is missing; `measure_activity` has all layers"
            )
        values = activity[name].detach()
        nodes = [n for n in sweep.nodes if n.module == name and n.outputs]
        shapes = {tuple(sweep.graph.values[n.outputs[0]].shape[1:]) for n in nodes}
        if len(shapes) > 1:
            raise ValueError(
                f"activity: '{name}' runs on inputs of different sizes; rank without"
            )
        (shape,) = shapes
        if tuple(values.shape) != shape:
            raise ValueError(
                f"activity: the output of '{name}' has the shape {shape} per image, "
                f"got {tuple(values.shape)}"
            )
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(
                f"activity: '{name}' has values that are negative or not finite"
            )
        found[name] = values.to(sweep.modules[name].weight.device, torch.float64)
    return found


def check_scores(frl_scores: Tensor, size: int, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless these can be scores of the final responses."""
    if shape[0] != BATCH:
        raise ValueError(
            "the final response layer does not hold one response per image; name "
            "another with `frl`"
        )
    per_image = tuple(shape[1:])
    if tuple(frl_scores.shape) not in {(size,), per_image}:
        raise ValueError(
            f"frl_scores: the final response layer has {size} responses, got scores of "
            f"shape {tuple(frl_scores.shape)}; give one number for each"
        )
    if not bool(torch.isfinite(frl_scores).all()):
        raise ValueError("frl_scores: not finite; replace NaN and infinite scores")
    if bool((frl_scores < 0).any()):
        raise ValueError(
            "frl_scores: importance cannot be negative; shift the scores or take their "
            "ranks"
        )
    if not bool((frl_scores > 0).any()):
        raise ValueError("frl_scores: all are zero, which ranks nothing")
