"""Images of one's own: three classes, 108 photographs of two sizes, three notebooks.

One of them has its images streamed from disk, by a limit of the memory, and two
processes that train on them.
"""

import numpy as np
import papermill
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


@pytest.fixture
def run_notebook(photographs, tmp_path, monkeypatch):
    """`run_notebook(name, values)`: its text when executed, its runs in `tmp_path`."""
    monkeypatch.setenv("PRUNING_DATA", str(photographs))
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path))

    def run(book, values, gb=""):
        monkeypatch.setenv("PRUNING_MEMORY", gb)
        values = values | {"run": f"tiny/{book}", "dataset": "tiny", "size": 24}
        out = tmp_path / "out.ipynb"
        papermill.execute_notebook(
            paths.NOTEBOOKS / f"{book}.ipynb", out, values, kernel_name="python3",
            progress_bar=False, cwd=paths.ROOT,
        )  # fmt: skip
        metrics = paths.read_json(tmp_path / "tiny" / book / "metrics.json")
        assert metrics["settings"]["dataset"] == "tiny"
        return out.read_text(encoding="utf-8")

    return run


@pytest.mark.parametrize("book", ["00_start_here", "10_scop_knockoffs"])
def test_a_notebook_runs_on_a_small_set(run_notebook, book):
    declared = settings.declared_parameters(book)
    values = {name: value for name, value in SHORT.items() if name in declared}
    assert "streamed from disk" not in run_notebook(book, values)


def test_two_processes_on_a_streamed_set_train_as_one_in_memory(
    run_notebook, tmp_path, monkeypatch
):
    """LeNet, for BatchNorms take the statistics of a process's part."""
    values = {"net": "lenet", "baseline_epochs": 2, "baseline_lr": 0.02}
    values |= {"batch_size": 16, "processes": 2}
    assert "streamed from disk" in run_notebook("01_baseline", values, gb="1e-6")
    monkeypatch.setenv("PRUNING_MEMORY", "")
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
