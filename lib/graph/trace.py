"""One forward pass on the meta device, watched.

The pass runs under a dispatch mode that sees each ATen operation with true shapes and
carries channel tags along (`lib.graph.tags`). No activation is computed or held, and
the model is left as found. Because the model's own Python runs, control flow and shape
arithmetic need no special handling, and a net that was pruned once can be traced and
pruned again. `lib.graph.structure` draws the conclusions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleUnit

from lib.graph.dry_run import meta_state, run_leaf, run_operation, tensors_in
from lib.graph.tags import (
    ELEMENTWISE,
    MOVES,
    REDUCTIONS,
    SPATIAL,
    Ledger,
    Operand,
    Value,
    move_tags,
)
from lib.graph.watch import dtype_of, modes_kept

BATCH = 2  # images in the pass: one would make batch and channels hard to tell apart
LEAVES = (_ConvNd, nn.Linear, _BatchNorm, nn.LocalResponseNorm, nn.PReLU, _DropoutNd)


@dataclass(frozen=True)
class Node:
    """One operation: a leaf module's type ("Conv2d") or an ATen name ("mean").

    `inputs` and `outputs` are positions in `Trace.values`; `args` the other arguments.
    """

    op: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)


@dataclass(eq=False)
class Layer:
    """A convolution or linear layer: the tags it reads and the tags it makes.

    `positions` holds, for each call in evaluation, the number of output positions per
    image: MACs = positions * kernel size * inputs per group * outputs.
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

    def count_work(self, inputs: int, outputs: int) -> int:
        """MACs at one output position with so many channels read and made."""
        groups = inputs if self.depthwise else self.groups
        return self.kernel * outputs * inputs // max(groups, 1)


@dataclass(eq=False)
class Move:
    """A parameter-free module that moves channels: tags read and tags handed on."""

    inputs: Tensor
    outputs: Tensor


class Trace(TorchDispatchMode):
    """The record of the passes; `trace(model, input_shape)` fills one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(m): name for name, m in model.named_modules()}
        self.bare = {
            id(m) for m in model.modules() if next(m.parameters(), None) is None
        }
        self.ledger = Ledger()
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, Tensor] = {}
        self.moves: dict[str, Move] = {}
        self.shuffles: dict[str, Move] = {}
        self.calls: dict[str, tuple[int, int]] = {}
        self.has_other_work = False
        self.evaluating = True
        self._known: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._stack: list[nn.Module] = []
        self._leaf: nn.Module | None = None
        self._moving: set[str] = set()
        self._parameters: dict[int, str] = {}

    # -- values and tags ---------------------------------------------------------

    def value_of(self, tensor: Tensor) -> Value | None:
        """What is known of `tensor`, or None for a constant."""
        key = self._known.get(id(tensor))
        return None if key is None else self.values[key]

    def _put(self, tensor: Tensor, tags: Tensor | None) -> int:
        self._known[id(tensor)] = len(self.values)
        self._alive.append(tensor)  # keeps the id from being used again
        self.values.append(Value(tuple(tensor.shape), tags))
        return len(self.values) - 1

    def _where(self) -> str:
        name = self.names.get(id(self._stack[-1]), "") if self._stack else ""
        kind = type(self._stack[-1]).__name__ if self._stack else "model"
        return f"'{name}' ({kind})" if name else f"the forward of {kind}"

    # -- modules -------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._stack.append(module)
        if self._leaf is None and _is_leaf(module):
            self._leaf = module

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        name = self.names.get(id(module))
        inputs = tensors_in((*args, *kwargs.values()))
        if self._leaf is module:
            self._leaf = None
            self._record_leaf(name, module, inputs[0], output)
        elif self._leaf is None and name is not None:
            self._record_call(name, module, inputs, output)
        self._stack.pop()

    def _record_leaf(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        value = self.value_of(x)
        if isinstance(module, _ConvNd):
            tags = self._layer(name, module, value, y, dim=1)
        elif isinstance(module, nn.Linear):
            tags = self._layer(name, module, value, y, dim=-1)
        elif isinstance(module, _DropoutNd):
            tags = value and value.tags
        else:
            tags = self._norm(name, module, value, x)
        source = () if value is None else (self._known[id(x)],)
        kind = type(module).__name__
        self.nodes.append(Node(kind, name, source, (self._put(y, tags),)))

    def _layer(self, name, module, value, y: Tensor, *, dim: int) -> Tensor:
        out, channels = module.weight.shape[0], module.weight.shape[1]
        groups = getattr(module, "groups", 1)
        inputs = self.ledger.row(value, dim, channels * groups, self._where())
        layer = self.layers.get(name)
        if layer is None:
            kernel = module.weight[0, 0].numel() if module.weight.ndim > 2 else 1
            layer = Layer(name, inputs, self.ledger.fresh(out), groups, kernel, [])
            self.layers[name] = layer
            if layer.depthwise:
                repeated = inputs.repeat_interleave(out // groups)
                self.ledger.tie(layer.outputs, repeated)
        else:
            self.ledger.tie(layer.inputs, inputs)
        if self.evaluating:
            layer.positions.append(y.numel() // (BATCH * out))
        shape = [1] * y.ndim
        shape[dim] = out
        return layer.outputs.view(shape)

    def _norm(self, name, module, value: Value | None, x: Tensor) -> Tensor | None:
        if value is None or value.tags is None:
            return None
        tags = self.ledger.row(value, 1, x.shape[1], self._where())
        if name in self.norms and len(self.norms[name]) != len(tags):
            for row in (self.norms[name], tags):
                self.ledger.freeze(row, f"'{name}' serves two different widths")
        elif name in self.norms:
            self.ledger.tie(self.norms[name], tags)
        else:
            self.norms[name] = tags
        return value.tags

    def _record_call(self, name, module, args: list[Tensor], output: Any) -> None:
        moving = name in self._moving
        self._moving.discard(name)
        source = self.value_of(args[0]) if len(args) == 1 else None
        target = self.value_of(output) if isinstance(output, Tensor) else None
        if source is None or target is None or target.tags is None:
            for value in filter(None, map(self.value_of, args if moving else [])):
                self.ledger.freeze(
                    value.tags, f"'{name}' moves channels between tensors"
                )
            return
        if self.evaluating:
            self.calls[name] = (self._known[id(args[0])], self._known[id(output)])
        if moving:
            inputs = self.ledger.row(source, 1, source.shape[1], self._where())
            if isinstance(module, ShuffleUnit):
                outputs = self.ledger.row(target, 1, target.shape[1], self._where())
                self.shuffles[name] = Move(inputs, outputs)
            else:
                self._record_move(name, inputs, target)

    def _record_move(self, name: str, inputs: Tensor, target: Value) -> None:
        known = self.moves.get(name)
        tags = target.tags
        if tags.numel() == target.shape[1] and bool((tags >= 0).all()):
            outputs = tags.flatten()
        else:  # padded or mixed: what comes out is a new channel that others may join
            again = known is not None and len(known.outputs) == target.shape[1]
            outputs = known.outputs if again else self.ledger.fresh(target.shape[1])
            target.tags = outputs.view([1, -1] + [1] * (len(target.shape) - 2))
        if known and len(known.inputs) != len(inputs):
            for row in (known.inputs, known.outputs, inputs, outputs):
                self.ledger.freeze(row, f"'{name}' serves two different widths")
        elif known:
            self.ledger.tie(known.inputs, inputs)
            self.ledger.tie(known.outputs, outputs)
        else:
            self.moves[name] = Move(inputs, outputs)

    # -- operations ----------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation on the meta device and carry the tags along."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self._leaf is not None:
            return run_leaf(name, func, args, kwargs)
        tensors = tensors_in((*args, *kwargs.values()))
        output = run_operation(name, func, args, kwargs, tensors)
        if self.evaluating and func._overloadpacket in flop_registry:
            self.has_other_work = True
        if not any(id(t) in self._known for t in tensors):
            return output
        inputs = tuple(self._known[id(t)] for t in tensors if id(t) in self._known)
        made = tensors_in((output,))
        tags = self._tags(name, func, args, kwargs, tensors, made)
        places = tuple(self._put(t, n) for t, n in zip(made, tags, strict=False))
        rest = tree_map_only(Tensor, lambda t: None, args)
        self.nodes.append(Node(name, self._module(), inputs, places, rest, kwargs))
        return output

    def _module(self) -> str:
        return self.names.get(id(self._stack[-1]), "") if self._stack else ""

    def _tags(self, name, func, args, kwargs, tensors, made: list[Tensor]) -> list:
        """The tags of each tensor that the operation made."""
        operands = [self._operand(t) for t in tensors]
        ledger, where = self.ledger, self._where()
        if name in ELEMENTWISE:
            row = ledger.elementwise(name, operands, made[0].shape, where)
        elif name in SPATIAL:
            row = ledger.spatial(name, operands[0], where)
        elif name in REDUCTIONS and len(args) > 1:
            keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
            row = ledger.reduce(name, operands[0], args[1], keepdim, where)
        elif name == "cat":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            row = ledger.cat([self._operand(t) for t in args[0]], dim, where)
        elif name in MOVES and _is_plain_move(operands, tensors):
            return self._move(name, func, operands[0].value, args, kwargs)
        else:
            row = None
            for x in operands:
                reason = f"{where} uses '{name}', which has no pruning rule"
                ledger.freeze(x.tags, reason)
        return [row] * len(made)

    def _operand(self, tensor: Tensor) -> Operand:
        parameter = self._parameters.get(id(tensor))
        return Operand(tuple(tensor.shape), self.value_of(tensor), parameter)

    def _move(self, name, func, value: Value, args, kwargs) -> list[Tensor]:
        """Where channels are picked or reordered: who can be rewritten, or freeze."""
        pieces, in_order = move_tags(name, func, value, args, kwargs)
        if in_order:
            return pieces
        bare = [module for module in self._stack if id(module) in self.bare]
        units = [m for m in self._stack[-1:] if isinstance(m, ShuffleUnit)]
        for module in [*bare, *units][:1]:
            self._moving.add(self.names[id(module)])
            return pieces
        self.ledger.freeze(
            value.tags,
            f"{self._where()} picks or reorders channels with '{name}' in its forward; "
            "put that step into a module of its own, without parameters",
        )
        return pieces


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> Trace:
    """Watch one evaluation pass, and a training pass where that reaches more layers.

    `input_shape` is (C, H, W). Auxiliary heads run only in training. Raises
    `ValueError` naming the module in which the pass failed.
    """
    record = Trace(model)
    with modes_kept(model):
        _run_pass(record, model.eval(), input_shape)
        record.evaluating = False
        wanted = {n for n, m in model.named_modules() if isinstance(m, LEAVES[:2])}
        if wanted - record.layers.keys():
            nodes = list(record.nodes)
            _run_pass(record, model.train(), input_shape)
            record.nodes = nodes
    _freeze_shared(record, model)
    record._alive.clear()
    record._known.clear()
    return record


def _freeze_shared(record: Trace, model: nn.Module) -> None:
    """Two layers with one and the same parameter cannot be cut in two ways."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        for name in names if len(names) > 1 else []:
            quoted = " and ".join(f"'{other}'" for other in names)
            reason = f"a parameter is shared by {quoted}"
            layer = record.layers.get(name)
            rows = [layer.inputs, layer.outputs] if layer else [record.norms.get(name)]
            for row in rows:
                record.ledger.freeze(row, reason)


def _run_pass(record: Trace, model: nn.Module, input_shape) -> None:
    tensors = dict(meta_state(model))
    record._parameters = {id(t): n for n, t in reversed(tensors.items())}
    record._known.clear()
    x = torch.empty(BATCH, *input_shape, device="meta", dtype=dtype_of(model))
    tags = record.ledger.fresh(x.shape[1]).view([1, -1] + [1] * (x.ndim - 2))
    record.ledger.freeze(tags, "they are the channels of the input images")
    record._put(x, tags)
    handles = [
        hooks.register_module_forward_pre_hook(record._enter),
        hooks.register_module_forward_hook(record._leave, with_kwargs=True),
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), record:
            output = torch.func.functional_call(model, tensors, (x,), tie_weights=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"the forward pass at input shape {tuple(input_shape)} failed in "
            f"{record._where()}: {reason}"
        ) from error
    finally:
        record._stack.clear()
        record._leaf = None
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and (value := record.value_of(leaf)):
            record.ledger.freeze(value.tags, "they are the outputs of the network")


def _is_leaf(module: nn.Module) -> bool:
    if not isinstance(module, LEAVES) or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False  # one slope for all channels is an element-wise operation
    if isinstance(module, (nn.LocalResponseNorm, _DropoutNd)):
        return True
    plain = any(
        getattr(module.forward, "__func__", None) is vars(base).get("forward")
        for base in type(module).__mro__
        if base.__module__.startswith("torch.nn.modules")
    )
    return plain and (isinstance(module, _BatchNorm) or "weight" in module._parameters)


def _is_plain_move(operands: list[Operand], tensors: list[Tensor]) -> bool:
    """Channels are followed; an index that the pass itself computed has no values."""
    known_index = all(t.device.type != "meta" for t in tensors[1:])
    return operands[0].tags is not None and known_index
