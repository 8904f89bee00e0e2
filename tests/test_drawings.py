"""Drawings of ideas: each is what its code draws, and stands in a notebook."""

import re
import runpy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from lib import paths

drawings = SimpleNamespace(**runpy.run_path(str(paths.ROOT / ".ci" / "drawings.py")))
DRAWINGS = drawings.list_drawings()
NUMBER = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?(?:e-?\d+)?")


def split(svg: str) -> tuple[str, np.ndarray]:
    """Text without ids and numbers, and the numbers; both may change with a version."""
    svg = re.sub(r'(id="|url\(#|xlink:href="#)[^")]*', r"\1", svg)
    return NUMBER.sub("0", svg), np.array(NUMBER.findall(svg), float)


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda p: p.stem)
def test_a_drawing_is_what_its_code_draws(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = drawings.render(path)
    committed = (drawings.FIGURES / f"{path.stem}.svg").read_text(encoding="utf-8")
    (text, numbers), (kept, wanted) = split(drawn), split(committed)
    assert text == kept, "run `make drawings`"
    np.testing.assert_allclose(numbers, wanted, atol=0.02, err_msg="`make drawings`")


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda p: p.stem)
def test_a_drawing_stands_in_a_notebook_with_words_for_those_who_cannot_see(path):
    books = [
        book.read_text(encoding="utf-8") for book in paths.NOTEBOOKS.glob("*.ipynb")
    ]
    link = rf"!\[([^\]]*)\]\(\.\./figures/drawings/{path.stem}\.svg\)"
    found = [text for book in books for text in re.findall(link, book)]
    assert found and all(len(text) >= 20 for text in found)


def test_no_drawing_without_its_code():
    kept = {path.stem for path in drawings.FIGURES.glob("*.svg")}
    assert kept == {path.stem for path in DRAWINGS}
