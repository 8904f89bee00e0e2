"""The rooms of lib/: to the right the way of the data, upwards what rests on what."""

from itertools import pairwise

from matplotlib.patches import Polygon
from style import (
    CONTROL,
    INK,
    KEPT,
    MARK,
    NEUTRAL,
    SCORE,
    SMALL,
    TEXT,
    arrow,
    box,
    canvas,
    label,
    tint,
)

LEFT, WIDTH, FLOOR = 1.55, 1.6, 0.82  # of the first column, of a column, of a floor
STEPS = ["data", "model", "score", "plan", "shrink", "recover"]
FLOORS = [  # from the ground up: colour, rooms as (first column, columns, name)
    ("ground", NEUTRAL, [(0, 1, "messages"), (1, 1, "paths"), (2, 1, "settings"),
                         (3, 2, "graph"), (5, 1, "kernels")]),
    ("stock", KEPT, [(0, 1, "data"), (1, 1, "models, cost"), (2, 1, "baselines"),
                     (3, 1, "plan")]),
    ("tools", KEPT, [(3, 1, "latency"), (4, 1, "surgery"), (5, 1, "train")]),
    ("stages", KEPT, [(0, 6, "stages")]),
    ("papers", SCORE, [(2, 1, "scop"), (3, 1, "nisp"), (4, 1, "map3d")]),
]  # fmt: skip
ROOF = ["criteria", "verdicts", "ledger", "report"]


def draw():
    fig, ax = canvas(11.5, 6.6)
    ground, right = 1.15, LEFT + len(STEPS) * WIDTH
    for level, (name, color, rooms) in enumerate(FLOORS):
        y = ground + level * FLOOR
        ax.axhline(y, LEFT / 11.5, right / 11.5, color=INK, lw=1)
        label(ax, LEFT - 0.25, y + FLOOR / 2, name, SMALL, ha="right")
        for first, columns, room in rooms:
            x = LEFT + first * WIDTH + 0.08
            box(ax, x, y + 0.13, columns * WIDTH - 0.16, FLOOR - 0.26, room, color,
                SMALL + 1)
    top = ground + len(FLOORS) * FLOOR
    for x in (LEFT, right):
        ax.plot((x, x), (ground, top), color=INK, lw=2)
    ax.add_patch(Polygon(
        [(LEFT - 0.3, top), (LEFT + 1.6, top + 1.05), (right - 1.6, top + 1.05),
         (right + 0.3, top)], facecolor=tint(MARK, 0.15), edgecolor=INK, lw=2))
    label(ax, LEFT - 0.25, top + 0.5, "roof", SMALL, ha="right")
    for column, room in enumerate(ROOF):
        box(ax, LEFT + (column + 1) * WIDTH + 0.08, top + 0.23, WIDTH - 0.16, 0.56,
            room, MARK, SMALL + 1)

    spots = [LEFT + (column + 0.5) * WIDTH for column in range(len(STEPS))]
    for start, end in pairwise(spots):
        arrow(ax, (start + 0.5, 0.62), (end - 0.5, 0.62), CONTROL, gap=2)
    for x, step in zip(spots, STEPS):
        label(ax, x, 0.62, step, TEXT, CONTROL, weight="bold")
    label(ax, (LEFT + right) / 2, 0.2, "the way of the data", SMALL, CONTROL)
    return fig
