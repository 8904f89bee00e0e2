"""Counting: published numbers to the unit, hand counts, and a model left as found."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import baselines, cost, models, surgery
from lib import plan as plans
from lib.graph import build_graph

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "shape", "classes", "macs", "params"),
    [
        ("resnet56", (3, 32, 32), 10, 125_485_696, 853_018),
        ("resnet50", (3, 224, 224), 1000, 4_089_184_256, 25_557_032),
    ],
)
def test_published_counts(name, shape, classes, macs, params):
    model = models.build(name, num_classes=classes)
    assert cost.count(model, shape) == cost.Cost(macs=macs, params=params)


class Tiny(nn.Module):
    """Module and functional layers; a buffer, a plain constant, a training branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, groups=2)
        self.kernel = nn.Parameter(torch.rand(4, 6, 1, 1))
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5, bias=False)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))

    def forward(self, x):
        x = F.conv2d(self.conv(x), self.kernel)
        x = self.bn(x)[:, self.order].mean((2, 3))
        return self.fc(self.fc.weight.T @ self.fc(x).T if self.training else x)


def test_hand_count_with_a_functional_convolution():
    # 4x4 positions: 9 weights each for 6 filters of one input; 24 weights; 20 weights
    expected = 16 * 54 + 16 * 24 + 20
    assert cost.count(Tiny(), (2, 9, 9)) == cost.Cost(expected, 60 + 24 + 8 + 20)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training):
    model = Tiny().train(training)
    model.bn.train(not training)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    cost.count(model, (2, 9, 9))
    assert model.training == model.conv.training == training
    assert model.bn.training != training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_mode_returns_after_an_exception():
    model = models.build("lenet").train()
    with pytest.raises((RuntimeError, ValueError)):
        cost.count(model, (3, 64, 64))
    assert all(m.training for m in model.modules())


class Scaled(nn.Module):
    """A constant that is no buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), torch.rand(1, 4, 1, 1)

    def forward(self, x):
        return self.conv(x) * self.scale


def test_a_plain_constant_does_not_stop_the_count():
    assert cost.count(Scaled(), (3, 5, 5)).macs == 12 * 25


def test_frozen_parameters_count():
    model = models.build("resnet8").requires_grad_(False)
    assert cost.count(model, (3, 32, 32)).params == 75_290


@pytest.mark.parametrize("name", ["resnet20", "densenet40", "mobilenet_v2_cifar"])
@pytest.mark.parametrize("residual", ["tie", "scatter"])
def test_three_counters_agree_on_pruned_nets(name, residual):
    model, shape = models.build(name), (3, 32, 32)
    scores = baselines.random(model, 0)
    plan = plans.from_scores(model, scores, shape, rate=0.45, residual=residual)
    small = surgery.shrink(model, plan, shape)
    found = cost.count(small, shape)
    assert (found.macs, found.params) == oracle.recount(small, shape)
    kept = plans.resolve(graph := build_graph(model, shape), plan)
    assert graph.count_macs(kept.rows, kept.units) == found.macs


@pytest.mark.parametrize("name", ["googlenet", "shufflenet_v2_x1_0", "alexnet"])
def test_the_graph_counts_whole_nets(name):
    model, shape = models.build(name), (3, 96, 96)
    kept = plans.resolve(graph := build_graph(model, shape), plans.Plan())
    expected = cost.count(model, shape).macs
    assert graph.count_macs(kept.rows, kept.units) == expected


def test_reduction_in_percent():
    down = cost.Cost(25, 50).down_from(cost.Cost(100, 200))
    assert down == {"macs_down": 75.0, "params_down": 75.0}
