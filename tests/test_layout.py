"""House rules that keep the repository readable: floors, sizes, executed notebooks."""

import ast
import functools
import json
import re
from types import SimpleNamespace

import conftest
import pytest

from lib import paths, settings

# Each room imports only from those before it.
FLOORS = """
messages paths settings kernels graph data models cost plan baselines surgery latency
train stages scop nisp map3d criteria verdicts ledger report
""".split()
PAPERS = {"scop", "nisp", "map3d"}
TOP = {"notebooks", "lib", "data", "figures", "tests", "environment.yml", "README.md"}
TOOLS = {"pyproject.toml", "Makefile", "requirements.lock", "LICENSE", "CITATION.cff"}
MODULES = sorted((paths.ROOT / "lib").rglob("*.py"))
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
PROFILES = sorted(path.stem for path in (paths.NOTEBOOKS / "params").glob("*.yaml"))


def list_imports(path) -> set[str]:
    """Names of the modules of `lib` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "")[:4] == "lib.":
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_floors_only_look_down(path):
    own = path.relative_to(paths.ROOT / "lib").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in FLOORS, f"say in FLOORS where lib/{own} stands"
    below = {*FLOORS[: FLOORS.index(own)], own}
    below -= PAPERS - {own} if own in PAPERS else set()
    assert list_imports(path) <= below, "an import runs back up"


@pytest.mark.parametrize("file", ["README.md", "notebooks/drawings/house.py"])
def test_drawings_of_the_house_show_every_room(file):
    text = (paths.ROOT / file).read_text(encoding="utf-8")
    drawn = re.search(r"data  →  model.*?```|FLOORS = .*?ROOF = .*?\n", text, re.DOTALL)
    assert set(FLOORS) <= set(re.findall(r"\w+", drawn[0]))


def test_no_function_hides_its_module():
    """`lib.plan.resolve` would be the one or the other, by what was imported before."""
    for room in sorted((paths.ROOT / "lib").rglob("__init__.py")):
        tree = ast.parse(room.read_text(encoding="utf-8"))
        imported = {a.asname or a.name for node in ast.walk(tree)
                    if isinstance(node, ast.ImportFrom) and node.module != "lib"
                    for a in node.names}  # fmt: skip
        files = {path.stem for path in room.parent.glob("*.py")}
        assert not imported & files, room


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_stay_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_top_level_is_the_one_agreed_on():
    names = {p.name for p in paths.ROOT.iterdir() if not p.name.startswith(".")}
    names = {name for name in names if not name.endswith((".egg-info", "__pycache__"))}
    assert names - {"build"} <= TOP | TOOLS and TOP <= names


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    return request.param, json.loads(request.param.read_text(encoding="utf-8"))


def code_cells(book) -> list[dict]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_committed_as_executed_in_order(notebook):
    counts = [cell["execution_count"] for cell in code_cells(notebook[1])]
    assert counts == list(range(1, len(counts) + 1))


def test_notebooks_are_small_and_without_traces_of_a_machine(notebook):
    path, book = notebook
    assert path.stat().st_size < 500_000 and "widgets" not in book["metadata"]
    outputs = json.dumps([cell["outputs"] for cell in code_cells(book)])
    assert not re.search(r"/(root|tmp|home|work|Users)/", outputs)
    assert not any(o["output_type"] == "error" for c in code_cells(book)
                   for o in c["outputs"])  # fmt: skip


def test_notebooks_pin_something_and_read_well(notebook):
    sources = ["".join(cell["source"]) for cell in code_cells(notebook[1])]
    assert sum("NBVAL_CHECK_OUTPUT" in source for source in sources) >= 2
    for source in sources:
        assert max(map(len, source.splitlines())) <= 88, source
        assert len(source.splitlines()) <= 40


def test_parameters_are_declared_and_have_rules(notebook):
    path, book = notebook
    tagged = [
        c for c in code_cells(book) if "parameters" in c["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    assert settings.declared_parameters(path.stem).keys() <= settings.PARAMETERS.keys()


def test_notebooks_run_on_one_thread_unless_told(notebook):
    path, book = notebook
    assert settings.declared_parameters(path.stem)["threads"] == 1
    sources = ["".join(cell["source"]) for cell in code_cells(book)]
    (checked,) = [i for i, source in enumerate(sources) if "settings.check(" in source]
    assert "settings.use_threads(cfg.threads)" in sources[checked]


def test_notebooks_take_images_that_stay_on_disk(notebook):
    """A stream has a tensor's length, shape and items, but is none."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook[1])]
    found = re.findall(r"torch\.\w+\([^()]*\.images\b", "\n".join(sources))
    assert not found


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_name_only_what_notebooks_declare(profile):
    runs = settings.read_profile(profile)
    assert len({run.name for run in runs}) == len(runs) > 0


@functools.cache
def list_checks(name) -> tuple[dict, list[str]]:
    """What a notebook imports from lib, and its refusals of unknown words."""
    book = paths.read_json(paths.NOTEBOOKS / f"{name}.ipynb")
    tree = ast.parse("\n".join("".join(c["source"]) for c in code_cells(book)))
    names: dict = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib"):
            exec(ast.unparse(node), names)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    texts = [ast.unparse(call) for call in calls]
    return names, [text for text in texts if text.startswith("check_known(")]


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_use_words_that_their_notebooks_know(profile):
    """Else a run of hours is refused where it begins, on another day."""
    for run in settings.read_profile(profile):
        names, checks = list_checks(run.notebook)
        told = settings.declared_parameters(run.notebook) | run.parameters
        for text in checks:
            eval(text, names | {"cfg": SimpleNamespace(**told)})


def test_the_readme_lists_every_notebook_and_profile():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
    for profile in PROFILES:
        assert f"`{profile}`" in readme


DOCUMENTS = ["README.md", "tests/README.md", *(
    f".github/{name}" for name in ("CONTRIBUTING.md", "ISSUE_TEMPLATE/fault.yml")
)]  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_files_and_commands_that_exist(name):
    text = (paths.ROOT / name).read_text(encoding="utf-8")
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"[`\n]make ([a-z]+)", text)) <= targets
    rooms = r"lib|tests|notebooks|figures|\.ci|\.github"
    for path in re.findall(rf"[`(]((?:{rooms})/[\w./-]*)", text):
        placeholder = re.search("[A-Z]{2}", path)
        assert placeholder or (paths.ROOT / path).exists(), path


def test_docstrings_name_the_notebook_that_teaches_them():
    told = {
        (path, name)
        for path in (paths.ROOT / "lib").rglob("*.py")
        for name in re.findall(r"notebooks/(\w+)\.ipynb", path.read_text())
    }
    assert len({name for _, name in told}) > 9
    for path, name in told:
        book = paths.NOTEBOOKS / f"{name}.ipynb"
        assert book.is_file(), f"{path} names {name}"


def test_slow_files_are_files_and_notebooks_that_share_points_stay_together():
    found = {path.stem for path in [*NOTEBOOKS, *(paths.ROOT / "tests").glob("*.py")]}
    assert {name for line in conftest.SLOW for name in line.split()} <= found
    groups = {conftest.find_group(path) for path in NOTEBOOKS if path.stem[0] == "3"}
    assert len(groups) == 1
    assert conftest.find_group(paths.NOTEBOOKS / "01_baseline.ipynb") not in groups
    assert conftest.find_group(paths.ROOT / "tests" / "test_plan.py") == "test_plan"


def test_the_closing_line_counts_cells_and_tests_apart():
    names = ["notebooks/01_baseline.ipynb::Cell 0", "tests/test_x.py::test_y[z.ipynb]"]
    reports = {"passed": [SimpleNamespace(nodeid=name) for name in names]}
    for notebooks in (True, False):
        assert conftest.count_outcomes(reports, notebooks=notebooks) == "1 passed"
