"""What needs a GPU, in order of worth: checks, times, blocks of the comparison.

    make gpu MINUTES=25            on a machine with a GPU
    python tests/gpu/run.py --device cpu --small       a rehearsal without one

Checks and times need torch, torchvision and Triton; what else a step needs and does not
find (SciPy and pandas for the scores and blocks, CIFAR-10) it says. The numbers go to
`gpu.csv` in the output folder as they are found, with device, versions and revision. A
second call goes on behind the first: steps that passed on this device and this code are
not repeated. Steps run in a process of their own, since after some errors of CUDA
nothing works any more in the one that had them; the next step begins in a new process.
Ends with 1 if a check failed.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS = ("kind", "step", "what", "value", "unit", "limit", "outcome", "seconds",
           "device", "torch", "triton", "revision")  # fmt: skip
FATAL = 3  # exit status of a child whose CUDA context is lost


def read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict]) -> None:
    """Rows of one step, all or none, on the disk before the next begins."""
    new = not path.is_file()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


# -- the child: runs steps -----------------------------------------------------------


def run_steps(options: argparse.Namespace) -> int:
    """Every step that is not done; rows into the file. 0, or FATAL."""
    sys.path[:0] = [str(ROOT), str(HERE)]
    import blocks
    import checks  # noqa: F401, enters its steps
    import times  # noqa: F401
    from steps import STEPS, Bench

    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.device, options.small, options.bases, options.out)
    blocks.enter_blocks(bench)
    made_with = describe(options.device)
    done = {
        row["step"]
        for row in read_rows(options.out / "gpu.csv")
        if row["outcome"] not in {"WRONG", "out of time"}
        and all(row[key] == value for key, value in made_with.items())
    }
    for name, (kind, function) in STEPS.items():
        if name in done or (options.only and name not in options.only):
            continue
        left = options.until - time.time()
        if left < 1:
            return 0
        note(options.out, name)
        rows = run_step(name, kind, function, bench, left)
        append(options.out / "gpu.csv", [row | made_with for row in rows])
        note(options.out, "")
        if any("CUDA error" in row["what"] for row in rows):
            return FATAL
    return 0


def run_step(name: str, kind: str, function, bench, left: float) -> list[dict]:
    """The rows of one step; the last, if it broke off, says why."""
    from steps import NotHere

    def stop(*_):
        raise TimeoutError("the minutes are over")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(left)))
    begin, rows, end = time.perf_counter(), [], None
    print(f"{kind} {name}: {function.__doc__.splitlines()[0]}", flush=True)
    try:
        for found in function(bench):
            bench.wait()
            outcome = "WRONG" if not found.fine else "fine"
            outcome = "measured" if found.limit is None else outcome
            rows.append({"what": found.what, "value": f"{found.value:.6g}",
                         "unit": found.unit, "limit": found.limit,
                         "outcome": outcome})  # fmt: skip
    except NotHere as why:
        end = "not here", str(why)
    except TimeoutError as why:
        end = "out of time", str(why)
    except Exception as error:  # a fault of one step is a row, not the end
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        end = "WRONG", text
    finally:
        signal.alarm(0)
    if end:
        rows.append({"what": end[1], "outcome": end[0]})
    spent = f"{time.perf_counter() - begin:.1f}"
    for row in rows:
        line = " ".join(str(row[k]) for k in ("value", "unit") if k in row)
        print(f"  {row['outcome']:8} {row['what']}  {line}", flush=True)
    return [{"kind": kind, "step": name, "seconds": spent} | row for row in rows]


def describe(device: str) -> dict[str, str]:
    """Device, versions and revision of the code."""
    import torch

    from lib import settings
    from lib.kernels import dispatch

    triton = ""
    if dispatch.has_triton():
        import triton as module

        triton = module.__version__
    named = torch.cuda.get_device_name() if device == "cuda" else settings.device_name()
    return {"device": named, "torch": torch.__version__, "triton": triton,
            "revision": settings.code_revision()}  # fmt: skip


def note(out: Path, name: str) -> None:
    """Which step is being run: what a process that dies was at."""
    (out / "running").write_text(name)


# -- the parent: starts children until all is done -----------------------------------


def child_command(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--child", "--until", str(options.until),
               "--device", options.device, "--out", str(options.out),
               "--bases", str(options.bases)]  # fmt: skip
    command += ["--small"] if options.small else []
    return command + (["--only", *options.only] if options.only else [])


def run_children(options: argparse.Namespace) -> None:
    """Children one after another; a step at which one died gets a row that says so."""
    command, file = child_command(options), options.out / "gpu.csv"
    while time.time() < options.until:
        note(options.out, "")
        try:
            code = subprocess.run(command, timeout=options.until - time.time() + 20)
            code = code.returncode
        except subprocess.TimeoutExpired:  # a kernel that never ends heeds no alarm
            code = None
        if code == 0:
            break
        if code == FATAL:
            continue
        died = (options.out / "running").read_text()
        if not died:
            sys.exit(f"the steps cannot be run (exit status {code})")
        how = "the minutes are over" if code is None else f"exit status {code}"
        append(file, [{"kind": "?", "step": died, "what": how, "outcome": "died"}
                      | describe_here(options.device)])  # fmt: skip
        print(f"  died     {died}: {how}", flush=True)
    (options.out / "running").unlink(missing_ok=True)


def describe_here(device: str) -> dict[str, str]:
    """As `describe`, from a process of its own: this one has no CUDA."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]\n"
        f"import json, run; print(json.dumps(run.describe({device!r})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def sum_up(options: argparse.Namespace, first: int) -> int:
    """Print what this call found; 1 if a check failed or a process died."""
    rows = read_rows(options.out / "gpu.csv")[first:]
    counts = Counter(row["outcome"] for row in rows)
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(found or "nothing to do", "->", options.out / "gpu.csv")
    return int(bool(counts["WRONG"] or counts["died"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=25, help="stop after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a quick look")
    parser.add_argument("--out", type=Path, default=None, help="default: data/runs/gpu")
    parser.add_argument("--bases", type=Path, default=ROOT / "data/results/bases")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_steps(options)
    if not 0 < options.minutes < 1e5:
        parser.error(f"--minutes must be a positive number, got {options.minutes:g}")
    runs = Path(os.environ.get("PRUNING_RUNS") or ROOT / "data/runs")
    options.out = options.out or runs / "gpu"
    options.until = time.time() + 60 * options.minutes
    if options.device == "cuda":
        seen = "import torch; raise SystemExit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", seen]).returncode:
            sys.exit("no GPU: torch sees none here (--device cpu --small rehearses)")
    options.out.mkdir(parents=True, exist_ok=True)
    first = len(read_rows(options.out / "gpu.csv"))
    run_children(options)
    return sum_up(options, first)


if __name__ == "__main__":
    sys.exit(main())
