"""Tables, figures and files, against numbers made by hand."""

import importlib
import json
import math
import multiprocessing
import os
import sys
import time

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from lib import paths, report, settings
from lib.train import checkpoint

sys.path.append(str(paths.ROOT / ".ci"))
import publish

RUNS: dict[str, list[settings.Run]] = {}  # what the profile of a test declares
ENVIRONMENT = {"device": "CPU", "torch": "2.11", "revision": "abc", "python": "3.11"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Runs, published results and figures in a temporary folder."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
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
    monkeypatch.setattr(sys, "argv", ["publish", *arguments])
    publish.main()


# -- rows and tables -------------------------------------------------------------------


def test_rows_of_all_runs_of_one_profile():
    write_run("toy/02_surgery/seed0", ROWS[:1])
    write_run("toy/02_surgery/seed1", ROWS[1:])
    write_run("toy/00_start_here", [])
    write_run("other/02_surgery", ROWS)
    rows = publish.collect_rows("toy")
    assert rows["after"].tolist() == [80, 82, 87, 70.25]
    assert set(rows["torch"]) == {"2.11"} and set(rows["revision"]) == {"abc"}
    assert publish.collect_rows("none").empty


def test_a_rows_own_revision_goes_before_its_runs():
    write_run("toy/a", [make_row(seed=0), make_row(seed=1, revision="earlier")])
    now = ENVIRONMENT["revision"]
    assert publish.collect_rows("toy")["revision"].tolist() == [now, "earlier"]


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


def test_several_networks_on_one_seed_are_one_sample(tmp_path, monkeypatch):
    """Of networks drawn by lot a seed has several: their spread is none over seeds."""
    lot = [make_row(seed=0, after=80.0), make_row(seed=0, after=90.0)]
    alone = report.summarise(pd.DataFrame(lot)).iloc[0]
    assert (alone["n"], alone["after"]) == (1, 85.0) and math.isnan(alone["sd"])
    lot.append(make_row(seed=1, after=87.0))
    pair = report.summarise(pd.DataFrame(lot)).iloc[0]
    assert (pair["n"], pair["after"]) == (2, 86.0)
    assert pair["sd"] == pytest.approx(2**0.5)
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    pd.DataFrame(lot).to_csv(tmp_path / "long.csv", index=False)
    beside = report.put_beside(lot, "long").loc["l1"].to_numpy()
    assert beside[[3, 7]] == pytest.approx(2**0.5)


def test_times_are_averaged_where_rows_have_them():
    rows = [make_row(seed=seed, ms=ms, time_share=ms / 10)
            for seed, ms in enumerate([4.0, 6.0])]  # fmt: skip
    found = report.summarise(pd.DataFrame(rows)).iloc[0]
    assert (found["ms"], found["time_share"]) == (5.0, 0.5)
    assert "ms" not in report.summarise(pd.DataFrame(ROWS))


def test_seeds_count_where_other_rows_of_the_profile_have_bases():
    """The quick profile: notebook 22 has seeds, notebook 40 a base."""
    seeds = [make_row(seed=seed, after=80.0 + seed) for seed in range(3)]
    base = make_row("random", seed=0, base_id=0, after=70.0)
    table = report.summarise(pd.DataFrame([*seeds, base])).set_index("method")
    assert table["n"].tolist() == [3, 1]
    assert table.loc["l1", ["after", "sd"]].tolist() == [81.0, 1.0]


def test_results_are_drawn_network_by_network():
    rows = [make_row("random", rate=0.5, after=70.0, macs_down=80.0)]
    rows += [make_row(seed=s, rate=r, after=80 + s + 10 * r, macs_down=100 * r)
             for r in (0.25, 0.5) for s in (0, 1)]  # fmt: skip
    before, after = publish.draw_results(pd.DataFrame(rows)).axes
    names = [tick.get_text() for tick in before.get_yticklabels()]
    assert names == ["l1, rate 0.25", "l1, rate 0.5", "random, rate 0.5"]
    means = after.collections[-1].get_offsets()[:, 0]
    assert means.tolist() == [83.0, 85.5, 70.0]
    dots = sorted(x for c in after.collections[:-1] for x in c.get_offsets()[:, 0])
    assert dots == [70.0, 82.5, 83.5, 85.0, 86.0]


def test_a_penalty_names_the_networks_that_have_one():
    rows = [make_row(after=80.0), make_row(after=80.0)]
    rows += [make_row("sparse", sparsity=s, macs_down=90.0) for s in (0.001, 0.003)]
    before, _ = publish.draw_results(pd.DataFrame(rows)).axes
    names = [tick.get_text() for tick in before.get_yticklabels()]
    assert names == ["l1", "sparse, sparsity 0.001", "sparse, sparsity 0.003"]


def test_readme_says_where_a_gap_rests_on_fewer_bases(readme):
    """Base 0 has the two on different machines: the accuracy is of 3, the gap of 2."""
    rows = pd.DataFrame([
        {"method": name, "base_id": base, "after": 80.0 + base * (name == "a"),
         "precision": "float32" if (name, base) == ("l1", 0) else "bfloat16"}
        for name in ("a", "l1") for base in range(3)
    ])  # fmt: skip
    told = readme.gap_to(rows, "a", "l1", of=3)
    assert told.startswith("+1.50 [") and told.endswith("], 2 bases")
    assert readme.gap_to(rows, "a", "l1", of=2).endswith("]")
    assert readme.gap_to(rows, "l1", "l1", of=3) == ""


def test_a_run_stands_beside_the_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    full = [make_row(seed=s, after=a, rate=r, net="resnet20", epochs=9)
            for r in (0.25, 0.5) for s, a in enumerate([60.0, 62.0])]  # fmt: skip
    pd.DataFrame(full).to_csv(tmp_path / "long.csv", index=False)
    table = report.put_beside(ROWS, "long", rate=0.5)
    mine, theirs = dict.fromkeys(table.columns.get_level_values(0))
    assert mine.startswith("your run: ") and theirs.endswith("9 epochs")
    assert table.loc["l1", (mine, "after")] == pytest.approx(83.0)
    assert table.loc["l1", (theirs, "after")] == 61.0
    assert table.loc["l1", (theirs, "sd")] == pytest.approx(2**0.5)
    assert table.loc["random", (mine, "n")] == 1
    assert math.isnan(table.loc["random", (theirs, "after")])
    with pytest.raises(ValueError, match="'short' are committed"):
        report.put_beside(ROWS, "short")
    with pytest.raises(ValueError, match="no rows with"):
        report.put_beside(ROWS, "long", rate=0.75)
    with pytest.raises(ValueError, match="column 'size'"):
        report.put_beside(ROWS, "long", size=1)


@pytest.mark.parametrize("key", ["net", "dataset", "rate", "residual", "epochs"])
def test_summary_keeps_settings_apart(key):
    rows = [make_row(), make_row(**{key: 0.25 if key == "rate" else 7})]
    assert len(report.summarise(pd.DataFrame(rows))) == 2


def test_table_is_markdown():
    lines = publish.format_table(report.summarise(pd.DataFrame(ROWS))).splitlines()
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
    text = publish.format_table(report.summarise(pd.DataFrame([*ROWS, plain])))
    assert "scop" in text
    assert "nan" not in text.lower()
    assert "| 3 |" in text and "| 3.00 |" not in text, "epochs are whole numbers"


def test_a_run_found_twice_is_not_counted_twice():
    """A run whose folder got another name stays on disk beside the new one."""
    write_run("toy/02_surgery", [make_row(seed=0, after=60.0)])
    RUNS.clear()
    write_run("toy/02_surgery/seed0", [make_row(seed=0, after=80.0)])
    write_run("toy/02_surgery/seed1", [make_row(seed=1, after=80.0)])
    table = report.summarise(publish.collect_rows("toy"))
    assert table["after"].tolist() == [80.0] and table["n"].tolist() == [2]


@pytest.mark.parametrize(
    "content",
    [b'{"rows": [', b"", b"{}", b"[]", b'{"rows": []}', b"\xff\xfe\x00", b"null"],
)
def test_damaged_metrics_are_one_error_that_names_the_file(content):
    file = write_run("toy/x", ROWS)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"toy/x/metrics\.json"):
        publish.collect_rows("toy")


# -- main ------------------------------------------------------------------------------


def test_main_without_runs_says_what_to_do(monkeypatch):
    with pytest.raises(SystemExit, match="run `make reproduce PROFILE=toy` first"):
        run_main(monkeypatch, "--profile", "toy")


def list_files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_main_prints_and_keeps_and_publishes_only_when_asked(
    monkeypatch, capsys, folders
):
    write_run("toy/x", ROWS)
    run_main(monkeypatch, "--profile", "toy")
    table = publish.format_table(report.summarise(pd.DataFrame(ROWS)))
    assert table in capsys.readouterr().out
    folder = paths.runs_root() / "toy"
    assert (folder / "table.md").read_text() == table + "\n"
    assert len(json.loads((folder / "table.json").read_text())) == 4
    drawn = ["results_toy.csv", "results_toy.png"]
    assert list_files(folder / "figures") == drawn
    shown = pd.read_csv(folder / "figures" / "results_toy.csv")
    assert shown["after"].tolist() == [80, 82, 87, 70.25]
    assert not paths.FIGURES.exists() and not paths.RESULTS.exists()
    run_main(monkeypatch, "--profile", "toy", "--publish")
    assert list_files(paths.FIGURES) == drawn
    picture = (paths.FIGURES / "results_toy.png").read_bytes()
    assert picture == (folder / "figures" / "results_toy.png").read_bytes()
    assert len(picture) > 1000


def test_published_rows_have_the_agreed_columns(monkeypatch):
    write_run("toy/x", ROWS)
    run_main(monkeypatch, "--profile", "toy", "--publish")
    published = pd.read_csv(paths.RESULTS / "toy.csv")
    assert len(published) == 4 and list_files(paths.RESULTS) == ["toy.csv"]
    wanted = [c for c in publish.RESULT_COLUMNS if c in {*ROWS[0], *publish.MADE_WITH}]
    assert list(published) == wanted, "in this order, and only those that rows have"
    assert published["after"].tolist() == [80, 82, 87, 70.25]
    assert published["macs"].dtype == "int64"
    again = (paths.RESULTS / "toy.csv").read_bytes()
    run_main(monkeypatch, "--profile", "toy", "--publish")
    assert (paths.RESULTS / "toy.csv").read_bytes() == again


def test_of_the_quick_profile_only_figures_are_published(monkeypatch):
    write_run("quick/x", ROWS, points=[make_point("d", 1)])
    report.save_figure("quick/x", "curve", Figure(), pd.DataFrame({"x": [1]}))
    run_main(monkeypatch, "--publish")
    assert list_files(paths.FIGURES) == ["curve.csv", "curve.png"]
    assert not paths.RESULTS.exists()


def test_half_a_profile_is_shown_but_not_published(monkeypatch, capsys):
    write_run("toy/x", ROWS)
    RUNS["toy"].append(settings.Run("y", {"run": "toy/y"}, {}))
    run_main(monkeypatch, "--profile", "toy")
    assert "resnet8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no results yet of toy/y: run `make"):
        run_main(monkeypatch, "--profile", "toy", "--publish")
    assert not paths.FIGURES.exists() and not paths.RESULTS.exists()


def test_kept_table_is_strict_json(monkeypatch):
    plain = make_row("scop")
    del plain["rate"]
    write_run("quick/x", [*ROWS, plain])
    run_main(monkeypatch)
    text = (paths.runs_root() / "quick" / "table.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)


# -- points ----------------------------------------------------------------------------


def make_point(chain: str, d: float, **more) -> dict:
    return {
        "net": "resnet20", "dataset": "mnist5k", "seed": 0, "chain": chain, "round": 1,
        "d": d, "w": 1.0, "r": 1.0, "top1": 80.0, "macs": 10**9, "seconds": 1.5,
    } | more  # fmt: skip


def test_points_of_all_runs_are_collected():
    write_run("toy/30/part0", [], points=[make_point("d", 0.9), make_point("d", 0.8)])
    write_run("toy/30/part1", [], points=[make_point("d", 0.7)])
    write_run("toy/02", [{"method": "l1", "after": 1.0}])
    found = publish.collect_rows("toy", kind="points")
    assert found["d"].tolist() == [0.9, 0.8, 0.7]
    assert set(found["device"]) == {"CPU"} and "after" not in found
    assert publish.collect_rows("toy")["after"].tolist() == [1.0]


@pytest.mark.parametrize("points", [5, [1], ["x"]])
def test_damaged_points_are_one_error_that_names_the_file(points):
    write_run("toy/30", [], points=points)
    with pytest.raises(ValueError, match=r"toy/30/metrics\.json"):
        publish.collect_rows("toy", kind="points")


def test_a_profile_with_points_only_is_published(monkeypatch, capsys):
    """A point that two runs hold is published once, the rest in order."""
    whole = make_point("whole", 1.0)
    later = ENVIRONMENT | {"revision": "def"}
    write_run("toy/30/part0", [], points=[make_point("d", 0.8, round=2), whole])
    write_run("toy/30/part1", [], points=[whole | {"seconds": 2.0},
              make_point("d", 0.9)], environment=later)  # fmt: skip
    run_main(monkeypatch, "--profile", "toy", "--publish")
    assert "toy_points.csv" in capsys.readouterr().out
    table = pd.read_csv(paths.RESULTS / "toy_points.csv")
    assert table[["chain", "round"]].to_numpy().tolist() == [
        ["d", 1], ["d", 2], ["whole", 1]
    ]  # fmt: skip
    assert table["macs"].tolist() == [10**9] * 3 and table["macs"].dtype == "int64"
    assert list_files(paths.RESULTS) == ["toy_points.csv"]


@pytest.mark.parametrize(
    "other", [{"net": "resnet56"}, {"dataset": "cifar10"}, {"epochs": 4}, {"seed": 2}]
)
def test_the_same_shares_of_another_network_are_another_point(other):
    """Every network has a point at d = w = r = 1."""
    whole = make_point("whole", 1.0)
    write_run("toy/30/a", [], points=[whole])
    write_run("toy/30/b", [], points=[whole | other])
    publish.publish("toy")
    assert len(pd.read_csv(paths.RESULTS / "toy_points.csv")) == 2


# -- figures ---------------------------------------------------------------------------


def test_a_figure_is_a_picture_and_its_numbers(folders):
    figure = Figure()
    figure.subplots().plot([1, 2])
    numbers = pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25]})
    report.set_style()
    for _ in range(2):
        report.save_figure("quick/x", "curve", figure, numbers)
    folder = folders / "runs" / "quick" / "figures"
    assert list_files(folders) == ["curve.csv", "curve.png"]
    picture = (folder / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert b"Software" not in picture and b"atplotlib" not in picture
    pd.testing.assert_frame_equal(pd.read_csv(folder / "curve.csv"), numbers)


def test_a_failed_figure_keeps_the_old_one(monkeypatch):
    figure, numbers = Figure(), pd.DataFrame({"x": [1]})
    file = report.save_figure("quick/x", "curve", figure, numbers)
    old = file.read_bytes()

    def fail(path, **options):
        path.write_bytes(b"half")
        raise RuntimeError("no font")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no font"):
        report.save_figure("quick/x", "curve", figure, numbers)
    assert file.read_bytes() == old and len(list_files(file.parent)) == 2


@pytest.mark.parametrize(
    "run, file",
    [
        ("quick/02_surgery", "quick/figures/trade.png"),
        ("cifar10/02_surgery", "cifar10/figures/trade_cifar10.png"),
        ("cifar10/02_surgery/seed1", "cifar10/figures/trade_cifar10_seed1.png"),
    ],
)
def test_figures_of_other_profiles_have_other_names(run, file):
    made = report.save_figure(run, "trade", Figure(), pd.DataFrame({"x": [1]}))
    assert made == paths.runs_root() / file


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
    assert len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_a_written_file_has_the_rights_that_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        file = paths.write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == mode


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target = paths.write_text(tmp_path / "there" / "a.txt", "old")
    (tmp_path / "link.txt").symlink_to("there/a.txt")
    paths.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and target.read_text() == "new"
    assert (
        len(list(tmp_path.iterdir())) == 2 and len(list(target.parent.iterdir())) == 1
    )


def test_what_a_killed_process_left_is_swept_and_work_of_today_is_not(tmp_path):
    def hang(tmp):
        tmp.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=paths.write_atomic, args=(tmp_path / "dead.txt", hang)
    )
    process.start()
    while not (left := list(tmp_path.glob(".tmp-*/new.txt"))):
        time.sleep(0.01)
    process.kill()
    process.join()
    folder = left[0].parent
    for age, stays in ((paths.OLD - 60, True), (paths.OLD + 60, False)):
        os.utime(folder, times=(time.time() - age,) * 2)
        paths.write_text(tmp_path / "a.txt", "new")
        assert folder.exists() == stays
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_while_writing_names_the_file(tmp_path):
    def fill(tmp):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 640 vs 598") from None

    with pytest.raises(OSError, match=r"No space left on device: '.*a\.pt'") as found:
        paths.write_atomic(tmp_path / "a.pt", fill)
    assert found.value.errno == 28 and list(tmp_path.iterdir()) == []


def test_two_processes_write_one_file_at_once(tmp_path):
    def write_often(text):
        for _ in range(40):
            paths.write_text(tmp_path / "a.txt", text * 1000)

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=write_often, args=(text,)) for text in "ab"]
    for process in both:
        process.start()
    seen = set()
    while any(process.is_alive() for process in both):
        if (tmp_path / "a.txt").exists():
            seen.add((tmp_path / "a.txt").read_text())
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert seen <= {"a" * 1000, "b" * 1000}
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


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
    monkeypatch.delenv("PRUNING_RUNS")
    assert paths.runs_root() == paths.ROOT / "data" / "runs"
    assert paths.shown(paths.ROOT / "data" / "x") == "data/x"
    assert paths.shown(tmp_path / "x.pt") == "x.pt"


def test_gaps_are_paired_by_seed():
    rows = pd.DataFrame(
        [("a", 0, 10.0, 50.0), ("a", 1, 20.0, 52.0), ("a", 2, 30.0, 60.0),
         ("b", 1, 25.0, 51.0), ("b", 0, 5.0, 53.0)],
        columns=["method", "seed", "before", "after"],
    )  # fmt: skip
    gaps = report.list_gaps(rows, [("a", "b"), ("b", "a")])
    assert gaps["before"].tolist() == [0.0, 0.0], "5 and -5"
    assert gaps["after"].tolist() == [-1.0, 1.0], "-3 and 1; seed 2 has no partner"
    assert gaps["sd"].tolist() == pytest.approx([8**0.5, 8**0.5])
    assert gaps["ahead"].tolist() == ["1 of 2", "1 of 2"]
    with pytest.raises(ValueError, match="duplicate"):
        report.list_gaps(pd.concat([rows, rows]), [("a", "b")])


# -- README ----------------------------------------------------------------------------


@pytest.fixture
def readme(monkeypatch):
    """The script as a module, with the committed rows."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(paths.ROOT / ".ci")
    return importlib.import_module("readme")


def test_readme_says_what_the_rows_say(readme, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    readme.main()  # exits where it does not


def test_readme_weighs_methods_that_all_bases_have_at_lengths_with_enough(readme):
    tops = {"l1": 80, "random": 70, "fpgm": 75, "unpruned": 90, "scratch": 99}
    rows = [
        {"method": name, "base_id": base, "length": length, "share": 0.5,
         "after": top + 5 * (length == 5 and name == "random")}
        for name, top in tops.items() for base in range(6) for length in (1, 5, 20)
        if length < 20 or base < 5
    ]  # fmt: skip
    lucky = {"method": "taylor", "base_id": 0, "length": 5, "share": 0.5, "after": 85}
    seventh = [  # a base that only 1 epoch has, where random is far better
        {"method": name, "base_id": 6, "length": 1, "share": 0.5, "after": 99}
        for name in tops
    ]
    best, length = readme.weigh(pd.DataFrame([*rows, lucky, *seventh]))
    assert best.startswith("Of 3 ways") and "after 5 epochs" in best
    assert "above 80.0 % (L1 norm) or below 75.0 % (" in best
    assert "90.0 % (means of 6 bases)" in best
    assert length.startswith("After 1 and 5 epochs of fine-tuning the L1 norm leads")
    assert "by 10.0 and 5.0 points (the last: +5.00 [" in length
    assert length.endswith("while random channels gain 5.0 points.")
    sixth = [  # now six bases have 20 epochs, but of two methods alone
        {"method": name, "base_id": 5, "length": 20, "share": 0.5, "after": tops[name]}
        for name in ("l1", "random", "unpruned")
    ]
    few = [r for r in rows if r["length"] < 20 or r["method"] != "fpgm"]
    best, length = readme.weigh(pd.DataFrame([*few, *sixth]))
    assert best.startswith("Of 3 ways") and "after 5 epochs" in best
    assert length.startswith("After 1, 5 and 20 epochs of fine-tuning")
    assert "by 10.0, 5.0 and 10.0 points" in length and "gain 0.0 points." in length


# -- blocked by base -------------------------------------------------------------------


def write_base(base: int, after: float) -> None:
    row = make_row(after=after, base_id=base)
    truth = [{"base_id": base, "layer": "a", "channel": 0, "worth": after}]
    name = f"toy/40_comparison/base{base}"
    write_run(name, [row], truth=truth)
    varied = {"base": base}
    RUNS["toy"][-1] = settings.Run("40_comparison", {"run": name, **varied}, varied)


def test_bases_are_published_one_by_one_and_keep_those_of_before(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "BASES", tmp_path / "bases")
    write_base(1, 81.0)
    missing = {"base": 0}
    name = "toy/40_comparison/base0"
    RUNS["toy"].append(settings.Run("40_comparison", {"run": name, **missing}, missing))
    for name in ("toy/40_comparison/base1", "toy/40_comparison"):
        report.save_figure(name, "gaps", Figure(), pd.DataFrame({"x": [1]}))
    run_main(monkeypatch, "--profile", "toy", "--publish")
    drawn = [
        f"{name}_toy.{end}" for name in ("gaps", "results") for end in ("csv", "png")
    ]
    assert list_files(paths.FIGURES) == drawn, "no picture of one base"
    RUNS["toy"].pop()
    write_base(0, 80.0)
    baseline = paths.runs_root() / "toy" / "baselines" / "net.pt"
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(9)}}
    half = baseline.with_name("half.pt")
    rows = [{"epoch": 1, "seconds": 1.0, "images_per_s": 1.0}]
    checkpoint.save(baseline, {"epochs": 1}, rows=rows, **state)
    checkpoint.save(half, {"epochs": 2}, rows=rows, **state)
    run_main(monkeypatch, "--profile", "toy", "--publish")
    for table, column in (("toy", "after"), ("toy_truth", "worth")):
        published = pd.read_csv(paths.RESULTS / f"{table}.csv")
        assert published["base_id"].tolist() == [0, 1]
        assert published[column].tolist() == [80, 81]
    kept = checkpoint.load(paths.BASES / "net.pt", ("model", "optimizer", "rows"))
    assert kept["optimizer"] == {} and kept["identity"] == {"epochs": 1}
    assert list_files(paths.BASES) == ["net.pt"]


def test_a_network_that_was_made_again_elsewhere_counts_once():
    rows = pd.DataFrame([
        make_row(method=method, base_id=base, share=0.5, length=5, after=after,
                 precision=precision)
        for method, base, after, precision in (
            ("l1", 0, 80.0, "float32"), ("l1", 1, 81.0, "float32"),
            ("l1", 1, 70.0, "bfloat16"), ("fpgm", 1, 75.0, "bfloat16"))
    ])  # fmt: skip
    assert report.drop_repeats(rows)["after"].tolist() == [80, 81, 75]
    other = rows.assign(rate=[0.1, 0.2, 0.3, 0.4])
    assert len(report.drop_repeats(other)) == 4, "another rate is another network"


def test_arms_of_a_base_are_published_in_parts(monkeypatch):
    """A method or a length that has not run here keeps its committed rows."""

    def arm(method, length, after, share=1 / 3, base=1):
        return make_row(method=method, length=length, after=after, share=share,
                        base_id=base)  # fmt: skip

    def publish(*rows):
        write_run("toy/40_comparison", list(rows))
        run_main(monkeypatch, "--profile", "toy", "--publish")
        RUNS["toy"].pop()
        table = pd.read_csv(paths.RESULTS / "toy.csv")
        return table[["base_id", "method", "length", "after"]].to_numpy().tolist()

    first = [arm("l1", 1, 80.0), arm("l1", 5, 82.0), arm("l1", 5, 82.5, share=0.5)]
    publish(*first, arm("l1", 5, 70.0, base=0))
    assert publish(arm("l1", 5, 83.0), arm("scratch", 5, 60.0)) == [
        [0, "l1", 5, 70.0],
        [1, "l1", 1, 80.0], [1, "l1", 5, 82.5],
        [1, "l1", 5, 83.0], [1, "scratch", 5, 60.0],
    ]  # fmt: skip
    shown = pd.read_csv(paths.FIGURES / "results_toy.csv")
    assert len(shown) == 5, "drawn are all committed rows"
    assert publish(arm("l1", 5, 84.0))[3:] == [[1, "scratch", 5, 60.0],
                                               [1, "l1", 5, 84.0]]  # fmt: skip
