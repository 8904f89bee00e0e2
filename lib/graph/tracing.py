"""What one pass does with channels: tags carried along the record of a dry run.

`lib.graph.dry_run` watches the pass; here every operation that it wrote down hands the
tags of its inputs on to its outputs (`lib.graph.tags`), layer by layer.
`lib.graph.structure` draws the conclusions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from lib.graph.cases import (
    find_mixers,
    freeze_attention,
    is_product,
    is_shuffle_unit,
    read_known_module,
    settle_tensors,
)
from lib.graph.dry_run import BATCH, Call, DryRun, Node, count_positions
from lib.graph.leaves import filters_of
from lib.graph.moves import move_tags
from lib.graph.tags import (
    CONSTANT,
    CONSTANTS,
    ELEMENTWISE,
    MOVES,
    PIXELS,
    REDUCTIONS,
    SPATIAL,
    Ledger,
    Value,
)


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer: the tags it reads and the tags it makes.

    `positions` holds, for each call in evaluation, the number of output positions per
    image (of input positions where it is transposed): MACs = positions * kernel size *
    inputs per group * outputs.
    """

    name: str
    inputs: Tensor
    outputs: Tensor
    groups: int
    kernel: int
    positions: list[int]

    @property
    def depthwise(self) -> bool:
        """Each channel is convolved on its own."""
        return self.groups > 1 and self.groups == len(self.inputs)

    @property
    def grouped(self) -> bool:
        """Channels go in several groups of more than one."""
        return self.groups > 1 and not self.depthwise

    def count_work(self, inputs: int, outputs: int) -> int:
        """MACs at one output position with so many channels read and made."""
        groups = inputs if self.depthwise else self.groups
        return self.kernel * outputs * inputs // max(groups, 1)


@dataclass(eq=False)
class Move:
    """A module that moves or mixes channels: tags read and handed on, along `dim`."""

    inputs: Tensor
    outputs: Tensor
    dim: int = 1


class Trace:
    """What a dry run means for channels.

    `layers` maps names to what each convolution and linear layer reads and makes,
    `norms`, `moves` and `shuffles` the same for everything else with a size; `made`
    lists the values that each layer makes, `normed` maps the values that a BatchNorm
    reads to its name; `calls` maps every module that ran in evaluation on one tensor to
    its input and output. `uses` names parameters that something reads which is neither
    their own layer or norm nor a step along the channels, and what does.
    """

    def __init__(self, record: DryRun):
        self.record = record
        self.nodes, self.values = record.nodes, record.values
        self._read_events(frozenset())
        # Only a first reading shows what loses track of channels; the second one, with
        # those modules taken as a whole, forgets what the first froze because of them.
        if mixers := find_mixers(record, self.lossy):
            self._read_events(mixers)
        freeze_attention(self)
        settle_tensors(self)

    def _read_events(self, mixers: frozenset[str]) -> None:
        self.mixers = mixers
        self.ledger = Ledger()
        self.layers: dict[str, Layer] = {}
        self.made: dict[str, list[int]] = {}
        self.norms: dict[str, Tensor] = {}
        self.normed: dict[int, str] = {}
        self.moves: dict[str, Move] = {}
        self.shuffles: dict[str, Move] = {}
        self.calls: dict[str, tuple[int, int]] = {}
        self.uses: dict[str, str] = {}
        self.mixes: dict[str, Move] = {}
        self.lossy: set[str] = set()  # modules inside which channels were lost
        self.attending: set[str] = set()
        self._moving: dict[str, list[Tensor]] = {}
        for value in self.values:
            value.tags = None
        for place in self.record.images:
            value = self.values[place]
            row = self.ledger.fresh(value.shape[1])
            value.tags = _along(row, 1, len(value.shape))
            self.ledger.freeze(row, "they are the channels of the input images")
        for i, event in enumerate(self.record.events):
            evaluating = i < self.record.evaluated
            if mixers and self._is_inside_mixer(event):
                continue
            if isinstance(event, Call):
                self._read_call(event, evaluating)
            elif event.function is None:
                self._read_leaf(event, evaluating)
            elif not read_known_module(self, event, evaluating):
                self._read_uses(event, self._follow(event))
        for place in self.record.results:
            reason = "they are the outputs of the network"
            self.ledger.freeze(self.values[place].tags, reason)

    # -- modules -------------------------------------------------------------------

    def _read_leaf(self, node: Node, evaluating: bool) -> None:
        module = self.record.modules[node.module]
        value, made = node.operands[0], self.values[node.outputs[0]]
        if isinstance(module, (_ConvNd, nn.Linear)):
            self.read_layer_call(node, module, value, evaluating)
        elif isinstance(module, _DropoutNd):
            made.tags = value.tags
        else:
            made.tags = self.read_norm(node.module, value)
            if isinstance(module, _BatchNorm) and node.inputs:
                self.normed[node.inputs[0]] = node.module

    def read_layer_call(
        self, node: Node, module: _ConvNd | nn.Linear, value: Value, evaluating: bool
    ) -> None:
        layer = self._read_layer(node.module, module, value)
        made = self.values[node.outputs[0]]
        dim = -1 if isinstance(module, nn.Linear) else 1
        made.tags = _along(layer.outputs, dim, len(made.shape))
        if evaluating:
            self.made.setdefault(node.module, []).append(node.outputs[0])
            positions = count_positions(module, value.shape, made.shape)
            layer.positions.append(positions // BATCH)

    def _read_layer(
        self, name: str, module: _ConvNd | nn.Linear, value: Value
    ) -> Layer:
        filters = filters_of(module)
        out, channels = filters.shape[:2]
        dim, groups = (-1, 1) if isinstance(module, nn.Linear) else (1, module.groups)
        where = self.record.locate(name)
        inputs = self.ledger.row(value, dim, channels * groups, where)
        if name in self.layers:  # it runs a second time, with the same weight
            self.ledger.tie(self.layers[name].inputs, inputs)
            return self.layers[name]
        kernel = filters[0, 0].numel()
        layer = Layer(name, inputs, self.ledger.fresh(out), groups, kernel, [])
        if layer.depthwise:
            self.ledger.tie(layer.outputs, inputs.repeat_interleave(out // groups))
        self.layers[name] = layer
        return layer

    def read_norm(self, name: str, value: Value) -> Tensor | None:
        """A BatchNorm or a PReLU hands channels on in place."""
        where = self.record.locate(name)
        row = self.ledger.row(value, 1, value.shape[1], where)
        known = self.norms.setdefault(name, row)
        if len(known) != len(row):
            for each in (known, row):
                self.ledger.freeze(each, f"'{name}' serves two different widths")
        elif known is not row:
            self.ledger.tie(known, row)
        return value.tags

    def _is_inside_mixer(self, event: Node | Call) -> bool:
        if isinstance(event, Node):
            return not self.mixers.isdisjoint(event.within)
        parts = event.module.split(".")
        return any(".".join(parts[:i]) in self.mixers for i in range(1, len(parts)))

    def _read_call(self, call: Call, evaluating: bool) -> None:
        if call.module in self.mixers:
            self._read_mix(call)
        moving = self._moving.pop(call.module, None)
        source = call.inputs[0] if len(call.inputs) == 1 else None
        target = None if call.output is None else self.values[call.output]
        if source is None or target is None or target.tags is None:
            for tags in moving or ():  # between tensors: no single map of channels
                self.ledger.widen(tags)
            return
        if evaluating and call.output is not None:
            self.calls[call.module] = (source, call.output)
        if moving:
            self._read_move(call.module, self.values[source], target)

    def _read_mix(self, call: Call) -> None:
        """A norm over channels runs at full width and hands channels on in place."""
        assert call.inputs[0] is not None and call.output is not None
        name, source = call.module, self.values[call.inputs[0]]
        if source.tags is None:
            return
        dims = [d for d, n in enumerate(source.tags.shape) if n > 1]
        whole = len(dims) == 1 and source.tags.numel() == source.shape[dims[0]]
        known = self.mixes.get(name)
        if not whole or (known and len(known.inputs) != source.tags.numel()):
            reason = f"{self.record.locate(name)} mixes channels in two ways"
            for tags in (source.tags, known.inputs if known else None):
                self.ledger.freeze(tags, reason)
            return
        row = source.tags.flatten()
        if known is None:
            self.mixes[name] = Move(row, row, dims[0] - len(source.shape))
        else:
            self.ledger.tie(known.inputs, row)
        self.values[call.output].tags = source.tags

    def _read_move(self, name: str, source: Value, target: Value) -> None:
        where, width = self.record.locate(name), target.shape[1]
        inputs = self.ledger.row(source, 1, source.shape[1], where)
        if is_shuffle_unit(self.record.modules[name]):
            outputs = self.ledger.row(target, 1, width, where)
            self.shuffles[name] = Move(inputs, outputs)
            return
        known = self.moves.get(name)
        assert target.tags is not None
        if target.tags.numel() == width and bool((target.tags >= 0).all()):
            outputs = target.tags.flatten()
        else:  # padded or mixed: what comes out is a new channel that others may join
            again = known is not None and len(known.outputs) == width
            outputs = known.outputs if known and again else self.ledger.fresh(width)
            target.tags = _along(outputs, 1, len(target.shape))
        if known is None:
            self.moves[name] = Move(inputs, outputs)
        elif len(known.inputs) == len(inputs):
            self.ledger.tie(known.inputs, inputs)
            self.ledger.tie(known.outputs, outputs)
        else:
            for row in (known.inputs, known.outputs, inputs, outputs):
                self.ledger.freeze(row, f"'{name}' serves two different widths")

    def is_whole(self, name: str) -> bool:
        """Does the layer's module read and make what the layer does, and no more?"""
        if name in self.record.leaves:
            return True
        if name not in self.calls:
            return False
        layer, rows = self.layers[name], []
        for place in self.calls[name]:
            tags = self.values[place].tags
            rows.append(None if tags is None else tags.flatten())
        wanted = (layer.inputs, layer.outputs)
        return all(
            row is not None and torch.equal(row, own)
            for row, own in zip(rows, wanted, strict=True)
        )

    # -- operations ----------------------------------------------------------------

    def _read_uses(self, node: Node, vectors: set[str]) -> None:
        """Note the parameters that an operation reads other than along channels."""
        for x in node.operands:
            if x.parameter is None or x.parameter in vectors or node.op == "t":
                continue  # a transpose is still known by its name
            if torch.Size(x.shape).numel() > 1:  # a single number is never cut
                where = self.record.locate(node.module)
                reason = f"{where} uses '{x.parameter}' in '{node.op}'"
                self.uses.setdefault(x.parameter, reason)

    def _follow(self, node: Node) -> set[str]:
        """Hand tags on; the parameters that the operation reads along channels."""
        self.ledger.met = set()
        made = self._read_operation(node)
        for place, tags in zip(node.outputs, made, strict=False):
            self.values[place].tags = tags
        return self.ledger.met

    def _read_operation(self, node: Node) -> list[Tensor | None]:
        """The tags of each tensor that the operation made."""
        name, operands, ledger = node.op, node.operands, self.ledger
        where = self.record.locate(node.module)
        row: Tensor | None = None
        if not node.inputs and name != "t":  # a column of weights is no vector
            operands = [self._see_vector(x) for x in operands]
        if name in ELEMENTWISE:
            shape = self.values[node.outputs[0]].shape
            row = ledger.elementwise(name, operands, shape, where)
        elif name in SPATIAL:
            row = ledger.spatial(name, operands[0], where)
        elif name in PIXELS and len(operands[0].shape) == 4:
            row = ledger.shuffle_pixels(name, operands[0], node.args[1], where)
        elif name in REDUCTIONS and len(node.args) > 1:
            keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
            row = ledger.reduce(name, operands[0], node.args[1], bool(keepdim), where)
        elif name in CONSTANTS:
            row = torch.full([1] * len(self.values[node.outputs[0]].shape), CONSTANT)
        elif name == "cat":
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            row = ledger.cat(operands, dim, where)
        # An index that the pass itself computed has no values to follow.
        elif (
            name in MOVES
            and operands[0].tags is not None
            and all(x.content is not None for x in node.operands[1:])
        ):
            return self._move(node, operands[0].tags)
        else:
            for x in operands:
                ledger.freeze(x.tags, f"{where} uses '{name}', {_why_frozen(name)}")
        # Everything around an operation that loses channels may be a norm over them,
        # which `find_mixers` then takes as a whole.
        if row is None and any(x.tags is not None for x in operands):
            self.lossy.update(node.within)
            if is_product(name):
                self.attending.add(node.module)
        return [row] * len(node.outputs)

    def _see_vector(self, x: Value) -> Value:
        """A parameter with one dimension gets tags, for what is made of it."""
        if x.parameter is None or x.place >= 0:
            return x
        return replace(x, tags=self.ledger.vector(x.parameter, x.shape))

    def _move(self, node: Node, tags: Tensor) -> list[Tensor | None]:
        """Where channels are picked or reordered: by whom, if it can be rewritten."""
        pieces, in_order = move_tags(node, tags)
        if node.constant and node.op in {"view", "reshape", "expand"}:
            if tags.numel() in node.args[1]:
                self.ledger.widen(tags)  # the number may be written in the code
        if not in_order:
            # A module without parameters can be wrapped as a whole, and the outermost
            # such module sees most of the way; ShuffleNetV2's unit is rewritten.
            modules = [self.record.modules[name] for name in node.within]
            bare = [next(m.parameters(), None) is None for m in modules]
            bare[-1] = bare[-1] or is_shuffle_unit(modules[-1])
            if any(bare):
                moved = self._moving.setdefault(node.within[bare.index(True)], [])
                moved.append(tags)
            else:
                self.ledger.widen(tags)
        return list(pieces)


def _along(row: Tensor, dim: int, ndim: int) -> Tensor:
    """A row of tags along one of `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = len(row)
    return row.view(shape)


def _why_frozen(name: str) -> str:
    if name in {"convolution", "addmm", "mm"}:
        return (
            "which has a pruning rule only as a plain nn.Conv2d or nn.Linear that the "
            "network registers (a Python list registers none)"
        )
    return "which has no pruning rule"
