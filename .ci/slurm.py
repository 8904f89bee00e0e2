"""What `.ci/reproduce.py` needs of SLURM: options, and the jobs of a folder of runs.

Jobs carry the folder in their name, so that a later call finds those that a killed one
has left, from any machine that can ask the cluster. Standard library only.
"""

import hashlib
import shutil
import subprocess
import time

LONGEST_END = 180  # seconds that jobs may take to end after `scancel`


def name_jobs(runs):
    """The beginning of the names of all jobs that write into the folder `runs`."""
    return f"pruning-{hashlib.sha256(str(runs).encode()).hexdigest()[:12]}"


def list_options(runs):
    """Options for Snakemake's executor: names, and whom to ask how a job fares.

    The executor takes `sacct` where the program exists; without accounting that prints
    nothing, and the executor would wait for ever.
    """
    options = ["--slurm-jobname-prefix", name_jobs(runs)]
    if not has_accounting():
        options += ["--slurm-status-command", "squeue"]
    return options


def has_accounting():
    """Whether `sacct` has something to say here."""
    try:
        asked = ask("sacct", "-X", "--noheader", "--starttime", "now")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and "disabled" not in asked.stdout + asked.stderr


def find_jobs(runs):
    """{number: state} of the jobs that wait, run or end and write into `runs`."""
    asked = ask("squeue", "--noheader", "--format=%i %t %j")
    if asked.returncode != 0:
        raise OSError(f"squeue: {asked.stderr.strip()}")
    jobs = (line.split(maxsplit=2) for line in asked.stdout.splitlines() if line)
    mine = name_jobs(runs) + "_"
    return {number: state for number, state, name in jobs if name.startswith(mine)}


def cancel_jobs(runs):
    """End the jobs that write into `runs`; return how many. OSError if they live on.

    Returns when the cluster has seen the last one end: from then on nobody else writes.
    """
    if shutil.which("squeue") is None:
        raise OSError("there is no squeue here to ask for them")
    found = set()
    for _ in range(LONGEST_END):
        jobs = find_jobs(runs)
        if not jobs:
            return len(found)
        new = {number for number, state in jobs.items() if state != "CG"} - found
        if new:
            ask("scancel", *sorted(new))
            found |= new
        time.sleep(1)
    raise OSError(f"jobs {' '.join(jobs)} do not end after scancel")


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=90)
