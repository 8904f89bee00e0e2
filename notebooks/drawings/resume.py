"""A run that goes straight on, and one that is killed and takes up its checkpoint."""

from style import (
    KEPT,
    MARK,
    NEUTRAL,
    REMOVED,
    SCORE,
    SMALL,
    TEXT,
    Place,
    arrow,
    box,
    canvas,
    cross,
    label,
)


def draw():
    fig, ax = canvas(11, 4.2)
    rows = {"straight": 3.1, "killed": 1.75, "resumed": 0.4}
    for name, y in rows.items():
        label(ax, 1.5, y + 0.35, name, TEXT, ha="right", weight="bold")
    box(ax, 1.9, rows["straight"], 3.0, 0.7, "epoch 1", KEPT)
    box(ax, 5.0, rows["straight"], 3.0, 0.7, "epoch 2", KEPT)
    box(ax, 1.9, rows["killed"], 3.0, 0.7, "epoch 1", KEPT)
    box(ax, 5.0, rows["killed"], 1.0, 0.7, "", NEUTRAL)
    cross(ax, Place(6.1, rows["killed"] + 0.1, 0.5, 0.5), REMOVED)
    label(ax, 6.8, rows["killed"] + 0.35, "this part\nis lost", SMALL, REMOVED,
          ha="left")
    box(ax, 5.0, rows["resumed"], 3.0, 0.7, "epoch 2, again", KEPT)
    saved = box(ax, 2.5, rows["resumed"] + 0.05, 1.8, 0.6, "checkpoint", MARK, SMALL)
    arrow(ax, (4.9, rows["killed"]), saved.top, MARK, gap=6)
    arrow(ax, saved.right, (5.0, rows["resumed"] + 0.35), MARK)
    label(ax, 9.6, 2.1, "the same\nweights,\nbit by bit", TEXT, SCORE, weight="bold")
    arrow(ax, (8.0, rows["straight"] + 0.35), (9.6, 2.65), SCORE, curve=-0.35)
    arrow(ax, (8.0, rows["resumed"] + 0.35), (9.6, 1.5), SCORE, curve=0.35)
    return fig
