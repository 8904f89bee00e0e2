"""Where things lie on disk, whatever the working directory, and writing them safely.

Environment variables: `PRUNING_DATA` moves the data root, `PRUNING_RUNS` the folder of
runs.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PUBLISHED = ROOT / "data" / "published"
RESULTS = ROOT / "data" / "results"
BASES = RESULTS / "bases"
FIGURES = ROOT / "figures"
# what a profile may commit beside its rows, as RESULTS / PROFILE_PART.csv
PARTS = (
    "points", "truth", "ranks", "hits", "curves", "arms", "swaps", "energies",
    "errors", "leads",
)  # fmt: skip
OLD = 24 * 3600  # seconds after which nobody is at work in a scratch folder


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
    return Path(root).expanduser().resolve()


def runs_root() -> Path:
    """The folder for everything a run makes: `PRUNING_RUNS`, else `data/runs/`."""
    root = os.environ.get("PRUNING_RUNS") or checkout() / "data/runs"
    return Path(root).expanduser().resolve()


def shown(path: str | Path) -> str:
    """`path` as notebooks print it: relative to the repository if it lies there."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder `.tmp-...` in `parent`, gone when left.

    Those that killed processes have left there go too, once they are older than `OLD`.
    """
    for left in parent.glob(".tmp-*"):
        with suppress(OSError):  # another process has just removed it
            if time.time() - left.stat().st_mtime > OLD:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=parent, prefix=".tmp-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def write_atomic(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write(tmp)` fill a file in a scratch folder, then move it to `path`.

    A reader sees the old file or the whole new one, never half of it; on an error
    nothing is left behind. A link stays one: what it points to is written. OSError
    names `path` and the cause (a full disk), also where `write` hides it.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent) as folder:
            tmp = folder / f"new{path.suffix}"
            write(tmp)
            with open(tmp, "r+b") as written:
                os.fsync(written.fileno())  # the content before the name
            os.replace(tmp, target)
    except Exception as error:
        cause = _find_cause(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    return path


def _find_cause(error: BaseException | None) -> OSError | None:
    """The operating system's error behind `error`: torch tells another."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reading(path: str | Path | None, what: str) -> Iterator[None]:
    """Whatever fails inside is one ValueError: that the file at `path` is no `what`."""
    try:
        yield
    except Exception as error:  # torch and pandas raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:200]
        kind = type(error).__name__
        raise ValueError(
            f"{path}: not a readable {what} ({kind}{': ' * bool(reason)}{reason}). It "
            "stays as it is; rename it to keep it aside, and what it held is made anew"
        ) from error


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
