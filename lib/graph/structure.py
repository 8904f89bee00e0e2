"""What a trace means for pruning: which channels stand or fall together, and why.

A *unit* is the smallest thing that can be removed: one output channel of a layer with
all the channels tied to it. A *group* is the layers that share units, e.g. every
convolution that writes into one residual stream.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from lib.graph.trace import Layer, Node, Trace, trace

RELUS = {"relu", "relu_"}


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose output channels are tied.

    `layers` are names of modules in forward order, `size` the number of units, `index`
    the unit of every output channel of each layer (int64), `blocks` the block of every
    unit: a grouped convolution needs as many kept units in each block. `joined` lists
    the layers that feed an addition themselves, `scatterable` those among them whose
    outputs can be written back full-width before it. `fixed` says why the group cannot
    be pruned (None where it can).
    """

    layers: tuple[str, ...]
    size: int
    index: dict[str, Tensor]
    blocks: Tensor
    joined: frozenset[str]
    scatterable: frozenset[str]
    fixed: str | None

    @property
    def unit_blocks(self) -> list[Tensor]:
        """The units of each block, in order."""
        return [torch.nonzero(self.blocks == b).flatten() for b in self.blocks.unique()]


class Graph:
    """A traced network: operations, layers, units and groups. Built by `build_graph`.

    `layers` maps names to what each convolution and linear layer reads and makes (as
    tags), `norms`, `vectors`, `moves` and `shuffles` the same for everything else
    with a size, `pairs` each layer with the BatchNorm that alone reads it; `unit_of`
    maps tags to units, the last unit stands for constants and is always kept.
    `has_other_work` says whether the pass has MACs outside of `layers`.
    """

    def __init__(self, record: Trace):
        self.nodes: list[Node] = record.nodes
        self.values = record.values
        self.layers: dict[str, Layer] = record.layers
        self.norms = record.norms
        self.vectors = record.ledger.vectors
        self.moves = record.moves
        self.shuffles = record.shuffles
        self.calls = record.calls
        self.has_other_work = record.has_other_work
        self.num_tags = record.ledger.count
        self.pairs: dict[str, str] = self._find_pairs()
        self._units, self.num_units = _components(
            record.ledger.count, record.ledger.ties
        )
        self._reasons = self._read_reasons(record)
        self._joined = self._mark(record, record.ledger.added)
        self._bound = self._mark(record, record.ledger.bound)
        self.followers = frozenset(n for n, x in self.layers.items() if x.depthwise)
        self.groups: list[Group] = self._make_groups()
        self.group_of = {name: group for group in self.groups for name in group.layers}

    # -- units ---------------------------------------------------------------------

    def unit_of(self, tags: Tensor) -> Tensor:
        """The unit of each tag; constants get the extra, always kept, last unit."""
        return self._units[tags]

    def _mark(self, record: Trace, rows: list[Tensor]) -> Tensor:
        marks = torch.zeros(record.ledger.count, dtype=torch.bool)
        for row in rows:
            marks[row] = True
        return marks

    def _read_reasons(self, record: Trace) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for tags, reason in record.ledger.frozen:
            for unit in self.unit_of(tags).tolist():
                reasons.setdefault(unit, reason)
        return reasons

    # -- groups --------------------------------------------------------------------

    def _make_groups(self) -> list[Group]:
        rows = {name: self.unit_of(x.outputs) for name, x in self.layers.items()}
        names = list(rows)
        edges = [
            torch.stack([torch.full_like(row, i), row + len(names)])
            for i, row in enumerate(rows.values())
        ]
        member, _ = _components(len(names) + self.num_units, edges)
        members = defaultdict(list)
        for i, name in enumerate(names):
            members[int(member[i])].append(name)
        self._fix_mixed_groups(member[len(names) :])
        blocks = self._read_blocks()
        return [self._make_group(names, rows, blocks) for names in members.values()]

    def _fix_mixed_groups(self, member: Tensor) -> None:
        """A grouped convolution that reads a concatenation balances several layers."""
        for name, layer in self.layers.items():
            if layer.groups == 1 or layer.depthwise:
                continue
            units = self.unit_of(layer.inputs)
            units = units[units < self.num_units]
            if len(member[units].unique()) > 1:
                reason = f"'{name}' is grouped and reads them together with others"
                for unit in units.tolist():
                    self._reasons.setdefault(unit, reason)

    def _make_group(self, names: list[str], rows, blocks) -> Group:
        units = torch.unique(torch.cat([rows[n] for n in names]))
        first = rows[max(names, key=lambda n: len(rows[n].unique()))]
        if len(first) == len(units):  # keep the channel order of the widest layer
            units = first
        place = torch.full((self.num_units,), -1)
        place[units] = torch.arange(len(units))
        fixed = next(
            (self._reasons[u] for u in units.tolist() if u in self._reasons), None
        )
        partition, clash = _meet_blocks(
            units, [b[units] for b in blocks if (b[units] >= 0).any()]
        )
        return Group(
            layers=tuple(names),
            size=len(units),
            index={n: place[rows[n]] for n in names},
            blocks=partition,
            joined=frozenset(n for n in names if self._feeds_addition(n)),
            scatterable=frozenset(n for n in names if self._is_scatterable(n)),
            fixed=fixed or clash,
        )

    def _feeds_addition(self, name: str) -> bool:
        return bool(self._joined[self.layers[name].outputs].any())

    def _is_scatterable(self, name: str) -> bool:
        """Between it and the addition there is at most its own BatchNorm."""
        tags = self.layers[name].outputs
        if not self._feeds_addition(name) or bool(self._bound[tags].any()):
            return False
        pair = self.pairs.get(name)
        return not any(
            bool(torch.isin(row, tags).any())
            for norm, row in self.norms.items()
            if norm != pair
        )

    def _read_blocks(self) -> list[Tensor]:
        """For each side of each grouped convolution: the block of every unit, or -1."""
        found = []
        for layer in self.layers.values():
            if layer.groups == 1 or layer.depthwise:
                continue
            for tags in (layer.inputs, layer.outputs):
                block = torch.full((self.num_units + 1,), -1)
                number = torch.arange(layer.groups)
                block[self.unit_of(tags)] = number.repeat_interleave(
                    len(tags) // layer.groups
                )
                found.append(block)
        return found

    # -- pairs, blocks, cost -------------------------------------------------------

    def _find_pairs(self) -> dict[str, str]:
        """Each convolution or linear layer with the BatchNorm that alone reads it."""
        readers = defaultdict(list)
        for node in self.nodes:
            for value in node.inputs:
                readers[value].append(node)
        pairs = {}
        for node in self.nodes:
            if node.module in self.layers and node.outputs:
                after = readers[node.outputs[0]]
                if len(after) == 1 and after[0].op.startswith("BatchNorm"):
                    pairs[node.module] = after[0].module
        return pairs

    def count_macs(self, rows: dict[str, Tensor], alive: Tensor) -> int:
        """MACs for kept output rows (bool per layer) and kept units (bool per unit)."""
        total = 0
        for name, layer in self.layers.items():
            if name in rows:
                inputs = int(alive[self.unit_of(layer.inputs)].sum())
                work = layer.count_work(inputs, int(rows[name].sum()))
                total += work * sum(layer.positions)
        return total


def build_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> Graph:
    """Trace `model` once at `input_shape` (C, H, W) on the meta device.

    The model, its parameters and its train/eval mode are left as found. Nothing is
    remembered: build it once at the entry of a task and hand it down.
    """
    return Graph(trace(model, input_shape))


def droppable_blocks(graph: Graph, model: nn.Module) -> list[str]:
    """Modules that can become the identity: residual blocks and dense layers.

    The module's output must be its input, channel by channel, plus channels that it
    adds (a dense layer's) or sums up with it (a residual branch).
    """
    inner = {name for name, module in model.named_modules() if any(module.children())}
    return [name for name in graph.calls if name in inner and _is_residual(graph, name)]


def dropped_units(graph: Graph, block: str) -> Tensor:
    """The units that vanish with `block`: those it hands on but does not read."""
    source, target = (graph.values[v] for v in graph.calls[block])
    before, after = graph.unit_of(source.tags), graph.unit_of(target.tags)
    return after[~torch.isin(after, before)].unique()


def _is_residual(graph: Graph, block: str) -> bool:
    source, target = (graph.values[v] for v in graph.calls[block])
    if source.tags is None or source.shape[2:] != target.shape[2:]:
        return False
    if len(source.shape) != len(target.shape):
        return False
    before = graph.unit_of(source.tags).flatten()
    after = graph.unit_of(target.tags).flatten()
    kept = after[torch.isin(after, before)]
    return torch.equal(kept, before) and _carries_input(graph, block)


def _carries_input(graph: Graph, block: str) -> bool:
    """The block's output is its input plus (or beside) something, and nothing more.

    A ReLU may follow where the input went through one as well: it changes nothing then.
    """
    source, target = graph.calls[block]
    made_by = {value: node for node in graph.nodes for value in node.outputs}
    last = made_by.get(target)
    if last is not None and last.op in RELUS:
        first = made_by.get(source)
        if first is None or first.op not in RELUS:
            return False
        last = made_by.get(last.inputs[0])
    if last is None or last.module != block or last.inputs.count(source) != 1:
        return False
    if last.op == "cat":
        return True
    plain = len(last.inputs) == 2 and last.kwargs.get("alpha", 1) == 1
    return last.op in {"add", "add_"} and plain


def _components(count: int, pairs: list[Tensor]) -> tuple[Tensor, int]:
    """Component of each of `count` items under `pairs` [2, n]; one extra slot at -1."""
    edges = torch.cat([torch.empty(2, 0, dtype=torch.long), *pairs], 1).numpy()
    ones = torch.ones(edges.shape[1]).numpy()
    matrix = coo_array((ones, (edges[0], edges[1])), shape=(count, count))
    number, found = connected_components(matrix, directed=False)
    extra = torch.tensor([number])
    return torch.cat([torch.from_numpy(found).long(), extra]), number


def _meet_blocks(units: Tensor, partitions: list[Tensor]) -> tuple[Tensor, str | None]:
    """The common refinement of several partitions of the units into equal blocks."""
    if not partitions:
        return torch.zeros(len(units), dtype=torch.long), None
    _, blocks = torch.stack(partitions, 1).unique(dim=0, return_inverse=True)
    sizes = torch.bincount(blocks)
    clash = (
        None
        if bool((sizes == sizes[0]).all())
        else ("grouped convolutions divide these channels in ways that do not fit")
    )
    return blocks, clash
