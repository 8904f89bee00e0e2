"""What each notebook offers to a student, as a table.

    .venv/bin/python tests/measure_course.py [NOTEBOOK...]

prose      share of the code cells behind the configuration (`settings.check`) that a
           markdown cell stands before; solutions and checks do not count
drawings   images of figures/drawings; figures: images that cells have drawn
external, internal   links to addresses, and to files of the repository
min        minutes to read: 130 words a minute (technical text in a second language),
           20 seconds a code cell, 30 seconds a drawing or figure. Answers and solutions
           are not read, exercises are, and are not solved; `solve` is the minutes that
           these ask for.
"""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS_A_MINUTE, CELL, FIGURE = 130, 20, 30  # the last two in seconds


def _load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


course = _load(ROOT / ".ci" / "course.py")


def read_text(book):
    """The markdown that a student reads: no answers, links by their words alone."""
    student = course.make_student(book)
    text = "\n".join(c.source for c in student.cells if c.cell_type == "markdown")
    return re.sub(r"\]\([^)]*\)", "]", text)


def list_taught(book):
    """(index, cell) of the code cells behind the configuration, without exercises."""
    code = [(i, c) for i, c in enumerate(book.cells) if c.cell_type == "code"]
    begin = next((i for i, c in code if "settings.check(" in c.source), -1)
    return [(i, c) for i, c in code if i > begin and not course.tag_of(c)]


def list_bare(book):
    """First lines of the cells of `list_taught` that no markdown stands before."""
    bare = [
        c for i, c in list_taught(book) if book.cells[i - 1].cell_type != "markdown"
    ]
    return [cell.source.splitlines()[0] for cell in bare]


def count_figures(book):
    outputs = [o for c in book.cells for o in c.get("outputs", [])]
    return sum(any(mime.startswith("image/") for mime in o.get("data", {}))
               for o in outputs)  # fmt: skip


def measure(path):
    """A row of the table: numbers by name."""
    book = course.read(path)
    links = course.list_links(book)
    exercises = course.find_exercises(book, path.stem)
    drawings = [link for link in links if "figures/drawings/" in link]
    external = [link for link in links if re.match("https?:", link)]
    taught = list_taught(book)
    words = len(re.findall(r"\w[\w'-]*", read_text(book)))
    cells = sum(c.cell_type == "code" and not course.tag_of(c)
                and "bootstrap" not in c.metadata.get("tags", [])
                for c in book.cells)  # fmt: skip
    figures = count_figures(book)
    return {
        "prose": 1 - len(list_bare(book)) / max(len(taught), 1),
        "drawings": len(drawings), "figures": figures,
        "external": len(external), "internal": len(links) - len(external),
        "exercises": len(exercises),
        "solutions": sum(bool(e.solutions or e.answers) for e in exercises),
        "checks": sum(bool(e.checks) for e in exercises),
        "quiz": sum(course.tag_of(c) == "quiz" for c in book.cells),
        "words": words, "cells": cells, "kB": path.stat().st_size // 1000,
        "seconds": words * 60 / WORDS_A_MINUTE + cells * CELL
        + (figures + len(drawings)) * FIGURE,
        "solve": sum(e.minutes for e in exercises),
    }  # fmt: skip


def main():
    paths = [Path(name) for name in sys.argv[1:]]
    rows = {p.stem: measure(p) for p in
            paths or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}  # fmt: skip
    names = [name for name in next(iter(rows.values())) if name != "seconds"]
    print("| notebook | " + " | ".join([*names, "min"]) + " |")
    print("| --- |" + " --- |" * (len(names) + 1))
    for stem, row in rows.items():
        shown = [f"{row[n]:.0%}" if n == "prose" else str(row[n]) for n in names]
        print(f"| {stem} | " + " | ".join(shown) + f" | {row['seconds'] / 60:.0f} |")


if __name__ == "__main__":
    main()
