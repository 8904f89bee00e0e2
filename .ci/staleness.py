"""What can change a result: a hash per notebook, of its code and the rooms it reaches.

    .venv/bin/python .ci/staleness.py

prints them. A run is stale when the hash of its notebook has changed; docstrings,
comments, prose and formatting do not count, and neither do rooms of `lib` that the
notebook's imports do not reach. Standard library only.
"""

import ast
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def hash_notebooks(root=ROOT):
    """{notebook: hash of its code cells and of every room of lib that they reach}."""
    rooms = read_rooms(root / "lib")
    books = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    return {path.stem: hash_notebook(path, rooms) for path in books}


def hash_notebook(path, rooms):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"
               and "bootstrap" not in c["metadata"].get("tags", ())]  # fmt: skip
    reached = reach(set().union(*map(list_rooms, sources)), rooms)
    parts = [describe(source) for source in sources]
    parts += [part for room in sorted(reached) for part in rooms[room][0]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read_rooms(lib):
    """{room: (descriptions of its modules, rooms they import)}; a room is `lib/NAME`.

    A room counts as a whole: what one of its modules loads late is then in it.
    """
    rooms = {}
    for path in sorted(lib.rglob("*.py")):
        place = path.relative_to(lib)
        parts, needs = rooms.setdefault(place.parts[0].removesuffix(".py"), ([], set()))
        source = path.read_text(encoding="utf-8")
        parts.append(f"{place.as_posix()} {describe(source)}")
        needs |= list_rooms(source)
    return rooms


def reach(wanted, rooms):
    """The rooms that `wanted` ones import, directly or not, and themselves."""
    reached, wanted = set(), {"__init__", *wanted}
    while wanted:
        room = wanted.pop()
        if room in rooms and room not in reached:
            reached.add(room)
            wanted |= rooms[room][1]
    return reached


def list_rooms(source):
    """Every NAME of `from lib import NAME`, `from lib.NAME...`, `import lib.NAME`."""
    found = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None), *(a.name for a in node.names)]
            found |= {n.split(".")[1] for n in names if n and n.startswith("lib.")}
    return found


def describe(source):
    """The code of a file or cell as its syntax tree, without docstrings."""
    tree = parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def parse(source):
    """Lines that only IPython understands count as text."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module([ast.Expr(ast.Constant(repr(source.split())))], [])


if __name__ == "__main__":
    for name, code in hash_notebooks().items():
        print(code, name)
