"""Running a model on shapes alone, and writing down what it runs.

The pass runs on the meta device under a dispatch mode that sees each ATen operation
with true shapes: no activation is computed or held. Because the model's own Python
runs, control flow and shape arithmetic need no special handling, and a net that was
pruned once can be traced and pruned again. `lib.graph.tracing` reads the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lib.graph.leaves import LAYERS, guess_output, is_leaf, numbers_of
from lib.graph.on_meta import (
    SCRIPT,
    Args,
    Function,
    KeepNumbers,
    Kwargs,
    find_tensors,
    meta_tensors,
    own_tensors,
    run_operation,
    tensors_in,
    without_tensors,
)
from lib.graph.tags import Operand, Value
from lib.graph.watch import dtype_of

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

    @property
    def constant(self) -> bool:
        """It reads nothing that comes from the images."""
        return self.function is not None and not self.inputs


@dataclass(slots=True, eq=False)
class Call:
    """A module that is no leaf came to its end: the values it was given and made."""

    module: str
    inputs: tuple[int | None, ...]
    output: int | None


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The record of the passes of a model; `run_dry` fills one.

    `events` holds nodes and calls in the order of the evaluation pass and, behind the
    first `evaluated` of them, of the training pass; operations on constants alone are
    among them. `images` and `results` are the positions in `values` of what went in and
    came out. `has_other_work` says whether something else than a layer has MACs.
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
        # Ids tell tensors apart, so none may die and leave its id to another.
        self._alive: list[Tensor] = []
        self._within: tuple[str, ...] = ()
        self._failed: tuple[str, ...] | None = None
        self._in_leaf = False
        self._parameters: dict[int, str] = {}

    @property
    def nodes(self) -> list[Node]:
        """The operations of the evaluation pass on what comes from the images."""
        done = self.events[: self.evaluated]
        return [e for e in done if isinstance(e, Node) and not e.constant]

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
            with torch.inference_mode(False), torch.no_grad(), self, KeepNumbers():
                output = model(x)
        except Exception as error:
            raise ValueError(
                f"the forward pass at input shape {tuple(input_shape)} failed in "
                f"{self.locate((self._failed or ('',))[-1])}: "
                + _explain(error, at_root=self._failed == ("",))
            ) from error
        made = [self._place_of(tensor) for tensor in find_tensors(output)]
        self.results += [place for place in made if place is not None]

    # -- modules: each gets a `forward` that takes notes while the pass lasts ---------

    def attach(self, parameters: dict[int, str]) -> None:
        """Let every module report here; `parameters` names them by the id of each."""
        self._parameters = parameters
        for name, module in self.modules.items():
            kind = type(module)
            if isinstance(module, SCRIPT) or kind.forward is nn.Module.forward:
                continue  # a script is not run by Python, a list of modules not at all
            # Torch's own layers are known by type and their shapes are guessed: through
            # ATen and its meta kernels, slow Python, a trace takes twice as long.
            wrap = self._wrap_leaf if is_leaf(module) else self._wrap_module
            module.__dict__["forward"] = wrap(name, module, module.forward)

    def _wrap_module(self, name: str, module: nn.Module, forward: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._in_leaf:
                return forward(*args, **kwargs)
            output = self._run_inside(name, forward, args, kwargs)
            given = tensors_in((*args, *kwargs.values()))
            inputs = tuple(self._place_of(t) for t in given)
            self.events.append(Call(name, inputs, self._place_of(output)))
            return output

        return run

    def _wrap_leaf(self, name: str, module: nn.Module, forward: Function) -> Function:
        kind = type(module).__name__

        def run(*args: Any, **kwargs: Any) -> Any:
            plain = all(id(t) in self._parameters for t in own_tensors(module))
            if self._in_leaf or not plain:  # a hook gave it other tensors
                return forward(*args, **kwargs)
            x = tensors_in((*args, *kwargs.values()))[0]
            y = self._run_inside(name, guess_output, (module, x), {})
            if y is None:
                self._in_leaf = True
                try:
                    y = self._run_inside(name, forward, args, kwargs)
                finally:
                    self._in_leaf = False
            operand = self._read(x)
            inputs = () if operand.constant else (operand.place,)
            node = Node(kind, name, inputs, (), numbers_of(module), {}, self._within)
            node.operands, node.outputs = [operand], (self._put(y, not inputs),)
            self.events.append(node)
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

    def _put(self, tensor: Tensor, constant: bool = False) -> int:
        self._known[id(tensor)] = len(self.values)
        self._alive.append(tensor)
        self.values.append(Value(tuple(tensor.shape), None, constant))
        return len(self.values) - 1

    def _place_of(self, tensor: Any) -> int | None:
        """Where a tensor stands in `values`, if it comes from the images."""
        place = self._known.get(id(tensor))
        return None if place is None or self.values[place].derived else place

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
        # Before `_put`: what an operation wrote in place is the same tensor.
        operands = [self._read(t) for t in tensors_in((*args, *kwargs.values()))]
        inputs = tuple(x.place for x in operands if not x.constant)
        made = tuple(self._put(t, not inputs) for t in tensors_in((output,)))
        # A linear layer reads its weight transposed: the transpose keeps the name.
        if name == "t" and not inputs and operands[0].value is None:
            self.values[made[0]].parameter = operands[0].parameter
        rest, within = tuple(without_tensors(args)), self._within or ("",)
        node = Node(name, within[-1], inputs, made, rest, kwargs, within, func)
        node.operands, node.raw = operands, args
        self.events.append(node)
        return output

    def _read(self, tensor: Tensor) -> Operand:
        place = self._place_of(tensor)
        if place is not None:
            return Operand(self.values[place].shape, place, self.values[place])
        found = Operand(tuple(tensor.shape), self._known.get(id(tensor), -1))
        found.parameter = self._parameters.get(id(tensor))
        if found.parameter is None and found.place >= 0:  # made of constants
            found.value = self.values[found.place]
            found.parameter = found.value.parameter
        if not tensor.is_meta:
            found.content = tensor.detach()
        return found


def run_dry(model: nn.Module, input_shape: tuple[int, ...]) -> DryRun:
    """Watch one evaluation pass, and a training pass where that reaches more layers.

    `input_shape` is (C, H, W). Auxiliary heads run only in training. The model is left
    as found. Raises `ValueError` naming the module in which the pass failed.
    """
    record = DryRun(model)
    _refuse_wrappers(record.modules)
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


def _refuse_wrappers(modules: dict[str, nn.Module]) -> None:
    """One line for what stands in the way of every pass."""
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"'{name}' is a {kind}: give the network in it, `.module`")
        if any(map(nn.parameter.is_lazy, own_tensors(module))):
            raise ValueError(
                f"'{name}' ({kind}) has no weights yet: run the network once on a "
                "batch of images, which makes them"
            )


def _explain(error: Exception, at_root: bool) -> str:
    """What went wrong, in a line, and what to change where that is known."""
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if "item()" in reason or "_local_scalar_dense" in reason or "on meta" in reason:
        return (
            f"{reason}. It reads a number out of a tensor (`.item()`, `float(x)`, `if "
            "x`), which a pass on shapes alone cannot know; compute it outside of the "
            "forward"
        )
    if at_root and isinstance(error, (TypeError, LookupError, AttributeError)):
        return (
            f"{reason}. The pass gives one tensor of images: wrap the network in a "
            "module whose forward takes nothing else"
        )
    return reason
