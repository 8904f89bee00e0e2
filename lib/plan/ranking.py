"""From scores to a plan: by rate, by global threshold, or to a MAC target."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib import cost
from lib.graph import Graph, Group, build_graph
from lib.messages import check_choice, suggest
from lib.plan.record import Plan
from lib.plan.resolve import resolve

Scores = Mapping[str, Tensor]
Rate = float | Mapping[str, float]


def from_scores(
    model: nn.Module,
    scores: Scores,
    input_shape: tuple[int, int, int],
    *,
    rate: Rate | None = None,
    macs: float | None = None,
    scope: str = "layer",
    residual: str = "tie",
    graph: Graph | None = None,
) -> Plan:
    """Keep the channels with the highest scores.

    `scores[layer]` is a float tensor [output channels]; layers without a score stay
    whole. Exactly one of `rate` (share of channels removed; one number, or one per
    layer) and `macs` (share of MACs kept, met within 1 %) is given. `scope="layer"`
    removes the same share everywhere: the `floor(rate * C)` lowest of each layer, with
    `rate` as it is written (.58 of 50 is 29), equal scores from the lower index on, at
    least one kept, as many in every group of a grouped convolution. `scope="global"`
    ranks all channels together.

    `residual` decides about layers that feed an addition: "tie" prunes them together
    (score = sum over the scored members), "scatter" each on its own, written back
    full-width (Tang et al. 2020), "keep" leaves them whole.

    Raises `ValueError` for scores that fit no layer, are not finite or belong to
    channels that cannot be pruned; warns when nothing is removed. `graph`, if given,
    is that of `build_graph(model, input_shape)`.
    """
    _check_request(rate, macs, scope, residual)
    graph = graph or build_graph(model, input_shape)
    _check_scores(graph, scores, model)
    for name in rate.keys() - scores.keys() if isinstance(rate, Mapping) else ():
        raise ValueError(f"rate: '{name}' has no scores{suggest(name, scores)}")
    pools = _make_pools(graph, scores, residual)
    if macs is not None:
        other = 0
        if graph.has_other_work:
            other = cost.count(model, input_shape).macs
            other -= _macs_of(graph, pools, [0] * len(pools))
        removed = _meet_macs(graph, pools, macs, scope, other)
    elif scope == "global" and not isinstance(rate, Mapping) and rate is not None:
        removed = _lowest(_global_order(pools), pools, rate)
    else:
        removed = [
            min(count_share(_rate_of(pool, rate), len(pool.order)), pool.most)
            for pool in pools
        ]
    plan = _make_plan(pools, removed)
    if not plan.keep:
        warnings.warn(
            "the plan removes nothing: too low a rate, or no scores", stacklevel=2
        )
    return plan


def count_share(rate: float, size: int) -> int:
    """floor(rate * size), by the decimal that `rate` is written as.

    In floats .58 * 50 is 28.999...: what rounding alone keeps from an integer is one.
    """
    return math.floor(rate * size + 1e-9)


@dataclass(frozen=True)
class _Pool:
    """Units ranked against one another: `order` [steps, blocks], lowest score first.

    One step removes one unit of every block. `ranks` holds the score of each step.
    """

    group: Group
    layers: tuple[str, ...]
    order: Tensor
    ranks: Tensor
    scatter: bool

    @property
    def most(self) -> int:
        return len(self.order) - 1


def _make_pools(graph: Graph, scores: Scores, residual: str) -> list[_Pool]:
    pools: list[_Pool] = []
    refused: list[str] = []
    for group in graph.groups:
        scored = [n for n in group.layers if n in scores]
        alone = [n for n in scored if n in group.scatterable and residual == "scatter"]
        if residual == "keep" and group.joined:
            continue
        if scored and group.fixed:
            refused.append(f"{', '.join(scored)}: {group.fixed}")
        elif residual == "scatter" and group.joined and len(alone) < len(scored):
            rest = ", ".join(n for n in scored if n not in alone)
            refused.append(
                f"{rest}: cannot be scattered, something other than its own BatchNorm "
                "stands between it and the addition"
            )
        elif alone:
            pools += [
                _make_pool(graph, group, (n,), scores, scatter=True) for n in alone
            ]
        elif scored:
            pools.append(_make_pool(graph, group, tuple(scored), scores, scatter=False))
    if refused:
        raise ValueError(
            "these layers cannot be pruned safely; leave them out of the scores to "
            "keep them whole. " + "; ".join(refused)
        )
    return pools


def _make_pool(
    graph: Graph, group: Group, names: tuple[str, ...], scores: Scores, *, scatter: bool
) -> _Pool:
    total = torch.zeros(group.size, dtype=torch.float64)
    for name in names:
        values = scores[name].detach().to("cpu", torch.float64)
        total.index_add_(0, group.index[name], values)
    blocks: Iterable[Tensor] = group.unit_blocks
    if scatter:  # alone, so only its own convolution's groups count
        blocks = group.index[names[0]].chunk(graph.layers[names[0]].groups)
    order = torch.stack(
        [b[torch.sort(total[b], stable=True).indices] for b in blocks], 1
    )
    return _Pool(group, names, order, total[order].sum(1), scatter)


def _rate_of(pool: _Pool, rate: Rate | None) -> float:
    if not isinstance(rate, Mapping):
        return rate or 0.0
    given = {rate[n] for n in pool.layers if n in rate}
    if len(given) > 1:
        raise ValueError(f"tied layers need one rate: {', '.join(pool.layers)}")
    return given.pop() if given else 0.0


def _global_order(pools: list[_Pool]) -> list[int]:
    """Pools in the order in which a rising threshold removes their next step."""
    entries = [(float(r), i) for i, p in enumerate(pools) for r in p.ranks[: p.most]]
    return [i for _, i in sorted(entries, key=lambda e: e[0])]


def _share_order(pools: list[_Pool]) -> list[int]:
    """The same for a rising uniform rate."""
    entries = [
        ((k + 1) / len(p.order), i) for i, p in enumerate(pools) for k in range(p.most)
    ]
    return [i for _, i in sorted(entries, key=lambda e: e[0])]


def _lowest(order: list[int], pools: list[_Pool], rate: float) -> list[int]:
    """Steps removed per pool when `rate` of all channels go, in `order`."""
    goal = count_share(rate, sum(p.order.numel() for p in pools))
    removed, gone = [0] * len(pools), 0
    for i in order:
        if gone + pools[i].order.shape[1] > goal:
            break
        removed[i] += 1
        gone += pools[i].order.shape[1]
    return removed


def _meet_macs(
    graph: Graph, pools: list[_Pool], share: float, scope: str, other: int
) -> list[int]:
    """Remove steps in order until MACs are within 1 % of `share` of the full count.

    `other` counts the MACs that no layer here owns (functional convolutions).
    """
    order = _global_order(pools) if scope == "global" else _share_order(pools)

    def macs_of(counts: list[int]) -> int:
        return other + _macs_of(graph, pools, counts)

    full = macs_of([0] * len(pools))
    goal, tolerance = share * full, 0.01 * share * full
    low, high = 0, len(order)
    while low < high:  # the longest prefix that stays at or above the goal
        middle = (low + high + 1) // 2
        above = macs_of(_tally(order[:middle], pools)) >= goal
        low, high = (middle, high) if above else (low, middle - 1)
    removed = _tally(order[:low], pools)
    for i in order[low : low + 256]:  # finer: skip steps that would overshoot
        if macs_of(removed) <= goal + tolerance:
            break
        trial = [n + (j == i) for j, n in enumerate(removed)]
        if macs_of(trial) >= goal - tolerance:
            removed = trial
    reached = macs_of(removed) / full
    if abs(reached - share) > 0.01 * share:
        least = macs_of([p.most for p in pools]) / full
        raise ValueError(
            f"macs={share:g} cannot be met within 1 %: the nearest is {reached:.4f}, "
            f"the least these scores allow is {least:.4f} of the MACs"
        )
    return removed


def _tally(order: list[int], pools: list[_Pool]) -> list[int]:
    counts = torch.bincount(torch.tensor(order, dtype=torch.long), minlength=len(pools))
    return counts.tolist()


def _macs_of(graph: Graph, pools: list[_Pool], removed: list[int]) -> int:
    kept = resolve(graph, _make_plan(pools, removed), check=False)
    return graph.count_macs(kept.rows, kept.units)


def _make_plan(pools: list[_Pool], removed: list[int]) -> Plan:
    keep: dict[str, list[int]] = {}
    scatter: set[str] = set()
    for pool, count in zip(pools, removed, strict=True):
        if count == 0:
            continue
        alive = torch.ones(pool.group.size, dtype=torch.bool)
        alive[pool.order[:count].flatten()] = False
        for name in pool.layers if pool.scatter else pool.group.layers:
            index = pool.group.index[name]
            keep[name] = torch.nonzero(alive[index]).flatten().tolist()
            if pool.scatter:
                scatter.add(name)
    return Plan(keep=keep, scatter=scatter)


def _check_request(
    rate: Rate | None, macs: float | None, scope: str, residual: str
) -> None:
    check_choice("scope", scope, ("layer", "global"))
    check_choice("residual", residual, ("tie", "scatter", "keep"))
    if (rate is None) == (macs is None):
        raise ValueError("give either rate (share removed) or macs (share kept)")
    if isinstance(rate, Mapping) and scope == "global":
        raise ValueError("scope='global' takes one rate, not one per layer")
    rates = rate if isinstance(rate, Mapping) else {"rate": rate or 0.0}
    for name, value in rates.items():
        if not math.isfinite(value) or not 0 <= value < 1:
            raise ValueError(f"{name}: the rate must lie in [0, 1), got {value}")
    if macs is not None and not 0 < macs <= 1:
        raise ValueError(f"macs is the share of MACs to keep, in (0, 1], got {macs}")


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


def _check_scores(graph: Graph, scores: Scores, model: nn.Module) -> None:
    for name, values in scores.items():
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
