"""What a channel is worth: the loss without it, less the loss with it."""

from style import (
    INK,
    KEPT,
    NEUTRAL,
    REMOVED,
    SCORE,
    TEXT,
    TITLE,
    arrow,
    box,
    canvas,
    channels,
    label,
)


def draw():
    fig, ax = canvas(11.5, 4.2)
    ends = []
    for y, removed, name in ((2.4, (), "$L$"), (0.25, (2,), "$L_j$")):
        images = box(ax, 0.3, y + 0.35, 1.4, 0.8, "images", NEUTRAL)
        conv = box(ax, 2.2, y + 0.15, 1.9, 1.2, "conv,\nBatchNorm", KEPT)
        arrow(ax, images.right, conv.left)
        tiles = channels(ax, 4.7, y + 0.475, 4, 0.55, KEPT, removed, step=(0.65, 0))
        arrow(ax, conv.right, tiles[0].left)
        rest = box(ax, 7.75, y + 0.15, 1.6, 1.2, "rest of the\nnetwork", KEPT)
        arrow(ax, tiles[-1].right, rest.left)
        loss = box(ax, 9.85, y + 0.35, 1.2, 0.8, name, SCORE, TITLE)
        arrow(ax, rest.right, loss.left)
        ends.append(loss)
        if removed:
            label(ax, tiles[2].center[0], y + 0.15, "channel $j$ set to 0", TEXT - 2,
                  REMOVED, weight="bold")
    arrow(ax, ends[1].top, ends[0].bottom, SCORE, arrowstyle="<|-|>")
    label(ax, 10.3, 2.0, "worth of channel $j$:  $L_j - L$", TEXT, SCORE, ha="right",
          weight="bold")
    label(ax, 0.3, 3.95, "the whole network", TEXT, INK, ha="left")
    label(ax, 0.3, 1.8, "one channel silenced", TEXT, INK, ha="left")
    return fig
