"""Swaps and exchangeability: only a partial swap tells a copy from a knockoff."""

from style import CONTROL, INK, KEPT, REMOVED, SCORE, TEXT, TITLE, canvas, label, tile

COUNT, SIDE, STEP, RISE = 4, 0.62, 0.9, 1.15
SWAPS = {"no swap": (), "full swap": (0, 1, 2, 3), "partial swap of 2 and 4": (1, 3)}

def correlated(kind):
    """Pairs of (row, feature) that a line joins: neighbours, across rows or not."""
    rows = (0, 1)
    return [((a, j), (b, j + 1)) for j in range(COUNT - 1) for a in rows for b in rows
            if kind == "knockoff" or a == b]

def panel(ax, x, y, kind, swapped):
    """Originals above, controls below, but for the swapped features."""
    def place(row, j):
        above = (row == 0) != (j in swapped)
        return x + j * STEP, y + (RISE if above else 0)

    for one, other in correlated(kind):
        ends = [[v + SIDE / 2 for v in place(*item)] for item in (one, other)]
        ax.plot(*zip(*ends, strict=True), color=INK, lw=2.5, zorder=0.5)
    for row, (name, color) in enumerate((("X", KEPT), (r"\tilde{X}", CONTROL))):
        for j in range(COUNT):
            spot = place(row, j)
            tile(ax, *spot, SIDE, SIDE, "white")  # hides the lines behind it
            tile(ax, *spot, SIDE, SIDE, color)
            label(ax, spot[0] + SIDE / 2, spot[1] + SIDE / 2, f"${name}_{j + 1}$", 15)

def draw():
    fig, ax = canvas(14.4, 6.6)
    width = (COUNT - 1) * STEP + SIDE
    verdicts = {"knockoff": ("same lines", "same lines"),
                "independent copy": ("same lines", "other lines")}
    for top, (kind, found) in zip((3.75, 0.75), verdicts.items(), strict=True):
        label(ax, 1.15, top + 0.9, kind.replace(" ", "\n"), TITLE, weight="bold")
        for i, (title, swapped) in enumerate(SWAPS.items()):
            x = 2.6 + 4.0 * i
            panel(ax, x, top, kind, swapped)
            if top > 2:
                label(ax, x + width / 2, 6.2, title, TITLE)
            if i:
                same = found[i - 1].startswith("same")
                word = "pass" if same else "FAIL"
                label(ax, x + width / 2, top - 0.38, f"{found[i - 1]}: {word}", TEXT,
                      SCORE if same else REMOVED, weight="bold")
    label(ax, 2.6 + width / 2, 0.37, "lines: correlated", TEXT)
    return fig
