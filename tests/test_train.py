"""Training: against plain PyTorch loops, killed at bad moments, and on bad input."""

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lib import data, models, paths, train
from lib.data import ImageSet
from lib.train import checkpoint as checkpoints
from lib.train import loop, progress, update
from lib.train.recipe import (
    Recipe,
    make_optimizer,
    pick_device,
    pick_precision,
    rate_at,
)

EPOCHS, BATCH = 3, 16
HAS_BF16 = pick_precision("auto", torch.device("cpu"), nn.Linear(1, 1)) == "bfloat16"
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no bfloat16 on this CPU")
PRECISIONS = ["float32", pytest.param("bfloat16", marks=needs_bf16)]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_set(n=48, classes=4, side=8, channels=3, seed=0, pad=1) -> ImageSet:
    """Noise with a bright stripe whose place is the class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 100, (n, side, side, channels), generator=g)
    images[torch.arange(n), 2 * labels % side] += 120
    names = tuple(f"class{i}" for i in range(classes))
    stats = (0.3,) * channels, (0.25,) * channels
    return ImageSet(images.to(torch.uint8), labels, names, "toy", *stats, pad, True)


def make_net(seed=0, dropout=0.2, classes=4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(128, classes),
    )  # fmt: skip


def fit(model, images=None, val=None, *, epochs=EPOCHS, **options):
    options = {"batch_size": BATCH, "precision": "float32", "lr": 0.05} | options
    return train.fit(model, images or make_set(), val, epochs=epochs, **options)


def state_of(model) -> dict:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(a, b, path="state"):
    """Bit for bit, through nested containers; timings are left out."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "images_per_s"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


# -- a plain loop in PyTorch alone ---------------------------------------------------


def plain_scheduler(optimizer, recipe: Recipe, steps: int):
    """torch's own schedule, called once a step."""
    schedulers = torch.optim.lr_scheduler
    if recipe.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=recipe.epochs * steps)
    if recipe.schedule == "step":
        at = [math.ceil(m * steps) for m in recipe.milestones]
        return schedulers.MultiStepLR(optimizer, at, gamma=recipe.gamma)
    return schedulers.ConstantLR(optimizer, factor=1.0)


def plain_optimizer(model, recipe: Recipe):
    norms = [p for p in model.parameters() if p.ndim == 1]
    rest = [p for p in model.parameters() if p.ndim > 1]
    decay = recipe.weight_decay
    groups = [
        {"params": rest, "weight_decay": decay},
        {"params": norms, "weight_decay": decay if recipe.decay_norms else 0.0},
    ]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, foreach=False)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(
        groups, recipe.lr, recipe.momentum, nesterov=nesterov, foreach=False
    )


def plain_loop(model, images, recipe: Recipe):
    """What `fit` should do, from torch's own parts, in the usual memory layout."""
    steps = data.count_batches(images, recipe.batch_size, train=True)
    optimizer = plain_optimizer(model, recipe)
    scheduler = plain_scheduler(optimizer, recipe, steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    dtype = next(model.parameters()).dtype
    rows = []
    for epoch in range(recipe.epochs):
        model.train()
        loss_sum = hits = seen = 0
        for x, y in data.batches(
            images, recipe.batch_size, train=True, augment=recipe.augment,
            seed=recipe.seed, epoch=epoch, resolution=recipe.resolution, dtype=dtype,
        ):  # fmt: skip
            optimizer.zero_grad()
            output = model(x.contiguous())
            loss = criterion(output, y)
            norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
            (
                loss + recipe.sparsity * sum(m.weight.abs().sum() for m in norms)
            ).backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item() * len(y)
            hits += (output.argmax(1) == y).sum().item()
            seen += len(y)
        rows.append({"loss": loss_sum / seen, "top1": 100 * hits / seen})
    return rows


RECIPES = {
    "cosine": {},
    "step": {"schedule": "step", "milestones": (0.5, 1), "gamma": 0.2},
    "constant, no momentum": {"schedule": "constant", "momentum": 0.0},
    "smoothing": {"label_smoothing": 0.1},
    "norms without decay": {"decay_norms": False, "weight_decay": 0.05},
    "no Nesterov": {"nesterov": False},
    "sparse scales": {"sparsity": 0.2},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "partial batch": {"batch_size": 20},
    "larger than the set": {"batch_size": 100},
    "resolution": {"resolution": 9},
    "no augmentation": {"augment": False, "seed": 7},
}


@pytest.mark.parametrize("epochs, limit", [(1, 1e-6), (2, 1e-5)])
@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES.keys())
def test_fit_equals_a_plain_loop(options, epochs, limit):
    if epochs == 1:  # one step
        options = {"batch_size": 48} | options
    usual = {"lr": 0.05, "batch_size": BATCH, "precision": "float32"}
    recipe = Recipe(epochs, **usual | options)
    ours, theirs = (nn.Sequential(*make_net(dropout=0.0)[:7]) for _ in range(2))
    for net in (ours, theirs):  # an average over positions takes every resolution
        torch.manual_seed(1)
        net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)])
    images = make_set()
    settings = {k: v for k, v in vars(recipe).items() if k != "epochs"}
    history = train.fit(ours, images, epochs=epochs, **settings)
    rows = plain_loop(theirs, images, recipe)
    for name, tensor in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], tensor, atol=limit, rtol=limit)
    for mine, plain in zip(history.rows, rows, strict=True):
        assert mine["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert mine["top1"] == pytest.approx(plain["top1"])


def test_distillation_is_the_loss_of_hinton_2015():
    ours, theirs, teacher, images = make_net(1), make_net(1), make_net(7), make_set()
    for net in (ours, theirs, teacher):
        net[8].p = 0.0
    taught = {"lr": 0.05, "batch_size": 48, "precision": "float32", "nesterov": False,
              "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant",
              "distill": 0.7, "temperature": 3.0}  # fmt: skip
    history = train.fit(ours, images, epochs=1, teacher=teacher, **taught)
    ((x, y),) = data.batches(images, 48, train=True, seed=0, epoch=0)
    theirs.train(), teacher.eval()
    logits, told = theirs(x), teacher(x).detach()
    soft = nn.functional.kl_div(
        (logits / 3).log_softmax(1), (told / 3).softmax(1), reduction="batchmean"
    )
    loss = 0.3 * nn.functional.cross_entropy(logits, y) + 0.7 * 9 * soft
    loss.backward()
    assert history.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for mine, plain in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine, plain - 0.05 * plain.grad, atol=1e-6, rtol=1e-5)


def test_a_teacher_and_its_weight_go_together(tmp_path):
    for options in ({"distill": 0.5}, {"teacher": make_net(2)}):
        with pytest.raises(ValueError, match="distill needs a teacher"):
            fit(make_net(), **options)
    options = {"distill": 0.5, "epochs": 1, "checkpoint": tmp_path / "run.pt"}
    fit(make_net(), teacher=make_net(2), **options)
    again = fit(make_net(), teacher=make_net(2), **options)
    other = fit(make_net(), teacher=make_net(3), **options)
    assert (again.resumed, other.resumed) == (1, 0)


def test_resnet8_equals_a_plain_loop():
    images = make_set(n=64, side=32, classes=10)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(models.build("resnet8_b"))
    recipe = Recipe(epochs=2, lr=0.01, batch_size=32)
    train.fit(nets[0], images, epochs=2, lr=0.01, batch_size=32, precision="float32")
    plain_loop(nets[1], images, recipe)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_float64_model_is_trained_in_float64():
    ours, theirs = make_net(dropout=0).double(), make_net(dropout=0).double()
    history = fit(ours, epochs=2, precision="auto")
    plain_loop(theirs, make_set(), Recipe(epochs=2, lr=0.05, batch_size=BATCH))
    assert history.precision != "bfloat16"
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_rates_are_those_of_torch(schedule):
    recipe = Recipe(epochs=6, lr=0.3, schedule=schedule, milestones=(2, 4.5))
    steps = 8
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = plain_scheduler(optimizer, recipe, steps)
    for i in range(recipe.epochs * steps):
        expected = scheduler.get_last_lr()[0]
        assert rate_at(recipe, i / steps) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup_is_linear_then_cosine():
    recipe, steps = Recipe(epochs=6, lr=0.3, warmup=2), 8
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedulers = torch.optim.lr_scheduler
    linear = schedulers.LinearLR(optimizer, 1e-9, 1.0, total_iters=2 * steps)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=4 * steps)
    both = schedulers.SequentialLR(optimizer, [linear, cosine], [2 * steps])
    assert 0 < rate_at(recipe, 0.0) <= 0.3 / 100, "the first step moves a little"
    for i in range(1, 6 * steps):
        optimizer.step()
        both.step()
        assert rate_at(recipe, i / steps) == pytest.approx(
            both.get_last_lr()[0], abs=1e-6
        )


# -- what comes out -------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns(precision):
    model, images = make_net(), make_set(n=128)
    history = fit(model, images, images, epochs=4, precision=precision)
    losses = [row["loss"] for row in history.rows]
    assert losses[-1] < 0.5 * losses[0]
    assert history.rows[-1]["val_top1"] == train.evaluate(model, images)["top1"] > 90
    assert history.precision == precision and history.device == "cpu"
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4]
    assert history.seconds > 0 and history.images_per_s > 0 and history.resumed == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_validation_decides_nothing():
    plain, watched = make_net(), make_net()
    fit(plain)
    worst = make_set(seed=9)
    fit(watched, val=replace(worst, labels=(worst.labels + 1) % 4))
    assert_same(state_of(plain), state_of(watched))


def test_same_seed_same_run_and_other_seed_another():
    runs = []
    for seed in (3, 3, 4):
        runs.append(make_net())
        fit(runs[-1], seed=seed)
    assert_same(state_of(runs[0]), state_of(runs[1]))
    assert not torch.equal(runs[0][0].weight, runs[2][0].weight)


def test_generators_of_the_caller_are_left_alone():
    model, images = make_net(), make_set()
    torch.manual_seed(5)
    before, python = torch.get_rng_state(), random.getstate()
    fit(model, images, images)
    train.evaluate(model, images)
    train.recalibrate(model, images)
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()


def test_frozen_parameters_stay():
    model = make_net()
    model[0].requires_grad_(False)
    before, head = model[0].weight.clone(), model[-1].weight.clone()
    fit(model)
    assert torch.equal(before, model[0].weight)
    assert not torch.equal(head, model[-1].weight)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        fit(make_net().requires_grad_(False))


def test_no_epochs_change_nothing(tmp_path):
    model = make_net()
    before = state_of(model)
    history = fit(model, epochs=0, checkpoint=tmp_path / "none.pt")
    assert history.rows == [] and history.seconds == history.images_per_s == 0
    assert_same(before, state_of(model))


def test_weight_decay_groups():
    model = make_net()
    cpu = torch.device("cpu")
    one = make_optimizer(model, Recipe(1, weight_decay=0.1), cpu).param_groups
    assert [g["weight_decay"] for g in one] == [0.1]
    two = make_optimizer(model, Recipe(1, weight_decay=0.1, decay_norms=False), cpu)
    decayed, rest = two.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    assert len(decayed["params"] + rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_norms_without_decay_where_one_group_is_empty(trained):
    model = make_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == f"9.{trained}"
    before = state_of(model)
    fit(model, decay_norms=False, epochs=1)
    assert not torch.equal(before[f"9.{trained}"], model[9].get_parameter(trained))


class Heads(NamedTuple):
    """As torchvision's GoogLeNet and Inception return in training."""

    logits: torch.Tensor
    aux: torch.Tensor
    none: None = None


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.aux, self.fc = nn.Linear(192, 4), nn.Linear(192, 4)

    def forward(self, x):
        x = x.flatten(1)
        return Heads(self.fc(x), self.aux(x)) if self.training else self.fc(x)


def test_auxiliary_heads_count_with_their_weight():
    ours, theirs, images = TwoHeads(), TwoHeads(), make_set()
    history = fit(
        ours, images, images, epochs=1, batch_size=48, aux_weight=0.4,
        momentum=0.0, weight_decay=0.0,
    )  # fmt: skip
    x, y = next(data.batches(images, 48, train=True))
    out, aux, _ = theirs.train()(x)
    loss = F.cross_entropy(out, y) + 0.4 * F.cross_entropy(aux, y)
    loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b - 0.05 * b.grad, atol=1e-6, rtol=1e-6)
    top1 = 100 * (out.argmax(1) == y).double().mean().item()
    assert history.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert history.rows[0]["top1"] == pytest.approx(top1), "by the main head"


# -- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("epochs", -1), ("epochs", 1.5), ("epochs", True), ("lr", 0.0), ("lr", -0.1),
        ("lr", math.nan), ("lr", math.inf), ("lr", "1e-3"), ("batch_size", 0),
        ("batch_size", 16.0), ("optimizer", "lion"), ("schedule", "linear"),
        ("momentum", 1.0), ("weight_decay", -1e-4), ("weight_decay", math.nan),
        ("label_smoothing", 1.0), ("warmup", 4), ("warmup", -1), ("seed", -1),
        ("gamma", math.nan), ("aux_weight", math.inf), ("milestones", 3),
        ("milestones", (1, math.nan)), ("adam_betas", (0.9,)), ("adam_betas", "ab"),
        ("nesterov", 1), ("augment", None), ("resolution", 0), ("resolution", 8.5),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(option, value):
    model = make_net()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"^{option} must .*got") as error:
        fit(model, **{option: value})
    assert "\n" not in str(error.value)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("make", [fit, lambda _, **s: Recipe(1, **s)])
def test_unknown_settings_are_refused_with_the_nearest_name(make):
    with pytest.raises(
        ValueError, match=r"'warm_up' is unknown; did you mean 'warmup'"
    ):
        make(make_net(), warm_up=1.0)
    with pytest.raises(ValueError, match=r"'learning_rate' is unknown; known: .*lr"):
        make(make_net(), learning_rate=0.1)


def test_a_recipe_or_its_settings_but_not_both():
    by_recipe, by_settings, images = make_net(), make_net(), make_set()
    recipe = Recipe(2, lr=0.05, batch_size=BATCH, precision="float32", seed=4)
    train.fit(by_recipe, images, recipe=recipe)
    fit(by_settings, images, epochs=2, seed=4)
    assert_same(state_of(by_recipe), state_of(by_settings))
    for wrong in ({"epochs": 2}, {"lr": 0.1}, {"epochs": 2, "seed": 1}):
        with pytest.raises(ValueError, match=rf"got both: .*{next(iter(wrong))}"):
            train.fit(by_recipe, images, recipe=recipe, **wrong)
    for missing in ({}, {"lr": 0.1}):
        with pytest.raises(ValueError, match="needs a recipe, or epochs"):
            train.fit(by_recipe, images, **missing)
    with pytest.raises(ValueError, match=r"recipe must be a train\.Recipe"):
        train.fit(by_recipe, images, recipe={"epochs": 2})


def test_the_tag_of_a_recipe_tells_recipes_apart():
    assert Recipe(6, lr=0.1).tag == "6epochs-lr0.1-seed0"
    long = Recipe(2, lr=1, warmup=0.5, milestones=(1, 1.5), augment=False, seed=3)
    assert long.tag == "2epochs-lr1-milestones1_1.5-warmup0.5-augmentFalse-seed3"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision"):
        fit(make_net(), precision="half")


def test_a_missing_gpu_is_refused():
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device(None) == torch.device("cpu")
        with pytest.raises(ValueError, match="no GPU"):
            fit(make_net(), device="cuda")


@pytest.mark.parametrize("which", ["train", "validation"])
def test_more_classes_than_outputs_are_refused(which):
    sets = [make_set(), make_set(classes=7)]
    with pytest.raises(ValueError, match=r"toy has 7 classes.* 4 outputs"):
        fit(make_net(), *(sets if which == "validation" else sets[::-1]))


@pytest.mark.parametrize("later", [False, True])
def test_a_diverged_run_names_epoch_and_rate(tmp_path, monkeypatch, later):
    file = tmp_path / "run.pt"
    if later:  # a sound first epoch, then an infinite step
        rate = lambda recipe, epoch: 1e38 if epoch >= 1 else 0.05  # noqa: E731
        monkeypatch.setattr(loop, "rate_at", rate)
    with pytest.raises(ValueError, match=r"diverged in epoch") as error:
        fit(make_net(), lr=0.05 if later else 1e30, checkpoint=file)
    assert f"epoch {2 if later else 1} of 3" in str(error.value)
    assert ("0.05" if later else "1e+30") in str(error.value)
    assert file.is_file() == later
    if later:
        state = train.load_checkpoint(file)
        assert len(state["rows"]) == 1
        assert all(t.isfinite().all() for t in state["model"].values())


# -- taking up a run -----------------------------------------------------------------


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def slow(function):
    """The same, later: time for a parent to kill within an epoch."""

    def later(*args):
        time.sleep(0.03)
        return function(*args)

    return later


def run_and_die(folder, precision, moment, count):
    """Train in a process of its own that is killed at the `count`-th `moment`."""
    torch.set_num_threads(1)
    calls = {
        "step": update.Update.__call__,
        "save": torch.save,
        "saved": checkpoints.save,
    }
    left = [count]

    def wrap(name, before=lambda *a: None, after=lambda *a: None):
        def wrapped(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                before(*args)
            result = calls[name](*args, **options)
            if left[0] == 0:
                after(*args)
            return result

        return wrapped

    def write_half(state, path):
        calls["save"](state, path)
        os.truncate(path.name, path.tell() // 2)
        kill_self()

    if moment == "step":
        update.Update.__call__ = wrap("step", after=lambda *a: kill_self())
    elif moment == "slow":
        update.Update.set_rate = slow(update.Update.set_rate)
    elif moment == "save":
        torch.save = wrap("save", before=write_half)
    elif moment == "saved":
        checkpoints.save = wrap("saved", after=lambda *a, **k: kill_self())
    fit(make_net(), precision=precision, checkpoint=folder / "run.pt")


def start(forked, *arguments):
    process = forked.Process(target=run_and_die, args=arguments)
    process.start()
    return process


def finish(process) -> int:
    process.join(60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(forked, tmp_path_factory):
    """The final checkpoint of a run that nobody stopped, for each precision."""
    found = {}
    for precision in ("float32", "bfloat16") if HAS_BF16 else ("float32",):
        folder = tmp_path_factory.mktemp(precision)
        assert finish(start(forked, folder, precision, "never", 0)) == 0
        found[precision] = train.load_checkpoint(folder / "run.pt")
    return found


MOMENTS = [("step", 1), ("step", 5), ("saved", 1), ("save", 2), ("step", 9)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("moment, count", MOMENTS)
def test_a_killed_run_ends_bit_identical(
    forked, uninterrupted, tmp_path, precision, moment, count
):
    died = finish(start(forked, tmp_path, precision, moment, count))
    assert died == -signal.SIGKILL
    if (tmp_path / "run.pt").exists():  # whole, whatever the moment was
        assert 1 <= len(train.load_checkpoint(tmp_path / "run.pt")["rows"]) < EPOCHS
    assert finish(start(forked, tmp_path, precision, "never", 0)) == 0
    assert_same(uninterrupted[precision], train.load_checkpoint(tmp_path / "run.pt"))


def test_a_run_killed_again_and_again_ends_bit_identical(
    forked, uninterrupted, tmp_path
):
    pause, kills = random.Random(0), 0
    for _ in range(5):
        process = start(forked, tmp_path, "float32", "slow", 0)
        process.join(pause.uniform(0.05, 0.25))
        kills += process.exitcode is None
        process.kill()
        finish(process)
    assert finish(start(forked, tmp_path, "float32", "never", 0)) == 0
    assert_same(uninterrupted["float32"], train.load_checkpoint(tmp_path / "run.pt"))
    assert kills, "every run ended before its kill: this tested nothing"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_model_is_the_uninterrupted_one(tmp_path, monkeypatch, optimizer):
    options = {"optimizer": optimizer, "lr": 0.01, "decay_norms": False, "warmup": 1}
    whole, resumed = make_net(), make_net()
    fit(whole, checkpoint=tmp_path / "whole.pt", **options)
    real, calls = update.Update.set_rate, []

    def stop(self, rate):
        calls.append(rate)
        if len(calls) == 8:
            raise KeyboardInterrupt
        real(self, rate)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(update.Update, "set_rate", stop)
        fit(make_net(), checkpoint=tmp_path / "run.pt", **options)
    history = fit(resumed, checkpoint=tmp_path / "run.pt", **options)
    assert history.resumed == 2 and len(history.rows) == 3
    assert_same(state_of(whole), state_of(resumed))
    ends = [train.load_checkpoint(tmp_path / f"{n}.pt") for n in ("whole", "run")]
    assert_same(*ends)


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    file = tmp_path / "not" / "there" / "yet" / "run.pt"
    first, second = make_net(), make_net()
    done = fit(first, checkpoint=file)
    content = file.read_bytes()
    monkeypatch.setattr(loop, "_run_epoch", None)  # must not be called
    history = fit(second, checkpoint=file)
    assert history.rows == done.rows and history.resumed == EPOCHS
    assert_same(state_of(first), state_of(second))
    assert file.read_bytes() == content


def test_a_failed_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    file, real, calls = tmp_path / "run.pt", torch.save, []

    def save(state, path):
        calls.append(path)
        real(state, path)
        if len(calls) == 2:
            os.truncate(path.name, 100)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"No space left on device: .*run\.pt"):
        fit(make_net(), checkpoint=file)
    assert len(train.load_checkpoint(file)["rows"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    history = fit(make_net(), checkpoint=file)
    assert history.resumed == 1 and len(history.rows) == 3


DAMAGE = {
    "other": lambda state: {"weights": 1},
    "list": lambda state: [1, 2],
    "weights": lambda state: state | {"model": {"0.weight": torch.zeros(3)}},
    "optimizer": lambda state: state | {"optimizer": {}},
}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", *DAMAGE])
def test_a_damaged_checkpoint_is_one_error_that_names_it(tmp_path, damage):
    file = tmp_path / "run.pt"
    fit(make_net(), checkpoint=file)
    if damage in DAMAGE:
        torch.save(DAMAGE[damage](torch.load(file, weights_only=True)), file)
    else:
        whole = file.read_bytes()
        parts = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no weights"}
        file.write_bytes(parts[damage])
    content, model = file.read_bytes(), make_net()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"run\.pt: not a"):
        fit(model, checkpoint=file)
    assert file.read_bytes() == content, "evidence is kept"
    assert damage == "optimizer" or assert_same(before, state_of(model)) is None
    file.rename(tmp_path / "aside.pt")  # what the message says to do
    assert fit(model, checkpoint=file).resumed == 0


def test_a_flipped_bit_is_never_taken_up(tmp_path):
    file, net = tmp_path / "run.pt", torch.nn.Linear(30, 20)
    checkpoints.save(file, {"of": 1}, model=net.state_dict(), rows=[])
    whole, pick = file.read_bytes(), random.Random(0)
    for _ in range(300):
        bits = bytearray(whole)
        bits[pick.randrange(len(bits))] ^= 1 << pick.randrange(8)
        file.write_bytes(bits)
        try:  # a bit that nobody reads, of a padding, does no harm
            state = checkpoints.load(file, ("model",))
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert_same(net.state_dict(), state["model"])
            assert state["identity"] == {"of": 1}


def test_a_full_disk_names_the_file_and_the_cause(tmp_path):
    """Every write beyond 100 kB fails in a child, as on a full disk."""
    program = f"""
import resource, signal, torch
from lib.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.save({str(tmp_path / "run.pt")!r}, {{}}, model=torch.zeros(10**5))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("OSError") and last.endswith(f"{tmp_path}/run.pt'")
    assert "File too large" in last and list(tmp_path.iterdir()) == []


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"identity": Trap()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train.load_checkpoint(tmp_path / "run.pt")
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        train.load_checkpoint(tmp_path / "none.pt")


def make_frozen():
    model = make_net()
    model[0].requires_grad_(False)
    return model


OTHERS = {  # the first word is what differs
    "lr": lambda: (make_net(), make_set(), {"lr": 0.01}),
    "epochs": lambda: (make_net(), make_set(), {"epochs": 2}),
    "seed": lambda: (make_net(), make_set(), {"seed": 1}),
    "start": lambda: (make_net(seed=1), make_set(), {}),
    "trained": lambda: (make_frozen(), make_set(), {}),
    "data: more": lambda: (make_net(), make_set(n=64), {}),
    "data: pixels": lambda: (make_net(), make_set(seed=1), {}),
    "data: labels": lambda: (
        make_net(), replace(make_set(), labels=(make_set().labels + 1) % 4), {}
    ),
    "data: means": lambda: (make_net(), replace(make_set(), mean=(0.5,) * 3), {}),
    "data: crops": lambda: (make_net(), make_set(pad=2), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_put_aside_and_said(tmp_path, capsys, name):
    file = tmp_path / "run.pt"
    fit(make_net(), checkpoint=file)
    old = file.read_bytes()
    model, images, options = OTHERS[name]()
    fresh, _, _ = OTHERS[name]()
    capsys.readouterr()
    history = fit(model, images, checkpoint=file, **options)
    printed = capsys.readouterr().out
    assert history.resumed == 0 and f"another {name.split(':')[0]}" in printed
    assert (tmp_path / "run.pt.old1").read_bytes() == old
    fit(fresh, images, **options)
    assert_same(state_of(fresh), state_of(model))


def test_any_identity_is_taken_up_put_aside_or_refused(tmp_path, capsys):
    file, identity = tmp_path / "arm.pt", {"arm": "gan", "lr": 0.1, "sides": [1, 2]}
    assert checkpoints.take_up(None, identity) is None
    assert checkpoints.take_up(file, identity) is None and not file.exists()
    checkpoints.save(None, identity)
    rows = [{"epoch": 1, "seconds": 0.1, "images_per_s": 9.0}]
    checkpoints.save(file, identity, modules={"w": torch.arange(3)}, rows=rows)
    state = checkpoints.take_up(file, identity, ("modules", "rows"))
    assert state["rows"] == rows and state["modules"]["w"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"arm\.pt: not a .* lacks \['optimizers'\]"):
        checkpoints.take_up(file, identity, ("optimizers",))
    assert checkpoints.take_up(file, identity | {"lr": 0.2, "new": 1}) is None
    assert "arm.pt was made with another lr, new; kept as arm.pt.old1" in (
        capsys.readouterr().out
    )
    assert [path.name for path in tmp_path.iterdir()] == ["arm.pt.old1"]


def test_the_digest_of_an_identity_is_that_of_its_values():
    one = checkpoints.digest_identity({"a": 1, "b": (2, 3)})
    assert one == checkpoints.digest_identity({"b": (2, 3), "a": 1})
    assert one != checkpoints.digest_identity({"a": 1, "b": (3, 2)})
    assert one != checkpoints.digest_identity({"a": 1, "c": (2, 3)})
    assert re.fullmatch("[0-9a-f]{10}", one)


@needs_bf16
def test_another_precision_is_another_run(tmp_path):
    fit(make_net(), checkpoint=tmp_path / "run.pt", precision="float32")
    history = fit(make_net(), checkpoint=tmp_path / "run.pt", precision="bfloat16")
    assert history.resumed == 0, "float32 weights reported as bfloat16"


def test_settings_from_numpy_can_be_taken_up(tmp_path):
    numpy = pytest.importorskip("numpy")
    for _ in range(2):
        options = {"lr": numpy.float64(0.05), "seed": numpy.int64(1)}
        history = fit(make_net(), checkpoint=tmp_path / "run.pt", **options)
    assert history.resumed == EPOCHS


def test_a_checkpoint_keeps_the_kind_and_place_of_the_rate(tmp_path):
    """A rate on a GPU must stay there: a captured step cannot read one elsewhere."""
    file, model, cpu = tmp_path / "run.pt", make_net(), torch.device("cpu")
    optimizer = make_optimizer(model, Recipe(3), cpu)
    for saved, place in [(torch.tensor(0.1), "meta"), (0.1, "cpu")]:
        optimizer.param_groups[0]["lr"] = saved
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save(file, {}, rows=[], **state)
        fresh = make_optimizer(model, Recipe(3), cpu)
        fresh.param_groups[0]["lr"] = torch.empty((), device=place)
        loop._resume(file, {}, model, fresh)
        rate = fresh.param_groups[0]["lr"]
        assert isinstance(rate, torch.Tensor) and rate.device.type == place


# -- the captured update, with a stand-in for CUDA ------------------------------------


class FakeGraph:
    """Records one call while capturing, and makes it again on replay."""

    def replay(self):
        for parameter in self.update.model.parameters():
            parameter.grad = None  # captured gradients are written, not added to
        update.Update._train(self.update, self.update.x, self.update.y)


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """Counts eager and captured calls; `fail` says how a capture ends."""

    def __init__(self, monkeypatch, fail=None):
        self.counts, self.fail, self.sync = {"eager": 0, "captured": 0}, fail, "default"
        for name, value in {
            "Stream": FakeStream, "current_stream": FakeStream, "CUDAGraph": FakeGraph,
            "stream": contextlib.nullcontext, "graph": self.capture,
            "get_sync_debug_mode": lambda: self.sync,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync", mode),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(update.GraphUpdate, "_train", self.train)
        self.capturing = False

    @contextlib.contextmanager
    def capture(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def train(self, x, y):
        self.counts["captured" if self.capturing else "eager"] += 1
        if not self.capturing or self.fail:
            update.Update._train(self.made, x, y)
        if self.capturing and self.fail:
            raise self.fail

    def run(self, model, must=False, replaced=True):
        """Two epochs of 6 full batches and a smaller one: the end and the totals."""
        recipe = Recipe(1, lr=0.05)
        optimizer = make_optimizer(model.train(), recipe, torch.device("cpu"))
        arguments = model, optimizer, recipe, "float32"
        made = update.GraphUpdate(*arguments, must=must)
        self.made = FakeGraph.update = made if replaced else update.Update(*arguments)
        totals = []
        for _ in range(2):
            self.made.start_epoch()
            for x, y in data.batches(make_set(n=100), 16, augment=True):
                self.made.set_rate(0.02)
                self.made(x, y)
            totals.append(self.made.totals())
        return state_of(model), totals


class Waiting(nn.Module):
    """Says what torch says of a network that waits for the GPU, when asked to."""

    def forward(self, x):
        if torch.cuda.get_sync_debug_mode() == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return x


def test_captured_updates_equal_eager_ones(monkeypatch, capsys):
    """The bookkeeping alone: warm-up, copies into the graph, batches of other size."""
    cuda = FakeCuda(monkeypatch)
    eager = cuda.run(make_net(dropout=0.0), replaced=False)
    captured = cuda.run(make_net(dropout=0.0), must=True)
    assert_same(eager, captured)
    assert [seen for _, _, seen in captured[1]] == [100, 100]
    assert cuda.counts == {"eager": 3 + 2, "captured": 1}, "two batches were smaller"
    assert cuda.sync == "default" and capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["waits", "fails"])
def test_what_cannot_be_captured_is_trained_eagerly_and_said_once(
    monkeypatch, capsys, what
):
    """A capture that fails leaves nothing of its half step, even where it ran."""
    error = RuntimeError("operation not permitted\nwhen stream is capturing")
    cuda = FakeCuda(monkeypatch, fail=error if what == "fails" else None)
    nets = [make_net(dropout=0.0) for _ in range(3)]
    if what == "waits":
        for net in nets:
            net.append(Waiting())
    eager = cuda.run(nets[0], replaced=False)
    assert_same(eager, cuda.run(nets[1]))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CUDA graph, the step runs eagerly: ")
    assert ("waits for the GPU" if what == "waits" else "not permitted") in line
    assert cuda.counts["captured"] == (what == "fails") and cuda.sync == "default"
    with pytest.raises(ValueError, match=r"cuda_graph=True: .* cannot be captured"):
        cuda.run(nets[2], must=True)


def test_a_graph_is_for_a_gpu_that_wants_one(monkeypatch):
    made = []
    monkeypatch.setattr(loop, "make_update", lambda *a, **k: made.append(k) or real(*a))
    real = update.Update
    for wanted in ("auto", True, False):
        fit(make_net(), epochs=0, cuda_graph=wanted)
    assert [k["cuda_graph"] for k in made] == ["auto", True, False]
    monkeypatch.undo()
    fit(make_net(), epochs=0, cuda_graph=False)
    with pytest.raises(ValueError, match="cuda_graph=True needs a GPU"):
        fit(make_net(), cuda_graph=True)
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(
        device=torch.device("cuda"))]))  # fmt: skip
    for kind in (update.Update, update.GraphUpdate):
        monkeypatch.setattr(kind, "__init__", lambda *a, **k: None)
    for wanted, kind in (("auto", update.GraphUpdate), (False, update.Update)):
        made = update.make_update(on_gpu, None, None, "float32", cuda_graph=wanted)
        assert type(made) is kind
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cuda_graph must be one of"):
        fit(make_net(), cuda_graph="never")


# -- evaluation ----------------------------------------------------------------------


def by_hand(model, images):
    """One image at a time."""
    hits = hits5 = loss = 0
    model.eval()
    for i in range(len(images)):
        x, y = next(data.batches(images.subset([i]), 1))
        with torch.no_grad():
            output = model(x)[0].double()
        rank = (output > output[y[0]]).sum().item()
        hits, hits5 = hits + (rank < 1), hits5 + (rank < 5)
        loss -= output.log_softmax(0)[y[0]].item()
    n = len(images)
    return {"top1": 100 * hits / n, "top5": 100 * hits5 / n, "loss": loss / n}


@pytest.mark.parametrize("batch_size", [1, 7, 45, 500])
@pytest.mark.parametrize("classes", [10, 3])
def test_evaluate_equals_brute_force(batch_size, classes):
    model, images = make_net(classes=classes), make_set(n=45, classes=classes)
    found = train.evaluate(model, images, batch_size=batch_size)
    assert found == pytest.approx(by_hand(model, images), rel=1e-5)
    assert classes > 5 or found["top5"] == 100


def test_of_equal_outputs_the_first_counts_everywhere():
    model, images = make_net(), make_set(n=45)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    top1 = train.evaluate(model, images)["top1"]
    assert top1 == 100 * train.find_hits(model, images).double().mean().item()
    assert top1 == 100 * (images.labels == 0).double().mean().item()


def test_evaluate_in_float64_is_exact():
    model, images = make_net().double(), make_set(n=45)
    loss, exact = train.evaluate(model, images)["loss"], 0.0
    for x, y in data.batches(images, 45, dtype=torch.float64):
        with torch.no_grad():
            exact = F.cross_entropy(model.eval()(x), y).item()
    assert loss == pytest.approx(exact, rel=1e-12)


def test_evaluate_resizes():
    sizes = []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    model.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    train.evaluate(model, make_set(n=5), resolution=6)
    assert sizes == [(5, 3, 6, 6)]


# -- modes ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["evaluate", "recalibrate"])
@pytest.mark.parametrize("failing", [False, True])
def test_modes_are_put_back(what, failing):
    model = make_net().train()
    model[1].eval()
    model[8].eval()
    before = [module.training for module in model.modules()]
    if failing:
        model[9] = nn.Linear(5, 4)
        with pytest.raises(RuntimeError):
            getattr(train, what)(model, make_set())
    else:
        getattr(train, what)(model, make_set())
    assert [module.training for module in model.modules()] == before
    assert model[1].momentum == 0.1


def test_the_mode_after_fit_does_not_depend_on_resuming(tmp_path):
    modes = []
    for _ in range(2):  # trained, then read
        model = make_net().eval()
        fit(model, make_set(), make_set(), checkpoint=tmp_path / "run.pt")
        modes.append([module.training for module in model.modules()])
    assert modes[0] == modes[1]


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_times_its_algorithms_unless_torch_is_deterministic(wanted, monkeypatch):
    was, seen = torch.backends.cudnn.benchmark, []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    watch = lambda model: seen.append(torch.backends.cudnn.benchmark) or {}  # noqa: E731
    fit(make_net(), epochs=1, watch=watch)
    assert seen == [not wanted] and torch.backends.cudnn.benchmark == was


# -- recalibration -------------------------------------------------------------------


def hand_statistics(model, images, batch_size, **options):
    """Mean over batches of each BatchNorm's input mean and unbiased variance.

    The first BatchNorm's input comes from weights alone; the second's from the first
    one's batch statistics, as in training.
    """
    sums = {1: [0, 0], 4: [0, 0]}
    count = 0
    for x, _ in data.batches(images, batch_size, train=True, **options):
        if count == options.get("limit"):
            break
        x, count = x.double(), count + 1
        for i, module in enumerate(model[:5]):
            if i in sums:
                rows = x.permute(1, 0, 2, 3).flatten(1)
                sums[i][0] += rows.mean(1)
                sums[i][1] += rows.var(1)
                mean, var = rows.mean(1), rows.var(1, correction=0)
                shape = (1, -1, 1, 1)
                x = (x - mean.view(shape)) / (var + module.eps).sqrt().view(shape)
                x = x * module.weight.view(shape) + module.bias.view(shape)
            elif isinstance(module, nn.Conv2d):
                bias = None if module.bias is None else module.bias.double()
                x = F.conv2d(x, module.weight.double(), bias, padding=module.padding)
            else:
                x = module(x)
    return {i: (mean / count, var / count) for i, (mean, var) in sums.items()}, count


@pytest.mark.parametrize(
    "options", [{}, {"resolution": 11}, {"augment": False, "seed": 3}]
)
def test_recalibrate_is_the_average_over_batches(options):
    model, images = make_net(), make_set(n=50)
    fit(model, images, epochs=1)
    before = state_of(model)
    model[1].momentum, model[4].momentum = 0.3, None
    head = model[7:]
    del model[7:]  # any resolution
    with torch.no_grad():
        expected, count = hand_statistics(model, images, 16, **options)
    train.recalibrate(model, images, batch_size=16, **options)
    for i, (mean, var) in expected.items():
        assert_close(model[i].running_mean.double(), mean, atol=1e-5, rtol=1e-4)
        assert_close(model[i].running_var.double(), var, atol=1e-5, rtol=1e-4)
        assert model[i].num_batches_tracked == count == 3
    assert (model[1].momentum, model[4].momentum) == (0.3, None)
    model.extend(head)
    after = state_of(model)
    kept = [name for name in before if "running" not in name and "num_" not in name]
    assert_same({n: before[n] for n in kept}, {n: after[n] for n in kept})


@pytest.mark.parametrize("wanted, counted", [(1, 1), (2, 2), (99, 3)])
def test_recalibrate_over_some_batches(wanted, counted):
    model, images = make_net(), make_set()
    train.recalibrate(model, images, batch_size=16, num_batches=wanted)
    other = make_net()
    part = list(data.batches(images, 16, train=True))[:counted]
    means = torch.stack([other[0](x).mean((0, 2, 3)) for x, _ in part]).mean(0)
    assert_close(model[1].running_mean, means.detach(), atol=1e-6, rtol=1e-5)
    assert model[1].num_batches_tracked == counted


@pytest.mark.parametrize("number", [0, -1])
def test_recalibrate_over_no_batch_does_not_erase_statistics(number):
    model = make_net()
    fit(model, epochs=1)
    before = state_of(model)
    with contextlib.suppress(ValueError):
        train.recalibrate(model, make_set(), num_batches=number)
    assert_same(before, state_of(model))


def test_recalibrate_leaves_norms_without_statistics():
    model = make_net()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    train.recalibrate(model, make_set())
    assert model[1].running_mean is None and model[4].num_batches_tracked == 1


# ---- what a watcher in Jupyter sees ----


@pytest.mark.parametrize("killed", [False, True])
def test_a_bar_goes_and_a_line_stays_finished_or_killed(monkeypatch, capsys, killed):
    tqdm_notebook = pytest.importorskip("tqdm.notebook").tqdm_notebook
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    monkeypatch.setattr(progress, "tqdm", tqdm_notebook)
    monkeypatch.setattr("tqdm.notebook.display", lambda *_: None)
    report = progress.Report(train.Recipe(epochs=2), 3, "base", 0)
    with contextlib.suppress(KeyboardInterrupt), report:
        for epoch in range(1 if killed else 2):
            report.bar.update(3)
            report.tell(f"loss {epoch}", 1.0)
        if killed:
            raise KeyboardInterrupt
    assert report.bar.container.children[1].bar_style != "danger"
    assert report.bar.container.comm is None, "the bar is closed"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("base: epoch 1/2  loss 0" if killed else "base: epoch 2/2  loss 1")
