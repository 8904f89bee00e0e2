"""What test files share, how they are spread over processes, and the closing line."""

import multiprocessing
from collections import defaultdict
from pathlib import Path

import pytest
from forked_kernels import ForkedKernel
from jupyter_client.provisioning import local_provisioner
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell
from xdist.scheduler import LoadScopeScheduling

# Files that take longest begin first, so that none is left over at the end; 30, 31 and
# 32 read one another's points. 12 and 22 are the first of their papers, so that other
# notebooks find the baselines that these train.
SLOW = [
    "30_map_collection 31_map_fit 32_map_pruning 33_allocation",
    "12_scop_pruning",
    "test_surgery",
    "22_nisp_pruning",
    "test_own_images",
    "51_scale",
    "test_models",
    "test_processes",
    "02_surgery",
    "40_comparison",
    "03_criteria",
    "test_gpu",
    "test_reproduce",
    "10_scop_knockoffs",
    "50_latency",
    "test_settings",
    "test_train",
    "test_map3d_collect",
    "test_map3d_space",
    "test_stages",
    "test_streaming",
    "20_nisp_inf_fs",
    "11_scop_selection",
    "41_claims",
    "21_nisp_propagation",
    "23_nisp_theory",
    "01_baseline",
    "00_start_here",
]


def pytest_configure():
    """Who starts a kernel, nbval or papermill, gets one of `forked_kernels.py`."""
    local_provisioner.launch_kernel = ForkedKernel


def find_group(path: Path) -> str:
    """The files that one process runs, in order: all of a line of `SLOW`, or one."""
    return next((line for line in SLOW if path.stem in line.split()), path.stem)


def list_untouched(notebook):
    """Cells behind a notebook's last: unsolved exercises must fail their checks."""
    from measure_course import course

    exercises = course.find_exercises(notebook.nb, notebook.path.stem)
    for exercise in exercises:
        if exercise.checks:
            cell = new_code_cell(course.untouched(notebook.nb, exercise))
            yield IPyNbCell.from_parent(
                notebook, name=f"Exercise {exercise.number} unsolved",
                cell_num=exercise.number, cell=cell, options=defaultdict(bool),
            )  # fmt: skip


def pytest_collection_modifyitems(items):
    """Slow files first, then long ones; tests of one file stay in their order."""
    notebooks = {item.parent for item in items if isinstance(item, IPyNbCell)}
    for notebook in sorted(notebooks, key=lambda notebook: notebook.path):
        items.extend(list_untouched(notebook))
    places = {line: place for place, line in enumerate(SLOW)}
    items.sort(
        key=lambda item: (
            places.get(find_group(item.path), len(SLOW)),
            item.path.suffix == ".py" and -item.path.stat().st_size,
            item.path,
        )
    )


class GroupScheduling(LoadScopeScheduling):
    """pytest-xdist hands out whole groups: cells of a notebook build on one another."""

    def _split_scope(self, nodeid: str) -> str:
        return find_group(Path(nodeid.split("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return GroupScheduling(config, log)


@pytest.fixture
def one_thread():
    """One torch thread: for small tensors several would only wait for one another."""
    import torch  # not by the process that hands out the tests

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forked():
    """Processes that have all that this one has; a GPU's threads allow no fork."""
    import torch

    return multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def count_outcomes(reports: dict[str, list], *, notebooks: bool) -> str:
    """`12 passed, 1 skipped` over the notebook cells, or over everything else."""
    counts = []
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        found = [
            report
            for report in reports.get(outcome, [])
            if report.nodeid.split("::")[0].endswith(".ipynb") == notebooks
        ]
        if found:
            counts.append(f"{len(found)} {outcome}")
    return ", ".join(counts) or "none"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """After pytest's own summary, so that this line is the last one."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and (session.config.option.nbval_lax or session.config.option.nbval):
        units = count_outcomes(reporter.stats, notebooks=False)
        cells = count_outcomes(reporter.stats, notebooks=True)
        reporter.write_line(f"unit tests: {units}; notebook cells: {cells}")
    return result
