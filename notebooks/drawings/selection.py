"""The selection layer: each channel of the image is mixed with its control's."""

from style import (CONTROL, KEPT, MARK, NEUTRAL, SCORE, TEXT, TITLE, arrow, box, canvas,
                   channels, label)

SIDE = 0.62
TOP, LOW = 4.7, 1.7  # heights of the two streams
FAKE = [r"$\tilde{A}_1$", r"$\tilde{A}_2$", r"$\tilde{A}_3$"]


def stream(ax, x, middle, color, names):
    """Three channels below one another around a height."""
    tiles = channels(ax, x, middle + 0.53, 3, SIDE, color, step=(0, -0.84))
    for place, name in zip(tiles, names, strict=True):
        label(ax, *place.center, name, 15)
    return tiles


def mix(ax):
    """Channels of both before the mixture, and after it."""
    real = stream(ax, 4.6, TOP, KEPT, ["$A_1$", "$A_2$", "$A_3$"])
    fake = stream(ax, 4.6, LOW, CONTROL, FAKE)
    mixed = stream(ax, 8.3, TOP, KEPT, ["$A'_1$", "$A'_2$", "$A'_3$"])
    same = stream(ax, 8.3, LOW, CONTROL, FAKE)
    for a, b, out, on in zip(real, fake, mixed, same, strict=True):
        arrow(ax, a.right, out.left, KEPT)
        arrow(ax, b.right, out.left, CONTROL, ls="--", lw=1.6, mutation_scale=12)
        arrow(ax, b.right, on.left, CONTROL)
    label(ax, 6.2, TOP + 1.14, r"$\times\;\beta_j$", TITLE, KEPT)
    label(ax, 5.72, 3.2, r"$\times\,(1-\beta_j)$", 18, CONTROL, ha="right")


def draw():
    fig, ax = canvas(14, 7.4)
    mix(ax)
    tall = {"y": LOW - 1.1, "width": 1.5, "height": TOP - LOW + 2.2}
    image = box(ax, 0.3, TOP - 0.45, 1.5, 0.9, "images", KEPT)
    control = box(ax, 0.3, LOW - 0.45, 1.5, 0.9, "controls", CONTROL)
    conv = box(ax, 2.5, text="one\nconvo-\nlution", **tall)
    norm = box(ax, 9.6, text="Batch-\nNorm\nof both", **tall)
    rest = box(ax, 11.8, TOP - 0.6, 1.8, 1.2, "next layers,\nloss")
    formula = r"$A'_j = \beta_j\,A_j + (1-\beta_j)\,\tilde{A}_j$"
    rule = box(ax, 4.5, 6.35, 4.5, 0.85, formula, MARK, TITLE)

    for height, start in ((TOP, image), (LOW, control)):
        arrow(ax, start.right, (conv.x, height), NEUTRAL)
        arrow(ax, (conv.right[0], height), (4.6, height), NEUTRAL)
        arrow(ax, (8.3 + SIDE, height), (norm.x, height), NEUTRAL)
    arrow(ax, (norm.right[0], TOP), rest.left, NEUTRAL)
    arrow(ax, (norm.right[0], LOW), (11.7, LOW), NEUTRAL)
    label(ax, 12.75, LOW, "not in\nthe loss", TEXT, CONTROL)
    label(ax, 6.75, 0.22, "controls pass on unchanged", TEXT, CONTROL)
    corner = (rest.top[0], rule.right[1])
    ax.plot(*zip(rest.top, corner, strict=True), color=SCORE, lw=2.5, ls="--")
    arrow(ax, corner, rule.right, SCORE, r"the gradient trains $\beta$ only",
          size=TEXT, ls="--")
    return fig
