"""Images of one's own: three classes, 108 photographs of two sizes, three notebooks.

One of them has its images streamed from disk, by a limit of the memory, and two
processes that train on them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib import paths, settings, stages, train

SHORT = {"baseline_epochs": 2, "batch_size": 16, "control_epochs": 1, "repetitions": 2}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """81 to train on, 27 to test with: fewer than pixels, upright and lying."""
    root, mix = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 27), ("test", 9)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / "tiny" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (24, 32, 3) if i % 2 else (32, 24, 3)
                pixels = mix.integers(0, 90, shape, dtype=np.uint8)
                pixels[8 * label : 8 * label + 8] += 120
                kind = ("png", "webp", "bmp")[i % 3]
                Image.fromarray(pixels).save(folder / f"{i}.{kind}")
    return root


def run_notebook(book, folder, photographs, values, gb=""):
    """Its text when executed, with its runs in `folder`."""
    values = values | {"run": f"tiny/{book}", "dataset": "tiny", "size": 24}
    command = [Path(sys.executable).with_name("papermill"), f"notebooks/{book}.ipynb"]
    command += [folder / "out.ipynb", "-k", "python3", "--no-progress-bar"]
    roots = {"PRUNING_DATA": str(photographs), "PRUNING_RUNS": str(folder)}
    done = subprocess.run(
        [*map(str, command), "-y", json.dumps(values)], cwd=paths.ROOT,
        env=os.environ | roots | {"PRUNING_MEMORY": gb}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = paths.read_json(folder / "tiny" / book / "metrics.json")
    assert metrics["settings"]["dataset"] == "tiny"
    return (folder / "out.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("book", ["00_start_here", "10_scop_knockoffs"])
def test_a_notebook_runs_on_a_small_set(photographs, tmp_path, book):
    declared = settings.declared_parameters(book)
    values = {name: value for name, value in SHORT.items() if name in declared}
    assert "streamed from disk" not in run_notebook(
        book, tmp_path, photographs, values)  # fmt: skip


def test_two_processes_on_a_streamed_set_train_as_one_in_memory(
    photographs, tmp_path, monkeypatch
):
    """LeNet, for BatchNorms take the statistics of a process's part."""
    values = {"net": "lenet", "baseline_epochs": 2, "baseline_lr": 0.02}
    values |= {"batch_size": 16, "processes": 2}
    assert "streamed from disk" in run_notebook(
        "01_baseline", tmp_path, photographs, values, gb="1e-6")  # fmt: skip
    monkeypatch.setenv("PRUNING_DATA", str(photographs))
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "one"))
    sets = stages.load_sets("tiny", size=24, resolution=14)
    recipe = train.Recipe(2, lr=0.02, warmup=1.0, batch_size=16)
    stages.make_baseline(sets, run="tiny/x", net="lenet", recipe=recipe)
    (alone,) = (tmp_path / "one/tiny/baselines").glob("*.pt")
    alone, both = (
        train.load_checkpoint(file)
        for file in (alone, tmp_path / "tiny/baselines" / alone.name)
    )
    assert both["made_with"]["device"].endswith(", 2 processes")
    assert both["identity"]["start"] == alone["identity"]["start"]
    # 16 bits round the halves of a batch otherwise than the whole
    exact = {"rtol": 1e-4, "atol": 1e-5}
    rough = {"rtol": 0.0, "atol": 5e-3}
    told = exact if alone["identity"]["precision"] == "float32" else rough
    torch.testing.assert_close(both["model"], alone["model"], **told)
