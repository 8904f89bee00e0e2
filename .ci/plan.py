"""The runs of a profile, checked for what only a whole plan can show.

`lib.settings` checks every value; here it is the file (its encoding, keys that stand
twice), the size of the grid, and the folders that the runs would write.
"""

import math
import re
from collections import defaultdict

import yaml

from lib import paths, settings

MOST_RUNS = 20_000  # planned in seconds; Snakemake's memory grows with them
MOST_NEEDS = 200_000  # files that runs wait for, over all runs
FOLDER = re.compile(r"[\w+][\w.+ -]*", re.ASCII)  # what every system and tool takes


class OnceLoader(yaml.SafeLoader):
    """YAML where a key counts once: of two, one would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{name!r} stands in lines {seen[name]} and {line}")
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_runs(profile, threads=None):
    """The runs of `notebooks/params/PROFILE.yaml`; ValueError in one line."""
    path = paths.NOTEBOOKS / "params" / f"{profile}.yaml"
    if path.is_file():
        check_file(path)
    runs = settings.read_profile(profile, threads=threads)
    check_folders(profile, runs)
    return runs


def check_file(path):
    """UTF-8, each key once, and a grid that can be planned; else ValueError."""
    try:
        content = yaml.load(path.read_bytes().decode("utf-8"), OnceLoader)
        runs = sum(map(count_runs, (content or {}).values()))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except (yaml.YAMLError, AttributeError, TypeError):
        return  # settings says what is wrong with it
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}; keep one of them") from None
    if runs > MOST_RUNS:
        raise ValueError(
            f"{path.name}: {runs:,} runs, at most {MOST_RUNS:,} are planned at once; "
            "split it into several profiles"
        )


def count_runs(changes):
    """How many runs one notebook's part of a profile asks for."""
    grids = [(part or {}).items() for part in settings.list_parts(changes)]
    sizes = [[len(v) for n, v in grid if settings.is_varied(n, v)] for grid in grids]
    return sum(map(math.prod, sizes))


def check_folders(profile, runs):
    """Each run has a folder of its own, inside the folder of the profile."""
    taken = {}
    for run in runs:
        for part in run.name.split("/", 2):
            if not FOLDER.fullmatch(part) or len(part) > 200:
                raise ValueError(
                    f"{profile}: {run.notebook} with {run.varied} would write the "
                    f"folder {part!r}; names of folders are at most 200 of A-Z, a-z, "
                    "0-9, '_', '.', '+', '-' and space: vary other values"
                )
        other = taken.setdefault(run.name.lower(), run)
        if other is not run:
            raise ValueError(
                f"{profile}: {run.notebook} with {other.varied} and with {run.varied} "
                f"would both write the folder {run.name}; keep one of them"
            )


class Needs:
    """Which runs a run waits for: those of `needs` that vary with the same values."""

    def __init__(self, runs, needs):
        self.runs, self.needs = runs, needs
        self.grids = defaultdict(dict)  # notebook -> {names that vary: runs}
        self.groups = {}  # (notebook, names, some of them) -> {values of these: runs}
        for run in runs:
            grid = self.grids[run.notebook].setdefault(tuple(run.varied), [])
            grid.append(run)

    def of(self, run):
        """The runs before `run`, in the order of the profile."""
        found = []
        for notebook in self.needs.get(run.notebook, []):
            for names in self.grids.get(notebook, ()):
                shared = tuple(name for name in names if name in run.varied)
                key = tuple(run.varied[name] for name in shared)
                found += self.group(notebook, names, shared).get(key, [])
        return found

    def group(self, *which):
        if which not in self.groups:
            notebook, names, shared = which
            groups = self.groups[which] = defaultdict(list)
            for run in self.grids[notebook][names]:
                groups[tuple(run.varied[name] for name in shared)].append(run)
        return self.groups[which]

    def check(self):
        """ValueError where runs wait for more files than can be planned."""
        total = sum(len(self.of(run)) for run in self.runs)
        if total > MOST_NEEDS:
            raise ValueError(
                f"its runs wait for {total:,} files, at most {MOST_NEEDS:,} are "
                "planned at once; let notebooks that build on one another vary "
                "the same parameters, or split the profile"
            )
