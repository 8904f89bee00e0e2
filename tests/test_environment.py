"""One truth about versions, and a set-up that fails in one readable line."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import lib
from lib import paths, settings

ROOT = Path(__file__).resolve().parent.parent
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [*PROJECT["dependencies"], *(line for e in EXTRAS.values() for line in e)]
ALL = [Requirement(line) for line in LINES]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def load_script(name: str):
    """A file of .ci as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / ".ci" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_lock() -> list[Requirement]:
    text = (ROOT / "requirements.lock").read_text()
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def find_pins(name: str) -> list[Requirement]:
    name = canonicalize_name(name)
    return [pin for pin in read_lock() if canonicalize_name(pin.name) == name]


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is not pinned"
    return specifier.version


# ---- pyproject.toml, requirements.lock, environment.yml ----


@pytest.mark.parametrize("dependency", ALL, ids=lambda requirement: requirement.name)
def test_lock_pins_every_dependency_once(dependency):
    pins = find_pins(dependency.name)
    assert pins, f"{dependency} is not in requirements.lock: run `make lock`"
    markers = [str(pin.marker) for pin in pins]
    assert len(set(markers)) == len(markers), f"{dependency.name} is pinned twice"
    for pin in pins:
        assert Version(version_of(pin)) in dependency.specifier, f"{pin}: `make lock`"


def test_lock_holds_exact_versions_and_no_address():
    for pin in read_lock():
        assert version_of(pin) and pin.url is None
    address = re.compile(r"://|(?<!emit-)index-url|find-links|trusted-host")
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile"):
        assert not address.search((ROOT / name).read_text()), name


def test_conda_installs_the_same_versions():
    text = (ROOT / "environment.yml").read_text()
    entries = re.findall(r"^ +- (.+?) *$", text, flags=re.MULTILINE)
    assert entries[0] == "conda-forge" and entries[2] == "pip"
    assert entries[-2:] == ["-c requirements.lock", "-e .[test]"]
    python = entries[1].removeprefix("python").strip()
    assert SpecifierSet(python) == SpecifierSet(PROJECT["requires-python"])


def test_binder_installs_the_same_versions_for_the_cpu():
    lines = (ROOT / ".binder/requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line.startswith("torch")]
    assert len(pinned) == 2
    for requirement in pinned:
        (pin,) = find_pins(requirement.name)
        assert version_of(requirement) == f"{version_of(pin)}+cpu"
    python = (ROOT / ".binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("dependency", ALL, ids=lambda requirement: requirement.name)
def test_installed_version_is_the_locked_one(dependency):
    try:
        installed = importlib.metadata.version(dependency.name)
    except importlib.metadata.PackageNotFoundError:
        optional = [line for e in EXTRAS if e != "test" for line in EXTRAS[e]]
        assert str(dependency) in {str(Requirement(line)) for line in optional}
        pytest.skip(f"{dependency.name} is optional and not installed")
    pins = [pin for pin in find_pins(dependency.name) if not pin.marker
            or pin.marker.evaluate()]  # fmt: skip
    assert [version_of(pin) for pin in pins] == [installed.split("+")[0]]


def test_the_version_is_one_number_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    (cited,) = re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE)
    assert lib.__version__ == PROJECT["version"] == cited
    assert f"## {cited}" in (ROOT / ".github/CHANGELOG.md").read_text()


def test_an_installed_lib_is_typed():
    """Without package-data a wheel leaves py.typed behind, and checkers see nothing."""
    assert (ROOT / "lib/py.typed").is_file()
    assert TOOL["setuptools"]["package-data"] == {"lib": ["py.typed"]}


# ---- lib without its repository ----


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`lib` as a wheel installs it: no notebooks and no data beside it."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name in ("PRUNING_DATA", "PRUNING_RUNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "use",
    [paths.data_root, paths.runs_root, lambda: settings.read_profile("quick")],
)
def test_an_installed_lib_says_what_is_missing(installed, use):
    with pytest.raises(ValueError, match="lib is installed without its repo") as error:
        use()
    assert "\n" not in str(error.value)


def test_an_installed_lib_works_in_folders_of_ones_own(installed, tmp_path):
    assert paths.data_root(tmp_path / "a") == tmp_path / "a"
    assert settings.code_revision() == "unknown"


# ---- types ----

SAID = """lib/graph/tracing.py:3: error: Missing return  [return]
lib/nisp/frl.py:9: error: Incompatible types  [assignment]
lib/nisp/frl.py:9: note: see the manual
Found 2 errors in 2 files (checked 80 source files)
"""


def test_types_are_strict_in_some_rooms_and_counted_in_the_others():
    types = load_script("check_types.py")
    errors = types.find_errors(SAID)
    assert len(errors) == 2
    strict = types.list_strict({"tool": TOOL})
    assert strict == ("lib/graph/", "lib/plan/", "lib/surgery/")
    assert types.judge(errors, strict, allowed=1) == errors[:1]
    assert types.judge(errors[1:], strict, allowed=1) == []
    assert "1 errors outside" in types.judge(errors[1:], strict, allowed=0)[0]
    assert "write 1 to" in types.judge(errors[1:], strict, allowed=2)[0]


# ---- entry points ----


def test_ci_runs_the_documented_test_command():
    commands = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    asked = commands.index("make check")
    assert commands[asked + 1] == "make test"
    assert "status" in commands[asked + 2], "a test that writes into the tree is found"
    assert re.search(r"^test:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_the_kernel_of_the_environment(notebook):
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"


# ---- .ci/setup, with a Python and a pip that only pretend ----

FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo "${FAKE_VERSION:-3.12}" ;;
  *"import ensurepip"*) exit "${FAKE_NO_VENV:-0}" ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python
    cp "$0" .venv/bin/python3 ;;
  *nms*) echo "${FAKE_TORCH:-}"; test -z "${FAKE_TORCH:-}" ;;
  "-m pip "*) echo "$*" >> pip.calls; echo "${FAKE_PIP:-}"
    test -z "${FAKE_HANG:-}" || { touch hanging; exec /bin/sleep 15; }
    test -z "${FAKE_PIP:-}" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """`setup(FAKE_...=...)` runs .ci/setup in an empty checkout."""
    fakes, checkout = tmp_path / "bin", tmp_path / "checkout"
    for folder in (fakes, checkout / ".ci"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci/setup", checkout / ".ci/setup")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    for name in ("python3", *(f"python3.{minor}" for minor in range(11, 15))):
        write_script(fakes / name, FAKE_PYTHON)
    write_script(fakes / "df", DF.format(free=50))
    write_script(fakes / "sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")  # of progress

    def run(*arguments, wait=True, **settings):
        environment = {"HOME": str(tmp_path), **settings}
        path = (f"{checkout}/.venv/bin", str(fakes), os.environ["PATH"])
        environment["PATH"] = ":".join(path)  # as the Makefile has it
        process = subprocess.Popen(
            [".ci/setup", *arguments], cwd=checkout, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if not wait:
            return process
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    run.fakes, run.checkout = fakes, checkout
    return run


DF = '#!/bin/sh\necho head\necho "disk 1 1 $(({free} * 1048576)) 1% /"\n'


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def count_installs(setup) -> int:
    calls = setup.checkout / "pip.calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def assert_one_line(result, setup, *words):
    status, _, errors = result
    assert status == 1
    assert len(errors.splitlines()) == 1 and errors.startswith("setup: "), errors
    for word in words:
        assert word in errors
    assert not (setup.checkout / ".venv").exists(), "the next try must start clean"
    assert setup()[0] == 0 and (setup.checkout / ".venv/.complete").exists()


def test_setup_installs_once_from_the_lock(setup):
    status, output, errors = setup()
    assert (status, errors) == (0, "") and "6 GB" in output
    call = (setup.checkout / "pip.calls").read_text()
    assert "-c requirements.lock -e .[test]" in call
    assert setup() == (0, "", "") and count_installs(setup) == 1


def test_setup_follows_a_changed_lock_and_a_moved_folder(setup):
    setup()
    with (setup.checkout / "requirements.lock").open("a") as lock:
        lock.write("another==1.0\n")
    assert "changed versions" in setup()[1] and count_installs(setup) == 2
    moved = setup.checkout.rename(setup.checkout.with_name("moved"))
    shutil.copytree(moved, setup.checkout, symlinks=True)
    (setup.checkout / ".venv/.complete").write_text("from\nelsewhere\n")
    assert "making .venv" in setup()[1]


def test_setup_adds_an_extra_to_a_complete_environment(setup):
    setup()
    assert "'bench'" in setup("bench")[1]
    assert "-e .[test,bench]" in (setup.checkout / "pip.calls").read_text()
    assert setup("bench") == (0, "", "") and setup() == (0, "", "")
    (setup.checkout / ".venv/.extra-bench").unlink()
    assert setup("bench", FAKE_PIP="ERROR: broken")[0] == 1
    assert setup() == (0, "", ""), "a failed extra leaves the environment as it was"


def test_setup_names_an_old_python(setup):
    named = setup(PYTHON="/nowhere/python")
    assert named[0] == 1 and "PYTHON=/nowhere/python does not run" in named[2]
    result = setup(FAKE_VERSION="3.9")
    assert_one_line(result, setup, "needs Python 3.11", "is Python 3.9", "make PYTHON=")


def test_setup_names_a_missing_venv_module(setup):
    result = setup(FAKE_NO_VENV="1")
    assert_one_line(result, setup, "no venv module", "apt install python3.12-venv")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Failed to establish a new connection: [Errno 111] Connection refused",
         "registry cannot be reached"),
        ("ERROR: [Errno 28] No space left on device", "is full"),
        ("ERROR: Could not build wheels for x", "Could not build wheels for x"),
    ],
)  # fmt: skip
def test_setup_explains_what_pip_failed_on(setup, log, words):
    assert_one_line(setup(FAKE_PIP=log), setup, words, "log: data/runs/setup.log")


def test_setup_asks_for_room_beforehand(setup):
    write_script(setup.fakes / "df", DF.format(free=3))
    status, _, errors = setup()
    assert (status, count_installs(setup)) == (1, 0)
    assert "GB free" in errors and "has 3 GB" in errors
    assert len(errors.splitlines()) == 1
    write_script(setup.fakes / "df", DF.format(free=50))
    assert setup()[0] == 0


def test_setup_checks_that_torch_and_torchvision_fit(setup):
    trouble = "RuntimeError: operator torchvision::nms does not exist"
    assert_one_line(setup(FAKE_TORCH=trouble), setup, "do not work together", trouble)


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock on this machine")
def test_setup_killed_half_way_starts_clean_and_two_do_not_meet(setup):
    first = setup(wait=False, FAKE_HANG="1")
    wait_for(setup.checkout / "hanging")
    (setup.checkout / ".venv/rubbish").touch()
    second = setup(wait=False)
    assert "waiting for it" in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    output, errors = second.communicate(timeout=30)
    assert (second.returncode, errors) == (0, "") and "making .venv" in output
    assert not (setup.checkout / ".venv/rubbish").exists()


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        signal.sigtimedwait([], 0.05)
    raise AssertionError(f"{path.name} did not appear")
