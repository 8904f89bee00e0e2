"""NISP's rule in numbers: a unit's score adds up |weight| x score over its readers."""

import numpy as np
from matplotlib.patches import Circle
from style import (INK, MARK, NEUTRAL, SCORE, TEXT, TITLE, arrow, canvas, label, tint)

FINAL = np.array([3, 1])
WEIGHTS = [np.array([[1, -1, 0], [0, 2, -1]]), np.array([[-2, 1], [1, -3]])]
COLUMNS = 1.6, 5.4, 9.2  # where the layers stand
RADIUS = 0.42


def draw():
    fig, ax = canvas(11.6, 6.2)
    scores = [FINAL]
    for weight in reversed(WEIGHTS):  # the rule itself
        scores.insert(0, np.abs(weight).T @ scores[0])
    heights = [(4.5, 3.1, 1.7), (4.1, 2.1), (4.1, 2.1)]

    for k, weight in enumerate(WEIGHTS):
        for (i, j), w in np.ndenumerate(weight):
            if not w:
                continue
            start = COLUMNS[k + 1], heights[k + 1][i]
            end = COLUMNS[k], heights[k][j]
            strong = k == 1 and j == 0  # the sum that is written out
            arrow(ax, start, end, MARK if strong else SCORE, gap=34,
                  linewidth=1.5 + 1.5 * abs(w), mutation_scale=16 + 4 * abs(w))
            share = 0.3 if k == 1 else 0.38  # off the middle, where edges cross
            at = [s + share * (e - s) for s, e in zip(start, end, strict=True)]
            label(ax, *at, f"{w}".replace("-", "−"), TEXT, weight="bold", bbox={
                "boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"})
    for k, values in enumerate(scores):
        for place, value in zip(heights[k], values, strict=True):
            color = MARK if (k, place) == (1, heights[1][0]) else SCORE
            ax.add_patch(Circle((COLUMNS[k], place), RADIUS, facecolor=tint(color),
                                edgecolor=color, lw=2.5, zorder=3))
            label(ax, COLUMNS[k], place, str(value), TITLE, weight="bold", zorder=4)

    arrow(ax, (0.9, 5.75), (9.9, 5.75), NEUTRAL, linewidth=4, mutation_scale=26)
    label(ax, 0.75, 5.75, "data", TEXT, NEUTRAL, ha="right", weight="bold")
    arrow(ax, (9.9, 0.45), (0.9, 0.45), SCORE, linewidth=4, mutation_scale=26)
    label(ax, 10.05, 0.45, "scores", TEXT, SCORE, ha="left", weight="bold")
    for x, name in zip(COLUMNS, ("layer 1", "layer 2", "final responses"), strict=True):
        label(ax, x, 5.3, name, TEXT, INK)
    label(ax, 10.6, 3.1, "scored\nby Inf-FS", TEXT, INK)
    label(ax, COLUMNS[1], 1.15, r"$7 = |{-}2| \cdot 3 + |1| \cdot 1$", TITLE)
    return fig
