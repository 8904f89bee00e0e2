"""Parameters, profiles, and the workflow that runs them."""

import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import IPython
import nbformat
import pytest
import threadpoolctl
import torch
import yaml
from papermill.translators import PythonTranslator

from lib import paths, settings

ROOT = Path(__file__).resolve().parent.parent


# -- check -----------------------------------------------------------------------------


def test_checked_parameters_are_attributes():
    cfg = settings.check(
        run="quick/x", lr=1, rates=[0, 0.5], seeds=(0, 1), pretrained=False
    )
    assert (cfg.run, cfg.lr, cfg.rates, cfg.seeds) == (
        "quick/x",
        1.0,
        [0.0, 0.5],
        [0, 1],
    )
    assert type(cfg.lr) is float and all(type(r) is float for r in cfg.rates)
    assert list(vars(cfg)) == ["run", "lr", "rates", "seeds", "pretrained"]


WRONG = [
    ({"sed": 0}, r"parameter 'sed' is unknown; did you mean 'seed'\?"),
    ({"xyzzy": 0}, r"parameter 'xyzzy' is unknown; known: alpha, "),
    ({"threads": 0}, r"threads must lie in \[1, inf\), got 0"),
    ({"lr": "1e-3"}, r"lr must be a float, got '1e-3', .* str .*write 1\.0e-3"),
    ({"seed": "3"}, r"seed must be an int, got '3'"),
    ({"seed": True}, r"seed must be an int, got True, which is a bool"),
    ({"seed": 1.0}, r"seed must be an int, got 1\.0, which is a float"),
    ({"seed": -1}, r"seed must lie in \[0, 2.*\), got -1"),
    ({"seed": None}, r"seed must be an int, got None"),
    ({"lr": True}, r"lr must be a float, got True, which is a bool"),
    ({"lr": math.nan}, r"lr must lie in .*got nan"),
    ({"lr": math.inf}, r"lr must lie in .*got inf"),
    ({"lr": 0.0}, r"lr must lie in .*got 0\.0"),
    ({"batch_size": 0}, r"batch_size must lie in \[1, inf\), got 0"),
    ({"rate": 1.0}, r"rate must lie in \[0, 1\), got 1\.0"),
    ({"rate": -0.1}, r"rate must lie in \[0, 1\), got -0\.1"),
    ({"rates": 0.5}, r"rates must be a list .*got 0\.5"),
    ({"rates": []}, r"rates must be a list with an entry, got \[\]"),
    ({"rates": [0.1, 1.5]}, r"rates must lie in \[0, 1\), got 1\.5"),
    ({"seeds": [0, "1"]}, r"seeds must be an int, got '1'"),
    ({"methods": "l1"}, r"methods must be a list"),
    ({"methods": []}, r"methods must be a list with an entry, got \[\]"),
    ({"methods": [1]}, r"methods must be a str, got 1"),
    ({"pretrained": 1}, r"pretrained must be a bool, got 1"),
    ({"pretrained": "yes"}, r"pretrained must be a bool, got 'yes'"),
    ({"residual": "ties"}, r"residual must be one of .*'tie'.*got 'ties'"),
    ({"net": None}, r"net must be a str, got None"),
    ({"methods": "[l1]"}, r"methods must be a list .*: -y \"methods: \[l1\]\"$"),
    ({"rates": 0.5}, r"rates must be a list .*: -y \"rates: \[0\.5\]\"$"),
    ({"seeds": [0, 0]}, r"seeds must name each value once, got 0 twice"),
    ({"methods": ["l1", "nisp", "l1"]}, r"methods must .* got 'l1' twice"),
    ({"part": 2, "parts": 2}, r"part must lie in \[0, parts\), got part 2 of 2"),
]


@pytest.mark.parametrize("values, message", WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_parameters_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        settings.check(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sent, known", [({"sed": 3}, "'seed'"), ({"nets": 1}, "run")])
def test_a_parameter_that_papermill_was_given_in_vain_is_refused(
    monkeypatch, sent, known
):
    def receive(values):
        cell = PythonTranslator.codify(values, comment="Parameters")
        shell = SimpleNamespace(user_ns={"In": ["", "run = 'x'; seed = 0", cell]})
        monkeypatch.setattr(IPython, "get_ipython", lambda: shell)

    receive({"seed": 4, "run": "y"})
    assert settings.check(run="y", seed=4).seed == 4
    receive(sent)
    name = next(iter(sent))
    with pytest.raises(ValueError, match=f"parameter '{name}' is unknown.*{known}"):
        settings.check(run="x", seed=0)


def test_rules_let_their_bounds_in():
    assert settings.check(part=1, parts=2, low=[0.5, 0.5], seed=0).part == 1
    assert settings.check(controls=[], methods=["l1"], seed=0).controls == []
    assert vars(settings.check(keep=1, seed=2**31 - 1, rates=[0])) == {
        "keep": 1.0, "seed": 2**31 - 1, "rates": [0.0],
    }  # fmt: skip
    for name, rule in settings.PARAMETERS.items():
        assert rule.low < rule.high and rule.kind in (int, float, str, bool), name


# -- profiles --------------------------------------------------------------------------


def write_notebook(path: Path, parameters: str, code: str = "pass") -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(code)])
    book.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    nbformat.write(book, path)


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A folder of two notebooks; `write(text)` makes the profile `toy`."""
    write_notebook(tmp_path / "01_first.ipynb", "run = 'x'\nseed = 0\nrates = [0.5]")
    write_notebook(tmp_path / "02_second.ipynb", "run = 'x'\nlr = 0.1\nnovel = 1")
    (tmp_path / "params").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path / "runs"))
    return lambda text: (tmp_path / "params" / "toy.yaml").write_text(text)


def test_a_profile_gives_runs_with_folders(books, tmp_path):
    books("01_first: {seed: [0, 2], rates: [0.1, 0.2]}\n02_second:\n")
    runs = settings.read_profile("toy")
    assert [run.name for run in runs] == [
        "toy/01_first/seed0", "toy/01_first/seed2", "toy/02_second",
    ]  # fmt: skip
    expected = {"rates": [0.1, 0.2], "seed": 2, "run": "toy/01_first/seed2"}
    assert runs[1].parameters == expected and runs[1].varied == {"seed": 2}
    assert runs[1].folder == tmp_path / "runs" / "toy/01_first/seed2"
    assert runs[2].parameters == {"run": "toy/02_second"}


def test_a_run_takes_its_threads_from_notebook_profile_or_caller(books, tmp_path):
    write_notebook(tmp_path / "01_first.ipynb", "run = 'x'\nthreads: int = 3  # cores")
    books("01_first: {}\n02_second: {}\n")
    runs = settings.read_profile("toy")
    assert [run.threads for run in runs] == [3, 1]
    assert all("threads" not in run.parameters for run in runs)
    asked = settings.read_profile("toy", threads=2)
    assert [run.threads for run in asked] == [2, 1]
    assert asked[0].parameters["threads"] == 2, "the notebook is told as well"
    assert "threads" not in asked[1].parameters, "it declares none"
    with pytest.raises(ValueError, match=r"threads must lie in \[1"):
        settings.read_profile("toy", threads=0)
    books("01_first: {threads: 4}\n")
    assert [run.threads for run in settings.read_profile("toy")] == [4]
    assert settings.read_profile("toy", threads=1)[0].threads == 1


def test_a_run_takes_the_threads_of_all_its_processes(books, tmp_path):
    text = "run = 'x'\nthreads: int = 3\nprocesses: int = 1"
    write_notebook(tmp_path / "01_first.ipynb", text)
    books("01_first: {processes: [1, 2]}\n")
    assert [run.threads for run in settings.read_profile("toy")] == [3, 6]
    assert [r.threads for r in settings.read_profile("toy", threads=1)] == [1, 2]
    books("01_first: {processes: 0}\n")
    with pytest.raises(ValueError, match=r"processes must lie in \[1"):
        settings.read_profile("toy")


def test_two_lists_make_a_grid(books, tmp_path):
    write_notebook(tmp_path / "01_first.ipynb", "run = 'x'\nseed = 0\nlr = 0.1")
    books("01_first: {seed: [0, 1], lr: [0.1, 0.01, 1.0]}")
    names = [run.name for run in settings.read_profile("toy")]
    assert len(set(names)) == 6 and "toy/01_first/seed1-lr0.01" in names


def test_a_list_of_lists_makes_a_run_of_each(books, tmp_path):
    write_notebook(tmp_path / "02_second.ipynb", "run = 'x'\nrates = [0.5]\nseed = 0")
    books(
        "01_first: {rates: [[0.1, 0.2], [0.3]], seed: [0, 1]}\n"
        "02_second: {rates: [[0.3], [0.1, 0.2]]}\n"
    )
    runs = settings.read_profile("toy")
    names = [f"rates0.1+0.2-seed{s}" for s in "01"] + [
        f"rates0.3-seed{s}" for s in "01"
    ]
    assert [run.folder.name for run in runs[:4]] == names
    assert [run.parameters["rates"] for run in runs[:4]] == 2 * [[0.1, 0.2]] + 2 * [
        [0.3]
    ]


def test_a_notebook_may_have_several_grids(books):
    books("01_first:\n- {seed: [0, 1], rates: [0.1]}\n- {seed: [2], rates: [0.2]}\n")
    runs = settings.read_profile("toy")
    assert [(run.varied["seed"], run.parameters["rates"]) for run in runs] == [
        (0, [0.1]), (1, [0.1]), (2, [0.2])]  # fmt: skip


REFUSED = [
    ("01_first: {rates: [[0.1], [0.1]]}", r"needs different values of 'rates'"),
    ("01_first: {rates: [[0.1], 0.2]}", r"rates must be a list with an entry, got 0.2"),
    ("01_first: {rates: [[0.1], [7]]}", r"rates must lie in"),
    ("01_first: {sed: 1}", r"toy: in 01_first parameter 'sed' is unknown.*mean 'seed'"),
    ("01_frist: {}", r"toy: notebook '01_frist' is unknown; .* '01_first'"),
    ("01_first: {seed: -1}", r"seed must lie in"),
    ("01_first: {seed: [0, 1.5]}", r"seed must be an int"),
    ("02_second: {lr: 1e-3}", r"write 1\.0e-3"),
    ("02_second: {novel: 2}", r"parameter 'novel' is unknown"),
    ("01_first: {seed: 1", r"toy\.yaml: not valid YAML"),
    ("01_first: {seed: [0, 0]}", r"seed"),
    ("01_first: {seed: []}", r"seed"),
    ("02_second: {novel: [1, 2]}", r"novel"),
    ("- 01_first", r"toy"),
    ("just text", r"toy"),
    ("01_first: 5", r"01_first"),
    ("01_first: [seed, 1]", r"01_first"),
    ("01_first: [{seed: 1}, {sed: 1}]", r"in 01_first parameter 'sed' is unknown"),
    ("01_first: {1: 2}", r"1"),
    ("1: {seed: 2}", r"1"),
]


@pytest.mark.parametrize("text, message", REFUSED, ids=[r[0] for r in REFUSED])
def test_a_wrong_profile_is_a_value_error(books, text, message):
    books(text)
    with pytest.raises(ValueError, match=message):
        settings.read_profile("toy")


def test_an_unknown_profile_names_the_nearest(books):
    books("01_first:")
    with pytest.raises(
        ValueError, match="profile 'tyo' is unknown; did you mean 'toy'"
    ):
        settings.read_profile("tyo")


def test_an_empty_profile_has_no_runs(books):
    books("# nothing yet\n")
    assert settings.read_profile("toy") == []


def test_committed_profiles_are_yaml_with_known_parameters():
    for path in (ROOT / "notebooks" / "params").glob("*.yaml"):
        for changes in yaml.safe_load(path.read_text()).values():
            for part in settings.list_parts(changes):
                assert set(part or {}) <= set(settings.PARAMETERS)


# -- staleness -------------------------------------------------------------------------

MODULE = '"""Says."""\nimport math\nLIMIT = 3\n\n\ndef work(x):\n    return x + LIMIT\n'


@pytest.fixture
def checkout(tmp_path):
    """`hash_after(file, text)` writes a file of a small checkout and hashes it anew."""
    spec = importlib.util.spec_from_file_location("s", ROOT / ".ci" / "staleness.py")
    staleness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(staleness)
    for name in ("scop", "nisp", "base"):
        (tmp_path / "lib" / name).mkdir(parents=True)
        (tmp_path / "lib" / name / "__init__.py").write_text("")
    (tmp_path / "lib" / "scop" / "core.py").write_text("from lib.base import deep\n")
    (tmp_path / "lib" / "base" / "deep.py").write_text(MODULE)
    (tmp_path / "lib" / "nisp" / "core.py").write_text(MODULE)
    (tmp_path / "notebooks").mkdir()
    book = tmp_path / "notebooks" / "10_scop.ipynb"
    write_notebook(book, "run = 'x'", "from lib import scop\nscop.go(3)")

    def hash_after(name: str, text: str) -> str:
        if name.endswith(".ipynb"):
            write_notebook(tmp_path / name, "run = 'x'", text)
        else:
            (tmp_path / name).write_text(text)
        return staleness.hash_notebooks(tmp_path)["10_scop"]

    return hash_after


BOOK, DEEP = "notebooks/10_scop.ipynb", "lib/base/deep.py"
SAME = [
    (DEEP, MODULE.replace("Says.", "Says more, on\ntwo lines.")),
    (DEEP, MODULE.replace("(x):", '(x):\n    """Add."""\n    # why\n')),
    (DEEP, MODULE.replace("x + LIMIT", "(\n        x + LIMIT\n    )")),
    ("lib/nisp/core.py", MODULE.replace("3", "4")),
    ("lib/nisp/new.py", MODULE),
    ("README.md", "words"),
    (BOOK, "# to begin with\nfrom lib import scop\nscop.go( 3 )"),
]
OTHER = [
    (DEEP, MODULE.replace("3", "4")),
    (DEEP, MODULE.replace("x + LIMIT", "LIMIT + x")),
    ("lib/base/late.py", MODULE),
    ("lib/scop/core.py", "from lib.base import deep\nfrom lib import nisp\n"),
    ("lib/scop/core.py", "import lib.base.deep\nimport lib.nisp\n"),
    (BOOK, "from lib import scop\nscop.go(4)"),
    (BOOK, "%time 1\nfrom lib import scop\nscop.go(3)"),
]


@pytest.mark.parametrize("name, text", SAME)
def test_what_cannot_change_a_result_makes_no_run_stale(checkout, name, text):
    assert checkout("x", "") == checkout(name, text)


@pytest.mark.parametrize("name, text", OTHER)
def test_what_can_change_a_result_makes_a_run_stale(checkout, name, text):
    assert checkout("x", "") != checkout(name, text)


# -- versions --------------------------------------------------------------------------


def test_environment_names_versions_and_device():
    found = settings.environment()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(isinstance(value, str) and value for value in found.values())
    assert {"python", "torchvision", "numpy", "device", "revision"} < set(found)


def test_a_machine_without_git_has_an_unknown_revision(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert settings.code_revision() == "unknown"


def test_a_copy_outside_git_has_an_unknown_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert settings.code_revision() == "unknown"


def test_threads_are_those_of_torch_and_of_blas(one_thread):
    for threads in (2, 1):
        settings.use_threads(threads)
        assert torch.get_num_threads() == threads
        pools = threadpoolctl.threadpool_info()
        assert {pool["num_threads"] for pool in pools} == {threads}, pools


def test_seeding_repeats_draws():
    with torch.random.fork_rng():
        draws = []
        for seed in (1, 1, 2):
            settings.seed_everything(seed)
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- the workflow, for real ------------------------------------------------------------

DECLARED = "run: str = 'toy/x'\nseed: int = 0\nlr: float = 0.1\n"
WORK = """
from lib import paths, settings
cfg = settings.check(run=run, seed=seed, lr=lr)
if cfg.seed == 13:
    raise RuntimeError("unlucky")
metrics = {"run": cfg.run, "settings": dict(vars(cfg))}
paths.write_json(paths.runs_root() / cfg.run / "metrics.json", metrics)
"""
BOOKS = ("00_start_here", "01_baseline", "02_surgery")
FIRST = """
00_start_here: {}
01_baseline: {lr: 0.2}
02_surgery: {seed: [1, 13]}
"""
SECOND = "00_start_here: {}\n01_baseline: {lr: 0.2}\n02_surgery: {seed: [1]}\n"


class Copy:
    """The repository's layout in a temporary folder, with toy notebooks."""

    def __init__(self, root: Path):
        self.root = root
        self.runs = root / "runs" / "toy"
        shutil.copytree(ROOT / "lib", root / "lib")
        shutil.copytree(ROOT / ".ci", root / ".ci")
        (root / "notebooks" / "params").mkdir(parents=True)
        shutil.copy(ROOT / "notebooks" / "Snakefile", root / "notebooks")
        for book in BOOKS:
            write_notebook(root / "notebooks" / f"{book}.ipynb", DECLARED, WORK)
        # jsonschema does without this grammar, which takes papermill a second to build
        (root / "rfc3987_syntax.py").write_text("raise ImportError")

    def start(self, profile: str, *arguments: str, **more: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PRUNING_RUNS": str(self.root / "runs"),
            "PYTHONPATH": str(self.root),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "-s", "notebooks/Snakefile",
             "--nolock", "--keep-going", "--cores", "2", *arguments,
             "--config", f"profile={profile}"],
            cwd=self.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        text = path.read_text()
        path.write_text(text.replace(old, new, 1) if old else text + new)

    def write(self, name: str, text: str) -> None:
        (self.root / "notebooks" / "params" / f"{name}.yaml").write_text(text)


def wait(process) -> tuple[int, str]:
    output = process.communicate(timeout=600)[0]
    return process.returncode, output


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """Five calls of Snakemake: (exit status, output) by name, and the copy."""
    copy = Copy(tmp_path_factory.mktemp("repository"))
    copy.write("toy", FIRST)
    copy.write("bad", "01_baseline: {sed: 1}\n")
    refused = copy.start("bad")
    done = {"first": wait(copy.start("toy")), "refused": wait(refused)}
    copy.write("toy", SECOND)
    # a docstring, the form of a notebook's file, code that nobody imports
    copy.edit("lib/paths.py", '"""', '"""Said differently. ')
    copy.edit("notebooks/01_baseline.ipynb", '"cells": [', '"cells": [ ')
    copy.edit("lib/nisp/__init__.py", "", "ADDED = 1\n")
    done["again"] = wait(copy.start("toy"))
    copy.write("toy", SECOND.replace("lr: 0.2", "lr: 1.0e-5"))
    copy.edit("notebooks/00_start_here.ipynb", "unlucky", "unhappy")
    copy.edit(".ci/staleness.py", "return {", "print('hashed'); return {")
    told = json.dumps(dict.fromkeys(BOOKS, "told"))
    job = ["--mode", "remote", "--target-jobs", "00_start_here:tag=", "--dry-run"]
    started = copy.start("toy", *job, PRUNING_CODE=told)
    plan = copy.start("toy", "--dry-run", "--printshellcmds", PRUNING_CODE=told)
    done["changed"], done["job"] = wait(plan), wait(started)
    return copy, done


def test_workflow_runs_all_but_the_failing(workflow):
    copy, done = workflow
    status, output = done["first"]
    assert status != 0 and "02_surgery/seed13" in output
    for name in ("00_start_here", "01_baseline", "02_surgery/seed1"):
        metrics = json.loads((copy.runs / name / "metrics.json").read_text())
        assert metrics["run"] == metrics["settings"]["run"] == f"toy/{name}"
        book = copy.runs / name / f"{name.split('/')[0]}.ipynb"
        assert nbformat.read(book, 4).metadata.papermill.exception is None
    baseline = json.loads((copy.runs / "01_baseline" / "metrics.json").read_text())
    assert baseline["settings"]["lr"] == 0.2
    order = [
        copy.runs / n / "metrics.json" for n in ("01_baseline", "02_surgery/seed1")
    ]
    assert order[0].stat().st_mtime <= order[1].stat().st_mtime


def test_workflow_keeps_a_failed_notebook(workflow):
    folder = workflow[0].runs / "02_surgery" / "seed13"
    assert [path.name for path in folder.iterdir()] == ["02_surgery.ipynb"]
    assert "unlucky" in (folder / "02_surgery.ipynb").read_text()


def test_workflow_hands_small_rates_on_as_numbers(workflow):
    """papermill reads what stands after `-y` as YAML, where 1e-05 is a string."""
    lines = workflow[1]["changed"][1].splitlines()
    (call,) = (line for line in lines if "papermill" in line and "01_base" in line)
    words = shlex.split(call)
    values = yaml.safe_load(words[words.index("-y") + 1])
    assert values["lr"] == 1e-5


def test_workflow_has_nothing_to_do_where_nothing_can_change_a_result(workflow):
    status, output = workflow[1]["again"]
    assert status == 0 and "Nothing to be done" in output


def test_workflow_reruns_only_what_depends_on_a_change(workflow):
    """01 has another learning rate, 02 reads 01's files, 00 has another cell."""
    status, output = workflow[1]["changed"]
    planned = [line for line in output.splitlines() if line.startswith("    output: ")]
    ran = {line.split("/")[-2] for line in planned}
    assert status == 0 and ran == {"00_start_here", "01_baseline", "seed1"}


def test_code_is_hashed_when_planning_and_not_again_in_a_job(workflow):
    """On a cluster a job reads the Snakefile anew, maybe after an edit of the code."""
    for name, hashed in (("job", False), ("changed", True)):
        status, output = workflow[1][name]
        assert status == 0 and ("hashed" in output) == hashed, output


def test_workflow_refuses_a_misspelt_profile_in_one_line(workflow):
    status, output = workflow[1]["refused"]
    lines = [line for line in output.splitlines() if "profile refused:" in line]
    assert status != 0 and len(lines) == 1 and "did you mean 'seed'" in lines[0]
    assert "Traceback" not in output
