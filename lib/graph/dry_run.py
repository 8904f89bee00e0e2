"""Running a model on shapes alone, and writing down what it runs.

The pass runs on the meta device under a dispatch mode that sees each ATen operation
with true shapes: no activation is computed or held. Because the model's own Python
runs, control flow and shape arithmetic need no special handling, and a net that was
pruned once can be traced and pruned again. `lib.graph.tracing` reads the record.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lib.graph.leaves import LAYERS, guess_output, is_leaf, names_of_numbers
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
)
from lib.graph.tags import Value
from lib.graph.watch import dtype_of

BATCH = 2  # images in the pass: one would make batch and channels hard to tell apart
NO_FORWARD = nn.Module.forward


@dataclass(slots=True, eq=False)
class Node:
    """One operation: a leaf module's type ("Conv2d") or an ATen name ("mean").

    `module` is the innermost of the modules `within` which it ran. `inputs` and
    `outputs` are positions in `DryRun.values`, `operands` all tensors that it read.
    `function` is what ran with `args` and `kwargs`; a leaf module has none, and its
    `args` are the numbers that it computes with.
    """

    op: str
    within: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operands: Sequence[Value]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    function: Function | None = None

    @property
    def module(self) -> str:
        """The innermost module."""
        return self.within[-1]

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
    came out, `leaves` the modules that ran as one node. `macs` counts those of the
    evaluation pass, per image.
    """

    def __init__(self, model: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = dict(model.named_modules())
        self.leaves: set[str] = set()
        self.events: list[Node | Call] = []
        self.evaluated = 0
        self.values: list[Value] = []
        self.images: list[int] = []
        self.results: list[int] = []
        self.macs = 0
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
            if isinstance(module, SCRIPT) or type(module).forward is NO_FORWARD:
                continue  # a script is not run by Python, a list of modules not at all
            wrap = self._wrap_module
            # Torch's own layers are known by type and their shapes are guessed: through
            # ATen and its meta kernels, slow Python, a trace takes twice as long.
            if is_leaf(module):
                wrap = self._wrap_leaf
                self.leaves.add(name)
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
        numbers = names_of_numbers(module)

        def guess_or_run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            x = tensors_in((*args, *kwargs.values()))[0]
            y = guess_output(module, x)
            if y is not None:
                return x, y
            self._in_leaf = True
            try:
                return x, forward(*args, **kwargs)
            finally:
                self._in_leaf = False

        def run(*args: Any, **kwargs: Any) -> Any:
            plain = all(id(t) in self._parameters for t in own_tensors(module))
            if self._in_leaf or not plain:  # a hook gave it other tensors
                return forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():  # which makes every look at x slow
                x, y = self._run_inside(name, guess_or_run, args, kwargs)
            operand, within = self._read(x), (*self._within, name)
            inputs = () if operand.constant else (operand.place,)
            made, state = (self._put(y, not inputs),), vars(module)
            if isinstance(module, LAYERS):
                work = count_positions(module, x.shape, y.shape) * module.weight.numel()
                self._count_macs(work, not inputs)
            values = tuple((key, state.get(key)) for key in numbers)
            self.events.append(Node(kind, within, inputs, made, [operand], values))
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
        place = self._known[id(tensor)] = len(self.values)
        self._alive.append(tensor)
        value = Value(tuple(tensor.shape), place, constant)
        if constant and not tensor.is_meta:
            value.content = tensor.detach()
        self.values.append(value)
        return place

    def _place_of(self, tensor: Any) -> int | None:
        """Where a tensor stands in `values`, if it comes from the images."""
        place = self._known.get(id(tensor))
        return None if place is None or self.values[place].constant else place

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
        tensors = tensors_in((*args, *kwargs.values()))
        output = run_operation(name, func, args, kwargs, tensors)
        if self._in_leaf:
            return output
        # Before `_put`: what an operation wrote in place is the same tensor.
        operands = [self._read(t) for t in tensors]
        inputs = tuple(x.place for x in operands if not x.constant)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self._count_macs(count(*args, **kwargs, out_val=output) // 2, not inputs)
        made = tuple(self._put(t, not inputs) for t in tensors_in((output,)))
        # A linear layer reads its weight transposed: the transpose keeps the name.
        if name == "t" and not inputs and operands[0].place < 0:
            self.values[made[0]].parameter = operands[0].parameter
        within = self._within or ("",)
        self.events.append(
            Node(name, within, inputs, made, operands, args, kwargs, func)
        )
        return output

    def _count_macs(self, macs: int, constant: bool) -> None:
        if not self.evaluated:
            self.macs += macs // (1 if constant else BATCH)

    def _read(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a parameter goes by its name."""
        place, name = self._known.get(id(tensor)), self._parameters.get(id(tensor))
        if place is not None and not (name and self.values[place].constant):
            return self.values[place]
        content = None if tensor.is_meta else tensor.detach()
        return Value(tuple(tensor.shape), -1, True, name, content)


def count_positions(
    module: _ConvNd | nn.Linear, read: tuple[int, ...], made: tuple[int, ...]
) -> int:
    """Output positions of a call on all images (of the input where transposed)."""
    counted = read if isinstance(module, _ConvTransposeNd) else made
    return math.prod(counted) // module.weight.shape[0]


def run_dry(
    model: nn.Module, input_shape: tuple[int, ...], *, training: bool = True
) -> DryRun:
    """Watch one evaluation pass, and a training pass where that reaches more layers.

    `input_shape` is (C, H, W). Auxiliary heads run only in training (not watched unless
    `training`). The model is left as found. Raises `ValueError` naming the module in
    which the pass failed.
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
        if training and wanted - {node.module for node in record.nodes}:
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
