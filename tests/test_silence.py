"""Never wrong in silence: each kind of fault is refused with its line, or exact.

Nets small enough to see why. The right outcome is exactness or one clear refusal; a
shrunk network that computes something else than the masked one is the only wrong one.
"""

import copy
import types
from collections import namedtuple
from dataclasses import dataclass

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lib import baselines, cost, data, models, surgery, train
from lib import plan as plans
from lib.graph import build_graph
from lib.plan import Plan

SHAPE = (3, 8, 8)
HALF = [0, 1, 4, 5]
pytestmark = pytest.mark.usefixtures("one_thread")


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Net(nn.Module):
    """`a` reads the images, `b` what `forward` made of them, `fc` the mean of that."""

    def __init__(self, forward, *, out=8, **parts):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, out), nn.Linear(out, 5)
        for name, part in parts.items():
            setattr(self, name, part)
        self.forward_of = forward

    def forward(self, x):
        x = self.forward_of(self, x)
        return self.fc(x.flatten(2).mean(2)) if isinstance(x, torch.Tensor) else x


def net(forward, **parts):
    torch.manual_seed(0)
    return oracle.roughen(Net(forward, **parts).double()).eval()


def plain(self, x):
    return F.relu(self.b(F.relu(self.a(x))))


def assert_refused(model, *messages, plan=None, shape=SHAPE):
    """Both ways of acting on the plan say the same, and name the layer."""
    for act in (surgery.shrink, surgery.mask):
        for message in messages:
            with pytest.raises(ValueError, match=message):
                act(model, plan or Plan({"a": HALF}), shape)


def assert_same(model, plan, shape=SHAPE):
    """The shrunk network computes what the masked one does; both are run for real."""
    x = oracle.images(shape)
    masked = oracle.evaluate(surgery.mask(model, plan, shape), x)
    small = oracle.evaluate(surgery.shrink(model, plan, shape), x)
    assert oracle.difference(small, masked) < 1e-10


# -- unknown is not constant ---------------------------------------------------------


def behind_unknown(part):
    """`a`, an operation without a rule, `part`: what must then stay as it is."""
    return lambda s, x: F.relu(s.c(part(s, F.softmax(s.a(x), 1))))


UNKNOWN = {
    "depthwise": (lambda s, x: s.d(x), {"d": conv(8, 16, groups=8), "c": conv(16, 8)}),
    "grouped": (lambda s, x: s.d(x), {"d": conv(8, 16, groups=2), "c": conv(16, 8)}),
    "concatenated": (
        lambda s, x: s.d(torch.cat([x, x], 1)),
        {"d": conv(16, 16, groups=16), "c": conv(16, 8)},
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_channels_that_were_lost_hold_what_they_touch(kind):
    part, parts = UNKNOWN[kind]
    model = net(behind_unknown(part), **parts)
    groups = {g.layers: g.fixed for g in surgery.channel_groups(model, SHAPE)}
    assert "softmax" in groups["a",]
    if kind == "grouped":  # its own outputs are free
        kept = Plan({"d": [*range(3), *range(8, 11)]})
        oracle.assert_exact(model, kept, SHAPE, oracle.images(SHAPE), behind=False)
    else:
        assert_refused(model, "d cannot be pruned", plan=Plan({"d": range(8)}))


@pytest.mark.parametrize("part", [nn.PReLU(8), nn.BatchNorm2d(8)])
def test_a_module_shared_with_lost_channels_holds_those_it_knows(part):
    def forward(self, x):
        return F.relu(self.b(self.p(self.a(x)) + self.p(F.softmax(self.c(x), 1))))

    model = net(forward, p=part, c=conv(3, 8))
    assert_refused(model, "a cannot be pruned")


def test_zeros_beside_channels_hold_nothing_but_what_they_balance():
    def widened(self, x):
        x = F.relu(self.a(x))
        zeros = x.new_zeros(len(x), 8, *x.shape[2:])
        return F.relu(self.d(torch.cat([x, zeros], 1)))

    model = net(widened, d=conv(16, 8))
    plan, x = Plan({"a": HALF}), oracle.images(SHAPE)
    oracle.assert_exact(model, plan, SHAPE, x, behind=False)
    grouped = net(widened, d=conv(16, 8, groups=2))
    assert_refused(grouped, "'d' is grouped and reads them together with others")


def test_channels_added_to_constants_stay_in_the_tensor():
    def forward(self, x):
        y = F.relu(self.c(x))
        zeros = torch.zeros(len(x), 4, 8, 8, dtype=x.dtype, device=x.device)
        return F.relu(self.b(self.a(x) + torch.cat([y, zeros], 1)))

    model, kept = net(forward, c=conv(3, 4)), [0, 2, 3, 6]
    plan = Plan({"a": kept, "c": [0, 2, 3]})
    x = oracle.images(SHAPE)
    small = oracle.assert_exact(model, plan, SHAPE, x, behind=False)
    assert small.a.inner.weight.shape[0] == 4 and small.b.inner.weight.shape[1] == 4


def test_a_dense_layer_that_a_normalisation_reads_is_not_dropped():
    forward = lambda s, x: s.c(s.n(s.d(s.a(x))))  # noqa: E731
    parts = {"d": oracle.Dense(8), "c": conv(12, 8)}
    free = net(forward, n=nn.ReLU(), **parts)
    assert surgery.droppable(free, SHAPE) == ["d"]
    whole = net(forward, n=nn.GroupNorm(3, 12), **parts)  # a module of its own: zeros
    assert surgery.droppable(whole, SHAPE) == ["d"]
    plan, x = Plan(drop=["d"]), oracle.images(SHAPE)
    oracle.assert_exact(whole, plan, SHAPE, x, hooks=False)
    forward = lambda s, x: s.c(F.group_norm(s.d(s.a(x)), 3))  # noqa: E731
    model = net(forward, **parts)
    assert surgery.droppable(model, SHAPE) == []
    assert_refused(model, "'d' cannot be dropped", plan=Plan(drop=["d"]))


# -- outputs -------------------------------------------------------------------------


@dataclass
class Record:
    boxes: object
    more: object = None


@dataclass(slots=True)
class Slotted:
    boxes: object


class Own:
    def __init__(self, boxes):
        self.boxes = {"deep": [(boxes,)]}


CONTAINERS = {
    "dataclass": Record,
    "slots": Slotted,
    "inside another": lambda x: Record({"x": None}, (1, [Slotted(x)])),
    "namespace": lambda x: types.SimpleNamespace(boxes=x),
    "own object": Own,
    "named tuple": namedtuple("Named", "boxes"),
    "dict": lambda x: {"boxes": x, "size": x.shape, "kind": x.dtype},
    "a dict's subclass": lambda x: type("Mine", (dict,), {})(boxes=x),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_outputs_are_found_in_containers_of_any_kind(kind):
    model = net(lambda s, x: CONTAINERS[kind](s.b(F.relu(s.a(x)))))
    fixed = {g.layers: g.fixed for g in surgery.channel_groups(model, SHAPE)}
    assert fixed["b",] == "they are the outputs of the network" and not fixed["a",]


@pytest.mark.parametrize("kind", ["generator", "function"])
def test_outputs_that_cannot_be_searched_are_refused(kind):
    wrap = {"generator": lambda x: (y for y in [x]), "function": lambda x: lambda: x}
    model = net(lambda s, x: wrap[kind](s.b(s.a(x))))
    assert_refused(model, f"the forward returns a {kind}.*return tensors")


# -- a parameter is used by its own layer alone ----------------------------------------


def gain(size=(8, 1, 1)):
    return nn.Parameter(torch.rand(size) + 0.5)


USES = {
    "a gain that is summed": (
        lambda s, x: F.relu(s.b(F.relu(s.a(x)) * s.g / s.g.sum())),
        {"g": gain()},
        "'sum'",
    ),
    "the norm of a gain": (
        lambda s, x: F.relu(s.b(F.relu(s.a(x)) * s.g / s.g.norm())),
        {"g": gain()},
        "'linalg_vector_norm'",
    ),
    "a gain through its data": (
        lambda s, x: F.relu(s.b(F.relu(s.a(x)) * s.g * s.g.data.mean())),
        {"g": gain()},
        "'mean'",
    ),
    "a decoder's weight": (
        lambda s, x: s.b(
            F.conv_transpose2d(s.c(F.relu(s.a(x))), s.c.weight, padding=1)
        ),
        {"c": conv(8, 8)},
        r"uses 'c\.weight' in 'convolution'",
    ),
    "a weight's norm as a scale": (
        lambda s, x: F.relu(s.b(F.relu(s.a(x)))) * s.a.weight.abs().mean(),
        {},
        "uses 'a.weight' in 'abs'",
    ),
    "statistics of a norm": (
        lambda s, x: F.relu(s.b(s.n(s.a(x)))) + s.n.running_var.mean(),
        {"n": nn.BatchNorm2d(8)},
        "'mean'",
    ),
    "a gain for one channel elsewhere": (
        lambda s, x: F.relu(s.b(F.relu(s.a(x)) * s.g)) * (s.c(x) * s.g).mean(),
        {"g": gain(), "c": conv(3, 1)},
        "uses 'g' in 'mul'",
    ),
}


@pytest.mark.parametrize("kind", USES)
def test_a_parameter_that_something_else_uses_stays_whole(kind):
    forward, parts, message = USES[kind]
    assert_refused(net(forward, **parts), message)


def test_a_gain_may_be_used_twice_along_the_same_channels():
    def forward(self, x):
        y = F.relu(self.a(x)) * self.g
        return F.relu(self.b(y + self.g))

    assert_same(net(forward, g=gain()), Plan({"a": HALF}))
    biased = net(lambda s, x: s.b(F.relu(s.a(x)) * s.a.bias.view(1, -1, 1, 1)))
    assert_same(biased, Plan({"a": HALF}))


# -- a layer is plain if nothing of it is overridden -----------------------------------


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(1, keepdim=True), bias)


class Halved(nn.LocalResponseNorm):
    def forward(self, x):
        return super().forward(x) / x.mean(1, keepdim=True)


class Folded(nn.Dropout):
    def forward(self, x):
        return super().forward(x).flip(1)


class Computed(nn.Conv2d):
    @property
    def groups(self):
        return 1

    @groups.setter
    def groups(self, value):
        pass


def with_hook(register, hook):
    layer = conv(8, 8)
    getattr(layer, register)(hook)
    return layer


def with_attribute(name, value):
    layer = conv(8, 8)
    layer.__dict__[name] = value(layer)
    return layer


def scale_in_place(module, args):
    module.weight.data.mul_(0.5)


def replace_weight(module, args):
    module.weight = nn.Parameter(module.weight / 2)


NOT_PLAIN = {
    "_conv_forward": lambda: Standardised(8, 8, 3, padding=1),
    "a property": lambda: Computed(8, 8, 3, padding=1),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(conv(8, 8)),
    "weight_norm of the bias": lambda: nn.utils.parametrizations.weight_norm(
        conv(8, 8), "bias"
    ),
    "torch's own pruning": lambda: prune.random_unstructured(conv(8, 8), "bias", 0.5),
    "an attribute": lambda: with_attribute(
        "_conv_forward", lambda m: lambda x, w, b: F.conv2d(x, w.flip(1), b, padding=1)
    ),
    "a weight in the way": lambda: with_attribute("weight", lambda m: m.weight.data),
    "a pre-hook on the weight": lambda: with_hook(
        "register_forward_pre_hook", scale_in_place
    ),
    "a new weight each time": lambda: with_hook(
        "register_forward_pre_hook", replace_weight
    ),
    "flipped by a pre-hook": lambda: with_hook(
        "register_forward_pre_hook", lambda m, args: (args[0].flip(1),)
    ),
    "flipped by a hook": lambda: with_hook(
        "register_forward_hook", lambda m, args, out: out.flip(1)
    ),
    "a norm of its own": lambda: Halved(3),
    "a dropout of its own": lambda: Folded(),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_layer_of_which_anything_is_overridden_is_not_plain(kind):
    """Those in front of it and it itself stay whole, or what it does is followed."""
    model = net(lambda s, x: F.relu(s.b(s.c(F.relu(s.a(x))))), c=NOT_PLAIN[kind]())
    for name in ("a", "c"):
        if name == "c" and not isinstance(model.c, nn.Conv2d):
            continue
        plan = Plan({name: HALF})
        try:
            assert_same(model, plan)
        except ValueError as error:
            assert name in str(error) or "'c'" in str(error)


def test_hooks_that_only_look_or_scale_do_no_harm():
    seen = []
    layer = with_hook("register_forward_hook", lambda m, args, out: 2 * out)
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    model = net(lambda s, x: F.relu(s.b(s.c(F.relu(s.a(x))))), c=layer)
    for plan in (Plan({"a": HALF}), Plan({"c": HALF})):
        small = oracle.evaluate(
            surgery.shrink(model, plan, SHAPE), oracle.images(SHAPE)
        )
        masked = oracle.evaluate(surgery.mask(model, plan, SHAPE), oracle.images(SHAPE))
        assert oracle.difference(small, masked) < 1e-10


def test_a_subclass_that_overrides_nothing_that_runs_is_plain():
    class Named(nn.Conv2d):
        """Initialised in a way of its own."""

        def __init__(self, *args, tag="x", **kwargs):
            super().__init__(*args, **kwargs)
            self.tag = tag

        def reset_parameters(self):
            nn.init.normal_(self.weight, std=0.1)
            nn.init.zeros_(self.bias)

        def describe(self):
            return self.tag

    model = net(
        lambda s, x: F.relu(s.b(s.c(F.relu(s.a(x))))), c=Named(8, 8, 3, padding=1)
    )
    plan = Plan({"a": HALF, "c": HALF})
    small = oracle.assert_exact(model, plan, SHAPE, oracle.images(SHAPE), behind=False)
    assert isinstance(small.c, Named)


# -- what a pass leaves behind ---------------------------------------------------------


def test_a_forward_that_stores_activations_keeps_no_bare_shape():
    outside, holder = {"deep": [0]}, types.SimpleNamespace(last=None)

    def forward(self, x):
        y = F.relu(self.a(x))
        self.last = y
        self.seen.append(y)
        self.named["y"] = y
        self.holder.last = y
        return F.relu(self.b(y))

    model = net(forward)
    model.seen, model.named, model.holder = [], {}, holder
    model.a.register_forward_hook(lambda m, args, out: outside["deep"].append(out))
    build_graph(model, SHAPE)
    cost.count(model, SHAPE)
    assert not hasattr(model, "last") and model.seen == [] and model.named == {}
    assert holder.last is None and outside == {"deep": [0]}


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LazyConv2d(8, 3)

    def forward(self, x):
        return self.a(x)


HINTS = {
    "a wrapper": (lambda: nn.DataParallel(net(plain)), "'' is a DataParallel.*module"),
    "a lazy layer": (Lazy, r"'a' \(LazyConv2d\) has no weights yet: run"),
    "an item": (
        lambda: net(lambda s, x: s.b(s.a(x) * s.a(x).mean().item())),
        r"forward of Net.*reads a number out of a tensor .*outside",
    ),
    "a branch on values": (
        lambda: net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else s.b(s.a(-x))),
        "reads a number out of a tensor",
    ),
    "a second input": (
        lambda: type("Two", (nn.Module,), {"forward": lambda s, x, mask: x})(),
        "missing 1 required positional argument: 'mask'.*wrap the network",
    ),
    "a dictionary": (
        lambda: net(lambda s, x: s.b(s.a(x["images"]))),
        r"forward of Net.*gives one tensor of images",
    ),
}


@pytest.mark.parametrize("kind", HINTS)
def test_what_a_pass_on_shapes_cannot_do_is_one_clear_line(kind):
    make, message = HINTS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        build_graph(make(), SHAPE)
    assert "\n" not in str(caught.value)


# -- a forward that looks at the number of its channels -------------------------------


def counted(step):
    """`a`, then `step(module, activation, number of channels)`, then `b`."""

    def forward(self, x):
        x = F.relu(self.a(x))
        return F.relu(self.b(step(self, x, x.shape[1])))

    return forward


def stretched(self, x, c):
    return F.interpolate(x, size=(c, c)) if c > 4 else x


def repeated(self, x, c):
    for _ in range(c):
        x = x * 0.9
    return x


def chosen(self, x, c):
    y = x.abs()
    return torch.tanh(y if c > 4 else x.neg()) + y.neg()


def set_epsilon(self, x, c):
    self.n.eps = 1 / c
    return self.n(x)


COUNTING = {
    "a pool or none": lambda s, x, c: F.max_pool2d(x, 2) if c >= 8 else x,
    "another pool": lambda s, x, c: F.avg_pool2d(x, 2 if c > 4 else 4),
    "a size": stretched,
    "a divisor": lambda s, x, c: x / c,
    "alpha": lambda s, x, c: torch.add(x, x.abs(), alpha=c),
    "full": lambda s, x, c: x * torch.full((1,), float(c), device=x.device),
    "new_full": lambda s, x, c: x * x.new_full((1,), float(c)),
    "new_tensor": lambda s, x, c: x * x.new_tensor([float(c)]),
    "tensor": lambda s, x, c: x * torch.tensor(float(c), device=x.device),
    "arange": lambda s, x, c: x * torch.arange(c, device=x.device).max(),
    "steps": repeated,
    "an operand": chosen,
    "a norm's epsilon": set_epsilon,
    "a norm or none": lambda s, x, c: s.n(x) if c > 4 else x,
    "a slope": lambda s, x, c: F.leaky_relu(x, 1 / c),
    "a part of the pixels": lambda s, x, c: x[..., c - 4 :],
}


@pytest.mark.parametrize("kind", COUNTING)
def test_a_forward_that_counts_its_channels_is_refused_by_both(kind):
    model = net(counted(COUNTING[kind]), n=nn.BatchNorm2d(8))
    assert_refused(model, "computes with the number of its channels")


LAYOUTS = {
    "viewed and back": lambda s, x, c: x.view(len(x), c, -1).view(len(x), c, 8, 8),
    "turned and back": lambda s, x, c: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "made contiguous": lambda s, x, c: (
        x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).contiguous()
    ),
    "flattened pixels": lambda s, x, c: (
        x.permute(0, 2, 3, 1).reshape(-1, c).view(len(x), 8, 8, c).permute(0, 3, 1, 2)
    ),
    "all channels by number": lambda s, x, c: x[:, :c],
    "zeros of the same size": lambda s, x, c: torch.cat([x, torch.zeros_like(x)], 1)[
        :, :c
    ],
    "spread over pixels": lambda s, x, c: x.mean((2, 3), keepdim=True).expand(
        len(x), c, 8, 8
    ),
}


@pytest.mark.parametrize("kept", [[3], HALF])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_sizes_that_only_follow_the_channels_are_fine(kind, kept):
    model = net(counted(LAYOUTS[kind]))
    try:
        assert_same(model, Plan({"a": kept}))
    except ValueError as error:
        assert "picks or reorders channels" in str(error)
        assert kind == "zeros of the same size"


# -- scatter, and what every layer keeps -----------------------------------------------


def scattered_twice(self, x):
    h = F.relu(self.a(x))
    h = F.relu(h + self.n(self.c(h)))
    return F.relu(self.b(h + self.c(h)))


def between(activation):
    return lambda s, x: F.relu(s.b(s.a(x) + activation(s.n(s.c(F.relu(s.a(x)))))))


SCATTERED = {
    "called twice, once before its norm": (scattered_twice, conv(8, 8), False),
    "tied to one another": (
        lambda s, x: F.relu(s.b(s.a(x) + s.split(s.c(F.relu(s.a(x)))))),
        conv(8, 16),
        False,
    ),
    "sigmoid": (between(torch.sigmoid), conv(8, 8), False),
    "a number added": (between(lambda x: x + 1), conv(8, 8), False),
    "exponential": (between(torch.exp), conv(8, 8), False),
    "clamped above zero": (between(lambda x: x.clamp(0.1, 1)), conv(8, 8), False),
    "pooled, then a sigmoid": (
        between(lambda x: F.avg_pool2d(x, 3, 1, 1).sigmoid()),
        conv(8, 8),
        False,
    ),
    "rows of pixels, then a sigmoid": (
        between(lambda x: x.flatten(2).sigmoid().view_as(x)),
        conv(8, 8),
        False,
    ),
    "a norm that mixes channels": (
        lambda s, x: F.relu(s.b(s.a(x) + s.g(s.c(F.relu(s.a(x)))))),
        conv(8, 8),
        False,
    ),
    "rows of pixels and back": (
        between(lambda x: x.flatten(2).relu().view_as(x)),
        conv(8, 8),
        True,
    ),
    "nothing": (between(lambda x: x), conv(8, 8), True),
    "relu": (between(F.relu), conv(8, 8), True),
    "scaled and clamped at zero": (
        between(lambda x: (2 * x).clamp(0, 1) / 3),
        conv(8, 8),
        True,
    ),
}


class Larger(nn.Module):
    """The larger of two halves: its channels go in pairs."""

    def forward(self, x):
        return torch.maximum(*x.chunk(2, 1))


@pytest.mark.parametrize("kind", SCATTERED)
def test_scatter_where_zero_stays_zero_up_to_the_addition(kind):
    forward, layer, possible = SCATTERED[kind]
    norms = {"n": nn.BatchNorm2d(8), "g": nn.GroupNorm(2, 8)}
    model = net(forward, c=layer, split=Larger(), **norms)
    plan = Plan({"c": [1, 3]}, scatter={"c"})
    if possible:
        assert_same(model, plan)
        with oracle.hooked(model, plan, oracle.images(SHAPE)):
            expected = oracle.evaluate(model, oracle.images(SHAPE))
        small = surgery.shrink(model, plan, SHAPE)
        found = oracle.evaluate(small, oracle.images(SHAPE))
        assert oracle.difference(found, expected) < 1e-10
    else:
        assert_refused(model, "'c' (cannot be scattered|feeds no addition)", plan=plan)


@pytest.mark.parametrize("options", [{"rate": 0.5}, {"rate": 0.9}, {"macs": 0.4}])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_layer_of_a_split_stream_keeps_a_channel(scope, options):
    """ShuffleNetV2 shuffles units of many layers into one stream: none may run dry."""
    model = oracle.roughen(models.build("shufflenet_v2_x1_0").double())
    scores, shape = baselines.l1(model), (3, 32, 32)
    weak = next(n for n in scores if "branch2.5" in n)
    scores[weak] = scores[weak] * 1e-3  # all of its channels are the worst of all
    plan = plans.from_scores(model, scores, shape, scope=scope, **options)
    assert_same(model, plan, shape)


# -- a checkpoint knows its plan -------------------------------------------------------


def two_plans(name):
    model, shape = models.build(name).double(), (3, 32, 32)
    model = oracle.roughen(model)
    chosen = [
        plans.from_scores(model, baselines.random(model, seed), shape, rate=0.25)
        for seed in (0, 1)
    ]
    return model, shape, chosen


@pytest.mark.parametrize("name", ["resnet20", "shufflenet_v2_x0_5", "cifarnet"])
def test_the_state_of_one_plan_is_refused_by_another_of_the_same_sizes(name):
    model, shape, (one, other) = two_plans(name)
    small, twin = (surgery.shrink(model, plan, shape) for plan in (one, other))
    state = small.state_dict()
    with pytest.raises(ValueError, match="pruned by another plan"):
        surgery.shrunk_from(model, other, shape, state)
    for net_ in (twin, copy.deepcopy(twin)):
        with pytest.raises(ValueError, match="pruned by another plan"):
            net_.load_state_dict(state)
    with pytest.raises(ValueError, match="pruned by another plan"):
        nn.Sequential(twin).load_state_dict({f"0.{k}": v for k, v in state.items()})
    again = surgery.shrunk_from(oracle.roughen(model, 7), one, shape, state)
    x = oracle.images(shape)
    assert torch.equal(oracle.evaluate(again, x), oracle.evaluate(small, x))


def test_the_plan_before_counts_as_well():
    model, shape, (one, other) = two_plans("resnet8")
    last = Plan({"layer1.0.conv1": [0, 3]})
    twice = [
        surgery.shrink(surgery.shrink(model, plan, shape), last, shape)
        for plan in (one, other)
    ]
    with pytest.raises(ValueError, match="pruned by another plan"):
        twice[0].load_state_dict(twice[1].state_dict())
    assert not hasattr(model, "pruned_by")


def test_a_state_holds_its_index_maps():
    model, shape, (plan, _) = two_plans("resnet20")
    small = surgery.shrink(model, plan, shape)
    maps = {n for n, b in small.named_buffers() if not b.is_floating_point()}
    assert maps <= small.state_dict().keys()
    assert {"layer2.0.shortcut.source", "layer2.0.shortcut.write"} <= maps


# -- what is measured, and on what -----------------------------------------------------


class Domains(nn.Module):
    """The head is registered first, a norm and a layer never run."""

    def __init__(self):
        super().__init__()
        self.fc, self.c = nn.Linear(8, 10), nn.Conv2d(1, 8, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.unused, self.fails = nn.Conv2d(1, 4, 3), False

    def forward(self, x):
        if self.fails:
            raise KeyboardInterrupt
        return self.fc(F.relu(self.norms[0](self.c(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k", "train").take(100)


def test_recalibration_leaves_norms_alone_that_do_not_run(digits):
    model = oracle.roughen(Domains())
    before = copy.deepcopy(model.norms)
    train.recalibrate(model, digits)
    after = model.norms
    assert not torch.equal(after[0].running_mean, before[0].running_mean)
    assert torch.equal(after[1].running_mean, before[1].running_mean)
    assert torch.equal(after[1].num_batches_tracked, before[1].num_batches_tracked)


def test_an_interrupted_recalibration_changes_nothing(digits):
    model = oracle.roughen(Domains())
    state = copy.deepcopy(model.state_dict())
    calls = model.c.register_forward_hook(lambda m, x, y: setattr(model, "fails", True))
    with pytest.raises(KeyboardInterrupt):
        train.recalibrate(model, digits, batch_size=20)
    calls.remove()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert {n.momentum for n in model.norms} == {0.1}


def test_the_head_is_what_ends_the_forward_not_the_registration(digits):
    model = Domains()
    assert baselines.l1(model).keys() == {"c"}
    train.fit(model, digits, epochs=1, lr=0.01)
    model.fc = nn.Linear(8, 7)
    with pytest.raises(ValueError, match="10 classes, the network ends in 7 outputs"):
        train.fit(model, digits, epochs=1, lr=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_net_is_evaluated_and_labelled_as_what_it_is(dtype, digits):
    torch.manual_seed(0)
    model = Domains().to(dtype)
    outputs = torch.cat([y for y, _ in train.forward(model, digits)])
    loss = F.cross_entropy(outputs.double(), digits.labels)
    found = train.evaluate(model, digits)["loss"]
    assert outputs.dtype == dtype and found == pytest.approx(loss.item(), rel=1e-6)
    history = train.fit(model, digits, epochs=1, lr=0.01)
    assert history.precision == str(dtype).removeprefix("torch.")


def test_operations_without_a_counter_are_named():
    def forward(self, x):
        y = self.a(x).mean((2, 3))
        return (self.bilinear(y, y),)

    model = net(forward, bilinear=nn.Bilinear(8, 8, 3).double())
    with pytest.warns(UserWarning, match=r"'_trilinear' with 'bilinear\.weight'"):
        assert cost.count(model, SHAPE).macs == 27 * 8 * 64
