"""Several processes: one network, whoever trains it, and however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import together
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from together import (
    Branching,
    Mortal,
    fail,
    make_images,
    make_net,
    train_and_keep,
    work,
    work_together,
)

from lib import train
from lib.data import batches
from lib.train import processes, workers


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process finds, and what each of two does."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    start = os.getcwd()
    try:
        alone = work(str(here), "")
        two = workers.run(2, work_together, str(there), str(here / "stopped.pt"))
        os.chdir(here)
        os.replace(there / "stopped.pt", "taken.pt")
        alone["taken"] = train_and_keep(make_net(), "taken", epochs=3)
    finally:
        os.chdir(start)
    return alone, *two, there


def flatten(found) -> dict[str, torch.Tensor]:
    """Every number in nested dicts and lists, by name; times left out."""
    if isinstance(found, (dict, list)):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        parts = {k: flatten(v) for k, v in items
                 if k not in ("seconds", "images_per_s", "device")}  # fmt: skip
        return {f"{k}.{n}": v for k, part in parts.items() for n, v in part.items()}
    return {"": torch.as_tensor(found)} if found is not None else {}


def assert_same_bits(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys() and first
    assert not [name for name in first if not first[name].equal(second[name])]


def assert_near(first, second, atol=1e-6):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], atol=atol, rtol=1e-5, msg=name)  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "few", "adam", "taken"])
def test_two_processes_train_as_one_does(both, name):
    alone, first, second, _ = both
    # Adam divides by a root of nearly nothing: rounding of a gradient grows
    assert_near(alone[name], first[name], 1e-4 if name == "adam" else 1e-6)
    assert_same_bits(first[name], second[name])


@pytest.mark.parametrize(
    "name", ["norm", "mortal", "branching", "noise", "generator", "swap_gan", "deep"]
)
def test_processes_end_with_the_same_bits(both, name):
    alone, first, second, _ = both
    assert_same_bits(first[name], second[name])
    if name in alone:
        assert flatten(alone[name]).keys() == flatten(first[name]).keys()


def test_a_parameter_that_one_process_uses_moves_in_both(both):
    start, ended = Branching().state_dict(), both[1]["branching"]["state"]
    assert ended["unused"].equal(start["unused"])
    torch.manual_seed(0)  # what either way learnt, it learnt from half of the images
    for way in "01":
        assert both[1]["branching"]["momentum"][int(way) * 2 + 1]


def test_evaluation_is_that_of_one_process_exactly(both):
    assert_same_bits(both[0]["measured"], both[1]["measured"])
    assert_same_bits(both[0]["measured"], both[2]["measured"])


@pytest.mark.parametrize("name", ["anew", "limited"])
def test_statistics_are_those_of_one_process(both, name):
    alone, first, second, _ = both
    assert_near(alone[name], first[name])
    assert_same_bits(first[name], second[name])
    counted = first[name]["1.num_batches_tracked"]
    assert counted == (3 if name == "limited" else 5)


def test_selection_is_that_of_one_process_where_the_parts_are_alike(both):
    """Of equal images every part has the statistics of the whole batch."""
    alone, first, second, _ = both
    assert_near(alone["alike"], first["alike"], 1e-5)
    assert_same_bits(first["alike"], second["alike"])
    assert (alone["alike"]["0"] - 0.5).abs().max() > 0.01, "nothing was learnt"


def test_what_several_processes_cannot_do_is_refused_in_each(both):
    alone, *two, _ = both
    assert alone["least"] == alone["seed"] == "not refused"
    for found in two:
        assert found["least"] == (
            "processes must be at most 1, the images of a batch, got 2")  # fmt: skip
        assert found["seed"].startswith("the processes train with another start;")
        assert "sync_norms=True" in found["sync"] and "GPUs only" in found["sync"]
    assert alone["sync"] == two[0]["sync"]


def test_none_finds_what_the_first_does_after_its_turn(both):
    assert [found["ahead"] for found in both[:3]] == [False] * 3


def test_rows_say_how_many_processes_made_them(both):
    assert both[1]["plain"]["device"] == both[0]["plain"]["device"] + ", 2 processes"


@pytest.fixture
def mortal(both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, os.path.dirname(__file__)])

    def start(**options):
        net = Mortal(*make_net(norm=True))
        return train_and_keep(net, "mortal", epochs=3, processes=2, **options)

    return start


def test_a_killed_process_and_a_restart_end_in_the_same_bits(
    both, mortal, monkeypatch, capfd
):
    monkeypatch.setenv("KILL_IN_STEP", "5")  # of 3 an epoch
    with pytest.raises(RuntimeError, match="process 1 of 2 was ended by SIGKILL"):
        mortal()
    assert len(train.load_checkpoint("mortal.pt")["rows"]) == 1
    assert capfd.readouterr().out.count("epoch") == 1
    monkeypatch.delenv("KILL_IN_STEP")
    assert_same_bits(mortal(), both[1]["mortal"])
    told = capfd.readouterr()
    assert told.out.splitlines()[0] == "mortal: taking up after epoch 1 of 3"
    assert [line.split("  ")[0] for line in told.out.splitlines()[1:]] == [
        "mortal: epoch 2/3", "mortal: epoch 3/3"]  # fmt: skip
    assert told.err == ""
    assert os.listdir() == ["mortal.pt"]


@pytest.mark.parametrize(
    ("kind", "raised", "text"),
    [("value", ValueError, "what went wrong"),
     ("key", RuntimeError, "process 1 of 2: KeyError: 'what went wrong'")],
)  # fmt: skip
def test_an_error_in_one_process_ends_all_and_is_told(kind, raised, text):
    with pytest.raises(raised) as caught:
        workers.run(2, fail, kind)
    assert str(caught.value) == text


def test_what_cannot_be_handed_over_is_one_line():
    with pytest.raises(ValueError, match="must come from a module"):
        workers.run(2, lambda: None)


def test_a_process_group_of_torchrun_is_joined(tmp_path, monkeypatch):
    script = Path(together.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"{n} of 2.pt") for n in (0, 1))
    assert_same_bits(first, second)
    monkeypatch.chdir(tmp_path)
    alone = train_and_keep(make_net().double(), "alone", epochs=2)["state"]
    for name, weight in alone.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-12, atol=1e-12)


def test_a_child_ends_with_its_parent(tmp_path):
    """Else a run that was killed would write beside the one that replaces it."""
    (tmp_path / "left").mkdir()
    child = (
        "import os, sys; from lib.train import workers; print(os.getpid(), flush=True);"
        f"workers._end_with(int(sys.argv[1]), {str(tmp_path / 'left')!r})"
    )
    parent = (
        "import os, subprocess, sys, time; time.sleep(600) if subprocess.Popen("
        f"[sys.executable, '-c', {child!r}, str(os.getpid())]) else None"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as between:
        pid = int(between.stdout.readline())
        assert (tmp_path / "left").exists()
        between.kill()
    deadline = time.monotonic() + 60
    while (tmp_path / "left").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if (tmp_path / "left").exists():
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child goes on")


@pytest.mark.parametrize("wrong", [0, -1, True, "2", 1.5, None])
def test_processes_must_be_a_number_from_one(wrong):
    with pytest.raises(ValueError, match=r"^processes must"):
        train.Recipe(1, processes=wrong)


@pytest.mark.parametrize(("images", "batch", "most"), [(50, 4, 4), (3, 64, 3)])
def test_each_process_needs_an_image_of_a_batch(images, batch, most):
    with pytest.raises(ValueError, match=f"at most {most}, the images of a batch"):
        train.fit(
            make_net(), make_images(images), epochs=1, batch_size=batch, processes=5
        )


def test_the_number_of_processes_is_no_part_of_a_run():
    one, two = (train.Recipe(2, processes=n) for n in (1, 2))
    assert one.identity == two.identity and one.tag == two.tag
    assert not {"sync_norms", "sparsity"} & set(one.identity)
    assert train.Recipe(2, sync_norms=True).identity["sync_norms"] is True
    assert train.Recipe(2, sparsity=0.1).identity["sparsity"] == 0.1


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), size=st.integers(1, 12), parts=st.integers(1, 5),
       train_set=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_shares_are_the_batches(n, size, parts, train_set, seed):
    options = {"train": train_set, "seed": seed}
    images = make_images(n)
    wanted = list(batches(images, size, **options))
    cut = [batches(images, size, share=(i, parts), **options) for i in range(parts)]
    for x, y in wanted:
        shares = [next(stream) for stream in cut]
        assert torch.cat([part for part, _ in shares]).equal(x)
        assert torch.cat([part for _, part in shares]).equal(y)
        sizes = {len(part) for _, part in shares}
        assert max(sizes) - min(sizes) <= 1
    assert not [None for stream in cut for _ in stream]
    dealt = [list(batches(images, size, share=(i, parts), whole=True, **options))
             for i in range(parts)]  # fmt: skip
    for i, (x, _) in enumerate(wanted):
        assert dealt[i % parts][i // parts][0].equal(x)


def test_alone_nothing_is_shared():
    net = make_net(norm=True)
    net(torch.ones(2, 1, 8, 8)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    processes.merge_gradients(list(net.parameters()), 7)
    processes.average_buffers(net)
    assert all(map(torch.equal, before, (p.grad for p in net.parameters())))
    assert processes.share() == (0, 1) and processes.stream() == 0
    assert processes.gather([1, 2]) == [1, 2]
