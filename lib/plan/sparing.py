"""What every plan leaves: one channel of each layer, of parts of a stream too."""

import numpy as np
import torch
from torch import Tensor

from lib.graph import Graph


def find_partial(graph: Graph) -> list[list[Tensor]]:
    """For each group the sets of units of which one must stay.

    Those of layers that write or read only some of the units (of a stream that is
    split); any other layer keeps something as long as the group does.
    """
    owner, place = np.full((2, graph.num_units + 1), -1)
    for number, group in enumerate(graph.groups):
        for name in group.layers:
            owner[graph.rows[name]] = number
            place[graph.rows[name]] = group.index[name]
    found: list[list[Tensor]] = [[] for _ in graph.groups]
    for row in (*graph.rows.values(), *graph.columns.values()):
        units = row.numpy()
        number = int(owner[units[0]]) if len(units) else -1
        if number >= 0 and (owner[units] == number).all():
            part = np.zeros(graph.groups[number].size, dtype=bool)
            part[place[units]] = True
            if not part.all():
                found[number].append(torch.from_numpy(part.nonzero()[0]))
    return found


def spare(
    blocks: list[Tensor], partial: list[Tensor], size: int
) -> tuple[list[Tensor], int]:
    """The order with the best unit of every part at the end, and how many stay."""
    if not partial:
        return blocks, 1
    rank = torch.empty(size, dtype=torch.long)
    for block in blocks:
        rank[block] = torch.arange(len(block))
    spared = torch.zeros(size, dtype=torch.bool)
    for part in partial:
        spared[part[rank[part].argmax()]] = True
    blocks = [torch.cat([b[~spared[b]], b[spared[b]]]) for b in blocks]
    return blocks, max(1, *(int(spared[b].sum()) for b in blocks))
