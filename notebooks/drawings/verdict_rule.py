"""The rule that turns an interval of differences into a verdict."""

from matplotlib.figure import Figure
from style import CONTROL, INK, KEPT, MARK, NEUTRAL, REMOVED, SCORE, canvas, label, tint

# verdict, mean, plain half width, corrected half width, colour
CASES = [
    ("reproduced", 0.85, 0.30, 0.50, SCORE),
    ("direction only", 0.45, 0.32, 0.62, KEPT),
    ("no difference", 0.03, 0.12, 0.20, NEUTRAL),
    ("undecided", 0.15, 0.55, 0.80, MARK),
    ("contradicted", -0.75, 0.28, 0.45, REMOVED),
]
ZERO, SCALE = 7.2, 2.9  # place of 0, inches a point


def draw() -> Figure:
    fig, ax = canvas(12, 5.8)
    left, right = (ZERO + SCALE * x for x in (-0.3, 0.3))
    ax.fill_betweenx([0.75, 5.0], left, right, color=tint(NEUTRAL, 0.25), lw=0)
    ax.plot([ZERO, ZERO], [0.75, 5.0], color=INK, lw=2)
    for x, text in ((-0.3, "−0.3"), (0, "0"), (0.3, "0.3")):
        label(ax, ZERO + SCALE * x, 5.25, text)
    label(ax, ZERO, 0.35, "difference between two methods, in points", color=NEUTRAL)
    for i, (verdict, mean, plain, corrected, color) in enumerate(CASES):
        y, x = 4.55 - 0.85 * i, ZERO + SCALE * mean
        label(ax, 3.2, y, verdict, color=color, ha="right", weight="bold")
        for half, lw in ((corrected, 3), (plain, 10)):
            ax.plot([x - SCALE * half, x + SCALE * half], [y, y], color=color, lw=lw,
                    solid_capstyle="butt")
        ax.plot(x, y, "o", color="white", mec=color, mew=3, ms=13)
    x, y = ZERO + SCALE * 0.85, 4.55
    label(ax, x + 0.35, y - 0.42, "thick: plain    thin: corrected", 13, CONTROL)
    return fig
