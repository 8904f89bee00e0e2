"""Scores of the baselines: values, which layers get one, and which do not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lib import baselines, data, models, scop
from lib.data import batches
from lib.graph import build_graph


@pytest.fixture(autouse=True)
def same_weights():
    """A network drawn by chance may have a kink where a slope is measured."""
    torch.manual_seed(0)


def test_l1_is_the_sum_of_absolute_weights():
    model = models.build("resnet8")
    scores = baselines.l1(model)
    weight = model.layer1[0].conv1.weight
    expected = torch.stack([w.abs().sum() for w in weight])
    torch.testing.assert_close(scores["layer1.0.conv1"], expected)
    assert not scores["conv1"].requires_grad


@pytest.mark.parametrize("score", [baselines.l1, baselines.uniform])
@pytest.mark.parametrize(
    ("name", "options", "classifiers"),
    [
        ("lenet", {}, {"ip2"}),
        ("resnet20_b", {}, {"linear"}),
        ("squeezenet1_1", {}, {"classifier.1"}),
        ("alexnet", {}, {"classifier.6"}),
        ("googlenet", {"aux_logits": True}, {"fc", "aux1.fc2", "aux2.fc2"}),
        ("inception_v3", {"aux_logits": True}, {"fc", "AuxLogits.fc"}),
    ],
)
def test_every_layer_but_the_classifiers(score, name, options, classifiers):
    if options:
        options = {"init_weights": False} | options
    model = models.build(name, **options)
    layers = {
        n: m.weight.shape[:1]
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and n not in classifiers
    }
    scores = score(model)
    assert {n: s.shape for n, s in scores.items()} == layers
    assert all(s.is_floating_point() for s in scores.values())


def test_bn_scale_reads_the_norm_behind_each_convolution():
    model = models.build("resnet20")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
    scores = baselines.bn_scale(model)
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert scores.keys() == convs
    torch.testing.assert_close(scores["conv1"], model.bn1.weight.abs())
    last = model.layer3[2]
    torch.testing.assert_close(scores["layer3.2.conv2"], last.bn2.weight.abs())


def test_bn_scale_of_convolutions_defined_before_their_norms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    model = Net()
    with torch.no_grad():
        model.bn1.weight.fill_(1)
        model.bn2.weight.fill_(2)
    scores = baselines.bn_scale(model)
    assert {n: s.mean().item() for n, s in scores.items()} == {"conv1": 1, "conv2": 2}


def test_bn_scale_of_a_forward_that_only_a_pass_can_follow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.mean().shape == () and len(x) > 1 else x

    model = Net()
    with pytest.raises(ValueError, match=r"torch\.fx .* give `graph`"):
        baselines.bn_scale(model)
    scores = baselines.bn_scale(model, graph=build_graph(model, (3, 4, 4)))
    assert {n: s.tolist() for n, s in scores.items()} == {"conv": [1, 1, 1, 1]}


@pytest.mark.parametrize("name", ["resnet20_b", "mobilenet_v2_cifar"])
def test_bn_scale_by_fx_and_by_the_graph_agree(name):
    model = models.build(name)
    graph = build_graph(model, (3, 32, 32))
    assert (
        baselines.bn_scale(model).keys()
        == baselines.bn_scale(model, graph=graph).keys()
    )


class TwoNorms(nn.Module):
    """One convolution that two BatchNorms read, and with `other` a plain pair."""

    def __init__(self, other=False):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn3, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 10)
        self.with_other = other

    def forward(self, x):
        x = self.bn2(self.conv(self.bn1(self.conv(x)).relu()))
        x = self.bn3(self.other(x)) if self.with_other else x
        return self.fc(x.mean((2, 3)))


def test_a_convolution_that_two_norms_read_has_no_scale():
    with pytest.raises(ValueError, match="no convolution with a BatchNorm"):
        baselines.bn_scale(TwoNorms())
    model = TwoNorms(other=True)
    assert baselines.bn_scale(model).keys() == {"other"}
    with pytest.raises(ValueError, match="'conv' has no BatchNorm with a scale"):
        scop.importance(model, {"conv": torch.ones(3)})


def test_taylor_of_a_convolution_that_two_norms_read_is_that_of_its_filters():
    digits = data.load("mnist5k", "train").take(20).scale(8)
    images = replace(digits, images=digits.images.repeat(1, 1, 1, 3),
                     mean=digits.mean * 3, std=digits.std * 3)  # fmt: skip
    model = TwoNorms(other=True).eval()
    model.bn2.weight.data.uniform_(0.5, 2)
    options = {"num_images": 20, "batch_size": 10}
    graph = build_graph(model, (3, 8, 8))
    expected = baselines.taylor(model, images, graph=graph, **options)
    found = baselines.taylor(model, images, **options)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_bn_scale_without_a_norm():
    with pytest.raises(ValueError, match="BatchNorm"):
        baselines.bn_scale(models.build("lenet"))


def test_random_comes_from_its_seed_alone():
    model = models.build("resnet8")
    before = torch.get_rng_state()
    first, again = baselines.random(model, 3), baselines.random(model, 3)
    torch.manual_seed(99)
    third = baselines.random(model, 3)
    other = baselines.random(model, 4)
    torch.set_rng_state(before)
    for name, values in first.items():
        assert torch.equal(values, again[name]) and torch.equal(values, third[name])
        assert not torch.equal(values, other[name])
        assert 0 <= values.min() and values.max() < 1


def test_random_does_not_touch_the_global_generator():
    model = models.build("resnet8")
    before = torch.get_rng_state()
    baselines.random(model, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="Sequential has no convolution"):
        baselines.l1(nn.Sequential(nn.ReLU()))


def test_fpgm_is_the_distance_to_all_others():
    model = models.build("resnet8")
    weight = model.layer2[0].conv1.weight.detach()
    expected = [sum(float((a - b).norm()) for b in weight) for a in weight]
    found = baselines.fpgm(model)["layer2.0.conv1"]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def gate_slopes(model, norm, images):
    """dL/dz at z = 1 of a gate behind `norm`, by differences, in float64.

    The step is short: with 1e-5 a ReLU's kink lies within it in every fourth network.
    """
    x, y = next(batches(images, len(images), dtype=torch.float64))
    slopes = []
    for channel in range(norm.num_features):
        losses = []
        for z in (1 + 1e-7, 1 - 1e-7):
            gate = torch.ones(norm.num_features, dtype=torch.float64)
            gate[channel] = z
            hook = norm.register_forward_hook(
                lambda m, i, out, gate=gate: out * gate.view(1, -1, 1, 1)
            )
            losses.append(nn.functional.cross_entropy(model(x), y))
            hook.remove()
        slopes.append(float(losses[0] - losses[1]) / 2e-7)
    return torch.tensor(slopes)


def test_taylor_is_the_squared_slope_of_a_gate_behind_the_norm():
    images = data.load("mnist5k", "train").take(40).scale(14)
    model = models.build("resnet8", in_channels=1).double().eval()
    with torch.no_grad():  # shift and statistics count too
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()
                module.running_mean.normal_(std=0.1)
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = baselines.taylor(model, images, num_images=40, batch_size=40)
    expected = gate_slopes(model, model.layer1[0].bn1, images).square()
    torch.testing.assert_close(
        found["layer1.0.conv1"], expected.float(), rtol=1e-3, atol=1e-9
    )
    assert found.keys() == baselines.l1(model).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_taylor_without_a_norm_reads_the_layer_itself():
    images = data.load("mnist5k", "train").take(20).scale(28)
    model = models.build("lenet", in_channels=1).eval()
    found = baselines.taylor(model, images, num_images=20, batch_size=10)
    expected = torch.zeros(len(model.conv1.weight))
    for x, y in batches(images, 10):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        layer = model.conv1
        slope = (layer.weight * layer.weight.grad).flatten(1).sum(1)
        expected += (slope + layer.bias * layer.bias.grad).square()
    torch.testing.assert_close(found["conv1"], expected.detach(), rtol=1e-4, atol=1e-9)
