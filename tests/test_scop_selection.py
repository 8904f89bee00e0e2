"""Selection: `beta` is what a plain rendering of the method gives, and nothing else."""

import copy
import functools
import io
import pickle
import random
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import cost, data, models, stages, surgery, train
from lib import plan as plans
from lib.scop import selection
from lib.scop.controls.base import Control, NoControl, Noise, Shuffle
from lib.scop.selection import Betas, MixedNet, importance, select

SHAPE = (1, 14, 14)
ONCE = {"epochs": 1, "batch_size": 16, "precision": "float32", "device": "cpu"}
TINY = ["one.conv1", "one.conv2", "two.conv1", "two.conv2"]
CPU_PRECISION = 1e-6  # betas come back in float32

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def digits(count: int = 32, side: int = 14) -> data.ImageSet:
    """MNIST digits at half their size, or padded with black."""
    found = data.load("mnist5k", "train").take(count)
    pixels = found.images
    if side == 14:
        return replace(found, images=pixels[:, ::2, ::2].contiguous(), pad=1)
    edge = (side - 28) // 2
    return replace(found, images=F.pad(pixels, (0, 0, edge, edge, edge, edge)))


class Tiny(nn.Module):
    """A stem, two residual blocks (one with a projection), dropout, a classifier."""

    def __init__(self, dropout: float = 0.0, aux: bool = False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one = models.BasicBlock(4, 4)
        self.two = models.BasicBlock(4, 6, stride=2, projection=True)
        self.drop, self.linear = nn.Dropout(dropout), nn.Linear(6, 10)
        self.aux = nn.Linear(4, 10) if aux else None

    def forward(self, x):
        one = self.one(F.relu(self.bn(self.conv(x))))
        logits = self.linear(self.drop(self.two(one).mean((2, 3))))
        if self.aux is not None and self.training:
            return logits, self.aux(one.mean((2, 3)))
        return logits


def tiny(**options) -> Tiny:
    torch.manual_seed(1)
    return oracle.roughen(Tiny(**options))


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(1)
    options = {"in_channels": 1} | options
    return oracle.roughen(models.build(name, **options))


class Made(Control):
    """A control that does what it is told, and remembers the sizes of its batches."""

    name = "made"

    def __init__(self, make, shape=SHAPE):
        super().__init__(shape)
        self.how, self.seen = make, []

    def make(self, batch):
        self.seen.append(len(batch))
        return self.how(batch)


def turned(batch):
    """Another image, upside down: depends on nothing random."""
    return batch.roll(1, 0).flip(2)


def mix(model, control, layers=None, shape=SHAPE) -> MixedNet:
    return MixedNet(
        model, control, selection._pick_layers(model, shape, layers)
    ).train()


def parameters_of(mixed: MixedNet) -> dict[str, nn.Parameter]:
    return {n: mixed.net.get_submodule(m).share for n, m in mixed.norms.items()}


def set_betas(mixed: MixedNet, values) -> None:
    """Random betas in [0, 1] from a seed, or one number."""
    g = torch.Generator().manual_seed(values if isinstance(values, int) else 0)
    with torch.no_grad():
        for beta in parameters_of(mixed).values():
            drawn = torch.rand(len(beta), generator=g, dtype=torch.float64)
            beta.copy_(drawn if isinstance(values, int) else torch.tensor(values))


def batch(dtype=torch.float64, count: int = 12):
    x, y = next(data.batches(digits(), count, dtype=dtype))
    return x.contiguous(), y


def gradients(mixed: MixedNet, x, y) -> dict[str, torch.Tensor]:
    found = parameters_of(mixed)
    grads = torch.autograd.grad(F.cross_entropy(mixed(x), y), list(found.values()))
    return dict(zip(found, grads, strict=True))


def assert_same(a: dict, b: dict) -> None:
    """Equal to the bit."""
    assert a.keys() == b.keys() and len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


def numbers(betas: Betas) -> list[dict]:
    """The history without what a clock says."""
    clocks = {"seconds", "images_per_s"}
    return [{k: v for k, v in r.items() if k not in clocks} for r in betas.history]


# -- against a plain rendering --------------------------------------------------------


def normalise(x, norm):
    """Training-mode BatchNorm, written out."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True,
                                                        correction=0)  # fmt: skip
    gamma, shift = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    return (x - mean) / (var + norm.eps).sqrt() * gamma + shift


def plain_logits(net: Tiny, x, control, betas):
    """Tiny in training mode with its features mixed, image by image's control."""
    n = len(x)

    def select_in(name, features):
        beta = betas[name].view(1, -1, 1, 1)
        real, knock = features[:n], features[n:]
        return torch.cat([beta * real + (1 - beta) * knock, knock])

    h = F.relu(normalise(net.conv(torch.cat([x, control])), net.bn))
    for name, stride in (("one", 1), ("two", 2)):
        block = net.get_submodule(name)
        y = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
        y = F.relu(normalise(select_in(f"{name}.conv1", y), block.bn1))
        y = F.conv2d(y, block.conv2.weight, padding=1)
        y = normalise(select_in(f"{name}.conv2", y), block.bn2)
        side = F.conv2d(h, block.shortcut.weight, stride=2) if stride == 2 else h
        h = F.relu(y + side)
    return net.linear(h.mean((2, 3)))[:n]


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_are_those_of_the_plain_rendering(seed):
    net, control = tiny().double(), Made(turned)
    mixed = mix(net, control)
    assert list(mixed.norms) == TINY
    set_betas(mixed, seed)
    x, y = batch()
    betas = {n: b.detach().clone() for n, b in parameters_of(mixed).items()}
    betas = {n: b.requires_grad_() for n, b in betas.items()}
    wanted = plain_logits(net, x, control.sample(x), betas)
    assert torch.allclose(mixed(x), wanted, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(F.cross_entropy(wanted, y), list(betas.values()))
    found = gradients(mixed, x, y)
    for name, grad in zip(betas, grads, strict=True):
        assert grad.abs().max() > 1e-5
        assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-14), name


def plain_select(net, images, control, *, epochs, batch_size, lr, seed):
    """Adam written out, each step projected to [0, 1]."""
    dtype = net.linear.weight.dtype
    wide = {n: len(net.get_submodule(n).weight) for n in TINY}
    betas = {n: torch.full((c,), 0.5, dtype=dtype) for n, c in wide.items()}
    first = {n: torch.zeros_like(b) for n, b in betas.items()}
    second, steps, touched = copy.deepcopy(first), 0, 0
    for epoch in range(epochs):
        stream = data.batches(images, batch_size, train=True, seed=seed, epoch=epoch,
                              dtype=dtype)  # fmt: skip
        for x, y in stream:
            steps += 1
            betas = {n: b.detach().requires_grad_() for n, b in betas.items()}
            loss = F.cross_entropy(plain_logits(net, x, control.sample(x), betas), y)
            grads = torch.autograd.grad(loss, list(betas.values()))
            for (name, beta), g in zip(list(betas.items()), grads, strict=True):
                first[name] = 0.5 * first[name] + 0.5 * g
                second[name] = 0.9 * second[name] + 0.1 * g * g
                scale = (second[name] / (1 - 0.9**steps)).sqrt() + 1e-8
                step = first[name] / (1 - 0.5**steps) / scale
                moved = beta.detach() - lr * step
                betas[name] = moved.clamp(0, 1)
                touched += int((moved != betas[name]).sum())
    return betas, touched


@pytest.mark.parametrize(
    ("dtype", "lr", "tolerance"),
    [(torch.float64, 0.12, CPU_PRECISION), (torch.float32, 0.004, 1e-4)],
)
def test_select_takes_projected_adam_steps(dtype, lr, tolerance):
    net, control = tiny().to(dtype), Made(turned)
    settings = {"epochs": 3, "batch_size": 12, "lr": lr, "seed": 5}
    wanted, touched = plain_select(net, digits(), control, **settings)
    found = select(net, digits(), control, precision="float32", **settings)
    assert list(found) == TINY and (touched > 0) == (lr > 0.1)
    for name, beta in found.items():
        assert beta.dtype == torch.float32 and not beta.requires_grad
        assert (beta - wanted[name].float()).abs().max() < tolerance, name
        assert (beta - 0.5).abs().max() > lr


def test_other_layers_stay_plain_when_some_are_named():
    net, control = tiny().double(), Made(turned)
    mixed = mix(net, control, ["two.conv1"])
    set_betas(mixed, 3)
    x, _ = batch()
    betas = {n: torch.ones(c).double() for n, c in zip(TINY, (4, 4, 6, 6), strict=True)}
    betas["two.conv1"] = parameters_of(mixed)["two.conv1"]
    wanted = plain_logits(net, x, control.sample(x), betas)
    assert torch.allclose(mixed(x), wanted, rtol=0, atol=1e-12)
    assert list(select(net, digits(), control, layers=["two.conv1"], **ONCE)) == [
        "two.conv1"
    ]


# -- identities of the method ---------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "resnet8_b", "tiny"])
def test_images_as_their_own_control_give_the_plain_training_pass(name):
    net = (tiny() if name == "tiny" else build(name)).double()
    mixed = mix(net, Made(torch.clone))
    x, y = batch()
    plain = copy.deepcopy(net).train()(x)
    for values in (1.0, 0.0, 7):  # it does not matter which one is taken
        set_betas(mixed, values)
        assert torch.allclose(mixed(x), plain, rtol=0, atol=1e-10)
        largest = max(g.abs().max() for g in gradients(mixed, x, y).values())
        assert largest < 1e-14
    other = mix(net, Made(turned))
    assert max(g.abs().max() for g in gradients(other, x, y).values()) > 1e-4


def test_only_images_reach_the_logits_at_one_and_only_controls_at_zero():
    """Without shortcuts around it the first block's input is all that is left."""
    net, x = tiny().double(), batch()[0]
    mixed = mix(net, Made(turned))
    seen = []
    mixed.net.one.bn2.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    for value in (0.0, 1.0):
        set_betas(mixed, value)
        mixed(x)
    (_, none), (before, every) = seen
    n = len(x)
    assert torch.allclose(none[:n], none[n:])
    assert not torch.allclose(every[:n], every[n:])
    assert torch.allclose(every, normalise(before, net.one.bn2), rtol=0, atol=1e-12)


def test_the_controls_half_stays_pure():
    net, x = tiny().double(), batch()[0]
    control = Made(turned)
    mixed = mix(net, control, ["one.conv1"])
    seen = {}
    mixed.net.one.conv1.register_forward_hook(lambda m, a, y: seen.update(conv=y))
    hook = mixed.net.one.bn1.register_forward_hook(lambda m, a, y: seen.update(bn=y))
    set_betas(mixed, 2)
    mixed(x)
    hook.remove()
    n, norm = len(x), net.one.bn1
    beta = parameters_of(mixed)["one.conv1"].view(1, -1, 1, 1)
    real, knock = seen["conv"][:n], seen["conv"][n:]
    joint = torch.cat([beta * real + (1 - beta) * knock, knock])
    mean, deviation = joint.mean((0, 2, 3)), joint.var((0, 2, 3), correction=0)
    scale = norm.weight / (deviation + norm.eps).sqrt()
    wanted = (knock - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
    wanted = wanted + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(seen["bn"][n:], wanted, rtol=0, atol=1e-12)


def test_every_control_image_matters_but_has_no_loss_of_its_own():
    net, (x, y) = tiny().double(), batch()
    images = [torch.randn_like(x, generator=torch.Generator().manual_seed(4))]
    mixed = mix(net, Made(lambda b: images[0].float()))
    set_betas(mixed, 1)
    logits = mixed(x)
    assert logits.shape == (len(x), 10)
    before = gradients(mixed, x, y)
    for i in range(len(x)):
        changed = images[0].clone()
        changed[i] += 1
        images.append(changed)
        again = mix(net, Made(lambda b, c=changed: c.float()))
        set_betas(again, 1)
        now = gradients(again, x, y)
        assert (now["one.conv1"] - before["one.conv1"]).abs().max() > 1e-7


def test_one_control_for_all_images_still_selects():
    found = select(tiny(), digits(), Made(torch.zeros_like), **ONCE)
    assert all((beta != 0.5).all() for beta in found.values())


def test_betas_stay_between_zero_and_one_however_large_the_steps():
    net = build("resnet8")
    found = select(net, digits(), Noise(SHAPE), lr=0.7, **ONCE | {"epochs": 2})
    every = torch.cat(list(found.values()))
    assert every.min() == 0 and every.max() == 1
    assert set(found.history[-1]) >= {"beta_mean", "beta_sd", "below_half"}
    importance(net, found)


def test_rows_of_the_history_describe_the_betas():
    net = build("resnet8")
    found = select(net, digits(), Shuffle(SHAPE), lr=0.05, **ONCE | {"epochs": 2})
    every = torch.cat(list(found.values()))
    first, last = found.history
    assert (first["epoch"], last["epoch"], last["lr"]) == (1, 2, 0.05)
    assert last["beta_mean"] == pytest.approx(float(every.mean()), abs=1e-7)
    assert last["beta_sd"] == pytest.approx(float(every.std()), abs=1e-7)
    assert last["below_half"] == pytest.approx(float((every < 0.5).float().mean()))
    assert 0 < last["below_half"] < 1 and -1 <= last["rank_with_gamma"] <= 1
    assert first["beta_mean"] != last["beta_mean"] and first["loss"] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "sgd"), ("weight_decay", 5e-4), ("schedule", "cosine"),
     ("adam_betas", (0.9, 0.999))],
)  # fmt: skip
def test_settings_that_are_the_methods_are_not_passed_over(name, value):
    net = tiny()
    with pytest.raises(ValueError, match=f"{name} of a selection is .*got") as refusal:
        select(net, digits(), Noise(SHAPE), **ONCE, **{name: value})
    assert "\n" not in str(refusal.value)
    told = ONCE | {name: selection.METHOD[name]}
    assert select(net, digits(), Noise(SHAPE), **told)


def test_what_the_method_replaces_in_a_recipe_makes_no_other_file(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path))
    parts = stages.Sets(digits(), digits(), digits())
    base = stages.Base(tiny(), parts, run="toy/x", net="tiny")
    plain = train.Recipe(1, lr=0.01, batch_size=16)
    for recipe in (plain, replace(plain, weight_decay=0.0, optimizer="adam")):
        selection.learn_betas(base, "noise", recipe=recipe)
    (path,) = (tmp_path / "toy" / "betas").glob("*.pt")
    assert path.stem.endswith("-noise-1epochs-lr0.01-batch_size16-seed0")


def test_ranks_agree_with_gamma_when_betas_say_nothing():
    gamma = {"a": torch.tensor([0.1, 0.4, 0.2, 0.9])}
    same, opposed = {"a": torch.full((4,), 0.9)}, {"a": torch.full((4,), 0.1)}
    assert selection.correlate_ranks(same, gamma) == pytest.approx(1)
    assert selection.correlate_ranks(opposed, gamma) == pytest.approx(-1)
    mixed = {"a": torch.tensor([0.9, 0.4, 0.9, 0.51])}  # .08 -.08 .16 .018
    assert selection.correlate_ranks(mixed, gamma) == pytest.approx(-0.6)


def test_classes_may_change_names():
    net, images = tiny().double(), digits()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.linear.weight[order] = net.linear.weight
        other.linear.bias[order] = net.linear.bias
    renamed = replace(images, labels=order[images.labels])
    a = select(net, images, Made(turned), lr=0.02, **ONCE)
    b = select(other, renamed, Made(turned), lr=0.02, **ONCE)
    c = select(net, renamed, Made(turned), lr=0.02, **ONCE)
    for name in a:
        assert (a[name] - b[name]).abs().max() < CPU_PRECISION
    assert any((a[name] - c[name]).abs().max() > 0.01 for name in a)


@pytest.mark.parametrize("arm", [Shuffle, Noise])
def test_a_seed_decides_everything(arm):
    net = tiny(dropout=0.5)
    first = select(net, digits(), arm(SHAPE), seed=1, **ONCE)
    torch.manual_seed(99)
    assert_same(first, select(net, digits(), arm(SHAPE), seed=1, **ONCE))
    other = select(net, digits(), arm(SHAPE), seed=2, **ONCE)
    assert not all(torch.equal(first[n], other[n]) for n in first)


# -- the model is left alone ----------------------------------------------------------


def snapshot(model) -> dict:
    """Whatever could have been changed."""
    facts = {f"mode {n}": m.training for n, m in model.named_modules()}
    facts |= {f"type {n}": type(m) for n, m in model.named_modules()}
    facts |= {f"grad {n}": p.requires_grad for n, p in model.named_parameters()}
    facts |= {f"has {n}": p.grad is None for n, p in model.named_parameters()}
    facts |= {f"id {n}": id(t) for n, t in model.state_dict(keep_vars=True).items()}
    norms = (nn.BatchNorm2d, nn.Dropout)
    for name, module in model.named_modules():
        if isinstance(module, norms):
            facts[f"repr {name}"] = repr(module)
    return facts


@pytest.mark.parametrize("arm", [Shuffle, NoControl])
@pytest.mark.parametrize("name", ["resnet8", "tiny"])
def test_select_leaves_the_model_and_the_generators_as_they_were(name, arm):
    net = tiny(dropout=0.5) if name == "tiny" else build(name)
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    list(net.parameters())[2].requires_grad_(False)
    facts, state = snapshot(net), copy.deepcopy(net.state_dict())
    x, _ = batch(torch.float32)
    before = oracle.evaluate(copy.deepcopy(net), x)
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = select(net, digits(), arm(SHAPE), lr=0.1, **ONCE)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (np.random.get_state()[1] == rng[1]).all() and random.getstate() == rng[2]
    assert snapshot(net) == facts
    assert_same(net.state_dict(), state)
    assert torch.equal(oracle.evaluate(copy.deepcopy(net), x), before)
    start = 1.0 if arm is NoControl else 0.5
    assert any((beta != start).any() for beta in found.values())


def test_evaluation_does_not_know_of_betas():
    net, x = build("resnet8").double(), batch()[0]
    mixed = mix(net, Shuffle(SHAPE))
    wanted = oracle.evaluate(copy.deepcopy(net), x)
    for values in (0.0, 3):
        set_betas(mixed, values)
        assert torch.allclose(oracle.evaluate(mixed, x), wanted, rtol=0, atol=1e-12)


def test_only_betas_are_trained():
    mixed = mix(tiny(dropout=0.3), Shuffle(SHAPE))
    trained = [n for n, p in mixed.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(n.endswith(".share") for n in trained)


# -- resuming -------------------------------------------------------------------------


LONG = ONCE | {"epochs": 4, "lr": 0.3}  # steps that end outside [0, 1]


class Failing(Shuffle):
    """Shuffles, and breaks off at a given batch."""

    def __init__(self, last: int):
        super().__init__(SHAPE)
        self.left = last

    def make(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().make(batch)


@pytest.mark.parametrize("done", [1, 3])
def test_interrupted_inside_an_epoch_and_resumed_is_the_same_to_the_bit(done, tmp_path):
    net, path = tiny(dropout=0.4), tmp_path / "beta.pt"
    whole = select(net, digits(), Shuffle(SHAPE), **LONG)
    with pytest.raises(KeyboardInterrupt):
        select(net, digits(), Failing(2 * done + 1), checkpoint=path, **LONG)
    torch.manual_seed(11)
    again = select(net, digits(), Failing(2 * (4 - done)), checkpoint=path, **LONG)
    assert_same(whole, again)
    assert numbers(whole) == numbers(again) and again.norms == whole.norms


def test_interrupted_between_epochs_and_resumed_is_the_same_to_the_bit(
    tmp_path, monkeypatch
):
    net, path, calls = tiny(dropout=0.4), tmp_path / "beta.pt", []
    whole = select(net, digits(), Noise(SHAPE), **LONG)

    def watch(mixed, real=selection._describe):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(mixed)

    monkeypatch.setattr(selection, "_describe", watch)
    with pytest.raises(KeyboardInterrupt):
        select(net, digits(), Noise(SHAPE), checkpoint=path, **LONG)
    again = select(net, digits(), Noise(SHAPE), checkpoint=path, **LONG)
    assert len(calls) == 3 + 2
    assert_same(whole, again)
    assert numbers(whole) == numbers(again)


def test_a_finished_selection_is_read_from_its_checkpoint(tmp_path):
    net, path = tiny(), tmp_path / "beta.pt"
    first = select(net, digits(), Shuffle(SHAPE), checkpoint=path, **LONG)
    assert_same(first, select(net, digits(), Failing(0), checkpoint=path, **LONG))


@pytest.mark.parametrize("change", ["control", "state", "layers", "weights", "seed"])
def test_a_checkpoint_of_something_else_is_put_aside(change, tmp_path, capsys):
    def control(value=0.0):
        made = Made(turned)
        made.register_buffer("learnt", torch.full((2,), value))
        return made

    net, path, options = tiny(), tmp_path / "beta.pt", dict(ONCE)
    select(net, digits(), control(), checkpoint=path, **options)
    other, arm = copy.deepcopy(net), control()
    if change == "control":
        arm = Shuffle(SHAPE)
    elif change == "state":
        arm = control(1.0)
    elif change == "layers":
        options["layers"] = TINY[:2]
    elif change == "weights":
        other.linear.weight.data[0, 0] += 1
    else:
        options["seed"] = 1
    fresh = select(other, digits(), arm, **options)
    found = select(other, digits(), arm, checkpoint=path, **options)
    assert_same(fresh, found)
    assert "was made with another" in capsys.readouterr().out
    assert (tmp_path / "beta.pt.old1").exists()


# -- networks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "side", "layers"),
    [
        ("resnet8", 32, 28, 6),
        ("resnet8_b", 32, 14, 6),
        ("resnet18", 8, 32, 16),
        ("mobilenet_v2_cifar", 8, 14, 49),
    ],
)
@pytest.mark.parametrize("arm", [Shuffle, NoControl])
def test_selection_runs_and_moves_every_layer(name, count, side, layers, arm):
    net, shape = build(name), (1, side, side)
    images = digits(count, side) if side != 28 else data.load("mnist5k", "train")
    images = images.take(count)
    batch_size = min(count, 16)
    found = select(net, images, arm(shape), **ONCE | {"batch_size": batch_size})
    start = 1.0 if arm is NoControl else 0.5
    assert len(found) == layers
    for layer, beta in found.items():
        assert len(beta) == net.get_submodule(layer).out_channels
        assert (beta != start).any(), layer
    assert importance(net, found).keys() == found.keys()


def test_heads_beside_the_main_one_have_no_say():
    plain, headed = tiny(), tiny(aux=True)
    headed.load_state_dict(plain.state_dict(), strict=False)
    a = select(plain, digits(), Made(turned), **ONCE)
    assert_same(a, select(headed, digits(), Made(turned), **ONCE))


def test_auxiliary_heads_of_googlenet_are_no_obstacle():
    net = build("googlenet", aux_logits=True, init_weights=False)
    layers = ["inception3a.branch1.conv", "inception5b.branch4.1.conv"]
    options = ONCE | {"batch_size": 4, "layers": layers}
    found = select(net, digits(4, 32), Shuffle((1, 32, 32)), **options)
    assert all((beta != 0.5).any() for beta in found.values())


def test_a_double_precision_net_stays_one():
    net, types = tiny().double(), []
    control = Made(lambda b: types.append(b.dtype) or turned(b))
    net.linear.register_forward_pre_hook(lambda m, a: types.append(a[0].dtype))
    found = select(net, digits(), control, **ONCE | {"precision": "auto"})
    assert types == [torch.float32, torch.float64] * 2
    assert all(beta.dtype == torch.float32 for beta in found.values())


class Plain(nn.Module):
    """Convolutions in a row, in a Sequential; `alias` gives them second names."""

    def __init__(self, alias: bool):
        super().__init__()
        conv1, bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        conv2, bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        if alias:
            self.conv1, self.bn1, self.conv2, self.bn2 = conv1, bn1, conv2, bn2
        relus = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.features = nn.Sequential(conv1, bn1, relus[0], conv2, bn2, relus[1])
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.features(x).mean((2, 3)))


def plain(*, alias: bool = False) -> Plain:
    torch.manual_seed(2)
    return oracle.roughen(Plain(alias))


def test_modules_with_two_names_are_mixed_under_both():
    one = select(plain(), digits(), Made(turned), **ONCE)
    two = select(plain(alias=True), digits(), Made(turned), **ONCE)
    assert list(two) == ["conv2"]
    assert_same(one, {"features.3": two["conv2"]})


def test_a_norm_with_two_names_is_replaced_under_both():
    net = plain(alias=True)
    outer = selection.MixedNorm(net.bn2)
    selection._put_around(net, "bn2", outer)
    assert net.bn2 is outer and net.features[4] is outer and outer.norm is not outer
    assert isinstance(outer.norm, nn.BatchNorm2d)


def test_bfloat16_gives_nearly_the_same():
    net, options = tiny(), ONCE | {"lr": 0.02}
    full = select(net, digits(), Made(turned), **options)
    half = select(net, digits(), Made(turned), **options | {"precision": "bfloat16"})
    a, b = (torch.cat(list(found.values())) for found in (full, half))
    assert a.dtype == b.dtype == torch.float32 and not torch.equal(a, b)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("count", "batch_size", "seen"),
    [(20, 16, [16]), (10, 64, [10]), (32, 16, [16, 16])],
)
def test_batches_of_images_and_controls_are_of_one_size(count, batch_size, seen):
    control, sizes, net = Made(turned), [], tiny()
    net.conv.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    images = digits().take(count)
    found = select(net, images, control, **ONCE | {"batch_size": batch_size})
    assert control.seen == seen
    assert sizes == [2 * n for n in seen]
    assert (found["one.conv1"] != 0.5).any()


# -- the arm without a control --------------------------------------------------------


def test_without_control_gates_stand_behind_the_norm_and_no_control_is_sampled():
    net, (x, y) = tiny().double(), batch()
    mixed, sizes = mix(net, NoControl(SHAPE)), []
    plain = copy.deepcopy(net).train()(x)
    assert torch.allclose(mixed(x), plain, rtol=0, atol=1e-12)  # gates start at one
    mixed.net.conv.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    grads = gradients(mixed, x, y)
    assert sizes == [len(x)]
    assert all(g.abs().max() > 1e-5 for g in grads.values())
    set_betas(mixed, 0.0)  # nothing of a block but its shortcut is left
    side = copy.deepcopy(net).train()
    h = F.relu(side.bn(side.conv(x)))
    wanted = side.linear(F.relu(side.two.shortcut(h)).mean((2, 3)))
    assert torch.allclose(mixed(x), wanted, rtol=0, atol=1e-12)


COPIES = {
    "itself": lambda betas: betas,
    "dict": dict,
    "copy": lambda betas: betas.copy(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda betas: pickle.loads(pickle.dumps(betas)),
    "filtered": lambda betas: {n: b for n, b in betas.items() if b.numel()},
    "saved": lambda betas: save_and_load(dict(betas)),
}


def save_and_load(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("how", COPIES)
def test_importance_without_a_control_is_the_scale_times_the_gate(how):
    net, gates = tiny(), {}
    mixed = mix(net, NoControl(SHAPE))
    set_betas(mixed, 3)
    for name, gate in parameters_of(mixed).items():
        gates[name] = gate.detach()
    found = Betas(mixed.read_betas(), norms=mixed.norms)
    assert all(0.5 <= beta.min() and beta.max() <= 1 for beta in found.values())
    for name, score in importance(net, COPIES[how](found)).items():
        gamma = net.get_submodule(mixed.norms[name]).weight.detach().abs()
        torch.testing.assert_close(score, gamma * gates[name], rtol=1e-5, atol=1e-7)


# -- refusals -------------------------------------------------------------------------


def test_layers_that_are_no_pairs_are_refused_by_name():
    net = tiny()
    for name in ("one.conv3", "one.bn1", "linear", "two.shortcut"):
        with pytest.raises(ValueError, match=f"layers: '{name}' is not a convolution"):
            select(net, digits(), Shuffle(SHAPE), layers=["one.conv1", name], **ONCE)
    with pytest.raises(ValueError, match="layers: nothing to select in"):
        select(net, digits(), Shuffle(SHAPE), layers=[], **ONCE)


@pytest.mark.parametrize("name", ["densenet40", "lenet"])
def test_nets_without_a_norm_behind_a_convolution_are_refused(name):
    images = data.load("mnist5k", "train").take(4)
    net = build(name, image_size=28) if name == "lenet" else build(name)
    with pytest.raises(ValueError, match="has no convolution followed by a BatchNorm"):
        select(net, images, Shuffle(images.shape), **ONCE)


def test_a_control_of_other_images_is_refused():
    wanted = r"control 'shuffle' was built for .* \[3, 14, 14\], got \[1, 14, 14\]"
    with pytest.raises(ValueError, match=wanted):
        select(tiny(), digits(), Shuffle((3, 14, 14)), **ONCE)


@pytest.mark.parametrize("how", [lambda b: b[:, :, 1:], lambda b: b[1:]])
def test_a_control_that_makes_another_shape_is_refused(how):
    with pytest.raises(ValueError, match="control 'made' made a batch of shape"):
        select(tiny(), digits(), Made(how), **ONCE)


class Root(Tiny):
    """Finite, but its gradient is not: the slope of a square root at zero."""

    def forward(self, x):
        h = self.two(self.one(F.relu(self.bn(self.conv(x)))))
        return self.linear((h + (h * 0).sqrt()).mean((2, 3)))


def test_betas_that_are_not_finite_are_refused_by_layer():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"beta of 'one\.conv1' is not finite"):
        select(Root(), digits(), Shuffle(SHAPE), **ONCE | {"batch_size": 32})
    with pytest.raises(ValueError, match=r"beta of 'one\.conv1' is not") as caught:
        select(Root(), digits(), Shuffle(SHAPE), **ONCE)
    assert "diverged in epoch 1" in str(caught.value.__context__)


@pytest.mark.parametrize("betas", [dict, Betas])
def test_importance_refuses_bad_betas_by_layer(betas):
    net, good = tiny(), torch.full((4,), 0.5)
    norms = {"norms": {"one.conv1": "one.bn1"}} if betas is Betas else {}
    cases = {
        "beta of 'one.conv1' is not finite": good.where(good < 0, torch.nan),
        "beta of 'one.conv1' leaves": good - 0.501,
        "beta of 'one.conv1' leaves ": good + 0.501,
        "beta of 'one.conv1' has shape .5., the layer has 4": torch.ones(5),
        "beta of 'one.conv1' has shape .4, 1., the": torch.ones(4, 1),
    }
    for message, beta in cases.items():
        with pytest.raises(ValueError, match=message):
            importance(net, betas({"one.conv1": beta}, **norms))
    assert importance(net, betas({"one.conv1": good}, **norms))["one.conv1"].eq(0).all()


@pytest.mark.parametrize("betas", [dict, Betas])
@pytest.mark.parametrize("name", ["layer1.0.conv1", "two.shortcut"])
def test_betas_of_another_net_are_refused_by_layer(betas, name):
    norms = {"norms": {name: "layer1.0.bn1"}} if betas is Betas else {}
    with pytest.raises(ValueError, match=f"'{name}' has no BatchNorm"):
        importance(tiny(), betas({name: torch.ones(6)}, **norms))


# -- from betas to a pruned network ---------------------------------------------------


def drawn(net, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    layers = selection._pick_layers(net, SHAPE, None)
    wide = {n: net.get_submodule(n).out_channels for n in layers}
    return {n: torch.rand(c, generator=g) for n, c in wide.items()}


def test_importance_is_the_scale_times_the_difference():
    net = build("resnet8")
    betas = drawn(net)
    scores = importance(net, betas)
    for name, beta in betas.items():
        gamma = net.get_submodule(name.replace("conv", "bn")).weight.detach().abs()
        wanted = gamma * (beta - (1 - beta))
        assert scores[name].dtype == torch.float32 and not scores[name].requires_grad
        assert torch.allclose(scores[name], wanted, rtol=0, atol=1e-6)
    named = Betas(betas, norms=selection._pick_layers(net, SHAPE, None))
    assert_same(scores, importance(net, named))


def test_exchanging_image_and_control_turns_the_sign():
    net = build("resnet8")
    betas = drawn(net)
    turned_round = importance(net, {n: 1 - beta for n, beta in betas.items()})
    for name, score in importance(net, betas).items():
        assert torch.allclose(score, -turned_round[name], rtol=0, atol=1e-6)
        assert (score > 0).any() and (score < 0).any()


def test_the_sign_of_the_scale_does_not_matter():
    net = build("resnet8")
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[::2] *= -1
    named = Betas(drawn(net), norms=selection._pick_layers(net, SHAPE, None))
    for betas in (drawn(net), named):
        assert_same(importance(net, betas), importance(other, betas))


@pytest.mark.parametrize(
    ("rate", "kept"),
    [(0.45, (9, 18, 36)), (0.4374, (10, 19, 37)), (0.4375, (9, 18, 36)),
     (0.05, (16, 31, 61)), (0.99, (1, 1, 1))],
)  # fmt: skip
def test_rates_are_rounded_down_to_whole_channels(rate, kept):
    net = build("resnet8")
    scores = importance(net, drawn(net))
    plan = plans.from_scores(net, scores, SHAPE, rate=rate, residual="scatter")
    for name, score in scores.items():
        wanted = kept[int(name[5]) - 1]
        alive = plan.keep.get(name, list(range(len(score))))
        assert len(alive) == wanted, name
        assert set(alive) == set(score.topk(wanted).indices.tolist())


def test_neither_sign_of_the_score_protects_a_channel():
    net = build("resnet8")
    for value in (0.9, 0.1):
        betas = {n: torch.full_like(b, value) for n, b in drawn(net).items()}
        scores = importance(net, betas)
        plan = plans.from_scores(net, scores, SHAPE, rate=0.5, residual="scatter")
        assert all(2 * len(plan.keep[n]) == len(s) for n, s in scores.items())


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", ["resnet8", "resnet8_b"])
def test_a_selection_prunes_and_the_shrunk_net_is_the_masked_one(name, residual):
    net = build(name)
    found = select(net, digits(), Shuffle(SHAPE), lr=0.1, **ONCE)
    scores = importance(net, found)
    plan = plans.from_scores(net, scores, SHAPE, rate=0.45, residual=residual)
    assert bool(plan.scatter) == (residual == "scatter")
    x, _ = batch(torch.float32)
    small = surgery.shrink(net, plan, SHAPE)
    masked = surgery.mask(net, plan, SHAPE)
    assert oracle.difference(*(oracle.evaluate(m, x) for m in (small, masked))) < 1e-5
    assert small.layer3[0].conv1.out_channels == 36
    assert (small.conv1.out_channels == 16) == (residual == "scatter")
    down = cost.count(small, SHAPE).down_from(cost.count(net, SHAPE))
    assert down["macs_down"] > 40
