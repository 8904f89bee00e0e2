"""Scores times the size of each neuron's output: the bound without its constant."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nisp_theory import (
    MOST,
    all_masks,
    bounds,
    chains,
    cnns,
    draw_images,
    draw_scores,
    loop_by_hand,
    lowest,
    mlps,
    outputs_of,
    small_cnn,
)
from torch import nn

from lib import data, models, nisp, plan


@pytest.fixture(scope="module")
def images() -> data.ImageSet:
    return data.load("mnist5k", "train").take(240)


def activity_of(model, shape) -> dict:
    """By hooks of its own, over the images of the theory's tests."""
    names = nisp.propagate(model, draw_scores(model), shape)
    x = draw_images(shape)
    return {n: outputs_of(model, n, x).abs().mean(0) for n in names}


# -- measured ------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["lenet", "cifarnet", "resnet8"])
def test_activity_is_the_mean_of_what_a_mask_takes_away(images, net):
    """Behind a ReLU that alone reads the layer, in front of a BatchNorm."""
    torch.manual_seed(0)
    model = models.build(net, in_channels=1, image_size=28)
    found = nisp.measure_activity(model, images, num_images=70, seed=3)
    assert model.training
    model.eval()
    x = next(iter(data.batches(images.take(70, 3), 70)))[0]
    last = {"lenet": "ip2", "cifarnet": "ip2", "resnet8": "linear"}[net]
    layers = {
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    assert found.keys() == layers - {last}
    relus = {"lenet": {"ip1"}, "cifarnet": {"conv2", "conv3"}, "resnet8": set()}[net]
    for name, values in found.items():
        own = outputs_of(model, name, x).double()
        own = own.relu() if name in relus else own.abs()
        torch.testing.assert_close(values, own.mean(0), rtol=1e-5, atol=1e-6)


def test_what_an_activation_makes_of_zero_is_not_taken_away(images):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Flatten(),
                          nn.Linear(3 * 26 * 26, 2))  # fmt: skip
    x = next(iter(data.batches(images.take(30, 0), 30)))[0]
    expected = (model[0](x).sigmoid() - 0.5).abs().mean(0).double()
    found = nisp.measure_activity(model, images, num_images=30)
    torch.testing.assert_close(found["0"], expected.detach(), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """One convolution that runs twice, on maps of one size or of two."""

    def __init__(self, pool: int):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(pool)
        self.fc = nn.Linear(1, 2)

    def forward(self, x):
        return self.fc(self.conv(self.pool(self.conv(x))).mean((2, 3)))


def test_a_layer_that_runs_twice_has_the_mean_of_its_calls(images):
    model = Twice(1).double().eval()
    x = next(iter(data.batches(images.take(20, 0), 20)))[0].double()
    with torch.no_grad():
        first = model.conv(x)
        expected = (first.abs().mean(0) + model.conv(first).abs().mean(0)) / 2
    found = nisp.measure_activity(model, images, num_images=20)
    torch.testing.assert_close(found["conv"], expected)
    with pytest.raises(ValueError, match="'conv' runs on inputs of different sizes"):
        nisp.measure_activity(Twice(2), images, num_images=20)


# -- put back ------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.one_of(mlps(), cnns()))
def test_scores_are_those_of_the_neurons_times_their_activity(drawn):
    model, shape = drawn
    s, activity = draw_scores(model), activity_of(model, shape)
    plain = nisp.propagate(model, s, shape, neurons=True)
    neurons = nisp.propagate(model, s, shape, neurons=True, activity=activity)
    channels = nisp.propagate(model, s, shape, activity=activity)
    assert plain.keys() == neurons.keys() == channels.keys()
    for name, values in plain.items():
        expected = values * activity[name]
        torch.testing.assert_close(neurons[name], expected)
        torch.testing.assert_close(channels[name], expected.flatten(1).sum(1)
                                   if expected.ndim > 1 else expected)  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True)
@given(mlps())
def test_the_highest_scores_minimise_the_sharper_bound(drawn):
    model, shape = drawn
    s, x = draw_scores(model), draw_images(shape)
    plain = nisp.propagate(model, s, shape)
    activity = activity_of(model, shape)
    for name, scores in nisp.propagate(model, s, shape, activity=activity).items():
        assert len(scores) <= MOST
        masks = all_masks(len(scores))
        sharp, _ = bounds(plain[name], outputs_of(model, name, x).abs().sum(0), masks)
        for count in range(1, len(scores)):
            rate = {name: (len(scores) - count) / len(scores)}
            kept = plan.from_scores(model, {name: scores}, shape, rate=rate).keep[name]
            least = sharp[masks.sum(1) == count].min()
            row = sum(2**i for i in kept)
            assert float(sharp[row]) <= float(least) * (1 + 1e-9)


def make_louder(model: nn.Sequential, factor: torch.Tensor) -> nn.Sequential:
    """The same function: one layer's channels scaled, undone behind its BatchNorm."""
    louder = copy.deepcopy(model)
    conv, norm = louder[0], louder[1]
    conv.weight.data *= factor.view(-1, 1, 1, 1)
    if conv.bias is not None:
        conv.bias.data *= factor
    norm.running_mean *= factor
    before, after = norm.running_var, norm.running_var * factor**2
    norm.weight.data *= ((after + norm.eps) / (before + norm.eps)).sqrt() / factor
    norm.running_var *= factor**2
    return louder


@pytest.mark.parametrize("joint", [None, 0.5])
def test_loud_channels_with_quiet_readers_change_only_the_plain_scores(joint):
    model, shape = small_cnn()
    factor = torch.tensor([10.0, 0.1, 1, 3]).double()
    louder, s, x = make_louder(model, factor), draw_scores(model), draw_images(shape)
    with torch.no_grad():
        torch.testing.assert_close(louder(x), model(x))
    for same, with_activity in ((False, False), (True, True)):
        found = [
            nisp.propagate(
                net, s, shape, joint=joint,
                activity=activity_of(net, shape) if with_activity else None,
            )["0"]
            for net in (model, louder)
        ]  # fmt: skip
        assert torch.allclose(*found, rtol=1e-9, atol=0) == same


@settings(max_examples=15, deadline=None, derandomize=True)
@given(chains(), st.sampled_from([0.25, 0.5, 0.7]))
def test_joint_pruning_ranks_with_activity_and_hands_on_without(drawn, rate):
    model, shape = drawn
    s, activity = draw_scores(model), activity_of(model, shape)
    found = nisp.propagate(model, s, shape, joint=rate, activity=activity)
    expected = loop_by_hand(model, s, shape, rate, activity)
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-10, atol=0)
        if int(rate * len(scores)):
            made = plan.from_scores(model, {name: scores}, shape, rate=rate)
            gone = {*range(len(scores))} - {*made.keep[name]}
            assert gone == {*lowest(found[name], rate)}


def test_a_layer_on_maps_of_two_sizes_has_no_activity():
    model = Twice(2).double().eval()
    with pytest.raises(ValueError, match="the output of 'conv' has the shape"):
        nisp.propagate(
            model, torch.ones(1), (1, 8, 8), activity={"conv": torch.ones(1, 4, 4)}
        )


def test_tied_layers_are_decided_by_their_weighed_sum():
    model, shape = models.build("resnet8").double().eval(), (3, 16, 16)
    s, activity = draw_scores(model), activity_of(model, shape)
    whole = nisp.propagate(model, s, shape, activity=activity)
    joint = nisp.propagate(model, s, shape, activity=activity, joint=0.5)
    tied = ["conv1", "layer1.0.conv2"]
    for name in tied:
        torch.testing.assert_close(joint[name], whole[name], rtol=1e-12, atol=0)
    made = plan.from_scores(model, joint, shape, rate=0.5)
    gone = set(range(16)) - set(made.keep["conv1"])
    assert gone == set(lowest(sum(whole[name] for name in tied), 0.5))


def test_uniform_activity_is_the_closed_form():
    model, shape = small_cnn()
    s = draw_scores(model)
    ones = {n: torch.ones_like(a) for n, a in activity_of(model, shape).items()}
    for options in ({}, {"joint": 0.5}):
        plain = nisp.propagate(model, s, shape, **options)
        found = nisp.propagate(model, s, shape, activity=ones, **options)
        assert all(torch.equal(plain[n], found[n]) for n in plain)


def test_layers_that_are_never_active_score_zero():
    model, shape = small_cnn()
    none = {n: torch.zeros_like(a) for n, a in activity_of(model, shape).items()}
    found = nisp.propagate(model, draw_scores(model), shape, activity=none)
    assert all(not values.any() for values in found.values())
    with pytest.raises(ValueError, match="leave behind_norm out"):
        nisp.propagate(
            model, draw_scores(model), shape, activity=none, behind_norm=True
        )


def test_methods_are_the_propagation_with_their_factors(images):
    torch.manual_seed(0)
    model = models.build("resnet8", in_channels=1, image_size=28)
    nisp_options = {"num_images": 60, "seed": 1}
    final = nisp.score_frl(model, images, **nisp_options)
    options = {
        "nisp": {},
        "nisp-norm": {"behind_norm": True},
        "nisp-sharp": {
            "activity": nisp.measure_activity(model, images, **nisp_options)
        },
    }
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert bool((norm.running_var == 1).all())  # measuring changes nothing
    for method, changed in options.items():
        found = nisp.score_layers(method, model, images, joint=0.5, **nisp_options)
        expected = nisp.propagate(model, final, images.shape, joint=0.5, **changed)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_activity_that_does_not_fit_is_refused():
    model, shape = small_cnn()
    s, activity = draw_scores(model), activity_of(model, shape)

    def ask(**changed):
        kept = {n: a for n, a in (activity | changed).items() if a is not None}
        nisp.propagate(model, s, shape, activity=kept)

    with pytest.raises(ValueError, match=r"'0' is missing; `measure_activity` has"):
        ask(**{"0": None})
    with pytest.raises(
        ValueError, match=r"'0' has the shape \(4, 6, 6\) per image, got"
    ):
        ask(**{"0": activity["0"].sum((1, 2))})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'0' needs finite values >= 0"):
            ask(**{"0": torch.full_like(activity["0"], bad)})
