"""What all drawings share: colours by meaning, sizes of type, a few shapes.

A drawing is a file beside this one with `def draw() -> matplotlib.figure.Figure`;
`make drawings` writes it to figures/drawings. Lengths are inches, from the lower left.

    from style import KEPT, arrow, box, canvas

    def draw():
        fig, ax = canvas(9, 3)
        a = box(ax, 1, 1, 2, 1, "scores", KEPT)
        b = box(ax, 6, 1, 2, 1, "plan")
        arrow(ax, a.right, b.left, text="rank")
        return fig
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

# Okabe and Ito's palette, safe for colour-blind readers
KEPT = "#0072B2"  # blue: channels that stay
REMOVED = "#D55E00"  # vermilion: channels that go; also crossed or dashed
CONTROL = "#B5558D"  # purple: knockoffs and other controls
SCORE = "#009E73"  # green: scores and what flows back
MARK = "#E69F00"  # orange: what the eye should find first
NEUTRAL = "#8C8C8C"  # grey: what only stands around
INK = "#222222"  # letters and lines

TITLE, TEXT, SMALL = 20, 16, 13  # points


class Place(NamedTuple):
    """The rectangle that something was drawn in, and points on its edge for arrows."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y


def tint(color: str, share: float = 0.25) -> tuple[float, float, float]:
    """A lighter colour: `share` of it, the rest white."""
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(color))
    return red, green, blue


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty white sheet of width x height inches; so are its coordinates."""
    fig = Figure(figsize=(width, height), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()
    return fig, ax


def label(ax: Axes, x: float, y: float, text: str, size: float = TEXT,
          color: str = INK, **options) -> None:
    """Words centred at a point; `options` as of `Axes.text` (ha, va, weight, ...)."""
    options = {"ha": "center", "va": "center_baseline", "linespacing": 1.25} | options
    ax.text(x, y, text, size=size, color=color, **options)


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str = "",
        color: str = NEUTRAL, size: float = TEXT, **options) -> Place:
    """A rounded box with words; `options` as of a patch (linestyle, hatch, ...)."""
    style = {"facecolor": tint(color), "edgecolor": color, "linewidth": 2} | options
    shape = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))
    label(ax, x + width / 2, y + height / 2, text, size)
    return Place(x, y, width, height)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float],
          color: str = INK, text: str = "", curve: float = 0.0, gap: float = 4,
          size: float = SMALL, **options) -> None:
    """An arrow with words above its middle; it ends `gap` points before both places.

    `curve` bends it: the height of the bow as a share of the length, to the right of
    the way for positive values.
    """
    style = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 2.5} | options
    ax.add_patch(FancyArrowPatch(
        start, end, color=color, shrinkA=gap, shrinkB=gap,
        connectionstyle=f"arc3,rad={curve}", **style))
    middle_x, middle_y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    bow_x, bow_y = curve * (end[1] - start[1]) / 2, -curve * (end[0] - start[0]) / 2
    label(ax, middle_x + bow_x, middle_y + bow_y + 0.08, text, size, color, va="bottom")


def cross(ax: Axes, place: Place, color: str = REMOVED) -> None:
    """Two strokes from corner to corner: this goes."""
    x, y, width, height = place
    for ends in ((y, y + height), (y + height, y)):
        ax.plot((x, x + width), ends, color=color, lw=2.5, solid_capstyle="round")


def tile(ax: Axes, x: float, y: float, width: float, height: float,
         color: str = KEPT, removed: bool = False) -> Place:
    """One cell of a map or a weight; a removed one is pale, dashed and crossed out."""
    fill, line = tint(color, 0.12 if removed else 0.55), "--" if removed else "-"
    ax.add_patch(Rectangle(
        (x, y), width, height, fc=fill, ec=color, lw=1.8, ls=line))
    place = Place(x, y, width, height)
    if removed:
        cross(ax, place, color)
    return place


def channels(ax: Axes, x: float, y: float, count: int, size: float = 0.5,
             color: str | Sequence[str] = KEPT, removed: Collection[int] = (),
             step: tuple[float, float] | None = None) -> list[Place]:
    """Feature maps as a row of square tiles, channel 0 first, from (x, y) by `step`.

    By default a column that grows downwards; a small diagonal step gives a stack, of
    which the last channel lies in front. Those of `removed` are crossed out.
    """
    dx, dy = step or (0, -1.2 * size)
    colors = [color] * count if isinstance(color, str) else color
    return [
        tile(ax, x + j * dx, y + j * dy, size, size,
             REMOVED if j in removed else colors[j], j in removed)
        for j in range(count)
    ]
