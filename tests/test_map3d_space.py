"""Blocks, space and designs of MAP: what each dimension removes, and what it costs."""

import copy
import functools
import itertools
import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib import baselines, cost, map3d, models, surgery
from lib.map3d.design import WHOLE
from lib.models.layers import init_he
from lib.plan import Plan

SHAPE = (3, 32, 32)
RESNETS = ["resnet8", "resnet20", "resnet20_b", "resnet56"]
STAGES = {  # blocks in each stage
    "resnet14": {"layer1": 2, "layer2": 2, "layer3": 2},
    "resnet20": {"layer1": 3, "layer2": 3, "layer3": 3},
    "resnet20_b": {"layer1": 3, "layer2": 3, "layer3": 3},
    "resnet56": {"layer1": 9, "layer2": 9, "layer3": 9},
    "densenet40": {"block1": 12, "block2": 12, "block3": 12},
    "resnet18": {"layer1": 2, "layer2": 2, "layer3": 2, "layer4": 2},
    "resnet50": {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def make(name: str, dtype=torch.float64) -> nn.Module:
    """A net with random BatchNorms; treat it as read-only."""
    torch.manual_seed(0)
    model = models.build(name, in_channels=3).to(dtype)
    return oracle.roughen(model, neutral="densenet" in name)


@functools.cache
def make_space(name: str, width: str = "uniform", side: int = 32, multiple: int = 4):
    shape = (3, side, side)
    return map3d.Space(make(name), shape, width=width, multiple=multiple)


@functools.cache
def make_lattice(name: str, width: str = "uniform", side: int = 32, multiple: int = 4):
    return make_space(name, width, side, multiple).lattice(make(name))


@functools.cache
def scores_of(name: str):
    return map3d.score_channels(make(name), SHAPE)


def removable(name: str) -> list[str]:
    return [b.name for b in make_space(name).blocks if b.removable]


def shrink(model, plan: Plan) -> nn.Module:
    return surgery.shrink(model, plan, SHAPE)


# -- blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_blocks_of_a_network(name):
    blocks = map3d.find_blocks(make(name), SHAPE)
    names = [f"{s}.{i}" for s, count in STAGES[name].items() for i in range(count)]
    assert [block.name for block in blocks] == names
    assert [block.stage for block in blocks] == [n.split(".")[0] for n in names]
    openers = [block.name for block in blocks if not block.removable]
    assert openers == [f"{stage}.0" for stage in STAGES[name]]


@pytest.mark.parametrize("name", ["resnet14", "densenet40"])
def test_openers_stay_although_surgery_could_drop_them(name):
    first = next(iter(STAGES[name])) + ".0"
    assert first in surgery.droppable(make(name), SHAPE)
    assert first not in removable(name)


def test_blocks_of_mobilenet_are_those_with_a_shortcut():
    model = make("mobilenet_v2_cifar")
    blocks = map3d.find_blocks(model, SHAPE)
    assert [b.name for b in blocks] == [f"features.{i}" for i in range(1, 18)]
    for block in blocks[1:]:
        assert block.removable == model.get_submodule(block.name).use_res_connect
    assert not blocks[0].removable and sum(b.removable for b in blocks) == 10


def test_blocks_of_a_network_that_lost_some():
    small = shrink(make("resnet20"), Plan(drop=["layer1.1", "layer3.2"]))
    names = [b.name for b in map3d.find_blocks(small, SHAPE) if b.removable]
    assert names == ["layer1.2", "layer2.1", "layer2.2", "layer3.1"]


@pytest.mark.parametrize(("name", "side"), [("resnet8", 32), ("lenet", 28)])
def test_networks_without_a_removable_block_are_refused(name, side):
    model, shape = models.build(name, image_size=side), (3, side, side)
    kind = type(model).__name__
    for ask in (map3d.find_blocks, map3d.Space):
        with pytest.raises(ValueError, match=f"{kind} has no block .* resnet20"):
            ask(model, shape)


# -- scores ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESNETS)
def test_scores_are_bn_scales_in_residual_networks(name):
    found, wanted = scores_of(name), baselines.bn_scale(make(name))
    assert found.keys() == wanted.keys()
    for layer, scale in wanted.items():
        assert len(scale.unique()) == len(scale), "else an order would not show"
        torch.testing.assert_close(found[layer], scale, rtol=0, atol=1e-12)


def test_scores_of_dense_layers_are_means_over_all_that_read_them():
    model, found = make("densenet40"), scores_of("densenet40")
    wanted = {}
    for b, before in enumerate((16, 160, 304), 1):
        block = model.get_submodule(f"block{b}")
        last = model.get_submodule(f"trans{b}.bn" if b < 3 else "bn")
        norms = [layer.bn for layer in block] + [last]
        opening = "conv1" if b == 1 else f"trans{b - 1}.conv"
        wanted[opening] = average(norms, 0, before)
        for i in range(12):
            start = before + 12 * i
            name = f"block{b}.{i}.conv"
            wanted[name] = average(norms[i + 1 :], start, start + 12)
    assert found.keys() == wanted.keys() and len(wanted) == 39
    for name, scale in wanted.items():
        torch.testing.assert_close(found[name], scale, rtol=0, atol=1e-12)


def average(norms, start: int, stop: int):
    rows = [norm.weight.detach()[start:stop].abs() for norm in norms]
    return torch.stack(rows).mean(0)


class Plain(nn.Module):
    """Convolution, something, BatchNorm, something else, mean, linear layer."""

    def __init__(self, before=lambda x: x, behind=lambda x: x, channels: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.before, self.behind = before, behind
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, 10)
        oracle.roughen(self)

    def forward(self, x):
        x = self.behind(self.bn(self.before(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def pad_channels(x):
    return nn.functional.pad(x, (0, 0, 0, 0, 3, 5))


@pytest.mark.parametrize("case", ["plain", "slopes", "zeros beside", "negative"])
def test_only_the_scales_of_batchnorms_count(case):
    model = Plain()
    if case == "slopes":
        model = Plain(behind=nn.PReLU(8, init=7.0))
    elif case == "zeros beside":
        model = Plain(before=pad_channels, channels=16)
    elif case == "negative":
        model.bn.weight.data[::2] *= -1
    (name, found), *rest = map3d.score_channels(model, (3, 8, 8)).items()
    wanted = model.bn.weight.detach().abs()
    wanted = wanted[3:11] if case == "zeros beside" else wanted
    assert name == "conv" and not rest
    torch.testing.assert_close(found, wanted.double())


def test_without_batchnorm_there_is_no_score():
    with pytest.raises(ValueError, match="no BatchNorm reads a layer"):
        map3d.score_channels(models.build("lenet"), (3, 28, 28))


# -- the lattice against networks really shrunk ----------------------------------------

POINTS = [  # net, width, side, multiple, networks tried
    ("resnet14", "uniform", 32, 4, 5),
    ("resnet14", "inner", 32, 4, 5),
    ("resnet14", "scatter", 32, 4, 5),
    ("resnet20_b", "scatter", 32, 4, 2),
    ("resnet14", "uniform", 15, 1, 3),
    ("resnet20_b", "uniform", 32, 4, 2),
    ("densenet40", "uniform", 32, 8, 3),
    ("densenet40", "inner", 32, 8, 1),
    ("mobilenet_v2_cifar", "uniform", 32, 8, 2),
    ("mobilenet_v2_cifar", "inner", 32, 8, 2),
]


@pytest.mark.parametrize(("name", "width", "side", "multiple", "count"), POINTS)
def test_lattice_macs_are_those_of_shrunk_networks(name, width, side, multiple, count):
    model, shape = make(name), (3, side, side)
    space = make_space(name, width, side, multiple)
    mix = torch.Generator().manual_seed(7)
    order = removable(name)
    order = [order[i] for i in torch.randperm(len(order), generator=mix)]
    table = space.lattice(model, order=order)
    table = table.set_index(["blocks", "width", "side"])
    depths, widths = (table.index.unique(level) for level in ("blocks", "width"))
    scores = map3d.score_channels(model, shape)
    corners = [(depths[0], widths[0]), (depths[-1], widths[-1])]
    for i in range(count):
        blocks, narrow = corners[i] if i < 2 else (pick(depths, mix), pick(widths, mix))
        target = map3d.Shape(blocks, narrow, side)
        plan = space.plan(model, target, order=order, scores=scores)
        small = surgery.shrink(model, plan, shape) if plan != Plan() else model
        for s in space.sides():
            row = table.loc[(blocks, narrow, s)]
            macs = cost.count(small, (3, s, s)).macs
            assert row["macs"] == macs, f"{blocks} blocks, width {narrow}, {s} px"
            assert row["share"] == pytest.approx(macs / space.full.macs, rel=1e-12)


def pick(values, generator) -> int:
    return int(values[int(torch.randint(len(values), (1,), generator=generator))])


def test_the_lattice_lists_every_network_once():
    space, table = make_space("resnet14"), make_lattice("resnet14")
    rows = list(table[["blocks", "width", "side"]].itertuples(index=False, name=None))
    wanted = itertools.product(range(3, 7), range(8, 17), (16, 20, 24, 28, 32))
    assert rows == list(wanted) and list(table) == [
        "d", "w", "r", "blocks", "width", "side", "macs", "share"
    ]  # fmt: skip
    for row in table.itertuples():
        target = map3d.Shape(row.blocks, row.width, row.side)
        assert (row.d, row.w, row.r) == space.shares(target)
    assert table["macs"].dtype == "int64"
    assert table["share"].between(0, 1, inclusive="right").all()
    assert (table["share"] == 1).sum() == 1 == table["share"].iloc[-1]
    assert table["macs"].iloc[-1] == space.full.macs == cost.count(
        make("resnet14"), SHAPE).macs  # fmt: skip


@pytest.mark.parametrize(
    ("side", "multiple", "sides"),
    [(32, 4, [16, 20, 24, 28, 32]), (30, 4, [16, 20, 24, 28, 30]),
     (28, 8, [16, 24, 28]), (15, 1, list(range(8, 16))), (32, 32, [32])],
)  # fmt: skip
def test_sides_are_multiples_and_the_native_one(side, multiple, sides):
    assert make_space("resnet14", "uniform", side, multiple).sides() == sides


# -- numbers of ResNet-56 --------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "exponents", "low", "high"),
    [("uniform", (1.02, 1.99, 2.00), -0.02, 0.04),
     ("inner", (1.02, 0.99, 2.00), -0.51, 0.02)],
)  # fmt: skip
def test_exponents_of_resnet56(width, exponents, low, high):
    table = make_lattice("resnet56", width)
    table = table[table["d"] >= 0.5]
    assert map3d.fit_exponents(table).exponents == pytest.approx(exponents, abs=0.01)
    off = map3d.FORMULA(table["d"], table["w"], table["r"]) / table["share"] - 1
    assert low < off.min() and off.max() < high
    assert width == "uniform" or off.min() < -0.49, "half the cost promised, all left"


@pytest.mark.parametrize(
    ("side", "share"),
    [(31, 0.979), (30, 0.919), (29, 0.899), (28, 0.766), (24, 0.5625)],
)
def test_smaller_images_save_in_steps(side, share):
    table = make_lattice("resnet56", "uniform", 32, 1)
    row = table[(table["d"] == 1) & (table["w"] == 1) & (table["side"] == side)]
    tolerance = 0.0005 if side > 24 else 0.00005
    assert row["share"].item() == pytest.approx(share, abs=tolerance)


# -- plans -----------------------------------------------------------------------------


def plan_for(name, width, blocks, steps, side=32, model=None) -> Plan:
    """Blocks go in the order that is the reverse of the forward one."""
    model, space = model or make(name), make_space(name, width)
    target = map3d.Shape(blocks, steps, side)
    scores = map3d.score_channels(model, SHAPE)
    return space.plan(model, target, order=removable(name)[::-1], scores=scores)


def best(score, count: int) -> list[int]:
    return sorted(score.topk(count).indices.tolist())


def test_inner_width_keeps_the_largest_scales_by_hand():
    model = make("resnet14")
    plan = plan_for("resnet14", "inner", 5, 9, 24)
    assert plan.drop == ["layer3.1"] and plan.resolution == 24 and not plan.scatter
    assert plan.keep == {
        f"layer{s}.{b}.conv1": best(
            model.get_submodule(f"layer{s}.{b}.bn1").weight.abs(), 9 * 2 ** (s - 1)
        )
        for s, b in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    }


def test_scattered_width_narrows_every_convolution_of_the_branches_alone():
    model = make("resnet14")
    plan = plan_for("resnet14", "scatter", 5, 9, 24)
    wanted = {
        f"layer{s}.{b}.conv{i}": best(
            model.get_submodule(f"layer{s}.{b}.bn{i}").weight.abs(), 9 * 2 ** (s - 1)
        )
        for s, b in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
        for i in (1, 2)
    }
    assert plan.keep == wanted and plan.drop == ["layer3.1"]
    assert plan.scatter == {name for name in wanted if name.endswith("conv2")}


def test_uniform_width_sums_the_scales_of_the_members_that_are_left():
    model = make("resnet20")
    plan = plan_for("resnet20", "uniform", 7, 7)
    assert plan.drop == ["layer3.2", "layer3.1"] and plan.resolution is None
    left = [n for n in STAGES["resnet20"] for n in (f"{n}.0", f"{n}.1", f"{n}.2")][:7]
    wanted = {}
    for s in (1, 2, 3):
        blocks = [n for n in left if n.startswith(f"layer{s}")]
        members = {f"{n}.conv2": f"{n}.bn2" for n in blocks}
        members |= {"conv1": "bn1"} if s == 1 else {}
        kept = best(sum(scale(model, norm) for norm in members.values()), 7 * 2**s // 2)
        wanted |= dict.fromkeys(members, kept)
        for n in blocks:
            wanted[f"{n}.conv1"] = best(scale(model, f"{n}.bn1"), 7 * 2**s // 2)
    assert plan.keep == wanted
    whole = sum(scale(model, f"layer3.{b}.bn2") for b in range(3))
    assert best(whole, 28) != wanted["layer3.0.conv2"], "a dropped member would show"


def scale(model, norm: str):
    return model.get_submodule(norm).weight.detach().abs()


@pytest.mark.parametrize(
    ("name", "width", "blocks", "steps", "side"),
    [("resnet14", "uniform", 4, 9, 24), ("resnet14", "inner", 3, 16, 16),
     ("resnet20_b", "uniform", 6, 1, 32), ("densenet40", "uniform", 20, 7, 20),
     ("densenet40", "inner", 36, 12, 32)],
)  # fmt: skip
def test_measured_is_what_was_asked_for(name, width, blocks, steps, side):
    space, plan = make_space(name, width), plan_for(name, width, blocks, steps, side)
    small = shrink(make(name), plan) if plan != Plan() else make(name)
    row = space.measure(small, side)
    macs, params = oracle.recount(small, (3, side, side))
    full, _ = oracle.recount(make(name), SHAPE)
    asked = map3d.Shape(blocks, steps, side)
    d, w, r = space.shares(asked)
    assert row.pop("w") == pytest.approx(w, abs=0.01 if "dense" in name else 1e-12)
    assert row == {
        "d": d, "r": r, "blocks": blocks, "side": side, "macs": macs,
        "params": params, "share": macs / full,
    }  # fmt: skip
    assert d == blocks / len(space.blocks) and r == side / 32
    assert space.measure(make(name))["share"] == 1


def test_counts_are_rounded_to_the_nearest_channel():
    """Two thirds of 16, 160 and 304 channels."""
    plan = plan_for("densenet40", "uniform", 36, 8)
    names = ("conv1", "trans1.conv", "trans2.conv", "block2.5.conv")
    assert [len(plan.keep[name]) for name in names] == [11, 107, 203, 8]


@pytest.mark.parametrize("width", ["uniform", "inner"])
@pytest.mark.parametrize("name", ["resnet14", "densenet40"])
def test_two_steps_reach_what_one_step_reaches(name, width):
    """Targets are absolute, whatever has been removed before."""
    model, space = make(name), make_space(name, width)
    half, top = space.steps // 2, space.steps - 3
    near, far = {"resnet14": (5, 4), "densenet40": (30, 24)}[name]
    first = shrink(model, plan_for(name, width, near, top, 28))
    second = plan_for(name, width, far, half, 24, model=first)
    twice = shrink(first, second)
    once = shrink(model, plan_for(name, width, far, half, 24))
    assert space.measure(twice, 24) == space.measure(once, 24)
    assert [tuple(p.shape) for p in twice.parameters()] == [
        tuple(p.shape) for p in once.parameters()
    ]
    assert len(second.drop) == near - far
    assert plan_for(name, width, far, half, 24, model=twice) == Plan(resolution=24)
    assert plan_for(name, width, far, half, 32, model=twice) == Plan()
    if name == "resnet14" and width == "inner":  # no ties: the very same channels
        x = oracle.images((3, 24, 24))
        found, wanted = oracle.evaluate(twice, x), oracle.evaluate(once, x)
        assert oracle.difference(found, wanted) < 1e-12


def test_blocks_go_in_the_order_given_and_only_those_present():
    model, space = make("resnet20"), make_space("resnet20")
    order = ["layer2.1", "layer3.2", "layer1.1", "layer1.2"]
    scores, target = scores_of("resnet20"), map3d.Shape(7, 16, 32)
    plan = space.plan(model, target, order=order, scores=scores)
    assert plan == Plan(drop=["layer2.1", "layer3.2"])
    small = shrink(model, Plan(drop=["layer2.1"]))
    assert space.find_present(small) == [
        b.name for b in space.blocks if b.name != "layer2.1"
    ]
    assert space.plan(small, target, order=order, scores=scores).drop == ["layer3.2"]


def test_blocks_leave_evenly_over_the_stages_where_no_order_is_given():
    order = make_space("resnet20").spread_removal()
    assert order == [f"layer{s}.{b}" for b in (2, 1) for s in (3, 2, 1)]
    model, table = make("densenet40"), make_lattice("densenet40")
    few = table[(table["w"] == 1) & (table["r"] == 1)].set_index("blocks")["macs"]
    drop = [f"block{b}.{i}" for i in (11, 10) for b in (3, 2, 1)][:5]
    assert few[31] == cost.count(shrink(model, Plan(drop=drop)), SHAPE).macs


def test_plans_that_cannot_be_made_are_refused():
    model, space = make("resnet14"), make_space("resnet14")
    scores, order = scores_of("resnet14"), removable("resnet14")
    drop = shrink(model, Plan(drop=order[:2]))
    thin = shrink(model, plan_for("resnet14", "uniform", 6, 8))

    def ask(model, *target, order=order, scores=scores):
        shape = map3d.Shape(*target)
        return space.plan(model, shape, order=order, scores=scores)

    with pytest.raises(ValueError, match="has 4 blocks left, 5 are wanted"):
        ask(drop, 5, 16, 32)
    for bad, word in {(2, 16, 32): "blocks", (7, 16, 32): "blocks", (6, 0, 32): "width",
                      (6, 17, 32): "width", (6, 16, 0): "side"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{word} must lie in"):
            ask(model, *bad)
    with pytest.raises(ValueError, match="rate: 'conv1' has no scores"):
        ask(model, 6, 8, 32, scores={n: s for n, s in scores.items() if n != "conv1"})
    with pytest.raises(ValueError, match="4 blocks cannot be reached: 6 are there, 1"):
        ask(model, 4, 16, 32, order=order[:1])
    with pytest.raises(ValueError, match=r"'conv1' has 8 channels left, 9 are wanted"):
        ask(thin, 6, 9, 32)
    broken = scores | {"conv1": scores["conv1"] * math.nan}
    with pytest.raises(ValueError, match="'conv1' has scores that are not finite"):
        ask(model, 6, 9, 32, scores=broken)


# -- shrunk, masked, and by hand -------------------------------------------------------


@pytest.mark.parametrize("width", ["uniform", "inner", "scatter"])
@pytest.mark.parametrize("name", ["resnet14", "resnet20_b"])
def test_combined_plans_shrink_to_what_masks_and_hooks_compute(name, width):
    model, side = make(name), 20
    depth = len(make_space(name).blocks)
    plan = plan_for(name, width, depth - 2, 9, side)
    assert len(plan.drop) == 2 and plan.keep and plan.resolution == side
    x = oracle.images((3, side, side))
    small = oracle.assert_exact(model, plan, SHAPE, x, hooks=False)
    short = copy.deepcopy(model)
    for block in plan.drop:
        short.set_submodule(block, nn.Identity())
    padded = width == "uniform" and not name.endswith("_b")
    extra = oracle.pad_shortcuts(model, plan) if padded else None
    with oracle.hooked(short, Plan(plan.keep, plan.scatter), x, extra):
        wanted = oracle.evaluate(short, x)
    assert oracle.difference(oracle.evaluate(small, x), wanted) < 1e-10


@pytest.mark.parametrize("width", ["uniform", "inner"])
def test_combined_plans_of_dense_networks(width):
    model, side = make("densenet40"), 20
    plan = plan_for("densenet40", width, 30, 7, side)
    x = oracle.images((3, side, side), count=1)
    small = oracle.assert_exact(model, plan, SHAPE, x, hooks=False)
    gone = {f"{block}.conv": [] for block in plan.drop}
    with oracle.hooked(model, Plan(plan.keep | gone), x, behind=False):
        wanted = oracle.evaluate(model, x)
    assert oracle.difference(oracle.evaluate(small, x), wanted) < 1e-10


# -- snapping --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 6), st.integers(1, 16), st.integers(1, 8), st.booleans())
def test_shares_of_a_network_snap_back_to_it(blocks, steps, quarter, even):
    multiple, native = (4, 32) if even else (4, 30)
    space = make_space("resnet14", "uniform", native, multiple)
    target = map3d.Shape(blocks, steps, min(quarter * multiple, native))
    assert space.snap(*space.shares(target)) == target


@settings(max_examples=60, deadline=None)
@given(*[st.floats(1e-3, 1)] * 3, st.sampled_from([(32, 4), (28, 8), (30, 4), (15, 1)]))
def test_snapping_finds_the_nearest_network(d, w, r, grid):
    native, multiple = grid
    space = make_space("resnet14", "uniform", native, multiple)
    found = space.snap(d, w, r)
    sides = [*range(multiple, native, multiple), native]
    choices = [(range(3, 7), d * 6), (range(1, 17), w * 16), (sides, r * native)]
    for got, (values, wanted) in zip(found, choices, strict=True):
        assert got in values
        nearest = min(abs(value - wanted) for value in values)
        assert abs(got - wanted) <= nearest + 1e-8


def test_halves_snap_up_whatever_the_last_bits():
    space = make_space("resnet14")
    assert space.snap(4.5 / 6, 10.5 / 16, 26 / 32) == map3d.Shape(5, 11, 28)
    bit = 1 - 1e-12
    assert space.snap(4.5 / 6 * bit, 10.5 / 16 * bit, 26 / 32 * bit) == map3d.Shape(
        5, 11, 28
    )
    assert space.snap(1e-9, 1e-9, 1e-9) == map3d.Shape(3, 1, 4)
    assert space.snap(1, 1, 1) == map3d.Shape(6, 16, 32)
    coarse = make_space("resnet14", "uniform", 28, 8)
    assert coarse.snap(1, 1, 0.999).side == 28 and coarse.snap(1, 1, 0.9).side == 24


@pytest.mark.parametrize("bad", [0, -0.5, 1.001, math.nan, math.inf])
@pytest.mark.parametrize("place", range(3))
def test_shares_outside_0_to_1_are_refused(place, bad):
    shares = [bad if i == place else 0.5 for i in range(3)]
    with pytest.raises(ValueError, match=rf"{'dwr'[place]} must lie in \(0, 1\]"):
        make_space("resnet14").snap(*shares)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": "both"}, "width must be one of"), ({"multiple": 0}, "multiple must"),
     ({"multiple": 33}, "multiple must lie in \\[1, 33\\)"),
     ({"input_shape": (3, 32, 48)}, "must be square")],
)  # fmt: skip
def test_spaces_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        map3d.Space(make("resnet14"), **({"input_shape": SHAPE} | options))


def test_a_space_knows_its_cost_and_its_steps():
    spaces = [make_space("resnet14", width) for width in ("uniform", "inner")]
    assert [s.exponents for s in spaces] == [(1, 2, 2), (1, 1, 2)]
    assert [s.steps for s in spaces] == [16, 16] and spaces[0].fewest == 3
    assert make_space("densenet40").steps == 12
    inner = {f"layer{s}.{b}.conv1": 8 * 2**s for s in (1, 2, 3) for b in (0, 1)}
    assert spaces[1].channels == inner
    assert set(spaces[0].channels) == set(scores_of("resnet14"))


class Thin(nn.Module):
    """Two residual blocks whose branches are one convolution each: nothing inside."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return x + self.bn(self.conv(x))

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.stage = nn.Sequential(self.Block(), self.Block())
        self.linear = nn.Linear(8, 10)
        init_he(self)

    def forward(self, x):
        return self.linear(self.stage(self.bn(self.stem(x))).mean((2, 3)))


def test_steps_are_as_fine_as_the_narrowest_layer():
    model, shape = Thin(), (3, 12, 12)
    space = map3d.Space(model, shape)
    assert (space.steps, space.fewest, len(space.blocks)) == (8, 1, 2)
    with pytest.raises(ValueError, match="'inner': no layer"):
        map3d.Space(model, shape, width="inner")


# -- floors and designs ----------------------------------------------------------------

HALF = (0.5, 0.5**0.5, 0.5**0.5)


def test_each_floor_alone_meets_the_budget():
    assert map3d.find_floors(0.5) == pytest.approx((0.5, 0.7071, 0.7071), abs=5e-5)
    inner = map3d.find_floors(0.5, make_space("resnet14", "inner").exponents)
    assert inner == pytest.approx((0.5, 0.5, 0.7071), abs=5e-5)
    for keep in (0.1, 0.25, 1.0):
        d, w, r = map3d.find_floors(keep)
        assert d == w**2 == pytest.approx(keep) and r == w
    assert map3d.find_floors(1.0) == WHOLE


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, math.nan])
def test_budgets_outside_0_to_1_are_refused(keep):
    with pytest.raises(ValueError, match=r"keep, .* must lie in \(0, 1\]"):
        map3d.find_floors(keep)


@pytest.mark.parametrize("exponents", [(0, 2, 2), (1, -1, 2), (1, 2), (1, 2, math.nan)])
def test_exponents_that_are_no_cost_are_refused(exponents):
    with pytest.raises(ValueError, match="exponents must"):
        map3d.find_floors(0.5, exponents)


def test_the_axes_go_down_in_equal_steps_one_dimension_at_a_time():
    first, *chains = map3d.make_design("axis", HALF)
    assert first == [WHOLE] and sum(map(len, chains)) == 12
    assert [[p[0] for p in chains[0]], [p[1] for p in chains[1]]] == [
        pytest.approx([0.875, 0.75, 0.625, 0.5]),
        pytest.approx([0.927, 0.854, 0.780, 0.707], abs=5e-4),
    ]
    for m, chain in enumerate(chains):
        assert [p[:m] + p[m + 1 :] for p in chain] == [(1.0, 1.0)] * 4
        assert chain[-1][m] == pytest.approx(HALF[m], abs=1e-15)


def test_the_grid_holds_27_networks_each_pruned_at_once():
    grid = map3d.make_design("grid", HALF)
    assert all(len(chain) == 1 for chain in grid) and grid[0] == [WHOLE]
    points = {tuple(round(x, 12) for x in chain[0]) for chain in grid}
    steps = [[1, (1 + f) / 2, f] for f in HALF]
    assert len(grid) == 27 and points == {
        tuple(round(x, 12) for x in point) for point in itertools.product(*steps)
    }
    assert len(map3d.make_design("grid", HALF, levels=2)) == 8


@pytest.mark.parametrize("exponents", [(1, 2, 2), (1, 1, 2)])
def test_interior_points_lie_on_the_budget_surface(exponents):
    floors = map3d.find_floors(0.3, exponents)
    points = [p for (p,) in map3d.make_design("axis", floors, interior=True)[4:]]
    for point in points:
        cost_of = math.prod(x**e for x, e in zip(point, exponents, strict=True))
        assert cost_of == pytest.approx(0.3, rel=1e-12)
    moved = ["".join(n for n, x in zip("dwr", p, strict=True) if x < 1) for p in points]
    assert moved == ["dw", "dr", "wr", "dwr"]
    parts = [x**e for x, e in zip(points[-1], exponents, strict=True)]
    assert parts == pytest.approx([0.3 ** (1 / 3)] * 3)


def test_designs_put_together():
    axes = map3d.make_design("axis", HALF, rounds=2, interior=True)
    assert [len(chain) for chain in axes] == [1, 2, 2, 2, 1, 1, 1, 1]
    assert map3d.make_design("axis", HALF, rounds=1)[1:] == [
        [pytest.approx((0.5, 1, 1))],
        [pytest.approx((1, HALF[1], 1))],
        [pytest.approx((1, 1, HALF[2]))],
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("axes", {}, "design must be one of"), ("axis", {"rounds": 0}, "rounds must lie"),
     ("interleaved", {}, "design must be one of"),
     ("grid", {"levels": 1}, "levels must lie")],
)  # fmt: skip
def test_designs_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        map3d.make_design(name, HALF, **options)
