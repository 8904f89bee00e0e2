"""Tables, figures and files, against numbers made by hand."""

import json
import math
import sys

import pandas as pd
import pytest
from matplotlib.figure import Figure

from lib import paths, report, settings

RUNS: dict[str, list[settings.Run]] = {}  # what the profile of a test declares
ENVIRONMENT = {"device": "CPU", "torch": "2.11", "revision": "abc", "python": "3.11"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Runs and published results in a temporary folder."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(settings, "read_profile", lambda profile: RUNS.get(profile, []))
    RUNS.clear()
    return tmp_path


def make_row(method="l1", seed=0, after=80.0, **more) -> dict:
    return {
        "method": method, "net": "resnet8", "dataset": "mnist5k", "seed": seed,
        "profile": "toy", "rate": 0.5, "residual": "tie", "epochs": 3, "base": 90.0,
        "before": 50.0, "after": after, "macs": 10, "params": 4, "macs_down": 60.0,
        "params_down": 40.0, "seconds": 1.5, "images_per_s": 99.0,
        "precision": "float32",
    } | more  # fmt: skip


def write_run(name: str, rows: list[dict], **metrics):
    content = {"run": name, "environment": ENVIRONMENT, "rows": rows} | metrics
    profile, notebook = name.split("/")[:2]
    RUNS.setdefault(profile, []).append(settings.Run(notebook, {"run": name}, {}))
    return paths.write_json(paths.runs_root() / name / "metrics.json", content)


ROWS = [
    make_row(seed=0, after=80.0), make_row(seed=1, after=82.0),
    make_row(seed=2, after=87.0), make_row("random", seed=0, after=70.25),
]  # fmt: skip


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()


# -- rows and tables -------------------------------------------------------------------


def test_rows_of_all_runs_of_one_profile():
    write_run("toy/02_surgery/seed0", ROWS[:1])
    write_run("toy/02_surgery/seed1", ROWS[1:])
    write_run("toy/00_start_here", [])
    write_run("other/02_surgery", ROWS)
    rows = report.collect_rows("toy")
    assert rows["after"].tolist() == [80, 82, 87, 70.25]
    assert set(rows["torch"]) == {"2.11"} and set(rows["revision"]) == {"abc"}
    assert report.collect_rows("none").empty


def test_a_rows_own_revision_goes_before_its_runs():
    write_run("toy/a", [make_row(seed=0), make_row(seed=1, revision="earlier")])
    now = ENVIRONMENT["revision"]
    assert report.collect_rows("toy")["revision"].tolist() == [now, "earlier"]


def test_summary_is_mean_and_deviation_over_seeds():
    table = report.summarise(pd.DataFrame(ROWS))
    assert table["method"].tolist() == ["l1", "random"]
    l1, random = table.to_dict("records")
    assert l1["n"] == 3 and random["n"] == 1
    assert l1["after"] == pytest.approx(83.0)
    assert l1["delta"] == pytest.approx(-7.0)
    assert l1["sd"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert math.isnan(random["sd"])
    assert (l1["base"], l1["before"], l1["macs_down"]) == (90, 50, 60)
    assert report.summarise(pd.DataFrame()).empty


@pytest.mark.parametrize("key", ["net", "dataset", "rate", "residual", "epochs"])
def test_summary_keeps_settings_apart(key):
    rows = [make_row(), make_row(**{key: 0.25 if key == "rate" else 7})]
    assert len(report.summarise(pd.DataFrame(rows))) == 2


def test_table_is_markdown():
    lines = report.format_table(report.summarise(pd.DataFrame(ROWS))).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {15}
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == [
        "resnet8", "mnist5k", "l1", "0.5", "tie", "3", "3", "90.00", "50.00", "83.00",
        "-7.00", "3.61", "60.00", "40.00",
    ]  # fmt: skip
    assert "|  |" in lines[3], "one seed has no deviation"


def test_rows_with_different_columns_share_a_table():
    plain = make_row("scop")
    for key in ("rate", "residual", "epochs"):
        del plain[key]
    text = report.format_table(report.summarise(pd.DataFrame([*ROWS, plain])))
    assert "scop" in text
    assert "nan" not in text.lower()
    assert "| 3 |" in text and "| 3.00 |" not in text, "epochs are whole numbers"


def test_a_run_found_twice_is_not_counted_twice():
    """A run whose folder got another name stays on disk beside the new one."""
    write_run("toy/02_surgery", [make_row(seed=0, after=60.0)])
    RUNS.clear()
    write_run("toy/02_surgery/seed0", [make_row(seed=0, after=80.0)])
    write_run("toy/02_surgery/seed1", [make_row(seed=1, after=80.0)])
    table = report.summarise(report.collect_rows("toy"))
    assert table["after"].tolist() == [80.0] and table["n"].tolist() == [2]


@pytest.mark.parametrize(
    "content",
    [b'{"rows": [', b"", b"{}", b"[]", b'{"rows": []}', b"\xff\xfe\x00", b"null"],
)
def test_damaged_metrics_are_one_error_that_names_the_file(content):
    file = write_run("toy/x", ROWS)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"toy/x/metrics\.json"):
        report.collect_rows("toy")


# -- main ------------------------------------------------------------------------------


def test_main_without_runs_says_what_to_do(monkeypatch):
    with pytest.raises(SystemExit, match="run `make reproduce PROFILE=toy` first"):
        run_main(monkeypatch, "--profile", "toy")


def test_main_prints_keeps_and_publishes(monkeypatch, capsys, folders):
    write_run("toy/x", ROWS)
    run_main(monkeypatch, "--profile", "toy")
    table = report.format_table(report.summarise(pd.DataFrame(ROWS)))
    assert table in capsys.readouterr().out
    folder = paths.runs_root() / "toy"
    assert (folder / "table.md").read_text() == table + "\n"
    assert len(json.loads((folder / "table.json").read_text())) == 4
    published = pd.read_csv(folders / "runs" / "results" / "toy.csv")
    assert len(published) == 4
    of_map = {"keep", "d", "w", "r"}
    wanted = [name for name in report.RESULT_COLUMNS if name not in of_map]
    assert list(published) == wanted, "in this order, and only those that rows have"
    assert published["after"].tolist() == [80, 82, 87, 70.25]
    assert published["macs"].dtype == "int64"
    assert (paths.figures_root() / "results_toy.png").stat().st_size > 1000
    shown = pd.read_csv(paths.figures_root() / "results_toy.csv")
    assert shown["after"].tolist() == published["after"].tolist()
    again = (folders / "runs" / "results" / "toy.csv").read_bytes()
    run_main(monkeypatch, "--profile", "toy")
    assert (folders / "runs" / "results" / "toy.csv").read_bytes() == again


def test_quick_is_not_published(monkeypatch, folders):
    write_run("quick/x", ROWS)
    run_main(monkeypatch)
    assert not (folders / "runs" / "results").exists()


def test_kept_table_is_strict_json(monkeypatch):
    plain = make_row("scop")
    del plain["rate"]
    write_run("quick/x", [*ROWS, plain])
    run_main(monkeypatch)
    text = (paths.runs_root() / "quick" / "table.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)


# -- figures ---------------------------------------------------------------------------


def test_a_figure_is_a_picture_and_its_numbers(folders):
    figure = Figure()
    figure.subplots().plot([1, 2])
    numbers = pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25]})
    report.set_style()
    for _ in range(2):
        report.save_figure("curve", figure, numbers)
    folder = folders / "runs" / "figures"
    assert sorted(p.name for p in folder.iterdir()) == ["curve.csv", "curve.png"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "curve.csv"), numbers)


def test_a_failed_figure_keeps_the_old_one(folders, monkeypatch):
    figure, numbers = Figure(), pd.DataFrame({"x": [1]})
    report.save_figure("curve", figure, numbers)
    old = (folders / "runs" / "figures" / "curve.png").read_bytes()

    def fail(path, **options):
        path.write_bytes(b"half")
        raise RuntimeError("no font")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no font"):
        report.save_figure("curve", figure, numbers)
    folder = folders / "runs" / "figures"
    assert (folder / "curve.png").read_bytes() == old
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "run, name",
    [
        ("quick/02_surgery", "trade"),
        ("cifar10/02_surgery", "trade_cifar10"),
        ("cifar10/02_surgery/seed1", "trade_cifar10_seed1"),
    ],
)
def test_figures_of_other_profiles_have_other_names(run, name):
    assert report.figure_name("trade", run) == name


# -- writing files ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_write_leaves_what_was_there(tmp_path, error, existed):
    file = tmp_path / "folder" / "a.txt"
    if existed:
        paths.write_text(file, "old")

    def fail(tmp):
        tmp.write_text("ne")
        raise error("stop")

    with pytest.raises(error):
        paths.write_atomic(file, fail)
    assert [p.name for p in file.parent.iterdir()] == ["a.txt"] * existed
    assert not existed or file.read_text() == "old"


def test_a_write_replaces_the_whole_file(tmp_path):
    file = paths.write_text(tmp_path / "a" / "b.txt", "longer than the new one")
    assert paths.write_text(file, "né") == file
    assert file.read_bytes() == "né".encode()
    assert file.stat().st_mode & 0o777 == 0o644
    assert len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, {"x": [-math.inf]}, object()])
def test_what_json_cannot_say_is_refused(tmp_path, value):
    file = paths.write_json(tmp_path / "a.json", {"fine": 1})
    with pytest.raises((ValueError, TypeError)):
        paths.write_json(file, value)
    assert paths.read_json(file) == {"fine": 1}


def test_reading_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file"):
        paths.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        paths.read_json(tmp_path / "a.json")


def test_places_follow_the_environment(tmp_path, monkeypatch):
    assert paths.runs_root() == tmp_path / "runs"
    assert paths.figures_root() == tmp_path / "runs" / "figures"
    monkeypatch.delenv("PRUNING_RUNS")
    assert paths.runs_root() == paths.ROOT / "data" / "runs"
    assert paths.figures_root() == paths.ROOT / "figures"
    assert paths.shown(paths.ROOT / "data" / "x") == "data/x"
    assert paths.shown(tmp_path / "x.pt") == "x.pt"
