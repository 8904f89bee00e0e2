"""The stages between notebooks: sets, baseline, recovery, metrics."""

import json
import math
import shutil
from dataclasses import fields, replace

import pytest
import torch

from lib import baselines, cost, models, paths, plan, settings, stages, surgery, train
from lib.plan import Plan
from lib.stages import Sets
from lib.train import Recipe, loop

SHAPE = (1, 28, 28)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def runs_apart(tmp_path, monkeypatch):
    """Runs in a temporary folder."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def sets() -> Sets:
    found = stages.load_sets("mnist5k", n_train=256)
    return Sets(found.train, found.val.take(40), found.test.take(60))


def make_baseline(sets, **changes):
    recipe, rest = make_recipe(dict(epochs=2, lr=0.02, seed=3) | changes)
    options = dict(run="toy/02", net="lenet", recipe=recipe)
    return stages.make_baseline(sets, **(options | rest))


def make_recipe(options: dict) -> tuple[Recipe, dict]:
    """The recipe in a test's options, and the other options."""
    names = {field.name for field in fields(Recipe)}
    recipe = {key: value for key, value in options.items() if key in names}
    return Recipe(**recipe), {k: v for k, v in options.items() if k not in names}


def same(a, b) -> bool:
    return all(
        torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items()
    )


def refuse_training(*arguments):
    raise AssertionError("trained again, though it is there")


def images_of(images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


# -- sets ------------------------------------------------------------------------------


def test_sets_are_disjoint_and_complete():
    found = stages.load_sets("mnist5k")
    assert [len(s) for s in (found.train, found.val, found.test)] == [3600, 400, 1000]
    parts = [images_of(s) for s in (found.train, found.val, found.test)]
    assert not parts[0] & parts[1] and not parts[1] & parts[2]
    assert not parts[0] & parts[2]


@pytest.mark.parametrize("n_train", [50, 1000, 99999])
def test_validation_does_not_depend_on_the_training_size(n_train):
    whole, part = (
        stages.load_sets("mnist5k"),
        stages.load_sets("mnist5k", n_train=n_train),
    )
    assert torch.equal(whole.val.images, part.val.images)
    assert torch.equal(whole.test.labels, part.test.labels)
    assert len(part.train) == min(n_train, 3600)
    assert images_of(part.train) <= images_of(whole.train)
    spread = part.train.labels.bincount()
    assert spread.max() - spread.min() <= 1
    again = stages.load_sets("mnist5k", n_train=n_train)
    assert torch.equal(part.train.images, again.train.images)


def test_all_images_are_scaled_and_say_so():
    whole, small = (stages.load_sets("mnist5k", resolution=r) for r in (0, 14))
    assert whole.train.shape == (1, 28, 28)
    for part, scaled in zip(vars(whole).values(), vars(small).values(), strict=True):
        assert scaled.shape == (1, 14, 14) and scaled.name == "mnist5k-14px"
        assert torch.equal(part.labels, scaled.labels)


# -- baseline --------------------------------------------------------------------------


def test_a_baseline_is_trained_once_and_then_read(sets, capsys, monkeypatch):
    first = make_baseline(sets)
    assert "training, into" in capsys.readouterr().out
    monkeypatch.setattr(loop, "_run_epoch", refuse_training)
    second = make_baseline(sets, run="toy/another/seed1")
    assert "reading" in capsys.readouterr().out
    assert same(first, second)
    folder = paths.runs_root() / "toy" / "baselines"
    (name,) = [f.name for f in folder.glob("*.pt")]
    (measured,) = [paths.read_json(f) for f in folder.glob("*.json")]
    assert measured["images_per_s"] > 0 and len(measured["rows"]) == 2
    for part in ("mnist5k", "lenet", "2epochs", "seed3", "lr", "images"):
        assert part in name


def test_profiles_and_seeds_have_their_own_baselines(sets):
    nets = [
        make_baseline(sets, epochs=1, seed=seed, run=run)
        for seed, run in [(0, "a/x"), (1, "a/x"), (0, "b/x")]
    ]
    assert not same(nets[0], nets[1])
    assert same(nets[0], nets[2]), "but the seed alone decides the weights"
    found = sorted(
        p.relative_to(paths.runs_root()) for p in paths.runs_root().rglob("*.pt")
    )
    assert [f.parts[0] for f in found] == ["a", "a", "b"]


def test_a_baseline_with_another_rate_is_not_said_to_be_read(sets, capsys):
    make_baseline(sets, epochs=1)
    capsys.readouterr()
    make_baseline(sets, epochs=1, lr=0.01)
    printed = capsys.readouterr().out
    assert "training, into" in printed and "reading" not in printed
    assert "lr0.01" in printed and "starting afresh" not in printed


def test_two_rates_do_not_evict_each_other(sets, monkeypatch):
    for lr in (0.02, 0.01):
        make_baseline(sets, epochs=1, lr=lr)
    monkeypatch.setattr(loop, "_run_epoch", refuse_training)
    for lr in (0.02, 0.01):
        make_baseline(sets, epochs=1, lr=lr)


def test_missing_published_weights_are_refused(sets):
    with pytest.raises(ValueError, match=r"lenet .*no published weights"):
        make_baseline(sets, pretrained=True)


# -- recovery --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return models.build("resnet8", in_channels=1)


def make_plan(model, resolution=None):
    made = plan.from_scores(model, baselines.l1(model), SHAPE, rate=0.5)
    made.resolution = resolution
    return made


def recover(model, made, sets, *, run="toy/x", net="resnet8", **changes):
    recipe, rest = make_recipe(dict(seed=1, epochs=1, lr=0.02) | changes)
    base = stages.Base(model, sets, run=run, net=net)
    return stages.recover(base, made, recipe=recipe, **(dict(method="l1") | rest))


@pytest.mark.parametrize("resolution", [None, 20])
def test_plan_and_checkpoint_rebuild_the_network(sets, resnet, resolution):
    made = make_plan(resnet, resolution)
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    done = recover(resnet, made, sets, rate=0.5)
    for name, tensor in resnet.state_dict().items():
        assert torch.equal(before[name], tensor), "the model given is left alone"
    folder = done.folder
    assert folder == paths.runs_root() / "toy/x" / folder.name
    assert sorted(p.name for p in folder.iterdir()) == ["finetune.pt", "plan.json"]
    read = plan.Plan.load(folder / "plan.json")
    assert read == made
    state = train.load_checkpoint(folder / "finetune.pt")["model"]
    fresh = models.build("resnet8", in_channels=1)
    rebuilt = surgery.shrunk_from(fresh, read, SHAPE, state)
    side = resolution or 28
    x = torch.randn(3, 1, side, side)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(x), done.model.eval()(x))


@pytest.mark.parametrize("resolution", [None, 20])
def test_the_row_says_what_was_measured(sets, resnet, resolution):
    made = make_plan(resnet, resolution)
    done = recover(resnet, made, sets, rate=0.5, residual="tie")
    row, side = done.row, resolution or 28
    base = cost.count(resnet, SHAPE)
    spent = cost.count(surgery.shrink(resnet, made, SHAPE), (1, side, side))
    assert (row["macs"], row["params"]) == (spent.macs, spent.params)
    assert row["macs_down"] == pytest.approx(100 * (1 - spent.macs / base.macs))
    assert row["params_down"] == pytest.approx(100 * (1 - spent.params / base.params))
    after = train.evaluate(done.model, sets.test, resolution=resolution)["top1"]
    whole = train.evaluate(resnet, sets.test)["top1"]
    assert (row["base"], row["after"]) == (whole, after)
    small = surgery.shrink(resnet, made, SHAPE)
    train.recalibrate(small, sets.train, resolution=resolution, seed=1)
    before = train.evaluate(small, sets.test, resolution=resolution)["top1"]
    assert row["before"] == before
    named = {
        k: row[k] for k in ("method", "net", "dataset", "seed", "profile", "epochs")
    }
    assert named == {
        "method": "l1", "net": "resnet8", "dataset": "mnist5k", "seed": 1,
        "profile": "toy", "epochs": 1,
    }  # fmt: skip
    assert (row["rate"], row["residual"]) == (0.5, "tie")
    assert row["seconds"] > 0 and row["images_per_s"] > 0
    assert row["ms"] > 0 and row["time_share"] > 0 and "batch 8" in row["timed"]
    assert row["precision"] in {"float32", "bfloat16"}
    json.dumps(row, allow_nan=False)


def test_recovery_takes_up_what_is_there(sets, resnet, monkeypatch):
    made = make_plan(resnet)
    first = recover(resnet, made, sets)
    monkeypatch.setattr(loop, "_run_epoch", refuse_training)
    again = recover(resnet, made, sets)
    clocks = {"ms": 0, "time_share": 0}  # measured anew
    assert same(first.model, again.model)
    assert first.row | clocks == again.row | clocks


def test_a_network_that_is_put_aside_keeps_its_plan(sets, resnet, capsys, monkeypatch):
    """Also when the run that takes its place is stopped before it trains."""
    first, second = (
        make_plan(resnet),
        plan.from_scores(resnet, baselines.random(resnet, 3), SHAPE, rate=0.5),
    )
    kept = recover(resnet, first, sets)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(train, "recalibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(resnet, second, sets)
    recover(resnet, second, sets)
    assert "kept as plan.json.old1, finetune.pt.old1" in capsys.readouterr().out
    names = sorted(path.name for path in kept.folder.iterdir())
    assert names == ["finetune.pt", "finetune.pt.old1", "plan.json", "plan.json.old1"]
    for made, end in ((first, ".old1"), (second, "")):
        read = plan.Plan.load(kept.folder / f"plan.json{end}")
        assert read == made
        state = train.load_checkpoint(kept.folder / f"finetune.pt{end}")["model"]
        fresh = models.build("resnet8", in_channels=1)
        surgery.shrunk_from(fresh, read, SHAPE, state)


def test_a_row_names_the_code_that_trained_it(sets, resnet, monkeypatch):
    made, then = make_plan(resnet), {"device": "abacus", "torch": "0", "revision": "a"}
    now = recover(resnet, made, sets, seed=1).row
    assert {key: now[key] for key in then} == settings.made_with()
    with monkeypatch.context() as earlier:
        earlier.setattr(loop, "made_with", lambda: then)
        recover(resnet, made, sets, seed=2)
    found = recover(resnet, made, sets, seed=2).row
    assert {key: found[key] for key in then} == then


def test_two_seeds_of_one_run_are_both_kept(sets, resnet, monkeypatch):
    made = make_plan(resnet)
    for seed in (0, 1):
        recover(resnet, made, sets, seed=seed)
    monkeypatch.setattr(loop, "_run_epoch", refuse_training)
    for seed in (0, 1):
        recover(resnet, made, sets, seed=seed)


def test_recovery_without_fine_tuning_rebuilds_too(sets, resnet):
    done = recover(resnet, make_plan(resnet), sets, epochs=0)
    assert done.row["after"] == done.row["before"] and done.row["seconds"] == 0
    folder = done.folder
    state = train.load_checkpoint(folder / "finetune.pt")["model"]
    read = plan.Plan.load(folder / "plan.json")
    rebuilt = surgery.shrunk_from(resnet, read, SHAPE, state)
    assert same(rebuilt, done.model)


def test_a_recipe_at_another_side_than_the_plan_is_refused(sets, resnet):
    with pytest.raises(ValueError, match=r"trains at 14 pixels, the plan at 20"):
        recover(resnet, make_plan(resnet, 20), sets, resolution=14)
    assert not paths.runs_root().exists()


# -- metrics and names -----------------------------------------------------------------


def test_metrics_hold_settings_versions_and_rows(capsys):
    cfg = settings.check(run="toy/x", seed=1, lr=0.1, rates=[0.5])
    cfg.started -= 41
    file = stages.write_metrics("toy/x", cfg, rows=[{"after": 1.0}], seconds=2.5)
    assert file == paths.runs_root() / "toy" / "x" / "metrics.json"
    content = paths.read_json(file)
    assert content["settings"] == {"run": "toy/x", "seed": 1, "lr": 0.1, "rates": [0.5]}
    assert content["environment"] == settings.environment()
    assert content["rows"] == [{"after": 1.0}] and content["seconds"] == 2.5
    assert 41 <= content["wall_seconds"] < 60, "from the check of the parameters on"
    assert "metrics.json" in capsys.readouterr().out


def test_metrics_that_are_not_numbers_leave_the_old_file():
    cfg = settings.check(run="toy/x")
    file = stages.write_metrics("toy/x", cfg, rows=[])
    with pytest.raises(ValueError):
        stages.write_metrics("toy/x", cfg, rows=[{"after": math.nan}])
    assert paths.read_json(file)["rows"] == []
    assert len(list(file.parent.iterdir())) == 1


BAD_NAMES = ["..", "../x", "quick/../../x", "/tmp/x", "", "."]


@pytest.mark.parametrize("run", BAD_NAMES)
def test_runs_stay_below_the_folder_of_runs(sets, run):
    calls = [
        lambda: stages.run_folder(run),
        lambda: stages.write_metrics(run, settings.check(run=run), rows=[]),
        lambda: make_baseline(sets, run=run, epochs=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="needs a plain name"):
            call()
    assert not paths.runs_root().exists()


@pytest.mark.parametrize("place", ["../../../..", "{folder}"])
def test_methods_stay_in_the_folder_of_the_run(sets, resnet, tmp_path, place):
    with pytest.raises(ValueError):
        recover(
            resnet,
            make_plan(resnet),
            sets,
            method=f"{place}/outside".format(folder=tmp_path),
            epochs=0,
        )
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("varied", ["rates0.1+0.2-seed0", "neta b", "lr1e-05"])
def test_every_run_that_a_profile_may_plan_has_a_folder(varied):
    """Lists of a profile are joined by "+", and a data set's name may hold a space."""
    assert stages.run_folder(f"toy/x/{varied}") == paths.runs_root() / "toy/x" / varied


def test_folders_of_runs():
    assert stages.run_folder("quick/02/seed1") == paths.runs_root() / "quick/02/seed1"
    assert stages.profile_folder("quick/02/seed1") == paths.runs_root() / "quick"


# -- from new weights ---------------------------------------------------------------


def test_scratch_starts_from_new_weights_of_the_same_size(sets):
    model = make_baseline(sets)
    scores = baselines.l1(model)
    chosen = plan.from_scores(model, scores, SHAPE, rate=0.5)
    made = {
        scratch: recover(
            model, chosen, sets, net="lenet", seed=3, epochs=0, scratch=scratch
        )
        for scratch in (False, True)
    }
    small = surgery.shrink(model, chosen, SHAPE)
    assert same(made[False].model, small) and not same(made[True].model, small)
    assert made[True].row["params"] == made[False].row["params"]
    fresh = surgery.shrink(model, chosen, SHAPE)
    models.draw_weights(fresh, 3)
    assert same(made[True].model, fresh)


def test_drawing_weights_is_fixed_by_its_seed_and_leaves_the_generator():
    nets = [models.build("resnet8", in_channels=1) for _ in range(3)]
    state = torch.get_rng_state()
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        models.draw_weights(net, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])
    assert not nets[0].bn1.running_mean.any() and (nets[0].bn1.running_var == 1).all()
    wanted = math.sqrt(2 / (64 * 9))  # He-normal, fan in
    drawn = nets[0].layer3[0].conv2.weight.detach()
    assert float(drawn.std()) == pytest.approx(wanted, rel=0.05)


def test_the_curve_begins_before_the_first_epoch(sets):
    model = make_baseline(sets)
    chosen = plan.from_scores(model, baselines.l1(model), SHAPE, rate=0.5)
    made = recover(model, chosen, sets, epochs=2, lr=0.01, curve=True)
    small = surgery.shrink(model, chosen, SHAPE)
    assert made.curve[0] == pytest.approx(train.evaluate(small, sets.val)["top1"])
    assert len(made.curve) == 3
    assert made.curve[2] == pytest.approx(train.evaluate(made.model, sets.val)["top1"])


def test_a_warm_up_and_options_of_the_net_are_part_of_a_baseline(sets):
    plain = make_baseline(sets, net="cifarnet", epochs=1)
    warm = make_baseline(sets, net="cifarnet", epochs=1, warmup=1.0)
    deep = make_baseline(sets, net="cifarnet", epochs=1, extra_convs=2)
    many = make_baseline(sets, net="cifarnet", epochs=1, batch_size=32)
    assert not same(plain, warm) and not same(plain, many)
    assert len(deep.extra) == 2 and len(plain.extra) == 0
    found = {p.name for p in (paths.runs_root() / "toy" / "baselines").glob("*.pt")}
    assert found == {
        f"{sets.train.name}-256images-cifarnet{extra}-1epochs-lr0.02{warm}-seed3.pt"
        for extra, warm in [
            ("", ""),
            ("", "-warmup1"),
            ("", "-batch_size32"),
            ("-extra_convs2", ""),
        ]
    }


def test_two_processes_that_train_the_same_baseline_agree(sets, monkeypatch):
    """One overtakes the other, which then overwrites its later checkpoint."""
    others = []
    save = loop.checkpoints.save

    def save_behind_another(*arguments, **parts):
        if not others:
            others.append(None)
            others[0] = make_baseline(sets)
        save(*arguments, **parts)

    monkeypatch.setattr(loop.checkpoints, "save", save_behind_another)
    slow = make_baseline(sets)
    assert same(slow, others[0])
    monkeypatch.setattr(loop, "_run_epoch", refuse_training)
    assert same(make_baseline(sets), slow)


def test_a_committed_base_is_read_where_the_profile_has_none(
    sets, tmp_path, monkeypatch, capsys
):
    recipe = Recipe(1, lr=0.02, batch_size=64, seed=5)
    ask = {"net": "lenet", "recipe": recipe}
    trained = stages.make_baseline(sets, run="one/x", **ask)
    (made,) = (paths.runs_root() / "one" / "baselines").glob("*.pt")
    monkeypatch.setattr(paths, "BASES", tmp_path / "bases")
    paths.BASES.mkdir()
    shutil.copy(made, paths.BASES)
    capsys.readouterr()
    found = stages.make_baseline(sets, run="two/x", **ask)
    assert "reading" in capsys.readouterr().out
    for name, value in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    other = {**ask, "recipe": replace(recipe, seed=6)}
    stages.make_baseline(sets, run="two/x", **other)
    assert "training" in capsys.readouterr().out


def test_an_empty_plan_fine_tunes_the_whole_network(sets, resnet):
    base = stages.Base(resnet, sets, run="toy/whole", net="resnet8")
    recipe = Recipe(1, lr=0.01, batch_size=64)
    found = stages.recover(base, Plan(), method="unpruned", recipe=recipe)
    assert found.row["base"] == train.evaluate(resnet, sets.test)["top1"]
    assert found.row["macs_down"] == 0
    assert found.hits.dtype == torch.bool and len(found.hits) == len(sets.test)
    assert found.row["after"] == pytest.approx(100 * found.hits.double().mean())
    measured = train.evaluate(found.model, sets.val)["top1"]
    assert found.row["val"] == pytest.approx(measured)


def test_a_base_that_is_trained_longer_is_a_base_of_its_own(sets, resnet, capsys):
    base = stages.Base(resnet, sets, run="toy/longer", net="resnet8")
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    recipe = Recipe(1, lr=0.05, batch_size=64, sparsity=2.0)
    sparse = stages.train_longer(base, recipe)
    plain = stages.train_longer(base, replace(recipe, sparsity=0.0))
    for name, value in before.items():
        assert torch.equal(resnet.state_dict()[name], value), "the base is left alone"
    sizes = [sum(float(s.sum()) for s in baselines.bn_scale(net).values())
             for net in (sparse.model, plain.model)]  # fmt: skip
    assert sizes[0] < 0.9 * sizes[1], "the penalty shrinks the scales"
    assert (sparse.run, sparse.sets, sparse.net) == (base.run, sets, "resnet8")
    assert sparse.top1 == train.evaluate(sparse.model, sets.test)["top1"]
    capsys.readouterr()
    again = stages.train_longer(base, recipe)
    assert "taking up after epoch 1 of 1" in capsys.readouterr().out
    for name, value in sparse.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
