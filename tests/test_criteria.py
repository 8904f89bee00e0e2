"""Criteria under one name, and the truth against a forward with a hook."""

import time

import pytest
import torch
from torch import nn

from lib import baselines, criteria, data, models, scop, stages, train
from lib.graph import build_graph

SHAPE = (1, 14, 14)


@pytest.fixture(autouse=True)
def runs_apart(tmp_path, monkeypatch):
    """Runs in a temporary folder."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def sets():
    images = data.load("mnist5k", "train").take(600).scale(14)
    rest, val = data.split_validation(images)
    return stages.Sets(rest, val, val)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = models.build("resnet8", in_channels=1).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="module")
def graph(model):
    return build_graph(model, SHAPE)


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.0.conv2"])
def test_truth_is_the_loss_of_a_forward_with_the_channel_at_zero(
    sets, model, graph, name
):
    found = criteria.measure_truth(model, sets.val, [name], graph=graph, batch_size=25)
    norm = model.get_submodule(name.replace("conv", "bn"))
    before = train.evaluate(model, sets.val)["loss"]
    for channel in (0, 5, len(found[name]) - 1):

        def silence(module, args, output, channel=channel):
            output = output.clone()
            output[:, channel] = 0
            return output

        hook = norm.register_forward_hook(silence)
        risen = train.evaluate(model, sets.val)["loss"] - before
        hook.remove()
        assert float(found[name][channel]) == pytest.approx(risen, abs=2e-6)


def test_truth_leaves_the_model_as_it_was(sets, model, graph):
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    criteria.measure_truth(model, sets.val, ["layer3.0.conv1"], graph=graph)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def test_truth_of_a_forward_in_place_is_right_or_refused(sets):
    model = InPlace().eval()
    nn.init.normal_(model.norm.bias)
    graph = build_graph(model, SHAPE)
    try:
        found = criteria.measure_truth(model, sets.val, ["conv"], graph=graph)["conv"]
    except ValueError as error:
        assert "in place" in str(error)
        return
    model.act.inplace = False
    expected = criteria.measure_truth(model, sets.val, ["conv"], graph=graph)["conv"]
    torch.testing.assert_close(found, expected)


def test_truth_needs_a_norm(sets):
    model = models.build("lenet", in_channels=1, image_size=14)
    with pytest.raises(ValueError, match="'conv1' has no BatchNorm"):
        criteria.measure_truth(
            model, sets.val, ["conv1"], graph=build_graph(model, SHAPE)
        )


class OneNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.bn(self.c2(self.bn(self.c1(x)).relu())).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["c1", "c2"])
def test_truth_needs_a_norm_of_the_layers_own(sets, name):
    model = OneNorm().eval()
    graph = build_graph(model, SHAPE)
    with pytest.raises(ValueError, match=f"'{name}' has no BatchNorm of its own"):
        criteria.measure_truth(model, sets.val, [name], graph=graph)


def test_every_criterion_scores_every_layer_of_the_blocks(sets, model, graph):
    layers = scop.block_layers(model, SHAPE, graph=graph)
    cheap = [c for c in criteria.CRITERIA if c not in ("scop-generator", "scop-deep")]
    cheap = [c for c in cheap if c not in ("scop-swap_gan", "scop-gaussian")]
    select = train.Recipe(1, lr=0.01, batch_size=64, seed=3)
    base = stages.Base(model, sets, run="toy/x", net="resnet8")
    for criterion in cheap:
        found = criteria.score_channels(
            criterion, base, layers, select=select, select_images=128, num_images=60,
        )  # fmt: skip
        assert list(found.scores) == layers
        for name, values in found.scores.items():
            assert len(values) == len(graph.layers[name].outputs)
            assert torch.isfinite(values).all()
        assert found.seconds > 0 and found.images >= 0


@pytest.mark.parametrize(
    ("criterion", "images"),
    [("taylor", 540), ("nisp", 540), ("l1", 0), ("scop-noise", 540)],
)
def test_images_are_counted_as_often_as_they_are_seen(
    sets, model, graph, criterion, images
):
    base = stages.Base(model, sets, run=f"toy/{criterion}", net="resnet8")
    select = train.Recipe(1, lr=0.01, batch_size=60)
    found = criteria.score_channels(
        criterion, base, ["layer1.0.conv1"], select=select, select_images=2000
    )
    assert found.images == images


def test_seconds_are_those_of_the_wall(sets, model, monkeypatch):
    """As in the rows of a selection, with which they are compared."""
    l1 = baselines.l1

    def wait(model):
        time.sleep(0.2)
        return l1(model)

    monkeypatch.setattr(baselines, "l1", wait)
    base = stages.Base(model, sets, run="toy/x", net="resnet8")
    assert base.graph
    found = criteria.score_channels("l1", base, [], select=train.Recipe(1))
    assert found.seconds > 0.19


def test_an_unknown_criterion_is_refused_with_the_nearest(sets, model):
    base = stages.Base(model, sets, run="toy/x", net="resnet8")
    with pytest.raises(ValueError, match=r"criterion .*'taylr'"):
        criteria.score_channels("taylr", base, [], select=train.Recipe(1))


def test_agreement_is_the_rank_correlation_by_layer():
    truth = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0, 3.0])}
    scores = {"a": torch.tensor([2.0, 4.0, 60.0]), "b": torch.ones(3)}
    assert baselines.rank_agreement(scores, truth) == {"a": 1.0, "b": 0.0}
    scores["a"] = -scores["a"]
    assert baselines.rank_agreement(scores, truth)["a"] == -1.0
