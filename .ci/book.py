"""The notebooks as a book and as slides, below data/runs, without the network.

    .venv/bin/python .ci/book.py book [--out FOLDER]
    .venv/bin/python .ci/book.py slides [--out FOLDER]

What Sphinx reads is written to FOLDER/source first. For the book these are README.md,
the notebooks with the outputs that they have, the figures they link to, and a page for
each file of code that one links to; for the slides one page a notebook, made by
`.ci/slides.py`. MathJax is fetched once through npm, and kept in data/runs/npm.
REPOSITORY=owner/name (on GitHub) adds buttons that open a notebook in Colab and Binder.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import course
import nbformat
import slides

ROOT = course.ROOT
RUNS = Path(os.environ.get("PRUNING_RUNS") or ROOT / "data" / "runs")
MATHJAX = "3.2.2"
SHA256 = "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09"
FONTS = "output/chtml/fonts/woff-v2/"
MARKER = re.compile(r"^# NBVAL_\w+\n?", re.MULTILINE)  # for the tests, not for readers
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".toml": "toml"}


# ---- MathJax ----


def fetch_mathjax():
    """The folder of MathJax's scripts, fetched through npm the first time.

    Raises:
        ValueError: npm is missing, reaches nothing, or brings other bytes.
    """
    kept = ROOT / "data" / "runs" / "npm" / f"mathjax-{MATHJAX}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not shutil.which("npm"):
        raise ValueError("MathJax comes from npm, which is not on PATH")
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        call = ["npm", "pack", "--silent", f"mathjax@{MATHJAX}"]
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
        packed = Path(folder) / f"mathjax-{MATHJAX}.tgz"
        if done.returncode or not packed.exists():
            said = (done.stderr.strip().splitlines() or ["nothing was fetched"])[-1]
            raise ValueError(f"npm cannot fetch mathjax {MATHJAX}: {said[:150]}")
        if hashlib.sha256(packed.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"npm brought a mathjax {MATHJAX} of another SHA-256")
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / "package" / "es5").rename(kept)
    return kept


def copy_mathjax(static):
    """What pages need of it: one script and its fonts, 2 MB."""
    mathjax = fetch_mathjax()
    target = static / "mathjax"
    (target / FONTS).mkdir(parents=True, exist_ok=True)
    for file in [mathjax / "tex-chtml-full.js", *(mathjax / FONTS).iterdir()]:
        shutil.copy(file, target / file.relative_to(mathjax))


# ---- what Sphinx reads ----


class Source:
    """A folder of pages; files that a page links to are added with it."""

    def __init__(self, folder, notebooks):
        self.folder = folder
        self.notebooks = notebooks  # the suffix of their pages
        self.written = set()

    def write(self, name, content):
        """Write a file unless it is the same already, so that Sphinx reads it once."""
        file = self.folder / name
        content = content.encode() if isinstance(content, str) else content
        self.written.add(file)
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def add_code(self, path):
        """A page with the text of a file; returns its name."""
        name = f"code/{path.as_posix()}.md"
        if self.folder / name not in self.written:
            text = (ROOT / path).read_text(encoding="utf-8").rstrip() or "# empty"
            language = LANGUAGES.get(path.suffix, "text")
            head, fence = f"---\norphan: true\n---\n# `{path}`", "`" * 8
            self.write(name, f"{head}\n\n{fence}{language}\n{text}\n{fence}\n")
        return name

    def relink(self, text, folder):
        """Markdown of a file in `folder`, its links led to pages of the book."""

        def lead(match):
            link, _, anchor = match[2].partition("#")
            if ":" in link or not link:
                return match[0]
            path = PurePosixPath(os.path.normpath(folder / link))
            page = self.find_page(path)
            up = os.path.relpath(page, folder)
            kept = "#" + anchor if anchor and page.parts[0] != "code" else ""
            return match[1] + up + kept

        parts = re.split(f"({course.CODE.pattern})", text, flags=re.DOTALL)
        # code and formulas stay as they are; in their places, `[code](link)` is a link
        held = parts[1::2]
        parts[1::2] = ["\0"] * len(held)
        bare = re.sub(r"""(\]\(<?|\bsrc=")([^\s)>"\0]+)""", lead, "".join(parts))
        return re.sub("\0", lambda match: held.pop(0), bare)

    def find_page(self, path):
        """What stands in the book for a path of the repository; added if it must be."""
        file = ROOT / path
        if file.is_dir():
            path, file = path / "__init__.py", file / "__init__.py"
        if not file.is_file() or ".." in path.parts:
            raise ValueError(f"a page links to {path}, which is not there")
        if path == PurePosixPath("README.md"):
            return PurePosixPath("index.md")
        if path.suffix == ".ipynb":
            return path.with_suffix(self.notebooks)
        if path.suffix in LANGUAGES or path.suffix == ".md" or not path.suffix:
            return PurePosixPath(self.add_code(path))
        self.write(path.as_posix(), file.read_bytes())
        return path

    def remove_others(self):
        for file in self.folder.rglob("*"):
            if file.is_file() and file not in self.written:
                file.unlink()


def write_book(source):
    """The pages of the book."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source.write("index.md", source.relink(readme, PurePosixPath(".")))
    for path in sorted(course.NOTEBOOKS.glob("[0-9]*.ipynb")):
        book = course.read(path)
        course.find_exercises(book, path.stem)
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.source = MARKER.sub("", cell.source)
                continue
            cell.source = source.relink(cell.source, PurePosixPath("notebooks"))
            if course.tag_of(cell) == "answer":
                cell.source = ("<details><summary>Answer</summary>\n\n"
                               f"{cell.source}\n\n</details>")  # fmt: skip
        source.write(f"notebooks/{path.name}", nbformat.writes(book) + "\n")


def build(kind, out):
    """Sphinx over `out`/source into `out`/html; its warnings are errors."""
    try:
        import sphinx.cmd.build as command
    except ModuleNotFoundError:
        raise ValueError("Sphinx is not installed: .ci/setup book") from None
    copy_mathjax(out / "static")
    source = Source(out / "source", ".ipynb" if kind == "book" else ".md")
    write_book(source) if kind == "book" else slides.write(source)
    source.remove_others()
    os.environ["BOOK_OUT"] = str(out)
    builder = {"book": "html", "slides": "revealjs"}[kind]
    arguments = ["-W", "--keep-going", "-q", "-b", builder,
                 "-c", str(ROOT / ".ci/book"), "-d", str(out / "doctrees"), "-t", kind,
                 str(out / "source"), str(out / "html")]  # fmt: skip
    if command.main(arguments):
        raise ValueError("Sphinx has warned, see above")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["book", "slides"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = (arguments.out or RUNS / arguments.kind).resolve()
    try:
        build(arguments.kind, out)
    except (ValueError, OSError) as error:
        sys.exit(f"{arguments.kind}: {error}")
    print(f"{out / 'html' / 'index.html'}")


if __name__ == "__main__":
    main()
