"""Milliseconds: turns and rows, files for other programs, tables, shares of time."""

import copy
import importlib.util
import itertools
import time

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from lib import baselines, cost, latency, models, surgery
from lib import plan as plans
from lib.graph import build_graph
from lib.latency import runtimes, table
from lib.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 16, 16)
DEPLOY = ("onnx", "onnxscript", "onnxruntime", "openvino")
missing = [name for name in DEPLOY if importlib.util.find_spec(name) is None]
deployed = pytest.mark.skipif(
    bool(missing), reason=f"needs the extra 'deploy': {', '.join(missing)} missing"
)


def make(name="resnet8", **options):
    torch.manual_seed(0)
    return oracle.roughen(models.build(name, **options)).eval()


def prune(model, shape=SHAPE, **options):
    options = {"rate": 0.5} | options
    plan = plans.from_scores(model, baselines.random(model, 0), shape, **options)
    return surgery.shrink(model, plan, shape)


def chain(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)).eval()


class Small(nn.Module):
    """A residual block, a depthwise convolution added to it, and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.d, self.nd = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.na(self.a(x)).relu()
        x = (x + self.nc(self.c(self.nb(self.b(x)).relu()))).relu()
        return self.fc((x + self.nd(self.d(self.deep(x)))).mean((2, 3)))


# -- turns ---------------------------------------------------------------------------


def test_turns_alternate_and_time_what_they_call():
    said = []

    def work(name, seconds):
        def call():
            said.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return call

    calls = {"a": work("a", 2e-3), "b": work("b", 4e-3)}
    found = latency.interleave(calls, turns=4, least=1e-3)
    assert said[-8:] == list("abbaabba")
    assert 2 <= found["a"].quartiles()[1] < found["b"].quartiles()[1] < 40
    assert len(found["a"].cpu) == len(found["a"].wall) == 4


def test_a_comparison_names_what_it_compares_and_leaves_the_nets_alone():
    model = make().train()
    model.bn1.eval()
    small = prune(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rows = latency.measure(model, small, SHAPE, batches=[1, 2], turns=2)
    assert rows["net"].tolist() == ["original", "pruned"] * 2
    assert rows["batch"].tolist() == [1, 1, 2, 2]
    first = rows[rows["net"] == "original"]
    assert (first[["speedup", "macs_share", "efficiency"]] == 1).all(axis=None)
    share = cost.count(small, SHAPE).macs / cost.count(model, SHAPE).macs
    pruned = rows[rows["net"] == "pruned"]
    assert np.allclose(pruned["macs_share"], share)
    assert np.allclose(pruned["efficiency"], pruned["speedup"] * share)
    assert (rows["ms_low"] <= rows["ms"]).all() and (
        rows["ms"] <= rows["ms_high"]
    ).all()
    assert rows["cpu"].nunique() == 1 and len(rows["cpu"][0])
    assert model.training and not model.bn1.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_net_of_twice_the_work_takes_longer():
    wide, narrow = chain(3, 64, 64, 64), chain(3, 16, 16, 16)
    rows = latency.measure(wide, {"narrow": narrow}, (3, 32, 32), batches=[8], turns=5)
    assert rows["speedup"][1] > 1.5 and rows["ms"][0] > rows["ms"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [0]}, "batches must"),
        ({"batches": [1.5]}, "batches must"),
        ({"turns": 0}, "turns >= 1"),
        ({"runtimes": ["onxruntime"]}, "runtime must be one of"),
    ],
)
def test_bad_comparisons_are_refused(options, message):
    model = chain(3, 4, 2)
    with pytest.raises(ValueError, match=message):
        latency.measure(model, model, SHAPE, **{"batches": [1], "turns": 1} | options)


def test_a_comparison_needs_names_of_its_own():
    model = chain(3, 4, 2)
    with pytest.raises(ValueError, match="none 'original'"):
        latency.measure(model, {"original": model}, SHAPE)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed_says_what_to_type(runtime, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == runtime else find(n)
    )
    monkeypatch.setitem(latency.runtimes.NEEDS, runtime, (runtime,))
    assert runtime in latency.find_missing(runtime)
    model = chain(3, 4, 2)
    for ask in (
        lambda: latency.prepare(model, torch.zeros(1, *SHAPE), runtime),
        lambda: latency.measure(model, model, SHAPE, runtimes=[runtime]),
        lambda: latency.Table(model, SHAPE, runtime=runtime),
    ):
        with pytest.raises(ValueError, match=rf"'{runtime}'.*install -e .\[deploy\]"):
            ask()


# -- files for other programs --------------------------------------------------------


def prune_small(residual):
    model = oracle.roughen(Small())
    scores = {name: torch.rand(8) for name in "bcd"}
    plan = plans.from_scores(model, scores, SHAPE, rate=0.4, residual=residual)
    assert plan.keep and bool(plan.scatter) == (residual == "scatter")
    return surgery.shrink(model, plan, SHAPE)


def export_again(small, x):
    sizes = ({0: torch.export.Dim("n")},)
    return torch.export.export(small, (x.repeat(2, 1, 1, 1),), dynamic_shapes=sizes)


WAYS = {
    "deepcopy": lambda small, x: copy.deepcopy(small),
    "jit.trace": torch.jit.trace,
    "export": lambda small, x: export_again(small, x).module(),
    "compile": lambda small, x: torch.compile(small, backend="aot_eager"),
    "channels_last": lambda small, x: small.to(memory_format=torch.channels_last),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("residual", ["tie", "scatter"])
def test_what_torch_makes_of_a_pruned_network_computes_the_same(residual, way):
    small = prune_small(residual).eval()
    x = oracle.images(SHAPE, torch.float32)
    expected = oracle.evaluate(small, x)
    with torch.no_grad():
        got = WAYS[way](small, x)(x)
    assert oracle.difference(got, expected) < 1e-5


@deployed
@pytest.mark.parametrize("residual", ["tie", "scatter", "keep"])
def test_exported_networks_compute_the_same_at_every_batch(residual, tmp_path):
    """Ten real nets: `tests/benchmarks/bench_onnx.py`."""
    small = prune_small(residual).train()
    path = latency.export_onnx(small, tmp_path / "net.onnx", SHAPE)
    assert small.training and path.is_file()
    small.eval()
    for runtime in ("onnxruntime", "openvino"):
        for batch in (1, 5):
            x = oracle.images(SHAPE, torch.float32, count=batch)
            call = latency.runtimes.load_onnx(path.read_bytes(), x, runtime)
            got = torch.from_numpy(np.array(call()))
            assert oracle.difference(got, oracle.evaluate(small, x)) < 1e-5


@deployed
def test_a_network_that_cannot_be_traced_is_named_in_one_line(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"net\.onnx: Branching .*cannot be") as caught:
        latency.export_onnx(Branching(), path, SHAPE)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["eager", "channels_last"])
def test_torchs_own_runtimes_compute_the_same(runtime):
    small = prune(make(), residual="scatter")
    x = oracle.images(SHAPE, torch.float32)
    got = latency.prepare(small, x, runtime)()
    assert oracle.difference(got, oracle.evaluate(small, x)) < 1e-5


@deployed
def test_layers_written_alone_compute_the_same():
    layers = [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False),
        nn.Linear(4, 5),
    ]
    for layer in layers:
        shape = (2, 4) if isinstance(layer, nn.Linear) else (2, 4, 9, 9)
        x = torch.randn(shape)
        layer.requires_grad_(False)
        for runtime in ("onnxruntime", "openvino"):
            call = latency.runtimes.load_onnx(table.write_layer(layer), x, runtime)
            got = torch.from_numpy(np.array(call()))
            assert oracle.difference(got, layer(x)) < 1e-5


# -- tables --------------------------------------------------------------------------


def test_a_table_asks_each_layer_once_and_repeats_itself():
    model = make()
    graph = build_graph(model, SHAPE)
    times = latency.Table(model, SHAPE, batch=2, graph=graph)
    whole = plans.resolve(graph, Plan())
    assert times(graph, whole) >= times.full * 0.999
    half = plans.from_scores(model, baselines.random(model, 0), SHAPE, rate=0.5)
    kept = plans.resolve(graph, half)
    first, known = times(graph, kept), dict(times.known)
    assert times(graph, kept) == first and times.known == known
    # a stage of resnet8 has two layers of one geometry, timed once
    assert len(known) < 2 * len(graph.layers)


class Steps:
    """A clock that is a formula: multiply-adds with channels rounded up to tens."""

    def __call__(self, graph, kept):
        total = 0
        for name, rows in kept.rows.items():
            inputs = int(kept.units[graph.columns[name]].sum())
            up = [10 * -(-n // 10) for n in (inputs, int(rows.sum()))]
            total += up[0] * up[1] * sum(graph.layers[name].positions)
        return float(total)


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_share_of_the_tables_time_is_met(share, multiple):
    model = make("resnet20")
    graph, clock = build_graph(model, SHAPE), Steps()
    plan = plans.from_scores(
        model, baselines.random(model, 0), SHAPE, latency=share, table=clock,
        multiple=multiple, residual="keep",
    )  # fmt: skip
    full = clock(graph, plans.resolve(graph, Plan()))
    assert clock(graph, plans.resolve(graph, plan)) / full == pytest.approx(share, 0.05)


def test_a_share_of_the_time_that_is_out_of_reach():
    model = chain(3, 32, 32, 2)
    scores = {"0": torch.rand(32)}
    with pytest.raises(ValueError, match=r"latency=0\.01 cannot .* least these scores"):
        plans.from_scores(model, scores, SHAPE, latency=0.01, table=Steps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.5}, "latency needs a table"),
        ({"macs": 0.5, "table": Steps()}, "a table latency"),
        ({"latency": 0.5, "macs": 0.5, "table": Steps()}, "give either rate"),
        ({"latency": 0.0, "table": Steps()}, "share of time to keep"),
        ({"latency": float("nan"), "table": Steps()}, "share of time to keep"),
    ],
)
def test_bad_requests_for_time_are_refused(options, message):
    model = chain(3, 8, 2)
    with pytest.raises(ValueError, match=message):
        plans.from_scores(model, {"0": torch.rand(8)}, SHAPE, **options)


@pytest.fixture
def counted_clock(monkeypatch):
    """Milliseconds are MACs to a power that the table does not know, plus a rest."""

    def interleave(calls, **options):
        times = {n: np.full(3, 5.0 + macs**0.8) for n, macs in calls.items()}
        return {n: latency.Timing(t, t) for n, t in times.items()}

    monkeypatch.setattr(table, "interleave", interleave)
    monkeypatch.setattr(
        table, "prepare", lambda net, x, runtime: cost.count(net, x.shape[1:]).macs
    )


def test_the_clock_corrects_the_table(counted_clock):
    """The table here is far off; what is met is what the clock says."""
    model = make("resnet20")
    times = latency.Table(model, SHAPE, batch=1)
    plan = latency.meet(
        model, baselines.random(model, 0), SHAPE, 0.5, table=times, residual="keep"
    )
    small = surgery.shrink(model, plan, SHAPE)
    clock = [5.0 + cost.count(net, SHAPE).macs ** 0.8 for net in (model, small)]
    assert clock[1] / clock[0] == pytest.approx(0.5, rel=0.05)


def test_a_share_that_one_timing_alone_shows_is_not_met(monkeypatch, counted_clock):
    """Each network seems to take half at first, and .6 when it is prepared again."""
    timed, counted = [], table.interleave

    def interleave(calls, **options):
        if "pruned" not in calls:
            return counted(calls)
        times = {"original": 1.0, "pruned": 0.6 if calls["pruned"] in timed else 0.5}
        timed.append(calls["pruned"])
        return {n: latency.Timing(*np.full((2, 3), t)) for n, t in times.items()}

    monkeypatch.setattr(table, "interleave", interleave)
    model = make("resnet20")
    times = latency.Table(model, SHAPE, batch=1)
    scores = baselines.random(model, 0)
    with pytest.raises(ValueError, match=r"latency=0\.5 is not met"):
        latency.meet(model, scores, SHAPE, 0.5, table=times, residual="keep")


def test_time_that_no_plan_saves_is_said(counted_clock):
    model = chain(3, 4, 400, 2)
    times = latency.Table(model, SHAPE, batch=1)
    scores = {"0": torch.rand(4)}
    with pytest.raises(ValueError, match=r"latency=0\.1"):
        latency.meet(model, scores, SHAPE, 0.1, table=times)


def test_exports_say_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed.*\[deploy\]"):
        latency.export_onnx(chain(3, 2), tmp_path / "net.onnx", SHAPE)
    assert runtimes.require() is None
