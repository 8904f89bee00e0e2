"""Children that make one call together: started, listened to, ended.

torch's own launcher takes over the signals of its process for good and hides what a
child prints; a notebook needs its interrupts, and the lines in its cells.
"""

import builtins
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lib.settings import use_threads
from lib.train import processes

GRACE = 5.0  # seconds in which those let down by a failed one see it for themselves


def run(count: int, function: Callable, *arguments, **options) -> Any:
    """What `function` returns in the first of `count` processes that all call it.

    The call goes through one file that all of them map: images lie in memory once.
    The first one's lines are printed here. If one fails the rest is ended, and its
    error is raised here: ValueError and OSError as they are; any other, or the end of a
    process that was killed, as RuntimeError. ValueError: what cannot be handed over.
    """
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    children: list[subprocess.Popen] = []
    call = torch.get_num_threads(), count, function, arguments, options
    try:
        with _handing_over():
            torch.save(call, folder / "call.pt")
        for rank in range(count):
            children.append(_start(folder, rank))
        _wait(children, folder)
        return torch.load(folder / "result.pt", weights_only=False)
    finally:
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _handing_over() -> Iterator[None]:
    try:
        yield
    except (AttributeError, ImportError, TypeError, pickle.PicklingError) as error:
        raise ValueError(
            f"several processes cannot be handed this call ({error}): networks and "
            "functions must come from a module, not from a notebook or a local scope"
        ) from None


def _start(folder: Path, rank: int) -> subprocess.Popen:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from lib.train import workers; "
        f"workers.work({str(folder)!r}, {rank}, {os.getpid()})"
    )
    with open(folder / f"lines{rank}", "wb") as lines:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdin=subprocess.DEVNULL, stdout=lines,
            stderr=lines if rank else None,  # one voice, also for warnings
        )  # fmt: skip


def _wait(children: list[subprocess.Popen], folder: Path) -> None:
    """Print the first one's lines until all are done; raise what ended one of them."""
    # When one fails, gloo tells the others within moments, and they end with errors of
    # their own; one that hangs instead is not waited for beyond `late`.
    late = float("inf")
    with open(folder / "lines0", "rb") as lines:
        while any(child.poll() is None for child in children):
            _pass_on(lines)
            now = time.monotonic()
            if any(child.poll() for child in children):
                late = min(late, now + GRACE)
            if now > late:
                break
            time.sleep(0.05)
        _pass_on(lines)
    if any(child.poll() != 0 for child in children):
        raise _explain([child.poll() for child in children], folder)


def _pass_on(lines) -> None:
    """Print the whole lines that are new."""
    text = lines.read()
    whole = text.rfind(b"\n") + 1
    lines.seek(whole - len(text), os.SEEK_CUR)
    if whole:
        print(text[:whole].decode(errors="replace"), end="", flush=True)


def _explain(codes: list[int | None], folder: Path) -> Exception:
    """The error that came first; the others are those of processes left alone."""
    told = []
    for rank, code in enumerate(codes):
        who, file = f"process {rank} of {len(codes)}", folder / f"failed{rank}.json"
        if code and code < 0:
            return RuntimeError(
                f"{who} was ended by {signal.Signals(-code).name}; the same call goes "
                "on after the last epoch that its checkpoint has"
            )
        if file.is_file():
            told.append({"who": who, **json.loads(file.read_text(encoding="utf-8"))})
        elif code:
            words = (folder / f"lines{rank}").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(words) if line.strip()), "no word")
            return RuntimeError(f"{who} ended with code {code}: {last}")
    first = min(told, key=lambda facts: facts["moment"])
    kind = getattr(builtins, first["kind"], Exception)
    if issubclass(kind, ValueError | OSError):
        return (ValueError if issubclass(kind, ValueError) else kind)(first["text"])
    error = RuntimeError(f"{first['who']}: {first['kind']}: {first['text']}")
    error.add_note(first["trace"])
    return error


def work(folder: str, rank: int, parent: int) -> None:
    """Be process `rank` of the call in `folder`, for as long as the parent lives."""
    watch = threading.Thread(target=_end_with, args=(parent, folder), daemon=True)
    watch.start()
    try:
        with _handing_over():
            call = torch.load(f"{folder}/call.pt", "cpu", mmap=True, weights_only=False)
        threads, count, function, arguments, options = call
        use_threads(threads)
        with processes.join(rank, count, Path(folder, "store")):
            result = function(*arguments, **options)
            if rank == 0:
                torch.save(result, Path(folder, "result.pt"))
    except BaseException as error:
        facts = {
            "kind": type(error).__name__, "text": str(error), "moment": time.time(),
            "trace": traceback.format_exc(),
        }  # fmt: skip
        Path(folder, f"failed{rank}.json").write_text(json.dumps(facts))
        os._exit(1)  # what waits for the others in torch's destructors would hang


def _end_with(parent: int, folder: str) -> None:
    """A run that was killed must not go on writing beside the one that replaces it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
