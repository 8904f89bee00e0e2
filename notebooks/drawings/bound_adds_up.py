"""Why NISP's bound is loose: weights of both signs cancel, absolute weights add up."""

from matplotlib.patches import Circle
from style import (INK, KEPT, MARK, NEUTRAL, REMOVED, TEXT, TITLE, arrow, canvas, label,
                   tint)

RADIUS = 0.45
HALVES = [  # title, colours of the two ways, what the response does
    ("in the network", (KEPT, REMOVED), "2 − 2 = 0"),
    ("in the bound", (MARK, MARK), "2 + 2 = 4"),
]


def unit(ax, place, color, text=""):
    ax.add_patch(Circle(
        place, RADIUS, facecolor=tint(color), edgecolor=color, lw=2.5, zorder=3))
    label(ax, *place, text, TITLE, weight="bold", zorder=4)


def draw():
    fig, ax = canvas(13, 4.9)
    for half, (title, colors, change) in enumerate(HALVES):
        x = 1.1 + 6.6 * half
        start, end, middle = (x, 2.2), (x + 4.2, 2.2), x + 2.1
        label(ax, middle, 4.5, title, TITLE, weight="bold")
        for height, sign, color in zip((3.2, 1.2), "+−", colors, strict=True):
            via = middle, height
            arrow(ax, start, via, NEUTRAL, gap=36)
            arrow(ax, via, end, color, gap=36, linewidth=4, mutation_scale=24)
            unit(ax, via, NEUTRAL)
            at = (via[0] + end[0]) / 2 - 0.15, 0.54 * height + 0.46 * end[1]
            text = f"|{sign}2|" if half else f"{sign}2"
            label(ax, *at, text, TEXT, color, weight="bold", bbox={
                "boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"})
            way = (start[0] + via[0]) / 2, (start[1] + height) / 2
            label(ax, *way, "1", TEXT, NEUTRAL, weight="bold", bbox={
                "boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"})
        unit(ax, start, REMOVED, "×")
        unit(ax, end, NEUTRAL, change[-1])
        label(ax, start[0], 1.4, "removed", TEXT, REMOVED)
        label(ax, end[0], 1.4, f"change\n{change}", TEXT, INK, va="top")
    return fig
