"""Run one profile through Snakemake, with one readable line per event.

    .venv/bin/python .ci/reproduce.py PROFILE [--cores N] [more Snakemake arguments]
    .venv/bin/python .ci/reproduce.py PROFILE --cluster slurm [...]

Kill it in any way: the next call stops what was left running, here or on a cluster, and
goes on after the last finished notebook. Standard library only; Snakemake, its child,
says what happens through `engine.py`.
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

sys.path.append(str(Path(__file__).parent))
import slurm

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(os.environ.get("PRUNING_RUNS") or ROOT / "data" / "runs").resolve()
GPU = next(Path("/dev").glob("nvidia[0-9]*"), None)
MARK = "PRUNING_REPRODUCE"  # in the environment of everything a run starts
# what a job on a cluster is told of the environment here: no secrets, nothing that
# counts the cores of this machine
TOLD = set(
    "PATH HOME USER LOGNAME SHELL LANG TZ LD_LIBRARY_PATH TORCH_HOME SLURM_CONF "
    "SNAKEMAKE_SLURM_PARTITIONS".split()
)
TOLD_FAMILIES = ("PRUNING_", "LC_", "SBATCH_")


def say(text, file=None):
    print(text, flush=True, file=file)


def take_lock():
    """Lock the folder of runs until this process has ended, however it ends.

    Who holds it may stop whatever else writes there. The file says on what the last run
    was at work, if that may still be.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = open(RUNS / ".reproduce.lock", "a+")
    for _ in range(30):  # a run whose `make` was just killed takes a second to end
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            time.sleep(0.1)
    sys.exit(f"reproduce: another `make reproduce` is at work in {shown(RUNS)}; "
             "wait for it or stop it first")  # fmt: skip


def stop_leftovers(lock):
    """Stop what this run, or a killed one before it, started; only with the lock."""
    for _ in range(200):  # again: what a killed one had just started
        if not kill_marked():
            break
        time.sleep(0.05)
    lock.seek(0)
    if lock.read().strip() != "slurm":
        return
    try:
        if jobs := slurm.cancel_jobs(RUNS):
            say(
                f"cancelled {jobs} jobs on the cluster; they go on from where they were"
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"reproduce: an earlier run may still have jobs on a cluster that "
                 f"write in {shown(RUNS)}, and {error}; once they have ended, empty "
                 f"{shown(lock.name)}")  # fmt: skip
    lock.truncate(0)


def kill_marked():
    """Kill the processes that carry the mark (where /proc is); return how many.

    Jobs of a cluster, which may run on this machine, are the cluster's to end.
    """
    mark, found = f"{MARK}={RUNS}".encode(), 0
    ours = f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID')}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "environ").read_bytes().split(b"\0")
            jobs = {word for word in told if word.startswith(b"SLURM_JOB_ID=")}
            if mark in told and jobs <= {ours}:
                os.kill(int(entry.name), signal.SIGKILL)
                found += 1
        except OSError:  # gone meanwhile, or somebody else's
            pass
    return found


def stop_with_parent(lock):
    """`kill -9` of make reaches no child, so watch for it."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    try:
        stop_leftovers(lock)
    finally:
        os._exit(1)


def shown(path):
    path = Path(path).resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def prepare_environment(remote):
    """The environment that Snakemake starts in, and its jobs with it."""
    told = dict(os.environ)
    if remote:
        told = {k: v for k, v in told.items()
                if k in TOLD or k.startswith(TOLD_FAMILIES)}  # fmt: skip
        told.pop("PRUNING_PROGRESS", None)  # another machine's terminal
    told["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), told["PATH"]])
    told |= {MARK: str(RUNS), "TQDM_DISABLE": "1"}
    terminal = f"/proc/{os.getpid()}/fd/1"  # epochs report here, past the notebooks
    if not remote and os.path.exists(terminal):
        if not stat.S_ISREG(os.fstat(1).st_mode):
            told.setdefault("PRUNING_PROGRESS", terminal)
    return told


def start_snakemake(arguments, remote=False, **options):
    engine = str(ROOT / ".ci/engine.py")
    command = [sys.executable, engine, "-s", "notebooks/Snakefile"]
    command += ["--nolock", "--rerun-incomplete", "--keep-going", "--quiet", "host"]
    command += arguments
    return subprocess.Popen(
        command, cwd=ROOT, env=prepare_environment(remote), **options
    )


def follow(lines):
    """Print starts and steps; return {what failed: its reason} and steps done."""
    failed, done, begin = {}, 0, time.monotonic()
    for line in lines:
        if not line.endswith("\n"):  # Snakemake was killed
            break
        event = json.loads(line)
        books = [name for name in event.get("log", ()) if name.endswith(".ipynb")]
        name = (books or event.get("output") or [event.get("rule")])[0]
        if event["event"] == "job_info" and books:
            say(f"  running {shown(ROOT / name)}")
        elif event["event"] == "job_error":
            failed[name] = event["reason"] or ""
        elif event["event"] == "error":
            failed[event["text"]] = None
        elif event["event"] == "progress":
            minutes, seconds = divmod(round(time.monotonic() - begin), 60)
            done, total = event["done"], event["total"]
            say(f"{done} of {total} steps done after {minutes}:{seconds:02d}")
    return failed, done


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


REFUSED = "sbatch failed. The error message was"  # words of the executor
DETAILS = "For further error details"


def explain_failure(failed, status, log):
    jobs = {name: reason for name, reason in failed.items() if reason is not None}
    for name, reason in (jobs or failed).items():  # of jobs Snakemake says it twice
        if reason is None:
            text = name
        elif REFUSED in reason:
            said = reason.split(REFUSED)[1].split("\n    sbatch call:")[0].strip()
            text = f"{shown(ROOT / name)} (the cluster refused the job: {said})"
        else:
            said = reason.split(DETAILS)[0].strip().rstrip(".")
            said = "; ".join(filter(None, [last_error(name), said]))
            text = f"open {shown(ROOT / name)} ({said})"
        say(f"failed: {' '.join(text.split())[:500]}", sys.stderr)
    if status < 0:
        say(f"failed: Snakemake was killed by signal {-status}", sys.stderr)
    elif not failed:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        lines = ["failed: Snakemake stopped with", *lines[-6:]]
        say("\n  ".join(lines), sys.stderr)
    say(f"full log: {shown(log)}; the same command takes up where this one stopped")


def run(profile, arguments, executor="local"):
    """Return the exit status of the run, table included."""
    lock = take_lock()
    stop_leftovers(lock)
    if executor == "slurm":
        lock.write("slurm")
        lock.flush()
    threading.Thread(target=stop_with_parent, args=[lock], daemon=True).start()
    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(name, signal.default_int_handler)
    log = RUNS / f"{profile}.log"
    say(f"profile {profile}: planning the steps")
    try:
        status, failed, done = run_snakemake(arguments, executor != "local", log)
    except KeyboardInterrupt:
        say("stopped; the same command takes up where this one stopped")
        return 130
    finally:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # a second Ctrl-C
        stop_leftovers(lock)
    if status != 0:
        explain_failure(failed, status, log)
        return 1
    if not done:
        say("nothing to be done: every result is there and up to date")
    return show_results(profile)


def run_snakemake(arguments, remote, log):
    """Exit status, what failed and how many steps were done; its text goes to `log`."""
    mine, its = os.pipe()  # closed by its end, whatever it leaves running
    arguments = [*arguments, "--logger", "events", "--logger-events-fd", str(its)]
    with log.open("wb") as text, open(mine, encoding="utf-8") as events:
        engine = start_snakemake(
            arguments, remote, stdout=text, stderr=subprocess.STDOUT, pass_fds=[its]
        )
        os.close(its)
        try:
            failed, done = follow(events)
            return engine.wait(), failed, done
        finally:
            engine.kill()


def show_results(profile):
    command = [sys.executable, ".ci/publish.py", "--profile", profile]
    if subprocess.call(command, cwd=ROOT) != 0:
        say("failed: the results table could not be made (see above)", sys.stderr)
        return 1
    folder = shown(RUNS / profile)
    say(f"executed notebooks: {folder}/   their figures: {folder}/figures/")
    return 0


def count_cores(text):
    """`--cores`: a number from 1, or `all`."""
    if text != "all" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"CORES must be 1 or more, or all, not {text!r}"
        )
    return text


def find_cluster(name):
    """The folder of a Snakemake profile: of notebooks/profiles, or a path."""
    places = [ROOT / "notebooks/profiles" / name, Path(name).resolve()]
    for place in places:
        if (place / "config.yaml").is_file():
            return str(place)
    raise argparse.ArgumentTypeError(
        f"no config.yaml in {' or '.join(map(str, places))}"
    )


def find_executor(words):
    """The executor that words for Snakemake name, themselves or through a profile."""
    words = ["--profile", os.environ.get("SNAKEMAKE_PROFILE", ""), *words]
    found = "local"
    for word, value in zip(words, [*words[1:], ""], strict=True):
        name, _, joined = word.partition("=")
        if name in ("-e", "--executor"):
            return joined or value
        if name in ("--profile", "--workflow-profile"):
            for place in (ROOT, Path.home() / ".config/snakemake"):
                file = place / (joined or value) / "config.yaml"
                text = file.read_text(encoding="utf-8") if file.is_file() else ""
                if named := re.search(r"^executor: *[\"']?([\w-]+)", text, re.M):
                    found = named[1]
    return found


def refuse(text):
    sys.exit(f"reproduce: {text}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.error = refuse
    parser.add_argument("profile", help="quick, or a name in notebooks/params")
    parser.add_argument("--cores", type=count_cores, default="all")
    parser.add_argument("--cluster", type=find_cluster, help="slurm, or a folder")
    parser.add_argument("-C", "--config", nargs="*", action="extend", default=[])
    options, more = parser.parse_known_args()
    files = (ROOT / "notebooks/params").glob("*.yaml")
    known = sorted({"quick", *(path.stem for path in files)})  # quick: the defaults
    if options.profile not in known:
        sys.exit(f"reproduce: no profile {options.profile!r}; have {', '.join(known)}")
    arguments = [
        str((ROOT / word).resolve()) if word.endswith("/metrics.json") else word
        for word in more
    ]
    config = [*options.config, f"profile={options.profile}"]
    if options.cluster:
        arguments += ["--profile", options.cluster]
    executor = find_executor(arguments)
    remote = executor != "local"
    if executor == "slurm":
        arguments += slurm.list_options(RUNS)
    if not remote:  # nodes of a cluster have cores and GPUs of their own
        arguments = ["--cores", options.cores, *arguments]
        if GPU:  # every notebook takes one
            config.insert(0, "gpu=1")
            if not any(word.startswith("--res") for word in more):
                arguments += ["--resources", "gpu=1"]  # the first, in turn
    arguments += ["--config", *config]  # of two --config, the last counts
    if {"-n", "--dry-run", "--dryrun"} & set(more):  # Snakemake's own words
        sys.exit(start_snakemake(arguments, remote).wait())
    sys.exit(run(options.profile, arguments, executor))


if __name__ == "__main__":
    main()
