"""Depth, width and resolution: what each pruning takes away from one network."""

from style import (KEPT, NEUTRAL, REMOVED, SMALL, TEXT, TITLE, Place, arrow, canvas,
                   cross, label, tile)

SIDE = 0.5  # of a feature map
STEP = 0.62  # from channel to channel
GAP = 0.95  # from block to block
BLOCKS, CHANNELS = 4, 4
MIDDLE = 2.95


def draw_map(ax, x, y, size=SIDE, color=KEPT, removed=False):
    """One feature map in its place; a smaller one leaves the old outline, dashed."""
    if size < SIDE:
        tile(ax, x, y, SIDE, SIDE, REMOVED)
        ax.patches[-1].set(facecolor="white", linestyle="--")
    tile(ax, x, y, size, size, REMOVED if removed else color)
    if removed:
        ax.patches[-1].set(alpha=0.35, linestyle="--")


def draw_network(ax, x, *, blocks=(), channels=(), size=SIDE):
    """An image and blocks of channels; some blocks or channels are crossed out."""
    top = MIDDLE + (CHANNELS - 1) / 2 * STEP
    draw_map(ax, x, MIDDLE - SIDE / 2, size, NEUTRAL)
    for b in range(BLOCKS):
        left = x + (b + 1) * GAP
        arrow(ax, (left - GAP + SIDE, MIDDLE), (left, MIDDLE), NEUTRAL, lw=1.5,
              mutation_scale=11, gap=3)
        for c in range(CHANNELS):
            place = Place(left, top - c * STEP - SIDE / 2, SIDE, SIDE)
            gone = b in blocks or c in channels
            draw_map(ax, place.x, place.y, size, removed=gone)
            if c in channels:
                cross(ax, place)
        if b in blocks:
            bottom = top - (CHANNELS - 1) * STEP - SIDE / 2
            cross(ax, Place(left, bottom, SIDE, (CHANNELS - 1) * STEP + SIDE))


def draw():
    fig, ax = canvas(14.6, 5.2)
    panels = [
        (0.35, "depth $d$", "fewer blocks", "cost falls like $d$", {"blocks": (1, 3)}),
        (5.15, "width $w$", "fewer channels everywhere", "cost falls like $w^2$",
         {"channels": (2, 3)}),
        (9.95, "resolution $r$", "smaller image, smaller maps",
         "cost falls like $r^2$", {"size": 0.34}),
    ]
    for x, name, what, price, change in panels:
        middle = x + 2.15
        label(ax, middle, 4.85, name, TITLE, weight="bold")
        draw_network(ax, x, **change)
        label(ax, middle, 1.2, what, TEXT)
        label(ax, middle, 0.72, price, TEXT, KEPT)
        label(ax, x + SIDE / 2, MIDDLE - 0.52, "image", SMALL)
    label(ax, 7.3, 0.22, "dashed: what was there before", SMALL, REMOVED)
    return fig
