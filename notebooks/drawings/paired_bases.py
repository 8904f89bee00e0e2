"""Why methods are compared on one base: what a base is worth cancels."""

from matplotlib.figure import Figure
from style import CONTROL, INK, KEPT, MARK, NEUTRAL, SMALL, arrow, box, canvas, label

PAIRS = [("base 0", 81.2, 80.5), ("base 1", 78.4, 77.9), ("base 2", 83.0, 82.1)]
LOW, HIGH = 77.0, 84.0  # percent, an example


def draw() -> Figure:
    fig, ax = canvas(12, 6.2)
    best = [left for _, left, _ in PAIRS]
    label(ax, 6.0, 0.35, f"Bases differ by {max(best) - min(best):.1f} points. On each "
          "base, the two methods differ by less than one.", color=NEUTRAL)
    label(ax, 1.4, 5.8, "base", color=NEUTRAL)
    label(ax, 4.4, 5.8, "pruned, then fine-tuned", color=NEUTRAL)
    label(ax, 8.2, 5.8, "accuracy", color=NEUTRAL)
    label(ax, 11.0, 5.8, "difference", color=NEUTRAL)
    for i, (name, left, right) in enumerate(PAIRS):
        y = 4.3 - 1.5 * i
        base = box(ax, 0.4, y, 2.0, 0.9, name)
        for text, color, top in (("method A", KEPT, 0.5), ("method B", CONTROL, -0.1)):
            net = box(ax, 3.5, y + top, 1.9, 0.5, text, color, SMALL)
            arrow(ax, base.right, net.left, color)
        ax.plot([6.4, 10.0], [y + 0.45] * 2, color=NEUTRAL, lw=1.5)
        places = [6.4 + 3.6 * (v - LOW) / (HIGH - LOW) for v in (left, right)]
        ax.plot(places, [y + 0.45] * 2, color=MARK, lw=7, solid_capstyle="butt")
        for x, color, marker in zip(places, (KEPT, CONTROL), "os", strict=True):
            ax.plot(x, y + 0.45, marker, color=color, ms=13)
        label(ax, 11.0, y + 0.45, f"{left - right:+.1f}", color=INK, weight="bold")
    return fig
