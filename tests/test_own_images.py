"""Images of one's own: three classes, 108 photographs of two sizes, three notebooks.

One of them has its images streamed from disk, by a limit of the memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import paths, settings

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


@pytest.mark.parametrize(
    ("book", "gb"),
    [("00_start_here", ""), ("01_baseline", "1e-6"), ("10_scop_knockoffs", "")],
)
def test_a_notebook_runs_on_a_small_set(photographs, tmp_path, book, gb):
    declared = settings.declared_parameters(book)
    values = {name: value for name, value in SHORT.items() if name in declared}
    values |= {"run": f"tiny/{book}", "dataset": "tiny", "size": 24}
    command = [Path(sys.executable).with_name("papermill"), f"notebooks/{book}.ipynb"]
    command += [tmp_path / "out.ipynb", "-k", "python3", "--no-progress-bar"]
    roots = {"PRUNING_DATA": str(photographs), "PRUNING_RUNS": str(tmp_path / "runs")}
    roots["PRUNING_MEMORY"] = gb
    done = subprocess.run(
        [*map(str, command), "-y", json.dumps(values)],
        cwd=paths.ROOT, env=os.environ | roots, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert ("streamed from disk" in text) == bool(gb)
    metrics = paths.read_json(tmp_path / "runs" / "tiny" / book / "metrics.json")
    assert metrics["settings"]["dataset"] == "tiny"
