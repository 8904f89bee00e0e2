"""Where things lie on disk, whatever the working directory, and writing them safely.

Environment variables: `PRUNING_DATA` moves the data root, `PRUNING_RUNS` the folder of
runs.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PUBLISHED = ROOT / "data" / "published"
RESULTS = ROOT / "data" / "results"
BASES = RESULTS / "bases"
FIGURES = ROOT / "figures"


def checkout() -> Path:
    """The repository that this file lies in; ValueError where `lib` alone is there."""
    if not (ROOT / "notebooks").is_dir():
        raise ValueError(
            "lib is installed without its repository (no notebooks, no data): work in "
            "a checkout, or set PRUNING_DATA and PRUNING_RUNS to folders of your own"
        )
    return ROOT


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets: `root`, else `PRUNING_DATA`, else `data/`."""
    root = root or os.environ.get("PRUNING_DATA") or checkout() / "data"
    return Path(root).resolve()


def runs_root() -> Path:
    """The folder for everything a run makes: `PRUNING_RUNS`, else `data/runs/`."""
    return Path(os.environ.get("PRUNING_RUNS") or checkout() / "data/runs").resolve()


def shown(path: str | Path) -> str:
    """`path` as notebooks print it: relative to the repository if it lies there."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def write_atomic(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write(tmp)` fill a temporary file beside `path`, then move it into place.

    A reader sees the old file or the whole new one, never half of it; on an error
    nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    os.close(handle)
    tmp = Path(name)
    try:
        write(tmp)
        tmp.chmod(0o644)
        with open(tmp, "rb") as written:
            os.fsync(written.fileno())  # the content before the name
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` atomically (UTF-8)."""
    return write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is one error that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected JSON")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too long a number, too deep a nest
        raise ValueError(f"{path}: not valid JSON ({error})") from None
