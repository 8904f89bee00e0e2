"""Runs that are killed, fed with nonsense, out of disk and started twice.

    .venv/bin/python tests/campaign.py [--kills 100] [--slow 6] [--full 20] [--twice 5]

Not collected by pytest: it takes from minutes to an hour. Prints a table and the cases
that failed; the exit status is 1 if there are any.

* kills: training, SCOP's selection, its control, MAP's collection, `papermill`,
  `snakemake` without what watches over it, and `make reproduce`, each ended by SIGKILL
  at random moments, up to three times, and then left to finish: the same bits as a run
  that nobody stopped, and the same files, no more.
* inputs: every case of `test_refusals` and of `test_settings`, damaged files, runs of
  papermill with parameters that do not fit: one clear line each, no file.
* full: writes that fail at random sizes (RLIMIT_FSIZE) and a disk of random size
  (tmpfs, as root): an error that names the file and the cause, then as for kills.
* twice: two processes at once on one folder: both end in the same bits.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lib import data, map3d, models, paths, scop, settings, train  # noqa: E402
from lib.data.sources import read_digits  # noqa: E402
from lib.stages import Sets  # noqa: E402
from lib.train import checkpoint  # noqa: E402

read_digits()  # once, in the process that all others are forked from
# of the machine and of the interruptions, not of the result
PATIENCE = 3600  # seconds for a run that nobody stops, on a busy machine
CLOCKS = {
    "seconds", "images_per_s", "wall_seconds", "made_with", "environment", "resumed",
}  # fmt: skip
PROFILE = """01_baseline: {n_train: 600, baseline_epochs: 3, batch_size: 32}
11_scop_selection: {n_train: 300, baseline_epochs: 3, batch_size: 32,
                    control_epochs: 2, controls: [generator, shuffle]}
"""
SINGLE = {"n_train": 600, "baseline_epochs": 3, "batch_size": 32}


# -- what is run -----------------------------------------------------------------------


def load_sets() -> Sets:
    """200 digits at 14 x 14 pixels, and some more to judge by."""
    images = data.load("mnist5k", "train").scale(14)
    few, val = images.take(200), images.take(100, seed=1)
    return Sets(few, val, val)


def build_net(name: str = "resnet8"):
    torch.manual_seed(0)
    return models.build(name, in_channels=1, image_size=14)


def run_training(folder: Path) -> None:
    sets = load_sets()
    train.fit(
        build_net(), sets.train, sets.val, epochs=4, lr=0.05, batch_size=32, warmup=1.0,
        checkpoint=folder / "run.pt", device="cpu",
    )  # fmt: skip


def run_selection(folder: Path) -> None:
    images = load_sets().train
    control = scop.build_control("shuffle", images, device="cpu")
    scop.select(
        build_net(), images, control, epochs=4, batch_size=32, device="cpu",
        checkpoint=folder / "betas.pt",
    )  # fmt: skip


def run_control(folder: Path) -> None:
    images = load_sets().train
    scop.build_control("generator", images, epochs=4, folder=folder, device="cpu")


def run_collection(folder: Path) -> None:
    os.environ["PRUNING_RUNS"] = str(folder)
    net, sets = build_net("resnet14"), load_sets()
    space = map3d.Space(net, sets.train.shape)
    design = map3d.make_design("axis", (1.0, 0.5, 0.5), rounds=2)
    recipe = train.Recipe(2, lr=0.05, batch_size=32)
    points = map3d.collect(net, space, design, sets, run="toy/points", recipe=recipe)
    map3d.write_points("toy/points", points)


FAST: dict[str, Callable[[Path], None]] = {
    "training": run_training, "selection": run_selection,
    "control": run_control, "collection": run_collection,
}  # fmt: skip


def child(name: str, folder: str, limit: int | None, tell) -> None:
    """In a process of its own, no file larger than `limit`. An OSError is told."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        FAST[name](Path(folder))
    except OSError as error:
        tell.send(str(error))
        os._exit(28)


class Forked:
    """A job in a process forked from one that has imported everything."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, name: str, folder: Path, limit: int | None = None):
        self.pipe, tell = self.context.Pipe()
        given = (name, folder, limit, tell)
        self.process = self.context.Process(target=child, args=given)
        self.process.start()

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def read(self) -> str:
        with contextlib.suppress(EOFError):  # it had nothing to say
            return self.pipe.recv() if self.pipe.poll() else ""
        return ""


class Spawned:
    """A command; `kill -9` reaches it alone, what it started is left to itself."""

    def __init__(self, name: str, folder: Path):
        command, place = COMMANDS[name](folder)
        environment = os.environ | {
            "PRUNING_RUNS": str(folder / "runs"), "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place),
            "PATH": f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, cwd=place, env=environment,
            stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, timeout: float | None = None) -> int | None:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        time.sleep(2.0)  # what it started notices, and ends

    def read(self) -> str:
        self.output.seek(0)
        return self.output.read()


def call_papermill(folder: Path, **changes) -> tuple[list[str], Path]:
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    values = {**SINGLE, "run": "toy/01_baseline", **changes}
    command = ["papermill", ROOT / "notebooks" / "01_baseline.ipynb"]
    command += [folder / "out.ipynb", "-k", "python3", "--no-progress-bar"]
    return [*map(str, command), "-y", json.dumps(values)], ROOT


def copy_repository(folder: Path) -> Path:
    """What a profile needs of it, and one that takes seconds."""
    copy = folder / "copy"
    if not copy.exists():
        listed = ["git", "ls-files", "Makefile", "lib", ".ci", "notebooks"]
        listed += ["pyproject.toml", "data/results/bases"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout
        for name in files.split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (copy / ".venv").symlink_to(ROOT / ".venv")
        (copy / "notebooks" / "params" / "toy.yaml").write_text(PROFILE)
    return copy


def call_snakemake(folder: Path) -> tuple[list[str], Path]:
    """As the Snakefile says, with what makes it go on after a kill."""
    command = "snakemake -s notebooks/Snakefile --cores 1 --nolock --rerun-incomplete"
    return [*command.split(), "--config", "profile=toy"], copy_repository(folder)


def call_make(folder: Path) -> tuple[list[str], Path]:
    """`make reproduce` with a .venv that is there."""
    command = "make -o venv reproduce PROFILE=toy CORES=1"
    return command.split(), copy_repository(folder)


COMMANDS = {
    "papermill": call_papermill, "snakemake": call_snakemake, "make": call_make,
}  # fmt: skip


def start(name: str, folder: Path) -> Forked | Spawned:
    return Forked(name, folder) if name in FAST else Spawned(name, folder)


# -- what is left ----------------------------------------------------------------------


def strip(value):
    """A value without what depends on the clock or on who measured."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if k not in CLOCKS}
    if isinstance(value, (list, tuple)):
        return [strip(item) for item in value]
    if isinstance(value, torch.Tensor):
        return checkpoint.digest_tensors(str(value.dtype), value)
    return value


def read_result(file: Path) -> object:
    """What a file says, without clocks; of pictures and logs only that they exist."""
    if file.suffix == ".pt":
        return strip(checkpoint.load(file))
    if file.suffix == ".json":
        return strip(json.loads(file.read_text()))
    if file.suffix == ".csv":
        lines = [line.split(",") for line in file.read_text().splitlines()]
        gone = [i for i, name in enumerate(lines[0]) if name in CLOCKS]
        return [[x for i, x in enumerate(row) if i not in gone] for row in lines]
    return None


def read_results(folder: Path) -> dict[str, object]:
    """Every whole file below the runs, but for the engine's own notes."""
    runs = folder / "runs" if (folder / "runs").is_dir() else folder
    own = ("logs", ".snakemake", ".reproduce", ".code")
    found = (p for p in runs.rglob("*") if p.is_file() and "/.tmp-" not in str(p))
    return {
        str(path.relative_to(runs)): read_result(path)
        for path in sorted(found)
        if not str(path.relative_to(runs)).startswith(own) and path.suffix != ".log"
    }


def compare(found: dict, wanted: dict) -> str:
    """What differs, in a few words; empty where all is the same."""
    more, less = sorted(found.keys() - wanted), sorted(wanted.keys() - found)
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    told = {"left over": more, "missing": less, "other bits": other}
    return "; ".join(f"{what}: {', '.join(n[:3])}" for what, n in told.items() if n)


# -- the campaigns ---------------------------------------------------------------------


@dataclass
class Tally:
    """Counts per kind, and the cases that failed."""

    draw: random.Random
    table: dict[str, Counter] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    wanted: dict[str, tuple[dict, float]] = field(default_factory=dict)

    def count(self, kind: str, **what: int) -> None:
        self.table.setdefault(kind, Counter()).update(what)

    def judge(self, kind: str, case: str, fault: str) -> None:
        self.count(kind, cases=1, failed=int(bool(fault)))
        if fault:
            self.failed.append(f"{kind}, {case}: {fault}")
            print(f"  FAILED {self.failed[-1]}", flush=True)

    def reference(self, name: str) -> tuple[dict, float]:
        """The results of a run that nobody stops, and the seconds it takes."""
        if name not in self.wanted:
            with tempfile.TemporaryDirectory() as folder:
                begin, job = time.monotonic(), start(name, Path(folder))
                status = job.wait(PATIENCE)
                if status != 0:
                    told = job.read()[-2000:]
                    sys.exit(f"{name}: the reference ends in {status}\n{told}")
                seconds = time.monotonic() - begin
                self.wanted[name] = read_results(Path(folder)), seconds
        return self.wanted[name]


def finish(tally: Tally, kind: str, name: str, folder: Path, case: str) -> None:
    """Let a job run to its end and compare."""
    job = start(name, folder)
    status = job.wait(PATIENCE)
    fault = f"ends in {status}" if status != 0 else ""
    fault = fault or compare(read_results(folder), tally.reference(name)[0])
    tally.judge(kind, case, fault)


def campaign_kills(tally: Tally, name: str, cases: int) -> None:
    """`cases` kills, up to three in a row before a run may finish."""
    seconds, landed = tally.reference(name)[1], 0
    while landed < cases:
        with tempfile.TemporaryDirectory() as folder:
            moments = []
            for _ in range(tally.draw.randint(1, 3)):
                job = start(name, Path(folder))
                moments.append(tally.draw.uniform(0.02, 1.0) * seconds)
                if job.wait(moments[-1]) is None:
                    landed += 1
                    tally.count(f"kill {name}", kills=1)
                job.kill()
            told = ", ".join(f"{moment:.2f}" for moment in moments)
            finish(tally, f"kill {name}", name, Path(folder), f"killed at {told} s")


def campaign_full(tally: Tally, name: str, cases: int) -> None:
    """Files that cannot grow beyond a random size."""
    tally.reference(name)
    for _ in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            limit = int(10 ** tally.draw.uniform(1.5, 6))
            job = Forked(name, Path(folder), limit)
            status, said = job.wait(PATIENCE), job.read()
            case = f"files of at most {limit} bytes"
            clear = "File too large: '" in said and folder in said
            if status == 28 and not clear:
                tally.judge("disk full", f"{name}, {case}", f"says {said!r}")
                continue
            tally.count("disk full", kills=int(status == 28))
            finish(tally, "disk full", name, Path(folder), f"{name}, {case}")


def campaign_tmpfs(tally: Tally, name: str, cases: int) -> None:
    """A disk of a random size, made larger afterwards."""
    tally.reference(name)
    for _ in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            size = 4096 * tally.draw.randint(2, 300)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
            if subprocess.run(mount, capture_output=True).returncode:
                print("  no tmpfs can be mounted here: left out")
                return
            try:
                job = Forked(name, Path(folder))
                status, said = job.wait(PATIENCE), job.read()
                case = f"{name}, a disk of {size} bytes"
                clear = "No space left on device: '" in said and folder in said
                left = [p.name for p in Path(folder).rglob(".tmp-*")]
                if status == 28 and (not clear or left):
                    tally.judge("tmpfs full", case, f"says {said!r}, leaves {left}")
                    continue
                tally.count("tmpfs full", kills=int(status == 28))
                more = ["mount", "-o", "remount,size=200m", folder]
                subprocess.run(more, check=True)
                finish(tally, "tmpfs full", name, Path(folder), case)
            finally:
                subprocess.run(["umount", folder], check=True)


def campaign_twice(tally: Tally, name: str, cases: int) -> None:
    """Two at once in one folder, the second somewhat later."""
    wanted, seconds = tally.reference(name)
    for _ in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            later = tally.draw.uniform(0, 0.7) * seconds
            first = start(name, Path(folder))
            time.sleep(later)
            second = start(name, Path(folder))
            ends = [first.wait(PATIENCE), second.wait(PATIENCE)]
            fault = f"end in {ends}" if ends != [0, 0] else ""
            fault = fault or compare(read_results(Path(folder)), wanted)
            tally.judge(f"twice {name}", f"the second after {later:.2f} s", fault)


# -- bad inputs ------------------------------------------------------------------------


def list_inputs() -> dict[str, Callable[[], object]]:
    """What must be refused, by name; each acts in the working directory."""
    import test_refusals
    import test_settings

    found = {name: act for name, (act, _) in test_refusals.CASES.items()}
    for values, _ in test_settings.WRONG:
        found[f"settings {values}"] = lambda values=values: settings.check(**values)
    found |= {f"a checkpoint, {n}": lambda n=n: damage(n) for n in DAMAGE}
    found |= {
        f"run {name!r}": lambda name=name: paths_of(name)
        for name in ("", "..", "a/../b", "/etc", "a//b", "a/.b", "a b", "é/../x")
    }
    found |= {
        f"data set {name!r}": lambda name=name: data.load(name, "train", root=".")
        for name in ("", ".", "..", "a/b", "../x", "/etc", "cifar01", "\0", "a\\b")
    }
    return found


def paths_of(name: str) -> None:
    from lib import stages

    paths.write_text(stages.run_folder(name) / "x", "")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "text": lambda raw: b"no weights",
    "half": lambda raw: raw[: len(raw) // 2],
    "no end": lambda raw: raw[:-30],
    "zeros": lambda raw: raw[:2000] + bytes(500) + raw[2500:],
    **{
        f"bit {place}": lambda raw, place=place: (
            raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :]
        )
        for place in range(1200, 9000, 400)
    },
}


def damage(name: str) -> None:
    """A checkpoint that is damaged, and taken up."""
    file = Path("kept", "run.pt")
    net = torch.nn.Linear(40, 50)
    checkpoint.save(file, {"of": 1}, model=net.state_dict(), rows=[])
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    checkpoint.take_up(file, {"of": 1}, ("model",))


def campaign_inputs(tally: Tally) -> None:
    for name, act in list_inputs().items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.environ["PRUNING_RUNS"] = str(Path(folder, "runs"))
            fault = "was taken"
            try:
                act()
            except (ValueError, FileNotFoundError) as error:
                fault = f"says {str(error)!r}" if "\n" in str(error) else ""
            except Exception:
                fault = traceback.format_exc().splitlines()[-1]
            left = [str(p) for p in Path().rglob("*") if p.parts[0] != "kept"]
            fault = fault or (f"leaves {left}" if left else "")
            tally.judge("inputs", name, fault)


SINGLE_RUNS = [
    {"sed": 3}, {"seeds": [0]}, {"baseline_epoch": 1}, {"baseline_lr": "1e-3"},
    {"net": "resnet9"}, {"dataset": ".."}, {"threads": 0}, {"run": "../x"},
]  # fmt: skip


def campaign_papermill_inputs(tally: Tally, cases: int) -> None:
    for changes in SINGLE_RUNS[:cases]:
        with tempfile.TemporaryDirectory() as folder:
            COMMANDS["wrong"] = lambda place, c=changes: call_papermill(place, **c)
            job = Spawned("wrong", Path(folder))
            status, last = job.wait(PATIENCE), job.read().strip().splitlines()[-1]
            left = [p for p in Path(folder, "runs").rglob("*") if p.is_file()]
            fault = (
                "" if status and last.startswith("ValueError: ") else f"says {last!r}"
            )
            fault = fault or (f"leaves {left}" if left else "")
            tally.judge("papermill inputs", str(changes), fault)


# -- all of them -----------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=100, help="over the four fast kinds"
    )
    parser.add_argument(
        "--slow", type=int, default=6, help="of papermill, snakemake and make each"
    )
    parser.add_argument("--full", type=int, default=20)
    parser.add_argument("--twice", type=int, default=5, help="per fast kind")
    parser.add_argument("--inputs", type=int, default=8, help="of papermill; 0: none")
    parser.add_argument("--only", nargs="*", default=[*FAST], help="fast kinds to run")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    Forked.context.set_forkserver_preload(["campaign"])
    tally = Tally(random.Random(asked.seed))
    begin = time.monotonic()
    for name in asked.only:
        campaign_kills(tally, name, -(-asked.kills // len(FAST)))
        campaign_full(tally, name, -(-asked.full // len(FAST)))
        campaign_tmpfs(tally, name, -(-asked.full // len(FAST)))
        campaign_twice(tally, name, asked.twice)
        told = {kind: dict(counts) for kind, counts in tally.table.items()}
        print(f"{name}: after {time.monotonic() - begin:.0f} s {told}", flush=True)
    if asked.inputs:
        campaign_inputs(tally)
        campaign_papermill_inputs(tally, asked.inputs)
    for name in ("papermill", "snakemake", "make") if asked.slow else ():
        campaign_kills(tally, name, asked.slow)
        counts = dict(tally.table[f"kill {name}"])
        print(f"{name}: after {time.monotonic() - begin:.0f} s {counts}", flush=True)
    print(
        f"\n{'kind':18} {'cases':>6} {'killed or failed on the way':>28} {'wrong':>6}"
    )
    for kind, counts in tally.table.items():
        print(
            f"{kind:18} {counts['cases']:6} {counts['kills']:28} {counts['failed']:6}"
        )
    print(f"{time.monotonic() - begin:.0f} s, seed {asked.seed}")
    return bool(tally.failed)


if __name__ == "__main__":
    sys.exit(main())
