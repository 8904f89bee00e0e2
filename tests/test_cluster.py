"""Runs on a real SLURM, of one node, that is set up and taken down here."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from cluster import slurm
from test_settings import Copy, write_notebook

from lib import paths

TROUBLE = slurm.find_trouble()
if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
    TROUBLE = TROUBLE or "no executor for SLURM (.ci/setup cluster)"
pytestmark = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))

DECLARED = "run: str = 'x'\nbase: int = 0\nepochs: int = 0\nthreads: int = 1\n"
# each epoch is a line of its folder's `trace`: who, which, and when
WORK = """
import json, os, time
from lib import paths
folder = paths.runs_root() / run
trace = folder / "trace"
done = len(trace.read_text().splitlines()) if trace.exists() else 0
for epoch in range(done, epochs):
    with trace.open("a") as lines:
        lines.write(f"{os.getpid()} {epoch} {time.time()}\\n")
    time.sleep(0.5)
made_with = dict.fromkeys(("device", "torch", "revision"), "toy")
metrics = {"rows": [], "environment": made_with, "told": dict(os.environ)}
paths.write_json(folder / "metrics.json", metrics)
"""
FAST = ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "20"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM that runs."""
    folder = tmp_path_factory.mktemp("slurm")
    slurm.start(folder)
    yield
    slurm.stop(folder)


class Site(Copy):
    """A checkout with toy notebooks on a machine that reaches the cluster."""

    def __init__(self, root):
        super().__init__(root)
        for book in ("01_baseline", "02_surgery"):
            write_notebook(root / "notebooks" / f"{book}.ipynb", DECLARED, WORK)
        source = paths.NOTEBOOKS / "profiles/slurm/config.yaml"
        (root / "notebooks/profiles/slurm").mkdir(parents=True)
        text = source.read_text().replace("mem_mb: 4000", "mem_mb: 1000")
        (root / "notebooks/profiles/slurm/config.yaml").write_text(text)

    def reproduce(self, *arguments, **more):
        """`make reproduce PROFILE=toy CLUSTER=slurm`, begun."""
        environment = os.environ | {"PRUNING_RUNS": str(self.root / "runs")} | more
        return subprocess.Popen(
            [sys.executable, self.root / ".ci/reproduce.py", "toy",
             "--cluster", "slurm", *FAST, *arguments],
            cwd=self.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def environment(self, name):
        """What the notebook of a run was told."""
        metrics = json.loads((self.runs / name / "metrics.json").read_text())
        return metrics["told"]

    def trace(self, name):
        """[(process, epoch, time)] of a run."""
        path = self.runs / name / "trace"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(map(float, line.split())) for line in lines]

    def wait_for_epochs(self, name, count):
        for _ in range(1200):
            if len(self.trace(name)) >= count:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} does not begin")

    def jobs(self):
        """Numbers of the jobs that wait or run."""
        return slurm.ask("squeue", "--noheader", "--format=%i").split()

    def children(self):
        """Snakemake of this checkout on the machine that asks, with what it started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                told = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            inside = any(x.startswith(b"SLURM_JOB_ID=") for x in told)
            mark = f"PRUNING_REPRODUCE={self.root / 'runs'}".encode()
            if mark in told and not inside:
                found.append(int(entry.name))
        return found


@pytest.fixture
def site(tmp_path, cluster):
    return Site(tmp_path / "checkout")


def finish(process):
    """Exit status and what was printed; within five minutes."""
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def check_one_writer(trace, epochs):
    """Every epoch once, and nobody after another has begun."""
    assert [epoch for _, epoch, _ in trace] == list(range(epochs))
    writers = [process for process, _, _ in trace]
    changes = sum(a != b for a, b in pairwise(writers))
    assert changes == len(set(writers)) - 1
    return len(set(writers))


def test_a_profile_passes_each_base_a_job(site):
    """With the threads it asks for, no GPU, and only what it needs of the environment.

    There is no accounting here, which Snakemake's executor alone would wait for.
    """
    site.write("toy", "01_baseline: {}\n02_surgery: {threads: 2, base: [0, 1]}\n")
    mine = {"AWS_SECRET_ACCESS_KEY": "x", "OMP_NUM_THREADS": "7", "PRUNING_MINE": "y"}
    status, output = finish(site.reproduce("--cores", "1", **mine))
    assert status == 0 and "4 of 4 steps done" in output, output
    found = [site.environment(f"02_surgery/base{base}") for base in (0, 1)]
    jobs = {told["SLURM_JOB_ID"] for told in (*found, site.environment("01_baseline"))}
    assert len(jobs) == 3
    for told in found:
        assert told["OMP_NUM_THREADS"] == "2"
        assert "SLURM_GPUS" not in told and "CUDA_VISIBLE_DEVICES" not in told
        assert "AWS_SECRET_ACCESS_KEY" not in told and told["PRUNING_MINE"] == "y"
    assert site.environment("01_baseline")["OMP_NUM_THREADS"] == "1"
    status, output = finish(site.reproduce())
    assert status == 0 and "nothing to be done" in output, output


def test_a_gpu_is_asked_for_and_the_refusal_shown(site):
    site.write("toy", "01_baseline: {}\n")
    options = ["--retries", "0"]
    status, output = finish(site.reproduce(*options, "--config", "gpu=3"))
    assert status == 1, output
    (line,) = [x for x in output.splitlines() if x.startswith("failed:")]
    assert "01_baseline.ipynb (the cluster refused the job:" in line
    assert "Requested node configuration is not available" in line
    status, output = finish(site.reproduce(*options, "--config", "gpu=1"))
    assert status == 0, output
    assert site.environment("01_baseline")["CUDA_VISIBLE_DEVICES"] == "0"


def test_the_jobs_of_a_killed_front_end_are_not_doubled(site):
    site.write("toy", "01_baseline: {epochs: 60}\n")
    first = site.reproduce()
    site.wait_for_epochs("01_baseline", 3)
    (job,) = site.jobs()
    first.kill()
    for child in site.children():  # a front end whose machine was switched off
        os.kill(child, 9)
    first.wait()
    assert site.jobs() == [job], "it runs on"
    second = site.reproduce()
    status, output = finish(second)
    assert status == 0 and "cancelled 1 jobs on the cluster" in output, output
    trace = site.trace("01_baseline")
    assert check_one_writer(trace, 60) == 2
    assert site.environment("01_baseline")["SLURM_JOB_ID"] != job


def test_a_cancelled_job_is_taken_up(site):
    site.write("toy", "01_baseline: {epochs: 30}\n")
    process = site.reproduce()
    site.wait_for_epochs("01_baseline", 3)
    (job,) = site.jobs()
    slurm.ask("scancel", job)
    status, output = finish(process)
    assert status == 0, output
    assert check_one_writer(site.trace("01_baseline"), 30) == 2
