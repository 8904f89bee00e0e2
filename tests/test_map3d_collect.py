"""Collecting MAP's points: probes, chains, taking up what was killed, tables."""

import copy
import dataclasses
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import data, map3d, models, paths, stages, surgery, train
from lib.graph import structure
from lib.plan import Plan
from lib.stages import Sets
from lib.train import loop
from lib.train.checkpoint import digest_tensors

SHAPE = (1, 14, 14)
COLUMNS = [
    "chain", "round", "d", "w", "r", "top1", "blocks", "side", "macs", "params",
    "share", "seed", "epochs", "seconds",
]  # fmt: skip
OPTIONS = {"run": "toy/30", "seed": 1, "epochs": 1, "lr": 0.05, "batch_size": 20}
WHOLE = [(1.0, 1.0, 1.0)]
STAIRS = [(5 / 6, 1, 1), (5 / 6, 0.75, 1), (5 / 6, 0.75, 0.85), (4 / 6, 0.5, 0.85)]
DESIGN = [WHOLE, STAIRS, [(1, 0.8, 1), (1, 0.79, 1)]]  # the last two are one network
SHORT = [WHOLE, [(5 / 6, 1, 1), (5 / 6, 0.5, 0.85)]]
MODULE = sys.modules["lib.map3d.collection"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Sealed:
    """A set of images that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"the test set was asked for its {name}")

    def __len__(self):
        raise AssertionError("the test set was counted")


def make_sets() -> Sets:
    """60 and 40 digits of 14 pixels, six and four of each."""
    found = stages.load_sets("mnist5k")
    few = [found.train.take(60), found.val.take(40)]
    small = [dataclasses.replace(s, images=s.images[:, ::2, ::2]) for s in few]
    return Sets(*small, Sealed())


def make_baseline() -> nn.Module:
    """A ResNet-14 that knows a little, with scales that all differ."""
    torch.manual_seed(0)
    model, images = models.build("resnet14", in_channels=1), make_sets().train
    train.fit(model, images, epochs=6, lr=0.02, batch_size=20, augment=False, seed=0)
    with torch.no_grad():
        for norm in norms_of(model):
            norm.weight.mul_(torch.empty_like(norm.weight).uniform_(0.8, 1.2))
    return model


def norms_of(model) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def make_space(model, **options) -> map3d.Space:
    return map3d.Space(model, SHAPE, **({"multiple": 2} | options))


def collect(model, sets, design, *, space=None, **changes) -> pd.DataFrame:
    options = OPTIONS | changes
    space, run = space or make_space(model), options.pop("run")
    recipe = train.Recipe(**options)
    return map3d.collect(model, space, design, sets, run=run, recipe=recipe)


def state_of(model) -> dict:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(t, b[name]) for name, t in a.items()
    )


def same_points(a: pd.DataFrame, b: pd.DataFrame) -> None:
    a, b = (table.drop(columns="seconds") for table in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def count_hooks(model) -> int:
    """Hooks on modules and on parameters."""
    on_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def points_folder(run: str = "toy/30") -> Path:
    return stages.profile_folder(run) / "points"


def refuse(*arguments, **options):
    raise AssertionError("this was not to be done")


@pytest.fixture(autouse=True)
def runs_apart(tmp_path, monkeypatch):
    """Runs in a temporary folder."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def epochs(monkeypatch) -> list:
    """Grows by one for every epoch trained."""
    done, real = [], loop._run_epoch

    def run(*arguments):
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(loop, "_run_epoch", run)
    return done


@pytest.fixture(scope="module", autouse=True)
def one_thread_from_the_start():
    """Fixtures of the module are made before `one_thread` acts, and must agree."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sets() -> Sets:
    return make_sets()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_baseline()


@pytest.fixture(scope="module")
def done(model, sets, tmp_path_factory):
    """DESIGN measured: the table, the folder of the points, the state before."""
    root = tmp_path_factory.mktemp("done")
    model.train()
    model.layer1.eval()
    before, modes = state_of(model), [m.training for m in model.modules()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RUNS", str(root))
        table = collect(model, sets, DESIGN)
    assert same_state(before, model.state_dict()) and count_hooks(model) == 0
    assert modes == [m.training for m in model.modules()], "the model was changed"
    return table, root / "toy" / "points"


# -- probes ----------------------------------------------------------------------------


def probe_by_hand(model, images, folds: int, seed: int, side: int | None) -> list:
    """The same accuracies from a loop over the children and one fold at a time."""
    model = copy.deepcopy(model).eval()
    x = (images.images.float() / 255 - images.mean[0]) / images.std[0]
    x = x.permute(0, 3, 1, 2)
    if side:
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(x)))
        features = [x.mean((2, 3)).numpy()]
        for stage in (model.layer1, model.layer2, model.layer3):
            for block in stage:
                x = block(x)
                features.append(x.mean((2, 3)).numpy())
    return [judge(f, images.labels.numpy(), folds, seed) for f in features]


def judge(x, labels, folds: int, seed: int) -> float:
    right = np.zeros(len(labels), dtype=bool)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for seen, held in split.split(x, labels):
        assert not set(seen) & set(held)
        scaler = StandardScaler().fit(x[seen])
        probe = LogisticRegression(max_iter=1000)
        probe.fit(scaler.transform(x[seen]), labels[seen])
        right[held] = probe.predict(scaler.transform(x[held])) == labels[held]
    return 100 * right.mean()


@pytest.mark.parametrize(("seed", "side"), [(0, None), (3, 8)])
def test_probes_are_those_of_a_plain_loop(model, sets, seed, side):
    found = map3d.probe_blocks(model, sets.val, seed=seed, resolution=side)
    wanted = probe_by_hand(model, sets.val, 2, seed, side)
    assert found["accuracy"].tolist() == pytest.approx(wanted, abs=1e-9)
    assert len(set(wanted)) > 3 and min(wanted) < 90, "else this would test little"
    names = [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1)]
    assert found["block"].tolist() == ["stem", *names]
    assert found["stage"].tolist() == ["", *(n[:6] for n in names)]
    assert found["removable"].tolist() == [False] + [False, True] * 3
    gains = [0.0, *(b - a for a, b in itertools.pairwise(wanted))]
    assert found["gain"].tolist() == pytest.approx(gains, abs=1e-9)
    assert list(found) == ["block", "stage", "removable", "accuracy", "gain"]


def test_probes_of_a_network_that_lost_blocks_and_channels(model, sets):
    space = make_space(model)
    target, scores = map3d.Shape(5, 9, 14), map3d.score_channels(model, SHAPE)
    plan = space.plan(model, target, order=["layer2.1"], scores=scores)
    small = surgery.shrink(model, plan, SHAPE)
    found = map3d.probe_blocks(small, sets.val)
    wanted = probe_by_hand(small, sets.val, 2, 0, None)
    assert "layer2.1" not in set(found["block"]) and len(found) == 6
    del wanted[4]  # the identity behind layer2.0
    assert found["accuracy"].tolist() == pytest.approx(wanted, abs=1e-9)


def test_a_probe_is_not_judged_on_images_it_saw():
    """Noise in 64 channels tells 40 images apart, but no digit."""
    torch.manual_seed(0)
    images = make_sets().val
    noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8)
    images = dataclasses.replace(images, images=noise)
    model = models.build("resnet14", in_channels=1)
    found = map3d.probe_blocks(model, images)
    assert found["accuracy"].max() < 40


def test_probes_refuse_what_they_cannot_split(model, sets):
    few = sets.val.subset(torch.nonzero(sets.val.labels != 3)[:, 0])
    with pytest.raises(ValueError, match=r"mnist5k: a class has 0 image"):
        map3d.probe_blocks(model, few)
    with pytest.raises(ValueError, match="no block that can be removed"):
        map3d.probe_blocks(models.build("resnet8", in_channels=1), sets.val)


def test_the_least_gain_goes_first():
    gains = {"a": 3.0, "b": -1.0, "c": 0.5, "d": 0.5, "e": -9.0, "f": 0.5}
    table = pd.DataFrame({
        "block": list(gains), "gain": list(gains.values()),
        "removable": [True, True, True, True, False, True],
    })  # fmt: skip
    assert map3d.order_removal(table) == ["b", "c", "d", "f", "a"]


def test_equal_gains_in_images_are_ties():
    """100 * 37 / 60 - 100 * 36 / 60 is not 100 * 31 / 60 - 100 * 30 / 60."""
    hits = np.array([30, 31, 36, 37, 50, 51])
    accuracy = 100 * hits / 60
    gain = np.diff(accuracy, prepend=accuracy[0])
    table = pd.DataFrame({"block": list("sabcde"), "gain": gain, "removable": True})
    one = table.iloc[[1, 3, 5]]
    assert one["gain"].nunique() > 1, "the last bits differ"
    for rows in (one, one.iloc[::-1]):
        assert map3d.order_removal(rows) == rows["block"].tolist()


# -- the table of a collection ---------------------------------------------------------


def find_place(folder: Path, row) -> Path:
    shape = f"{row.blocks}blocks-width{round(16 * row.w)}-{row.side}px"
    (place,) = folder.glob(f"{shape}-seed{row.seed}-*")
    return place


def test_rows_and_columns(done):
    table, folder = done
    assert list(table) == COLUMNS and table.index.tolist() == list(range(6))
    assert table["chain"].tolist() == ["whole", *["dwr"] * 4, "w"]
    assert table["round"].tolist() == [1, 1, 2, 3, 4, 1]
    shapes = [(6, 16, 14), (5, 16, 14), (5, 12, 14), (5, 12, 12), (4, 8, 12),
              (6, 13, 14)]  # fmt: skip
    rows = zip(table["blocks"], 16 * table["w"], table["side"], strict=True)
    assert list(rows) == shapes
    assert table["d"].tolist() == [b / 6 for b, _, _ in shapes]
    assert table["r"].tolist() == [s / 14 for _, _, s in shapes]
    assert set(table["seed"]) == {1} and set(table["epochs"]) == {1}
    assert (table["seconds"] > 0).all() and not table.isna().any(axis=None)
    assert len(list(folder.iterdir())) == 6, "one folder a point"
    assert table["macs"].dtype == table["params"].dtype == "int64"


def test_points_are_recounted_and_evaluated_anew(model, sets, done):
    """Each network, rebuilt from its files, starts from the one before it."""
    table, folder = done
    full, _ = oracle.recount(copy.deepcopy(model), SHAPE)
    widths = conv_widths(model)
    for chain in ("whole", "dwr", "w"):
        here = model
        for row in table[table["chain"] == chain].itertuples():
            place = find_place(folder, row)
            files = ["finetune.pt", "plan.json", "point.json"]
            assert sorted(f.name for f in place.iterdir()) == files
            plan = Plan.load(place / "plan.json")
            whole = plan == Plan()
            small = copy.deepcopy(here if whole else surgery.shrink(here, plan, SHAPE))
            state = train.load_checkpoint(place / "finetune.pt")
            tensors = small.state_dict()
            start = digest_tensors(" ".join(tensors), *tensors.values())
            assert state["identity"]["start"] == start, "not from the point before"
            assert state["identity"]["resolution"] == plan.resolution
            small.load_state_dict(state["model"])
            assert not same_state(tensors_before(here, small), state["model"])
            side = plan.resolution or 14
            assert side == row.side
            measured = train.evaluate(small, sets.val, resolution=plan.resolution)
            assert row.top1 == measured["top1"]
            macs, params = oracle.recount(small, (1, side, side))
            assert (row.macs, row.params) == (macs, params)
            assert row.share == pytest.approx(macs / full, rel=1e-12)
            left = conv_widths(small)
            kept = sum(left.values()) / sum(widths[name] for name in left)
            assert row.w == pytest.approx(kept, rel=1e-12)
            blocks = [b for s in (1, 2, 3) for b in small.get_submodule(f"layer{s}")]
            assert row.blocks == sum(not isinstance(b, nn.Identity) for b in blocks)
            here = small
    assert table["top1"].nunique() > 2, "else accuracies could be mixed up"


def tensors_before(here, small) -> dict:
    return here.state_dict() if conv_widths(here) == conv_widths(small) else {}


def conv_widths(model) -> dict[str, int]:
    return {
        name: m.out_channels
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def test_the_chain_is_probed_anew_on_validation_images_only(model, sets, done):
    table, folder = done
    row = table.iloc[3]
    places = [find_place(folder, r) for r in table.iloc[1:5].itertuples()]
    here = model
    for place in places[:3]:
        here = surgery.shrink(here, Plan.load(place / "plan.json"), SHAPE)
        state = train.load_checkpoint(place / "finetune.pt")["model"]
        here.load_state_dict(state)
    probes = map3d.probe_blocks(here, sets.val, resolution=int(row["side"]), seed=1)
    last = Plan.load(places[3] / "plan.json")
    assert last.drop == map3d.order_removal(probes)[:1]
    again = map3d.prune_once(
        here, make_space(model), map3d.Shape(4, 8, 12), sets, resolution=12, seed=1
    )
    assert again == last


def test_pruning_once_probes_where_blocks_go_and_nowhere_else(model, sets, monkeypatch):
    seen, real = [], map3d.probe_blocks

    def probe(model, images, **options):
        seen.append((images is sets.val, options["resolution"], options["seed"]))
        return real(model, images, **options)

    monkeypatch.setattr(MODULE, "probe_blocks", probe)
    space = make_space(model)

    def prune(*shape):
        return map3d.prune_once(
            model, space, map3d.Shape(*shape), sets, resolution=12, seed=5
        )

    thin = prune(6, 12, 10)
    assert seen == [] and not thin.drop and thin.keep and thin.resolution == 10
    assert prune(6, 16, 14) == Plan()
    both = prune(4, 12, 14)
    assert seen == [(True, 12, 5)]
    order = map3d.order_removal(real(model, sets.val, resolution=12, seed=5))
    scores, shape = map3d.score_channels(model, SHAPE), map3d.Shape(4, 12, 14)
    assert both == space.plan(model, shape, order=order, scores=scores)


def test_probes_see_images_of_the_size_last_trained_at(model, sets, monkeypatch):
    seen, real = [], map3d.probe_blocks

    def probe(*arguments, **options):
        seen.append((options["resolution"], options["seed"]))
        return real(*arguments, **options)

    monkeypatch.setattr(MODULE, "probe_blocks", probe)
    chain = [(5 / 6, 1, 1), (5 / 6, 1, 0.85), (4 / 6, 1, 0.7), (3 / 6, 1, 1)]
    table = collect(model, sets, [chain], epochs=0)
    assert table["side"].tolist() == [14, 12, 10, 14]
    assert seen == [(None, 1), (12, 1), (10, 1)]


def test_a_network_is_traced_once_a_point_and_once_a_space(model, sets, monkeypatch):
    traced, real = [], structure.run_dry

    def run_dry(*arguments):
        traced.append(1)
        return real(*arguments)

    monkeypatch.setattr(structure, "run_dry", run_dry)
    space = make_space(model)
    assert len(traced) == 1
    collect(model, sets, SHORT, space=space, epochs=0)
    assert len(traced) == 1 + 3, "a point plans and shrinks by one graph"
    make_space(model, graph=space.graph)
    assert len(traced) == 1 + 3, "the space's own graph serves"
    space.lattice(model)
    assert len(traced) == 1 + 3 + len(space.sides()), (
        "positions are counted side by side"
    )


def test_a_collection_reads_no_test_image(model, sets):
    with pytest.raises(AssertionError, match="test set"):
        len(sets.test)
    collect(model, sets, SHORT, epochs=0)  # its test set raises when it is read


# -- taking up -------------------------------------------------------------------------


def test_finished_points_are_not_trained_again(model, sets, epochs):
    first = collect(model, sets, DESIGN[:2], epochs=2)
    assert len(epochs) == 10
    again = collect(model, sets, DESIGN[:2], epochs=2)
    assert len(epochs) == 10
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    part = collect(model, sets, [STAIRS[:3]], epochs=2, run="toy/31/other")
    assert len(epochs) == 10, "another run of the profile knows them too"
    same_points(part, first[first["chain"] == "dwr"][:3].reset_index(drop=True))


@pytest.fixture(scope="module")
def unbroken(model, sets, tmp_path_factory):
    """SHORT measured with two epochs a point, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNING_RUNS", str(tmp_path_factory.mktemp("unbroken")))
        return collect(model, sets, SHORT, epochs=2)


def die_in_the_fourth_epoch(model, sets):
    calls, real = [], loop._run_epoch

    def run(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    loop._run_epoch = run
    collect(model, sets, SHORT, epochs=2)


def test_a_collection_that_was_killed_goes_on(model, sets, unbroken, epochs, forked):
    """SIGKILL in the second of two epochs of the second of three points."""
    child = forked.Process(target=die_in_the_fourth_epoch, args=(model, sets))
    child.start()
    child.join(500)
    assert child.exitcode == -signal.SIGKILL
    assert len(list(points_folder().glob("*/point.json"))) == 1
    assert len(list(points_folder().glob("*/finetune.pt"))) == 2
    same_points(collect(model, sets, SHORT, epochs=2), unbroken)
    assert len(epochs) == 3, "one epoch of the second point, two of the third"


def swap_pixel(images: data.ImageSet) -> data.ImageSet:
    pixels = images.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    return dataclasses.replace(images, images=pixels)


def swap_label(images: data.ImageSet) -> data.ImageSet:
    labels = images.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return dataclasses.replace(images, labels=labels)


def test_whatever_decides_a_point_gives_it_another_folder(model, sets):
    def ask(net=model, images=sets, space=None, **changes):
        collect(net, images, [WHOLE], space=space, **({"epochs": 0} | changes))
        return {p.name for p in points_folder().iterdir()}

    other = copy.deepcopy(model)
    other.layer3[1].bn2.running_var[3] += 0.5
    half = dataclasses.replace(sets.train, std=(0.5,))
    held = dataclasses.replace(sets.val, mean=(0.5,))
    known = ask()
    assert len(known) == 1 and ask() == known
    for changes in [
        {"seed": 2}, {"lr": 0.06}, {"batch_size": 30}, {"epochs": 1},
        {"epochs": 1, "warmup": 0.5}, {"net": other},
        {"images": dataclasses.replace(sets, train=swap_pixel(sets.train))},
        {"images": dataclasses.replace(sets, train=swap_label(sets.train))},
        {"images": dataclasses.replace(sets, train=half)},
        {"images": dataclasses.replace(sets, val=swap_pixel(sets.val))},
        {"images": dataclasses.replace(sets, val=swap_label(sets.val))},
        {"images": dataclasses.replace(sets, val=held)},
        {"space": make_space(model, width="inner")},
        {"space": make_space(model, multiple=7)},
    ]:  # fmt: skip
        found = ask(**changes)
        assert known < found and len(found) == len(known) + 1, changes.keys()
        known = found


def test_without_epochs_a_point_is_the_shrunk_network(model, sets, epochs):
    table = collect(model, sets, SHORT, epochs=0)
    assert epochs == [] and (table["seconds"] == 0).all()
    wanted = [train.evaluate(model, sets.val)["top1"]]
    here = model
    for row in table[1:].itertuples():
        plan = Plan.load(find_place(points_folder(), row) / "plan.json")
        here = surgery.shrink(here, plan, SHAPE)
        side = plan.resolution
        wanted.append(train.evaluate(here, sets.val, resolution=side)["top1"])
    assert table["top1"].tolist() == wanted
    assert len(set(wanted)) > 1 and wanted[0] > 30
    same_points(collect(model, sets, SHORT, epochs=0), table)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("point.json", b'{"d": 1.0, "w"', "not valid JSON"),
        ("point.json", b"", "not valid JSON"),
        ("point.json", b"{}", "not a readable measured point .*keep it aside"),
        ("point.json", b"[]", "not a readable measured point .*keep it aside"),
        ("plan.json", b'{"keep": {"conv1"', "not valid JSON"),
        ("plan.json", b"[]", "not a plan"),
        ("finetune.pt", b"PK\x03\x04half", "not a readable checkpoint .*keep it aside"),
    ],
)
def test_a_damaged_file_is_one_error_and_is_redone_once_it_is_gone(
    model, sets, epochs, file, content, message
):
    first = collect(model, sets, SHORT[:1])
    (path,) = points_folder().glob(f"*/{file}")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: {message}"):
        collect(model, sets, SHORT[:1])
    path.unlink()
    same_points(collect(model, sets, SHORT[:1]), first)
    assert len(epochs) == (2 if file == "finetune.pt" else 1)


def test_a_point_that_is_trained_anew_is_measured_anew(model, sets, epochs):
    """Without its weights a row says nothing about the network that follows."""
    first = collect(model, sets, SHORT[:1])
    (path,) = points_folder().glob("*/point.json")
    paths.write_json(path, paths.read_json(path) | {"top1": 99.5})
    assert collect(model, sets, SHORT[:1])["top1"].item() == 99.5
    (weights,) = points_folder().glob("*/finetune.pt")
    weights.unlink()
    same_points(collect(model, sets, SHORT[:1]), first)
    assert len(epochs) == 2 and paths.read_json(path)["top1"] == first["top1"].item()


@pytest.mark.parametrize(
    ("design", "changes", "message"),
    [([], {}, "no point"), ([WHOLE, []], {}, "an empty chain"),
     (SHORT, {"epochs": -1}, "epochs must"), (SHORT, {"lr": 0.0}, "lr must"),
     (SHORT, {"warmup": 2.0}, "warmup must be"), (SHORT, {"seed": -1}, "seed must"),
     (SHORT, {"run": "../x"}, "needs a plain name")],
)  # fmt: skip
def test_bad_requests_are_refused_before_any_work(
    model, sets, monkeypatch, design, changes, message
):
    monkeypatch.setattr(MODULE, "probe_blocks", refuse)
    monkeypatch.setattr(train, "fit", refuse)
    with pytest.raises(ValueError, match=message):
        collect(model, sets, design, **changes)
    assert not paths.runs_root().exists()


def test_chains_are_named_after_what_they_move(model, sets):
    chains = [WHOLE, [(5 / 6, 1, 1)], [(1, 0.7, 1), (1, 0.6, 1)], [(1, 0.9, 0.85)],
              [(1, 1, 0.85), (4 / 6, 1, 0.85)]]  # fmt: skip
    table = collect(model, sets, chains, epochs=0)
    names = ["whole", "d*", "w", "w", "wr*", "dr", "dr"]
    assert table["chain"].tolist() == names
    assert table["round"].tolist() == [1, 1, 1, 2, 1, 1, 2]


# -- tables of points on disk ----------------------------------------------------------


def make_points(*rows: dict) -> pd.DataFrame:
    plain = {
        "chain": "d", "round": 1, "d": 5 / 6, "w": 1.0, "r": 1 / 3, "top1": 71.3,
        "blocks": 5, "side": 12, "macs": 10**9, "params": 99, "share": 0.1 + 0.2,
        "seed": 0, "epochs": 1, "seconds": 1.5,
    }  # fmt: skip
    return pd.DataFrame([plain | row for row in rows])


def test_points_are_read_as_they_were_written():
    points = make_points({}, {"chain": "w*", "round": 2, "w": 0.7, "top1": 100 / 3})
    path = map3d.write_points("toy/30/part0", points)
    assert path == paths.runs_root() / "toy/30/part0/points.csv"
    pd.testing.assert_frame_equal(map3d.read_points("toy/31"), points, check_exact=True)


def test_points_of_all_runs_of_a_profile_are_read_once():
    shared = {"chain": "whole", "d": 1.0}
    map3d.write_points("toy/30/part0", make_points(shared, {"round": 1}))
    map3d.write_points("toy/30/part1", make_points(shared, {"round": 2}))
    map3d.write_points("toy/30/part2", make_points(shared | {"seconds": 9.9}))
    map3d.write_points("other/30", make_points({"chain": "r"}))
    found = map3d.read_points("toy/31_map_fit/seed3")
    assert found[["chain", "round"]].to_numpy().tolist() == [
        ["whole", 1], ["d", 1], ["d", 2]
    ]  # fmt: skip


@pytest.mark.parametrize("column", ["net", "dataset", "width"])
def test_points_of_different_networks_are_not_mixed(column):
    map3d.write_points("toy/30/a", make_points({column: "this"}))
    assert len(map3d.read_points("toy/31")) == 1
    map3d.write_points("toy/30/b", make_points({column: "that"}))
    with pytest.raises(ValueError, match=f"different {column} .*: this, that; give"):
        map3d.read_points("toy/31")


def test_no_points_is_an_error_that_says_what_to_run():
    map3d.write_points("other/30", make_points({}))
    with pytest.raises(ValueError, match="run 30_map_collection first"):
        map3d.read_points("toy/31")
    for ask in (map3d.read_points, lambda run: map3d.write_points(run, make_points())):
        with pytest.raises(ValueError, match="needs a plain name"):
            ask("../toy")


# -- images that published weights have not seen ---------------------------------------


def rows_of(images: data.ImageSet) -> list[bytes]:
    pixels = images.images.flatten(1).numpy()
    pairs = zip(pixels, images.labels.tolist(), strict=True)
    return sorted(row.tobytes() + bytes([label]) for row, label in pairs)


def test_unseen_validation_is_half_of_the_test_images():
    found = stages.load_sets("mnist5k", unseen=True)
    train_set, test = data.load("mnist5k", "train"), data.load("mnist5k", "test")
    assert torch.equal(found.train.images, train_set.images)
    assert torch.equal(found.train.labels, train_set.labels)
    assert [len(found.val), len(found.test)] == [500, 500]
    assert sorted(rows_of(found.val) + rows_of(found.test)) == rows_of(test)
    assert not set(rows_of(found.val)) & set(rows_of(found.test))
    for part in (found.val, found.test):
        assert part.labels.bincount().tolist() == [50] * 10
    again = stages.load_sets("mnist5k", unseen=True, n_train=70)
    assert torch.equal(again.val.images, found.val.images)
    assert torch.equal(again.test.images, found.test.images)
    assert again.train.labels.bincount().tolist() == [7] * 10
    held = stages.load_sets("mnist5k")
    assert len(held.train) == 3600 and not set(rows_of(held.val)) & set(rows_of(test))
