"""Inf-FS adds up walks: one graph of five units, a walk of length 1, 2 and 3."""

import itertools

from matplotlib.patches import Circle
from style import INK, MARK, NEUTRAL, SCORE, TEXT, TITLE, arrow, canvas, label, tint

PLACES = {1: (0.6, 1.9), 2: (1.7, 3.2), 3: (3.2, 2.75), 4: (3.1, 1.0), 5: (1.6, 0.55)}
EDGES = {(1, 2): 0.9, (1, 3): 0.3, (1, 4): 0.2, (1, 5): 0.5, (2, 3): 0.7, (2, 4): 0.4,
         (2, 5): 0.2, (3, 4): 0.8, (3, 5): 0.3, (4, 5): 0.6}
WALKS = [
    ([1, 2], "length 1", r"$r \cdot 0.9$"),
    ([1, 2, 3], "length 2", r"$r^2 \cdot 0.9 \cdot 0.7$"),
    ([1, 2, 3, 4], "length 3", r"$r^3 \cdot 0.9 \cdot 0.7 \cdot 0.8$"),
]
RADIUS = 0.32


def draw_graph(ax, x, walk):
    """The graph with its left edge at x, thick edges heavy, the walk in colour."""
    places = {unit: (x + px, py + 0.75) for unit, (px, py) in PLACES.items()}
    for (i, j), weight in EDGES.items():
        ax.plot(*zip(places[i], places[j], strict=True), color=tint(NEUTRAL, 0.6),
                lw=6 * weight, solid_capstyle="round", zorder=1)
    for i, j in itertools.pairwise(walk):
        (xi, yi), (xj, yj) = places[i], places[j]
        arrow(ax, (xi, yi), (xj, yj), SCORE, gap=25, linewidth=4, mutation_scale=24,
              zorder=2)
        weight = EDGES[min(i, j), max(i, j)]
        middle = ((xi + xj) / 2, (yi + yj) / 2)
        label(ax, *middle, f"{weight:g}", TEXT, SCORE, weight="bold", zorder=4, bbox={
            "boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"})
    for unit, place in places.items():
        color = MARK if unit == walk[0] else SCORE if unit in walk else NEUTRAL
        ax.add_patch(Circle(
            place, RADIUS, facecolor=tint(color), edgecolor=color, lw=2.5, zorder=3))
        label(ax, *place, str(unit), TEXT, zorder=5)


def draw():
    fig, ax = canvas(13.2, 5)
    for column, (walk, length, value) in enumerate(WALKS):
        x = 0.15 + 4.4 * column
        draw_graph(ax, x, walk)
        label(ax, x + 1.9, 4.6, length, TITLE, weight="bold")
        label(ax, x + 1.9, 0.45, value, TITLE, SCORE)
        if column:
            label(ax, x - 0.25, 0.45, "+", TITLE)
    label(ax, 0.45, 0.45, "$s_1 =$", TITLE, INK)
    label(ax, 12.8, 0.45, r"$+ \ldots$", TITLE, INK)
    return fig
