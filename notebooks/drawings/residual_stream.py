"""Three ways to prune layers that feed an addition: tie, keep, scatter."""

from matplotlib.patches import Circle
from style import INK, KEPT, NEUTRAL, SMALL, TITLE, arrow, canvas, channels, label

SIDE = 0.36  # of a tile
CASES = [  # name; removed in the stream, inside the block, of its output; what happens
    ("tie", {1}, {2}, {1}, "the stream loses the channel\nin every layer that writes"),
    ("keep", (), {2}, (), "the stream stays whole;\nonly the inside is pruned"),
    ("scatter", (), {2}, {1}, "the output is narrower;\n0 is added where it lost one"),
]


def column(ax, x, y, removed, color=KEPT):
    tiles = channels(ax, x, y, 4, SIDE, color, removed, step=(0, -1.12 * SIDE))
    return tiles[0].top, tiles[-1].bottom, (x, (y + tiles[-1].y + SIDE) / 2)


def panel(ax, x, name, stream, inside, output, text):
    label(ax, x + 1.75, 5.25, name, TITLE, weight="bold")
    label(ax, x + 1.75, 0.45, text, SMALL)
    _, bottom, (_, middle) = column(ax, x + 0.1, 4.3, stream)
    column(ax, x + 3.05, 4.3, stream)
    _, _, inner = column(ax, x + 0.85, 2.3, inside, NEUTRAL)
    top, _, outer = column(ax, x + 1.85, 2.3, output)
    plus = (top[0], middle)
    ax.add_patch(Circle(plus, 0.2, facecolor="white", edgecolor=INK, lw=2, zorder=3))
    label(ax, *plus, "+", TITLE, zorder=4)
    arrow(ax, (x + 0.1 + SIDE, middle), (plus[0] - 0.2, middle))
    arrow(ax, (plus[0] + 0.2, middle), (x + 3.05, middle))
    arrow(ax, bottom, inner, curve=0.35)
    arrow(ax, (inner[0] + SIDE, inner[1]), outer)
    arrow(ax, top, (plus[0], middle - 0.2), text="")
    label(ax, x + 0.1 + SIDE / 2, 4.82, "$x$", SMALL + 2)
    label(ax, x + 3.05 + SIDE / 2, 4.82, "$x + F(x)$", SMALL + 2)
    label(ax, x + 0.85 + SIDE / 2, 2.82, "inside", SMALL)
    label(ax, x + 2.35, 2.5, "$F(x)$", SMALL + 2, ha="left")


def draw():
    fig, ax = canvas(12, 5.6)
    for number, case in enumerate(CASES):
        x = 0.2 + 4.0 * number
        panel(ax, x, *case)
        if number:
            ax.plot((x - 0.25, x - 0.25), (0.3, 5.3), color=NEUTRAL, lw=1)
    return fig
