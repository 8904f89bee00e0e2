"""What a trace means for pruning: which channels stand or fall together, and why.

A *unit* is the smallest thing that can be removed: one output channel of a layer with
all the channels tied to it. A *group* is the layers that share units, e.g. every
convolution that writes into one residual stream.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from lib.graph.dry_run import DryRun, Node, run_dry
from lib.graph.leaves import LAYERS
from lib.graph.scattering import find_pairs, find_readers, writes_zeros
from lib.graph.tracing import Trace
from lib.settings import check_shape

RELUS = {"relu", "relu_"}
NONE = torch.empty(0, dtype=torch.long)


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

    @cached_property
    def unit_blocks(self) -> list[Tensor]:
        """The units of each block, in order."""
        if not bool(self.blocks.any()):
            return [torch.arange(self.size)]
        return [
            torch.nonzero(self.blocks == b).flatten() for b in torch.unique(self.blocks)
        ]


class Graph(Trace):
    """A traced network with its units and groups. Built by `build_graph`.

    `pairs` maps each layer to the BatchNorm that alone reads it, `readers` a value to
    the nodes that read it; `unit_of` maps tags to units, the last unit stands for
    constants and is always kept. `rows` and `columns` are the units of what each layer
    makes and reads, `frozen` marks those that must stay and `wide` those whose channels
    stay in the tensors between layers, silent (bool, one more for constants).
    """

    def __init__(self, record: DryRun):
        super().__init__(record)
        ledger = self.ledger
        self.vectors, self.num_tags = ledger.vectors, ledger.count
        self.readers = find_readers(self.nodes)
        self.pairs: dict[str, str] = find_pairs(self, self.readers)
        found, self.num_units = find_components(ledger.count, ledger.ties)
        # The tag of constants is -1, which as an index is the last place.
        self.units = torch.cat([found, torch.tensor([self.num_units])])
        self.rows = {n: self.unit_of(x.outputs) for n, x in self.layers.items()}
        self.columns = {n: self.unit_of(x.inputs) for n, x in self.layers.items()}
        self.wide = torch.zeros(self.num_units + 1, dtype=torch.bool)
        self.wide[self.unit_of(torch.cat([NONE, *ledger.wide]))] = True
        grouping = _Grouping(self)
        self.groups: list[Group] = grouping.groups
        self.frozen = grouping.reason_of >= 0
        self.group_of = {name: group for group in self.groups for name in group.layers}

    def unit_of(self, tags: Tensor) -> Tensor:
        """The unit of each tag; constants get the extra, always kept, last unit."""
        return self.units[tags]

    def count_macs(self, rows: dict[str, Tensor], alive: Tensor) -> int:
        """MACs for kept output rows (bool per layer) and kept units (bool per unit)."""
        total = 0
        for name, layer in self.layers.items():
            if name in rows:
                inputs = int(alive[self.columns[name]].sum())
                work = layer.count_work(inputs, int(rows[name].sum()))
                total += work * sum(layer.positions)
        return total


def build_graph(model: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """Trace `model` once at `input_shape` (C, H, W) on the meta device.

    The model, its parameters and its train/eval mode are left as found. Nothing is
    remembered: build it once at the entry of a task and hand it down.
    """
    return Graph(run_dry(model, check_shape(input_shape)))


def list_prunable(graph: Graph, model: nn.Module) -> dict[str, str | None]:
    """Every convolution and linear layer: None where it can be pruned, else why not."""
    ran = {name for node in graph.nodes for name in (node.module, *node.within)}
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if name in graph.group_of:
            found[name] = graph.group_of[name].fixed
        elif isinstance(module, LAYERS) and name in ran:
            kind = type(module).__name__
            found[name] = (
                f"'{name}' ({kind}) does not run as a plain convolution or linear "
                "layer, with its own weight as it is; fold what changes the weight "
                "into a plain nn.Conv2d or nn.Linear in its place"
            )
        elif isinstance(module, LAYERS):
            found[name] = "it does not run in evaluation at this input shape"
    return found


# -- groups ----------------------------------------------------------------------------


class _Grouping:
    """Sorts the layers of a graph into groups.

    `names` are the layers that have outputs, `units` those of all of them in a row, and
    `owners` the place in `names` of the layer that each comes from.
    """

    def __init__(self, graph: Graph):
        self.graph, rows = graph, graph.rows
        self.names = list(rows)
        self.units = torch.cat([NONE, *rows.values()])
        sizes = torch.tensor([len(row) for row in rows.values()], dtype=torch.long)
        self.owners = torch.arange(len(rows)).repeat_interleave(sizes)
        self.joined = self._find_joined()
        self.bound = self._mark(graph.ledger.bound)
        self.reasons = [reason for _, reason in graph.ledger.frozen]
        self.reason_of = self._find_reasons()
        self.strangers = self._find_strangers()
        self.place = torch.full((graph.num_units,), -1)
        self.groups = self._make_groups()

    def _mark(self, pairs: list[Tensor]) -> Tensor:
        marks = torch.zeros(self.graph.num_tags, dtype=torch.bool)
        for pair in pairs:
            marks[pair] = True
        return marks

    def _find_joined(self) -> set[str]:
        """The layers whose own outputs are tied by an addition."""
        outputs = [layer.outputs for layer in self.graph.layers.values()]
        joined = self._mark(self.graph.ledger.added)[torch.cat([NONE, *outputs])]
        return {self.names[i] for i in torch.unique(self.owners[joined]).tolist()}

    def _find_reasons(self) -> Tensor:
        """For each unit the position of the first reason to leave it alone, or -1."""
        found = torch.full((self.graph.num_units + 1,), -1)
        # The first reason is nearest to the cause; written last, it stands.
        for i, (tags, _) in reversed(list(enumerate(self.graph.ledger.frozen))):
            found[self.graph.unit_of(tags)] = i
        return found

    def _find_strangers(self) -> Tensor:
        """Is a tag read by other norms and the like than its own layer's BatchNorm?"""
        # A norm that is not the layer's own would shift the zeros written back for it.
        # A tag that norms read more often than layers' own norms do has such a reader.
        norms, places = self.graph.norms, self.graph.num_tags + 1
        own = [norms[x] for n, x in self.graph.pairs.items() if n in self.joined]
        count, expected = (  # constants share the last place
            torch.bincount(torch.cat([NONE, *rows]) % places, minlength=places)
            for rows in (norms.values(), own)
        )
        return count != expected

    def _make_groups(self) -> list[Group]:
        """Layers are in one group if a unit is in both, or through other layers."""
        # To join all layers that have a unit it takes one edge from each to the first.
        first = torch.full((self.graph.num_units,), len(self.names))
        first.scatter_reduce_(0, self.units, self.owners, "amin")
        edges = torch.stack([self.owners, first[self.units]])
        group_of, count = find_components(len(self.names), [edges])
        # Units without a layer (the images' channels) get the number behind the last.
        member = torch.cat([group_of, torch.tensor([count])])[first]
        sizes = torch.bincount(member, minlength=count).tolist()
        units = torch.split(member.argsort(stable=True), sizes)
        members: list[list[str]] = [[] for _ in range(count)]
        for name, number in zip(self.names, group_of.tolist(), strict=True):
            members[number].append(name)
        self._fix_mixed_groups(member)  # both add reasons, so before any group is made
        self._fix_wide_channels()
        blocks = self._read_blocks()
        pairs = zip(members, units[:count], strict=True)
        return [self._make_group(names, own, blocks) for names, own in pairs]

    def _fix_mixed_groups(self, member: Tensor) -> None:
        """A grouped convolution balances what it reads: many layers, or constants."""
        for name, layer in self.graph.layers.items():
            if not layer.grouped:
                continue
            columns = self.graph.columns[name]
            units = columns[columns < self.graph.num_units]
            if len(torch.unique(member[units])) > 1 or 0 < len(units) < len(columns):
                reason = f"'{name}' is grouped and reads them together with others"
                self._fix(units, reason)

    def _fix_wide_channels(self) -> None:
        """Layers can stand between a pick and a scatter; what mixes channels cannot."""
        graph = self.graph
        mixers = {
            name: [move.inputs, move.outputs]
            for name, move in (graph.moves | graph.shuffles | graph.mixes).items()
        }
        for name, layer in graph.layers.items():
            if not graph.is_whole(name):
                mixers[name] = [layer.inputs, layer.outputs]
        for name, rows in mixers.items():
            units = graph.unit_of(torch.cat(rows))
            self._fix(
                units[graph.wide[units]],
                f"{graph.record.locate(name)} reads or makes channels that code "
                "elsewhere picks by number",
            )

    def _fix(self, units: Tensor, reason: str) -> None:
        """These must stay, unless there is a reason already."""
        units = units[units < self.graph.num_units]
        free = units[self.reason_of[units] < 0]
        self.reason_of[free] = len(self.reasons)
        self.reasons.append(reason)

    def _read_blocks(self) -> list[Tensor]:
        """For each side of each grouped convolution: the block of every unit, or -1."""
        found = []
        for name, layer in self.graph.layers.items():
            if not layer.grouped:
                continue
            for units in (self.graph.columns[name], self.graph.rows[name]):
                block = torch.full((self.graph.num_units + 1,), -1)
                number = torch.arange(layer.groups)
                block[units] = number.repeat_interleave(len(units) // layer.groups)
                found.append(block)
        return found

    def _make_group(
        self, names: list[str], units: Tensor, blocks: list[Tensor]
    ) -> Group:
        rows, number = self.graph.rows, torch.arange(len(units))
        for name in names:  # channels of a layer that has every unit keep their order
            if len(rows[name]) == len(units):
                self.place[rows[name]] = number
                if torch.equal(self.place[rows[name]], number):  # none of them twice
                    units = rows[name]
                    break
        else:
            self.place[units] = number
        reasons = self.reason_of[units]
        reasons = reasons[reasons >= 0]
        joined = frozenset(self.joined.intersection(names))
        partition, clash = _meet_blocks(
            units, [b[units] for b in blocks if bool((b[units] >= 0).any())]
        )
        return Group(
            layers=tuple(names),
            size=len(units),
            index={n: self.place[rows[n]] for n in names},
            blocks=partition,
            joined=joined,
            scatterable=frozenset(n for n in joined if self._is_scatterable(n)),
            fixed=self.reasons[int(reasons.min())] if len(reasons) else clash,
        )

    def _is_scatterable(self, name: str) -> bool:
        """Between it and the addition is its own BatchNorm, and what keeps zeros."""
        graph, rows = self.graph, self.graph.rows[name]
        tags = graph.layers[name].outputs
        if bool((self.bound[tags] | self.strangers[tags]).any()):
            return False
        if len(torch.unique(rows)) < len(rows):  # its outputs are tied to one another
            return False
        return writes_zeros(graph, name)


def _meet_blocks(units: Tensor, partitions: list[Tensor]) -> tuple[Tensor, str | None]:
    """The common refinement of several partitions of the units into equal blocks."""
    # As many kept in each block of the refinement are as many in each of the coarser.
    if not partitions:
        return torch.zeros(len(units), dtype=torch.long), None
    _, blocks = torch.unique(torch.stack(partitions, 1), dim=0, return_inverse=True)
    sizes = torch.bincount(blocks)
    if bool((sizes == sizes[0]).all()):
        return blocks, None
    return blocks, "grouped convolutions divide these channels in ways that do not fit"


def find_components(count: int, edges: list[Tensor]) -> tuple[Tensor, int]:
    """Component of each of `count` items under `edges` [2, n], and how many there are.

    Components are numbered by their smallest members.
    """
    # Imported when needed: it takes as long as half of the import of torch.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = torch.cat([torch.empty(2, 0, dtype=torch.long), *edges], 1).numpy()
    matrix = coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(count, count))
    found, labels = connected_components(matrix, directed=False)
    return torch.from_numpy(labels).long(), found


# -- blocks that may go ----------------------------------------------------------------


def droppable_blocks(graph: Graph, model: nn.Module) -> list[str]:
    """Modules that can become the identity: residual blocks and dense layers.

    The module's output must be its input, channel by channel, plus channels that it
    adds (a dense layer's) or sums up with it (a residual branch).
    """
    inner = {name for name, module in model.named_modules() if any(module.children())}
    made_by = {value: node for node in graph.nodes for value in node.outputs}
    return [
        name
        for name in graph.calls
        if name in inner
        and _carries_input(graph, name, made_by)
        and _is_residual(graph, name)
        and not bool(graph.frozen[dropped_units(graph, name)].any())
    ]


def dropped_units(graph: Graph, block: str) -> Tensor:
    """The units that vanish with `block`: those it hands on but does not read."""
    before, after = block_units(graph, block)
    lost: Tensor = torch.unique(after[~torch.isin(after, before)])
    return lost


def block_units(graph: Graph, block: str) -> tuple[Tensor, Tensor]:
    """The units that a block reads and those that it hands on, in channel order."""
    source, target = (graph.values[v].tags for v in graph.calls[block])
    before, after = (NONE if x is None else x.flatten() for x in (source, target))
    return graph.unit_of(before), graph.unit_of(after)


def _is_residual(graph: Graph, block: str) -> bool:
    source, target = (graph.values[v] for v in graph.calls[block])
    if source.tags is None or source.shape[2:] != target.shape[2:]:
        return False
    if len(source.shape) != len(target.shape):
        return False
    before, after = block_units(graph, block)
    kept = torch.isin(after, before)
    return torch.equal(after[kept], before) and not bool(graph.wide[after[~kept]].any())


def _carries_input(graph: Graph, block: str, made_by: dict[int, Node]) -> bool:
    """The block's output is its input plus (or beside) something, and nothing more.

    A ReLU may follow where the input went through one as well: it changes nothing then.
    """
    source, target = graph.calls[block]
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
