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
SLIDE_LINES, FIGURE_LINES, LETTERS = 17, 13, 100  # what fits, about, at this size
BLOCK = re.compile(r"```.*?```|\$\$.*?\$\$|.+?(?=\n\s*\n|\Z)", re.DOTALL)
PLAIN = re.compile(r"\s*([-*|>]|\d+\.|#|!\[|\$\$|```|<)")  # not a paragraph
SENTENCE = re.compile(r"(.+?(?<!et al)[.?!:])(?=\s+[A-Z*`$\[]|$)", re.DOTALL)
FOLDER = PurePosixPath("notebooks")
UNLINKED = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|\w+\.ipynb)[^)]*\)")  # code
BREAK = "\n```{revealjs-break}\n:notitle:\n```\n"
NOTES = '<aside class="notes">\n\n{}\n\n</aside>'


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
    slides = []
    for index, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            blocks = _show_text(cell, source)
        elif index > begin and course.tag_of(cell) is None:
            blocks = _show_code(cell, f"{stem}_{index}", source)
        else:
            continue
        starts = course.tag_of(cell) in ("exercise", "quiz")
        for block in blocks:
            heading = block.startswith("#")
            if starts or heading or measure(slides[-1], block) > SLIDE_LINES:
                slides.append([])
            slides[-1].append(block)
            starts = False
    pages = ["\n\n".join(slide) for slide in slides if slide]
    return "".join(f"\n{p}\n" if p[0] == "#" else f"{BREAK}\n{p}\n" for p in pages)


def measure(slide, block=""):
    """Lines that blocks take on a slide, about."""
    return sum(map(_count_lines, [*slide, block]))


def _count_lines(block):
    if block.startswith("<aside"):
        return 0
    if block.startswith("!["):
        return FIGURE_LINES
    if block.startswith("<"):
        return block.count("<tr")
    lines = [1 + len(line) // LETTERS for line in block.splitlines()]
    return sum(lines) * (0.75 if block.startswith("```") else 1) + 0.5


def _show_text(cell, source):
    tag = course.tag_of(cell)
    text = source.relink(UNLINKED.sub(r"\1", cell.source), FOLDER)
    if tag == "answer":
        return [NOTES.format(text)]
    if tag:
        shown = course.DETAILS.sub("", text)
        return [shown, NOTES.format(text)] if shown != text else [shown]
    blocks = []
    for part in re.split(r"\n(?=##+ )", text):
        head, body = re.match(r"(#+ [^\n]*\n?)?(.*)", part, re.DOTALL).groups()
        found = [block.strip() for block in BLOCK.findall(body) if block.strip()]
        shown = [shorten(block) for block in found]
        blocks += [head.strip()] if head else []
        blocks += [NOTES.format(body.strip())] if shown != found else []
        blocks += shown
    return blocks


def shorten(block):
    """The first sentence of a paragraph, in one line; another block as it is."""
    if PLAIN.match(block):
        return block
    sentence = SENTENCE.match(block)
    return " ".join((sentence[1] if sentence else block).split())


def _show_code(cell, name, source):
    """The figures that a cell has drawn, else its code and what it prints, if short."""
    figures, texts = [], []
    for number, output in enumerate(cell.outputs):
        data = output.get("data", {})
        if "image/png" in data:
            file = f"notebooks/images/{name}_{number}.png"
            source.write(file, base64.b64decode(data["image/png"]))
            figures.append(f"![](images/{name}_{number}.png)")
        elif "text/html" in data and data["text/html"].count("<tr") <= TABLE_ROWS:
            texts.append(_strip_blank(data["text/html"]))
        elif "text/html" not in data:
            text = output.get("text") or data.get("text/plain", "")
            if text.count("\n") <= TEXT_LINES:
                texts.append(f"```text\n{text.rstrip()}\n```")
    code = re.sub(r"^# NBVAL_\w+\n", "", cell.source)
    if code.count("\n") < CODE_LINES and not figures:
        texts.insert(0, f"```python\n{code}\n```")
    return [*figures, *texts]


def _strip_blank(html):
    """HTML in one block of Markdown: a blank line would end it."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", html).strip()
