"""Numbers that are none, and types that do not fit: one line each, by name.

`CASES` maps what is done to a pattern of what must be said; `tests/campaign.py` runs
them all, and looks for files besides.
"""

import math
from dataclasses import replace
from decimal import Decimal
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from lib import baselines, cost, data, map3d, models, nisp, plan, scop, train
from lib.data import ImageSet
from lib.map3d.space import score_channels
from lib.scop import diagnostics, knockoff_filter

SHAPE = (1, 14, 14)
NAN = math.nan
AXIS = [(1, 1, 1)] + [
    tuple(x if m == n else 1 for m in range(3))
    for n in range(3)
    for x in (0.8, 0.6, 0.4)
]
POINTS = np.array([(*p, 90 - 20 * (1 - np.prod(p))) for p in AXIS])


@cache
def make_images() -> ImageSet:
    mix = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 14, 14, 1), dtype=torch.uint8, generator=mix)
    labels = torch.arange(40) % 10
    classes = tuple("0123456789")
    return ImageSet(pixels, labels, classes, "made", (0.5,), (0.3,), 1, flip=True)


@cache
def make_map() -> map3d.Map:
    return map3d.fit(POINTS)


def make_net(tensor: str = "") -> nn.Module:
    """resnet8 with one NaN in the tensor named."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.build("resnet8", in_channels=1)
    if tensor:
        net.state_dict()[tensor].view(-1)[0] = NAN
    return net


SCALE, STATISTIC = "layer1.0.bn1.weight", "layer1.0.bn1.running_mean"
WEIGHT = "layer1.0.conv1.weight"


def prune(**request):
    net = make_net()
    return plan.from_scores(net, baselines.l1(net), SHAPE, **request)


def select(net: nn.Module):
    betas = {n: torch.ones(len(s)) for n, s in baselines.bn_scale(make_net()).items()}
    return scop.importance(net, betas)


def test_pairs(**options):
    x = torch.randn(20, 4)
    return diagnostics.two_sample_test(x, x.flip(0), permutations=5, **options)


test_pairs.__test__ = False  # type: ignore[attr-defined]
BROKEN = torch.full((20, 4), NAN)
NUMBERS = "d, w, r: expected numbers of one shape"
CASES = {
    "an accuracy at a word": (lambda: make_map().predict("a", 1, 1), NUMBERS),
    "an accuracy at nothing": (lambda: make_map().predict(None, 1, 1), NUMBERS),
    "a slope at a word": (lambda: make_map().gradient("a", 1, 1), NUMBERS),
    "a place of a word": (lambda: make_map().covers("a", 1, 1), NUMBERS),
    "points of two shapes": (
        lambda: make_map().predict(np.ones(2), np.ones(3), 1),
        NUMBERS,
    ),
    "accuracies as shares": (
        lambda: map3d.fit(POINTS / [1, 1, 1, 100]),
        r"accuracy: .*as shares are; expected percent",
    ),
    "an accuracy that is NaN": (
        lambda: map3d.fit(np.where(POINTS == 90, NAN, POINTS)),
        "accuracy: point 0 has nan",
    ),
    "a budget in words": (lambda: map3d.optimum(make_map(), "half"), "keep.* 'half'"),
    "no budget": (lambda: map3d.optimum(make_map(), None), "keep.* None"),
    "a budget of Decimal": (
        lambda: map3d.optimum(make_map(), Decimal("0.5")),
        "keep.* Decimal",
    ),
    "an optimum of points": (
        lambda: map3d.optimum(POINTS, 0.5),
        "predictor: expected a Map",
    ),
    "floors for a word": (lambda: map3d.find_floors("0.5"), "keep.*'0.5'"),
    "exponents in words": (
        lambda: map3d.find_floors(0.5, ("a", 1, 2)),
        "exponents must be a float, got 'a'",
    ),
    "half a round": (
        lambda: map3d.make_design("axis", (0.5, 0.5, 0.5), rounds=1.5),
        "rounds must be an int",
    ),
    "a floor of NaN": (
        lambda: map3d.make_design("axis", (NAN, 0.5, 0.5)),
        "floors must lie in",
    ),
    "a floor in words": (
        lambda: map3d.make_design("axis", ("a", 0.5, 0.5)),
        "floors must be a float",
    ),
    "a scale of NaN": (
        lambda: baselines.bn_scale(make_net(SCALE)),
        r"score of 'layer1\.0\.conv1' is not finite",
    ),
    "a weight of NaN": (
        lambda: baselines.l1(make_net(WEIGHT)),
        r"score of 'layer1\.0\.conv1' is not finite",
    ),
    "distances to NaN": (
        lambda: baselines.fpgm(make_net(WEIGHT)),
        r"score of 'layer1\.0\.conv1' is not finite",
    ),
    "MAP's width at a scale of NaN": (
        lambda: score_channels(make_net(SCALE), SHAPE),
        r"score of 'layer1\.0\.conv1' is not finite",
    ),
    "SCOP at a scale of NaN": (
        lambda: select(make_net(SCALE)),
        r"of 'layer1\.0\.conv1' is not finite",
    ),
    "Taylor behind NaN": (
        lambda: baselines.taylor(make_net(STATISTIC), make_images(), num_images=20),
        "score of '.*' is not finite",
    ),
    "outputs behind NaN": (
        lambda: nisp.measure_activity(make_net(STATISTIC), make_images()),
        "mean output of '.*' is not finite",
    ),
    "an accuracy behind NaN": (
        lambda: train.evaluate(make_net(STATISTIC), make_images()),
        rf"tensor of '{STATISTIC}' is not finite",
    ),
    "statistics of NaN": (
        lambda: train.recalibrate(make_net(WEIGHT), make_images()),
        rf"tensor of '{WEIGHT}' is not finite",
    ),
    "half a batch": (
        lambda: train.recalibrate(make_net(), make_images(), num_batches=1.5),
        "num_batches must be an int",
    ),
    "a rate in words": (lambda: prune(rate="0.5"), "rate.* must be a float, got '0.5'"),
    "a rate of Decimal": (lambda: prune(rate=Decimal("0.5")), "rate.* Decimal"),
    "a rate of True": (lambda: prune(rate=True), "rate.* must be a float, got True"),
    "a share in words": (lambda: prune(macs="0.5"), "macs.* must be a float"),
    "a share of NaN": (lambda: prune(macs=NAN), "macs.* must lie in .* got nan"),
    "scores in a list": (
        lambda: plan.from_scores(make_net(), [1], SHAPE, rate=0.5),
        "scores: expected a dict of tensors",
    ),
    "a list as scores": (
        lambda: plan.from_scores(make_net(), {"conv1": [1.0]}, SHAPE, rate=0.5),
        "scores: 'conv1' needs a tensor",
    ),
    "complex scores": (
        lambda: plan.from_scores(
            make_net(),
            {"conv1": torch.ones(16, dtype=torch.complex64)},
            SHAPE,
            rate=0.5,
        ),
        "scores: 'conv1' needs a tensor of reals",
    ),
    "a shape in words": (lambda: cost.count(make_net(), "x"), "input_shape must be"),
    "no shape": (lambda: cost.count(make_net(), None), "input_shape must be .* None"),
    "a shape of floats": (
        lambda: plan.from_scores(make_net(), {}, (1.0, 14, 14), rate=0.5),
        "input_shape must be an int, got 1.0",
    ),
    "no pixels": (lambda: cost.count(make_net(), (1, 0, 14)), "input_shape must lie"),
    "a false discovery rate in words": (
        lambda: knockoff_filter.knockoff_threshold(torch.ones(3), "a"),
        "q must be a float",
    ),
    "statistics in a list": (
        lambda: knockoff_filter.knockoff_threshold([1.0, 2.0], 0.1),
        "expected finite w",
    ),
    "half a repetition": (
        lambda: knockoff_filter.simulate_filter("exact", rho=0.5, repetitions=1.5),
        "repetitions must be an int",
    ),
    "a sample of NaN": (
        lambda: diagnostics.two_sample_test(BROKEN, BROKEN, bandwidths=(1, 2)),
        "sample of 'x' is not finite",
    ),
    "a bandwidth of NaN": (lambda: test_pairs(bandwidths=(1, NAN)), "bandwidths"),
    "a covariance of NaN": (
        lambda: diagnostics.covariance_gap(BROKEN, BROKEN),
        "sample of 'x' is not finite",
    ),
    "a map of NaN": (
        lambda: diagnostics.offdiagonal_energy(BROKEN, torch.ones(4)),
        "map of 'weight' is not finite",
    ),
    "2.5 images a batch": (
        lambda: data.batches(make_images(), 2.5),
        "batch_size must be an int, got 2.5",
    ),
    "a batch size in words": (
        lambda: train.evaluate(make_net(), make_images(), batch_size="2"),
        "batch_size must be an int, got '2'",
    ),
    "a resolution in words": (
        lambda: train.evaluate(make_net(), make_images(), resolution="14"),
        "resolution must be an int",
    ),
    "a seed of 1.5": (
        lambda: data.batches(make_images(), 2, train=True, seed=1.5),
        "seed must be an int",
    ),
    "5.5 images": (lambda: make_images().take(5.5), "number of images must be an int"),
    "images in words": (lambda: make_images().take("5"), "number of images must be"),
    "a side of 7.5": (
        lambda: make_images().scale(7.5),
        "side in pixels must be an int",
    ),
    "a fraction in words": (
        lambda: data.split_validation(make_images(), fraction="a"),
        "fraction must be a float",
    ),
    "a fraction of NaN": (
        lambda: data.split_validation(make_images(), fraction=NAN),
        "fraction must lie in",
    ),
    "a size in words": (
        lambda: data.load("mnist5k", "train", size="a"),
        "size must be",
    ),
    "a data set by number": (lambda: data.load(5, "train"), "given by its name, got 5"),
    "a mean of NaN": (lambda: replace(make_images(), mean=(NAN,)), "mean must lie in"),
    "a deviation of 0": (lambda: replace(make_images(), std=(0.0,)), "std must lie in"),
    "no deviation": (lambda: replace(make_images(), std=None), "std must be a tuple"),
    "epochs in words": (
        lambda: train.fit(make_net(), make_images(), epochs="1"),
        "epochs must be an int",
    ),
    **{
        f"{name} of {value}": (
            lambda name=name, value=value: train.Recipe(2, **{name: value}),
            f"{name} must lie in .*got",
        )
        for name in ("lr", "momentum", "weight_decay", "gamma", "warmup", "temperature")
        for value in (NAN, math.inf)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(case):
    act, message = CASES[case]
    with pytest.raises(ValueError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_statistics_that_cannot_be_measured_stay_as_they_were():
    net = make_net(WEIGHT)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="is not finite"):
        train.recalibrate(net, make_images())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_prediction_far_outside_the_percent_is_said():
    steep = map3d.fit(np.array([(*p, 90 - 85 * (1 - np.prod(p))) for p in AXIS]))
    assert 0 <= steep.predict(0.5, 1, 1) <= 100  # says nothing: a warning is an error
    cube = steep.coefficients.copy()
    cube[3, 0, 0] = -2000.0
    wild = replace(steep, coefficients=cube)
    with pytest.warns(UserWarning, match=r"predicted accuracies from -\d.* to 100 %"):
        wild.predict([0.1, 0.9], 1, 1)


def test_numbers_of_numpy_and_torch_are_numbers():
    one = data.batches(make_images(), np.int64(8), seed=torch.tensor(1), train=True)
    two = data.batches(make_images(), 8, seed=1, train=True)
    assert torch.equal(next(iter(one))[0], next(iter(two))[0])
    assert (
        prune(rate=np.float32(0.5)) == prune(rate=torch.tensor(0.5)) == prune(rate=0.5)
    )
