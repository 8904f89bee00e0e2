"""Propagation against pushes of one channel, dense products and direct loops."""

import copy
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import models, plan
from lib.graph import build_graph
from lib.models.resnet import PadShortcut
from lib.nisp.propagation import propagate
from lib.surgery.movers import Scatter

pytestmark = pytest.mark.usefixtures("one_thread")


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random BatchNorm parameters and statistics, signs included."""
    gen = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
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


# -- oracle: the answer of a net without negative numbers to a push --------------------


class SumPool(nn.Module):
    """The sum over the windows of a max pool."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.options = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode

    def forward(self, x):
        return F.avg_pool2d(x, *self.options, True, 1)


def make_absolute(model: nn.Module) -> nn.Module:
    """|W|, no biases, BatchNorms that only scale, sums for maxima.

    On images without negative numbers no ReLU cuts, and the whole net is linear.
    """
    net = copy.deepcopy(model).double().eval()
    for name, module in list(net.named_modules()):
        for parameter in module.parameters(recurse=False):
            parameter.data.abs_()
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
        if isinstance(module, _BatchNorm):
            module.running_mean.zero_()
        if isinstance(module, nn.LocalResponseNorm):
            module.forward = lambda x: x
        if isinstance(module, nn.MaxPool2d):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, SumPool(module))
    return net


FEW = 8  # channels of each layer that are pushed


def by_pushing(model, scores, shape, names, *, masks=None) -> dict[str, Tensor]:
    """What one more at every position of one channel adds to the weighted responses.

    One blank image for each of the first channels; `masks` silence channels of layers.
    The push is small enough for no activation to saturate.
    """
    net, found, push = make_absolute(model), {}, 1e-60
    modules, seen = dict(net.named_modules()), []
    for name, mask in (masks or {}).items():
        shaped = mask.view([-1] + [1] * isinstance(modules[name], nn.Conv2d) * 2)
        modules[name].register_forward_hook(lambda m, i, y, g=shaped: y * g)
    classifier = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    classifier.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for name in names:
        width = len(modules[name].weight)
        each = push * torch.eye(min(width, FEW), width).double()

        def add(module, inputs, y, each=each):
            return y + each.view(*each.shape, *[1] * (y.ndim - 2))

        hook = modules[name].register_forward_hook(add)
        with torch.no_grad():
            net(torch.zeros(len(each), *shape, dtype=torch.float64))
        hook.remove()
        found[name] = seen.pop() @ scores / push
    return found


ZOO = [("lenet", 28), ("cifarnet", 32), ("resnet8", 32), ("resnet8_b", 32),
       ("densenet40", 8), ("mobilenet_v2_cifar", 8), ("googlenet_bvlc", 48),
       ("shufflenet_v2_x0_5", 64)]  # fmt: skip


@pytest.mark.parametrize("name, side", ZOO)
def test_scores_are_what_a_push_of_each_channel_adds(name, side):
    torch.manual_seed(1)
    model, shape = shake(models.build(name)), (3, side, side)
    scores = rand(frl_size(model))
    found = propagate(model, scores, shape)
    some = list(found)[:: 1 + len(found) // 8]
    expected = by_pushing(model, scores, shape, some)
    assert_same({n: found[n][:FEW] for n in some}, expected)


@pytest.mark.parametrize("name", ["lenet", "resnet8"])
def test_neurons_are_what_channels_are_the_sums_of(name):
    model, shape = shake(models.build(name)), (3, 28, 28)
    scores = rand(frl_size(model))
    found = propagate(model, scores, shape, neurons=True)
    assert [x.ndim for x in found.values()] == [
        3 if isinstance(model.get_submodule(n), nn.Conv2d) else 1 for n in found
    ]
    sums = {n: x.flatten(1).sum(1) if x.ndim > 1 else x for n, x in found.items()}
    assert_same(propagate(model, scores, shape), sums, 1e-12)


# -- oracle: dense products through small random nets of every kind --------------------


class Apply(nn.Module):
    """Branches, and what is done with what they make: `add`, `sub` or `cat`."""

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
    """Halves are flipped, scaled, shrunk and written over with another."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        y = torch.cat([b.flip(3) * -1.5, a / 4, 1 - a], 1)
        y[:, : a.shape[1]] = y[:, : a.shape[1]] - 2 * b
        return y.add_(1)


def dense(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """|Jacobian| of a linear module or a max pool, [outputs, inputs].

    A single one in an image of zeros is the maximum of each window it stands in.
    """
    basis = torch.eye(math.prod(shape)).double().view(-1, *shape)
    with torch.no_grad():
        made = module(torch.cat([basis, torch.zeros_like(basis[:1])]))
    return (made[:-1] - made[-1]).abs().flatten(1).T


def pull(module, name: str, shape, s: Tensor, found: dict) -> Tensor:
    """Flat scores of a module's inputs from those of its outputs, by dense matrices."""
    if isinstance(module, nn.Sequential):
        shapes = [shape]
        for child in module:
            shapes.append(child(torch.zeros(1, *shapes[-1]).double())[0].shape)
        for child, part in reversed(list(module.named_children())):
            shapes.pop()
            s = pull(part, f"{name}.{child}".lstrip("."), shapes[-1], s, found)
        return s
    if isinstance(module, Apply):
        sizes = [b(torch.zeros(1, *shape).double()).numel() for b in module.branches]
        parts = s.split(sizes) if module.how == "cat" else [s] * len(sizes)
        return sum(
            pull(branch, f"{name}.branches.{i}", shape, part, found)
            for i, (branch, part) in enumerate(zip(module.branches, parts, strict=True))
        )
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        linear = isinstance(module, nn.Linear)
        width = module.out_features if linear else module.out_channels
        found[name] = s.view(width, -1).sum(1)
    passed = (nn.LocalResponseNorm, nn.Dropout, nn.ReLU, nn.ReLU6)
    return s if isinstance(module, passed) else dense(module, shape).T @ s


def draw_conv(draw, width: int) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, width]))
    size = draw(st.sampled_from([1, 2, 3, (3, 1)]))
    padding = draw(st.sampled_from([0, 1, 2, "same"]))
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
    dilation = draw(st.integers(1, 2))
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, 3, (1, 2)]))
    out = width * draw(st.integers(1, 2))
    return nn.Conv2d(
        width, out, size, stride, padding, dilation, groups, padding_mode=mode
    )


def draw_pool(draw) -> nn.Module:
    size = draw(st.integers(2, 3))
    options = {
        "kernel_size": size, "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, size // 2)), "ceil_mode": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        return nn.MaxPool2d(**options, dilation=draw(st.sampled_from([1, (1, 1)])))
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
        "adaptive": lambda: nn.AdaptiveAvgPool2d(draw(st.integers(1, 4))),
        "adaptive max": lambda: nn.AdaptiveMaxPool2d((draw(st.integers(1, 9)), 2)),
        "lrn": lambda: nn.LocalResponseNorm(3),
        "add": lambda: Apply("add", nn.Identity(), again),
        "sub": lambda: Apply("sub", again, nn.Identity()),
        "pad": lambda: Apply("add", wide, PadShortcut(width, 2 * width)),
        "cat": lambda: Apply("cat", same, nn.Identity(), nn.ReLU()),
        "transposed": lambda: nn.ConvTranspose2d(width, width, 2, stride=2),
        "shuffle": Shuffle,
        "halves": Halves,
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
            assume(width <= 16 and width % 2 == 0)
            stages.append(draw_stage(draw, width))
            x = nn.Sequential(*stages).eval()(torch.zeros(1, *shape))
            assume(x.numel() < 1500)
        except RuntimeError:  # the maps are too small for this stage
            assume(False)
    hidden = nn.Linear(x[0].numel(), 5)
    tail = [nn.Flatten(), nn.Dropout(), hidden, nn.ReLU(), nn.Linear(5, 3)]
    return shake(nn.Sequential(*stages, *tail)).double().eval(), shape


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_nets())
def test_random_nets_equal_products_of_dense_matrices(drawn):
    model, shape = drawn
    expected: dict[str, Tensor] = {}
    pull(model[:-1], "", shape, rand(5), expected)
    found = propagate(model, rand(5), shape)
    layers = build_graph(model, shape).layers
    assert_same(found, {n: expected[n] for n in layers if n in expected})


class Forward(nn.Module):
    """A convolution of three maps to four, what a function makes of it, a head."""

    def __init__(self, function, size=4, **layers):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2), nn.Linear(size, 2)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.function(self, self.conv(x)))


def test_a_linear_layer_may_run_at_many_places():
    model = Forward(
        lambda m, x: torch.tanh(m.token(x.flatten(2).transpose(1, 2))).mean(1),
        6, token=nn.Linear(4, 6),
    )  # fmt: skip
    scores = rand(6)
    found = propagate(model, scores, (3, 4, 4))
    weight = model.token.weight.detach().double().abs()
    assert_same(found, {"conv": weight.T @ scores, "token": scores})


def test_a_forward_may_run_without_gradients():
    def plain(m, x):
        return (x * 3).mean((2, 3))

    def unwatched(m, x):
        with torch.no_grad():
            return plain(m, x)

    torch.manual_seed(0)
    model, found = Forward(plain), []
    for model.function in (plain, unwatched):
        found.append(propagate(model, rand(4), (3, 4, 4)))
    assert_same(found[1], found[0], 0)


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


def squeeze_excite(m, x):
    gate = m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()
    return (x * gate).mean((2, 3))


def test_a_gate_and_what_it_multiplies_get_the_score_each():
    layers = {"down": nn.Conv2d(4, 2, 1), "up": nn.Conv2d(2, 4, 1)}
    model, s = Forward(squeeze_excite, **layers), rand(4)
    down, up = (m.weight.detach().double().abs().flatten(1) for m in layers.values())
    found = propagate(model, s, (3, 4, 4))
    expected = {"up": s, "down": up.T @ s, "conv": s + down.T @ (up.T @ s)}
    assert_same(found, {n: expected[n] for n in ("conv", "down", "up")}, 1e-12)


def test_published_nets_with_gates_have_scores():
    model = shake(models.build("mobilenet_v3_small"))
    found = propagate(model, rand(1024), (3, 64, 64), joint=0.25)
    assert sum(".fc1" in n for n in found) == 9
    assert all(bool((v > 0).any() and v.isfinite().all()) for v in found.values())


# -- choices ---------------------------------------------------------------------------


def small_net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(),
              nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.MaxPool2d(2),
              nn.Flatten(), nn.Linear(32, 7), nn.ReLU(), nn.Linear(7, 4)]  # fmt: skip
    return shake(nn.Sequential(*layers))


def test_a_norm_counts_by_its_scale_alone_and_behind_it_not_at_all():
    model, shape = small_net(), (3, 8, 8)
    model[1].weight.data[2] = 0
    plain = copy.deepcopy(model)
    plain[1] = nn.Identity()
    norm = model[1]
    factor = norm.weight.abs().double() / (norm.running_var.double() + norm.eps).sqrt()
    bare = propagate(plain, rand(7), shape)
    found = propagate(model, rand(7), shape)
    behind = propagate(model, rand(7), shape, behind_norm=True)
    assert_same(found, bare | {"0": bare["0"] * factor}, 1e-12)
    assert_same(behind, bare | {"0": bare["0"] * (factor > 0)}, 1e-12)  # constant: 0


def test_norms_without_scale_or_statistics():
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Flatten(),
              nn.Linear(3 * 4 * 4, 2)]  # fmt: skip
    model, shape = nn.Sequential(*layers), (1, 6, 6)
    model[1].running_var.copy_(torch.tensor([1.0, 4, 9]))
    model[1].eps = 0.0
    found = propagate(model, torch.ones(48), shape)["0"]
    assert found.tolist() == pytest.approx([16, 8, 16 / 3])
    behind = propagate(model, torch.ones(48), shape, behind_norm=True)["0"]
    assert behind.tolist() == pytest.approx([16, 16, 16])


def test_the_model_is_left_as_found_in_any_mode():
    model = shake(models.build("resnet8")).train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    scores, shape = rand(64).requires_grad_(), (3, 16, 16)
    found = propagate(model, scores, shape, joint=0.5)
    with torch.inference_mode():
        assert_same(propagate(model, scores, shape, joint=0.5), found, 0)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(x.requires_grad for x in found.values())


# -- pruning while propagating ---------------------------------------------------------


@pytest.mark.parametrize("name, rate", [
    ("lenet", 0.5), ("densenet40", 0.3), ("resnet8", 0.5), ("resnet8_b", 0.25),
    ("mobilenet_v2_cifar", 0.4), ("small", 0.5)])  # fmt: skip
def test_what_joint_removes_passes_nothing_on_and_is_what_the_plan_removes(name, rate):
    """Tied layers keep the scores of a pass without removal; the others lose some."""
    torch.manual_seed(2)
    model = small_net() if name == "small" else shake(models.build(name))
    shape = (3, 28, 28) if name == "lenet" else (3, 8, 8)
    scores, graph = rand(frl_size(model)), build_graph(model, shape)
    whole = propagate(model, scores, shape, graph=graph)
    found = propagate(model, scores, shape, joint=rate, graph=graph)
    chosen = plan.from_scores(model, found, shape, rate=rate, graph=graph)
    masks = {n: torch.zeros(len(found[n])).double() for n in chosen.keep if n in found}
    for n, mask in masks.items():
        mask[chosen.keep[n]] = 1
    tied = {n for n in found if sum(m in found for m in graph.group_of[n].layers) > 1}
    assert_same({n: found[n] for n in tied}, {n: whole[n] for n in tied}, 0)
    alone = [n for n in found if n not in tied][:: 1 + len(found) // 10]
    expected = {
        n: by_pushing(
            model, scores, shape, [n], masks={m: x for m, x in masks.items() if m != n}
        )[n]
        for n in alone
    }
    assert_same({n: found[n][:FEW] for n in alone}, expected)
    assert any(not torch.allclose(found[n], whole[n]) for n in alone)


def test_joint_spares_what_the_plan_spares():
    """A layer with a part of a stream keeps a channel, however low its scores are."""
    torch.manual_seed(0)
    pair = Apply("cat", nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1))
    stream = Apply("add", pair, nn.Conv2d(4, 6, 1))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 2)]
    model, shape = nn.Sequential(nn.Conv2d(3, 4, 1), stream, *head).double(), (3, 2, 2)
    with torch.no_grad():
        model[4].weight[:, :2] /= 100  # what the narrow layer makes hardly counts
    tied = [n for n, m in model[1].named_modules(prefix="1") if type(m) is nn.Conv2d]
    rates = dict.fromkeys(tied, 0.5)
    found = propagate(model, rand(5), shape, joint=rates)
    chosen = plan.from_scores(model, found, shape, rate=rates).keep
    assert len(chosen[tied[0]]) == 1  # both would be among the lowest three of six
    for name in tied:
        layer = model.get_submodule(name)
        kept = torch.isin(torch.arange(len(layer.weight)), torch.tensor(chosen[name]))
        with torch.no_grad():
            layer.weight[~kept] = 0
    assert_same({"0": found["0"]}, {"0": propagate(model, rand(5), shape)["0"]})


def test_joint_counts_a_rate_as_it_is_written():
    """.58 of 50 is 29, and 28.999... in floats: what is passed on is what is kept."""
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 2)]
    model, shape, scores = nn.Sequential(nn.Flatten(), *layers), (4, 1, 1), rand(50)
    found = propagate(model, scores, shape, joint={"3": 0.58})
    chosen = plan.from_scores(model, {"3": found["3"]}, shape, rate=0.58)
    best = scores.argsort(descending=True)[: 50 - 29]
    assert chosen.keep == {"3": sorted(best.tolist())}
    weight = model[3].weight.detach().double().abs()
    assert_same({"1": found["1"]}, {"1": weight[best].T @ scores[best].double()})


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


def diagonal_chain(depth: int, gain: float) -> nn.Sequential:
    """Each layer multiplies two scores by `gain` and by 1.01 * `gain`."""
    layers = [nn.Flatten()]
    for _ in range(depth):
        layers.append(nn.Linear(2, 2).double())
        layers[-1].weight.data = torch.tensor(
            [gain, 1.01 * gain], dtype=torch.float64
        ).diag()
    return nn.Sequential(*layers, nn.Linear(2, 2).double())


@pytest.mark.parametrize("start", [1e-300, 1.0, 1e300])
def test_deep_nets_neither_overflow_nor_vanish(start):
    model, scores = (
        diagonal_chain(80, 1e3),
        torch.full((2,), start, dtype=torch.float64),
    )
    found = propagate(model, scores, (2, 1, 1))  # by 1e237 from end to end
    rows = torch.stack(list(found.values()))
    assert bool(torch.isfinite(rows).all()) and bool((rows > 0).all())
    assert start != 1 or rows[-1, 0] == 1  # else the nearest scale that has room
    powers = torch.arange(79, -1, -1).double()
    torch.testing.assert_close(rows[:, 1] / rows[:, 0], 1.01**powers)
    steps = (rows[:-1, 0] / rows[1:, 0]).log10()
    torch.testing.assert_close(steps, torch.full_like(steps, 3))


def test_nets_beyond_float64_are_refused_by_the_layer_where_it_ends():
    with pytest.raises(ValueError, match="'197': its scores are beyond the range"):
        propagate(diagonal_chain(300, 1e3), torch.ones(2), (2, 1, 1))


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


class Run(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def write(x):
    y = torch.zeros(len(x), 4, *x.shape[2:], device=x.device)
    y[:, :2] = x[:, :2]
    return y


REFUSED = [
    (nn.GroupNorm(2, 4), "'group_norm' in '1'.*replace it"),
    (Run(lambda x: x * x.mean((2, 3), keepdim=True)), "'mul' in '1'.*neither is a"),
    (Run(lambda x: x / x.mean()), "'div' in '1'.*divides by a feature"),
    (Run(lambda x: x.max(1, keepdim=True)[0] + x), "'max' in '1'"),
    (Run(lambda x: x[:, x[0, :, 0, 0].argsort()]), "'argsort' in '1'"),
    (Run(torch.exp), "'exp' in '1'"),
    (Run(write), "'__setitem__' in '1'.*torch.float32"),
    (nn.Softmax(1), "'softmax' in '1'"),
    (Run(lambda x: x.chunk(1, 1)[0].add_(x)), "'add_' in '1'"),
    (nn.Upsample(scale_factor=2), "'interpolate' in '1'"),
    (nn.BatchNorm2d(4, track_running_stats=False), "'1'.*running variance"),
    (nn.Threshold(0.5, 20.0), "'_threshold' in '1' .*jumps at its threshold"),
    (nn.MaxPool2d(2, dilation=2), "'max_pool2d' in '1' .*with a dilation"),
    (
        Run(lambda x: F.max_pool1d(x.flatten(2), 2)[..., None]),
        "'max_pool1d' in '1' .*one axis",
    ),
]


@pytest.mark.parametrize("module, message", REFUSED, ids=lambda x: str(x)[:20])
def test_operations_without_a_rule_are_named(module, message):
    shape = (3, 4, 4)
    body = nn.Sequential(nn.Conv2d(3, 4, 1), module, nn.Conv2d(4, 4, 1))
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        propagate(model, torch.ones(4), shape)


def test_an_operation_in_front_of_the_first_layer_does_not_matter_but_its_image_does():
    model = nn.Sequential(Run(lambda x: x * x.mean()), *small_net())
    assert list(propagate(model, rand(7), (3, 8, 8))) == ["1", "4", "7"]

    class ByImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head((self.conv(x) * x).mean((2, 3)))

    with pytest.raises(ValueError, match=r"'mul' in the forward .*from the image"):
        propagate(ByImage(), rand(3), (3, 8, 8))


@pytest.mark.parametrize("scores, message", [
    (torch.ones(6), r"has 7 responses, got scores of shape \(6,\)"),
    (torch.ones(1, 7), r"shape \(1, 7\)"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, -1]), "finite numbers >= 0"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, math.nan]), "finite numbers"),
    (torch.tensor([1.0, 2, 3, 4, 5, 6, math.inf]), "finite numbers"),
    (torch.zeros(7), "not all of them 0")])  # fmt: skip
def test_scores_that_cannot_be_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        propagate(small_net(), scores, (3, 8, 8))


@pytest.mark.parametrize("joint, message", [
    (1.0, r"\[0, 1\), got 1.0"), (-0.1, r"\[0, 1\)"), (math.nan, r"\[0, 1\)"),
    ({"33": 0.5}, "no layer '33'.*'3'"), ({"3": 1.5}, "'3'.*1.5"),
    ({"8": 0.5}, "'8' does not stand in front")])  # fmt: skip
def test_rates_that_cannot_be_are_refused(joint, message):
    with pytest.raises(ValueError, match=message):
        propagate(small_net(), torch.ones(7), (3, 8, 8), joint=joint)


def test_tied_layers_with_two_rates_are_refused():
    rates = {"conv1": 0.5, "layer1.0.conv2": 0.25}
    with pytest.raises(ValueError, match="one rate: conv1, layer1"):
        propagate(models.build("resnet8"), torch.ones(64), (3, 16, 16), joint=rates)


def test_final_responses_that_cannot_be_found_are_refused():
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3))
    with pytest.raises(ValueError, match="here it is '1', Conv2d"):
        propagate(convolutions, torch.ones(4), (3, 4, 4))
    head = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no convolution or linear layer stands"):
        propagate(head, torch.ones(3), (3, 1, 1))


def test_a_convolution_that_classifies_stands_for_a_linear_layer_behind_the_pool():
    """Both orders are one function where nothing stands between mean and classes."""
    front = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
             nn.MaxPool2d(2), nn.Conv2d(6, 7, 3), nn.ReLU()]  # fmt: skip
    behind = nn.Sequential(*front, nn.Conv2d(7, 4, 1), nn.AdaptiveAvgPool2d(1))
    before = nn.Sequential(
        *front, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)
    )
    scores = torch.rand(7)
    for options in ({}, {"joint": 0.5}, {"behind_norm": True}, {"neurons": True}):
        found = propagate(behind, scores, (3, 9, 9), **options)
        expected = propagate(before, scores, (3, 9, 9), **options)
        assert found.keys() == expected.keys() == {"0", "4"}
        for name in found:
            torch.testing.assert_close(found[name], expected[name])


def test_squeezenet_is_scored():
    net = models.build("squeezenet1_1")
    found = propagate(net, torch.ones(512), (3, 64, 64))
    assert len(found) == 25 and all(bool(s.sum() > 0) for s in found.values())


def test_weights_that_are_not_finite_are_named():
    model = small_net()
    model[3].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'3'.*not finite"):
        propagate(model, torch.ones(7), (3, 8, 8))
