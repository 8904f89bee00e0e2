"""Student and teacher versions of the notebooks, and the points of a student's work.

    .venv/bin/python .ci/course.py [--out FOLDER]       write both versions
    .venv/bin/python .ci/course.py --grade NOTEBOOK...  run the checks, print points

A third version, otter/, is what `otter assign` reads (.ci/otter). The committed
notebooks are the one source. An exercise is a run of tagged cells:

    exercise   markdown  **Exercise 1** (2 points, easy, 10 minutes). Text.
    solution   code      what a student writes stands between the two lines
                         `# BEGIN SOLUTION` and `# END SOLUTION`
    check      code      assertions that the student runs, too
    answer     markdown  where words are asked for, in place of the two or beside them

and a question of the quiz is a markdown cell tagged `quiz` with its answer in
`<details>`. Anything else is refused in one line. The student version has `...` for
each solution and a place for each answer. Files that the notebooks link to are copied
beside them, so that a folder can be handed out as it is.
"""

import argparse
import ast
import copy
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KINDS = {"exercise": "markdown", "solution": "code", "check": "code",
         "answer": "markdown", "quiz": "markdown"}  # fmt: skip
HEAD = re.compile(
    r"\*\*Exercise (?P<number>\d+)\*\* \((?P<points>\d+) points?, "
    r"(?P<level>easy|medium|hard|harder), (?P<minutes>\d+) minutes?\)\."
)
BLOCK = re.compile(
    r"^([ \t]*)# BEGIN SOLUTION[ \t]*\n(.*?)^[ \t]*# END SOLUTION[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
DETAILS = re.compile(r"\s*<details>.*?</details>", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]+\$", re.DOTALL)  # no links
LINK = re.compile(r"""(?:\]\(<?|\bsrc=")([^\s)>"]+)""")
ASSERTION = re.compile(r"^\s*(assert\b|torch\.testing\.)", re.MULTILINE)
RECORD = ".written.json"  # in each folder written: what stands there, by its SHA-256


@dataclasses.dataclass
class Exercise:
    """One exercise: what its heading says, and its cells by index."""

    number: int
    points: int
    level: str
    minutes: int
    solutions: list[int] = dataclasses.field(default_factory=list)
    checks: list[int] = dataclasses.field(default_factory=list)
    answers: list[int] = dataclasses.field(default_factory=list)


def read(path):
    """A notebook; ValueError in one line where it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises what JSON and its schema raise
        raise ValueError(f"{path.name}: no notebook ({type(error).__name__})") from None


def tag_of(cell):
    """The tag of `KINDS` that a cell has, or None."""
    return next((t for t in cell.metadata.get("tags", []) if t in KINDS), None)


def find_exercises(book, name):
    """The exercises of a notebook, in order.

    Raises:
        ValueError: a cell is not what its tag says; names notebook and cell.
    """
    exercises = []
    for index, cell in enumerate(book.cells):
        tag = tag_of(cell)
        if tag is None:
            continue
        where = f"{name}, cell {index}"
        if cell.cell_type != KINDS[tag]:
            raise ValueError(f"{where}: `{tag}` is the tag of a {KINDS[tag]} cell")
        if tag == "exercise":
            exercises.append(_read_head(cell.source, len(exercises) + 1, where))
        elif tag == "quiz":
            if len(DETAILS.findall(cell.source)) != 1:
                raise ValueError(f"{where}: a question has one <details> answer")
        elif not exercises:
            raise ValueError(f"{where}: a {tag} without an exercise before it")
        else:
            _add_cell(exercises[-1], tag, index, cell.source, where)
    for exercise in exercises:
        where = f"{name}, exercise {exercise.number}"
        if bool(exercise.solutions) != bool(exercise.checks):
            raise ValueError(f"{where}: a solution needs a check behind it")
        if not exercise.checks and not exercise.answers:
            raise ValueError(f"{where}: neither solution and check nor an answer")
    return exercises


def _read_head(source, number, where):
    head = HEAD.match(source)
    if not head:
        raise ValueError(f"{where}: begins not with `**Exercise {number}** (2 points, "
                         "easy, 10 minutes).`")  # fmt: skip
    if int(head["number"]) != number or int(head["points"]) < 1:
        raise ValueError(f"{where}: expected exercise {number}, of one point or more")
    return Exercise(number, int(head["points"]), head["level"], int(head["minutes"]))


def _add_cell(exercise, tag, index, source, where):
    if tag == "solution":
        markers = len(re.findall("# (?:BEGIN|END) SOLUTION", source))
        if not markers or markers != 2 * len(BLOCK.findall(source)):
            raise ValueError(f"{where}: a solution stands between `# BEGIN SOLUTION` "
                             "and `# END SOLUTION`")  # fmt: skip
        try:
            ast.parse(blank(source))
        except SyntaxError as error:
            raise ValueError(f"{where}: no Python without the solution ({error.msg})"
                             ) from None  # fmt: skip
    if tag == "check" and not exercise.solutions:
        raise ValueError(f"{where}: a check without a solution before it")
    getattr(exercise, f"{tag}s").append(index)


def blank(source):
    """A solution as the student gets it: `...` for each block."""
    return BLOCK.sub(r"\1...", source)


def make_student(book):
    """The notebook without solutions, answers, and the outputs that give them away."""
    book = copy.deepcopy(book)
    for cell in book.cells:
        tag = tag_of(cell)
        if tag in ("solution", "check"):
            cell.outputs, cell.execution_count = [], None
        if tag == "solution":
            cell.source = blank(cell.source)
            cell.metadata.pop("jupyter", None)
            cell.metadata.tags = [t for t in cell.metadata.tags if t != "hide-input"]
        elif tag == "answer":
            cell.source = "*Your answer:*"
        elif tag == "quiz":
            cell.source = DETAILS.sub("", cell.source)
    return book


def make_teacher(book, exercises):
    """The whole notebook, with a table of points and minutes behind its heading."""
    book = copy.deepcopy(book)
    if exercises:
        rows = [(e.number, e.points, e.level, e.minutes,
                 "its check" if e.checks else "a reader")
                for e in exercises]  # fmt: skip
        total = ("all", sum(e.points for e in exercises), "",
                 sum(e.minutes for e in exercises), "")  # fmt: skip
        head = ("exercise", "points", "level", "minutes", "judged by")
        lines = [head, ["---"] * len(head), *rows, total]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        book.cells.insert(1, nbformat.v4.new_markdown_cell(table, id="points"))
    return book


def make_otter(book, exercises):
    """The notebook as `otter assign` reads it, which makes both versions by itself.

    An exercise that a reader judges is a manual question. Of a check the student gets
    what `make_public` leaves; the whole of it is hidden, and gives all points or none.
    """
    cells = [_raw("ASSIGNMENT CONFIG", "export_cell: false")]
    ends = {max([*e.solutions, *e.checks, *e.answers]): e for e in exercises}
    heads = iter(exercises)
    for index, cell in enumerate(book.cells):
        cell, tag = copy.deepcopy(cell), tag_of(cell)
        if tag == "exercise":
            question = next(heads)
            kind = "all_or_nothing" if question.checks else "manual"
            lines = [f"name: exercise_{question.number}",
                     f"points: {question.points}", f"{kind}: true"]  # fmt: skip
            cells.append(_raw("BEGIN QUESTION", *lines))
        if tag == "check":
            texts = [_silence(make_public(cell.source)),
                     "# HIDDEN\n" + _silence(ast.parse(cell.source))]  # fmt: skip
            made = [nbformat.v4.new_code_cell(text) for text in texts]
            cells += [_raw("BEGIN TESTS"), *made, _raw("END TESTS")]
        elif tag == "answer" and question.checks:  # of two kinds of question the other
            cells.append(nbformat.v4.new_markdown_cell("*Your answer:*"))
        elif tag in ("solution", "answer"):
            cells += [_raw("BEGIN SOLUTION"), cell, _raw("END SOLUTION")]
        else:
            cell.source = DETAILS.sub("", cell.source) if tag else cell.source
            cells.append(cell)
        if index in ends:
            cells.append(_raw("END QUESTION"))
    return nbformat.v4.new_notebook(metadata=book.metadata, cells=cells)


def make_public(source):
    """A check up to its first assertion; of a loop over cases the first case alone."""
    tree = ast.parse(source)
    for index, node in enumerate(tree.body):
        if ASSERTION.search(ast.unparse(node)):
            del tree.body[index + 1 :]
            if isinstance(node, ast.For):
                node.body.append(ast.Break())
            break
    return ast.fix_missing_locations(tree)


def _silence(tree):
    """Code that prints nothing: otter compares what a test prints."""
    tree.body = [ast.With([ast.withitem(ast.parse(
        "__import__('contextlib').redirect_stdout(__import__('io').StringIO())",
        mode="eval").body)], tree.body)]  # fmt: skip
    return ast.unparse(ast.fix_missing_locations(tree))


def _raw(head, *lines):
    return nbformat.v4.new_raw_cell("\n".join([f"# {head}", *lines]))


def list_links(book):
    """Paths and addresses that the markdown links to or shows, once each."""
    text = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    return sorted(set(LINK.findall(CODE.sub("", text))))


def list_files(book):
    """The paths among its links, without what follows `#`."""
    links = [link.split("#")[0] for link in list_links(book) if ":" not in link]
    return sorted(set(filter(None, links)))


def write_course(out, sources):
    """Write `out`/student, /teacher and /otter from the notebooks of a folder.

    Raises:
        ValueError: a notebook is malformed, or a file in `out` was changed by hand.
    """
    files = {}
    for path in sorted(sources.glob("[0-9]*.ipynb")):
        book = read(path)
        exercises = find_exercises(book, path.stem)
        versions = {"student": make_student(book),
                    "teacher": make_teacher(book, exercises),
                    "otter": make_otter(book, exercises)}  # fmt: skip
        for version, made in versions.items():
            text = nbformat.writes(made) + "\n"
            files[f"{version}/{sources.name}/{path.name}"] = text.encode()
            for link in list_files(book):
                _add_linked(files, version, sources, link, path.stem)
    _write_files(out, files)


def _add_linked(files, version, sources, link, name):
    root = sources.parent
    target = Path(os.path.normpath(sources / link))
    if not target.exists() or not target.is_relative_to(root):
        raise ValueError(f"{name}: links to {link}, which is not there")
    found = target.rglob("*") if target.is_dir() else [target]
    for file in found:
        hidden = file.suffix == ".ipynb" or "__pycache__" in file.parts
        if file.is_file() and not hidden:
            key = f"{version}/{file.relative_to(root).as_posix()}"
            files[key] = file.read_bytes()


def _write_files(out, files):
    record = out / RECORD
    known = json.loads(record.read_text()) if record.exists() else {}
    for name in {*known, *files}:  # first, so that nothing is half-written
        file = out / name
        if file.exists() and _digest(file.read_bytes()) not in (
            known.get(name), _digest(files.get(name, b""))):  # fmt: skip
            raise ValueError(f"{file} was changed by hand: move it, or give "
                             "another folder (make course OUT=FOLDER)")  # fmt: skip
    for name in known.keys() - files:
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({n: _digest(c) for n, c in files.items()}, indent=1))


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def untouched(book, exercise):
    """Code that fails where an exercise that nobody has solved passes its check.

    For a kernel in which the solved notebook has run: what the solution has defined is
    forgotten first.
    """
    solutions = [book.cells[i].source for i in exercise.solutions]
    names = {name for source in solutions for name in _defined(source)}
    cells = [*map(blank, solutions), *(book.cells[i].source for i in exercise.checks)]
    return f"""for _name in {sorted(names)!r}:
    globals().pop(_name, None)
try:
    for _cell in {cells!r}:
        exec(_cell, globals())
except Exception:
    pass
else:
    raise AssertionError("exercise {exercise.number} passes its check unsolved")
"""


def _defined(source):
    """Names that a cell binds in the notebook; not those inside its functions."""
    nodes = list(ast.parse(source).body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        nodes.extend(ast.iter_child_nodes(node))


def run(book, folder, timeout=600):
    """The notebook executed in `folder`; cells that fail do not stop the others."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    client = NotebookClient(book, timeout=timeout, allow_errors=True,
                            interrupt_on_timeout=True, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})  # fmt: skip
    try:
        return client.execute()
    except DeadKernelError:
        raise ValueError("the kernel died; every exercise behind it is lost") from None


def grade(book, source, name, folder):
    """(exercise, points or None, what was wrong) of each exercise of a student's book.

    Points are None where a reader judges. Checks are those of `source`, whatever the
    student has made of them; cells are found by their ids.
    """
    exercises = find_exercises(source, name)
    book = copy.deepcopy(book)
    places = {cell.get("id"): cell for cell in book.cells}
    for exercise in exercises:
        for index in exercise.checks:
            check = source.cells[index]
            if check.id in places:
                places[check.id].cell_type = "code"
                places[check.id].source = check.source
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    run(book, folder)
    marks = []
    for exercise in exercises:
        if not exercise.checks:
            marks.append((exercise, None, ""))
            continue
        faults = [_fault(places.get(source.cells[i].id)) for i in exercise.checks]
        fault = next(filter(None, faults), "")
        marks.append((exercise, 0 if fault else exercise.points, fault))
    return marks


def _fault(cell):
    """What keeps a check from having passed, in one line; empty where it has."""
    if cell is None:
        return "its check is not in the notebook"
    errors = [o for o in cell.outputs if o.output_type == "error"]
    if errors:
        return f"{errors[0].ename}: {errors[0].evalue}".splitlines()[0]
    return "" if cell.execution_count else "its check did not run"


def print_marks(name, marks):
    print(name)
    for exercise, points, fault in marks:
        head = f"  exercise {exercise.number}"
        if points is None:
            print(f"{head}: {exercise.points} points, judged by a reader")
        else:
            line = f"{head}: {points} of {exercise.points}  {fault}"
            print(line.rstrip())
    judged = [(e, points) for e, points, _ in marks if points is not None]
    rest = sum(e.points for e, points, _ in marks if points is None)
    earned, full = sum(p for _, p in judged), sum(e.points for e, _ in judged)
    print(f"  {earned} of {full} points" + (f", {rest} more to judge" * bool(rest)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = Path(os.environ.get("PRUNING_RUNS") or ROOT / "data/runs")
    parser.add_argument("--out", type=Path, default=runs / "course")
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS)
    parser.add_argument("--grade", type=Path, nargs="+", metavar="NOTEBOOK")
    arguments = parser.parse_args()
    try:
        if not arguments.grade:
            write_course(arguments.out.resolve(), arguments.notebooks.resolve())
            print(f"{arguments.out}: student/, teacher/ and otter/ are written")
        for path in arguments.grade or []:
            source = read(arguments.notebooks / path.name)
            marks = grade(read(path), source, path.stem, path.resolve().parent)
            print_marks(path.stem, marks)
    except (ValueError, OSError) as error:
        sys.exit(f"course: {error}")


if __name__ == "__main__":
    main()
