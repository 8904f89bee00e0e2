"""Meeting a target: how many steps go from each pool until a cost is met."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

Counts = list[int]
FINER = 256  # steps behind the longest prefix that are tried one by one
ROUNDS, TRIED = 6, 48  # of exchanging one or two steps, and exchanges tried in each


def meet(
    order: Sequence[int],
    most: Sequence[int],
    goal: float,
    cost: Callable[[Counts], float],
    *,
    tolerance: float = 0.01,
) -> tuple[Counts, float]:
    """Steps removed per pool, and the cost there, as near to `goal` as was found.

    `order` lists pools in the order in which they lose their next step, at most `most`
    each; `cost` of the counts, in the unit of `goal`, should not grow as a count does.
    The search ends at the first cost within `tolerance` (relative): the longest prefix
    of the order, then later steps that do not overshoot, then exchanges of up to two
    steps, which matter where steps are coarse.
    """
    known: dict[tuple[int, ...], float] = {}  # a cost is asked twice, and takes long

    def ask(counts: Counts) -> float:
        key = tuple(counts)
        if key not in known:
            known[key] = cost(counts)
        return known[key]

    low, high = 0, len(order)
    while low < high:  # the longest prefix that stays at or above the goal
        middle = (low + high + 1) // 2
        above = ask(tally(order[:middle], len(most))) >= goal
        low, high = (middle, high) if above else (low, middle - 1)
    removed = tally(order[:low], len(most))
    for i in order[low : low + FINER]:  # finer: skip steps that would overshoot
        if ask(removed) <= goal * (1 + tolerance):
            break
        trial = _move(removed, [(i, 1)])
        if ask(trial) >= goal * (1 - tolerance):
            removed = trial
    for _ in range(ROUNDS):
        if abs(ask(removed) - goal) <= tolerance * goal:
            break
        nearer = _exchange(removed, most, goal, ask, tolerance)
        if nearer == removed:
            break
        removed = nearer
    return removed, ask(removed)


def _exchange(
    removed: Counts,
    most: Sequence[int],
    goal: float,
    ask: Callable[[Counts], float],
    tolerance: float,
) -> Counts:
    """The nearest to the goal of what one or two steps more or fewer make."""
    now = ask(removed)
    steps = [
        (i, step)
        for i, count in enumerate(removed)
        for step in (-1, 1)
        if 0 <= count + step <= most[i]
    ]
    change = {move: ask(_move(removed, [move])) - now for move in steps}
    trials = [[move] for move in steps]
    trials += [[a, b] for a, b in itertools.combinations(steps, 2) if a[0] != b[0]]
    # Two steps change the cost by about the sum of what each does.
    trials.sort(key=lambda moves: abs(now + sum(change[m] for m in moves) - goal))
    best = removed
    for moves in trials[:TRIED]:
        trial = _move(removed, moves)
        if abs(ask(trial) - goal) < abs(ask(best) - goal):
            best = trial
        if abs(ask(best) - goal) <= tolerance * goal:
            break
    return best


def _move(removed: Counts, moves: list[tuple[int, int]]) -> Counts:
    counts = list(removed)
    for i, step in moves:
        counts[i] += step
    return counts


def tally(order: Sequence[int], pools: int) -> Counts:
    """How often each of so many pools is named in `order`."""
    found = Counter(order)
    return [found[i] for i in range(pools)]
