"""Draw every notebooks/drawings/NAME.py into figures/drawings/NAME.svg.

    .venv/bin/python .ci/drawings.py [NAME ...]

A drawing is a module with `draw() -> matplotlib.figure.Figure`. The same code gives the
same bytes: letters are outlines, ids have a fixed salt, and no date is written.
"""

import io
import runpy
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parent.parent
CODE = ROOT / "notebooks" / "drawings"
FIGURES = ROOT / "figures" / "drawings"
SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "drawings", "figure.dpi": 72}


def list_drawings() -> list[Path]:
    """The modules that draw, all but the helpers that they share."""
    return sorted(path for path in CODE.glob("*.py") if path.stem != "style")


def render(path: Path) -> str:
    """The SVG that a module's `draw` gives, whatever style is set around the call."""
    sys.path.insert(0, str(CODE))
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(SETTINGS)
            figure = runpy.run_path(str(path))["draw"]()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(
                ("Date", "Creator", "Format", "Type")))  # fmt: skip
    finally:
        sys.path.remove(str(CODE))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    wanted = sys.argv[1:]
    unknown = set(wanted) - {path.stem for path in list_drawings()}
    if unknown:
        raise SystemExit(f"drawings: no notebooks/drawings/{min(unknown)}.py")
    for path in list_drawings():
        if not wanted or path.stem in wanted:
            (FIGURES / f"{path.stem}.svg").write_text(render(path), encoding="utf-8")
            print(f"figures/drawings/{path.stem}.svg")


if __name__ == "__main__":
    main()
