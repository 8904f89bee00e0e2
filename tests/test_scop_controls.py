"""Controls: what each arm makes; trainings killed, read back, refused."""

import copy
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lib import data
from lib.kernels import mmd2
from lib.scop.controls import ARMS, build_control, reduced, swap_gan, training
from lib.scop.controls.base import Shuffle, correlate
from lib.scop.controls.gan import Generator
from lib.train.recipe import pick_device, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "generator": {"width": 4, "batch_size": 32},
    "swap_gan": {"width": 8, "batch_size": 32},
    "deep": {"components": 6, "width": 16, "batch_size": 60},
    "gaussian": {"components": 6},
}
TRAINED = ["generator", "swap_gan", "deep"]
SAMPLED = [name for name in ARMS if name != "none"]


@pytest.fixture(scope="module")
def images():
    return data.load("mnist5k", "train").take(200)


def build(name, images, *, epochs=2, numbers=None, **options):
    """The control, as small as `SMALL` and with other `numbers` of its class."""
    chosen = {"device": "cpu", "epochs": epochs} | options
    with pytest.MonkeyPatch.context() as changed:
        for number, value in (SMALL.get(name, {}) | (numbers or {})).items():
            changed.setattr(ARMS[name], number, value)
        return build_control(name, images, **chosen)


@pytest.fixture(scope="module")
def arms(images):
    torch.set_num_threads(1)
    return {name: build(name, images) for name in ARMS}


def first(images, count):
    return next(data.batches(images, count))[0]


def sample(arm, x, seed=0):
    torch.manual_seed(seed)
    return arm.sample(x)


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- every arm ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLED)
def test_a_control_has_the_images_form_and_differs_from_them(arms, images, name):
    x = first(images, 10)
    made = sample(arms[name], x)
    assert made.shape == x.shape and made.dtype == x.dtype and made.device == x.device
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.isfinite().all() and not torch.equal(made, x)
    assert sample(arms[name], x.double()).dtype == torch.float64
    assert sample(arms[name], x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_follow_the_global_seed_and_leave_the_batch_alone(arms, images, name):
    x = first(images, 10)
    kept = x.clone()
    made = sample(arms[name], x)
    assert torch.equal(made, sample(arms[name], x))
    assert name == "constant" or not torch.equal(made, arms[name].sample(x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ["generator", "swap_gan", "deep", "gaussian", "noise"])
def test_a_control_depends_on_no_other_image_of_the_batch(arms, images, name):
    x = first(images, 10)
    other = x.clone()
    other[1:] = x[1:].flip(0) * 2
    assert_close(sample(arms[name], x)[0], sample(arms[name], other)[0])


@pytest.mark.parametrize("name", ARMS)
def test_a_built_arm_is_frozen_and_in_evaluation(arms, name):
    arm = arms[name]
    assert not any(m.training for m in arm.modules())
    assert not any(p.requires_grad for p in arm.parameters())
    assert arm.name == name
    x = torch.zeros(4, *arm.shape, requires_grad=True)
    if arm.paired:
        before = arm.digest()
        assert not arm.sample(x).requires_grad
        assert arm.digest() == before, "sampling changed what was learnt"


@pytest.mark.parametrize("name", ARMS)
def test_another_image_shape_is_refused_by_name(arms, name):
    with pytest.raises(
        ValueError, match=rf"'{name}'.*\[1, 28, 28\], got \[3, 28, 28\]"
    ):
        arms[name].sample(torch.zeros(2, 3, 28, 28))


@pytest.mark.parametrize("name", ARMS)
def test_building_leaves_the_global_generators_alone(images, name):
    torch.manual_seed(3)
    np.random.seed(3)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()
    build(name, images.take(64), epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numbers


@pytest.mark.parametrize("name", TRAINED)
def test_building_does_not_depend_on_the_state_around_it(images, arms, name):
    torch.manual_seed(99)
    with torch.no_grad():
        again = build(name, images)
    assert same_state(arms[name], again) and arms[name].digest() == again.digest()
    assert arms[name].digest() != build(name, images, seed=1).digest()


def test_unknown_names_are_answered_with_the_nearest(images):
    with pytest.raises(ValueError, match=r"'genrator' is unknown.* 'generator'"):
        build_control("genrator", images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gaussian", {"numbers": {"components": 200}},
         "components must be at most 199 with 200"),
        ("deep", {"epochs": -1}, r"epochs must lie in \[0, .*got -1"),
        ("deep", {"seed": 1.5}, "seed must be an int, got 1.5"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(images, name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, images, **options)


# -- trainings that end early ---------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, "gaussian"])
def test_a_second_build_reads_instead_of_training(
    images, arms, name, tmp_path, capsys, monkeypatch
):
    one = build(name, images, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert f"control: training, into {file.name}" in capsys.readouterr().out
    monkeypatch.setattr(training, "run_epoch", None)
    monkeypatch.setattr(reduced, "find_axes", None)
    two = build(name, images, folder=tmp_path)
    assert capsys.readouterr().out == f"control: reading {file.name}\n"
    assert same_state(one, two) and same_state(one, arms[name])
    assert one.rows == two.rows and len(one.rows) == (0 if name == "gaussian" else 2)
    assert not any(p.requires_grad for p in two.parameters()) and not two.training


def test_what_the_training_depends_on_makes_another_file(images, tmp_path):
    options = {"folder": tmp_path, "epochs": 0}
    build("generator", images, **options)
    changed = [{"seed": 1}, {"epochs": 1}]
    changed += [
        {"numbers": {name: value}} for name, value in (("width", 5), ("lr", 1.0))
    ]
    for n, change in enumerate(changed):
        build("generator", images, **(options | change))
        assert len(list(tmp_path.iterdir())) == n + 2
    build("generator", images.subset(range(199)), **options)
    assert len(list(tmp_path.iterdir())) == len(changed) + 2


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_killed_inside_an_epoch_ends_the_same(
    images, arms, name, tmp_path, monkeypatch, capsys
):
    game, turns = ARMS[name].Game, []
    steps = data.count_batches(images, SMALL[name]["batch_size"], train=True)
    whole = game.step

    def stop(self, x, turn):
        turns.append(turn)
        if turn == steps + 1:
            raise KeyboardInterrupt
        return whole(self, x, turn)

    monkeypatch.setattr(game, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        build(name, images, folder=tmp_path)
    monkeypatch.setattr(game, "step", whole)
    capsys.readouterr()
    arm = build(name, images, folder=tmp_path)
    assert "taking up after epoch 1 of 2" in capsys.readouterr().out
    assert turns == list(range(steps + 2))
    assert same_state(arm, arms[name])
    assert len(list(tmp_path.iterdir())) == 1, "a temporary file was left behind"


def die_in_the_second_epoch(images, folder):
    whole = Generator.Game.step

    def die(self, x, turn):
        if turn == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, x, turn)

    Generator.Game.step = die
    build("generator", images, folder=folder)


def test_a_training_ended_by_sigkill_ends_the_same(
    images, arms, tmp_path, capsys, forked
):
    child = forked.Process(target=die_in_the_second_epoch, args=(images, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (file,) = tmp_path.iterdir()
    assert len(torch.load(file, weights_only=True)["rows"]) == 1
    arm = build("generator", images, folder=tmp_path)
    assert "taking up after epoch 1 of 2" in capsys.readouterr().out
    assert same_state(arm, arms["generator"])


def damage_half(file, **_):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_text(file, **_):
    file.write_text("not a checkpoint")


def damage_keys(file, **_):
    torch.save({"model": {}}, file)


def damage_shapes(file, **_):
    state = torch.load(file, weights_only=True)
    state["modules"]["arm.center"] = torch.zeros(3)
    torch.save(state, file)


@pytest.mark.parametrize(
    "damage", [damage_half, damage_text, damage_keys, damage_shapes]
)
def test_a_damaged_checkpoint_is_refused_by_name(images, tmp_path, damage):
    build("gaussian", images, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name}: not a .*checkpoint"):
        build("gaussian", images, folder=tmp_path)


def test_a_checkpoint_of_another_control_is_put_aside(images, tmp_path, capsys):
    build("gaussian", images, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "aside.pt")
    build("gaussian", images, folder=tmp_path, numbers={"components": 5})
    (other,) = tmp_path.glob("gaussian-*.pt")
    other.rename(file)
    fresh = build("gaussian", images, folder=tmp_path)
    said = f"{file.name} was made with another components; kept as {file.name}.old1"
    assert said in capsys.readouterr().out
    assert same_state(fresh, build("gaussian", images))


@pytest.mark.parametrize("name", TRAINED)
def test_a_loss_that_is_not_finite_names_arm_and_epoch(
    images, name, tmp_path, monkeypatch
):
    game = ARMS[name].Game
    whole = game.step

    def spoil(self, x, turn):
        losses = whole(self, x, turn)
        late = turn * len(x) >= 200
        return {k: v * float("nan") if late else v for k, v in losses.items()}

    monkeypatch.setattr(game, "step", spoil)
    with pytest.raises(ValueError, match=f"'{name}' diverged in epoch 2: .* nan"):
        build(name, images, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert len(torch.load(file, weights_only=True)["rows"]) == 1


# -- devices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLED)
def test_an_arm_follows_its_batch_to_another_device(arms, images, name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # no meta
    arm = copy.deepcopy(arms[name])
    made = arm.sample(torch.empty(4, *images.shape, device="meta"))
    assert made.device.type == "meta" and made.shape == (4, *images.shape)


def test_seeds_reach_the_gpu_in_use_whichever_is_the_current_one(monkeypatch):
    seen, state = [], torch.get_rng_state()

    def fork(devices):
        seen.append(list(devices))
        return nullcontext()

    cards = [torch.Generator().manual_seed(7), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", cards)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with seeded(1, 2, device):
            torch.set_rng_state(state)
    assert seen == [[1], []]
    assert [card.initial_seed() for card in cards] == [7, 1_000_005]


# -- shuffle --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_shuffle_moves_every_image_and_loses_none(count, seed):
    x = torch.arange(count).float().view(count, 1, 1, 1)
    made = sample(Shuffle((1, 1, 1)), x, seed).flatten()
    assert (made != x.flatten()).all()
    assert torch.equal(made.sort().values, x.flatten())


def test_shuffle_refuses_a_batch_of_one(arms, images):
    with pytest.raises(ValueError, match="two images or more"):
        arms["shuffle"].sample(first(images, 1))


# -- generator ------------------------------------------------------------------------


def test_the_generator_ignores_the_image_and_renormalises_its_pixels(arms, images):
    arm, x = arms["generator"], first(images, 16)
    made = sample(arm, x)
    assert torch.equal(made, sample(arm, x.flip(0) * 3))
    torch.manual_seed(0)
    raw = arm.draw(len(x), arm.net)
    assert raw.abs().max() <= 1 and raw.std() > 0.02
    mean, std = images.mean[0], images.std[0]
    torch.manual_seed(0)
    assert_close(arm.make(x), ((raw + 1) / 2 - mean) / std)
    assert made.min() >= -mean / std - 1e-6 and made.max() <= (1 - mean) / std + 1e-6


@pytest.mark.parametrize("side", [8, 28, 32, 33])
def test_the_generator_covers_any_size_and_crops_the_middle(side):
    net = torch.zeros(9, side, side, 3, dtype=torch.uint8)
    stats = (0.5,) * 3, (0.25,) * 3
    names = tuple("ab")
    labels = torch.zeros(9, dtype=torch.int64)
    images = data.ImageSet(net, labels, names, "toy", *stats, 1, True)
    arm = build("generator", images, epochs=0)
    whole = arm.net(torch.zeros(1, 128))
    assert whole.shape[2:] == (-(-side // 8) * 8,) * 2
    torch.manual_seed(0)
    z = torch.randn(2, 128)
    edge = (whole.shape[2] - side) // 2
    torch.manual_seed(0)
    cut = arm.net(z)[:, :, edge : edge + side, edge : edge + side]
    assert torch.equal(cut, arm.draw(2, arm.net))


def test_the_official_generator_has_its_layers(images):
    arm = build("generator", images, epochs=0, numbers={"width": 64})
    assert [tuple(p.shape) for p in arm.net.parameters() if p.dim() > 1] == [
        (4096, 128), (256, 128, 2, 2), (128, 64, 2, 2), (64, 1, 2, 2)
    ]  # fmt: skip


def test_the_generator_comes_nearer_to_the_images(images):
    x = first(images, 200).flatten(1)
    start, end = (
        sample(
            build("generator", images, epochs=e, numbers={"width": 8}),
            first(images, 200),
        )
        for e in (0, 12)
    )
    far, near = (mmd2(x, made.flatten(1), (8.0, 16.0, 32.0)) for made in (start, end))
    assert near < far / 2


def test_the_penalty_is_on_the_norm_of_the_critics_gradient(images):
    arm = Generator(images)
    game = Generator.Game(arm)
    game.critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))
    torch.nn.init.constant_(game.critic[1].weight, 0.25)
    real = torch.zeros(4, 1, 28, 28)
    assert_close(game.penalise(real, real + 1), torch.tensor((0.25 * 28 - 1) ** 2))


# -- swap_gan -------------------------------------------------------------------------


def test_blocks_change_places_whole_and_where_they_are_told_to():
    x, made = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    swap = torch.zeros(2, 1, 2, 2)
    swap[0, 0, 1, 0] = 1
    a, b = swap_gan.swap_blocks(x, made, swap)
    expected = torch.zeros(2, 3, 8, 8)
    expected[0, :, 4:, :4] = 1
    assert torch.equal(a, expected) and torch.equal(b, 1 - expected)


@pytest.mark.parametrize(("side", "block"), [(28, 4), (14, 2), (7, 1)])
def test_usual_blocks_divide_the_images_of_any_side(images, side, block):
    scaled = images.scale(side)
    arm = build("swap_gan", scaled, epochs=1)
    assert arm.block == block
    made = sample(arm, first(scaled, 4))
    assert swap_gan.average_blocks(made, block).shape == (4, (side // block) ** 2)


def test_the_discriminator_sees_swapped_blocks_and_hints_of_the_told_ones(
    images, monkeypatch
):
    monkeypatch.setattr(swap_gan.SwapGAN, "hint", 0.5)
    arm = swap_gan.SwapGAN(images)
    game = swap_gan.SwapGAN.Game(arm)
    game.optimizer = game.make_optimizer()
    seen, whole = [], game.judge.look.forward

    def look(joined):
        seen.append(joined)
        return whole(joined)

    monkeypatch.setattr(game.judge.look, "forward", look)
    monkeypatch.setattr(arm.net, "forward", lambda x: 5 + 0 * x + 0 * sum(
        p.sum() for p in arm.net.parameters()))  # fmt: skip
    game.step(torch.zeros(64, 1, 28, 28), 0)
    for call, joined in enumerate(seen):
        first, second, told, hint = torch.pixel_shuffle(joined, 2).detach().unbind(1)
        assert torch.equal(first + second, torch.full_like(first, 5))
        blocks = first.unfold(1, 4, 4).unfold(2, 4, 4)
        assert torch.equal(blocks.amin((3, 4)), blocks.amax((3, 4))), "half a block"
        assert 0.4 < (first == 5).float().mean() < 0.6
        assert torch.equal(hint, told * (first / 5 * 2 - 1)), "a wrong hint"
        if call == 0:
            assert 0.4 < told.mean() < 0.6, "the discriminator learns with hints"
        else:
            assert told.sum() == 0, "the generator's turn has none"
    assert len(seen) == 2


def test_only_blocks_without_a_hint_teach_the_discriminator(images, monkeypatch):
    for hint, learns in ((1.0, False), (0.5, True)):
        torch.manual_seed(0)
        monkeypatch.setattr(swap_gan.SwapGAN, "hint", hint)
        arm = swap_gan.SwapGAN(images)
        game = swap_gan.SwapGAN.Game(arm)
        game.optimizer = game.make_optimizer()
        before = game.judge.look[0].weight.clone()
        game.teach_judge(first(images, 16))
        assert torch.equal(before, game.judge.look[0].weight) is not learns


def test_block_means_are_those_of_numpy():
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = x.numpy().reshape(5, 2, 2, 4, 2, 4).mean((3, 5)).reshape(5, 8)
    assert_close(swap_gan.average_blocks(x, 4), torch.from_numpy(wanted))


def test_decorrelation_is_what_keeps_swap_gan_from_copying(images, monkeypatch):
    x = first(images, 200)

    def measure():
        arm = build("swap_gan", images, epochs=6, numbers={"lr": 3e-3})
        means = (swap_gan.average_blocks(v, 4) for v in (x, sample(arm, x)))
        return correlate(*means, eps=1e-6).square().mean().item()

    asked = measure()
    monkeypatch.setattr(swap_gan, "correlate", lambda x, made, eps: 0 * made)
    copied = measure()
    assert copied > 0.8 and asked < 0.5 * copied


# -- principal coordinates ------------------------------------------------------------


def test_axes_are_the_leading_eigenvectors_of_the_covariance(images):
    mean, axes, variances = reduced.find_axes(images, 6)
    rows = first(images, 200).flatten(1).double()
    cov = torch.cov(rows.T, correction=0)
    assert_close(mean, rows.mean(0))
    assert_close(axes.T @ axes, torch.eye(6, dtype=torch.float64))
    assert_close(cov @ axes, axes * variances)
    assert_close(variances, torch.linalg.eigvalsh(cov).flip(0)[:6])


def test_gaussian_controls_have_the_moments_of_a_knockoff(images):
    arm = build("gaussian", images)
    x = first(images, 200).repeat(100, 1, 1, 1)
    u, made = arm.whiten(x), arm.whiten(sample(arm, x))
    one, count = torch.eye(6), len(x)
    assert_close(u.T @ u / count, one, atol=1e-3, rtol=0)
    assert_close(made.T @ made / count, one, atol=0.04, rtol=0)
    assert_close(u.T @ made / count, 0 * one, atol=0.04, rtol=0)


@pytest.mark.parametrize("name", ["gaussian", "deep"])
def test_trailing_coordinates_are_copied(arms, images, name):
    arm, x = arms[name], first(images, 50)
    moved = (sample(arm, x) - x).flatten(1)
    rest = moved - moved @ arm.axes @ arm.axes.T
    assert moved.norm() > 1 and rest.norm() < 1e-5 * moved.norm()


def test_directions_without_a_variance_are_refused():
    pixels = torch.zeros(20, 4, 4, 1, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(20)
    pixels[::3, 1, 1, 0] = 7
    labels = torch.zeros(20, dtype=torch.int64)
    images = data.ImageSet(pixels, labels, ("a",), "flat", (0.5,), (0.2,), 0, False)
    with pytest.raises(ValueError, match="at most 2, no other direction of flat"):
        build("gaussian", images, numbers={"components": 3})


# -- deep -----------------------------------------------------------------------------


def test_moments_agree_with_numpy():
    torch.manual_seed(0)
    u, made = torch.randn(40, 3), torch.randn(40, 3) + 1
    both = np.cov(u.T, made.T, ddof=0)
    own, cross = both[3:, 3:] - np.eye(3), both[:3, 3:] * (1 - np.eye(3))
    gap = ((u.mean(0) - made.mean(0)) ** 2).sum().item()
    wanted = gap + ((own**2).sum() + (cross**2).sum()) / 3
    assert reduced.compare_moments(u, made).item() == pytest.approx(wanted, rel=1e-4)


def test_swap_loss_is_least_for_a_copy_and_sees_dependent_coordinates():
    torch.manual_seed(0)
    u = torch.randn(400, 1) + 0.3 * torch.randn(400, 4)  # strongly correlated
    same = reduced.measure_swaps(u, u.clone())
    free = reduced.measure_swaps(u, u[torch.randperm(400)])
    assert same < free


def partial_swap(u, made, seed=0) -> float:
    """Unbiased MMD of pairs against other pairs with half the coordinates swapped."""
    half = len(u) // 2
    swap = torch.arange(u.shape[1]) % 2 == seed
    a, b = u[half:], made[half:]
    other = torch.cat([torch.where(swap, b, a), torch.where(swap, a, b)], 1)
    pairs = torch.cat([u[:half], made[:half]], 1)
    return mmd2(pairs, other, reduced.WIDTHS).item()


def test_the_deep_machine_learns_to_be_swapped():
    images = data.load("mnist5k", "train").take(1000)
    numbers = {"components": 8, "width": 40, "batch_size": 100}
    arm = build("deep", images, epochs=20, numbers=numbers)
    rows = arm.rows
    assert rows[-1]["exchange"] < rows[0]["exchange"]
    assert rows[-1]["moments"] < 0.5 * rows[0]["moments"]
    u = arm.whiten(first(images, 1000))
    start = build("deep", images, epochs=0, numbers=numbers)
    torch.manual_seed(0)
    untrained, trained = (partial_swap(u, a.redraw(u)) for a in (start, arm))
    assert trained < 0.2 * untrained


def test_arms_come_on_the_device_asked_for(images):
    device = pick_device(None)
    arm = build("generator", images, epochs=1, device=None)
    x = first(images, 4).to(device)
    assert arm.sample(x).device.type == device.type
