"""Long profiles: their miniatures, and what they would cost."""

import importlib.util
import sys

import pytest
import yaml

from lib import data, paths, settings

CI = paths.ROOT / ".ci"
sys.path.append(str(CI))


def load(name):
    spec = importlib.util.spec_from_file_location(name, CI / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


miniature, hours = load("miniature"), load("hours")


@pytest.mark.parametrize("profile", miniature.PROFILES)
def test_a_miniature_is_its_profile_in_small(profile):
    folder = paths.NOTEBOOKS / "params"
    stored = yaml.safe_load((folder / f"{profile}_miniature.yaml").read_text())
    assert stored == miniature.shrink(profile), "python .ci/miniature.py --write"
    whole = yaml.safe_load((folder / f"{profile}.yaml").read_text())
    assert stored.keys() == whole.keys()
    for notebook in whole:
        grids = [settings.list_parts(content[notebook]) for content in (stored, whole)]
        for small, changes in zip(*grids, strict=True):
            for name in ("net", "controls", "methods"):  # what is proved to run
                assert small.get(name) == changes.get(name), (notebook, name)
            epochs = [v for k, v in small.items() if k.endswith("epochs")]
            assert all(v in (0, 1, [0, 0], [1, 1]) for v in epochs), (notebook, epochs)
            assert small.get("dataset", "miniature") == "miniature"
    assert len(settings.read_profile(f"{profile}_miniature")) > 10


def test_pictures_are_the_same_each_time_and_of_three_classes(tmp_path):
    one, two = tmp_path / "one" / "miniature", tmp_path / "two" / "miniature"
    miniature.draw_pictures(one)
    miniature.draw_pictures(two)
    files = sorted(path.relative_to(one) for path in one.rglob("*.JPEG"))
    assert len(files) == 108
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    rest = data.load("miniature", "train", root=one.parent, size=64)
    assert len(rest) == 84 and rest.shape == (3, 64, 64) and len(rest.classes) == 3
    assert rest.labels.bincount().tolist() == [28] * 3


def make_run(notebook, **values):
    return settings.Run(notebook, {"dataset": "cifar10", **values}, {})


def test_passes_are_counted_as_by_hand():
    n = 45_000
    run = make_run("01_baseline", baseline_epochs=200, net="resnet20")
    assert hours.count_passes(run) == 200 * n
    run = make_run("01_baseline", baseline_epochs=200, net="resnet20", pretrained=True)
    assert hours.count_passes(run) == 0
    run = make_run("12_scop_pruning", controls=["shuffle", "none"], methods=["l1"],
                   select_epochs=3, select_images=1000, seeds=[0, 1], rate=0.4,
                   rates=[0.6, 0.8], finetune_epochs=10)  # fmt: skip
    select = 2 * 3 * (1000 + 1000)  # two arms, images and as many controls
    tuned = 3 * 3 * 10 * n * 0.6  # three ways, three rates, the first rate for all
    assert hours.count_passes(run) == pytest.approx(2 * (select + tuned))
    run = make_run("40_comparison", baseline_epochs=50, methods=["l1", "scop-shuffle"],
                   controls=["unpruned", "scratch-compute", "bn_scale-sparse"],
                   select_epochs=2, select_images=500, shares=[0.5],
                   lengths=[1, 5])  # fmt: skip
    longer = 6 * n  # trained whole before it is pruned
    expected = 50 * n + 2 * 2 * 500 + 5 * 0.5 * 6 * n + 2 * 50 * n + longer
    assert hours.count_passes(run) == pytest.approx(expected)


def test_macs_are_those_of_the_network_at_its_side():
    run = make_run("01_baseline", net="resnet20", resolution=16)
    assert hours.count_macs(run) == 10_138_240  # as the rows of rate_16_cpu have it
    whole = make_run("01_baseline", net="resnet20", resolution=0)
    assert hours.count_macs(whole) == pytest.approx(4 * 10_138_240, rel=0.01)
