"""Four networks of the same cost: depth x width^2 x resolution^2 as a volume."""

from matplotlib.patches import Polygon
from style import KEPT, REMOVED, TEXT, TITLE, canvas, label, tint

EDGE = 1.75  # of the unpruned network
LEAN = (0.42, 0.3)  # of an edge that runs into the sheet


def corner(x, y, d, w, r):
    """The place of a point of the box: d to the right, w into the sheet, r upwards."""
    return x + EDGE * (d + LEAN[0] * w), y + EDGE * (r + LEAN[1] * w)


def draw_box(ax, x, y, size):
    """A box with edges `size` (d, w, r) and its near lower left corner at x, y."""
    d, w, r = size
    faces = [
        ([(0, 0, 0), (d, 0, 0), (d, 0, r), (0, 0, r)], 0.3),
        ([(0, 0, r), (d, 0, r), (d, w, r), (0, w, r)], 0.5),
        ([(d, 0, 0), (d, w, 0), (d, w, r), (d, 0, r)], 0.75),
    ]
    for corners, share in faces:
        places = [corner(x, y, *c) for c in corners]
        ax.add_patch(Polygon(places, fc=tint(KEPT, share), ec=KEPT, lw=2))


def draw_outline(ax, x, y):
    """The edges that one sees of the unpruned network, dashed."""
    for path in (
        [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0)],
        [(0, 0, 1), (1, 0, 1), (1, 0, 0)],
        [(1, 0, 1), (1, 1, 1)],
    ):
        places = zip(*(corner(x, y, *c) for c in path), strict=True)
        ax.plot(*places, color=REMOVED, lw=1.6, ls=(0, (4, 3)))


def draw():
    fig, ax = canvas(14, 4.7)
    third = 0.5 ** (1 / 3)
    shown = [
        ("depth alone", (0.5, 1, 1), "$d$ = 0.50"),
        ("width alone", (1, 0.5, 1), "$w$ = 0.71"),
        ("resolution alone", (1, 1, 0.5), "$r$ = 0.71"),
        ("all three", (third,) * 3, "$d$ = 0.79\n$w$ = $r$ = 0.89"),
    ]
    for i, (name, size, shares) in enumerate(shown):
        x, y = 0.75 + i * 3.4, 1.25
        draw_box(ax, x, y, size)
        draw_outline(ax, x, y)
        middle = x + EDGE * (1 + LEAN[0]) / 2
        label(ax, middle, 4.2, name, TITLE, weight="bold")
        label(ax, middle, 0.45, shares, TEXT, KEPT)
        if i == 0:
            label(ax, x + EDGE / 2, y - 0.2, "$d$", TEXT)
            label(ax, x - 0.28, y + EDGE / 2, "$r^2$", TEXT)
            label(ax, x + EDGE * 1.32, y + 0.13, "$w^2$", TEXT)
    return fig
