"""Parameters of notebooks and profiles: declared, typed, checked; seeds and versions.

A notebook's parameters are plain assignments; `check` is the cell after them. A profile
is a YAML file that names notebooks and the parameters it changes; `read_profile` turns
it into runs, or refuses it before anything has run.

    python -m lib.settings

prints the versions and the device that a report of a fault should name. torch is
imported where it is used: Snakemake reads this module for every plan and in every job.
"""

import ast
import itertools
import math
import numbers
import platform
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lib
from lib import paths
from lib.messages import check_choice, check_known


@dataclass(frozen=True)
class Rule:
    """What a parameter may be: its type, bounds (low included, high not), choices.

    With `many` it is a list of such values, each once unless they `repeat`, and with at
    least one unless it may be `empty`.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    many: bool = False
    repeat: bool = False
    empty: bool = False


CHW = tuple[int, int, int]  # channels, height and width of an image
ABOVE_ZERO = 1e-12  # as a lower bound it keeps 0 out
ABOVE_ONE = math.nextafter(1.0, 2.0)  # as an upper bound it lets 1 in
RUNTIMES = ("eager", "channels_last", "compile", "onnxruntime", "openvino")
RULES = {  # what a notebook may declare; a name stands once
    "run dataset net points trials": Rule(str),
    "methods": Rule(str, many=True),
    "controls": Rule(str, many=True, empty=True),
    "runtimes": Rule(str, choices=RUNTIMES, many=True),
    "residual": Rule(str, choices=("tie", "scatter", "keep")),
    "width": Rule(str, choices=("uniform", "inner", "scatter")),
    "design": Rule(str, choices=("axis", "grid")),
    "pretrained interior curve": Rule(bool),
    "n_train select_images depth_images point_images truth_images": Rule(int, 0),
    "baseline_epochs finetune_epochs control_epochs select_epochs": Rule(int, 0),
    "resolution size part base others levels lots": Rule(int, 0),
    "turns threads processes batch_size repetitions rounds": Rule(int, 1),
    "multiple parts degree": Rule(int, 1),
    "feature_images": Rule(int, 2),
    "seed": Rule(int, 0, 2**31),
    "seeds depths lengths": Rule(int, 0, many=True),
    "depth_epochs": Rule(int, 0, many=True, repeat=True),
    "batches": Rule(int, 1, many=True),
    "lr baseline_lr finetune_lr select_lr depth_lr": Rule(float, ABOVE_ZERO),
    "weight_decay warmup sparsity": Rule(float, 0.0),
    "rate": Rule(float, 0.0, 1.0),
    "rates": Rule(float, 0.0, 1.0, many=True),
    "alpha": Rule(float, 0.0, ABOVE_ONE),
    "share keep": Rule(float, ABOVE_ZERO, ABOVE_ONE),
    "shares": Rule(float, ABOVE_ZERO, ABOVE_ONE, many=True),
    "low": Rule(float, ABOVE_ZERO, ABOVE_ONE, many=True, repeat=True),
}
PARAMETERS = {name: rule for names, rule in RULES.items() for name in names.split()}


class Settings(types.SimpleNamespace):
    """Checked parameters, as attributes.

    `started`: when they were checked, by `time.monotonic`. That is where a run begins.
    """

    __slots__ = ("started",)  # a slot is none of the parameters in `vars`

    def __init__(self, **values: Any):
        super().__init__(**values)
        self.started = time.monotonic()


def check(**values: Any) -> Settings:
    """Check a notebook's parameters; return them, floats as floats.

    Refuses, in one line each: unknown names, wrong types (`"1e-3"` is a string, YAML
    wants `1.0e-3`), NaN and infinity, values out of range, a `part` beyond `parts`.
    Names that papermill was given and the notebook does not declare are unknown too:
    papermill itself runs on with the defaults.
    """
    check_known("parameter", _find_injected(), values)
    checked = {name: check_value(name, value) for name, value in values.items()}
    part, parts = checked.get("part", 0), checked.get("parts", math.inf)
    if part >= parts:
        raise ValueError(f"part must lie in [0, parts), got part {part} of {parts}")
    return Settings(**checked)


def _find_injected() -> list[str]:
    """What papermill has set in this kernel, in the cell that it puts in."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cells = getattr(shell, "user_ns", {}).get("In", [])
    injected = [source for source in cells if source.startswith("# Parameters\n")]
    return [name for source in injected for name, _ in _find_assigned(source)]


def _find_assigned(source: str) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of the assignments in a cell of parameters."""
    for node in ast.parse(source).body:
        target = getattr(node, "targets", [getattr(node, "target", None)])[0]
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            yield ast.unparse(target), node.value


def check_value(name: str, value: Any) -> Any:
    """One parameter against its rule in `PARAMETERS`."""
    check_known("parameter", [name], PARAMETERS)
    rule = PARAMETERS[name]
    if not rule.many:
        return check_rule(name, value, rule)
    if not isinstance(value, (list, tuple)) or not (value or rule.empty):
        text = value if str(value).startswith("[") else f"[{value}]"
        hint = f'; for papermill: -y "{name}: {text}"' if value else ""
        raise ValueError(f"{name} must be a list with an entry, got {value!r}{hint}")
    found = [check_rule(name, item, rule) for item in value]
    twice = [item for i, item in enumerate(found) if item in found[:i]]
    if twice and not rule.repeat:
        raise ValueError(f"{name} must name each value once, got {twice[0]!r} twice")
    return found


def check_rule(name: str, value: Any, rule: Rule) -> Any:
    """One value against a rule, as the plain type that the rule names.

    Numbers of numpy and torch are welcome, and ints and fractions where a float is
    wanted.
    """
    value = value.item() if getattr(value, "ndim", 1) == 0 else value
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if rule.kind is float and real:
        value = float(value)
    kind = type(value)
    if kind is not rule.kind:
        number = kind is str and rule.kind in (int, float)
        hint = " (in YAML write 1.0e-3, not 1e-3)" if number else ""
        wanted, found = (
            f"{'an' if k is int else 'a'} {k.__name__}" for k in (rule.kind, kind)
        )
        raise ValueError(
            f"{name} must be {wanted}, got {value!r}, which is {found}{hint}"
        )
    if kind in (int, float) and not rule.low <= value < rule.high:
        low = "(0" if rule.low == ABOVE_ZERO else f"[{rule.low:g}"
        high = "1]" if rule.high == ABOVE_ONE else f"{rule.high:g})"
        raise ValueError(f"{name} must lie in {low}, {high}, got {value}")
    if rule.choices:
        check_choice(name, value, rule.choices)
    return value


def check_int(name: str, value: Any, low: float, high: float = math.inf) -> int:
    """A whole number in [low, high), or one line that says what it is instead."""
    return check_rule(name, value, Rule(int, low, high))


def check_float(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A number in [low, high), neither NaN nor infinite, or one line."""
    return check_rule(name, value, Rule(float, low, high))


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of an input, (C, H, W), as plain ints of 1 or more, or one line."""
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise ValueError(f"input_shape must be (C, H, W), got {shape!r}")
    return tuple(check_int("input_shape", size, 1) for size in shape)


# -- profiles ----------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One execution of a notebook: its parameters and its folder under the runs.

    `threads`: the cores that it keeps busy, those of all its `processes` together.
    """

    notebook: str
    parameters: dict[str, Any]
    varied: dict[str, Any]
    threads: int = 1

    @property
    def name(self) -> str:
        """A name for it that is also a folder, e.g. `quick/02_surgery/seed1`."""
        return self.parameters["run"]

    @property
    def folder(self) -> Path:
        """Where its executed notebook goes."""
        return paths.runs_root() / self.name

    @property
    def metrics(self) -> Path:
        """What it measured; there once it has finished."""
        return self.folder / "metrics.json"


def read_profile(profile: str, *, threads: int | None = None) -> list[Run]:
    """The runs of `notebooks/params/PROFILE.yaml`, checked.

    The file maps notebooks to changed parameters. A list where the notebook declares
    a single value, or a list of lists where it declares a list (`seeds: [[0], [1]]`),
    makes one run per entry; a list of such mappings is as many grids of one notebook.
    `threads` goes before the profile's own.
    Refuses notebooks and parameters that do not exist, naming the nearest, and values
    that `check` would refuse.
    """
    import yaml

    paths.checkout()
    folder = paths.NOTEBOOKS / "params"
    check_known("profile", [profile], {path.stem for path in folder.glob("*.yaml")})
    path = folder / f"{profile}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected notebooks with their parameters")
    return [
        run
        for notebook, changes in content.items()
        for part in list_parts(changes)
        for run in expand_runs(profile, str(notebook), part or {}, threads)
    ]


def list_parts(changes: Any) -> list:
    """The grids that a profile asks of one notebook: one, or a list of them."""
    return changes if isinstance(changes, list) and changes else [changes]


def expand_runs(
    profile: str, notebook: str, changes: dict[str, Any], threads: int | None = None
) -> list[Run]:
    """The runs of one notebook in a profile, see `read_profile`."""
    books = {path.stem for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb")}
    check_known(f"{profile}: notebook", [notebook], books)
    if not isinstance(changes, dict) or not all(isinstance(n, str) for n in changes):
        raise ValueError(f"{profile}: {notebook} needs parameters as 'name: value'")
    declared = declared_parameters(notebook)
    if threads is not None and "threads" in declared:
        changes = {**changes, "threads": threads}
    check_known(f"{profile}: in {notebook} parameter", changes, declared)
    grid = _find_varied(profile, notebook, changes)
    runs = []
    for picked in itertools.product(*grid.values()):
        chosen = dict(zip(grid, picked, strict=True))
        varied = {n: tuple(v) if isinstance(v, list) else v for n, v in chosen.items()}
        tag = "-".join(
            name + "+".join(map(str, value if isinstance(value, tuple) else [value]))
            for name, value in varied.items()
        )
        run = "/".join(filter(None, [profile, notebook, tag]))
        values = {**changes, **chosen, "run": run}
        busy = declared | values
        cores = busy.get("threads", 1) * busy.get("processes", 1)
        runs.append(Run(notebook, values, varied, cores))
    return runs


def is_varied(name: str, value: Any) -> bool:
    """Whether a profile gives a parameter several values, one for each run."""
    rule = PARAMETERS.get(name)
    inner = value[0] if isinstance(value, list) and value else None
    return isinstance(inner if rule and rule.many else value, list)


def _find_varied(profile: str, notebook: str, changes: dict) -> dict[str, list]:
    """The parameters that take several values; every value is checked on the way."""
    grid = {}
    for name, value in changes.items():
        if not is_varied(name, value):
            check_value(name, value)
            continue
        grid[name] = [check_value(name, item) for item in value]
        if not value or len({str(item) for item in value}) < len(value):
            raise ValueError(
                f"{profile}: {notebook} needs different values of '{name}', got {value}"
            )
    return grid


def declared_parameters(notebook: str) -> dict[str, Any]:
    """Names and defaults in the cell tagged `parameters` of a notebook."""
    book = paths.read_json(paths.NOTEBOOKS / f"{notebook}.ipynb")
    tagged = [c for c in book["cells"] if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(line for cell in tagged for line in cell["source"])
    return {name: ast.literal_eval(value) for name, value in _find_assigned(source)}


# -- what a number was measured with -----------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed torch's generators; numpy's global one is used nowhere."""
    import torch

    torch.manual_seed(seed)


def use_threads(threads: int) -> None:
    """Let torch and the BLAS below numpy and scipy use so many CPU threads.

    Sums are split among threads, so their last bits depend on the number; with one
    thread a run repeats to the bit.
    """
    import threadpoolctl
    import torch

    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)


def environment() -> dict[str, str]:
    """Versions, system, device and code revision, for metrics.json and for reports."""
    return {
        "lib": lib.__version__,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        **made_with(),
    }


def made_with() -> dict[str, str]:
    """What a measured row names: device, version of torch, revision of the code."""
    return {
        "device": device_name(), "torch": version("torch"), "revision": code_revision(),
    }  # fmt: skip


def device_name() -> str:
    """The GPU's name, or the CPU with its number of threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU {capability}, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    """The processor's name, as Linux calls it where that can be asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (x.partition(": ")[2] for x in lines if x.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def code_revision() -> str:
    """The git revision of `lib`, with `+` where it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"
    revision = git("log", "-1", "--format=%h", "--", "lib")
    changed = git("status", "--porcelain", "--", "lib")
    return revision + "+" * bool(changed) if revision else "unknown"


if __name__ == "__main__":
    for name, value in environment().items():
        print(f"{name:12} {value}")
