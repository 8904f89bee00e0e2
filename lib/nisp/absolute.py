"""The absolute network: a net whose every operation is the linear map that bounds it.

NISP's bound asks one thing of an operation f: a matrix |J| of non-negative weights with
|f(x) - f(y)| <= |J| |x - y|, entry by entry. Run forward with these maps in place of
its operations, a net is linear, and its gradient is the product of all |J|^T. The
rules:

    linear, convolution      |W|, without bias
    BatchNorm                |gamma| / sigma of the running statistics
    activation               its largest slope, 1 where that is smaller
    max pool, max            the sum over the window
    average, move, join      as it is
    a + b, a - b             a + b; so too the maximum of two features
    a * gate, |gate| <= 1    a + gate, from |ag - bh| <= |g| |a - b| + |b| |g - h|: the
                             size of b, like that of every response in the closed form,
                             is taken to be one constant, here 1, which is what a
                             BatchNorm makes it
    response norm, dropout   as if it were not there

Whatever else reads a feature is refused by name. Source: Yu et al. 2018, sec. 3, for
the linear maps; the rule for gates is ours.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lib.graph.dry_run import tensors_in
from lib.settings import CHW

ADVICE = (
    "rules exist for linear, convolution, pooling, BatchNorm, response normalisation, "
    "element-wise activations, additions, gates, concatenations and moves; replace it "
    "by one of these"
)
NO_RULE = "has no propagation rule"
PLAIN = set(  # linear with weights that are not negative: they stand for themselves
    "view view_as reshape flatten unflatten permute transpose swapaxes movedim T mT "
    "squeeze unsqueeze expand expand_as repeat repeat_interleave select narrow "
    "__getitem__ split chunk unbind flip roll index_select pad cat concat stack "
    "index_copy contiguous clone channel_shuffle pixel_shuffle pixel_unshuffle mean "
    "sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d".split()
)
UNTOUCHED = set(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "local_response_norm detach data to type type_as double float".split()
)
GATES = {"sigmoid", "hardsigmoid", "tanh"}  # never above 1 in absolute value
SLOPES = dict.fromkeys(
    "relu relu6 hardtanh celu softplus clamp clamp_min clamp_max abs neg".split(), 1.0
) | {  # the largest, rounded up, where it exceeds 1
    "gelu": 1.1291, "silu": 1.0999, "mish": 1.0885, "hardswish": 1.5, "selu": 1.7581,
}  # fmt: skip
ACTIVATIONS = GATES | SLOPES.keys() | {"leaky_relu", "elu", "threshold"}


class _NoRule(Exception):
    """Why an operation cannot be bounded; the mode adds which and where."""


class _Reached(Exception):
    """The final responses are there; what follows is of no interest."""


class AbsoluteNet(TorchFunctionMode):
    """While it is on, operations on features are those of the absolute network.

    `stack` holds the names of the modules that are running, `gates` the features that
    were made by a function which never exceeds 1, and only moved or averaged since.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.modules = modules
        self.stack: list[str] = []
        self.gates = WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the bound of an operation that reads a feature, others as they are."""
        kwargs = dict(kwargs or {})
        if func is torch._C._set_grad_enabled:  # a forward may say no_grad
            return None
        if not any(map(is_feature, tensors_in((*args, *kwargs.values())))):
            return func(*args, **kwargs)
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        name = func.__name__
        if name == "__get__":  # a property: x.shape, x.T
            name = func.__self__.__name__
        try:
            return self.run_bound(name, func, args, kwargs)
        except (_NoRule, RuntimeError, TypeError) as error:
            reason = error if isinstance(error, _NoRule) else NO_RULE
            where = self.stack[-1] if self.stack else ""
            kind = type(self.modules[where]).__name__
            place = f"in '{where}'" if where else "in the forward"
            raise ValueError(f"'{name}' {place} ({kind}) {reason}; {ADVICE}") from None

    def run_bound(self, name: str, func: Callable, args: tuple, kwargs: dict):
        """What stands for one operation; in place where that works in place."""
        base = name if name.endswith("__") else name.removesuffix("_")
        if base in UNTOUCHED:
            return args[0]
        features = [x for x in tensors_in(args) if is_feature(x)]
        gates = [x for x in features if x in self.gates]
        if base in PLAIN:
            made = func(*args, **kwargs)
            if base != "sum" and len(gates) == len(features):
                self.gates.update(dict.fromkeys(tensors_in((made,)), True))
            return made
        if base not in RULES:
            made = func(*args, **kwargs)
            if tensors_in((made,)) or name in {"__bool__", "item", "tolist"}:
                raise _NoRule(NO_RULE)
            return made  # a shape, a device
        if base == "mul" and len(features) == 2 and not gates:
            raise _NoRule("multiplies two features of which neither is a gate")
        made = RULES[base](*args, **kwargs)
        if (base != name or kwargs.get("inplace")) and made is not args[0]:
            made = args[0].copy_(made)
            self.gates.pop(made, None)
        if base in GATES:
            self.gates[made] = True
        return made


def is_feature(value: object) -> bool:
    """A tensor that a layer made, so that scores can come back to it."""
    return isinstance(value, Tensor) and value.requires_grad


# -- rules, each with the arguments of what it replaces --------------------------------


def absolute(weight: Tensor | float) -> Tensor | float:
    """|W| in float64; refuses what is computed, and what is not finite."""
    if is_feature(weight):
        raise _NoRule("has weights that are features")
    if not isinstance(weight, Tensor):
        return abs(weight)
    if not bool(weight.sum().isfinite()):
        raise _NoRule("has weights that are not finite, or computed from the image")
    return weight.to(torch.float64, copy=True).abs_()


def along_channels(row: Tensor, x: Tensor) -> Tensor:
    """One factor for each channel of x [N, C, ...], or one for all."""
    return absolute(row).view(-1, *[1] * (x.ndim - 2))


def weighted(func: Callable) -> Callable:
    """A linear layer, a convolution."""

    def rule(x, weight, bias=None, *rest, **options):
        return func(x, absolute(weight), None, *rest, **options)

    return rule


def normalise(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    """A BatchNorm in evaluation."""
    if running_var is None:
        raise _NoRule(
            "keeps no running variance, so its scale depends on the batch; recalibrate "
            "it with track_running_stats=True"
        )
    sigma = (running_var.double() + eps).sqrt()
    return x * along_channels((1.0 if weight is None else weight) / sigma, x)


def sloped(slope: float) -> Callable:
    """An activation, whose other arguments must be numbers."""

    def rule(x, *limits, **options):
        if any(map(is_feature, (*limits, *options.values()))):
            raise _NoRule("takes a feature for a limit")
        return x if slope == 1 else x * slope

    return rule


def gate(x, inplace=False):
    """An activation that never exceeds 1: what it makes can be multiplied with."""
    return x.view_as(x)


def bent(x, slope=1.0, inplace=False, *, negative_slope=1.0, alpha=1.0):
    """An activation that is the identity above zero and has a slope of its own below.

    A leaky ReLU calls it `negative_slope`, an ELU `alpha`.
    """
    return x * max(1.0, abs(slope), abs(negative_slope), abs(alpha))


def prelu(x, weight):
    """One slope for each channel, or one for all."""
    return x * along_channels(weight, x).clamp_min(1)


def threshold(x, threshold, value, inplace=False):
    """Continuous only where it puts the threshold itself."""
    if threshold != value:
        raise _NoRule("jumps at its threshold, which no factor bounds")
    return x


def add(a, b, *, alpha=1):
    """Sums and differences alike; a constant moves nothing."""
    return torch.add(a, b, alpha=abs(alpha))


def multiply(a, b):
    """A feature times a constant, or times a gate."""
    if not is_feature(a):
        a, b = b, a
    return a + b if is_feature(b) else a * absolute(b)


def divide(a, b, *, rounding_mode=None):
    """A feature over a constant."""
    if is_feature(b) or rounding_mode is not None:
        raise _NoRule("divides by a feature, or rounds")
    return a / absolute(b)


def assign(x, index, value):
    """Write into a part of a tensor."""
    if x.dtype != torch.float64:
        raise _NoRule(f"writes into a tensor of {x.dtype}, made apart from its input")
    x[index] = value


def sum_up(x, dim=(), keepdim=False):
    """The largest or smallest along dimensions."""
    return x.sum(dim, keepdim)


def sum_windows(
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False,
):  # fmt: skip
    """A max pool: the sum over each window, in which padding counts nothing."""
    axes = x.ndim - 2
    if axes == 1 or dilation not in (1, (1,) * axes, [1] * axes):
        raise _NoRule("pools along one axis, or with a dilation")
    pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
    return pool(x, kernel_size, stride, padding, ceil_mode, divisor_override=1)


def sum_adaptive(x, output_size, return_indices=False):
    """An adaptive max pool: the average times the size of its windows."""
    axes = x.ndim - 2
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    y = pool[axes - 1](x, output_size)
    for dim in range(2, x.ndim):
        n, m = x.shape[dim], y.shape[dim]
        sizes = [-(-(i + 1) * n // m) - i * n // m for i in range(m)]
        y = y * y.new_tensor(sizes).view(-1, *[1] * (x.ndim - 1 - dim))
    return y


WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d,
            F.conv_transpose2d, F.conv_transpose3d)  # fmt: skip
RULES: dict[str, Callable] = {
    **{func.__name__: weighted(func) for func in WEIGHTED},
    **{name: sloped(slope) for name, slope in SLOPES.items()},
    **dict.fromkeys(GATES, gate),
    **dict.fromkeys("add sub rsub __rsub__ maximum minimum".split(), add),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d"], sum_windows),
    **{f"adaptive_max_pool{n}d": sum_adaptive for n in (1, 2, 3)},
    **dict.fromkeys(["leaky_relu", "elu"], bent),
    **dict.fromkeys(["threshold", "_threshold"], threshold),
    **dict.fromkeys(["amax", "amin"], sum_up),
    "batch_norm": normalise, "prelu": prelu, "mul": multiply, "div": divide,
    "__setitem__": assign,
}  # fmt: skip


# -- one pass --------------------------------------------------------------------------


def run_absolute(
    model: nn.Module,
    input_shape: CHW,
    *,
    layers: Collection[str],
    places: Mapping[str, str],
    end: str,
    visit: Callable[[str, Tensor], Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """Run the absolute network of `model` on one image, up to the final responses.

    They are what the module `end` reads. Features begin at the `layers`; on the way
    back `visit(name, gradient)` is called for each call of a module in `places` with
    the name it stands for, and may hand on another gradient. Returns the responses
    [1, ...] and the tensors that `torch.autograd.grad` has to go back to. A copy of the
    model runs in float64, on an image of NaN: what depends on it shows.
    """
    tensors = [*model.parameters(), *model.buffers()]
    net = copy.deepcopy(model, {id(x): x.detach() for x in tensors}).eval()
    modules = dict(net.named_modules())
    names = {id(module): name for name, module in modules.items()}
    mode, starts, found = AbsoluteNet(modules), [], []

    def enter(module: nn.Module, args: tuple) -> None:
        mode.stack.append(names[id(module)])
        if names[id(module)] == end:
            found.append(args[0])
            raise _Reached

    def leave(module: nn.Module, args: tuple, output):
        name = mode.stack.pop()
        if name in layers and not is_feature(output):
            output = output.detach().double().requires_grad_()
            starts.append(output)
        if name in places and is_feature(output):
            output.register_hook(lambda grad: visit(places[name], grad))
        return output.clone() if is_feature(output) and output.is_leaf else output

    for module in modules.values():
        if isinstance(module, nn.LocalResponseNorm):
            module.forward = lambda x: x
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    weight = next(x for x in tensors if x.is_floating_point())
    image = weight.new_full((1, *input_shape), math.nan).detach()
    with contextlib.suppress(_Reached), mode:
        net(image)
    return found[0], starts
