"""Run one profile through Snakemake, with one readable line per event.

    .venv/bin/python .ci/reproduce.py PROFILE [--cores N] [more Snakemake arguments]

Kill it in any way: the next call stops what was left running and goes on after the
last finished notebook. Standard library only.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ.get("PRUNING_RUNS") or ROOT / "data" / "runs").resolve()
GPU = next(Path("/dev").glob("nvidia[0-9]*"), None)
MARK = "PRUNING_REPRODUCE"  # in the environment of everything a run starts


def say(text, file=sys.stdout):
    print(text, flush=True, file=file)


def take_lock():
    """Lock the folder of runs; the lock goes with this process, however it dies."""
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = open(RUNS / ".reproduce.lock", "a")  # held until the end
    for _ in range(30):  # a run whose `make` was just killed takes a second to end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            time.sleep(0.1)
    sys.exit(f"reproduce: another `make reproduce` is at work in {shown(RUNS)}; "
             "wait for it or stop it first")  # fmt: skip


def stop_leftovers():
    """Kill what this run, or a killed one before it, started (where /proc is)."""
    mark = f"{MARK}={RUNS}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:  # gone meanwhile, or somebody else's
            pass


def stop_with_parent():
    """`kill -9` of make reaches no child, so watch for it."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    stop_leftovers()
    os._exit(1)


def shown(path):
    path = Path(path).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def stop_with_engine(engine):
    """A killed Snakemake leaves its notebook running, and the pipe to us open."""
    engine.wait()
    stop_leftovers()


def start_snakemake(arguments):
    command = [sys.executable, "-m", "snakemake", "-s", "notebooks/Snakefile"]
    command += ["--nolock", "--rerun-incomplete", "--keep-going", "--quiet", "host"]
    command += arguments
    environment = {**os.environ, MARK: str(RUNS), "TQDM_DISABLE": "1"}
    terminal = f"/proc/{os.getpid()}/fd/1"  # epochs report here, past the notebooks
    if os.path.exists(terminal) and not stat.S_ISREG(os.fstat(1).st_mode):
        environment.setdefault("PRUNING_PROGRESS", terminal)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def follow(lines, everything):
    """Print starts and steps; return the notebooks (or rules) that failed."""
    failed, block, begin = [], "", time.monotonic()
    for line in lines:
        everything.write(line)
        everything.flush()
        if found := re.match(r"(?:local)?(rule|checkpoint) (\w+):", line):
            block = "start"
        elif found := re.match(r"Error in rule (\w+)", line):
            block = "error"
            failed.append(f"rule {found[1]}")
        elif found := re.match(r"    log: (.+?)(?: \(check log.*)?$", line):
            name = next((f for f in found[1].split(", ") if f.endswith(".ipynb")), "")
            if name and block == "start":
                say(f"  running {shown(ROOT / name)}")
            elif name and block == "error":
                failed[-1] = name
        elif found := re.match(r"\d+ of \d+ steps \(.*\) done", line):
            minutes, seconds = divmod(round(time.monotonic() - begin), 60)
            say(f"{found[0]} after {minutes}:{seconds:02d}")
        elif line.startswith("Nothing to be done"):
            say("nothing to be done: every result is there and up to date")
    return failed


def last_error(notebook):
    """The error an executed notebook ended on, as one line."""
    try:
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return "it did not start"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output["output_type"] == "error"]
    if not errors:
        return "killed or out of memory: no cell shows an error"
    value = errors[-1]["evalue"].strip().split("\n")[0]
    return f"{errors[-1]['ename']}: {value}"[:200]


def explain_failure(failed, status, log):
    for name in failed:
        if name.endswith(".ipynb"):
            name = f"open {shown(ROOT / name)} ({last_error(name)})"
        say(f"failed: {name}", sys.stderr)
    if status < 0:
        say(f"failed: Snakemake was killed by signal {-status}", sys.stderr)
    elif not failed:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        lines = ["failed: Snakemake stopped with", *lines[-6:]]
        say("\n  ".join(lines), sys.stderr)
    say(f"full log: {shown(log)}; the same command takes up where this one stopped")


def run(profile, arguments):
    """Return the exit status of the run, table included."""
    lock = take_lock()
    stop_leftovers()
    threading.Thread(target=stop_with_parent, daemon=True).start()
    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(name, signal.default_int_handler)
    log = RUNS / f"{profile}.log"
    say(f"profile {profile}: planning the steps")
    engine = start_snakemake(arguments)
    threading.Thread(target=stop_with_engine, args=[engine], daemon=True).start()
    try:
        with log.open("w", encoding="utf-8") as everything:
            failed = follow(engine.stdout, everything)
        status = engine.wait()
    except KeyboardInterrupt:
        say("stopped; the same command takes up where this one stopped")
        return 130
    finally:
        engine.kill()
        stop_leftovers()
        lock.close()
    if status != 0:
        explain_failure(failed, status, log)
        return 1
    return show_results(profile)


def show_results(profile):
    report = [sys.executable, "-m", "lib.report", "--profile", profile]
    if subprocess.call(report, cwd=ROOT) != 0:
        say("failed: the results table could not be made (see above)", sys.stderr)
        return 1
    folder = shown(RUNS / profile)
    say(f"executed notebooks: {folder}/   their figures: {folder}/figures/")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile", help="quick, or a name in notebooks/params")
    parser.add_argument("--cores", default="all")
    parser.add_argument("-C", "--config", nargs="*", action="extend", default=[])
    options, more = parser.parse_known_args()
    files = (ROOT / "notebooks/params").glob("*.yaml")
    known = sorted({"quick", *(path.stem for path in files)})  # quick: the defaults
    if options.profile not in known:
        sys.exit(f"reproduce: no profile {options.profile!r}; have {', '.join(known)}")
    arguments = ["--cores", options.cores, *more]  # of two --config, the last counts
    arguments += ["--config", *options.config, f"profile={options.profile}"]
    if GPU and not any(word.startswith("--res") for word in more):
        arguments += ["--resources", "gpu=1"]  # notebooks take the first, in turn
    if {"-n", "--dry-run", "--dryrun"} & set(more):  # Snakemake's own words
        engine = start_snakemake(arguments)
        sys.stdout.writelines(engine.stdout)
        sys.exit(engine.wait())
    sys.exit(run(options.profile, arguments))


if __name__ == "__main__":
    main()
