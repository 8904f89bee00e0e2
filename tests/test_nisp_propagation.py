"""Propagation against autograd on the absolute network, dense products, direct code."""

import copy
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib import models, plan
from lib.models.resnet import PadShortcut
from lib.nisp import scale
from lib.nisp.propagation import propagate
from lib.surgery.movers import Scatter

pytestmark = pytest.mark.usefixtures("one_thread")

PASSED = {F.relu, F.relu6, F.hardtanh, F.hardtanh_, F.dropout, F.local_response_norm,
          torch.relu, torch.relu_, torch.dropout, F.prelu}  # fmt: skip


class Absolute(TorchFunctionMode):
    """The forward pass with |W|, no biases, no activations, sums for maxima."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, args = kwargs or {}, list(args)
        name = getattr(func, "__name__", "")
        if func in PASSED or name in {"relu", "relu_", "hardtanh", "hardtanh_"}:
            return args[0]
        if name in {"conv2d", "conv1d", "linear"}:
            args[1:3] = [args[1].abs(), None][: len(args) - 1]
            kwargs.pop("bias", None)
        elif name == "batch_norm":
            if "weight" not in kwargs:
                return func(*args, **kwargs)
            factor = kwargs["weight"].abs() / (args[2] + kwargs["eps"]).sqrt()
            return args[0] * factor.view(1, -1, 1, 1)
        elif name == "sub":
            return args[0] + args[1]
        elif name == "mul" and isinstance(args[1], float):
            return args[0] * abs(args[1])
        elif name.startswith("max_pool2d"):
            return sum_pool(*args, **kwargs)
        return func(*args, **kwargs)


def sum_pool(
    x, size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    """Sums over windows; with dilation, as a convolution of each channel."""
    if dilation in (1, [1, 1], (1, 1)):
        return torch._C._nn.avg_pool2d(x, size, stride, padding, ceil_mode, True, 1)
    width = x.shape[1]
    ones = torch.ones(width, 1, size, size, dtype=x.dtype)
    return torch.conv2d(x, ones, None, stride, padding, dilation, width)


def by_autograd(model, scores, shape, *, masks=None, squash=True):
    """Gradients of the FRL's weighted sum at each layer's output, behind its mask."""
    model, outputs, reads = copy.deepcopy(model).double().eval(), [], []

    def keep(name):
        def hook(module, inputs, output):
            alive = (masks or {}).get(name)
            if alive is not None:
                output = output * alive.view([1, -1] + [1] * (output.ndim - 2))
            outputs.append((name, output.clone()))
            return outputs[-1][1]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(keep(name))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, x: reads.append(x[0]))
    with Absolute():
        model(torch.ones(1, *shape, dtype=torch.float64))
    seed = scores.double().view_as(reads[-1])
    places = [x for _, x in outputs]
    grads = torch.autograd.grad(reads[-1], places, seed, allow_unused=True)
    found = {}
    for (name, _), grad in zip(outputs, grads, strict=True):
        if grad is not None:  # a layer may run more than once
            s = grad[0].flatten(1).sum(1) if squash and grad.ndim > 2 else grad[0]
            found[name] = found[name] + s if name in found else s
    return found


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm parameters and statistics, signs included."""
    gen = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.normal_(generator=gen)
            module.bias.data.normal_(generator=gen)
            module.running_mean.normal_(generator=gen)
            module.running_var.uniform_(0.1, 3, generator=gen)
    return model


def frl_size(model: nn.Module) -> int:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].in_features


def rand(size: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=gen, dtype=torch.float64)


def assert_same(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], values.detach(), rtol=rtol, atol=0)


# -- small random nets of every kind ---------------------------------------------------


class Apply(nn.Module):
    """A branch, and what its output does with its input: `add`, `sub` or `cat`."""

    def __init__(self, how: str, *branches: nn.Module):
        super().__init__()
        self.how, self.branches = how, nn.ModuleList(branches)

    def forward(self, x):
        made = [branch(x) for branch in self.branches]
        if self.how == "cat":
            return torch.cat(made, 1)
        return getattr(operator, self.how)(*made)


class Shuffle(nn.Module):
    """ShuffleNet's: view, transpose, view."""

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halves(nn.Module):
    """One half goes through a convolution, the other is scaled and flipped."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 1)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([self.conv(a), b.flip(3) * -1.5, a / 4], 1)


def draw_conv(draw, width: int) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, width]))
    size = draw(st.sampled_from([1, 2, 3, (3, 1)]))
    padding = draw(st.sampled_from([0, 1, 2, "same"]))
    dilation = draw(st.integers(1, 2))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, 3, (1, 2)]))
    out = width * draw(st.integers(1, 2))
    return nn.Conv2d(width, out, size, stride, padding, dilation, groups)


def draw_pool(draw) -> nn.Module:
    size = draw(st.integers(2, 3))
    options = {
        "kernel_size": size, "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, size // 2)), "ceil_mode": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        return nn.MaxPool2d(**options)
    divisor = draw(st.sampled_from([None, None, 3]))
    counted = draw(st.booleans())
    return nn.AvgPool2d(**options, count_include_pad=counted, divisor_override=divisor)


def draw_stage(draw, width: int) -> nn.Module:
    """One stage that reads `width` (even) channels."""
    same = nn.Conv2d(width, width, 3, padding=1)
    wide = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
    again = nn.Sequential(same, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    makers = {
        "conv": lambda: draw_conv(draw, width),
        "norm": lambda: nn.Sequential(nn.BatchNorm2d(width), nn.ReLU6()),
        "pool": lambda: draw_pool(draw),
        "dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
        "adaptive": lambda: nn.AdaptiveAvgPool2d(draw(st.integers(1, 4))),
        "lrn": lambda: nn.LocalResponseNorm(3),
        "add": lambda: Apply("add", nn.Identity(), again),
        "sub": lambda: Apply("sub", again, nn.Identity()),
        "pad": lambda: Apply("add", wide, PadShortcut(width, 2 * width)),
        "cat": lambda: Apply("cat", same, nn.Identity(), again),
        "shuffle": Shuffle,
        "halves": lambda: Halves(width),
        "scatter": lambda: Scatter(torch.arange(width) * 2, 2 * width),
    }
    return makers[draw(st.sampled_from(sorted(makers)))]()


@st.composite
def random_nets(draw):
    """A net, the shape of its input, and what it was drawn with."""
    torch.manual_seed(draw(st.integers(0, 999)))
    side, stages = draw(st.integers(6, 9)), [nn.Conv2d(3, 4, 3, padding=1)]
    shape = (3, side, side + 1)
    for _ in range(draw(st.integers(1, 4))):
        try:
            width = nn.Sequential(*stages).eval()(torch.zeros(1, *shape)).shape[1]
            assume(width <= 16)
            stages.append(draw_stage(draw, width))
            x = nn.Sequential(*stages).eval()(torch.zeros(1, *shape))
        except RuntimeError:  # the maps are too small for this stage
            assume(False)
    hidden = nn.Linear(x[0].numel(), 5)
    tail = [nn.Flatten(), nn.Dropout(), hidden, nn.ReLU(), nn.Linear(5, 3)]
    return shake(nn.Sequential(*stages, *tail)), shape


@settings(max_examples=120, deadline=None, derandomize=True)
@given(random_nets())
def test_random_nets_equal_autograd_on_the_absolute_network(drawn):
    model, shape = drawn
    found = propagate(model, rand(5), shape)
    assert_same(found, by_autograd(model, rand(5), shape))


ZOO = [("lenet", 28), ("cifarnet", 32), ("resnet8", 32), ("resnet8_b", 32),
       ("densenet40", 32), ("mobilenet_v2_cifar", 32), ("resnet18", 64),
       ("googlenet_bvlc", 64), ("shufflenet_v2_x0_5", 64)]  # fmt: skip


@pytest.mark.parametrize("name, side", ZOO)
def test_the_zoo_equals_autograd_on_the_absolute_network(name, side):
    torch.manual_seed(1)
    model, shape = shake(models.build(name)), (3, side, side)
    scores = rand(frl_size(model))
    assert_same(propagate(model, scores, shape), by_autograd(model, scores, shape))


@pytest.mark.parametrize("name, side", ZOO[:3])
def test_neurons_are_the_gradients_before_summing(name, side):
    model, shape = shake(models.build(name)), (3, side, side)
    scores = rand(frl_size(model))
    found = propagate(model, scores, shape, neurons=True)
    assert_same(found, by_autograd(model, scores, shape, squash=False))
    sums = propagate(model, scores, shape)
    assert_same({n: x.flatten(1).sum(1) if x.ndim > 1 else x
                 for n, x in found.items()}, sums, 1e-12)  # fmt: skip


# -- dense products --------------------------------------------------------------------


def dense(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear module without bias, one column per input."""
    basis = torch.eye(math.prod(shape)).double().view(-1, *shape)
    return module(basis).flatten(1).T.detach()


def test_a_tiny_chain_equals_a_product_of_dense_matrices():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 3, 2, bias=False)
    second = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    pool, last = nn.AvgPool2d(2, ceil_mode=True), nn.Linear(4, 3, bias=False)
    layers = [first, nn.ReLU(), second, pool, nn.Flatten(), last, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(3, 2))
    found = propagate(model, rand(3), (2, 5, 5))
    copied = copy.deepcopy(model).double()
    after_pool = dense(copied[5], (4,)).abs().T @ rand(3)
    after_second = dense(copied[3], (4, 2, 2)).T @ after_pool
    after_first = dense(copied[2], (3, 4, 4)).abs().T @ after_second
    expected = {
        "0": after_first.view(3, -1).sum(1),
        "2": after_second.view(4, -1).sum(1),
        "5": rand(3),
    }
    assert_same(found, expected)


def test_maxima_give_every_position_of_every_window_the_whole_score():
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(4, 2)
    )
    found = propagate(model, torch.tensor([1.0, 2, 4, 8]), (1, 5, 5), neurons=True)
    expected = [[1, 1, 3, 2, 2]] * 2 + [[5, 5, 15, 10, 10]] + [[4, 4, 12, 8, 8]] * 2
    assert found["0"].tolist() == [expected]


@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize("size", [(3, 4), (2, 5), (7, 1), (5, 9)])
def test_adaptive_windows_are_those_that_torch_pools(kind, size):
    """The average's matrix; for maxima, ones wherever it is not zero."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), kind(size), nn.Flatten())
    model.append(nn.Linear(math.prod(size), 2))
    scores = rand(math.prod(size))
    matrix = dense(nn.AdaptiveAvgPool2d(size), (1, 5, 7))
    if kind is nn.AdaptiveMaxPool2d:
        matrix = (matrix > 0).double()
    found = propagate(model, scores, (1, 5, 7), neurons=True)
    assert_same(found, {"0": (matrix.T @ scores).view(1, 5, 7)}, 1e-12)


def test_a_linear_layer_may_run_at_many_places():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.token = nn.Conv2d(3, 4, 2), nn.Linear(4, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.head(torch.tanh(self.token(x)).mean(1))

    model, scores = Tokens(), rand(6)
    found = propagate(model, scores, (3, 4, 4))
    weight = model.token.weight.detach().double().abs()
    assert_same(found, {"conv": weight.T @ scores, "token": scores})


def test_slopes_below_one_and_shuffles_and_memory_formats():
    torch.manual_seed(4)
    body = [nn.Conv2d(3, 4, 3), nn.PReLU(), nn.ChannelShuffle(2), nn.PReLU(4),
            nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]  # fmt: skip
    model = nn.Sequential(*body, nn.Linear(6, 2))
    plain = propagate(model, rand(6), (3, 6, 6))
    weight = model[4].weight.detach().double().abs().flatten(1)
    shares = (weight.T @ rand(6))[[0, 2, 1, 3]]  # four channels in two groups
    assert_same(plain, {"0": shares, "4": rand(6)})
    model[3].weight.data = torch.tensor([1.0, -3, 0.5, 1])
    steep = propagate(model.to(memory_format=torch.channels_last), rand(6), (3, 6, 6))
    assert_same(steep, {"0": shares * torch.tensor([1, 1, 3, 1]), "4": rand(6)})


# -- choices ---------------------------------------------------------------------------


def small_net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(),
              nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.MaxPool2d(2),
              nn.Flatten(), nn.Linear(32, 7), nn.ReLU(), nn.Linear(7, 4)]  # fmt: skip
    return shake(nn.Sequential(*layers))


def test_the_final_responses_can_be_named():
    model, shape = small_net(), (3, 8, 8)
    assert list(propagate(model, rand(7), shape)) == ["0", "3", "6"]
    for name, size in (("6", 7), ("7", 7), ("4", 32), ("3", 8 * 16), ("8", 4)):
        found = propagate(model, rand(size), shape, frl=name)
        assert list(found) == [n for n in ("0", "3", "6", "8") if n <= name]
    named = propagate(model, rand(7), shape, frl="6")
    assert_same(propagate(model, rand(7), shape), named, 0)
    grid = propagate(model, rand(32).view(8, 2, 2), shape, frl="4")
    assert_same(grid, propagate(model, rand(32), shape, frl="4"), 0)


def test_scores_scale_with_those_of_the_final_responses():
    model, shape = shake(models.build("resnet8")), (3, 16, 16)
    once = propagate(model, rand(64), shape)
    more = propagate(model, 3.7 * rand(64), shape)
    assert_same({n: x / 3.7 for n, x in more.items()}, once, 1e-12)
    tiny = propagate(model, rand(64) * 2.0**-600, shape)
    assert_same({n: x * 2.0**600 for n, x in tiny.items()}, once, 0)


def test_a_norm_counts_by_its_scale_alone():
    model, shape = small_net(), (3, 8, 8)
    plain = copy.deepcopy(model)
    plain[1] = nn.Identity()
    norm = model[1]
    factor = norm.weight.abs().double() / (norm.running_var.double() + norm.eps).sqrt()
    found, bare = (propagate(m, rand(7), shape)["0"] for m in (model, plain))
    torch.testing.assert_close(found, (bare * factor).detach(), rtol=1e-12, atol=0)


def test_permuted_channels_have_permuted_scores():
    model, shape = shake(models.build("cifarnet")), (3, 32, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    moved = copy.deepcopy(model)
    moved.conv1.weight.data = model.conv1.weight.data[order]
    moved.conv2.weight.data = model.conv2.weight.data[:, order]
    before, after = (propagate(m, rand(64), shape) for m in (model, moved))
    assert not torch.allclose(before["conv1"], after["conv1"])
    before["conv1"] = before["conv1"][order]
    assert_same(after, before, 1e-12)


def test_the_model_is_left_as_found():
    model = shake(models.build("resnet8")).train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    found = propagate(model, rand(64).requires_grad_(), (3, 16, 16), joint=0.5)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(x.requires_grad for x in found.values())


# -- pruning while propagating ---------------------------------------------------------


def test_joint_equals_a_direct_loop_on_a_chain_of_matrices():
    torch.manual_seed(0)
    widths, layers = [6, 9, 8, 7, 5], []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(5, 3))
    found = propagate(model, rand(5), (6, 1, 1), joint=0.4)
    s, expected = rand(5), {}
    for k in (7, 5, 3, 1):
        expected[str(k)] = s.clone()
        s[s.argsort()[: int(0.4 * len(s))]] = 0
        s = model[k].weight.detach().double().abs().T @ s
    assert_same(found, expected)
    alone = propagate(model, rand(5), (6, 1, 1))
    assert not torch.allclose(alone["1"], found["1"])


@pytest.mark.parametrize("name, rate", [
    ("lenet", 0.5), ("densenet40", 0.3), ("resnet8", 0.5), ("resnet8_b", 0.25),
    ("mobilenet_v2_cifar", 0.4), ("small", 0.5)])  # fmt: skip
def test_what_joint_removes_passes_nothing_on_and_is_what_the_plan_removes(name, rate):
    """Tied layers keep the scores of a sweep without removal; the others lose some."""
    torch.manual_seed(2)
    model = small_net() if name == "small" else shake(models.build(name))
    shape = (3, 8, 8) if name == "small" else (3, 28, 28)
    scores = rand(frl_size(model))
    found = propagate(model, scores, shape, joint=rate)
    chosen = plan.from_scores(model, found, shape, rate=rate)
    groups = plan.ranking.build_graph(model, shape).group_of
    masks = {n: torch.zeros(len(found[n])).double() for n in chosen.keep if n in found}
    for n, mask in masks.items():
        mask[chosen.keep[n]] = 1
    whole = by_autograd(model, scores, shape)
    gated = by_autograd(model, scores, shape, masks=masks)
    expected = {n: (whole if sum(m in found for m in groups[n].layers) > 1
                    else gated)[n] for n in found}  # fmt: skip
    assert_same(found, expected)
    assert any(not torch.allclose(gated[n], whole[n]) for n in found)


def test_joint_takes_a_rate_per_layer():
    model, shape = small_net(), (3, 8, 8)
    alone = propagate(model, rand(7), shape)
    last = propagate(model, rand(7), shape, joint={"6": 0.5})
    assert torch.equal(last["6"], alone["6"]) and bool((last["3"] < alone["3"]).all())
    first = propagate(model, rand(7), shape, joint={"0": 0.5})
    assert_same(first, alone, 0)
    assert_same(propagate(model, rand(7), shape, joint=0), alone, 0)
    net = models.build("resnet8")
    tied = propagate(net, rand(64), (3, 16, 16), joint={"layer3.0.conv2": 0.5})
    free = propagate(net, rand(64), (3, 16, 16))
    assert bool((tied["layer3.0.conv1"] < free["layer3.0.conv1"]).all())


# -- one scale -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "densenet40"])
def test_rescaling_changes_no_digit(name, monkeypatch):
    model, shape = shake(models.build(name)), (3, 16, 16)
    scores, results = rand(frl_size(model)), []
    for largest in (0, 3, 10**6):
        monkeypatch.setattr(scale, "LARGEST", largest)
        results.append(propagate(model, scores, shape, joint=0.3))
    assert_same(results[0], results[1], 0)
    assert_same(results[0], results[2], 0)


def diagonal_chain(depth: int, gain: float) -> nn.Sequential:
    """Each layer multiplies two scores by `gain` and by 1.01 * `gain`."""
    layers = [nn.Flatten()]
    for _ in range(depth):
        layers.append(nn.Linear(2, 2).double())
        layers[-1].weight.data = torch.tensor(
            [gain, 1.01 * gain], dtype=torch.float64
        ).diag()
    return nn.Sequential(*layers, nn.Linear(2, 2).double())


@pytest.mark.parametrize("gain", [1e3, 1e-3])
def test_deep_nets_neither_overflow_nor_vanish(gain):
    found = propagate(diagonal_chain(170, gain), torch.ones(2), (2, 1, 1))  # 1e510
    rows = torch.stack(list(found.values()))
    assert bool(torch.isfinite(rows).all()) and bool((rows > 0).all())
    powers = torch.arange(169, -1, -1).double()
    torch.testing.assert_close(rows[:, 1] / rows[:, 0], 1.01**powers)
    steps = (rows[:-1, 0] / rows[1:, 0]).log10()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log10(gain)))


def test_layers_too_far_apart_get_a_scale_each():
    model = diagonal_chain(300, 1e3)
    with pytest.raises(ValueError, match="scale='layer'"):
        propagate(model, torch.ones(2), (2, 1, 1))
    found = propagate(model, torch.ones(2), (2, 1, 1), scale="layer")
    rows = torch.stack(list(found.values()))
    torch.testing.assert_close(rows.sum(1), torch.ones(300).double())
    torch.testing.assert_close(float(rows[0, 1] / rows[0, 0]), 1.01**299)
    with pytest.raises(ValueError, match="scale must be"):
        propagate(model, torch.ones(2), (2, 1, 1), scale="log")


@pytest.mark.parametrize("name", ["resnet101", "densenet121"])
def test_published_depths_stay_on_the_scale_of_the_final_responses(name):
    with torch.device("meta"):
        model = models.build(name)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.normal_(0, 0.05)
    shake(model)
    scores = rand(frl_size(model))
    found = propagate(model, scores, (3, 32, 32))
    assert all(bool(torch.isfinite(x).all() and (x > 0).all()) for x in found.values())
    top = found["conv1" if name == "resnet101" else "features.conv0"].max()
    assert float(top) > 1e39  # float32 ends at 3.4e38
    last = list(found.values())[-1]
    assert float(last.max()) < 1e3


# -- refusals --------------------------------------------------------------------------


class Gate(nn.Module):
    """Squeeze and excite in short: features times features."""

    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class Assign(nn.Module):
    """Writes into a tensor of zeros that no trace follows."""

    def forward(self, x):
        y = torch.zeros(len(x), 8, *x.shape[2:], device=x.device)
        y[:, :4] = x
        return y


class Half(nn.Module):
    """Adds to a part of a tensor and goes on with the whole."""

    def forward(self, x):
        x[:, :2].add_(x[:, 2:])
        return x


class Learned(nn.Module):
    """A learned factor per channel, outside any layer."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.factor


REFUSED = [
    (nn.GroupNorm(2, 4), "'native_group_norm' in '1'.*replace it"),
    (Gate(), "'mul' in '1'.*joins features"),
    (Learned(), "'mul' in '1'.*multiplies with a tensor"),
    (nn.ConvTranspose2d(4, 4, 2), "'convolution' in '1'"),
    (nn.Softmax(1), "'_softmax' in '1'"),
    (nn.Upsample(scale_factor=2), "'upsample_nearest2d' in '1'"),
    (nn.BatchNorm2d(4, track_running_stats=False), "'1'.*running variance"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'1'.*'reflect'"),
    (Assign(), "'copy_' in '1'"),
    (Half(), "'add_' in '1'"),
]


@pytest.mark.parametrize("module, message", REFUSED, ids=lambda x: type(x).__name__)
def test_operations_without_a_rule_are_named(module, message):
    shape, first = (3, 4, 4), nn.Conv2d(3, 4, 1)
    body = nn.Sequential(
        first, module, nn.Conv2d(8 if type(module) is Assign else 4, 4, 1)
    )
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        propagate(model, torch.ones(4), shape)
    found = propagate(model, torch.ones(64), shape, frl="0")  # in front of it
    assert list(found) == ["0"]


def test_an_operation_in_front_of_the_first_layer_does_not_matter():
    model = nn.Sequential(Gate(), *small_net())
    assert list(propagate(model, rand(7), (3, 8, 8))) == ["1", "4", "7"]


@pytest.mark.parametrize("scores, message", [
    (torch.ones(6), r"has 7 responses, got scores of shape \(6,\)"),
    (torch.ones(1, 7), r"shape \(1, 7\)"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, -1]), "cannot be negative"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, math.nan]), "not finite"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, math.inf]), "not finite"),
    (torch.zeros(7), "all are zero")])  # fmt: skip
def test_scores_that_cannot_be_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        propagate(small_net(), scores, (3, 8, 8))


@pytest.mark.parametrize("joint, message", [
    (1.0, r"\[0, 1\), got 1.0"), (-0.1, r"\[0, 1\)"), (math.nan, r"\[0, 1\)"),
    ({"33": 0.5}, "no layer '33'; nearest: '3'"), ({"3": 1.5}, "'3'.*1.5"),
    ({"8": 0.5}, "'8' does not stand in front")])  # fmt: skip
def test_rates_that_cannot_be_are_refused(joint, message):
    with pytest.raises(ValueError, match=message):
        propagate(small_net(), torch.ones(7), (3, 8, 8), joint=joint)


def test_tied_layers_with_two_rates_are_refused():
    rates = {"conv1": 0.5, "layer1.0.conv2": 0.25}
    with pytest.raises(ValueError, match="one rate: conv1, layer1"):
        propagate(models.build("resnet8"), torch.ones(64), (3, 16, 16), joint=rates)


def test_final_responses_that_cannot_be_found_are_refused():
    model, convolutions = small_net(), nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"no linear layer.*must be named"):
        propagate(convolutions, torch.ones(4), (3, 4, 4))
    with pytest.raises(ValueError, match="no module 'ip1'"):
        propagate(model, torch.ones(7), (3, 8, 8), frl="ip1")
    head = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no convolution or linear layer stands"):
        propagate(head, torch.ones(3), (3, 1, 1))


def test_weights_that_are_not_finite_are_named():
    model = small_net()
    model[3].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'3'.*not finite"):
        propagate(model, torch.ones(7), (3, 8, 8))
