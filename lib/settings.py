"""Parameters of notebooks and profiles: declared, typed, checked; seeds and versions.

A notebook's parameters are plain assignments; `check` is the cell after them. A profile
is a YAML file that names notebooks and the parameters it changes; `read_profile` turns
it into runs, or refuses it before anything has run.
"""

import difflib
import hashlib
import itertools
import math
import platform
import shutil
import subprocess
import types
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lib import paths


@dataclass(frozen=True)
class Rule:
    """What a parameter may be: its type, bounds (low included, high not), choices."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()


NAME = Rule(str)
COUNT = Rule(int, 0)
SHARE = Rule(float, 0.0, 1.0)
PARAMETERS = {
    "run": NAME,
    "dataset": NAME,
    "net": NAME,
    "pretrained": Rule(bool),
    "seed": Rule(int, 0, 2**31),
    "seeds": Rule(list),
    "n_train": COUNT,
    "batch_size": Rule(int, 1),
    "epochs": COUNT,
    "baseline_epochs": COUNT,
    "finetune_epochs": COUNT,
    "lr": Rule(float, 1e-12),
    "baseline_lr": Rule(float, 1e-12),
    "finetune_lr": Rule(float, 1e-12),
    "rate": SHARE,
    "rates": Rule(list),
    "methods": Rule(list),
    "residual": Rule(str, choices=("tie", "scatter", "keep")),
    "resolution": COUNT,
    "control": NAME,
    "controls": Rule(list),
    "control_epochs": COUNT,
    "select_epochs": COUNT,
    "select_images": COUNT,
    "select_lr": Rule(float, 1e-12),
    "repetitions": Rule(int, 1),
    "alpha": Rule(float, 0.0, math.nextafter(1.0, 2.0)),
    "feature_images": Rule(int, 2),
    "depths": Rule(list),
    "depth_epochs": COUNT,
    "depth_images": COUNT,
    "keep": Rule(float, 1e-12, math.nextafter(1.0, 2.0)),
    "width": Rule(str, choices=("uniform", "inner")),
    "design": Rule(str, choices=("axis", "interleaved", "both", "grid")),
    "rounds": Rule(int, 1),
    "interior": Rule(bool),
    "multiple": Rule(int, 1),
    "point_images": COUNT,
    "part": COUNT,
    "parts": Rule(int, 1),
    "degree": Rule(int, 1),
}
ELEMENTS = {
    "rates": SHARE,
    "methods": NAME,
    "controls": NAME,
    "seeds": COUNT,
    "depths": COUNT,
}


class Settings(types.SimpleNamespace):
    """Checked parameters, as attributes."""

    def as_dict(self) -> dict[str, Any]:
        """The parameters as a plain dictionary."""
        return dict(vars(self))


def check(**values: Any) -> Settings:
    """Check a notebook's parameters; return them, floats as floats.

    Refuses, in one line each: unknown names, wrong types (`"1e-3"` is a string, YAML
    wants `1.0e-3`), NaN and infinity, values out of range.
    """
    checked = {name: check_value(name, value) for name, value in values.items()}
    return Settings(**checked)


def check_value(name: str, value: Any) -> Any:
    """One parameter against its rule in `PARAMETERS`."""
    if name not in PARAMETERS:
        raise ValueError(f"unknown parameter '{name}'{_nearest(name, PARAMETERS)}")
    if PARAMETERS[name].kind is list:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{name} must be a list with an entry, got {value!r}")
        return [_check_one(name, item, ELEMENTS[name]) for item in value]
    return _check_one(name, value, PARAMETERS[name])


def _check_one(name: str, value: Any, rule: Rule) -> Any:
    if rule.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not rule.kind:
        hint = ""
        if isinstance(value, str) and rule.kind in (int, float):
            hint = " (in YAML write 1.0e-3, not 1e-3)"
        raise ValueError(
            f"{name} must be a {rule.kind.__name__}, got {value!r}, which is a "
            f"{type(value).__name__}{hint}"
        )
    if rule.kind in (int, float) and not rule.low <= value < rule.high:
        raise ValueError(
            f"{name} must lie in [{rule.low:g}, {rule.high:g}), got {value}"
        )
    if rule.choices and value not in rule.choices:
        raise ValueError(f"{name} must be one of {rule.choices}, got {value!r}")
    return value


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {sorted(known)}"


# -- profiles ----------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One execution of a notebook: its parameters and its folder under the runs."""

    notebook: str
    parameters: dict[str, Any]
    varied: dict[str, Any]

    @property
    def name(self) -> str:
        """A name for it that is also a folder, e.g. `quick/02_surgery/seed1`."""
        return self.parameters["run"]

    @property
    def folder(self) -> Path:
        """Where its executed notebook and metrics.json go."""
        return paths.runs_root() / self.name


def read_profile(profile: str) -> list[Run]:
    """The runs of `notebooks/params/PROFILE.yaml`, checked.

    The file maps notebooks to changed parameters. A list where the notebook declares
    a single value makes one run per entry. Refuses notebooks and parameters that do
    not exist, naming the nearest, and values that `check` would refuse.
    """
    import yaml

    folder = paths.NOTEBOOKS / "params"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        raise ValueError(f"no profile '{profile}'{_nearest(profile, known)}")
    path = folder / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected notebooks with their parameters")
    runs = []
    for notebook, changes in content.items():
        runs += expand_runs(profile, str(notebook), changes or {})
    return runs


def expand_runs(profile: str, notebook: str, changes: dict[str, Any]) -> list[Run]:
    """The runs of one notebook in a profile."""
    books = {path.stem for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb")}
    if notebook not in books:
        raise ValueError(
            f"{profile}: no notebook '{notebook}'{_nearest(notebook, books)}"
        )
    if not isinstance(changes, dict) or not all(isinstance(n, str) for n in changes):
        raise ValueError(f"{profile}: {notebook} needs parameters as 'name: value'")
    declared = declared_parameters(notebook)
    grid = {}
    for name, value in changes.items():
        if name not in declared:
            raise ValueError(
                f"{profile}: {notebook} declares no parameter '{name}'"
                f"{_nearest(name, declared)}"
            )
        if not isinstance(value, list) or _is_list(name):
            check_value(name, value)
            continue
        grid[name] = [check_value(name, item) for item in value]
        if not value or len({str(item) for item in value}) < len(value):
            raise ValueError(
                f"{profile}: {notebook} needs different values of '{name}', got {value}"
            )
    fixed = {name: value for name, value in changes.items() if name not in grid}
    runs = []
    for chosen in itertools.product(*grid.values()):
        varied = dict(zip(grid, chosen, strict=True))
        tag = "-".join(f"{name}{value}" for name, value in varied.items())
        run = "/".join(filter(None, [profile, notebook, tag]))
        runs.append(Run(notebook, {**fixed, **varied, "run": run}, varied))
    return runs


def _is_list(name: str) -> bool:
    return name in PARAMETERS and PARAMETERS[name].kind is list


def declared_parameters(notebook: str) -> set[str]:
    """Names in the cell tagged `parameters` of a notebook."""
    import papermill

    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    return set(papermill.inspect_notebook(str(path)))


def hash_code() -> str:
    """A hash of every Python file of `lib/`: runs are stale when it changes."""
    digest = hashlib.sha256()
    for path in sorted((paths.ROOT / "lib").rglob("*.py")):
        digest.update(path.relative_to(paths.ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# -- what a number was measured with -----------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed torch's generators; numpy's global one is used nowhere."""
    torch.manual_seed(seed)


def environment() -> dict[str, str]:
    """Versions, device and code revision, for metrics.json."""
    return {
        "python": platform.python_version(),
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        **made_with(),
        "code": hash_code(),
    }


def made_with() -> dict[str, str]:
    """What a measured row names: device, version of torch, revision of the code."""
    return {
        "device": device_name(),
        "torch": version("torch"),
        "revision": code_revision(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU {capability}, {torch.get_num_threads()} threads"


def code_revision() -> str:
    """The git revision of `lib`, with `+` where it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"

    revision = git("log", "-1", "--format=%h", "--", "lib")
    changed = git("status", "--porcelain", "--", "lib")
    return revision + ("+" if changed else "") if revision else "unknown"
