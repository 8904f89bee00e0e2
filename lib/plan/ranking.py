"""From scores to a plan: by rate, by global threshold, or to a MAC target."""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.graph import Graph, Group, build_graph, list_prunable
from lib.messages import check_choice
from lib.plan.record import Plan
from lib.plan.requests import (
    Rate,
    Scores,
    Timetable,
    check_rates,
    check_scores,
    check_target,
)
from lib.plan.resolving import resolve
from lib.plan.sparing import find_partial, spare
from lib.plan.targets import meet
from lib.settings import CHW, check_int


def from_scores(
    model: nn.Module,
    scores: Scores,
    input_shape: CHW,
    *,
    rate: Rate | None = None,
    macs: float | None = None,
    latency: float | None = None,
    table: Timetable | None = None,
    scope: str = "layer",
    residual: str = "tie",
    multiple: int = 1,
    skip_fixed: bool = False,
    graph: Graph | None = None,
) -> Plan:
    """Keep the channels with the highest scores.

    `scores[layer]` is a float tensor [output channels]; layers without a score stay
    whole. Exactly one of `rate` (share of channels removed; one number, or one per
    layer), `macs` (share of MACs kept, met within 1 %) and `latency` (share kept of the
    milliseconds that `table` foresees, a `lib.latency.Table`, met within 5 %; see
    `lib.latency.meet` for what the clock says) is given. `scope="layer"` removes the
    same share everywhere: the `floor(rate * C)` lowest of each layer, with `rate` as it
    is written (.58 of 50 is 29), equal scores from the lower index on, at least one
    kept, as many in every group of a grouped convolution; "global" ranks all together.

    `residual` decides about layers that feed an addition: "tie" prunes them together
    (score = sum over the scored members), "scatter" each on its own, written back
    full-width (Tang et al. 2020), "keep" leaves them whole.

    With `multiple` every layer keeps a multiple of so many channels, or all of them:
    the nearest to its share, at least one multiple. (Kernels work on 8 or 16 channels
    at a time, so that a layer with 39 costs as much as one with 40 or 48.)

    Raises `ValueError` for scores that fit no layer, are not finite or belong to fixed
    channels; with `skip_fixed` such layers stay whole, and a warning says how many and
    why (`surgery.prunable` lists all). Warns when nothing is removed. `graph`: that of
    `build_graph(model, input_shape)`, if known. In steps: notebooks/02_surgery.ipynb.
    """
    check_choice("scope", scope, ("layer", "global"))
    check_choice("residual", residual, ("tie", "scatter", "keep"))
    check_int("multiple", multiple, 1)
    check_target(rate, macs, latency, table)
    check_rates(rate, scores, scope)
    graph = graph or build_graph(model, input_shape)
    if skip_fixed:  # before the scores are checked: what stays whole may be anything
        scores = _leave_fixed(graph, scores, model, residual)
    check_scores(graph, scores, model)
    pools = _make_pools(graph, scores, residual, multiple)
    if rate is not None:
        removed = _meet_rate(pools, rate, scope)
    else:
        cost_of = _make_cost(graph, pools, table)
        removed = _meet_share(pools, macs, latency, scope, cost_of)
    plan = _make_plan(pools, removed)
    if not plan.keep:
        reason = "too low a rate, or no scores"
        warnings.warn(f"the plan removes nothing: {reason}", stacklevel=2)
    return plan


def _make_cost(
    graph: Graph, pools: list["_Pool"], table: Timetable | None
) -> Callable[[list[int]], float]:
    """What a plan costs by the steps removed per pool: MACs, or a table's time."""

    def cost_of(counts: list[int]) -> float:
        kept = resolve(graph, _make_plan(pools, counts), check=False)
        if table is not None:
            return table(graph, kept)
        return other + graph.count_macs(kept.rows, kept.units)

    other = 0  # MACs that no layer owns, those of functional convolutions
    if table is None:
        other = graph.record.macs - int(cost_of([0] * len(pools)))
    return cost_of


def _meet_rate(pools: list["_Pool"], rate: Rate, scope: str) -> list[int]:
    """Steps removed per pool for a share of the channels."""
    if scope == "global" and not isinstance(rate, Mapping):
        return _lowest(_order_steps(pools, scope), pools, rate)
    return [pool.round(_rate_of(pool, rate)) for pool in pools]


def count_share(rate: float, size: int) -> int:
    """floor(rate * size), by the decimal that `rate` is written as.

    In floats .58 * 50 is 28.999...: what rounding alone keeps from an integer is one.
    """
    return math.floor(rate * size + 1e-9)


@dataclass(frozen=True)
class _Pool:
    """Units ranked against one another: `order` [ranks, blocks], in which they go.

    One rank is one unit of every block; `scores` holds the score of each. `stops` are
    the numbers of ranks that may go, from 0 on: a step leads from one to the next.
    """

    group: Group
    layers: tuple[str, ...]
    order: Tensor
    scores: list[float]
    stops: list[int]
    scatter: bool
    multiple: int

    @property
    def most(self) -> int:
        """The steps that can be removed."""
        return len(self.stops) - 1

    def round(self, rate: float) -> int:
        """Steps that remove `rate`: down, or to the multiple that is nearest."""
        ranks = len(self.order)
        if self.multiple == 1:
            return min(count_share(rate, ranks), self.most)
        ends = enumerate(self.stops)
        return min(ends, key=lambda end: (abs(end[1] - rate * ranks), end[0]))[0]


def _make_pools(
    graph: Graph, scores: Scores, residual: str, multiple: int = 1
) -> list[_Pool]:
    refused = _find_refused(graph, scores, residual)
    if refused:
        raise ValueError(
            "these layers cannot be pruned safely; leave them out of the scores, or "
            "give skip_fixed=True, to keep them whole. " + _say_each(refused)
        )
    partial = dict(zip(graph.groups, find_partial(graph), strict=True))
    pools = [
        _make_pool(graph, group, members, scores, multiple, partial[group], alone)
        for group, names, alone in _list_scored(graph, scores, residual)
        for members in ([(name,) for name in names] if alone else [names])
    ]
    if multiple > 1 and pools and not any(pool.most for pool in pools):
        raise ValueError(
            f"multiple={multiple}: no layer with scores can keep a smaller multiple of "
            f"{multiple} channels; give a smaller one"
        )
    return pools


def _list_scored(
    graph: Graph, scores: Scores, residual: str
) -> Iterator[tuple[Group, tuple[str, ...], bool]]:
    """Groups to prune, with their scored layers, and whether each goes by itself."""
    for group in graph.groups:
        names = tuple(name for name in group.layers if name in scores)
        if names and not (residual == "keep" and group.joined):
            yield group, names, residual == "scatter" and bool(group.joined)


def _find_refused(graph: Graph, scores: Scores, residual: str) -> dict[str, str]:
    """The scored layers that cannot be pruned, with the reason."""
    refused: dict[str, str] = {}
    for group, names, alone in _list_scored(graph, scores, residual):
        for name in names:
            if group.fixed:
                refused[name] = group.fixed
            elif alone and name not in group.scatterable:
                refused[name] = (
                    "cannot be scattered, something other than its own BatchNorm "
                    "stands between it and the addition"
                )
    return refused


def _leave_fixed(
    graph: Graph, scores: Scores, model: nn.Module, residual: str
) -> Scores:
    """The scores of what can be pruned; a warning tells of the others.

    A misspelt name is not among those, so that it is refused afterwards.
    """
    known = list_prunable(graph, model)
    left = {n: str(known[n]) for n in scores if known.get(n) is not None}
    left |= _find_refused(graph, scores, residual)
    if left:
        warnings.warn(_say_left(left), stacklevel=3)
    return {name: score for name, score in scores.items() if name not in left}


def _say_each(reasons: dict[str, str]) -> str:
    """Layers with the same reason stand together."""
    together: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        together.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(n)}: {reason}" for reason, n in together.items())


def _say_left(left: dict[str, str]) -> str:
    """One line on the layers that stay whole, the commonest reason first."""
    reasons = Counter(left.values()).most_common()
    reason, count = reasons[0]
    example = next(name for name in left if left[name] == reason)
    more = f"; {len(reasons) - 1} more reasons" if len(reasons) > 1 else ""
    return (
        f"{len(left)} scored layers stay whole (e.g. {count} as '{example}': {reason}"
        f"{more}); surgery.prunable(model, input_shape) lists them"
    )


def _make_pool(
    graph: Graph,
    group: Group,
    names: tuple[str, ...],
    scores: Scores,
    multiple: int,
    parts: list[Tensor],
    scatter: bool,
) -> _Pool:
    # In float64: sums of half precision overflow, and round until scores are equal.
    total = torch.zeros(group.size, dtype=torch.float64)
    for name in names:
        values = scores[name].detach().to("cpu", torch.float64)
        total.index_add_(0, group.index[name], values)
    blocks = group.unit_blocks
    if scatter:  # alone, so only its own convolution's groups count
        blocks = list(group.index[names[0]].chunk(graph.layers[names[0]].groups))
    # Stable, so that of equal scores the lower index goes, on every machine.
    blocks = [b[torch.sort(total[b], stable=True).indices] for b in blocks]
    if multiple == 1:
        blocks, spared = spare(blocks, [] if scatter else parts, group.size)
        order = torch.stack(blocks, 1)
        stops = list(range(len(order) - spared + 1))
    else:
        written = names if scatter else group.layers
        order, stops = _order_in_multiples(group, blocks, written, multiple)
    worth = total[order].sum(1).tolist()
    return _Pool(group, names, order, worth, stops, scatter, multiple)


def _order_in_multiples(
    group: Group, blocks: list[Tensor], layers: tuple[str, ...], multiple: int
) -> tuple[Tensor, list[int]]:
    """Ranks [n, blocks] and the stops at which every layer keeps a multiple.

    Where a narrow layer shares units with a wide one, both are multiples if each cell,
    the units that the same layers have, is one in all of them. The first step brings
    every cell there, each later one takes a multiple from one cell, evenly over cells.
    """
    counts = [torch.bincount(group.index[n], minlength=group.size) for n in layers]
    cells, cell_of = torch.unique(torch.stack(counts, 1), dim=0, return_inverse=True)
    first, later, last = [], [], []
    left = torch.zeros(len(layers), dtype=torch.long)
    for i, cell in enumerate(cells):
        rows = [block[cell_of[block] == i] for block in blocks]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"multiple={multiple}: {', '.join(layers)} divide the blocks of a "
                "grouped convolution unevenly; leave them out of the scores"
            )
        sizes = [int(n) * len(blocks) for n in cell if n]
        stride = math.lcm(*(multiple // math.gcd(multiple, size) for size in sizes))
        ranks, ends = torch.stack(rows, 1), len(rows[0])
        first.append(ranks[: ends % stride])
        for start in range(ends % stride, ends - stride, stride):
            step = ranks[start : start + stride]
            later.append(((start + stride) / ends, step))
        last.append(ranks[ends - stride :] if ends >= stride else ranks[:0])
        left += cell * len(last[-1])
    later.sort(key=lambda entry: entry[0])
    steps = [torch.cat(first), *(step for _, step in later)]
    stops = [0, *itertools.accumulate(len(step) for step in steps)]
    if not bool(left.all()):  # a layer would lose all that it has
        stops = [0]
    return torch.cat([*steps, *last]), sorted(set(stops))


def _rate_of(pool: _Pool, rate: Rate) -> float:
    if not isinstance(rate, Mapping):
        return rate
    given = {rate[n] for n in pool.layers if n in rate}
    if len(given) > 1:
        raise ValueError(f"tied layers need one rate: {', '.join(pool.layers)}")
    return given.pop() if given else 0.0


def _order_steps(pools: list[_Pool], scope: str) -> list[int]:
    """Pools in the order in which they lose their next step.

    "global": as a rising threshold removes them, "layer": as a rising uniform rate.
    """

    def place(pool: _Pool, start: int, stop: int) -> float:
        if scope == "global":
            return sum(pool.scores[start:stop]) / (stop - start)
        return stop / len(pool.order)

    entries = [
        (place(pool, *step), i)
        for i, pool in enumerate(pools)
        for step in itertools.pairwise(pool.stops)
    ]
    # By the place alone and stably: of equals the earlier layer goes first.
    return [i for _, i in sorted(entries, key=lambda entry: entry[0])]


def _lowest(order: list[int], pools: list[_Pool], rate: float) -> list[int]:
    """Steps removed per pool when `rate` of all channels go, in `order`."""
    goal = count_share(rate, sum(p.order.numel() for p in pools))
    removed, gone = [0] * len(pools), 0
    for i in order:
        now, then = pools[i].stops[removed[i] : removed[i] + 2]
        units = (then - now) * pools[i].order.shape[1]
        if gone + units > goal:  # no later step instead: a threshold lets none pass
            break
        removed[i] += 1
        gone += units
    return removed


def _meet_share(
    pools: list[_Pool],
    macs: float | None,
    latency: float | None,
    scope: str,
    cost_of: Callable[[list[int]], float],
) -> list[int]:
    """Remove steps in order until the cost is near its share of the full one."""
    order = _order_steps(pools, scope)
    name, share, near, unit = "macs", macs or 0.0, 0.01, "MACs"
    if latency is not None:
        name, share, near, unit = "latency", latency, 0.02, "time in the table"
    most = [p.most for p in pools]
    full = cost_of([0] * len(pools))
    removed, found = meet(order, most, share * full, cost_of, tolerance=near)
    # Time goes in steps: a plan within 5 % is taken where the search finds no nearer.
    near = 0.05 if name == "latency" else near
    if abs(found / full - share) > near * share:
        least = cost_of(most) / full
        raise ValueError(
            f"{name}={share:g} cannot be met within {near:.0%}: the nearest is "
            f"{found / full:.4f}, the least these scores allow is {least:.4f} of the "
            f"{unit}"
        )
    return removed


def _make_plan(pools: list[_Pool], removed: list[int]) -> Plan:
    # Every layer of a group is written down, also those without scores: a plan says
    # what it means without the network at hand, and `resolve` can check the ties.
    keep: dict[str, list[int]] = {}
    scatter: set[str] = set()
    for pool, count in zip(pools, removed, strict=True):
        if count == 0:
            continue
        alive = torch.ones(pool.group.size, dtype=torch.bool)
        alive[pool.order[: pool.stops[count]].flatten()] = False
        for name in pool.layers if pool.scatter else pool.group.layers:
            index = pool.group.index[name]
            keep[name] = torch.nonzero(alive[index]).flatten().tolist()
            if pool.scatter:
                scatter.add(name)
    return Plan(keep=keep, scatter=scatter)
