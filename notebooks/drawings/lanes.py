"""A processor works on blocks of channels: the last block may be nearly empty."""

from matplotlib.figure import Figure
from style import INK, KEPT, NEUTRAL, REMOVED, SMALL, canvas, label, tile

LANES, SIZE = 8, 0.5
ROWS = [(16, "16 channels", "2 blocks, all full"), (17, "17 channels", "3 blocks"),
        (24, "24 channels", "3 blocks, all full")]  # fmt: skip


def draw() -> Figure:
    fig, ax = canvas(12, 3.9)
    for i, (width, name, text) in enumerate(ROWS):
        y = 2.75 - 1.15 * i
        label(ax, 1.9, y + SIZE / 2, name, ha="right", weight="bold")
        blocks = -(-width // LANES)
        for lane in range(blocks * LANES):
            x = 2.2 + SIZE * lane * 0.5 + 0.25 * (lane // LANES)
            used = lane < width
            tile(ax, x, y, SIZE * 0.5, SIZE, KEPT if used else NEUTRAL)
            if not used:
                ax.plot([x, x + SIZE / 2], [y, y + SIZE], color=NEUTRAL, lw=1.5)
        x = 2.2 + 0.25 * blocks * LANES + 0.25 * blocks + 0.1
        label(ax, x, y + SIZE / 2, text, color=INK, ha="left")
        if width % LANES:
            label(ax, 2.2 + 0.25 * 17 + 0.55, y - 0.25, "7 of 8 places idle", SMALL,
                  REMOVED, ha="left")
    return fig
