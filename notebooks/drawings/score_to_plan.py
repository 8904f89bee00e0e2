"""From scores to a plan to a shrunk layer whose outputs are scattered."""

from style import (KEPT, NEUTRAL, REMOVED, SCORE, TEXT, TITLE, Place, arrow, canvas,
                   channels, cross, label, tile, tint)

SCORES = (0.9, 0.25, 1.3, 1.05, 0.4, 0.7)
NAMES = "abcdef"
GONE = (1, 4)  # the two lowest
SIDE, STEP, BASE = 0.6, 0.72, 4.55  # of tiles; top of the column of channels


def bars(ax, x):
    """One bar per channel, lying beside the channel's place in the plan."""
    for j, score in enumerate(SCORES):
        color = REMOVED if j in GONE else SCORE
        place = Place(x, BASE - j * STEP, 1.7 * score, SIDE)
        ax.barh(place.y + SIDE / 2, place.width, SIDE, left=x, color=tint(color, 0.55),
                edgecolor=color, lw=1.8, ls="--" if j in GONE else "-")
        label(ax, x - 0.15, place.y + SIDE / 2, NAMES[j], TEXT, ha="right")
        if j in GONE:
            cross(ax, place)


def draw():
    fig, ax = canvas(14, 6.4)
    middle = BASE - 2.5 * STEP + SIDE / 2
    kept = [j for j in range(len(SCORES)) if j not in GONE]
    x_bars, x_plan, x_small, x_wide, x_stream = 0.7, 4.3, 7.1, 9.9, 12.7

    bars(ax, x_bars)
    step = (0, -STEP)
    plan = channels(ax, x_plan, BASE, 6, SIDE, KEPT, GONE, step)
    small = channels(ax, x_small, BASE - STEP, 4, SIDE, KEPT, step=step)
    wide = []
    for j in range(6):
        color = NEUTRAL if j in GONE else KEPT
        place = tile(ax, x_wide, BASE - j * STEP, SIDE, SIDE, color)
        label(ax, *place.center, "0" if j in GONE else NAMES[j], TEXT)
        wide.append(place)
    for place, j in zip(small, kept, strict=True):
        label(ax, *place.center, NAMES[j], TEXT)
        arrow(ax, place.right, wide[j].left, KEPT, linewidth=1.8)
    for j, place in enumerate(plan):
        if j not in GONE:
            label(ax, *place.center, NAMES[j], TEXT)
    stream = channels(ax, x_stream, BASE, 6, SIDE, NEUTRAL, step=step)

    arrow(ax, (3.1, middle), (x_plan, middle), NEUTRAL)
    arrow(ax, (x_plan + SIDE, middle), (x_small, middle), NEUTRAL)
    label(ax, (x_wide + SIDE + x_stream) / 2, middle, "+", 34, weight="bold")
    heads = ((x_bars + 0.9, "scores $I$"), (x_plan + SIDE / 2, "plan"),
             (x_small + SIDE / 2, "shrunk layer"), (x_wide + SIDE / 2, "scattered"),
             (stream[0].center[0], "stream"))
    feet = ("two lowest go", "keep a, c, d, f", "computes\n4 channels",
            "zeros in\nthe gaps", "keeps its\n6 channels")
    for (x, head), foot in zip(heads, feet, strict=True):
        label(ax, x, 5.85, head, TITLE, weight="bold")
        label(ax, x, 0.45, foot, TEXT)
    return fig
