"""Running a model on shapes alone, and writing down what it runs.

The pass runs on the meta device under a dispatch mode that sees each ATen operation
with true shapes: no activation is computed or held. Because the model's own Python
runs, control flow and shape arithmetic need no special handling, and a net that was
pruned once can be traced and pruned again. `lib.graph.trace` reads the record.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from lib.graph.leaves import LAYERS, guess_output, is_leaf
from lib.graph.tags import SHAPE_KEEPING, Operand, Value
from lib.graph.watch import dtype_of

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
SCRIPT = torch.jit.ScriptModule  # keeps its tensors where Python cannot swap them
META = torch.device("meta")
BATCH = 2  # images in the pass: one would make batch and channels hard to tell apart


@dataclass(slots=True, eq=False)
class Node:
    """One operation: a leaf module's type ("Conv2d") or an ATen name ("mean").

    `module` is the innermost of the modules `within` which it ran. `inputs` and
    `outputs` are positions in `DryRun.values`, `args` and `kwargs` the other arguments.
    `function`, `operands` and `raw` (all arguments) are for the rules of `trace`; a
    leaf module has no function.
    """

    op: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    within: tuple[str, ...] = ()
    function: Function | None = None
    operands: Sequence[Operand] = ()
    raw: tuple[Any, ...] = ()


@dataclass(slots=True, eq=False)
class Call:
    """A module that is no leaf came to its end: the values it was given and made."""

    module: str
    inputs: tuple[int | None, ...]
    output: int | None


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The record of the passes of a model; `run_dry` fills one.

    `events` holds nodes and calls in the order of the evaluation pass and, behind the
    first `evaluated` of them, of the training pass. `images` and `results` are the
    positions in `values` of what went in and came out. `has_other_work` says whether
    something else than a layer has MACs.
    """

    def __init__(self, model: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = dict(model.named_modules())
        self.events: list[Node | Call] = []
        self.evaluated = 0
        self.values: list[Value] = []
        self.images: list[int] = []
        self.results: list[int] = []
        self.has_other_work = False
        self._known: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._within: tuple[str, ...] = ()
        self._failed: tuple[str, ...] | None = None
        self._in_leaf = False
        self._parameters: dict[int, str] = {}

    @property
    def nodes(self) -> list[Node]:
        """The operations of the evaluation pass on what depends on the images."""
        nodes = (e for e in self.events[: self.evaluated] if isinstance(e, Node))
        return [node for node in nodes if node.inputs or node.function is None]

    def locate(self, name: str | None) -> str:
        """A module in words, for messages."""
        kind = type(self.modules[name or ""]).__name__
        return f"'{name}' ({kind})" if name else f"the forward of {kind}"

    def run(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        """One pass in the mode in which the model is."""
        self._known.clear()
        x = torch.empty(BATCH, *input_shape, device="meta", dtype=dtype_of(model))
        self.images.append(self._put(x))
        try:
            with torch.inference_mode(False), torch.no_grad(), self:
                output = model(x)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(
                f"the forward pass at input shape {tuple(input_shape)} failed in "
                f"{self.locate((self._failed or ('',))[-1])}: {reason}"
            ) from error
        made = [self._known.get(id(leaf)) for leaf in tree_leaves(output)]
        self.results += [place for place in made if place is not None]

    # -- modules: each gets a `forward` that takes notes while the pass lasts ---------

    def attach(self, parameters: dict[int, str]) -> None:
        """Let every module report here; `parameters` names them by the id of each."""
        self._parameters = parameters
        for name, module in self.modules.items():
            kind = type(module)
            if isinstance(module, SCRIPT) or kind.forward is nn.Module.forward:
                continue  # a script is not run by Python, a list of modules not at all
            wrap = self._wrap_leaf if is_leaf(module) else self._wrap_module
            module.__dict__["forward"] = wrap(name, module, module.forward)

    def _wrap_module(self, name: str, module: nn.Module, forward: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._in_leaf:
                return forward(*args, **kwargs)
            output = self._run_inside(name, forward, args, kwargs)
            given = tensors_in((*args, *kwargs.values()))
            inputs = tuple(self._find(t) for t in given)
            self.events.append(Call(name, inputs, self._known.get(id(output))))
            return output

        return run

    def _wrap_leaf(self, name: str, module: nn.Module, forward: Function) -> Function:
        kind = type(module).__name__

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._in_leaf:
                return forward(*args, **kwargs)
            x = tensors_in((*args, *kwargs.values()))[0]
            y = self._run_inside(name, guess_output, (module, x), {})
            if y is None:
                self._in_leaf = True
                try:
                    y = self._run_inside(name, forward, args, kwargs)
                finally:
                    self._in_leaf = False
            source = self._find(x)
            inputs = () if source is None else (source,)
            self.events.append(Node(kind, name, inputs, (self._put(y),)))
            return y

        return run

    def _run_inside(
        self, name: str, function: Function, args: Args, kwargs: Kwargs
    ) -> Any:
        before, self._within = self._within, (*self._within, name)
        try:
            return function(*args, **kwargs)
        except Exception:
            self._failed = self._failed or self._within  # the innermost one
            raise
        finally:
            self._within = before

    # -- operations ----------------------------------------------------------------

    def _put(self, tensor: Tensor) -> int:
        self._known[id(tensor)] = len(self.values)
        self._alive.append(tensor)  # keeps the id from being used again
        self.values.append(Value(tuple(tensor.shape)))
        return len(self.values) - 1

    def _find(self, tensor: Tensor) -> int | None:
        """The place of a tensor in `values`; None for what no image changes."""
        place = self._known.get(id(tensor))
        return None if place is None or self.values[place].derived else place

    def _is_derived(self, tensors: list[Tensor]) -> bool:
        """Do parameters alone go into the operation? Integers are constants."""
        known = [id(t) in self._known or id(t) in self._parameters for t in tensors]
        return any(k and t.is_meta for k, t in zip(known, tensors, strict=True))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not guarded against torch.compile: that guard takes a second to import."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Run one operation on the meta device and write it down."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        output = run_operation(name, func, args, kwargs)
        if self._in_leaf:
            return output
        if not self.evaluated and func._overloadpacket in flop_registry:
            self.has_other_work = True
        tensors = tensors_in((*args, *kwargs.values()))
        found = [self._find(t) for t in tensors]
        inputs = tuple(place for place in found if place is not None)
        if inputs or self._is_derived(tensors):
            # Before `_put`: what an operation wrote in place is the same tensor.
            operands = [self._read(t) for t in tensors]
            made = tuple(self._put(t) for t in tensors_in((output,)))
            for place in () if inputs else made:
                self.values[place].derived = True
                if name == "t" and operands[0].value is None:
                    self.values[place].parameter = operands[0].parameter
            rest, within = tuple(_without_tensors(args)), self._within
            node = Node(name, within[-1], inputs, made, rest, kwargs, within, func)
            node.operands, node.raw = operands, args
            self.events.append(node)
        return output

    def _read(self, tensor: Tensor) -> Operand:
        place = self._known.get(id(tensor))
        if place is not None:
            value = self.values[place]
            return Operand(value.shape, value, value.parameter)
        name = self._parameters.get(id(tensor))
        return Operand(tuple(tensor.shape), None, name, not tensor.is_meta)


def run_dry(model: nn.Module, input_shape: tuple[int, ...]) -> DryRun:
    """Watch one evaluation pass, and a training pass where that reaches more layers.

    `input_shape` is (C, H, W). Auxiliary heads run only in training. The model is left
    as found. Raises `ValueError` naming the module in which the pass failed.
    """
    record = DryRun(model)
    with meta_tensors(record.modules) as names:
        if any(module.training for module in record.modules.values()):
            model.eval()
        record.attach(names)
        record.run(model, input_shape)
        record.evaluated = len(record.events)
        wanted = {n for n, m in record.modules.items() if isinstance(m, LAYERS)}
        if wanted - {node.module for node in record.nodes}:
            record.run(model.train(), input_shape)
    record._alive.clear()
    record._known.clear()
    return record


@contextmanager
def meta_tensors(modules: dict[str, nn.Module]) -> Iterator[dict[int, str]]:
    """All tensors of a model's modules on the meta device while inside; names by id.

    Buffers of integers keep their values, on the CPU: a network moves channels by them.
    Whatever a pass does to the attributes of a module, modes and cached constants
    among them, is taken back afterwards.
    """
    own = {n: m for n, m in modules.items() if not isinstance(m, SCRIPT)}
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (store, dict(store))
        for module in own.values()
        for store in (module.__dict__, module._parameters, module._buffers)
    ]
    made: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    try:
        for path, module in own.items():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for key, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _stand_in(tensor)
                    store[key] = made[id(tensor)]
                    name = f"{path}.{key}" if path else key
                    names.setdefault(id(store[key]), name)
        yield names
    finally:
        for store, content in kept:
            store.clear()
            store.update(content)


def _stand_in(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_meta:
        return torch.empty_like(tensor, device=META, requires_grad=False)
    return tensor.detach().to("cpu", copy=True)


def run_operation(name: str, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """The operation on the meta device, or its shape alone where that is plain.

    Real tensors (constants, indices) are moved there, or, where they are by themselves
    and on several devices, to the CPU. Meta kernels of element-wise operations are slow
    Python, so equal shapes skip them: a view of the input stands in for the output.
    """
    tensors = tensors_in((*args, *kwargs.values()))
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        place = "meta" if any(t.is_meta for t in tensors) else "cpu"
        args, kwargs = move_all(args, place), move_all(kwargs, place)
    elif name in SHAPE_KEEPING and tensors[0].is_meta:
        x = tensors[0]
        if all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
            return x if name.endswith("_") else x.detach()
    return func(*args, **kwargs)


def move_all(tree: Any, device: str) -> Any:
    """The same nest of arguments with every tensor on `device`."""
    return tree_map_only(Tensor, lambda t: t.to(device), tree)


def tensors_in(items: Iterable[Any]) -> list[Tensor]:
    """The tensors among `items` and in the lists among them (quicker than a pytree)."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(tensors_in(item))
    return found


def _without_tensors(args: Iterable[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in args:
        nested = isinstance(item, (list, tuple))
        plain = None if isinstance(item, Tensor) else item
        kept.append(_without_tensors(item) if nested else plain)
    return kept
