"""The book and the slides, built, and opened in a browser that reaches no network."""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from nbformat.v4 import new_code_cell
from test_course import make_book

from lib import paths

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH")
STEMS = sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9]*.ipynb"))


def load(name):
    folder = str(paths.ROOT / ".ci")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


book, slides_of = load("book"), load("slides")


def make(kind, tmp_path_factory):
    """The folder of pages that a command of the Makefile makes."""
    for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_revealjs"):
        pytest.importorskip(package, reason="the extra `book` is not installed")
    try:
        book.fetch_mathjax()
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp(kind)
    command = [sys.executable, paths.ROOT / ".ci/book.py", kind, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return make("book", tmp_path_factory)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make("slides", tmp_path_factory)


# ---- what Sphinx reads ----


def test_links_lead_to_pages_of_the_book_and_code_is_left_alone(tmp_path):
    source = book.Source(tmp_path, ".ipynb")
    text = (
        "$$a$$ [`plan`](../lib/plan/ranking.py#L3), [r](../README.md#data),"
        " [a](01_baseline.ipynb) [d](https://doi.org/1) `x[0](y)` $b[1](z)$"
        " ![f](../figures/02_tied_channels.png)"
    )
    assert source.relink(text, book.PurePosixPath("notebooks")) == (
        "$$a$$ [`plan`](../code/lib/plan/ranking.py.md), [r](../index.md#data),"
        " [a](01_baseline.ipynb) [d](https://doi.org/1) `x[0](y)` $b[1](z)$"
        " ![f](../figures/02_tied_channels.png)"
    )
    assert (tmp_path / "figures/02_tied_channels.png").is_file()
    page = (tmp_path / "code/lib/plan/ranking.py.md").read_text()
    assert (paths.ROOT / "lib/plan/ranking.py").read_text() in page
    with pytest.raises(ValueError, match=r"links to lib/none.py, which is not there"):
        source.relink("[x](../lib/none.py)", book.PurePosixPath("notebooks"))


def test_without_npm_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match="MathJax comes from npm, which is not on PATH"
    ):
        book.fetch_mathjax()


def test_every_notebook_stands_in_one_session():
    toc = (paths.ROOT / ".ci/book/toc.yml").read_text(encoding="utf-8")
    globs = re.findall(r"glob: notebooks/(.*)", toc)
    for stem in STEMS:
        assert sum(fnmatch(stem, pattern) for pattern in globs) == 1, stem


def test_slides_show_first_sentences_and_keep_the_rest_for_the_speaker(tmp_path):
    cells = make_book()
    cells.cells[0].source = "# T\n\nShown: one. Not shown.\n\n- a list. As it is."
    cells.cells[1].source = "settings.check()"
    cells.cells.insert(2, new_code_cell("short()\n" * 3))
    cells.cells.insert(3, new_code_cell("long()\n" * 30))
    for cell in cells.cells:  # links lead to pages of slides, in the notes too
        link = "Therefore [b](40_comparison.ipynb)"
        cell.source = cell.source.replace("Therefore", link)
    page = slides_of.make_page(cells, "10_a", book.Source(tmp_path, ".md"))
    shown = re.sub(r"<aside.*?</aside>", "", page, flags=re.DOTALL)
    for text in (
        "Shown: one.",
        "- a list. As it is.",
        "short()",
        "**Exercise 1**",
        "Who",
    ):
        assert text in shown
    for text in ("Not shown.", "Therefore", "as a is not"):
        assert text in page and text not in shown
    assert "(40_comparison.md)" in page and ".ipynb" not in page
    assert "long()" not in page and "2 * x" not in page and "assert" not in page
    assert page.count("revealjs-break") == 4  # one for each exercise and question


# ---- links, in the files ----


class Page(HTMLParser):
    """The links of a page, and the ids that others can link to."""

    def __init__(self, file):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.ids.add(value)


def list_broken(folder):
    """`page: link` of each link into the folder that leads nowhere."""
    read = {
        file.resolve(): Page(file)
        for file in folder.rglob("*.html") if "_static" not in file.parts
    }  # fmt: skip
    for file, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = file if not parts.path else file.parent / unquote(parts.path)
            target = target.resolve()
            anchors = read[target].ids | {""} if target in read else {parts.fragment}
            known = unquote(parts.fragment) in anchors or parts.fragment == "top"
            if not target.exists() or not known:
                yield f"{file.relative_to(folder)}: {link}"


def test_every_internal_link_of_the_book_resolves(pages):
    assert not list(list_broken(pages))
    for stem in STEMS:
        assert (pages / f"notebooks/{stem}.html").is_file()


def test_every_internal_link_of_the_slides_resolves(slides):
    assert not list(list_broken(slides))


def test_the_book_hides_marks_of_tests_and_names_no_address_of_its_own(pages):
    for stem in STEMS:
        text = (pages / f"notebooks/{stem}.html").read_text(encoding="utf-8")
        assert "NBVAL_CHECK_OUTPUT" not in text
        assert "colab.research" not in text and "mybinder" not in text
        assert "copybutton" in text and "theme-switch" in text


# ---- in a browser ----


class Browser:
    """A headless Chromium in which no name of a host resolves, by its protocol."""

    def __init__(self, profile):
        import websocket

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--remote-debugging-port=0", "--remote-allow-origins=*",
                 "--disable-background-networking", "--disable-component-update",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                 "--allow-file-access-from-files", "--window-size=1400,1000",
                 f"--user-data-dir={profile}"]  # fmt: skip
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"],
                                        stderr=subprocess.PIPE, text=True)  # fmt: skip
        line = next(
            s for s in self.process.stderr if s.startswith("DevTools listening")
        )
        port = re.search(r":(\d+)/", line)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = json.load(answer)
        address = next(t for t in tabs if t["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, timeout=120)
        self.count, self.events = 0, []
        for room in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{room}.enable")

    def ask(self, method, **params):
        self.count += 1
        request = {"id": self.count, "method": method, "params": params}
        self.socket.send(json.dumps(request))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                return message["result"]
            self.events.append(message)

    def open(self, file):
        """Load a page to its end, maths included; the faults that it reports."""
        self.events = []
        self.ask("Page.navigate", url=Path(file).resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(json.loads(self.socket.recv()))
        self.run("window.MathJax?.startup?.promise?.then(() => 0)")
        return [fault for event in self.events if (fault := find_fault(event))]

    def run(self, script):
        return self.ask("Runtime.evaluate", expression=script, awaitPromise=True,
                        returnByValue=True)["result"].get("value")  # fmt: skip

    def shoot(self, file):
        image = self.ask("Page.captureScreenshot", format="png")["data"]
        Path(file).write_bytes(base64.b64decode(image))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.process.stderr.close()


def find_fault(event):
    """What an event of the browser complains about, or None."""
    params = event.get("params", {})
    if event["method"] == "Network.loadingFailed":
        return f"a request failed: {params['errorText']}"
    if event["method"] == "Network.requestWillBeSent":
        address = params["request"]["url"]
        return None if address.startswith(("file:", "data:", "blob:")) else address
    if event["method"] == "Runtime.exceptionThrown":
        return params["exceptionDetails"]["text"]
    if event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
        return str(params["args"])
    if event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
        return params["entry"]["text"]
    return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


COUNT = """({
  maths: document.querySelectorAll('.math').length,
  rendered: document.querySelectorAll('mjx-container').length,
  wrong: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
  empty: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
})"""


def assert_whole(browser, file):
    """A page without a fault; returns how many formulas it has."""
    assert browser.open(file) == []
    found = browser.run(COUNT)
    assert found["rendered"] >= found["maths"]
    assert found["wrong"] == found["empty"] == 0
    return found["maths"]


@needs_browser
def test_pages_open_offline_with_their_maths(pages, browser):
    assert_whole(browser, pages / "index.html")
    formulas = {stem: assert_whole(browser, pages / f"notebooks/{stem}.html")
                for stem in STEMS}  # fmt: skip
    assert formulas["10_scop_knockoffs"] > 5


@needs_browser
def test_the_search_finds_a_word(pages, browser):
    assert_whole(browser, pages / "search.html")
    page = (pages / "search.html").resolve().as_uri()
    browser.events = []
    browser.ask("Page.navigate", url=f"{page}?q=knockoff")
    browser.run("new Promise(done => setTimeout(done, 1500))")
    found = browser.run("document.querySelectorAll('#search-results li').length")
    assert found > 2


@needs_browser
def test_slides_open_offline_with_their_maths(slides, browser):
    assert_whole(browser, slides / "index.html")
    assert_whole(browser, slides / "notebooks/10_scop_knockoffs.html")
    assert browser.run("Reveal.isReady() && Reveal.getTotalSlides()") > 10


@needs_browser
def test_the_browser_notices_what_it_must(browser, tmp_path):
    """A page that asks the network, errs, and shows raw maths is none that passes."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='https://example.org/a.png'><script>nothing()</script>"
                    "<span class='math'>\\(x\\)</span>")  # fmt: skip
    faults = browser.open(page)
    assert any("example.org" in fault for fault in faults)
    assert any("Uncaught" in fault for fault in faults)
    assert browser.run(COUNT)["rendered"] == 0
