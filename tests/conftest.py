"""What several test files share, and the closing line of `make test`."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """One torch thread: for small tensors several would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count_outcomes(reports: dict[str, list], *, notebooks: bool) -> str:
    """`12 passed, 1 skipped` over the notebook cells, or over everything else."""
    counts = []
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        found = [
            report
            for report in reports.get(outcome, [])
            if (".ipynb" in report.nodeid) == notebooks
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
