"""One channel, three judges: its own weights, its own responses, all of its readers."""

from itertools import pairwise

from style import (INK, KEPT, MARK, NEUTRAL, SMALL, TEXT, TITLE, arrow, box, canvas,
                   label, tint)

PARTS = "filter", "channel", "layer 2", "layer 3", "final\nresponses"
JUDGES = [
    ("L1", "its own weights", {0}),
    ("layer by layer", "its own responses to images", {1}),
    ("NISP", "the weights of all its readers", {2, 3, 4}),
]
WIDTH, STEP = 1.5, 2.05


def draw():
    fig, ax = canvas(13.2, 6.6)
    for row, (judge, looks_at, seen) in enumerate(JUDGES):
        y = 4.85 - 2.1 * row
        label(ax, 0.3, y + 0.5, judge, TITLE, INK, ha="left", weight="bold")
        places = []
        for k, name in enumerate(PARTS):
            color = KEPT if k in seen else NEUTRAL
            style = {} if k in seen else {"facecolor": "white", "linestyle": "--"}
            if k == 1:
                style["edgecolor"] = MARK
                style["linestyle"], style["linewidth"] = "-", 4
                style["facecolor"] = tint(KEPT) if k in seen else "white"
            places.append(box(ax, 2.95 + STEP * k, y, WIDTH, 1.0, name, color, TEXT,
                              **style))
        for k, (a, b) in enumerate(pairwise(places)):
            back = k >= 1 and 2 in seen  # NISP's scores come down against the data
            ends = (b.left, a.right) if back else (a.right, b.left)
            arrow(ax, *ends, KEPT if back else NEUTRAL)
        middle = (places[min(seen)].left[0] + places[max(seen)].right[0]) / 2
        label(ax, middle, y - 0.32, looks_at, TEXT, KEPT, weight="bold")
    arrow(ax, (places[1].center[0], 6.45), (places[1].center[0], 5.87), MARK, gap=0)
    label(ax, places[1].center[0] + 0.15, 6.3, "which channel goes?", SMALL, INK,
          ha="left", weight="bold")
    return fig
