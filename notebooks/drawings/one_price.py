"""The Lagrange multiplier as one price: one water level in three vessels."""

import numpy as np
from style import (INK, KEPT, MARK, REMOVED, SMALL, TEXT, TITLE, arrow, canvas, label,
                   tint)

BASE, HEIGHT, WIDTH = 1.75, 2.6, 3.0  # of a vessel
LEVEL = BASE + 0.95  # the price


def draw_vessel(ax, x, name, price, kept_words):
    """A vessel: what the next percent of cost is worth, by the share that is kept."""
    right, top = x + WIDTH, BASE + HEIGHT
    ax.fill_between((x, right), BASE, LEVEL, color=tint(KEPT, 0.22), lw=0)
    share = np.linspace(0, 1, 200)
    worth = BASE + price(share)
    ax.plot(x + WIDTH * share, worth, color=INK, lw=3)
    met = share[worth >= LEVEL][-1]
    at = x + WIDTH * met
    ax.plot((x, x, right, right), (top, BASE, BASE, top), color=INK, lw=2.5)
    ax.plot((x, at), (BASE - 0.14,) * 2, color=KEPT, lw=9, solid_capstyle="butt")
    if met < 1:
        ax.plot((at, right), (BASE - 0.14,) * 2, color=REMOVED, lw=9,
                ls=(0, (0.6, 0.4)))
        ax.plot((at, at), (BASE - 0.14, LEVEL), color=KEPT, lw=2, ls=":")
    ax.plot(at, LEVEL, "o", ms=13, mfc=MARK, mec=INK, mew=1.5, zorder=5)
    label(ax, x + WIDTH / 2, top + 0.35, name, TITLE, weight="bold")
    label(ax, x + WIDTH * met / 2, BASE - 0.48, kept_words, SMALL, KEPT, weight="bold")
    if met < 0.95:
        label(ax, (at + right) / 2, BASE - 0.48, "removed", SMALL, REMOVED,
              weight="bold")


def draw():
    fig, ax = canvas(13, 5.1)
    left = 1.15
    gap = WIDTH + 0.75
    vessels = [
        ("depth $d$", lambda x: 2.4 * (1 - x) ** 1.4 + 0.25),
        ("width $w$", lambda x: 1.7 * (1 - x**1.7) + 0.3),
        ("resolution $r$", lambda x: 2.3 - 0.95 * x**3),
    ]
    for i, (name, price) in enumerate(vessels):
        words = "kept" if i < 2 else "all kept"
        draw_vessel(ax, left + i * gap, name, price, words)
    end = left + 2 * gap + WIDTH
    ax.plot((left - 0.25, end + 0.25), (LEVEL, LEVEL), color=KEPT, lw=3, ls="--")
    label(ax, end + 0.35, LEVEL, "one\nprice $\\mu$", TEXT, KEPT, ha="left",
          weight="bold")
    label(ax, 0.55, BASE + HEIGHT / 2, "accuracy per cost", TEXT, rotation=90)
    for i in range(3):
        x = left + i * gap
        arrow(ax, (x + 0.6, 0.72), (x + WIDTH - 0.6, 0.72), INK, lw=1.5,
              mutation_scale=12)
        label(ax, x + WIDTH / 2, 0.42, "share kept", SMALL)
    return fig
