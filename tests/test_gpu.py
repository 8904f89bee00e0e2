"""`make gpu` rehearsed without a GPU: rows, resuming, faults, dying processes."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).with_name("gpu")
sys.path.append(str(GPU))
import run  # noqa: E402
import steps  # noqa: E402


def rehearse(out: Path, *only: str):
    """The command as `make gpu` calls it, on the CPU; exit status, rows, output."""
    command = [sys.executable, GPU / "run.py", "--device", "cpu", "--small"]
    command += ["--minutes", "5", "--out", out, "--bases", out / "none"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    made = subprocess.run([*command, "--only", *only], env=os.environ | threads,
                          capture_output=True, text=True)  # fmt: skip
    return made.returncode, run.read_rows(out / "gpu.csv"), made.stdout + made.stderr


def go_on(out: Path, *only: str):
    """What its child does, in this process; status and rows."""
    options = argparse.Namespace(device="cpu", small=True, out=out, bases=out,
                                 only=only, until=time.time() + 300)  # fmt: skip
    return run.run_steps(options), run.read_rows(out / "gpu.csv")


def test_rehearsal_finds_every_check_fine_and_is_not_repeated(tmp_path, capsys):
    names = ["surgery_of_nets", "counted_costs", "stream_of_batches", "captured_step",
             "evaluation", "worth_of_channels"]  # fmt: skip
    code, rows, said = rehearse(tmp_path, *names)
    assert code == 0, said
    assert [name for name in names if all(r["step"] != name for r in rows)] == []
    outcomes = {row["outcome"] for row in rows if row["step"] != "captured_step"}
    assert outcomes == {"fine"}
    (skipped,) = (row for row in rows if row["step"] == "captured_step")
    assert skipped["outcome"] == "not here" and "needs a GPU" in skipped["what"]
    assert all(row["revision"] and row["torch"] and row["device"] for row in rows)
    assert go_on(tmp_path, *names) == (0, rows)
    assert run.sum_up(argparse.Namespace(out=tmp_path), len(rows)) == 0
    assert capsys.readouterr().out.startswith("nothing to do")


def test_a_base_without_its_images_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))
    name = "cifar10-16px-45000images-resnet20-50epochs-lr0.1-weight_decay0.0001"
    (tmp_path / f"{name}-warmup1-seed3.pt").write_bytes(b"")
    code, rows = go_on(tmp_path, "base3_resnet20_16px_l1")
    assert code == 0 and [row["outcome"] for row in rows] == ["not here"]
    assert "no cifar10 under the data root" in rows[0]["what"]


def outcome(*found: steps.Found, fault: Exception | None = None, left: float = 60):
    def function(bench):
        """A step of this test."""
        yield from found
        if fault:
            raise fault
        if left == 1:
            time.sleep(3)

    bench = steps.Bench("cpu", True, Path(), Path())
    rows = run.run_step("made", "check", function, bench, left)
    return [row["outcome"] for row in rows], rows[-1]["what"]


@pytest.mark.parametrize(
    "value, limit, expected",
    [(0.5, 1.0, "fine"), (2.0, 1.0, "WRONG"), (float("nan"), 1.0, "WRONG"),
     (2.0, None, "measured")],
)  # fmt: skip
def test_a_limit_decides(value, limit, expected):
    assert outcome(steps.Found("it", value, limit=limit))[0] == [expected]


def test_a_fault_a_lack_and_the_end_of_the_minutes_are_rows():
    good = steps.Found("it", 0.0, limit=1.0)
    found, what = outcome(good, fault=RuntimeError("CUDA error: lost\nmore"))
    assert found == ["fine", "WRONG"] and what == "RuntimeError: CUDA error: lost"
    found, what = outcome(good, fault=steps.NotHere("no triton"))
    assert found == ["fine", "not here"] and what == "no triton"
    found, what = outcome(good, left=1)
    assert found == ["fine", "out of time"] and what == "the minutes are over"


def test_a_step_at_which_the_process_dies_has_a_row_and_the_rest_goes_on(
    tmp_path, monkeypatch
):
    child = (
        "import os, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "if (out / 'once').exists(): sys.exit(0)\n"
        "(out / 'once').touch(); (out / 'running').write_text('shaky')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", child, str(tmp_path)]
    monkeypatch.setattr(run, "child_command", lambda options: command)
    options = argparse.Namespace(
        device="cpu", out=tmp_path, until=time.time() + 60, only=None
    )
    run.run_children(options)
    (row,) = run.read_rows(tmp_path / "gpu.csv")
    assert row["step"] == "shaky" and row["outcome"] == "died"
    assert row["what"] == "exit status -9" and row["revision"]
    assert run.sum_up(options, 0) == 1


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "soon"])
def test_bad_minutes_are_one_line(minutes, tmp_path):
    command = [sys.executable, GPU / "run.py", f"--minutes={minutes}", "--device=cpu"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 2 and "--minutes" in made.stderr.splitlines()[-1]


def test_without_a_gpu_make_gpu_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, GPU / "run.py", "--out", tmp_path / "x"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 1 and made.stderr.startswith("no GPU:")
    assert len(made.stderr.splitlines()) == 1 and not (tmp_path / "x").exists()
