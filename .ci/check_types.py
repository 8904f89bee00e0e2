"""Type check: no error in the strict rooms, and elsewhere none more than before.

    .venv/bin/python .ci/check_types.py

Strict are the rooms that pyproject.toml names under `tool.mypy.overrides`; the number
allowed elsewhere is in .ci/types-known. It may only fall. Standard library only.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / ".ci" / "types-known"


def find_errors(output):
    return [line for line in output.splitlines() if re.match(r"\S+:\d+: error:", line)]


def list_strict(project):
    """The folders of the strict rooms, as mypy writes them: `lib/graph/`."""
    (strict,) = project["tool"]["mypy"]["overrides"]
    return tuple(name.removesuffix("*").replace(".", "/") for name in strict["module"])


def judge(errors, strict, allowed):
    """What is wrong with `errors`, in a few lines; nothing if they are allowed."""
    refused = [line for line in errors if line.startswith(strict)]
    others = len(errors) - len(refused)
    if others > allowed:
        refused.append(
            f"types: {others} errors outside the strict rooms, {allowed} are known; "
            "`.venv/bin/mypy` shows them"
        )
    elif others < allowed:
        refused.append(f"types: only {others} errors left; write {others} to {KNOWN}")
    return refused


def main():
    command = [sys.executable, "-m", "mypy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"types: mypy stopped: {(done.stdout + done.stderr).strip()}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    allowed = int(KNOWN.read_text(encoding="utf-8"))
    refused = judge(find_errors(done.stdout), list_strict(project), allowed)
    sys.exit("\n".join(refused) or 0)


if __name__ == "__main__":
    main()
