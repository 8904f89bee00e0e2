"""The final response layer: found, collected, ranked; layers by themselves; errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import baselines, data, models, nisp, plan, surgery
from lib.graph import build_graph
from lib.nisp.activity import collect_channels
from lib.nisp.comparisons import describe

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def images() -> data.ImageSet:
    return data.load("mnist5k", "train").take(240)


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = models.build(name, in_channels=1, image_size=28)
    for module in net.modules():  # statistics that are not all zero and one
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def pixels(images: data.ImageSet, n: int, seed: int) -> Tensor:
    return next(iter(data.batches(images.take(n, seed), n)))[0]


# -- responses ----------------------------------------------------------------------


def test_responses_are_what_the_classifier_reads(images):
    net, x = build("lenet").eval(), pixels(images, 60, 3)
    with torch.no_grad():
        maps = net.pool2(net.conv2(net.pool1(net.conv1(x))))
        expected = F.relu(net.ip1(maps.flatten(1)))
    found = nisp.collect_responses(net, images, num_images=60, seed=3)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous() and not found.requires_grad


def test_pooled_responses_of_a_resnet(images):
    net, x = build("resnet8").eval(), pixels(images, 30, 1)
    seen = []
    handle = net.layer3.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        net(x)
    handle.remove()
    found = nisp.collect_responses(net, images, num_images=30, seed=1)
    torch.testing.assert_close(found, seen[0].mean((2, 3)))


def test_collecting_leaves_the_model_as_found(images):
    net = build("resnet8").train()
    net.bn1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    nisp.collect_responses(net, images, num_images=20)
    collect_channels(net, images, num_images=20)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    hooks = [h for m in net.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


def test_hooks_go_when_the_forward_fails(images, monkeypatch):
    net = build("lenet")
    nisp.collect_responses(net, images, num_images=4)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(net.conv2, "forward", fail)
    for collect in (nisp.collect_responses, collect_channels):
        with pytest.raises((RuntimeError, ValueError)):
            collect(net, images, num_images=4)
    assert not net.ip2._forward_pre_hooks and not net.conv1._forward_hooks


def test_fewer_images_than_asked_for_are_all_of_them(images):
    found = nisp.collect_responses(build("lenet"), images, num_images=10_000)
    assert len(found) == len(images)


def test_the_sample_is_stratified_and_fixed_by_its_seed(images):
    net = build("lenet")
    one, same, other = (
        nisp.collect_responses(net, images, num_images=50, seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


class NoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Conv2d(4, 10, 26)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu()).flatten(1)


def test_a_last_convolution_that_spans_positions_is_refused(images):
    with pytest.raises(ValueError, match=r"here it is 'head', Conv2d.*end the network"):
        nisp.collect_responses(NoLinear(), images)


class ConvHead(nn.Module):
    """As SqueezeNet: classes by a 1 x 1 convolution, averaged behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu()).mean((2, 3))


def test_a_convolution_that_classifies_reads_mean_channels(images):
    net, x = ConvHead().eval(), pixels(images, 40, 2)
    with torch.no_grad():
        expected = net.conv(x).relu().mean((2, 3))
    found = nisp.collect_responses(net, images, num_images=40, seed=2)
    torch.testing.assert_close(found, expected)
    assert nisp.score_frl(net, images, num_images=40).shape == (6,)
    by_weight = nisp.score_frl(net, images, by="magnitude")
    torch.testing.assert_close(
        by_weight, net.head.weight.detach()[:, :, 0, 0].abs().sum(0).double()
    )
    assert torch.equal(
        nisp.score_frl(net, images, by="uniform"), torch.ones(6).double()
    )
    wide = surgery.shrink(net, plan.Plan({"conv": [0, 2, 5]}), SHAPE)
    kept = plan.Plan({"conv": [0, 2, 5]})
    errors = nisp.measure_errors(net, wide, kept, images, torch.ones(6), num_images=20)
    assert errors["retained"] == 3 and errors["mae"] < 1e-5


def test_a_linear_gate_is_not_the_classifier(images):
    class Gated(ConvHead):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            gate = self.gate(x.mean((2, 3))).sigmoid()
            return self.head(x * gate[..., None, None]).mean((2, 3))

    net, x = Gated().eval(), pixels(images, 20, 0)
    with torch.no_grad():
        maps = net.conv(x).relu()
        gate = net.gate(maps.mean((2, 3))).sigmoid()
    found = nisp.collect_responses(net, images, num_images=20)
    torch.testing.assert_close(found, maps.mean((2, 3)) * gate)


class FoldedBatch(nn.Module):
    """Its classifier reads one row per pixel column, not one per image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(26, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).mean(2).reshape(-1, 26)
        return self.head(rows).view(len(x), -1)


def test_rows_that_are_no_images_are_refused(images):
    with pytest.raises(ValueError, match="one row per image"):
        nisp.collect_responses(FoldedBatch(), images, num_images=4)


def test_one_image_is_too_few_to_rank_by(images):
    with pytest.raises(ValueError, match=r"num_images must lie in \[2, inf\), got 1"):
        nisp.collect_responses(build("lenet"), images, num_images=1)


# -- final scores -------------------------------------------------------------------


def test_final_scores_by_each_ranking(images):
    net = build("lenet")
    features = nisp.collect_responses(net, images, num_images=100, seed=2)
    fs = nisp.score_frl(net, images, alpha=0.3, num_images=100, seed=2)
    torch.testing.assert_close(fs, nisp.inf_fs(features, alpha=0.3))
    magnitude = nisp.score_frl(net, images, "magnitude")
    by_hand = torch.tensor(
        [float(net.ip2.weight[:, i].detach().abs().sum()) for i in range(500)]
    )
    torch.testing.assert_close(magnitude.float(), by_hand)
    assert torch.equal(nisp.score_frl(net, images, "uniform"), torch.ones(500).double())


def test_refusals_of_final_scores(images):
    with pytest.raises(ValueError, match="by must be one of"):
        nisp.score_frl(build("lenet"), images, "infs")


# -- layers by themselves -----------------------------------------------------------


def test_channel_responses_of_a_resnet_block(images):
    net, x = build("resnet8").eval(), pixels(images, 24, 0)
    seen = {}
    block = net.layer1[0]
    handles = [
        block.bn1.register_forward_hook(lambda m, i, out: seen.update(one=out.clone())),
        block.bn2.register_forward_hook(lambda m, i, out: seen.update(two=out.clone())),
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    found = collect_channels(net, images, num_images=24)
    inner = F.relu(seen["one"]).mean((2, 3))  # its ReLU alone reads it
    torch.testing.assert_close(found["layer1.0.conv1"], inner)
    outer = seen["two"].mean((2, 3))  # an addition reads it: no ReLU
    torch.testing.assert_close(found["layer1.0.conv2"], outer)
    assert "fc" not in found and "linear" not in found


def test_channel_responses_of_linear_layers_and_functional_relus(images):
    net, x = build("cifarnet").eval(), pixels(images, 16, 0)
    with torch.no_grad():
        first = net.conv1(x)
        second = F.relu(net.conv2(F.relu(net.pool1(first))))
        third = F.relu(net.conv3(net.pool2(second)))
        units = net.ip1(net.pool3(third).flatten(1))
    found = collect_channels(net, images, num_images=16)
    torch.testing.assert_close(found["conv1"], first.mean((2, 3)))  # a pool reads it
    torch.testing.assert_close(found["conv2"], second.mean((2, 3)))
    torch.testing.assert_close(found["conv3"], third.mean((2, 3)))
    torch.testing.assert_close(found["ip1"], units)


class Activations(nn.Module):
    """Every activation that is replayed, in place where torch has it so."""

    def __init__(self, kind: nn.Module):
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 3, 5), kind
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "kind",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True),
        nn.Hardtanh(-0.5, 0.5), nn.LeakyReLU(0.3, inplace=True),
        nn.GELU(), nn.GELU(approximate="tanh"),
        nn.SiLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.ELU(0.5), nn.Softplus(2.0),
        nn.Hardswish(), nn.Mish(), nn.Dropout(0.5), nn.Threshold(0.1, 20.0),
    ],
    ids=lambda kind: str(kind),
)  # fmt: skip
def test_replayed_activations_are_the_models_own(images, kind):
    torch.manual_seed(0)
    net, x = Activations(kind).eval(), pixels(images, 8, 0)
    found = collect_channels(net, images, num_images=8)["conv"]
    with torch.no_grad():
        expected = kind(net.conv(x)).mean((2, 3))
    torch.testing.assert_close(found, expected)


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x)).mean((2, 3)))


def test_a_layer_that_runs_twice_gives_the_mean_of_its_calls(images):
    net, x = Twice().eval(), pixels(images, 8, 0)
    with torch.no_grad():
        one = net.conv(x)
        expected = (one.mean((2, 3)) + net.conv(one).mean((2, 3))) / 2
    found = collect_channels(net, images, num_images=8)["conv"]
    torch.testing.assert_close(found, expected)


def test_layerwise_scores_are_inf_fs_of_each_layer(images):
    net = build("cifarnet")
    features = collect_channels(net, images, num_images=80, seed=1)
    scores = nisp.rank_layerwise(net, images, alpha=0.7, num_images=80, seed=1)
    assert scores.keys() == features.keys() == baselines.prunable_layers(net).keys()
    for name, values in features.items():
        torch.testing.assert_close(scores[name], nisp.inf_fs(values, alpha=0.7))


def test_a_dead_layer_scores_zero_and_stops_nothing(images):
    net = build("cifarnet")
    nn.init.zeros_(net.conv2.weight)
    scores = nisp.rank_layerwise(net, images, num_images=20)
    assert not scores["conv2"].any() and scores["conv1"].any()


# -- every method -------------------------------------------------------------------


@pytest.mark.parametrize("net", ["lenet", "resnet8"])
@pytest.mark.parametrize("method", nisp.METHODS)
def test_every_method_gives_scores_that_can_be_planned(images, net, method):
    model = build(net)
    if method == "bn_scale" and net == "lenet":
        with pytest.raises(ValueError, match="no convolution with a BatchNorm"):
            nisp.score_layers(method, model, images)
        return
    scores = nisp.score_layers(method, model, images, num_images=100, seed=4)
    made = plan.from_scores(model, scores, SHAPE, rate=0.5)
    small = surgery.shrink(model, made, SHAPE)
    assert small(torch.zeros(2, *SHAPE)).shape == (2, 10)
    assert set(made.keep) >= {n for n in scores if scores[n].numel() > 1}


def test_methods_differ_where_they_should(images):
    model = build("lenet")
    keep = {
        method: plan.from_scores(
            model,
            nisp.score_layers(method, model, images, num_images=100),
            SHAPE,
            rate=0.5,
        ).keep
        for method in ("nisp", "nisp-mag", "layerwise", "l1", "random")
    }
    assert keep["nisp"]["ip1"] == keep["layerwise"]["ip1"]  # the same responses
    pairs = [(a, b) for a in keep for b in keep if a < b]
    assert all(keep[a]["conv2"] != keep[b]["conv2"] for a, b in pairs)


def test_joint_scores_are_those_of_propagate(images):
    model = build("lenet")
    final = nisp.score_frl(model, images, num_images=60, seed=1)
    expected = nisp.propagate(model, final, SHAPE, joint=0.5)
    found = nisp.score_layers("nisp", model, images, joint=0.5, num_images=60, seed=1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_an_unknown_method_is_refused(images):
    with pytest.raises(ValueError, match=r"method must be one of .*'nips'"):
        nisp.score_layers("nips", build("lenet"), images)


# -- errors -------------------------------------------------------------------------


def test_errors_against_loops():
    torch.manual_seed(0)
    y = torch.randn(7, 5).double().relu()
    there, s = y + torch.randn(7, 5).double(), torch.rand(5).double()
    ware, counted, moved, size = 0.0, 0, 0.0, 0.0
    for m in range(7):
        for i in range(5):
            gap = abs(float(there[m, i] - y[m, i]))
            moved, size = moved + float(s[i]) * gap, size + float(s[i] * y[m, i].abs())
            if float(y[m, i].abs()) > 0.01 * float(y.abs().mean()):
                counted, ware = counted + 1, ware + float(s[i]) * gap / float(y[m, i])
    found = describe(y, there, s)
    assert found["ware"] == pytest.approx(ware / counted)
    assert found["share_counted"] == pytest.approx(counted / 35)
    assert found["weighted"] == pytest.approx(moved / size)
    assert found["mae"] == pytest.approx(float((there - y).abs().mean()))


def test_a_collapsed_net_has_a_ware_of_one():
    y = torch.rand(20, 6).double() + 0.1
    found = describe(y, torch.zeros_like(y), torch.ones(6).double())
    assert found["ware"] == pytest.approx(1) and found["weighted"] == pytest.approx(1)


def make_pruned(method: str, layers: list[str], images, net="lenet"):
    model = build(net)
    scores = nisp.score_layers(method, model, images, num_images=60)
    chosen = {n: scores[n] for n in layers}
    made = plan.from_scores(model, chosen, SHAPE, rate=0.5)
    return model, surgery.shrink(model, made, SHAPE), made


def test_errors_compare_the_responses_kept(images):
    model, small, made = make_pruned("nisp", ["conv2", "ip1"], images)
    s = torch.rand(500).double() + 0.1
    kept = nisp.find_retained(model, made, SHAPE)
    assert kept.nonzero().flatten().tolist() == made.keep["ip1"]
    y, there = (nisp.collect_responses(m, images, num_images=40).double()
                for m in (model, small))  # fmt: skip
    found = nisp.measure_errors(model, small, made, images, s, num_images=40)
    expected = describe(y[:, kept], there, s[kept] / s[kept].mean())
    assert found == pytest.approx(expected) and found["retained"] == 250
    scaled = nisp.measure_errors(model, small, made, images, 1000 * s, num_images=40)
    assert scaled == pytest.approx(found)


def test_a_plan_of_convolutions_keeps_every_response(images):
    model, small, made = make_pruned("l1", ["conv1"], images)
    assert nisp.find_retained(model, made, SHAPE).all()
    found = nisp.measure_errors(model, small, made, images, torch.ones(500))
    assert found["retained"] == 500 and found["mae"] > 0


def test_what_is_not_pruned_has_no_error(images):
    model = build("lenet")
    found = nisp.measure_errors(
        model, copy.deepcopy(model), plan.Plan(keep={}), images, torch.ones(500)
    )
    assert found["ware"] == found["weighted"] == found["mae"] == 0


def test_retained_responses_of_a_tied_stream(images):
    model = build("resnet8")
    scores = nisp.score_layers("l1", model, images)
    made = plan.from_scores(model, scores, SHAPE, rate=0.25)
    kept = nisp.find_retained(model, made, SHAPE)
    assert kept.nonzero().flatten().tolist() == made.keep["layer3.0.conv2"]


class SeesValues(nn.Module):
    """A forward that torch.fx does not follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu() if len(x) > 0 else x
        return self.fc(x.mean((2, 3)))


def test_scales_are_found_in_the_graph_that_is_handed_down(images):
    model = SeesValues()
    graph = build_graph(model, SHAPE)
    for given in (graph, None):
        found = nisp.score_layers("bn_scale", model, images, graph=given)
        assert found["conv"].tolist() == [1, 1, 1, 1]


def test_refusals_of_errors(images):
    model, small, made = make_pruned("l1", ["ip1"], images)
    with pytest.raises(ValueError, match="has 500 responses, got scores of shape"):
        nisp.measure_errors(model, small, made, images, torch.ones(250))
    with pytest.raises(
        ValueError, match="500 final responses where the plan keeps 250"
    ):
        nisp.measure_errors(model, model, made, images, torch.ones(500))
    with pytest.raises(ValueError, match="all responses kept have importance zero"):
        nisp.measure_errors(model, small, made, images, torch.zeros(500))
