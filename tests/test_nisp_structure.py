"""Table 1 of NISP from nets really shrunk, and which of its rows no recipe gives."""

import functools
import itertools
import re

import pandas as pd
import pytest
import torch

from lib import baselines, cost, models, nisp, paths, surgery
from lib import plan as plans
from lib.models.caffe import INCEPTIONS

ALL = ".*"
NO_REDUCE = "(?!.*reduce[35]).*"  # all but the reductions inside the Inceptions
NO_1X1 = "(?!.*conv1x1).*"
HALVES = [  # net, layers cut by half, MACs down, params down
    ("caffenet", "conv[1-5]", 67.90, 33.82),
    ("caffenet", "conv[1-4]", 62.71, 2.67),
    ("caffenet", "conv[1-3]", 53.68, 2.04),
    ("caffenet", "conv[23]|fc6", 42.44, 46.61),
    ("googlenet_bvlc", ALL, 73.12, 71.27),
    ("googlenet_bvlc", NO_REDUCE, 59.04, 55.54),
    ("googlenet_bvlc", NO_1X1, 68.79, 61.57),
    ("lenet", ALL, 71.81, 74.65),
    ("cifarnet", ALL, 70.03, 74.44),
    ("cifarnet", "conv.*", 69.89, 62.94),
]
RESNETS = [  # net, share of all, MACs and params down, row in print and how near it is
    ("resnet34", 0.15, 26.79, 27.15, "A", 1.0, 1.7),
    ("resnet34", 0.25, 43.14, 43.28, "B", 1.0, 1.7),
    ("resnet50", 0.25, 43.20, 42.20, "B", 1.0, 1.7),
    ("resnet56", 0.25, 43.68, 43.64, "", 0.3, 1.1),
]
IMAGENET = ("caffenet", "googlenet_bvlc", "resnet34", "resnet50")

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def make(name: str):
    """The net with the classes of its data set, no weights, and its input shape."""
    options = {"in_channels": 1} if name == "lenet" else {}
    options |= {"num_classes": 1000} if name in IMAGENET else {}
    with torch.device("meta"):
        model = models.build(name, **options)
    return model, models.input_shape(name, options.get("in_channels", 3))


def shrink_by(model, shape, scores, rate, residual: str = "tie") -> tuple[float, float]:
    """MACs and params down in percent."""
    plan = plans.from_scores(model, scores, shape, rate=rate, residual=residual)
    small = cost.count(surgery.shrink(model, plan, shape), shape)
    down = small.down_from(cost.count(model, shape))
    return down["macs_down"], down["params_down"]


@functools.cache
def reduction(name: str, layers: str, rate: float, residual: str = "tie"):
    """The same at one rate in the layers whose whole name matches a pattern."""
    model, shape = make(name)
    scores = {
        n: s for n, s in baselines.uniform(model).items() if re.fullmatch(layers, n)
    }
    return shrink_by(model, shape, scores, rate, residual)


@functools.cache
def published(net: str, variant: str = "") -> tuple[float, float]:
    """MACs and params down as NISP prints them."""
    table = pd.read_csv(paths.PUBLISHED / "nisp.csv", keep_default_na=False)
    rows = table[(table["method"] == "nisp") & (table["net"] == net)]
    rows = rows[rows["variant"] == variant].set_index("quantity")["value"]
    return float(rows["macs_down"]), float(rows["params_down"])


def rounded(pair) -> tuple[float, float]:
    return round(pair[0], 2), round(pair[1], 2)


def distance(found, wanted) -> float:
    """The larger difference of the two columns, in points."""
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


# -- what a uniform rate removes -------------------------------------------------------


@pytest.mark.parametrize(("name", "layers", "macs", "params"), HALVES)
def test_halves_of_layers_remove(name, layers, macs, params):
    assert rounded(reduction(name, layers, 0.5)) == (macs, params)


@pytest.mark.parametrize("name, rate, macs, params, variant, near, nearer", RESNETS)
def test_a_share_of_every_layer_and_of_the_stream_removes_what_is_printed_nearly(
    name, rate, macs, params, variant, near, nearer
):
    found, wanted = reduction(name, ALL, rate), published(name, variant)
    assert rounded(found) == (macs, params)
    assert abs(found[0] - wanted[0]) < near and abs(found[1] - wanted[1]) < nearer
    if variant == "B":  # more than a quarter of all convolutions and weights can be
        assert wanted[0] > 100 * (1 - 0.75**2) > max(found)


def test_propagated_scores_remove_as_much_as_equal_ones():
    """So the rows do not depend on the ranking, only on layers and shares."""
    torch.manual_seed(0)
    model, shape = models.build("resnet8"), (3, 32, 32)
    equal = baselines.uniform(model)
    wanted = shrink_by(model, shape, equal, 0.25)
    for joint in (None, 0.25):
        scores = nisp.propagate(model, torch.ones(64), shape, joint=joint)
        assert scores.keys() == equal.keys()
        assert shrink_by(model, shape, scores, 0.25) == wanted


# -- AlexNet, which is CaffeNet --------------------------------------------------------

CHAIN = {  # outputs, side of the kernel, side of the map, groups
    "conv1": (96, 11, 55, 1),
    "conv2": (256, 5, 27, 2),
    "conv3": (384, 3, 13, 1),
    "conv4": (384, 3, 13, 2),
    "conv5": (256, 3, 13, 2),
    "fc6": (4096, 6, 1, 1),
    "fc7": (4096, 1, 1, 1),
    "fc8": (1000, 1, 1, 1),
}
SUBSETS = [
    frozenset(names)
    for count in range(8)
    for names in itertools.combinations(list(CHAIN)[:7], count)
]
CONVS = [frozenset(list(CHAIN)[:count]) for count in range(6)]


def count_chain(halved, grouped: bool) -> tuple[int, int]:
    """MACs and params of CaffeNet with half of some layers, from the sizes alone."""
    macs, params, before = 0, 0, 3
    for name, (out, kernel, side, groups) in CHAIN.items():
        out //= 2 if name in halved else 1
        weights = out * before * kernel**2 // (groups if grouped else 1)
        macs, params, before = macs + weights * side**2, params + weights + out, out
    return macs, params


def formula(halved, grouped: bool = True) -> tuple[float, float]:
    """MACs and params down in percent."""
    full, less = (count_chain(x, grouped) for x in (frozenset(), halved))
    return 100 * (1 - less[0] / full[0]), 100 * (1 - less[1] / full[1])


def fits(wanted, tolerance: float) -> list[frozenset]:
    """All subsets of the layers whose halves give both numbers."""
    return [x for x in SUBSETS if distance(formula(x), wanted) <= tolerance]


@pytest.mark.parametrize(("layers"), [row[1] for row in HALVES[:4]])
def test_the_formula_gives_what_the_shrunk_caffenet_has(layers):
    halved = frozenset(n for n in CHAIN if re.fullmatch(layers, n))
    assert distance(formula(halved), reduction("caffenet", layers, 0.5)) < 1e-9


def test_variant_a_is_half_of_all_five_convolutions_and_nothing_else():
    wanted = published("caffenet", "A")
    assert len(SUBSETS) == 128 and fits(wanted, 1.0) == [CONVS[5]]
    assert distance(reduction("caffenet", "conv[1-5]", 0.5), wanted) < 0.06


def test_without_groups_variant_a_does_not_fit():
    wanted = published("caffenet", "A")
    assert abs(formula(CONVS[5], grouped=False)[0] - wanted[0]) > 2.5


def test_variants_b_and_c_fit_best_with_their_params_exchanged():
    """B prunes all that C prunes and conv4 too, yet is printed with fewer params."""
    (macs_b, params_b), (macs_c, params_c) = (published("caffenet", v) for v in "BC")
    assert params_b < params_c and formula(CONVS[4])[1] > formula(CONVS[3])[1]
    twin = frozenset({"conv1", "conv2", "conv4"})  # costs what conv1 to conv3 cost
    assert fits((macs_b, params_b), 0.7) == [] == fits((macs_c, params_c), 0.8)
    assert fits((macs_b, params_c), 0.25) == [CONVS[4]]
    assert set(fits((macs_c, params_b), 0.25)) == {CONVS[3], twin}


def test_variant_d_is_no_choice_of_halved_layers():
    """conv2, conv3 and fc6 are 2.3 points off; without fc6, params are far off."""
    macs, params = published("caffenet", "D")
    assert fits((macs, params), 1.0) == []
    assert fits((macs, params), 1.2) == [frozenset({"conv1", "conv4", "fc6"})]
    claimed, other = (
        formula(frozenset({"conv2", "conv3", last})) for last in ("fc6", "fc7")
    )
    assert 2.3 < distance(claimed, (macs, params)) < 2.4
    assert abs(other[0] - macs) < 0.005 and params - other[1] > 25


# -- ResNets ---------------------------------------------------------------------------


def test_kept_counts_rounded_to_the_nearest_remove_a_little_more():
    """A plan removes int(rate * C); nearest, the MACs are the printed ones to 0.2."""
    model, shape = make("resnet34")
    scores = baselines.uniform(model)
    rates = {n: 1 - round(0.85 * len(s)) / len(s) for n, s in scores.items()}
    found, wanted = shrink_by(model, shape, scores, rates), published("resnet34", "A")
    assert rounded(found) == (27.42, 27.38)
    assert abs(found[0] - wanted[0]) < 0.2 and abs(found[1] - wanted[1]) < 0.5


@pytest.mark.parametrize(("rate", "variant"), [(0.15, "A"), (0.25, "B")])
def test_without_the_residual_stream_the_printed_rows_are_far(rate, variant):
    found = reduction("resnet34", ALL, rate, "keep")
    wanted = published("resnet34", variant)
    assert all(w - f > 8 for f, w in zip(found, wanted, strict=True))


# -- GoogLeNet -------------------------------------------------------------------------

KINDS = ("conv1x1", "reduce3x3", "conv3x3", "reduce5x5", "conv5x5", "pool_proj")
REDUCE = ("reduce3x3", "reduce5x5")
SIDES = {"3": 28, "4": 14, "5": 7}


def count_googlenet(rates: dict[str, float]) -> tuple[int, int]:
    """MACs and params with a share removed of each kind of layer, from the sizes."""
    totals = [0, 0]

    def cut(kind, size):
        return size - int(rates.get(kind, 0) * size)

    def add(out, into, kernel, side):
        totals[0] += out * into * kernel**2 * side**2
        totals[1] += out * (into * kernel**2 + 1)
        return out

    x = add(cut("conv1", 64), 3, 7, 112)
    x = add(cut("conv2_reduce", 64), x, 1, 56)
    x = add(cut("conv2", 192), x, 3, 56)
    for label, widths in INCEPTIONS.items():
        side, kept = SIDES[label[0]], map(cut, KINDS, widths)
        one, reduce3, three, reduce5, five, project = kept
        outs = [
            add(one, x, 1, side),
            add(three, add(reduce3, x, 1, side), 3, side),
            add(five, add(reduce5, x, 1, side), 5, side),
            add(project, x, 1, side),
        ]
        x = sum(outs)
    add(1000, x, 1, 1)
    return tuple(totals)


def googlenet(rates: dict[str, float]) -> tuple[float, float]:
    """MACs and params down in percent."""
    full, less = count_googlenet({}), count_googlenet(rates)
    return 100 * (1 - less[0] / full[0]), 100 * (1 - less[1] / full[1])


@pytest.mark.parametrize(
    ("layers", "whole"), [(ALL, ()), (NO_REDUCE, REDUCE), (NO_1X1, ("conv1x1",))]
)
def test_the_formula_gives_what_the_shrunk_googlenet_has(layers, whole):
    kinds = ("conv1", "conv2_reduce", "conv2", *KINDS)
    found = googlenet({kind: 0.5 for kind in kinds if kind not in whole})
    assert distance(found, reduction("googlenet_bvlc", layers, 0.5)) < 1e-9


@pytest.mark.parametrize("more", [[], ["conv2"], ["conv5x5"], ["conv2", "conv5x5"]])
@pytest.mark.parametrize("stem", [[], ["conv2_reduce"]])
def test_one_share_of_the_3x3_layers_does_not_give_the_printed_row(more, stem):
    """With a fifth of the reductions: where params fit, MACs are far behind."""
    wanted, kinds = published("googlenet_bvlc"), ["conv3x3", *more]
    fifth = dict.fromkeys([*REDUCE, *stem], 0.2)
    found = [googlenet(fifth | dict.fromkeys(kinds, step / 100)) for step in range(100)]
    assert min(distance(pair, wanted) for pair in found) > 9
    lighter = [macs for macs, params in found if params <= wanted[1]]
    assert lighter and max(lighter) < wanted[0] - 20
