"""Shrinking: the pruned network computes what the masked and the hooked one compute."""

import concurrent.futures
import contextlib
import copy
import io
import subprocess
import sys
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lib import baselines, cost, models, surgery
from lib import plan as plans
from lib.graph import build_graph
from lib.plan import Plan
from lib.surgery.movers import Scatter

TINY = (3, 8, 8)
SIDES = {
    "lenet": 28,
    "caffenet": 95,
    "googlenet": 64,
    "alexnet": 64,
    "resnet50": 64,
    "vgg16_bn": 32,
    "inception_v3": 75,
    "squeezenet1_1": 64,
}
FIXED_SIZE = ("lenet", "cifarnet", "caffenet")
CIFAR = [
    "lenet",
    "cifarnet",
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet20_b",
    "densenet40",
    "mobilenet_v2_cifar",
    "caffenet",
    "googlenet_bvlc",
]
VISION = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "alexnet",
    "vgg16_bn",
    "regnet_y_400mf",
]


def make(name, dtype=torch.float64, **options):
    """A net with random statistics (neutral ones before activation), and its shape."""
    side = SIDES.get(name, 32)
    if name in FIXED_SIZE:
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False} | options
    torch.manual_seed(0)
    model = models.build(name, **options).to(dtype)
    return oracle.roughen(model, neutral="densenet" in name), (3, side, side)


def check(name, model, plan, shape, x):
    padded = name.startswith("resnet") and name in CIFAR and not name.endswith("_b")
    extra = oracle.pad_shortcuts(model, plan) if padded else None
    behind = "densenet" not in name
    return oracle.assert_exact(model, plan, shape, x, extra=extra, behind=behind)


pytestmark = pytest.mark.usefixtures("one_thread")


# -- exactness on real nets ---------------------------------------------------------


@pytest.mark.parametrize("name", CIFAR + VISION)
def test_shrunk_equals_masked_and_hooked_and_trains(name):
    """By scores in float64, and by random counts in float32."""
    dtype = torch.float32 if name == "vgg16_bn" else torch.float64  # 134 M weights
    model, shape = make(name, dtype)
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.55)
    small = check(name, model, plan, shape, oracle.images(shape, dtype))
    assert type(small) is type(model)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, model)]
    assert sizes[0] < 0.8 * sizes[1]
    oracle.train_step(small, oracle.images(shape, dtype))
    if dtype == torch.float64:
        model = model.float()
        plan = oracle.random_plan(surgery.channel_groups(model, shape), seed=3)
        check(name, model, plan, shape, oracle.images(shape, torch.float32))


@pytest.mark.parametrize("residual", ["tie", "scatter", "keep"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "mobilenet_v2_cifar"])
def test_every_treatment_of_the_residual_stream(name, scope, residual):
    model, shape = make(name)
    plan = plans.from_scores(
        model,
        baselines.random(model, 5),
        shape,
        rate=0.4,
        scope=scope,
        residual=residual,
    )
    assert bool(plan.scatter) == (residual == "scatter")
    check(name, model, plan, shape, oracle.images(shape))


@pytest.mark.parametrize("seed", range(6))
def test_random_streams_of_a_zero_padded_resnet(seed):
    model, shape = make("resnet20")
    groups = surgery.channel_groups(model, shape)
    plan = oracle.random_plan(groups, seed, share=0.9)
    stream = {"conv1", "layer2.0.conv2", "layer3.0.conv2"}
    assert seed or stream & plan.keep.keys()
    check("resnet20", model, plan, shape, oracle.images(shape))


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "regnet_y_400mf"])
def test_scatter_in_bottlenecks(name):
    model, shape = make(name)
    scores = baselines.random(model, 1)
    plan = plans.from_scores(model, scores, shape, rate=0.5, residual="scatter")
    small = check(name, model, plan, shape, oracle.images(shape))
    oracle.train_step(small, oracle.images(shape))


def test_auxiliary_heads_of_googlenet_are_pruned_and_run():
    model, shape = make("googlenet", aux_logits=True)
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.5)
    assert {"aux1.conv.conv", "aux2.fc1"} <= plan.keep.keys()
    small = oracle.assert_exact(model, plan, shape, oracle.images(shape))
    outputs = oracle.train_step(small, oracle.images(shape))
    assert [tuple(o.shape) for o in outputs] == [(2, 10)] * 3
    _compare_heads(model, small, plan, shape)


def _compare_heads(model, small, plan, shape):
    """In training mode, with the running statistics and without dropout."""
    small = surgery.shrink(model, plan, shape)
    masked = surgery.mask(model, plan, shape)
    for net in (small, masked):
        net.eval()
        net.training = True
        for name, module in net.named_children():
            if name.startswith(("aux", "Aux")):
                module.eval()
    x = oracle.images(shape)
    with torch.no_grad():
        for a, b in zip(small(x), masked(x), strict=True):
            assert oracle.difference(a, b) < 1e-10


def test_auxiliary_head_of_inception_is_pruned_and_runs():
    model, _ = make("inception_v3", torch.float32, aux_logits=True)
    shape = (3, 299, 299)
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.7)
    assert "AuxLogits.conv1.conv" in plan.keep
    small = surgery.shrink(model, plan, shape).train()
    with torch.no_grad():
        outputs = small(oracle.images(shape, torch.float32))
    assert [tuple(o.shape) for o in outputs] == [(2, 10)] * 2


@pytest.mark.parametrize(
    "name", ["resnet20", "densenet40", "shufflenet_v2_x1_0", "caffenet", "googlenet"]
)
def test_pruned_twice(name):
    model, shape = make(name)
    scores = baselines.random(model, 0)
    first = plans.from_scores(model, scores, shape, rate=0.3)
    once = surgery.shrink(model, first, shape)
    second = oracle.random_plan(surgery.channel_groups(once, shape), seed=4)
    twice = oracle.assert_exact(once, second, shape, oracle.images(shape), hooks=False)
    assert cost.count(twice, shape).params < cost.count(once, shape).params
    oracle.train_step(twice, oracle.images(shape))


def test_scattered_and_pruned_again():
    model, shape = make("resnet20")
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.4, residual="scatter")
    once = surgery.shrink(model, plan, shape)
    plan = plans.from_scores(once, baselines.random(once, 1), shape, rate=0.4)
    oracle.assert_exact(once, plan, shape, oracle.images(shape), hooks=False)


# -- hand counts --------------------------------------------------------------------


def test_counts_of_a_thin_resnet20_by_hand():
    model, shape = make("resnet20")
    inner, stream = [5, 9, 21], [11, 20, 40]
    keep = {"conv1": range(stream[0])}
    for stage in (1, 2, 3):
        for block in range(3):
            layer = f"layer{stage}.{block}"
            keep[f"{layer}.conv1"] = range(inner[stage - 1])
    small = surgery.shrink(model, Plan(keep | _stream_of(stream)), shape)
    macs, params = _count_resnet(3, inner, stream)
    assert oracle.recount(small, shape) == (macs, params)


def _stream_of(widths):
    """The first stage in the middle of the second, the second in that of the third."""
    first = list(range(widths[0]))
    second = [8 + i for i in first] + [i for i in range(32) if not 8 <= i < 24]
    second = second[: widths[1]]
    third = [16 + i for i in second] + [i for i in range(64) if not 16 <= i < 48]
    kept = [first, second, third[: widths[2]]]
    return {"conv1": first} | {
        f"layer{s}.{b}.conv2": kept[s - 1] for s in (1, 2, 3) for b in range(3)
    }


def _count_resnet(blocks, inner, stream):
    macs, params = 27 * stream[0] * 32**2, 29 * stream[0]
    before = stream[0]
    for mid, out, side in zip(inner, stream, (32, 16, 8), strict=True):
        for _ in range(blocks):
            weights = 9 * (before * mid + mid * out)
            macs, params = macs + weights * side**2, params + weights + 2 * (mid + out)
            before = out
    return macs + 10 * before, params + 10 * (before + 1)


def test_counts_of_a_thin_lenet_by_hand():
    model, shape = make("lenet")
    keep = {"conv1": range(7), "conv2": range(10, 33), "ip1": range(100)}
    small = surgery.shrink(model, Plan(keep), shape)
    macs = 75 * 7 * 24**2 + 25 * 7 * 23 * 8**2 + 23 * 16 * 100 + 100 * 10
    params = 76 * 7 + (25 * 7 + 1) * 23 + (23 * 16 + 1) * 100 + 101 * 10
    assert oracle.recount(small, shape) == (macs, params)


def test_counts_of_a_thin_vgg_by_hand():
    shape = (3, 32, 32)
    with torch.device("meta"):
        model = models.build("vgg16_bn")
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    widths = [17, 33, 40, 41, 90, 91, 92, 7, 8, 9, 10, 11, 12]
    keep = {n: range(w) for n, w in zip(convs, widths, strict=True)}
    keep |= {"classifier.0": range(50), "classifier.3": range(60)}
    small = surgery.shrink(model, Plan(keep), shape)
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    before = [3, *widths[:-1]]
    work = [9 * a * b for a, b in zip(before, widths, strict=True)]
    dense = 12 * 49 * 50 + 50 * 60 + 60 * 10
    macs = sum(w * s * s for w, s in zip(work, sides, strict=True)) + dense
    params = sum(work) + 3 * sum(widths) + dense + 50 + 60 + 10
    assert oracle.recount(small, shape) == (macs, params)


# -- dropped blocks -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "block"),
    [
        ("resnet20", "bn2", "layer2.1"),
        ("resnet20", "bn2", "layer1.0"),
        ("resnet50", "bn3", "layer3.2"),
        ("mobilenet_v2_cifar", "conv.3", "features.3"),
    ],
)
def test_a_dropped_block_is_one_whose_last_norm_is_zero(name, norm, block):
    model, shape = make(name)
    small = surgery.shrink(model, Plan(drop=[block]), shape)
    last = model.get_submodule(f"{block}.{norm}")
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    x = oracle.images(shape)
    assert oracle.difference(oracle.evaluate(small, x), oracle.evaluate(model, x)) < (
        1e-12
    )
    assert oracle.recount(small, shape)[0] < oracle.recount(model, shape)[0]
    oracle.train_step(small, x)


def test_dropped_blocks_with_a_thinner_stream():
    model, shape = make("resnet20")
    plan = oracle.random_plan(surgery.channel_groups(model, shape), 1, share=1)
    plan.keep = {n: k for n, k in plan.keep.items() if not n.startswith("layer2.1.")}
    plan.drop = ["layer2.1"]
    oracle.assert_exact(model, plan, shape, oracle.images(shape), hooks=False)


def test_dropped_dense_layers():
    model, shape = make("densenet40")
    plan = Plan(drop=["block1.3", "block2.0"])
    x = oracle.images(shape)
    small = oracle.assert_exact(model, plan, shape, x, hooks=False)
    gone = {"block1.3.conv": [], "block2.0.conv": []}
    with oracle.hooked(model, Plan(gone), x, behind=False):
        whole = oracle.evaluate(model, x)
    assert oracle.difference(oracle.evaluate(small, x), whole) < 1e-10
    assert small.trans1.bn.num_features == 160 - 12


@pytest.mark.parametrize("block", ["layer2.0", "layer3.0", "conv1", "nonsense"])
def test_what_is_not_a_residual_block_is_not_dropped(block):
    model, shape = make("resnet20")
    with pytest.raises(ValueError, match=rf"'{block}' cannot be dropped.*layer1\.0"):
        surgery.shrink(model, Plan(drop=[block]), shape)


def test_droppable_names_the_residual_blocks():
    model, shape = make("resnet8")
    assert surgery.droppable(model, shape) == ["layer1.0"]
    dense, shape = make("densenet40")
    names = [f"block{b}.{i}" for b in (1, 2, 3) for i in range(12)]
    assert surgery.droppable(dense, shape) == names


class Block(nn.Module):
    """A branch joined with its input in various ways."""

    def __init__(self, join):
        super().__init__()
        self.conv, self.bn, self.join = conv(8, 8), nn.BatchNorm2d(8), join

    def forward(self, x):
        return self.join(x, self.bn(self.conv(x)))


JOINS = {
    "plain": lambda x, y: x + y,
    "relu behind an input with negative values": lambda x, y: F.relu(x + y),
    "pool behind": lambda x, y: F.avg_pool2d(x + y, 3, 1, 1),
    "input twice": lambda x, y: x + x + y,
    "halved": lambda x, y: (x + y) * 0.5,
    "weighted": lambda x, y: torch.add(y, x, alpha=0.3),
    "sigmoid branch": lambda x, y: x + torch.sigmoid(y),
}


@pytest.mark.parametrize("join", JOINS)
def test_a_block_is_dropped_only_where_its_output_is_input_plus_branch(join):
    model = net(conv(3, 8), Block(JOINS[join]))
    x, plan = oracle.images(TINY), Plan(drop=["body.1"])
    if join not in {"plain", "sigmoid branch"}:
        with pytest.raises(ValueError, match=r"'body\.1' cannot be dropped"):
            surgery.shrink(model, plan, TINY)
        return
    small = oracle.evaluate(surgery.shrink(model, plan, TINY), x)
    masked = oracle.evaluate(surgery.mask(model, plan, TINY), x)
    model.body[1] = nn.Identity()
    expected = oracle.evaluate(model, x)
    torch.testing.assert_close(small, expected)
    torch.testing.assert_close(masked, expected)


# -- resolution ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "densenet40", "mobilenet_v2_cifar"])
def test_nets_free_of_size_take_another_resolution(name):
    model, shape = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = surgery.shrink(model, Plan(resolution=24), shape)
    assert oracle.evaluate(small, oracle.images((3, 24, 24))).shape == (2, 10)


def test_lenet_is_tied_to_its_resolution():
    model, shape = make("lenet")
    with pytest.raises(ValueError, match=r"resolution 20 .*'ip1' \(Linear\)"):
        surgery.shrink(model, Plan(resolution=20), shape)


@pytest.mark.parametrize("resolution", [0, -1, "32", 32.5])
def test_a_resolution_that_is_none_is_refused_as_a_value(resolution):
    model, shape = make("resnet8")
    with pytest.raises(ValueError, match="resolution"):
        surgery.shrink(model, Plan(resolution=resolution), shape)


# -- files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "residual"),
    [("resnet20", "scatter"), ("resnet20", "tie"), ("shufflenet_v2_x1_0", "tie")],
)
def test_plan_and_state_make_a_checkpoint(name, residual, tmp_path):
    model, shape = make(name)
    scores = baselines.random(model, 2)
    plan = plans.from_scores(model, scores, shape, rate=0.5, residual=residual)
    small = surgery.shrink(model, plan, shape)
    plan.save(tmp_path / "plan.json")
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh, _ = make(name)
    oracle.roughen(fresh, seed=99)
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = surgery.shrunk_from(fresh, loaded, shape, state)
    x = oracle.images(shape)
    assert torch.equal(oracle.evaluate(again, x), oracle.evaluate(small, x))


# -- what is left alone -------------------------------------------------------------


def snapshot(model):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    return state, modes, hooks, kinds


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("act", [surgery.mask, surgery.shrink])
def test_the_original_is_untouched(act, fails):
    model, shape = make("googlenet", aux_logits=True)
    model.train()
    model.inception4a.eval()
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.5)
    plan = Plan({"conv1.conv": [0], "conv2.conv": []}) if fails else plan
    random = torch.get_rng_state()
    before = snapshot(model)
    try:
        act(model, plan, shape)
    except ValueError:
        assert fails
    assert_same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    registry = torch.nn.modules.module
    assert not registry._global_forward_hooks
    assert not registry._global_forward_pre_hooks


def test_a_forward_that_fails_leaves_no_hook():
    model, _ = make("lenet")
    model.train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="'ip1'"):
        surgery.channel_groups(model, (3, 64, 64))
    assert_same(before, snapshot(model))
    assert not torch.nn.modules.module._global_forward_hooks


def test_mixed_modes_survive_in_the_copy():
    model, shape = make("resnet20")
    model.train()
    model.layer2.eval()
    plan = plans.from_scores(model, baselines.random(model, 0), shape, rate=0.5)
    small = surgery.shrink(model, plan, shape)
    for name, module in model.named_modules():
        assert small.get_submodule(name).training == module.training, name


def test_frozen_parameters_are_pruned_and_stay_frozen():
    model, shape = make("resnet8")
    free = {"linear.weight", "layer2.0.conv1.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in free)
    plan = plans.from_scores(model, baselines.random(model, 0), shape, rate=0.5)
    small = surgery.shrink(model, plan, shape)
    assert small.conv1.out_channels == 8
    found = {n for n, p in small.named_parameters() if p.requires_grad}
    assert found == free
    assert all(isinstance(p, nn.Parameter) for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype):
    model, shape = make("resnet8", dtype)
    model.to(memory_format=torch.channels_last)
    plan = plans.from_scores(model, baselines.random(model, 0), shape, rate=0.5)
    small = surgery.shrink(model, plan, shape)
    assert {p.dtype for p in small.parameters()} == {dtype}
    weights = [p for p in small.parameters() if p.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert oracle.evaluate(small, oracle.images(shape, dtype)).dtype == dtype


def test_the_shrunk_net_shares_no_memory():
    model, shape = make("resnet8")
    plan = Plan({"layer1.0.conv1": [1, 2]})
    small = surgery.shrink(model, plan, shape)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    fresh, _ = make("resnet8")
    assert torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert torch.equal(fresh.bn1.running_var, model.bn1.running_var)


def test_a_shrunk_net_can_be_copied():
    model, shape = make("shufflenet_v2_x1_0")
    plan = plans.from_scores(model, baselines.random(model, 0), shape, rate=0.5)
    small = surgery.shrink(model, plan, shape)
    x = oracle.images(shape)
    twin = copy.deepcopy(small)
    assert torch.equal(oracle.evaluate(twin, x), oracle.evaluate(small, x))


def test_nothing_pruned_warns():
    model, shape = make("resnet8")
    with pytest.warns(UserWarning, match="removes nothing"):
        surgery.shrink(model, Plan(), shape)


# -- on another device --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("resnet8", "tie"),  # padded shortcuts
        ("resnet8", "scatter"),
        ("shufflenet_v2_x1_0", "tie"),
        ("caffenet", "tie"),  # response normalisation with gaps
    ],
)
def test_on_a_card_as_on_the_cpu(name, residual, apart):
    """Scores, plan, mask, shrink, a second shrink and the count, all on the card."""
    apart.submit(compare_places, name, residual).result()


@pytest.fixture(scope="module")
def apart(forked):
    """A process of its own: torch does not forget a card once it was told of one."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=forked) as pool:
        yield pool


def compare_places(name, residual):
    """The same plans and the same numbers, whether on the card or on the CPU."""
    model, shape = make(name)
    second = [plan_on(model, shape, residual, places) for places in (False, True)]
    (here, plan, again), (there, same, again_there) = second
    assert plan == same and again[0] == again_there[0]
    for a, b in zip(here + again[1], there + again_there[1], strict=True):
        assert torch.equal(a, b)


def plan_on(model, shape, residual, on_card):
    """Outputs of the masked and the shrunk net, and the same once more."""
    import fake_card

    model = copy.deepcopy(model)
    x = oracle.images(shape)
    place = fake_card.FakeCard if on_card else contextlib.nullcontext
    with place(), torch.no_grad():
        model = fake_card.put(model) if on_card else model
        x = fake_card.CardTensor(x) if on_card else x
        found = []
        for _ in range(2):
            scores = baselines.l1(model)
            plan = plans.from_scores(model, scores, shape, rate=0.3, residual=residual)
            assert cost.count(model, shape).macs > 0
            masked = oracle.evaluate(surgery.mask(model, plan, shape), x)
            model = surgery.shrink(model, plan, shape)
            outputs = [masked, oracle.evaluate(model, x)]
            residual = "tie"
            found.append(
                (plan, [fake_card.fetch(y) if on_card else y for y in outputs])
            )
    (first, outputs), second = found
    return outputs, first, second


def test_the_imports_of_surgery_and_of_data_are_light():
    code = "import sys; from lib import data, surgery; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torchvision", "pandas", "mlxtend", "scipy", "torch._dynamo"}
    assert not heavy & set(found.stdout.split())


# -- small nets with one hard thing each ---------------------------------------------


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Net(nn.Module):
    """`body`, global pool, classifier; `extra` modules are registered as named."""

    def __init__(self, *body, out=8, forward=None, **extra):
        super().__init__()
        self.body, self.forward_of = nn.Sequential(*body), forward
        for name, module in extra.items():
            setattr(self, name, module)
        self.fc = nn.Linear(out, 5)

    def forward(self, x):
        x = self.forward_of(self, x) if self.forward_of else self.body(x)
        return self.fc(x.flatten(2).mean(2))


def net(*body, **options):
    torch.manual_seed(0)
    return oracle.roughen(Net(*body, **options).double())


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = conv(width, 4, 1), conv(4, width, 1)

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(gate))))


class LastNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's: each channel against the mean of all."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x):
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.weight * x * size / size.mean(1, keepdim=True)


class ActiveNorm(nn.BatchNorm2d):
    """timm's: norm and activation in one, by a functional call."""

    def forward(self, x):
        rest = self.weight, self.bias, self.training, 0.1, self.eps
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, *rest))


class FrozenNorm(nn.Module):
    """Detection's: statistics and scale in buffers, folded by arithmetic."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            constant = torch.rand(width) + 0.5 if name in ("weight", "var") else 0
            self.register_buffer(name, torch.zeros(width) + constant)

    def forward(self, x):
        scale = self.weight * (self.var + 1e-5).rsqrt()
        shift = (self.bias - self.mean * scale).view(1, -1, 1, 1)
        return x * scale.reshape(1, -1, 1, 1) + shift


class SameConv(nn.Conv2d):
    """Pads its input itself."""

    def forward(self, x):
        x = F.pad(x, [1] * 4)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class CalledLinear(nn.Linear):
    """A linear layer by a functional call."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Scaled(nn.Module):
    """A residual branch behind a learnt scale."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.gamma = conv(width, width), nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x + self.conv(x) * self.gamma.view(1, -1, 1, 1)


class Token(nn.Module):
    """Pixels become tokens, a learnt one comes before them, each has a place."""

    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, width))
        self.place = nn.Parameter(torch.rand(1, 65, width))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return x.transpose(1, 2)


def pad_channels(x):
    return F.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 4, 4), "constant", 0)


def dense(self, x):
    a = F.relu(self.a(x))
    b = F.relu(self.b(a))
    c = F.relu(self.c(torch.cat([b, a, x], 1)))
    return torch.cat([c, a, b], 1)


def branch_on_shape(self, x):
    x = F.relu(self.a(x))
    x = F.max_pool2d(x, 2) if x.shape[-1] > 4 else x
    return F.relu(self.b(x))


def times_constant(self, x):
    return F.relu(self.b(F.relu(self.a(x)) * self.constant))


def pad_in_forward(self, x):
    return F.relu(self.b(F.relu(self.a(x))) + F.pad(self.a(x), (0, 0, 0, 0, 4, 4)))


def halves_swapped(self, x):
    return self.b(torch.cat(F.relu(self.n(self.a(x))).chunk(2, 1)[::-1], 1))


def by_number(self, x):
    """Split sizes and slices written as numbers, a piece in two places."""
    x = F.relu(self.a(x))
    left, middle, right = x.split([2, 4, 2], 1)
    right = self.c(torch.cat([left, right], 1)) + middle
    return self.b(torch.cat([right, x[:, 5:6], middle.flip(1)], 1))


def cross_stage(self, x):
    """YOLO's C2f: halves, of which one goes on through blocks."""
    y = list(F.silu(self.a(x)).chunk(2, 1))
    for block in (self.c, self.d):
        y.append(y[-1] + block(y[-1]))
    return self.b(torch.cat(y, 1))


def depthwise_halves(self, x):
    left, right = F.relu(self.a(x)).chunk(2, 1)
    return self.b(torch.cat([self.c(left), self.d(right)], 1))


def heads(self, x):
    """Pieces from a module without parameters, which returns several."""
    left, right = self.c(F.relu(self.a(x)))
    return self.b(left * torch.sigmoid(right))


def up(i, o):
    return nn.ConvTranspose2d(i, o, 2, stride=2)


def up_again(self, x):
    whole = F.relu(self.a(x))
    half = F.relu(self.b(F.max_pool2d(whole, 2)))
    return F.relu(self.c(torch.cat([whole, self.u(half)], 1)))


def count_calls(self, x):
    return F.relu(self.b(F.relu(self.a(x)) * self.steps.to(x.dtype)))


def two(**options):
    return {"a": conv(3, 8), "b": conv(8, 8), **options}


def with_buffer():
    model = net(forward=count_calls, **two())
    model.register_buffer("steps", torch.tensor(3))
    return model


def with_constant(shape):
    model = net(forward=times_constant, **two())
    model.constant = torch.rand(shape, dtype=torch.float64)
    return model


def with_parameter():
    model = net(forward=times_constant, **two())
    model.constant = nn.Parameter(torch.rand(8, 1, 1, dtype=torch.float64))
    return model


def _as_image():
    return Lambda(lambda x: x[..., None, None])


relu, bn = nn.ReLU, nn.BatchNorm2d
WORKING = {
    "reused conv": lambda: net(
        forward=lambda s, x: F.relu(s.b(F.relu(s.b(F.relu(s.a(x)))))), **two()
    ),
    "PReLU per channel": lambda: net(conv(3, 8), nn.PReLU(8), conv(8, 8), relu()),
    "PReLU": lambda: net(conv(3, 8), nn.PReLU(), conv(8, 8), relu()),
    "depthwise multiplier": lambda: net(
        conv(3, 8), relu(), conv(8, 16, groups=8), relu(), conv(16, 8)
    ),
    "grouped": lambda: net(conv(3, 8), bn(8), relu(), conv(8, 8, groups=4), bn(8)),
    "channel shuffle": lambda: net(
        conv(3, 8), nn.ChannelShuffle(2), relu(), conv(8, 8), relu()
    ),
    "grouped, shuffled": lambda: net(
        conv(3, 8, groups=1), nn.ChannelShuffle(4), conv(8, 8, groups=2), relu()
    ),
    "added to its shuffle": lambda: net(
        forward=lambda s, x: F.relu(s.b(s.a(x) + s.c(s.a(x)))),
        **two(c=nn.ChannelShuffle(2)),
    ),
    "SE block": lambda: net(conv(3, 8), relu(), Gated(8), conv(8, 8), relu()),
    "padding lambda": lambda: net(
        out=16,
        forward=lambda s, x: F.relu(s.b(F.relu(s.a(x))) + s.c(F.relu(s.a(x)))),
        a=conv(3, 8),
        b=conv(8, 16),
        c=Lambda(pad_channels),
    ),
    "control flow": lambda: net(forward=branch_on_shape, **two()),
    "scalar constant": lambda: with_constant((1,)),
    "parameter along the channels": with_parameter,
    "integer buffer": with_buffer,
    "dense": lambda: net(
        out=24, forward=dense, a=conv(3, 8), b=conv(8, 8), c=conv(19, 8)
    ),
    "norm without scale": lambda: net(
        conv(3, 8), bn(8, affine=False), relu(), conv(8, 8), relu()
    ),
    "norm of the batch without scale": lambda: net(
        conv(3, 8),
        bn(8, affine=False, track_running_stats=False),
        relu(),
        conv(8, 8),
        relu(),
    ),
    "norm used twice": lambda: net(
        forward=lambda s, x: s.c(s.b(F.relu(s.c(s.a(x))))), **two(c=bn(8))
    ),
    "response norm": lambda: net(
        conv(3, 8), relu(), nn.LocalResponseNorm(3), conv(8, 8), relu()
    ),
    "halves compared": lambda: net(
        conv(3, 16), Lambda(lambda x: torch.maximum(*x.chunk(2, 1))), conv(8, 8)
    ),
    "norm with an activation": lambda: net(conv(3, 8), ActiveNorm(8), conv(8, 8)),
    "frozen norm": lambda: net(conv(3, 8), FrozenNorm(8), relu(), conv(8, 8)),
    "padding convolutions": lambda: net(
        SameConv(3, 8, 3), relu(), SameConv(8, 16, 3, groups=8), SameConv(16, 8, 3)
    ),
    "linear by a call": lambda: net(
        conv(3, 8), Lambda(lambda x: x.mean((2, 3))), CalledLinear(8, 8), _as_image()
    ),
    "scaled branch": lambda: net(conv(3, 8), Scaled(8), relu(), conv(8, 8)),
    "pad in a forward": lambda: net(
        out=16, forward=pad_in_forward, a=conv(3, 8), b=conv(8, 16)
    ),
    "halves swapped": lambda: net(forward=halves_swapped, **two(n=bn(8))),
    "pieces by number": lambda: net(
        forward=by_number, a=conv(3, 8), b=conv(9, 8), c=conv(4, 4)
    ),
    "cross stage": lambda: net(
        forward=cross_stage, a=conv(3, 8), b=conv(16, 8), c=conv(4, 4), d=conv(4, 4)
    ),
    "depthwise halves": lambda: net(
        forward=depthwise_halves,
        **two(c=conv(4, 4, groups=4), d=conv(4, 4, groups=4)),
    ),
    "a module that returns pieces": lambda: net(
        forward=heads, **two(c=Lambda(lambda x: x.chunk(2, 1)), b=conv(4, 8))
    ),
    "instance norm": lambda: net(
        conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8), conv(8, 8)
    ),
    "response norm of ConvNeXt": lambda: net(conv(3, 8), ResponseNorm(8), conv(8, 8)),
    "U-Net": lambda: net(
        forward=up_again, a=conv(3, 8), b=conv(8, 16), u=up(16, 8), c=conv(16, 8)
    ),
    "transposed, called twice": lambda: net(
        forward=lambda s, x: s.b(s.c(F.relu(s.c(s.a(x))))), **two(c=up(8, 8))
    ),
    "pixels of channels": lambda: net(conv(3, 16), nn.PixelShuffle(2), conv(4, 8)),
    "channels of pixels": lambda: net(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 8)),
    "upsampled and dropped out": lambda: net(
        conv(3, 8), nn.Dropout2d(), nn.Upsample(scale_factor=2), conv(8, 8), relu()
    ),
}


@pytest.mark.parametrize("kind", WORKING)
def test_small_nets_shrink_exactly(kind):
    model = oracle.roughen(WORKING[kind](), neutral=True)
    groups = [g for g in surgery.channel_groups(model, TINY) if not g.fixed]
    assert {"a", "body.0"} & {n for g in groups for n in g.layers}, "first conv frozen"
    for seed in (0, 1, 2):
        plan = oracle.random_plan(groups, seed, share=1)
        hooks = "padding" not in kind
        small = oracle.assert_exact(
            model, plan, TINY, oracle.images(TINY), hooks=hooks, behind=False
        )
        oracle.train_step(small, oracle.images(TINY))


def test_a_synchronised_norm_is_a_batch_norm():
    plain = net(conv(3, 8), bn(8), relu(), conv(8, 8), relu())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    scores = baselines.l1(plain)
    made, wanted = (
        plans.from_scores(m, scores, TINY, rate=0.5) for m in (model, plain)
    )
    assert made == wanted and made.keep
    small, x = surgery.shrink(model, made, TINY), oracle.images(TINY)
    assert small.body[1].num_features == 4
    torch.testing.assert_close(small(x), surgery.mask(plain, made, TINY).eval()(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_work_of_a_transposed_convolution(groups):
    model = net(conv(3, 8), nn.ConvTranspose2d(8, 8, 3, stride=2, groups=groups))
    counted = cost.count(model, TINY).macs
    assert counted == 64 * 9 * (3 * 8 + 8 * 8 // groups) + 8 * 5
    if groups == 1:
        made = plans.from_scores(model, baselines.l1(model), TINY, rate=0.5)
        left = cost.count(surgery.shrink(model, made, TINY), TINY).macs
        assert left == 64 * 9 * (3 * 4 + 4 * 4) + 4 * 5


def _shared_norm_of_tokens():
    norm = nn.LayerNorm(8)
    tokens = Lambda(lambda x: x.flatten(2).transpose(1, 2))
    back = Lambda(lambda x: x.transpose(1, 2))
    return nn.Sequential(tokens, norm, nn.Linear(8, 8), norm, back)


ACROSS = {
    "layer norm": lambda: LastNorm(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "response norm of ConvNeXt": lambda: ResponseNorm(8),
    "layer norm of tokens, shared": _shared_norm_of_tokens,
}


@pytest.mark.parametrize("kind", ACROSS)
def test_a_norm_over_channels_sees_zeros_for_those_that_are_gone(kind):
    """By hand: zeros into the whole norm, and nobody reads what it makes of them."""
    tokens = "tokens" in kind
    last = nn.Conv1d(8, 8, 1) if tokens else conv(8, 8)
    model = net(conv(3, 8), ACROSS[kind](), last)
    for module in model.modules():
        for vector in module.parameters(recurse=False):
            nn.init.uniform_(vector, 0.5, 1.5) if vector.ndim < 4 else None
    kept, x = [0, 2, 3, 7], oracle.images(TINY)
    keep = {"body.0": kept} | ({"body.1.2": kept} if tokens else {})
    small = oracle.assert_exact(model, Plan(keep), TINY, x, hooks=False)
    oracle.train_step(small, x)
    small = surgery.shrink(model, Plan(keep), TINY)
    again = Plan({n: [0, 2] for n in keep if "1" not in n})
    oracle.assert_exact(small, again, TINY, x, hooks=False) if not tokens else None
    got, gone = oracle.evaluate(small, x), [1, 4, 5, 6]
    with torch.no_grad():
        for name in keep:
            layer = model.get_submodule(name)
            layer.weight[gone], layer.bias[gone] = 0, 0
        for layer in (last, *(model.body[1][2:3] if tokens else ())):
            layer.weight[:, gone] = 0
    assert oracle.difference(got, oracle.evaluate(model, x)) < 1e-10


class Attends(nn.Module):
    """Puts its heads together by the size of what it was given."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


def test_a_forward_may_count_the_channels_it_attends_to():
    """They stay, although a norm over channels alone would let them go."""
    tokens = Lambda(lambda x: x.flatten(2).transpose(1, 2))
    parts = [conv(3, 8), tokens, nn.LayerNorm(8), Attends(), nn.Linear(8, 6)]
    model = net(*parts, nn.ReLU(), nn.Linear(6, 8), Lambda(lambda x: x.transpose(1, 2)))
    listed = surgery.prunable(model, TINY)
    assert "'body.3' (Attends) multiplies activations between" in listed["body.0"]
    plan = Plan({"body.4": [1, 2]})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


def test_a_number_written_beside_a_parameter_keeps_it_whole():
    def scaled(self, x):
        return self.b(self.a(x) * self.gain.view(8, 1, 1))

    model = net(forward=scaled, **two())
    model.gain = nn.Parameter(torch.rand(8, dtype=torch.float64))
    plan, x = Plan({"a": [1, 2, 6]}), oracle.images(TINY)
    small = oracle.assert_exact(model, plan, TINY, x, behind=False)
    assert len(small.gain) == 8 and len(small.a.inner.weight) == 3


def test_tokens_share_the_channels_of_the_pixels():
    """What stands before them and what is added to them is cut with them."""
    model = net(conv(3, 8), Token(8), nn.Conv1d(8, 8, 1))
    plan = Plan({"body.0": [0, 3, 4]})
    x = oracle.images(TINY)
    small = surgery.shrink(model, plan, TINY)
    masked = surgery.mask(model, plan, TINY)
    got = oracle.evaluate(small, x)
    assert oracle.difference(got, oracle.evaluate(masked, x)) < 1e-10
    with torch.no_grad():  # by hand: the last convolution reads three channels
        model.body[2].weight[:, [1, 2, 5, 6, 7]] = 0
    assert oracle.difference(got, oracle.evaluate(model, x)) < 1e-10
    assert small.body[1].token.shape == (1, 1, 3)
    assert small.body[1].place.shape == (1, 65, 3)


def test_an_activation_inside_a_norm_forbids_to_scatter_behind_it():
    forward = lambda s, x: s.a(x) + s.c(s.b(F.relu(s.a(x))))  # noqa: E731
    plan = Plan({"b": [0, 3, 5]}, scatter={"b"})
    model = net(forward=forward, **two(c=bn(8)))
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY))
    model = net(forward=forward, **two(c=ActiveNorm(8)))
    assert build_graph(model, TINY).pairs["b"] == "c"
    with pytest.raises(ValueError, match="'b' cannot be scattered"):
        surgery.shrink(model, plan, TINY)


class Pick(nn.Module):
    """Hands its channels on in the order of a buffer and a private attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(8).flip(0))
        self._shift = 0

    def forward(self, x):
        return x[:, self.order.roll(self._shift)]


def test_a_scripted_part_is_run_and_left_alone():
    """Its layers cannot be cut; those around it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out
        part = torch.jit.script(nn.Sequential(conv(8, 8), bn(8)).double())
    forward = lambda s, x: F.relu(s.b(s.c(F.relu(s.a(x)))))  # noqa: E731
    model = net(forward=forward, **two(c=part))
    groups = {g.layers: g.fixed for g in surgery.channel_groups(model, TINY)}
    assert groups["b",] is None and "pruning rule only as" in groups["a",]
    x, plan = oracle.images(TINY), Plan({"b": [1, 5]})
    small = oracle.evaluate(surgery.shrink(model, plan, TINY), x)
    with oracle.hooked(model, plan, x, behind=False):
        assert oracle.difference(small, oracle.evaluate(model, x)) < 1e-10


@pytest.mark.parametrize("change", ["buffer", "attribute"])
def test_a_change_between_two_calls_is_seen(change):
    """What moves channels may itself have moved since the network was last traced."""
    model = net(forward=lambda s, x: s.b(s.c(F.relu(s.a(x)))), **two(c=Pick()))
    plan = Plan({"a": [0, 1, 2, 5]})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)
    if change == "buffer":
        model.c.order.copy_(torch.arange(8).roll(2))
    else:
        model.c._shift = 3
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


def test_a_given_graph_stands_for_the_trace(monkeypatch):
    model, shape = make("resnet8")
    graph = build_graph(model, shape)
    x, scores = oracle.images(shape), baselines.random(model, 0)
    expected = plans.from_scores(model, scores, shape, macs=0.5)
    whole = surgery.shrink(model, expected, shape)
    for room in (plans.ranking, surgery.cut, surgery.silence, surgery):
        monkeypatch.delattr(room, "build_graph")
    plan = plans.from_scores(model, scores, shape, macs=0.5, graph=graph)
    assert plan == expected
    small = surgery.shrink(model, plan, shape, graph=graph)
    again = surgery.shrunk_from(model, plan, shape, small.state_dict(), graph=graph)
    for result in (small, again):
        assert torch.equal(oracle.evaluate(result, x), oracle.evaluate(whole, x))
    assert surgery.channel_groups(model, shape, graph=graph) is graph.groups
    assert surgery.droppable(model, shape, graph=graph) == ["layer1.0"]
    masked = oracle.evaluate(surgery.mask(model, plan, shape, graph=graph), x)
    assert oracle.difference(masked, oracle.evaluate(small, x)) < 1e-10


def test_what_a_forward_keeps_for_itself_is_taken_back():
    """A constant cached in the first pass must not stay behind as a bare shape."""

    def cached(self, x):
        if not hasattr(self, "table"):
            self.table = torch.ones(1, 1, 8, 8, dtype=x.dtype, device=x.device)
            self.register_buffer("late", torch.zeros(1, device=x.device))
        return F.relu(self.b(F.relu(self.a(x)) * self.table))

    model = net(forward=cached, **two())
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    surgery.channel_groups(model, TINY)
    assert cost.count(model, TINY).macs > 0
    assert before == {n: set(vars(m)) for n, m in model.named_modules()}
    assert not dict(model.named_buffers()).keys() & {"late"}
    plan = Plan({"a": [0, 3, 4]})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


SHARED = {
    "activation": nn.PReLU,
    "response norm": lambda: nn.LocalResponseNorm(3),
    "shuffle": lambda: nn.ChannelShuffle(2),
}


@pytest.mark.parametrize("kind", SHARED)
def test_one_instance_serves_two_widths(kind):
    layers = {"a": conv(3, 8), "b": conv(8, 6), "act": SHARED[kind]()}
    forward = lambda s, x: s.act(s.b(s.act(F.relu(s.a(x)))))  # noqa: E731
    model = net(out=6, forward=forward, **layers)
    groups = surgery.channel_groups(model, TINY)
    assert {g.layers for g in groups if g.layers != ("fc",)} == {("a",), ("b",)}
    plan = oracle.random_plan(groups, 0, share=1)
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


@pytest.mark.parametrize("kind", ["shuffle", "response norm"])
def test_one_instance_under_two_names(kind):
    shared = SHARED[kind]()
    forward = lambda s, x: s.d(F.relu(s.b(s.c(F.relu(s.a(x))))))  # noqa: E731
    model = net(forward=forward, **two(c=shared, d=shared))
    plan = Plan({"a": [0, 1, 2, 7], "b": [0, 1, 2, 7]})
    x = 9 * oracle.images(TINY)
    oracle.assert_exact(model, plan, TINY, x, hooks=kind != "shuffle", behind=False)


def test_a_gate_of_one_channel_opens_all_or_none():
    """Broadcast over all channels, it is tied to none of them and cannot go."""

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x)) * torch.sigmoid(self.gate(x))))

    model = net(forward=forward, **two(gate=conv(3, 1)))
    groups = {g.layers: g for g in surgery.channel_groups(model, TINY)}
    assert groups["a",].fixed is None
    assert "spreads it over all channels" in groups["gate",].fixed
    plan = Plan({"a": [1, 2, 6]})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


class Widened(nn.Module):
    """A residual block whose branch adds nothing to the last four channels."""

    def __init__(self):
        super().__init__()
        self.conv = conv(12, 8)

    def forward(self, x):
        return x + append_zeros(self.conv(x))


def append_zeros(x):
    shape = (x.shape[0], 4, *x.shape[2:])
    return torch.cat([x, torch.zeros(shape, dtype=x.dtype, device=x.device)], 1)


def test_channels_that_are_constant_on_all_sides_of_an_addition():
    """They stay constants, so the block hands on exactly the channels it reads."""
    forward = lambda s, x: F.relu(s.b(s.block(append_zeros(s.a(x)))))  # noqa: E731
    model = net(forward=forward, a=conv(3, 8), block=Widened(), b=conv(12, 8))
    assert surgery.droppable(model, TINY) == ["block"]
    x = oracle.images(TINY)
    small = surgery.shrink(model, Plan({"b": [0, 5]}, drop=["block"]), TINY)
    whole = surgery.shrink(model, Plan({"b": [0, 5]}), TINY)
    whole.block = nn.Identity()
    torch.testing.assert_close(oracle.evaluate(small, x), oracle.evaluate(whole, x))
    kept = [1, 4, 6]
    oracle.assert_exact(
        model, Plan({"a": kept, "block.conv": kept}), TINY, x, behind=False
    )


@pytest.mark.parametrize("kept", [[1], [0], [0, 2], [1, 2]])
def test_zero_padding_of_a_single_channel(kept):
    """One channel, padded to three: the new ones are zeros, not copies of it."""
    pad = Lambda(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)))
    forward = lambda s, x: F.relu(s.b(s.a(x) + s.p(s.one(x))))  # noqa: E731
    model = net(forward=forward, a=conv(3, 3), one=conv(3, 1), p=pad, b=conv(3, 8))
    x, plan = oracle.images(TINY), Plan({"a": kept})
    oracle.assert_exact(model, plan, TINY, x, extra={"p": kept}, behind=False)


def test_a_scattered_grouped_convolution_keeps_as_many_in_each_group():
    """Of its own groups; those of a later reader of the stream do not concern it."""
    forward = lambda s, x: F.relu(s.c(s.a(x) + s.b(F.relu(s.a(x)))))  # noqa: E731
    grouped = {"b": conv(8, 8, groups=2), "c": conv(8, 8, groups=4)}
    model = net(forward=forward, a=conv(3, 8), **grouped)
    even, uneven = ([0, 3, 5, 6], [0, 1, 2, 5])
    plan = Plan({"b": even}, scatter={"b"})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)
    with pytest.raises(ValueError, match="'b' needs as many channels in each"):
        surgery.shrink(model, Plan({"b": uneven}, scatter={"b"}), TINY)
    scores = {"b": torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])}
    plan = plans.from_scores(model, scores, TINY, rate=0.25, residual="scatter")
    assert plan.keep == {"b": [0, 1, 2, 4, 5, 6]}


def test_one_parameter_in_two_layers_is_refused():
    model = net(
        forward=lambda s, x: F.relu(s.c(F.relu(s.b(F.relu(s.a(x)))))),
        **two(c=conv(8, 8)),
    )
    model.c.weight = model.b.weight
    plan = Plan({"b": [4, 5, 6, 7], "c": [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="a parameter is shared by 'b' and 'c'"):
        surgery.shrink(model, plan, TINY)


@pytest.mark.parametrize("order", ["relu before norm", "two norms"])
def test_scatter_where_no_norm_reads_the_convolution_alone(order):
    def forward(self, x):
        x = F.relu(self.a(x))
        if order == "two norms":
            y = self.b(x)
            return x + self.c(y) + F.relu(self.d(y))
        return x + self.c(F.relu(self.b(x)))

    model = net(forward=forward, **two(c=bn(8), d=bn(8)))
    plan = Plan({"b": [0, 3, 5]}, scatter={"b"})
    with pytest.raises(ValueError, match="'b' cannot be scattered"):
        surgery.shrink(model, plan, TINY)


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(1), Lambda(lambda x: F.pad(x, [1] * 4))])
def test_padding_of_pixels_is_transparent_to_pruning(pad):
    model = net(conv(3, 8), pad, nn.Conv2d(8, 8, 3))
    small = surgery.shrink(model, Plan({"body.0": [1, 4]}), TINY)
    assert small.get_submodule("body.2").weight.shape == (8, 2, 3, 3)


def test_padding_of_pixels_in_a_forward_is_transparent():
    forward = lambda s, x: s.b(F.pad(F.relu(s.a(x)), (1, 1, 1, 1)))  # noqa: E731
    model = net(forward=forward, a=conv(3, 8), b=nn.Conv2d(8, 8, 3))
    plan = Plan({"a": [1, 4]})
    oracle.assert_exact(model, plan, TINY, oracle.images(TINY), behind=False)


class Hard(nn.Module):
    """A flatten whose width is written into the code."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 16, 4), nn.Linear(400, 5)

    def forward(self, x):
        return self.fc(self.a(x).view(-1, 400))


def softmax(self, x):
    return self.b(F.softmax(self.a(x), 1))


def flip_by_index(self, x):
    x = self.a(x)
    return self.b(x[:, torch.arange(x.shape[1], device=x.device).flip(0)])


def turned_over():
    layer = conv(8, 8)
    layer.forward = lambda x: nn.Conv2d.forward(layer, x.flip(1))
    return layer


def plain_list(self, x):
    if "others" not in self.__dict__:
        self.__dict__["others"] = [conv(8, 8).double()]
    return self.b(self.others[0](self.a(x)))


def functional(self, x):
    return self.b(F.conv2d(self.a(x), self.b.weight, padding=1))


REFUSED = {
    "softmax": (lambda: net(forward=softmax, **two()), "_softmax"),
    "norm over channels in a forward": (
        lambda: net(forward=lambda s, x: s.b(F.group_norm(s.a(x), 2)), **two()),
        "native_group_norm",
    ),
    "transposed in groups": (
        lambda: net(
            forward=lambda s, x: s.b(s.c(s.a(x))),
            **two(c=nn.ConvTranspose2d(8, 8, 3, groups=2)),
        ),
        "ConvTranspose2d",
    ),
    "fixed filters, a number of them in the code": (
        lambda: net(
            forward=lambda s, x: s.b(
                F.conv2d(s.a(x), torch.ones(8, 1, 3, 3).double() / 9, groups=8)
            ),
            **two(),
        ),
        "convolution",
    ),
    "functional convolution": (lambda: net(forward=functional, **two()), "convolution"),
    "channel mean": (
        lambda: net(
            forward=lambda s, x: s.b(s.a(x) * s.a(x).mean(1, keepdim=True)), **two()
        ),
        "'mean' over channels",
    ),
    "a forward of the instance's own": (
        lambda: net(forward=lambda s, x: s.b(s.c(s.a(x))), **two(c=turned_over())),
        r"'c' \(Conv2d\) reads or makes channels that code elsewhere picks",
    ),
    "layers in a plain list": (
        lambda: net(forward=plain_list, **two()),
        "Python list registers none",
    ),
    "index made on the way": (lambda: net(forward=flip_by_index, **two()), "index"),
    "constant along the channels": (
        lambda: with_constant((1, 8, 1, 1)),
        "constant that has channels",
    ),
    "gated linear unit": (
        lambda: net(
            forward=lambda s, x: s.b(s.c(s.a(x))),
            a=conv(3, 16),
            b=conv(8, 8),
            c=nn.GLU(1),
        ),
        "glu",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_rule_is_refused_by_name(kind):
    make_net, message = REFUSED[kind]
    model = make_net()
    with pytest.raises(ValueError, match=rf"(?s)\ba\b.*{message}"):
        surgery.shrink(model, Plan({"a": [0, 1, 4, 5]}), TINY)


def test_layers_that_share_a_grouped_convolution_are_refused():
    forward = lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1))  # noqa: E731
    parts = {"a": conv(3, 8), "b": conv(3, 8), "c": nn.Conv2d(16, 8, 3, groups=2)}
    with pytest.raises(ValueError, match="a cannot be pruned: 'c' is grouped"):
        surgery.shrink(net(forward=forward, **parts), Plan({"a": [0, 1]}), TINY)


def test_a_size_written_into_the_code_is_refused():
    with pytest.raises(ValueError, match=r"shrunk network does not run.*400"):
        surgery.shrink(Hard(), Plan({"a": range(5)}), TINY)


def test_code_that_counts_its_channels_is_refused():
    forward = lambda s, x: s.b(F.relu(s.a(x)) / s.a(x).shape[1])  # noqa: E731
    with pytest.raises(ValueError, match="computes with the number of its channels"):
        surgery.shrink(net(forward=forward, **two()), Plan({"a": [0, 1]}), TINY)


BAD_PLANS = {
    "tied, one cut": ("resnet20", {"layer1.0.conv2": [0, 1]}, "layer1.0.conv2.*tied"),
    "tied, different": (
        "resnet8",
        {"conv1": [0, 1], "layer1.0.conv2": [0, 2]},
        "conv1, layer1.0.conv2.*tied",
    ),
    "emptied": ("resnet8", {"layer1.0.conv1": []}, "'layer1.0.conv1' would keep no"),
    "misspelt": ("resnet8", {"layer1.0.cnov1": [0]}, "did you mean 'layer1.0.conv1'"),
    "too high": ("resnet8", {"layer1.0.conv1": [16]}, "'layer1.0.conv1'.*0..15"),
    "negative": ("resnet8", {"layer1.0.conv1": [-1]}, "'layer1.0.conv1'.*0..15"),
    "twice": ("resnet8", {"layer1.0.conv1": [1, 1]}, "'layer1.0.conv1'.*once"),
    "classes": ("resnet8", {"linear": [0]}, "linear.*outputs of the network"),
    "groups": (
        "resnext50_32x4d",
        {"layer1.0.conv2": range(126)},
        "layer1.0.conv2.*grouped",
    ),
}


@pytest.mark.parametrize("kind", BAD_PLANS)
@pytest.mark.parametrize("act", [surgery.mask, surgery.shrink])
def test_plans_that_do_not_fit_are_refused(kind, act):
    name, keep, message = BAD_PLANS[kind]
    model, shape = make(name, torch.float32)
    with pytest.raises(ValueError, match=message):
        act(model, Plan(keep), shape)


def test_scatter_needs_an_addition():
    model, shape = make("resnet8")
    plan = Plan({"layer1.0.conv1": [0]}, scatter={"layer1.0.conv1"})
    with pytest.raises(ValueError, match="feeds no addition"):
        surgery.shrink(model, plan, shape)


def test_a_dropped_block_may_not_empty_one_group_of_a_later_convolution():
    model = net(
        forward=lambda s, x: s.e(s.n(s.c(s.n(s.grown(s.a(x)))))),
        a=conv(3, 8),
        grown=oracle.Dense(8),
        n=bn(12),
        c=conv(12, 12),
        e=conv(12, 8, groups=2),
    )
    plan = Plan(drop=["grown"])
    for act in (surgery.shrink, surgery.mask):
        with pytest.raises(ValueError, match=r"'e' is grouped .* \[6, 2\]"):
            act(model, plan, TINY)


@pytest.mark.parametrize("name", ["resnet20", "shufflenet_v2_x0_5"])
def test_index_maps_without_values_are_refused(name):
    """On the meta device a net can be shrunk once: then its maps have no numbers."""
    with torch.device("meta"):
        model = models.build(name)
    shape = (3, 64, 64)
    scores = baselines.uniform(model)
    plan = plans.from_scores(model, scores, shape, rate=0.3)
    small = surgery.shrink(model, plan, shape)
    with pytest.raises(ValueError, match=r"cannot be shrunk twice|no pruning rule"):
        scores = baselines.uniform(small)
        plan = plans.from_scores(small, scores, shape, rate=0.3)
        surgery.shrink(small, plan, shape)


# -- random nets --------------------------------------------------------------------

KINDS = ["conv", "norm", "add", "cat", "depthwise", "grouped", "pad", "shuffle", "gate"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)),
    min_size=2,
    max_size=7,
)


class Random(nn.Module):
    """A program of layers: each step reads earlier values and appends one."""

    def __init__(self, steps):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 4), bn(4), relu())
        self.steps, self.pads, widths = [], {}, [4]
        self.parts = nn.ModuleDict()
        for kind, i, j in steps:
            i, j = i % len(widths), j % len(widths)
            name, parts = f"s{len(self.steps)}", self.parts
            width = widths[i]
            if kind == "add":
                if widths[j] != width:
                    parts[name] = conv(widths[j], width, 1)
            elif kind == "cat":
                width += widths[j]
            elif kind == "pad":
                parts[name], parts[f"{name}p"] = conv(width, width + 4), _pad()
                self.pads[f"parts.{name}p"] = f"parts.{name}"
                width += 4
            else:
                parts[name], width = _part(kind, width)
            self.steps.append((kind, name, i, j))
            widths.append(width)
        self.fc = nn.Linear(widths[-1], 3)

    def forward(self, x):
        values = [self.stem(x)]
        for kind, name, i, j in self.steps:
            values.append(self.step(kind, name, values[i], values[j]))
        return self.fc(values[-1].mean((2, 3)))

    def step(self, kind, name, x, y):
        if kind == "add":
            return F.relu(x + (self.parts[name](y) if name in self.parts else y))
        if kind == "cat":
            return torch.cat([x, y], 1)
        if kind == "pad":
            return F.relu(self.parts[name](x) + self.parts[f"{name}p"](x))
        return self.parts[name](x)


def _pad():
    return Lambda(lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)))


def _part(kind, width):
    out = {"conv": 6, "grouped": 8}.get(kind, width)
    groups = 2 if kind == "grouped" and width % 2 == 0 else 1
    part = {
        "conv": lambda: nn.Sequential(conv(width, out), nn.PReLU(out)),
        "norm": lambda: nn.Sequential(conv(width, out, 1), bn(out), relu()),
        "depthwise": lambda: nn.Sequential(conv(width, out, groups=width), relu()),
        "grouped": lambda: conv(width, out, groups=groups),
        "shuffle": lambda: nn.ChannelShuffle(2 if width % 2 == 0 else 1),
        "gate": lambda: Gated(width),
    }[kind]()
    return part, out


QUIET = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@QUIET
@given(steps=STEPS, seed=st.integers(0, 99))
def test_random_nets_shrink_exactly(steps, seed):
    torch.manual_seed(seed)
    model = oracle.roughen(Random(steps).double(), seed, neutral=True)
    plan = oracle.random_plan(surgery.channel_groups(model, TINY), seed)
    extra = {p: plan.keep[c] for p, c in model.pads.items() if c in plan.keep}
    x = oracle.images(TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = surgery.shrink(model, plan, TINY)
    got = oracle.evaluate(small, x)
    masked = oracle.evaluate(surgery.mask(model, plan, TINY), x)
    assert oracle.difference(got, masked) < 1e-10
    with oracle.hooked(model, plan, x, extra, behind=False):
        assert oracle.difference(got, oracle.evaluate(model, x)) < 1e-10
    assert tuple(vars(cost.count(small, TINY)).values()) == oracle.recount(small, TINY)


@settings(parent=QUIET, max_examples=20)
@given(
    steps=STEPS, seed=st.integers(0, 99), residual=st.sampled_from(["tie", "scatter"])
)
def test_random_nets_take_plans_from_scores(steps, seed, residual):
    torch.manual_seed(seed)
    model = oracle.roughen(Random(steps).double(), seed)
    free = {
        n for g in surgery.channel_groups(model, TINY) if not g.fixed for n in g.layers
    }
    scores = {n: s for n, s in baselines.random(model, seed).items() if n in free}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = plans.from_scores(model, scores, TINY, rate=0.5, residual=residual)
            small = surgery.shrink(model, plan, TINY)
    except ValueError as error:
        assert residual == "scatter" and "scattered" in str(error)
        return
    x = oracle.images(TINY)
    masked = oracle.evaluate(surgery.mask(model, plan, TINY), x)
    assert oracle.difference(oracle.evaluate(small, x), masked) < 1e-10


# -- sizes without weights ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "residual"),
    [
        ("caffenet", (3, 227, 227), "tie"),  # response normalisation with gaps
        ("shufflenet_v2_x0_5", (3, 64, 64), "tie"),
        ("resnet20", (3, 32, 32), "tie"),  # padded shortcuts
        ("resnet20", (3, 32, 32), "scatter"),
    ],
)
def test_sizes_need_no_weights(name, shape, residual):
    nets = [models.build(name)]
    with torch.device("meta"):
        nets.append(models.build(name))
    counts = []
    for net in nets:
        scores = baselines.uniform(net)
        if residual == "scatter":
            scores = {n: s for n, s in scores.items() if n.startswith("layer")}
        chosen = plans.from_scores(net, scores, shape, rate=0.3, residual=residual)
        counts.append(cost.count(surgery.shrink(net, chosen, shape), shape))
    assert counts[0] == counts[1]
    assert counts[0].params < cost.count(nets[0], shape).params


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5), (2, 5, 7)])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_written_back_is_equal_to_the_bit_and_keeps_its_layout(shape, last):
    kept = torch.tensor([0, 2, 3, 7, 8])
    x = torch.randn(shape).double().requires_grad_()
    if last and len(shape) == 4:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    made = Scatter(kept, 9)(x)
    expected = torch.zeros(2, 9, *shape[2:], dtype=torch.float64)
    for place, channel in enumerate(kept.tolist()):
        expected[:, channel] = x[:, place].detach()
    assert torch.equal(made, expected)
    if len(shape) == 4:
        lies = made.is_contiguous(memory_format=torch.channels_last)
        assert lies == last and made.is_contiguous() != last
    weights = torch.randn_like(made)
    (made * weights).sum().backward()
    assert torch.equal(x.grad, weights[:, kept])


# -- timm's nets, made small ---------------------------------------------------------

TIMM = {
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)},
    "tf_mobilenetv3_small_minimal_100": {},  # pads its convolutions
    "res2net50_26w_4s": {"layers": (1, 1, 1, 1)},  # splits in its forward
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_nets_shrink_exactly(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TIMM[name]).double()
    oracle.roughen(model)
    scores, shape = baselines.random(model, 0), (3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left whole
        plan = plans.from_scores(model, scores, shape, macs=0.5, skip_fixed=True)
    whole = cost.count(model, shape).macs
    small = oracle.assert_exact(model, plan, shape, oracle.images(shape), hooks=False)
    assert 0.49 < cost.count(small, shape).macs / whole < 0.51


def test_a_linear_layer_of_one_input_with_its_own_forward_is_pruned():
    """Its weight is a column: turned over it is no vector along channels."""

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    net = nn.Sequential(nn.Flatten(), Own(1, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert surgery.prunable(net, (1, 1, 1))["1"] is None
    plan = plans.from_scores(net, {"1": torch.arange(4.0)}, (1, 1, 1), rate=0.5)
    x = torch.randn(5, 1, 1, 1)
    masked, small = (f(net, plan, (1, 1, 1)) for f in (surgery.mask, surgery.shrink))
    torch.testing.assert_close(small(x), masked(x))
    assert small[1].weight.shape == (2, 1)
