"""Two processes share a batch: two gradients, one sum, one step."""

from matplotlib.figure import Figure
from matplotlib.patches import Circle
from style import (
    INK, KEPT, MARK, SCORE, SMALL, TITLE, arrow, box, canvas, label, tile,
    tint,
)  # fmt: skip

IMAGES, SIZE, STEP = 8, 0.42, 0.52
COLORS = [KEPT, MARK]


def draw() -> Figure:
    fig, ax = canvas(14.4, 5.5)
    label(ax, 1.0, 5.05, "one batch", weight="bold")
    label(ax, 4.4, 5.05, "two processes", weight="bold")
    label(ax, 7.65, 5.05, "two gradients", weight="bold")
    label(ax, 10.0, 5.05, "one sum", weight="bold")
    label(ax, 12.75, 5.05, "one step", weight="bold")
    for i in range(IMAGES):
        half = i // (IMAGES // 2)
        y = 4.15 - STEP * i - 0.35 * half
        tile(ax, 0.79, y, SIZE, SIZE, COLORS[half])
        label(ax, 0.79 + SIZE / 2, y + SIZE / 2, str(i + 1), SMALL)
    ax.plot([0.35, 1.65], [2.31, 2.31], color=INK, lw=2, ls=(0, (4, 3)))
    label(ax, 1.72, 2.31, "cut", SMALL, ha="left")
    middle = 2.31
    for half, (y, color) in enumerate(zip((3.0, 0.62), COLORS, strict=True)):
        worker = box(ax, 3.2, y, 2.4, 1.0, f"process {half}\nsame weights", color)
        start = 1.45, worker.left[1]
        arrow(ax, start, worker.left, color)
        label(ax, 2.33, worker.left[1] + 0.22, "4 images", SMALL)
        words = f"gradient {half},\nsum over {4 * half + 1} to {4 * half + 4}"
        slope = box(ax, 6.7, y, 1.9, 1.0, words, SCORE, SMALL)
        arrow(ax, worker.right, slope.left, color)
        side = 1 if half == 0 else -1
        arrow(ax, slope.right, (9.68, middle + side * 0.35), SCORE)
    ax.add_patch(Circle((10.0, middle), 0.45, fc=tint(SCORE), ec=SCORE, lw=2.5))
    label(ax, 10.0, middle, "+", TITLE, weight="bold")
    words = "sum / 8 images\n= gradient of\nthe batch"
    both = box(ax, 11.4, middle - 0.8, 2.7, 1.6, words, SCORE)
    arrow(ax, (10.47, middle), both.left, SCORE)
    label(ax, 12.75, 1.05, "both take the same step,\nso weights stay the same", SMALL)
    return fig
