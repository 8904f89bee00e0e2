"""What pruning one filter removes: a row in its own layer, a column in the next."""

from itertools import pairwise

from style import (KEPT, NEUTRAL, REMOVED, SMALL, TITLE, Place, arrow, canvas, channels,
                   cross, label, tile)

GONE = 2  # the filter that is pruned
SIDE = 0.46  # of a tile


def weight(ax, x, top, rows, columns, removed):
    """A convolution's weight: one row per filter, one column per channel it reads."""
    for i in range(rows):
        for j in range(columns):
            gone = removed(i, j)
            place = Place(x + j * SIDE, top - (i + 1) * SIDE, SIDE, SIDE)
            tile(ax, *place, REMOVED if gone else KEPT)
            if gone:
                cross(ax, place)
    return Place(x, top - rows * SIDE, columns * SIDE, rows * SIDE)


def maps(ax, x, top, count, color=NEUTRAL, removed=()):
    """A column of feature maps, one tile per channel."""
    tiles = channels(
        ax, x, top - SIDE, count, SIDE * 0.9, color, removed, step=(0, -SIDE))
    return Place(x, tiles[-1].y, SIDE * 0.9, top - tiles[-1].y), tiles


def draw():
    fig, ax = canvas(11, 4.6)
    middle = 2.2
    x_map, _ = maps(ax, 0.5, middle + 1.5 * SIDE, 3)
    first = weight(ax, 2.0, middle + 3 * SIDE, 6, 3, lambda i, j: i == GONE)
    hidden, tiles = maps(ax, 4.75, middle + 3 * SIDE, 6, KEPT, (GONE,))
    second = weight(ax, 6.6, middle + 2 * SIDE, 4, 6, lambda i, j: j == GONE)
    y_map, _ = maps(ax, 10.1, middle + 2 * SIDE, 4)
    parts = (x_map, "x"), (first, "weight $W_1$"), (hidden, "map"), (
        second, "weight $W_2$"), (y_map, "y")
    for (start, _), (end, _) in pairwise(parts):
        arrow(ax, (start.right[0], middle), (end.left[0], middle), NEUTRAL)
    for place, text in parts:
        label(ax, place.center[0], 4.2, text, TITLE)

    column = second.x + (GONE + 0.5) * SIDE
    bold = {"size": SMALL, "color": REMOVED, "weight": "bold"}
    label(ax, first.center[0], 0.4, "cut 1: the filter,\na row of $W_1$", **bold)
    label(ax, column, 0.8, "cut 2: the slice that reads it,\na column of $W_2$", **bold)
    row = first.y + (5.5 - GONE) * SIDE
    arrow(ax, (first.right[0], row), tiles[GONE].left, REMOVED)
    top = (column, second.y + second.height)
    arrow(ax, tiles[GONE].right, top, REMOVED, curve=-0.35)
    return fig
