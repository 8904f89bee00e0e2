"""One page of slides a notebook, made from its cells by rule.

A section of the notebook is a slide, what follows in it are slides below. Of a text
the first sentence is shown, the whole stands in the speaker's notes (key S). Lists,
formulas, drawings and figures are shown as they are, code where it is short. Exercises
and questions are shown without answers; those stand in the notes.
"""

import base64
import re
from pathlib import PurePosixPath

import course

CODE_LINES, TEXT_LINES, TABLE_ROWS = 12, 14, 12  # more do not fit on a slide
PLAIN = re.compile(r"\s*([-*|>]|\d+\.|#|!\[|\$\$|```|<)")  # not a paragraph
SENTENCE = re.compile(r"(.+?(?<!et al)[.?!:])(?=\s+[A-Z*`$\[]|$)", re.DOTALL)
FOLDER = PurePosixPath("notebooks")
UNLINKED = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|\w+\.ipynb)[^)]*\)")  # code
BREAK = "\n```{revealjs-break}\n:notitle:\n```\n"
NOTES = '\n<aside class="notes">\n\n{}\n\n</aside>\n'


def write(source):
    """A page for each notebook, and one that lists them."""
    names = []
    for path in sorted(course.NOTEBOOKS.glob("[0-9]*.ipynb")):
        book = course.read(path)
        course.find_exercises(book, path.stem)
        source.write(f"notebooks/{path.stem}.md", make_page(book, path.stem, source))
        title = re.match(r"# (.+)", book.cells[0].source)[1]
        names.append((f"notebooks/{path.stem}", title))
    links = "\n".join(f"- [{title}]({name}.md)" for name, title in names)
    toc = "\n".join(["```{toctree}", ":hidden:", "", *(n for n, _ in names), "```"])
    head = "# Pruning, in slides\n\n## Notebooks"
    source.write("index.md", f"{head}\n\n{links}\n\n{toc}\n")


def make_page(book, stem, source):
    """Markdown of a notebook's slides; figures are written beside it."""
    begin = next(
        (i for i, c in enumerate(book.cells) if "settings.check(" in c.source), 0
    )
    pieces = []
    for index, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            pieces += _show_text(cell, source)
        elif index > begin and course.tag_of(cell) is None:
            pieces += _show_code(cell, f"{stem}_{index}", source)
    page = "\n".join(pieces)
    return re.sub(rf"(\n#+ [^\n]*\n)\s*{re.escape(BREAK)}", r"\1", page) + "\n"


def _show_text(cell, source):
    tag = course.tag_of(cell)
    if tag == "answer":
        return [NOTES.format(cell.source)]
    text = source.relink(UNLINKED.sub(r"\1", cell.source), FOLDER)
    if tag:
        shown = course.DETAILS.sub("", text)
        return [BREAK, shown, NOTES.format(text)] if shown != text else [BREAK, shown]
    pieces = []
    for part in re.split(r"\n(?=##+ )", text):
        head, body = re.match(r"(#+ [^\n]*\n?)?(.*)", part, re.DOTALL).groups()
        pieces.append(f"\n{head}" if head else BREAK)
        pieces.append(shorten(body))
        if shorten(body).strip() != body.strip():
            pieces.append(NOTES.format(body.strip()))
    return pieces


def shorten(text):
    """Of each paragraph the first sentence; the rest as it is."""
    blocks = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(
        block if PLAIN.match(block) or not SENTENCE.match(block)
        else SENTENCE.match(block)[1] for block in blocks)  # fmt: skip


def _show_code(cell, name, source):
    """Slides of a cell: the figure it has drawn, else its code and print if short."""
    figures, texts = [], []
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/png" in data:
            file = f"notebooks/images/{name}_{number}.png"
            source.write(file, base64.b64decode(data["image/png"]))
            figures.append(f"![](images/{name}_{number}.png)\n")
        elif "text/html" in data and data["text/html"].count("<tr") <= TABLE_ROWS:
            texts.append(_strip_blank(data["text/html"]))
        elif "text/html" not in data:
            text = output.get("text") or data.get("text/plain", "")
            if text.count("\n") <= TEXT_LINES:
                texts.append(f"```text\n{text.rstrip()}\n```\n")
    code = re.sub(r"^# NBVAL_\w+\n", "", cell.source)
    if code.count("\n") < CODE_LINES and not figures:
        texts.insert(0, f"```python\n{code}\n```\n")
    slides = [*figures, *(["\n".join(texts)] if texts else [])]
    return [piece for slide in slides for piece in (BREAK, slide)]


def _strip_blank(html):
    """HTML in one block of Markdown: a blank line would end it."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", html).strip() + "\n"
