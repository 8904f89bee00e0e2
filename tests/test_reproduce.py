"""What `.ci/reproduce.py` hands on to Snakemake, read by Snakemake's own parser."""

import importlib.util
import sys

import pytest
from snakemake.cli import parse_args, parse_config

from lib import paths


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The script as a module, with its runs elsewhere."""
    monkeypatch.setenv("PRUNING_RUNS", str(tmp_path))
    file = paths.ROOT / ".ci" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """Takes Snakemake's place and keeps its command."""

    commands: list = []  # noqa: RUF012

    def __init__(self, command, **options):
        self.commands.append(command)
        self.stdout = ["nothing was run\n"]

    def wait(self) -> int:
        return 0


def ask(reproduce, monkeypatch, *arguments):
    """Snakemake's reading of the command that a dry run would start."""
    Engine.commands = []
    monkeypatch.setattr(reproduce.subprocess, "Popen", Engine)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert not ended.value.code, ended.value.code
    (command,) = Engine.commands
    assert command[1:3] == ["-m", "snakemake"]
    return parse_args(command[3:])[1]


PROFILE = {"profile": "cifar10_cpu"}
CASES = [
    ([], {}),
    (["--config", "threads=1"], {"threads": 1}),
    (["--config", "threads=1", "deep=x"], {"threads": 1, "deep": "x"}),
    (["--config", "threads=1", "--config", "deep=x"], {"threads": 1, "deep": "x"}),
    (["--config=threads=1"], {"threads": 1}),
    (["-C", "threads=1"], {"threads": 1}),
    (["--config", "threads=1", "--forceall"], {"threads": 1}),
    (["--config", "profile=quick"], {}),
    (["--config"], {}),
]


@pytest.mark.parametrize(("more", "config"), CASES)
def test_further_config_values_reach_snakemake(reproduce, monkeypatch, more, config):
    """Beside the profile, which they neither push out nor change."""
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n", *more, "--cores", "3")
    assert parse_config(read.config) == PROFILE | config
    assert read.cores == 3 and read.dryrun and not read.targets
    assert read.forceall == ("--forceall" in more)


def test_a_run_starts_with_the_same_arguments(reproduce, monkeypatch):
    found = []
    monkeypatch.setattr(reproduce, "run", lambda *given: found.append(given))
    line = ["cifar10_cpu", "--config", "threads=1", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line])
    with pytest.raises(SystemExit):
        reproduce.main()
    ((profile, arguments),) = found
    read = parse_args(["--cores", "1", *arguments])[1]
    assert profile == "cifar10_cpu"
    assert parse_config(read.config) == PROFILE | {"threads": 1}


@pytest.mark.parametrize("more, gpus", [([], 1), (["--resources", "gpu=2"], 2)])
def test_notebooks_take_turns_on_a_gpu(reproduce, monkeypatch, more, gpus):
    monkeypatch.setattr(reproduce, "GPU", "/dev/nvidia0")
    read = ask(reproduce, monkeypatch, "cifar10_cpu", "-n", *more)
    assert read.resources["gpu"].value == gpus
    monkeypatch.setattr(reproduce, "GPU", None)
    assert not ask(reproduce, monkeypatch, "cifar10_cpu", "-n").resources


def test_unknown_profiles_are_refused(reproduce, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "nonsense", "--config", "a=1"])
    with pytest.raises(SystemExit, match=r"no profile 'nonsense'; have .*quick"):
        reproduce.main()
