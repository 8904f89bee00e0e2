"""Plans: made from scores by the stated rule, checked, saved and read again."""

import json
import warnings

import hypothesis
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib import baselines, cost, models, surgery
from lib import plan as plans
from lib.plan import Plan

SHAPES = {"lenet": (3, 28, 28)}


def make(name):
    torch.manual_seed(0)
    return models.build(name), SHAPES.get(name, (3, 32, 32))


def plan_of(name, scores=None, **options):
    model, shape = make(name)
    scores = baselines.random(model, 0) if scores is None else scores
    return plans.from_scores(model, scores, shape, **options), scores


def lowest(scores, count):
    """Indices of the lowest scores, the lower index first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
    return sorted(order[:count])


def gone(plan, name, size):
    return sorted(set(range(size)) - set(plan.keep.get(name, range(size))))


# -- the rule ------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.29, 0.5, 0.77, 0.999])
def test_the_lowest_scores_of_each_layer_go(rate):
    plan, scores = plan_of("lenet", rate=rate)
    for name, values in scores.items():
        count = min(int(rate * len(values)), len(values) - 1)
        assert gone(plan, name, len(values)) == lowest(values, count)
    assert "ip2" not in plan.keep


def test_equal_scores_go_from_the_lower_index_on():
    model, _ = make("lenet")
    plan, _ = plan_of("lenet", baselines.uniform(model), rate=0.5)
    assert plan.keep["conv1"] == list(range(10, 20))
    assert plan.keep["ip1"] == list(range(250, 500))


def test_one_channel_stays():
    plan, scores = plan_of("lenet", rate=0.9999)
    assert {n: len(k) for n, k in plan.keep.items()} == dict.fromkeys(scores, 1)
    for name, values in scores.items():
        assert plan.keep[name] == [int(values.argmax())]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_blocks_of_a_grouped_convolution_lose_equally(scope):
    model, shape = models.build("resnext50_32x4d"), (3, 32, 32)
    scores = {"layer1.0.conv2": torch.rand(128), "layer2.0.conv2": torch.rand(256)}
    plan = plans.from_scores(model, scores, shape, rate=0.5, scope=scope)
    kept = torch.tensor(plan.keep["layer1.0.conv2"])
    counts = torch.bincount(kept // 4, minlength=32)
    assert len(set(counts.tolist())) == 1
    if scope == "layer":
        blocks = scores["layer1.0.conv2"].view(32, 4)
        best = blocks.sort(1).indices[:, 2:] + 4 * torch.arange(32)[:, None]
        assert kept.tolist() == best.flatten().sort().values.tolist()


def test_tied_layers_share_the_sum_of_the_scored_members():
    first, second = torch.rand(16), torch.rand(16)
    scores = {"conv1": first, "layer1.2.conv2": second}
    plan, _ = plan_of("resnet20", scores, rate=0.5)
    stream = ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]
    expected = lowest(first.double() + second.double(), 8)
    for name in stream:
        assert gone(plan, name, 16) == expected
    assert plan.keep.keys() == set(stream)


def test_layers_without_a_score_stay_whole():
    plan, _ = plan_of("resnet20", {"layer2.1.conv1": torch.rand(32)}, rate=0.25)
    assert plan.keep.keys() == {"layer2.1.conv1"}
    assert len(plan.keep["layer2.1.conv1"]) == 24


def test_rates_per_layer():
    model, _ = make("lenet")
    rates = {"conv1": 0.2, "ip1": 0.9}
    plan, _ = plan_of("lenet", baselines.random(model, 1), rate=rates)
    assert {n: len(k) for n, k in plan.keep.items()} == {"conv1": 16, "ip1": 50}


@pytest.mark.parametrize("size", [7, 10, 50, 96, 250])
def test_a_rate_counts_as_it_is_written(size):
    """.58 of 50 is 29, which floats compute as 28.999..., and a third of 3 is 1."""
    for percent in range(100):
        assert plans.count_share(percent / 100, size) == percent * size // 100
    assert plans.count_share(1 / 3, 3 * size) == size
    model = nn.Sequential(nn.Conv2d(3, 50, 1), nn.Conv2d(50, 2, 1))
    plan = plans.from_scores(model, {"0": torch.rand(50)}, (3, 2, 2), rate=0.58)
    assert len(plan.keep["0"]) == 21
    plan = plans.from_scores(
        model, {"0": torch.rand(50)}, (3, 2, 2), rate=0.58, scope="global"
    )
    assert len(plan.keep["0"]) == 21


def test_tied_layers_need_one_rate():
    scores = {"conv1": torch.rand(16), "layer1.0.conv2": torch.rand(16)}
    with pytest.raises(ValueError, match=r"conv1, layer1\.0\.conv2"):
        plan_of("resnet20", scores, rate={"conv1": 0.2, "layer1.0.conv2": 0.4})


def test_residual_keep_leaves_the_stream_alone():
    plan, _ = plan_of("resnet20", rate=0.5, residual="keep")
    inner = {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)}
    assert plan.keep.keys() == inner and not plan.scatter


def test_residual_scatter_prunes_each_layer_on_its_own():
    plan, scores = plan_of("resnet20", rate=0.5, residual="scatter")
    ends = {f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in range(3)}
    assert plan.scatter == ends | {"conv1"}
    for name, values in scores.items():
        assert gone(plan, name, len(values)) == lowest(values, len(values) // 2)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.62, 0.95])
def test_global_threshold_by_brute_force(rate):
    plan, scores = plan_of("lenet", rate=rate, scope="global")
    ranked = sorted(
        (float(v), n, i) for n, s in scores.items() for i, v in enumerate(s)
    )
    tops = {(n, int(s.argmax())) for n, s in scores.items()}
    ranked = [(n, i) for _, n, i in ranked if (n, i) not in tops]
    total = sum(len(s) for s in scores.values())
    removed = set(ranked[: int(rate * total)])
    for name, values in scores.items():
        expected = sorted(i for n, i in removed if n == name)
        assert gone(plan, name, len(values)) == expected


def test_global_scope_ranks_scores_across_layers():
    scores = {"conv1": torch.rand(20), "conv2": 1 + torch.rand(50)}
    plan, _ = plan_of("lenet", scores, rate=0.2, scope="global")
    assert len(plan.keep["conv1"]) == 6 and "conv2" not in plan.keep


# -- a target in MACs ----------------------------------------------------------------


@pytest.mark.parametrize("share", [0.75, 0.4])
@pytest.mark.parametrize(
    ("name", "scope", "residual"),
    [
        ("resnet20", "layer", "tie"),
        ("resnet20", "global", "scatter"),
        ("resnet56", "layer", "keep"),
        ("densenet40", "global", "tie"),
        ("mobilenet_v2_cifar", "layer", "tie"),
        ("googlenet", "layer", "tie"),
    ],
)
def test_macs_are_met_within_one_percent(name, scope, residual, share):
    model, shape = make(name)
    scores = baselines.random(model, 0)
    plan = plans.from_scores(
        model, scores, shape, macs=share, scope=scope, residual=residual
    )
    small = surgery.shrink(model, plan, shape)
    reached = cost.count(small, shape).macs / cost.count(model, shape).macs
    assert reached == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    ("name", "residual"), [("lenet", "tie"), ("resnet20", "scatter")]
)
def test_macs_of_one_scope_take_the_same_share_everywhere(name, residual):
    """No layer is more than the smallest steps of two layers ahead of another."""
    plan, scores = plan_of(name, macs=0.5, residual=residual)
    shares = {n: 1 - len(plan.keep[n]) / len(s) for n, s in scores.items()}
    step = 1 / min(len(s) for s in scores.values())
    assert max(shares.values()) - min(shares.values()) <= 2 * step
    assert min(shares.values()) > 0.1


def test_macs_of_functional_convolutions_are_part_of_the_share():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.rand(32, 3, 3, 3))
            self.a, self.b = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1)

        def forward(self, x):
            x = nn.functional.conv2d(x, self.kernel, padding=1)
            return self.b(self.a(x).relu())

    model, shape = Net(), (3, 8, 8)
    plan = plans.from_scores(model, {"a": torch.rand(64)}, shape, macs=0.7)
    small = surgery.shrink(model, plan, shape)
    reached = cost.count(small, shape).macs / cost.count(model, shape).macs
    assert reached == pytest.approx(0.7, rel=0.01)


def test_macs_out_of_reach():
    with pytest.raises(ValueError, match=r"macs=0\.01 cannot be met.*the least"):
        plan_of("resnet20", {"conv1": torch.rand(16)}, macs=0.01)


# -- multiples -----------------------------------------------------------------------

WIDE = {  # nets with grouped, depthwise, concatenated and zero-padded channels
    "resnet20": (3, 32, 32),
    "resnet20_b": (3, 32, 32),
    "mobilenet_v2_cifar": (3, 32, 32),
    "densenet40": (3, 32, 32),
    "resnext50_32x4d": (3, 32, 32),
    "shufflenet_v2_x1_0": (3, 32, 32),
    "googlenet": (3, 32, 32),
}


def check_multiples(model, plan, multiple):
    """Every layer keeps a multiple of channels, or all that it has."""
    for name, kept in plan.keep.items():
        size = model.get_submodule(name).weight.shape[0]
        assert len(kept) % multiple == 0 or len(kept) == size, name


@pytest.mark.parametrize(
    ("name", "residual"),
    [(name, "tie") for name in WIDE]
    + [(name, "scatter") for name in WIDE if name.startswith("res")],
)
def test_multiples_in_every_layer_and_the_macs_met(name, residual):
    model, shape = models.build(name), WIDE[name]
    plan = plans.from_scores(
        model, baselines.random(model, 0), shape, macs=0.6, residual=residual,
        multiple=8,
    )  # fmt: skip
    check_multiples(model, plan, 8)
    small = surgery.shrink(model, plan, shape)
    reached = cost.count(small, shape).macs / cost.count(model, shape).macs
    assert reached == pytest.approx(0.6, rel=0.01)


@given(
    multiple=st.integers(1, 17),
    rate=st.integers(0, 99),
    seed=st.integers(0, 99),
    scope=st.sampled_from(["layer", "global"]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_rate_goes_to_the_nearest_multiple(multiple, rate, seed, scope):
    """Of the lowest scores, so many go that the nearest multiple to the rate stays."""
    model = nn.Sequential(
        nn.Conv2d(3, 18, 1), nn.Conv2d(18, 40, 1), nn.Conv2d(40, 2, 1)
    )
    g = torch.Generator().manual_seed(seed)
    scores = {"0": torch.rand(18, generator=g), "1": torch.rand(40, generator=g)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # removes nothing
        plan = plans.from_scores(
            model, scores, (3, 2, 2), rate=rate / 100, scope=scope, multiple=multiple
        )
    check_multiples(model, plan, multiple)
    for name, values in scores.items():
        size = len(values)
        removed = gone(plan, name, size)
        assert removed == lowest(values, len(removed))
        if scope == "layer" and multiple > 1:
            allowed = {size, *range(multiple, size + 1, multiple)}
            wanted = size - rate / 100 * size
            nearest = min(abs(n - wanted) for n in allowed)
            assert abs(size - len(removed) - wanted) == pytest.approx(nearest)


@pytest.mark.parametrize("rate, kept", [(0.01, 18), (0.03, 17), (0.06, 17), (0.5, 17)])
def test_the_nearest_multiple_may_be_the_only_one(rate, kept):
    model = nn.Sequential(nn.Conv2d(3, 18, 1), nn.ReLU(), nn.Conv2d(18, 2, 1))
    scores = {"0": torch.arange(18.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # removes nothing
        plan = plans.from_scores(model, scores, (3, 2, 2), rate=rate, multiple=17)
    assert len(plan.keep.get("0", range(18))) == kept


def test_layers_that_share_some_units_are_multiples_each():
    """A narrow layer and a wide one, added where the narrow one ends."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(3, 16, 1)
            self.c, self.d = nn.Conv2d(3, 40, 1), nn.Conv2d(40, 2, 1)

        def forward(self, x):
            return self.d(torch.cat((self.a(x), self.b(x)), 1) + self.c(x))

    model, shape = Net(), (3, 4, 4)
    for seed in range(4):
        scores = {"c": baselines.random(model, seed)["c"]}
        plan = plans.from_scores(model, scores, shape, rate=0.4, multiple=8)
        assert [len(plan.keep[n]) for n in "abc"] == [16, 8, 24]
        surgery.shrink(model, plan, shape)


def test_multiples_leave_grouped_convolutions_balanced_and_exact():
    model, shape = models.build("resnext50_32x4d"), (3, 32, 32)
    plan = plans.from_scores(
        model, baselines.random(model, 0), shape, rate=0.5, multiple=64
    )
    check_multiples(model, plan, 64)
    small = surgery.shrink(oracle.roughen(model), plan, shape)
    masked, x = surgery.mask(model, plan, shape), oracle.images(shape, torch.float32)
    gap = oracle.difference(oracle.evaluate(small, x), oracle.evaluate(masked, x))
    assert gap < 1e-5


def test_a_multiple_that_no_macs_meet_names_the_nearest():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 2, 1)
    )
    # by brute force: 3 a + a b + 2 b multiply-adds at each position, for a, b kept
    made = [3 * a + a * b + 2 * b for a in (16, 32) for b in (16, 32)]
    nearest = min((n / max(made) for n in made), key=lambda share: abs(share - 0.6))
    with pytest.raises(ValueError, match=f"1 ?%: the nearest is {nearest:.4f}, the"):
        scores = baselines.random(model, 0)
        plans.from_scores(model, scores, (3, 2, 2), macs=0.6, multiple=16)


# -- refusals ------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD = {
    "nan": ({"conv1": torch.full((20,), NAN)}, {"rate": 0.5}, "'conv1'.*not finite"),
    "inf": ({"conv1": torch.full((20,), INF)}, {"rate": 0.5}, "'conv1'.*not finite"),
    "length": ({"conv1": torch.rand(19)}, {"rate": 0.5}, "'conv1' has 20.*19"),
    "rank": ({"conv1": torch.rand(20, 1)}, {"rate": 0.5}, "'conv1' has 20"),
    "misspelt": ({"cnov1": torch.rand(20)}, {"rate": 0.5}, "did you mean 'conv1'"),
    "classifier": ({"ip2": torch.rand(10)}, {"rate": 0.5}, "ip2: .*outputs of the"),
    "both": ({}, {"rate": 0.5, "macs": 0.5}, "either rate"),
    "none": ({}, {}, "either rate"),
    "rate 1": ({}, {"rate": 1.0}, "rate must lie in"),
    "rate below": ({}, {"rate": -0.1}, "rate must lie in"),
    "rate nan": ({}, {"rate": NAN}, "rate must lie in"),
    "rate of a layer": ({}, {"rate": {"conv1": 2.0}}, "conv1: the rate must lie in"),
    "rate unscored": ({}, {"rate": {"conv1": 0.5}}, "'conv1' has no scores"),
    "macs 0": ({}, {"macs": 0.0}, "share of MACs"),
    "macs above": ({}, {"macs": 1.1}, "share of MACs"),
    "macs nan": ({}, {"macs": NAN}, "share of MACs"),
    "scope": ({}, {"rate": 0.5, "scope": "Layer"}, "scope must be"),
    "residual": ({}, {"rate": 0.5, "residual": "add"}, "residual must be"),
    "multiple 0": ({}, {"rate": 0.5, "multiple": 0}, "multiple must lie in"),
    "multiple .5": ({}, {"rate": 0.5, "multiple": 0.5}, "multiple must be an int"),
    "no multiple": (
        {"conv1": torch.rand(20)},
        {"rate": 0.5, "multiple": 32},
        "no layer with scores",
    ),
    "rates, global": ({}, {"rate": {}, "scope": "global"}, "takes one rate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_refused(kind):
    scores, options, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        plan_of("lenet", scores, **options)


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 0.01}, {"macs": 1.0}])
def test_removing_nothing_warns(options):
    with pytest.warns(UserWarning, match="removes nothing"):
        plan, _ = plan_of("lenet", {"conv1": torch.rand(20)}, **options)
    assert plan == Plan()


def test_integer_and_half_scores_are_scores():
    plan, _ = plan_of("lenet", {"conv1": torch.arange(20)}, rate=0.5)
    assert plan.keep["conv1"] == list(range(10, 20))
    scores = {"conv1": torch.arange(20, dtype=torch.bfloat16).requires_grad_()}
    assert plan_of("lenet", scores, rate=0.5)[0] == plan


def test_scores_are_not_changed():
    model, shape = make("resnet20")
    scores = baselines.random(model, 0)
    before = {n: s.clone() for n, s in scores.items()}
    first = plans.from_scores(model, scores, shape, rate=0.5)
    assert first == plans.from_scores(model, scores, shape, rate=0.5)
    assert all(torch.equal(s, before[n]) for n, s in scores.items())


# -- files ---------------------------------------------------------------------------


def test_round_trip(tmp_path):
    plan = Plan(
        {"a": [3, 1], "b": range(2)}, scatter={"b"}, drop=["c.1"], resolution=24
    )
    assert plan.keep == {"a": [1, 3], "b": [0, 1]}
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan
    assert json.loads(path.read_text())["keep"]["a"] == [1, 3]


def test_tensors_and_arrays_become_integers(tmp_path):
    plan = Plan({"a": torch.tensor([2, 0]), "b": torch.arange(3).numpy()})
    assert Plan.load(plan.save(tmp_path / "p.json")).keep == {
        "a": [0, 2],
        "b": [0, 1, 2],
    }


@pytest.mark.parametrize(
    "mask",
    [
        [True, False, True],
        torch.tensor([True, False]),
        torch.tensor([True, False]).numpy(),
        list(torch.tensor([True, False])),
    ],
    ids=["list", "tensor", "array", "list of tensors"],
)
def test_a_mask_is_not_a_list_of_indices(mask):
    with pytest.raises(ValueError, match=r"'a' .* got a mask of True and False"):
        Plan({"a": mask})


FILES = {
    "list": "[]",
    "no keep": "{}",
    "null": '{"keep": {"a": null}}',
    "text": '{"keep": {"a": ["x"]}}',
    "unknown entry": '{"keep": {}, "mask": []}',
    "scatter of nothing": '{"keep": {"a": [0]}, "scatter": ["b"]}',
    "broken": '{"keep": ',
    "digits in a string": '{"keep": {"a": "12"}}',
    "fractions": '{"keep": {"a": [1.5]}}',
    "drop is text": '{"keep": {}, "drop": "layer1"}',
    "scatter is text": '{"keep": {"a": [0]}, "scatter": "a"}',
    "resolution is text": '{"keep": {}, "resolution": "32"}',
    "resolution below one": '{"keep": {}, "resolution": -1}',
    "resolution of a million": '{"keep": {}, "resolution": 1000000}',
    "deep nest": '{"keep": ' + "[" * 100_000,
    "deep nest, closed": '{"keep": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "huge integer": '{"keep": {"a": [' + "9" * 10_000 + "]}}",
    "huge resolution": '{"keep": {}, "resolution": ' + "9" * 4_000 + "}",
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_plan_are_refused_by_name(kind, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(FILES[kind])
    with pytest.raises(ValueError, match=r"plan\.json"):
        Plan.load(path)


def test_an_index_beyond_int64_is_refused_by_layer():
    plan = Plan({"conv1": [10**30]})
    with pytest.raises(ValueError, match=r"'conv1' has channels 0\.\.19"):
        surgery.shrink(*make("lenet")[:1], plan, (3, 28, 28))


def test_scores_near_the_end_of_float64_are_finite():
    """Their sum is not, which is no reason to refuse them."""
    model = models.build("resnet8")
    big = {"layer1.0.conv1": torch.linspace(0.5, 1, 16, dtype=torch.float64) * 1e308}
    chosen = plans.from_scores(model, big, (3, 32, 32), rate=0.5)
    assert chosen.keep["layer1.0.conv1"] == list(range(8, 16))


class Standardised(nn.Conv2d):
    """Its weight is not used as it is."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def half_prunable():
    """One free layer, one before a softmax over channels, one that runs never."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.Softmax(1)]
    body += [nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)]
    model = nn.Sequential(*body)
    model[1].spare = nn.Linear(4, 4)
    return model


def test_skip_fixed_leaves_what_cannot_go_and_says_so():
    model, shape = half_prunable(), (3, 8, 8)
    listed = surgery.prunable(model, shape)
    assert list(listed) == ["0", "1.spare", "2", "4", "6"]
    assert listed["4"] is None and "does not run" in listed["1.spare"]
    assert "'2' (Standardised)" in listed["2"] and "'2'" in listed["0"]
    assert listed["6"] == "they are the outputs of the network"
    scores = {n: m.weight.flatten(1).norm(dim=1) for n, m in model.named_modules()
              if n in listed}  # fmt: skip
    with pytest.raises(ValueError, match="skip_fixed=True"):
        plans.from_scores(model, {"0": scores["0"]}, shape, rate=0.5)
    with pytest.warns(UserWarning, match="4 scored layers stay whole.*'2'.*prunable"):
        plan = plans.from_scores(model, scores, shape, rate=0.5, skip_fixed=True)
    rates = dict.fromkeys(scores, 0.5)  # also of layers that then stay
    with pytest.warns(UserWarning, match="4 scored layers stay whole"):
        again = plans.from_scores(model, scores, shape, rate=rates, skip_fixed=True)
    assert again == plan
    assert plan.keep.keys() == {"4"} and len(plan.keep["4"]) == 3
    wrong = {"4": scores["4"], "44": scores["4"]}
    with pytest.raises(ValueError, match="no layer '44'"):
        plans.from_scores(model, wrong, shape, rate=0.5, skip_fixed=True)


def test_skip_fixed_leaves_what_cannot_be_scattered():
    model = models.build("resnet8")
    model.layer1[0].bn2 = nn.Sequential(nn.ReLU(), model.layer1[0].bn2)
    scores, shape = baselines.l1(model), (3, 32, 32)
    options = {"rate": 0.5, "residual": "scatter"}
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2.*cannot be scattered"):
        plans.from_scores(model, scores, shape, **options)
    with pytest.warns(UserWarning, match=r"layer1\.0\.conv2"):
        plan = plans.from_scores(model, scores, shape, skip_fixed=True, **options)
    assert "layer1.0.conv2" not in plan.keep and "layer2.0.conv2" in plan.scatter
    surgery.shrink(model, plan, shape)


class Pieces(nn.Module):
    """Two layers make halves of a tensor, two others read them."""

    def __init__(self):
        super().__init__()
        self.a, self.whole = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x) + self.whole(x)
        halves = torch.relu(y).split(4, 1)
        z = [
            part(half)
            for part, half in zip((self.left, self.right), halves, strict=True)
        ]
        return self.last(torch.cat([*z, torch.relu(torch.cat(z, 1) + y)], 1))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_layer_keeps_a_channel_to_make_and_to_read(scope):
    """Also where the lowest scores are all of one piece."""
    torch.manual_seed(0)
    model, shape = Pieces().double(), (3, 4, 4)
    scores = {"a": torch.arange(8.0), "whole": torch.zeros(8)}
    plan = plans.from_scores(model, scores, shape, rate=0.99, scope=scope)
    assert plan.keep["a"] == plan.keep["whole"] == [3, 7]
    assert plan.keep["left"] == plan.keep["right"] == [3]
    oracle.assert_exact(model, plan, shape, oracle.images(shape), hooks=False)
