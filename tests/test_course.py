"""The versions of a notebook, the grader, and what every course notebook has."""

import copy
import json
import re
import subprocess
import sys

import measure_course
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import paths

course = measure_course.course
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
CONVERTED = [path for path in NOTEBOOKS if '"quiz"' in path.read_text(encoding="utf-8")]

SOLUTION = '''def double(x):
    """Twice `x`."""
    # BEGIN SOLUTION
    return 2 * x
    # END SOLUTION
'''
CHECK = """assert double(2) == 4, "twice two is four"
assert double(5) == 10, "twice five is ten"
print("Exercise 1: right")"""


def cell_of(kind, text, tag=None, **metadata):
    tags = [tag] if tag else []
    return kind(text, metadata={"tags": tags, **metadata})


def make_book():
    """Two exercises of code, one of words, one question, links of every kind."""
    return new_notebook(cells=[
        cell_of(new_markdown_cell, "# T\n[a](../lib/a.py#L3) [b](11_b.ipynb)"
                " ![c](../f.svg) [doi](https://doi.org/1) [up](#top) `a[0](no.py)`"),
        cell_of(new_code_cell, "start = 1"),
        cell_of(new_markdown_cell, 
                "**Exercise 1** (2 points, easy, 5 minutes). Double.",
                "exercise"),
        new_code_cell(SOLUTION, execution_count=2, metadata={
            "tags": ["solution", "hide-input"], "jupyter": {"source_hidden": True}}),
        cell_of(new_code_cell, CHECK, "check"),
        cell_of(new_markdown_cell, "**Exercise 2** (3 points, hard, 10 minutes). Sum.",
                "exercise"),
        cell_of(new_code_cell,
                "# BEGIN SOLUTION\ntotal = double(start) + 3\n# END SOLUTION",
                "solution"),
        cell_of(new_code_cell, 'assert total == 5, "one doubled and three"', "check"),
        cell_of(new_markdown_cell, "**Exercise 3** (1 point, easy, 2 minutes). Why?",
                "exercise"),
        cell_of(new_markdown_cell, "**Answer to exercise 3.** Therefore.", "answer"),
        cell_of(new_markdown_cell, "**Question 1.** Who?\n- a\n- b\n<details><summary>"
                "Answer</summary>\n\nb, as a is not.\n\n</details>", "quiz"),
    ])  # fmt: skip


@pytest.fixture
def book():
    return make_book()


@pytest.fixture
def sources(tmp_path, book):
    """A repository with two notebooks and what they link to."""
    folder = tmp_path / "notebooks"
    (tmp_path / "lib").mkdir()
    folder.mkdir()
    (tmp_path / "lib/a.py").write_text("a = 1\n")
    (tmp_path / "f.svg").write_text("<svg/>")
    nbformat.write(book, folder / "10_a.ipynb")
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# B")]), folder / "11_b.ipynb"
    )
    return folder


# ---- the two versions ----


def test_the_student_gets_neither_solutions_nor_answers(book):
    before = copy.deepcopy(book)
    student = course.make_student(book)
    assert book == before, "the source stays as it is"
    text = nbformat.writes(student)
    for secret in (
        "2 * x",
        "double(start)",
        "Therefore",
        "as a is not",
        "source_hidden",
    ):
        assert secret not in text
    assert student.cells[3].source.splitlines()[-1] == "    ..."
    assert student.cells[3].execution_count is None
    assert '"""Twice' in student.cells[3].source
    assert student.cells[4].source == CHECK and "- a\n- b" in student.cells[10].source
    assert student.cells[9].source == "*Your answer:*"
    assert [c.id for c in student.cells] == [c.id for c in book.cells]


def test_the_teacher_gets_a_table_of_points_and_minutes(book):
    teacher = course.make_teacher(book, course.find_exercises(book, "t"))
    table = teacher.cells[1].source.splitlines()
    assert table[2] == "| 1 | 2 | easy | 5 | its check |"
    assert table[4] == "| 3 | 1 | easy | 2 | a reader |"
    assert table[5] == "| all | 6 |  | 17 |  |"
    assert "2 * x" in nbformat.writes(teacher)


def test_every_link_resolves_beside_what_is_written(sources, tmp_path):
    out = tmp_path / "out"
    course.write_course(out, sources)
    for version in ("student", "teacher"):
        made = nbformat.read(out / version / "notebooks/10_a.ipynb", 4)
        links = course.list_files(made)
        assert links == ["../f.svg", "../lib/a.py", "11_b.ipynb"]
        for link in links:
            assert (out / version / "notebooks" / link).is_file()


def test_a_link_to_nothing_is_refused(sources, tmp_path):
    (tmp_path / "f.svg").unlink()
    with pytest.raises(
        ValueError, match=r"10_a: links to ../f.svg, which is not there"
    ):
        course.write_course(tmp_path / "out", sources)


def test_work_of_a_student_is_never_overwritten(sources, tmp_path):
    out = tmp_path / "out"
    course.write_course(out, sources)
    (sources / "11_b.ipynb").unlink()
    book = nbformat.read(sources / "10_a.ipynb", 4)
    book.cells[0].source = "# T"
    nbformat.write(book, sources / "10_a.ipynb")
    course.write_course(out, sources)  # follows the source, and forgets what is gone
    assert not (out / "student/notebooks/11_b.ipynb").exists()
    assert not (out / "student/f.svg").exists()
    mine = out / "student/notebooks/10_a.ipynb"
    mine.write_text(mine.read_text().replace("...", "return 7"))
    with pytest.raises(ValueError, match=r"10_a.ipynb was changed by hand"):
        course.write_course(out, sources)
    assert "return 7" in mine.read_text()


FAULTS = {
    "no points": (2, "**Exercise 1**. Double.", "cell 2: begins not with"),
    "wrong number": (5, "**Exercise 3** (3 points, hard, 9 minutes).", "exercise 2"),
    "no markers": (3, "def double(x): return 2 * x", "cell 3: a solution stands"),
    "one marker": (3, SOLUTION.replace("# END SOLUTION", ""), "cell 3: a solution"),
    "no Python": (3, "# BEGIN SOLUTION\ndef f(x):\n# END SOLUTION\n    return x",
                  "cell 3: no Python"),
    "no answer": (10, "**Question 1.** Who?", "cell 10: a question has one"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_cell_is_refused_in_one_line(book, fault):
    index, text, words = FAULTS[fault]
    book.cells[index].source = text
    with pytest.raises(ValueError, match=words) as error:
        course.find_exercises(book, "02_x")
    assert str(error.value).startswith("02_x, cell") and "\n" not in str(error.value)


GONE = {
    3: "cell 3: a check without a solution",
    4: "exercise 1: a solution needs a check",
    9: "exercise 3: neither solution and check nor an answer",
}


@pytest.mark.parametrize("index", GONE)
def test_a_missing_cell_is_refused(book, index):
    del book.cells[index]
    with pytest.raises(ValueError, match=GONE[index]):
        course.find_exercises(book, "02_x")


def test_a_tag_on_another_kind_of_cell_and_a_stray_check_are_refused(book):
    book.cells[1].metadata.tags = ["quiz"]
    with pytest.raises(ValueError, match="cell 1: `quiz` is the tag of a markdown"):
        course.find_exercises(book, "02_x")
    book.cells[1].metadata.tags = ["check"]
    with pytest.raises(ValueError, match="cell 1: a check without an exercise"):
        course.find_exercises(book, "02_x")


# ---- the grader, on kernels that run ----


def grade(book, source, folder):
    return [(p, fault) for _, p, fault in course.grade(book, source, "t", folder)]


def test_the_solution_earns_full_marks_and_the_untouched_book_none(book, tmp_path):
    assert grade(book, book, tmp_path) == [(2, ""), (3, ""), (None, "")]
    marks = grade(course.make_student(book), book, tmp_path)
    assert marks[0] == (0, "AssertionError: twice two is four")
    assert marks[1][0] == 0 and "'total' is not defined" in marks[1][1]


def test_a_hard_coded_answer_and_a_changed_check_earn_nothing(book, tmp_path, capsys):
    work = course.make_student(book)
    work.cells[3].source = "def double(x):\n    return 4"
    work.cells[4].source = 'print("Exercise 1: right")'
    work.cells[6].source = "total = 5"  # of an exercise that asks for this number alone
    work.cells.insert(0, new_code_cell("1 / 0"))  # stops nothing
    marks = course.grade(work, book, "t", tmp_path)
    assert [p for _, p, _ in marks] == [0, 3, None]
    course.print_marks("t", marks)
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "  exercise 1: 0 of 2  AssertionError: twice five is ten"
    assert said[-1] == "  3 of 5 points, 1 more to judge"


def test_a_check_that_was_deleted_earns_nothing(book, tmp_path):
    work = copy.deepcopy(book)
    del work.cells[7]
    assert grade(work, book, tmp_path)[1] == (0, "its check is not in the notebook")


def test_code_that_notices_a_check_which_passes_without_a_solution(book):
    solved = {"start": 1}
    for index in (3, 4, 6, 7):
        exec(book.cells[index].source, solved)
    first, second, _ = course.find_exercises(book, "t")
    exec(
        course.untouched(book, second), solved
    )  # alone: `double` is still the right one
    assert "total" not in solved
    exec(course.untouched(book, first), solved)
    book.cells[4].source = "double"
    with pytest.raises(AssertionError, match="exercise 1 passes its check unsolved"):
        exec(course.untouched(book, first), solved)


# ---- otter-grader, where it is installed ----


def test_a_public_check_ends_at_the_first_case_of_its_first_assertion():
    loop = (
        'for x in (1, 2):\n    y = f(x)\n    assert y == x, "wrong"\nassert f(3) == 3'
    )
    for source, passes in ((loop, "lambda x: 1"), (CHECK, "lambda x: 4")):
        public = compile(course.make_public(source), "public", "exec")
        names = dict.fromkeys(("f", "double"), eval(passes))
        exec(public, names)
        with pytest.raises(AssertionError):
            exec(source, names)
        with pytest.raises(AssertionError):
            exec(public, dict.fromkeys(names, lambda x: None))


def test_otter_grades_the_solution_the_untouched_and_a_hard_coded_book(sources):
    otter, out = paths.ROOT / "data/runs/otter", sources.parent / "out"
    if not (otter / ".complete").exists():
        pytest.skip("otter-grader is not installed: make otter")
    for path in sources.glob("*.ipynb"):
        book = nbformat.read(path, 4)
        book.metadata.kernelspec = {"name": "python3", "language": "python",
                                    "display_name": "Python 3"}  # fmt: skip
        nbformat.write(book, path)
    course.write_course(out, sources)
    subprocess.run([paths.ROOT / ".ci/otter", out, "10_a.ipynb"], check=True)
    (archive,) = (out / "otter/10_a/autograder").glob("*.zip")
    work = nbformat.read(out / "otter/student/10_a.ipynb", 4)
    assert "2 * x" not in nbformat.writes(work) and "double(5)" not in str(work)
    tried = sources / "tried"
    tried.mkdir()

    def mark(book):
        nbformat.write(book, tried / "10_a.ipynb")
        subprocess.run([otter / "bin/otter", "run", "-a", archive, "-o", tried,
                        tried / "10_a.ipynb"], check=True)  # fmt: skip
        tests = json.loads((tried / "results.json").read_text())["tests"]
        return [t["score"] for t in tests if t["name"].startswith("exercise")]

    solved = nbformat.read(out / "otter/10_a/autograder/10_a.ipynb", 4)
    assert mark(solved) == [2, 3] and mark(work) == [0, 0]
    for cell in work.cells:
        if "def double" in cell.source:
            cell.source = "def double(x):\n    return 4"  # right for the public check
        if cell.source == "...":
            cell.source = "total = 5"
    assert mark(work) == [0, 3]


# ---- the first cell, which fetches the repository where there is none ----


@pytest.fixture
def bootstrap(monkeypatch):
    """Runs the cell as where `lib` is not found; lists the calls of pip, a fake."""
    books = [course.read(path) for path in NOTEBOOKS]
    codes = [[c for c in b.cells if c.cell_type == "code"] for b in books]
    (source,) = {cells[0].source for cells in codes}  # the same in each
    calls, run = [], subprocess.run

    def run_all_but_pip(command, **options):
        if "pip" not in command:
            return run(command, **options)
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run_all_but_pip)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda: exec(source, {}) or calls


def test_a_notebook_alone_fetches_its_repository(bootstrap, tmp_path, monkeypatch):
    origin, work = tmp_path / "origin", tmp_path / "work"
    (origin / "lib").mkdir(parents=True)
    (origin / "lib/__init__.py").touch()
    work.mkdir()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("REPOSITORY", "owner/name")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{tmp_path}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/owner/")
    with pytest.raises(RuntimeError, match=r"(?s)clone.*owner/name.*fatal"):
        bootstrap()
    origin.rename(tmp_path / "name")
    assert bootstrap() == [[sys.executable, "-m", "pip", "install", "-q", "-e",
                            "fetched"]]  # fmt: skip
    assert sys.path[0] == str(work / "fetched")
    assert (work / "fetched/lib/__init__.py").is_file()


def test_a_notebook_of_a_checkout_fetches_nothing(bootstrap, monkeypatch):
    monkeypatch.chdir(paths.NOTEBOOKS)
    before = list(sys.path)
    assert bootstrap() == [] and sys.path == before


# ---- every notebook ----


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_makes_both_versions(path):
    book = course.read(path)
    exercises = course.find_exercises(book, path.stem)
    nbformat.validate(course.make_student(book))
    nbformat.validate(course.make_teacher(book, exercises))
    cells = course.make_otter(book, exercises).cells
    kinds = [cell.source.partition("\n")[0] for cell in cells]
    asked = [kinds.count(f"# {word} QUESTION") for word in ("BEGIN", "END")]
    checks = sum(len(exercise.checks) for exercise in exercises)
    assert asked == [len(exercises)] * 2 and kinds.count("# HIDDEN") == checks
    for link in course.list_files(book):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", CONVERTED, ids=lambda path: path.stem)
def test_a_course_notebook_keeps_its_floors(path):
    found = measure_course.measure(path)
    book = course.read(path)
    assert found["prose"] >= 0.85, measure_course.list_bare(book)
    assert found["quiz"] == 5
    coded = [e for e in course.find_exercises(book, path.stem) if e.solutions]
    assert len(coded) >= (1 if path.stem[:2] in ("00", "41") else 2)
    assert path.stat().st_size < 500_000


def test_measures_of_a_small_notebook(tmp_path, book):
    book.cells[1].source = "cfg = settings.check()"
    book.cells.insert(2, new_code_cell("plot()"))
    book.cells.insert(3, new_markdown_cell("![alt](../figures/drawings/d.svg) one two"))
    image = nbformat.v4.new_output("display_data", {"image/png": ""})
    book.cells.insert(4, new_code_cell("plot()", outputs=[image]))
    nbformat.write(book, tmp_path / "10_a.ipynb")
    found = measure_course.measure(tmp_path / "10_a.ipynb")
    assert found["prose"] == 0.5 and measure_course.list_bare(book) == ["plot()"]
    keys = (
        "drawings",
        "figures",
        "exercises",
        "solutions",
        "quiz",
        "internal",
        "external",
    )
    assert [found[key] for key in keys] == [1, 1, 3, 3, 1, 5, 1]
    assert found["seconds"] == pytest.approx(
        found["words"] * 60 / 130 + 3 * 20 + 2 * 30)  # fmt: skip
    assert not re.search("Therefore|as a is not", measure_course.read_text(book))
    json.dumps(found)
