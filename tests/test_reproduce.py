"""The engine: what is planned, what Snakemake is told and says, and who is killed."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakemake.cli import parse_args, parse_config
from test_settings import Copy, write_notebook

from lib import paths, settings

CI = paths.ROOT / ".ci"
sys.path.append(str(CI))
import plan  # noqa: E402
import slurm  # noqa: E402


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The script as a module, with its runs elsewhere."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path))
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    spec = importlib.util.spec_from_file_location("reproduce", CI / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """Takes Snakemake's place and keeps its command."""

    commands: list = []  # noqa: RUF012

    def __init__(self, command, **options):
        self.commands.append(command)

    def wait(self) -> int:
        return 0


def command_of(reproduce, monkeypatch, *arguments):
    """What a dry run would tell Snakemake."""
    Engine.commands = []
    monkeypatch.setattr(reproduce.subprocess, "Popen", Engine)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert not ended.value.code, ended.value.code
    (command,) = Engine.commands
    assert command[1] == str(CI / "engine.py")
    return command[2:]


def ask(reproduce, monkeypatch, *arguments):
    """Snakemake's reading of it."""
    return parse_args(command_of(reproduce, monkeypatch, *arguments))[1]


PROFILE = {"profile": "cifar10_cpu"}
CASES = [
    ([], {}),
    (["--config", "threads=1"], {"threads": 1}),
    (["--config", "threads=1", "deep=x"], {"threads": 1, "deep": "x"}),
    (["--config", "threads=1", "--config", "deep=x"], {"threads": 1, "deep": "x"}),
    (["--config=threads=1"], {"threads": 1}),
    (["-C", "threads=1"], {"threads": 1}),
    (["--config", "threads=1", "--forceall"], {"threads": 1}),
    (["--config", "profile=quick"], {}),
    (["--config"], {}),
]


@pytest.mark.parametrize(("more", "config"), CASES)
def test_further_config_values_reach_snakemake(reproduce, monkeypatch, more, config):
    """Beside the profile, which they neither push out nor change."""
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n", *more, "--cores", "3")
    assert parse_config(read.config) == PROFILE | config
    assert read.cores == 3 and read.dryrun and not read.targets
    assert read.forceall == ("--forceall" in more)


def test_a_run_starts_with_the_same_arguments(reproduce, monkeypatch):
    found = []
    monkeypatch.setattr(reproduce, "run", lambda *given: found.append(given))
    line = ["cifar10_cpu", "--config", "threads=1", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line])
    with pytest.raises(SystemExit):
        reproduce.main()
    ((profile, arguments, executor),) = found
    assert executor == "local"
    read = parse_args(["--cores", "1", *arguments])[1]
    assert profile == "cifar10_cpu"
    assert parse_config(read.config) == PROFILE | {"threads": 1}


@pytest.mark.parametrize("more, gpus", [([], 1), (["--resources", "gpu=2"], 2)])
def test_notebooks_take_turns_on_a_gpu(reproduce, monkeypatch, more, gpus):
    monkeypatch.setattr(reproduce, "GPU", "/dev/nvidia0")
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n", *more)
    assert read.resources["gpu"].value == gpus
    assert parse_config(read.config) == PROFILE | {"gpu": 1}
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n", *more, "--config", "gpu=0")
    assert parse_config(read.config) == PROFILE | {"gpu": 0}
    monkeypatch.setattr(reproduce, "GPU", None)
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n")
    assert not read.resources and parse_config(read.config) == PROFILE


def test_unknown_profiles_are_refused(reproduce, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "nonsense", "--config", "a=1"])
    with pytest.raises(SystemExit, match=r"no profile 'nonsense'; have .*quick"):
        reproduce.main()


@pytest.mark.parametrize("cores", ["0", "-1", "two", "1.5", "", "²", "1; touch x"])
def test_a_number_of_cores_that_is_none_is_refused(reproduce, monkeypatch, cores):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "quick", f"--cores={cores}"])
    with pytest.raises(SystemExit, match="CORES must be 1 or more, or all") as error:
        reproduce.main()
    assert "\n" not in str(error.value)


# ---- a cluster, without one (tests/test_cluster.py has one) ----


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(sacct="exit 1", ...)` are all that PATH has, but for a shell's own."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(**texts):
        for name, text in texts.items():
            write_program(folder / name, text)

    return write


@pytest.mark.parametrize(
    ("sacct", "works"),
    [
        ("exit 0", True),
        ("echo 'Slurm accounting storage is disabled' >&2", False),
        ("exit 1", False),
        (None, False),
    ],
)
def test_jobs_are_asked_for_where_somebody_answers(programs, sacct, works):
    programs(**{"sacct": sacct} if sacct else {})
    options = slurm.list_options("/runs")
    assert options[:2] == ["--slurm-jobname-prefix", slurm.name_jobs("/runs")]
    assert options[2:] == ([] if works else ["--slurm-status-command", "squeue"])


def test_a_cluster_is_told_no_cores_and_no_gpu_of_this_machine(reproduce, monkeypatch):
    monkeypatch.setattr(reproduce, "GPU", "/dev/nvidia0")
    monkeypatch.setattr(slurm, "has_accounting", lambda: True)
    ways = ["--cluster slurm", "--executor slurm", "-e slurm", "--executor=slurm"]
    for words in map(str.split, [*ways, "--profile notebooks/profiles/slurm"]):
        told = command_of(reproduce, monkeypatch, "quick", "-n", "--cores", "2", *words)
        assert "--cores" not in told and "--resources" not in told
        assert told[-2:] == ["--config", "profile=quick"]
        assert slurm.name_jobs(reproduce.RUNS) in told


def test_jobs_of_a_cluster_know_no_secrets(reproduce, monkeypatch):
    mine = {"AWS_SECRET_ACCESS_KEY": "x", "GITHUB_TOKEN": "x", "OMP_NUM_THREADS": "9"}
    for name, value in (mine | {"PRUNING_DATA": "d", "PRUNING_PROGRESS": "p"}).items():
        monkeypatch.setenv(name, value)
    told = reproduce.prepare_environment(remote=True)
    assert not (mine.keys() | {"PRUNING_PROGRESS"}) & told.keys()
    assert told["PRUNING_DATA"] == "d" and told["HOME"] == os.environ["HOME"]
    assert told["PATH"].startswith(str(Path(sys.executable).parent))
    assert mine.items() <= reproduce.prepare_environment(remote=False).items()


def test_only_jobs_of_this_folder_are_cancelled_and_waited_for(
    programs, tmp_path, monkeypatch
):
    mine, state = slurm.name_jobs("/runs"), tmp_path / "state"
    state.write_text(f"5 R {mine}_a\n6 CG {mine}_a\n7 R {mine}0_b\n8 R other\n")
    programs(
        squeue=f'while read -r line; do echo "$line"; done < {state}',
        scancel=f"echo $* >> {tmp_path}/ended; echo '8 R other' > {state}",
    )
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    assert slurm.cancel_jobs("/runs") == 1
    assert (tmp_path / "ended").read_text() == "5\n"
    state.write_text(f"6 CG {mine}_a\n")
    with pytest.raises(OSError, match="jobs 6 do not end"):
        slurm.cancel_jobs("/runs")
    programs(squeue="echo no controller >&2; exit 1")
    with pytest.raises(OSError, match="squeue: no controller"):
        slurm.cancel_jobs("/runs")


def test_nobody_writes_where_jobs_may_still_write(reproduce, programs):
    lock = reproduce.take_lock()
    lock.write("slurm")
    lock.flush()
    with pytest.raises(SystemExit, match=r"may still have jobs .* no squeue .* empty"):
        reproduce.stop_leftovers(lock)
    programs(squeue="exit 0")
    reproduce.stop_leftovers(lock)
    assert (reproduce.RUNS / ".reproduce.lock").read_text() == ""


# ---- what Snakemake says ----


@pytest.fixture
def events(monkeypatch):
    """`events(record, ...)`: the lines that the logger plugin writes of them."""
    import engine as plugin

    mine, its = os.pipe()
    handler = plugin.LogHandler(None, plugin.LogHandlerSettings(fd=its))

    def write(*records):
        for record in records:
            handler.handle(record)
        os.close(its)
        with open(mine, encoding="utf-8") as lines:
            return list(lines)

    return write


def make_record(event, **values):
    record = logging.LogRecord(
        "x", logging.INFO, "x", 1, values.pop("msg", ""), (), None
    )
    vars(record).update(values, event=event)
    return record


SAID = "It failed. For further error details see the log."
SBATCH = """SLURM sbatch failed. The error message was 'sbatch: error: no such GPU'.
    sbatch call:
        sbatch --many words For further error details see the log."""


def test_starts_steps_and_failures_come_as_events(reproduce, events, capsys):
    job = {"log": ["data/my runs/11_scop.ipynb"], "output": [], "rule_name": "a b"}
    other = job | {"log": ["data/12_scop.ipynb", "slurm.log"], "rule_name": "c"}
    failed, done = reproduce.follow(events(
        make_record("run_info", msg="stats"),
        make_record("job_info", **job),
        make_record("job_info", **other),
        make_record("progress", done=2, total=9),
        make_record("job_error", **job, rule_msg=None),
        make_record("job_error", **other, rule_msg=SAID),
        make_record("error", msg="a disk is full"),
    ))  # fmt: skip
    assert done == 2 and failed == {
        "data/my runs/11_scop.ipynb": "",
        "data/12_scop.ipynb": SAID,
        "a disk is full": None,
    }
    assert capsys.readouterr().out.splitlines() == [
        "  running data/my runs/11_scop.ipynb",
        "  running data/12_scop.ipynb",
        "2 of 9 steps done after 0:00",
    ]
    reproduce.explain_failure(failed, 1, Path("data/x.log"))
    assert capsys.readouterr().err.splitlines() == [
        "failed: open data/my runs/11_scop.ipynb (it did not start)",
        "failed: open data/12_scop.ipynb (it did not start; It failed)",
    ]
    reproduce.explain_failure({"a disk is full": None}, 1, Path("data/x.log"))
    assert capsys.readouterr().err == "failed: a disk is full\n"


def test_the_refusal_of_a_cluster_is_shown(reproduce, capsys):
    reproduce.explain_failure({"data/x/11.ipynb": SBATCH}, 1, Path("x.log"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("failed: data/x/11.ipynb (the cluster refused the job: "
                    "'sbatch: error: no such GPU'.)")  # fmt: skip


def test_a_line_cut_short_by_a_kill_is_no_event(reproduce):
    assert reproduce.follow(['{"event": "progr']) == ({}, 0)


def test_the_error_of_a_notebook_is_quoted(reproduce, tmp_path):
    error = {"output_type": "error", "ename": "ValueError", "evalue": "bad\nmore"}
    notebook = tmp_path / "failed.ipynb"
    notebook.write_text(json.dumps({"cells": [{"outputs": [error]}, {}]}))
    assert reproduce.last_error(notebook) == "ValueError: bad"
    assert reproduce.last_error(tmp_path / "none.ipynb") == "it did not start"


def start_reproduce(copy, profile, **more):
    """`.ci/reproduce.py` of a copy of the repository, begun."""
    environment = {**os.environ, "PRUNING_RUNS": str(copy.root / "runs"), **more}
    return subprocess.Popen(
        [sys.executable, copy.root / ".ci/reproduce.py", profile, "--cores", "2"],
        cwd=copy.root, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_profile_whose_name_holds_a_space_fails_at_the_right_notebook(tmp_path):
    copy = Copy(tmp_path / "my copy")
    copy.write("my toy", "02_surgery: {seed: [13]}\n")
    process = start_reproduce(copy, "my toy")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.splitlines() == [
        "failed: open runs/my toy/02_surgery/seed13/02_surgery.ipynb "
        "(RuntimeError: unlucky)"
    ]
    (started,) = [line for line in output.splitlines() if "running" in line]
    assert started == "  running runs/my toy/02_surgery/seed13/02_surgery.ipynb"
    text = (copy.root / "runs/my toy.log").read_text()
    assert "RuntimeError: unlucky" in text, "the log has what the notebook said"


# ---- one run at a time ----

DRIVER = """
import importlib.util, pathlib, subprocess, sys, time
spec = importlib.util.spec_from_file_location("reproduce", {script!r})
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)
here = pathlib.Path(sys.argv[1])
def run_snakemake(arguments, remote, log):
    if here.name == "second":
        started = subprocess.Popen(
            ["sleep", "60"], env=reproduce.prepare_environment(remote=False))
        here.write_text(str(started.pid))
        time.sleep(2)
        return started.poll() or 0, {{}}, 1
    return 0, {{}}, 1
def show_results(profile):
    here.with_suffix(".table").touch()
    time.sleep(20 if here.name == "first" else 0)
    return 0
reproduce.run_snakemake, reproduce.show_results = run_snakemake, show_results
sys.exit(reproduce.run("quick", []))
"""


def test_a_run_is_not_killed_by_the_watcher_of_the_one_before(tmp_path):
    """Which was killed, with its `make`, while it printed its table."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(script=str(CI / "reproduce.py")))
    environment = os.environ | {"PRUNING_RUNS": str(tmp_path / "runs")}
    call = f'{sys.executable} {driver} {tmp_path}/first; echo "ended"'
    parent = subprocess.Popen(["sh", "-c", call], env=environment,
                              stdout=subprocess.DEVNULL)  # fmt: skip
    wait_for(tmp_path / "first.table")
    parent.kill()
    parent.wait()
    command = [sys.executable, driver, tmp_path / "second"]
    second = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert second.returncode == 0, second.stderr.decode()
    with pytest.raises(ProcessLookupError):  # what it started ends with it
        for _ in range(50):
            os.kill(int((tmp_path / "second").read_text()), 0)
            time.sleep(0.1)


def wait_for(path):
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def test_one_run_at_a_time(reproduce):
    lock = reproduce.take_lock()
    second = subprocess.run([sys.executable, CI / "reproduce.py", "quick"], text=True,
                            capture_output=True, timeout=60)  # fmt: skip
    lock.close()
    assert second.returncode == 1 and "another `make reproduce`" in second.stderr
    assert len(second.stderr.splitlines()) == 1


# ---- make ----


@pytest.fixture
def make(tmp_path):
    """`make(target, NAME=value, ...)` in a checkout whose Python only echoes."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    checkout = tmp_path / "checkout"
    for folder in (".ci", ".venv/bin", "data/runs/quick"):
        (checkout / folder).mkdir(parents=True)
    shutil.copy(paths.ROOT / "Makefile", checkout)
    write_program(checkout / ".ci/setup", "exit 0")
    write_program(checkout / ".venv/bin/python", 'printf "<%s>" "$@"')
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNING_")}

    def run(target, **values):
        words = ["make", target, *(f"{k}={v}" for k, v in values.items())]
        return subprocess.run(words, cwd=checkout, env=environment, text=True,
                              capture_output=True, timeout=60)  # fmt: skip

    run.checkout = checkout
    return run


@pytest.mark.parametrize("profile", ["x; touch y", "a'b", 'a"b', "a b", "`touch y`"])
def test_make_hands_names_on_as_they_are(make, profile):
    made = make("reproduce", PROFILE=profile, CORES="2; touch y")
    assert f"<.ci/reproduce.py><{profile}><--cores><2; touch y>" in made.stdout
    made = make("reproduce", PROFILE="x", CLUSTER="my place")
    assert "<.ci/reproduce.py><x><--cluster><my place>" in made.stdout
    assert f"<--profile><{profile}>" in make("publish", PROFILE=profile).stdout
    assert not (make.checkout / "y").exists()


def test_make_clean_removes_one_folder(make, tmp_path):
    runs, other = tmp_path / 'it\'s "my" runs', tmp_path / "other"
    for folder in (runs / "quick", runs / "a b", other, make.checkout / "quick"):
        folder.mkdir(parents=True)
    for profile in ("quick", "a b"):
        made = make("clean", PROFILE=profile, PRUNING_RUNS=runs)
        assert made.returncode == 0, made.stderr
        assert not (runs / profile).exists()
    for profile in ("", "..", ".", "../other", "a/b", str(other)):
        made = make("clean", PROFILE=profile, PRUNING_RUNS=runs)
        assert made.returncode != 0 and "PROFILE must be a name" in made.stdout
    assert runs.exists() and other.exists() and (make.checkout / "quick").exists()
    assert (make.checkout / "data/runs/quick").exists()
    assert make("clean").returncode == 0
    assert not (make.checkout / "data/runs/quick").exists()


# ---- profiles, as a whole ----


@pytest.fixture
def books(tmp_path, monkeypatch):
    """Two notebooks; `write(bytes)` makes the profile `toy`."""
    for name in ("01_first", "02_second"):
        declared = "run = 'x'\nseed = 0\nnet = 'a'\nlr = 0.1\nrates = [0.5]"
        write_notebook(tmp_path / f"{name}.ipynb", declared)
    (tmp_path / "params").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))
    return (tmp_path / "params" / "toy.yaml").write_bytes


GRID = "[" + ", ".join(map(str, range(200))) + "]"
REFUSED = [
    ("01_first: {net: [../../../x]}", r"with \{'net': '../../../x'\} would write"),
    ("01_first: {net: [a/b]}", r"would write the folder 'neta/b'"),
    ("01_first: {net: ['a\\b']}", r"names of folders"),
    ("01_first: {net: ['{a}']}", r"'net\{a\}'; names of folders"),
    ('01_first: {net: ["a\\0b"]}', r"names of folders|not valid YAML"),
    ("01_first: {net: ['" + "a" * 300 + "']}", r"at most 200"),
    ("01_first: {net: [a, A]}", r"'net': 'a'.* and with .*'net': 'A'.* both write"),
    ("01_first: {lr: [1, 1.0]}", r"both write the folder toy/01_first/lr1\.0"),
    ("01_first: {seed: 1}\n01_first: {seed: 2}", r"'01_first' stands in lines 1 and 2"),
    ("01_first:\n  seed: 1\n  seed: 2", r"'seed' stands in lines 2 and 3; keep one"),
    (f"01_first: {{seed: {GRID}, lr: {GRID}}}", r"40,000 runs, at most 20,000"),
    (f"01_first: [{{}}, {{seed: {GRID}, lr: {GRID}}}]", r"40,001 runs, at most 20,000"),
    ("01_first: [{seed: 1}, {seed: 2}]", r"both write the folder toy/01_first;"),
]


@pytest.mark.parametrize("text, message", REFUSED, ids=range(len(REFUSED)))
def test_a_profile_that_cannot_be_planned_is_refused_in_one_line(books, text, message):
    books(text.encode())
    with pytest.raises(ValueError, match=message) as error:
        plan.read_runs("toy")
    assert "\n" not in str(error.value)


def test_a_profile_that_is_not_utf8_is_refused(books):
    books("# größer\n01_first: {}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"toy\.yaml: byte 4 is not UTF-8; save"):
        plan.read_runs("toy")


def test_names_that_only_look_alike_are_two_runs(books):
    books(b"01_first: {net: [a-b, a_b, a b]}\n02_second: {net: '{a}'}")
    runs = plan.read_runs("toy")
    assert len({run.folder for run in runs}) == 4
    assert runs[-1].parameters["net"] == "{a}"


def test_a_key_twice_in_a_mapping_of_any_kind_is_found_and_merges_pass(books):
    books(b"01_first: &a {seed: 1}\n02_second: {<<: *a, lr: 0.5}")
    assert plan.read_runs("toy")[1].parameters == {
        "seed": 1, "lr": 0.5, "run": "toy/02_second",
    }  # fmt: skip
    books(b"[1, 2]: {}\n")
    with pytest.raises(ValueError, match="toy"):
        plan.read_runs("toy")


NAMES = ("seed", "base", "lr")


@given(st.lists(st.lists(st.sampled_from(NAMES), unique=True), min_size=4, max_size=4))
def test_runs_wait_for_those_that_vary_with_the_same_values(varied):
    needs = {"b": ["a"], "c": ["a", "b"]}
    runs = [
        settings.Run(book, {"run": book}, dict(zip(names, values, strict=True)))
        for book, names in zip("aabc", varied, strict=True)  # of `a` two grids
        for values in product(range(2), repeat=len(names))
    ]
    before = plan.Needs(runs, needs)
    for run in runs:
        expected = [
            other for other in runs
            if other.notebook in needs.get(run.notebook, [])
            and all(run.varied.get(k, v) == v for k, v in other.varied.items())
        ]  # fmt: skip
        found = before.of(run)
        assert len(found) == len(expected) and all(x in expected for x in found)


def test_lists_of_lists_wait_for_their_own(books):
    books(b"01_first: {rates: [[0.1, 0.2], [0.3]]}\n02_second: {rates: [[0.3]]}")
    runs = plan.read_runs("toy")
    (first,) = plan.Needs(runs, {"02_second": ["01_first"]}).of(runs[2])
    assert first.folder.name == "rates0.3"
    grid = {"rates": [[0.1, 0.2], [0.3]], "seed": [0, 1]}
    assert plan.count_runs(grid) == 4 and plan.count_runs([grid, {}, None]) == 6


def make_runs(book, count, name):
    return [settings.Run(book, {}, {name: i}) for i in range(count)]


def test_large_grids_are_planned_in_time_that_grows_with_them(books):
    seeds = ", ".join(map(str, range(5000)))
    books(f"01_first: {{seed: [{seeds}]}}\n02_second: {{seed: [{seeds}]}}".encode())
    begin = time.process_time()
    runs = plan.read_runs("toy")
    before = plan.Needs(runs, {"02_second": ["01_first"]})
    assert sum(len(before.of(run)) for run in runs) == 5000
    assert time.process_time() - begin < 6  # 5,000 x 5,000 comparisons take longer


def test_more_files_to_wait_for_than_can_be_planned_are_refused():
    runs = make_runs("a", 500, "seed") + make_runs("b", 500, "lr")
    with pytest.raises(ValueError, match="250,000 files, at most 200,000"):
        plan.Needs(runs, {"b": ["a"]}).check()
    plan.Needs(runs, {}).check()
