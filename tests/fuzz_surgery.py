"""Random nets, random plans: the shrunk network is exact, or refused in a line.

    python tests/fuzz_surgery.py 0 10000          # cases by their seeds

A case is a program of steps, drawn from everything that was once cut wrongly and much
that never was, and a plan. Three outputs are compared in float64: of `surgery.shrink`,
of `surgery.mask`, and of the whole network with hooks that silence what the plan
removes, which shares no code with `lib.surgery`.
"""

import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import torch
import torch.nn.functional as F
from torch import nn

from lib import baselines, surgery
from lib import plan as plans
from lib.plan import Plan
from lib.surgery.movers import Bridge, Scatter

SHAPE = (3, 8, 8)


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


@dataclass
class Record:
    first: object
    second: object = None


class Standardised(nn.Conv2d):
    """Changes its weight before it uses it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), True), bias)


class Residual(nn.Module):
    """A block that may be dropped."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn(self.conv(x))


class Pad(nn.Module):
    """Zeros in front of the channels and behind them."""

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 1, 3))


class Flip(nn.Module):
    """Hands the channels on from last to first."""

    def forward(self, x):
        return x.flip(1)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = conv(width, 4, 1), conv(4, width, 1)

    def forward(self, x):
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Clamped(nn.Module):
    """Squeezes channels by what it makes of their number."""

    def forward(self, x):
        return F.hardtanh(x, -x.shape[1], x.shape[1])


def hooked(layer, *, before=False, by=None):
    """A layer with a hook that scales, flips or only looks."""
    act = {"scale": lambda x: 2 * x, "flip": lambda x: x.flip(1), "look": lambda x: x}[
        by
    ]
    if before:
        layer.register_forward_pre_hook(lambda m, args: (act(args[0]),))
    else:
        layer.register_forward_hook(lambda m, args, out: act(out))
    return layer


# name -> what is registered for a width; each hands on as many channels as it reads
PARTS = {
    "conv": lambda w: conv(w, w),
    "norm": lambda w: nn.Sequential(conv(w, w, 1), nn.BatchNorm2d(w), nn.ReLU()),
    "preact": lambda w: nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), conv(w, w)),
    "prelu": lambda w: nn.Sequential(conv(w, w), nn.PReLU(w)),
    "slope": lambda w: nn.Sequential(conv(w, w), nn.PReLU()),
    "depthwise": lambda w: nn.Sequential(conv(w, w, groups=w, bias=False), nn.ReLU()),
    "multiplier": lambda w: nn.Sequential(
        conv(w, 2 * w, groups=w, bias=False), nn.ReLU(), conv(2 * w, w, 1)
    ),
    "transposed": lambda w: nn.Sequential(
        nn.ConvTranspose2d(w, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU()
    ),
    "widened": lambda w: nn.Sequential(  # a U-Net's way up, and down again
        nn.ConvTranspose2d(w, 2 * w, 2, stride=2),
        nn.ReLU(),
        conv(2 * w, w),
        nn.MaxPool2d(2),
    ),
    "pixels": lambda w: nn.Sequential(
        conv(w, 4 * w), nn.PixelShuffle(2), nn.ReLU(), conv(w, w), nn.AvgPool2d(2)
    ),
    "unpixels": lambda w: nn.Sequential(
        conv(w, w), nn.PixelUnshuffle(2), conv(4 * w, w), nn.Upsample(scale_factor=2)
    ),
    "transposed in groups": lambda w: nn.ConvTranspose2d(
        w, w, 3, padding=1, groups=2 if w % 2 == 0 else 1
    ),
    "grouped": lambda w: conv(w, w, groups=2 if w % 2 == 0 else 1),
    "shuffle": lambda w: nn.ChannelShuffle(2 if w % 2 == 0 else 1),
    "flip": lambda w: Flip(),
    "gate": Gated,
    "response": lambda w: nn.LocalResponseNorm(3),
    "dropout": lambda w: nn.Dropout(0.3),
    "groupnorm": lambda w: nn.GroupNorm(1, w),
    "softmax": lambda w: nn.Softmax(1),
    "standardised": lambda w: Standardised(w, w, 3, padding=1),
    "weightnorm": lambda w: nn.utils.parametrizations.weight_norm(conv(w, w)),
    "biasnorm": lambda w: nn.utils.parametrizations.weight_norm(conv(w, w), "bias"),
    "prehook": lambda w: hooked(conv(w, w), before=True, by="scale"),
    "prehook flip": lambda w: hooked(conv(w, w), before=True, by="flip"),
    "hook": lambda w: hooked(conv(w, w), by="scale"),
    "hook flip": lambda w: hooked(conv(w, w), by="flip"),
    "hook look": lambda w: hooked(conv(w, w), by="look"),
    "clamped": lambda w: Clamped(),
    "block": Residual,
    "gain": lambda w: nn.ParameterList([torch.rand(w, 1, 1) + 0.5]),
    "gain summed": lambda w: nn.ParameterList([torch.rand(w, 1, 1) + 0.5]),
    "gain normed": lambda w: nn.ParameterList([torch.rand(w, 1, 1) + 0.5]),
    "shared prelu": lambda w: nn.ModuleList([conv(w, w), nn.PReLU(w)]),
    "shared norm": lambda w: nn.ModuleList([conv(w, w), nn.BatchNorm2d(w)]),
    "called twice": lambda w: nn.ModuleList([conv(w, w), nn.BatchNorm2d(w)]),
    "scaled by weight": lambda w: conv(w, w),
    "decoder": lambda w: conv(w, w, bias=False),
    "branch": lambda w: nn.Identity(),
    "alpha": lambda w: nn.Identity(),
    "constant": lambda w: nn.Identity(),
    "channel mean": lambda w: nn.Identity(),
    "halves": lambda w: nn.Identity(),
    "stored": lambda w: nn.Identity(),
    "sigmoid": lambda w: nn.Sequential(conv(w, w), nn.Sigmoid()),
}
WIDE = ["add", "cat", "pad", "zeros", "dense"]  # these may change the width
ACTS = {  # steps that are not just a call of what is registered
    "gain": lambda p, x: x * p[0],
    "gain summed": lambda p, x: x * p[0] / p[0].sum(),
    "gain normed": lambda p, x: x * p[0] / p[0].norm(),
    "shared prelu": lambda p, x: p[1](p[0](p[1](x))),
    "shared norm": lambda p, x: p[1](p[0](p[1](x))),
    "called twice": lambda p, x: x + p[1](p[0](x)) + p[0](F.relu(x)),
    "scaled by weight": lambda p, x: p(x) * p.weight.abs().mean(),
    "decoder": lambda p, x: F.conv_transpose2d(p(x), p.weight, padding=1),
    "branch": lambda p, x: F.avg_pool2d(x, 3, 1, 1) if x.shape[1] >= 6 else x,
    "alpha": lambda p, x: torch.add(x, x.abs(), alpha=x.shape[1] / 8),
    "constant": lambda p, x: x * x.new_tensor(x.shape[1] / 8),
    "channel mean": lambda p, x: x * x.mean(1, keepdim=True),
    "halves": lambda p, x: torch.cat(x.chunk(2, 1)[::-1], 1),
}
LOUD = {"sigmoid", "groupnorm"}  # zero in is not zero out: no hook can tell the readers


class Net(nn.Module):
    """A program: each step reads earlier values and appends one."""

    def __init__(self, dice):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.parts, self.steps, self.pads = nn.ModuleDict(), [], {}
        self.widths = [8]
        for number in range(dice.randint(1, 6)):
            kind = dice.choice([*PARTS, *WIDE * 3, *("conv", "norm", "add") * 4])
            i, j = (dice.randrange(len(self.widths)) for _ in range(2))
            width = self.make(kind, f"p{number}", self.widths[i], self.widths[j])
            self.steps.append((kind, f"p{number}", i, j))
            self.widths.append(width)
        self.head = nn.Linear(self.widths[-1], 3)
        self.side = conv(self.widths[-1], 4, 1)
        self.wrap = dice.choice(["plain"] * 4 + ["tuple", "dict", "record", "space"])
        self.kept = []

    def make(self, kind, name, width, other):
        parts = self.parts
        if kind == "add":
            if width != other:
                parts[name] = nn.Sequential(
                    conv(other, width, 1), nn.BatchNorm2d(width)
                )
            return width
        if kind == "cat":
            return width + other
        if kind == "pad":
            parts[name], parts[f"{name}p"] = conv(width, width + 4), Pad()
            self.pads[f"parts.{name}p"] = f"parts.{name}"
            return width + 4
        if kind == "dense":
            parts[name] = oracle.Dense(width)
            return width + 4
        if kind == "zeros":
            return width + 2
        parts[name] = PARTS[kind](width)
        return width

    def forward(self, x):
        values = [self.stem(x)]
        for kind, name, i, j in self.steps:
            values.append(self.step(kind, name, values[i], values[j]))
        out, side = self.head(values[-1].mean((2, 3))), self.side(values[-1])
        return {
            "plain": lambda: out,
            "tuple": lambda: (out, [side]),
            "dict": lambda: {"out": out, "side": side},
            "record": lambda: Record(out, side),
            "space": lambda: SimpleNamespace(out=out, side=Record(side)),
        }[self.wrap]()

    def step(self, kind, name, x, y):
        if kind == "add":
            return x + (self.parts[name](y) if name in self.parts else y)
        if kind == "cat":
            return torch.cat([x, y], 1)
        if kind == "pad":
            return F.relu(self.parts[name](x) + self.parts[f"{name}p"](x))
        if kind == "zeros":
            return torch.cat([x, x.new_zeros(len(x), 2, 8, 8)], 1)
        if kind == "stored":
            self.kept.append(x)
        part = self.parts[name]
        return ACTS[kind](part, x) if kind in ACTS else part(x)


# -- plans ----------------------------------------------------------------------


def draw_plan(model, dice):
    """A plan by one of many ways, some of them rash."""
    groups = surgery.channel_groups(model, SHAPE)
    layers = {n: g.index[n] for g in groups for n in g.layers}
    way = dice.choice(["scores"] * 4 + ["groups"] * 2 + ["rash", "scatter", "drop"])
    if way == "scores":
        scores = baselines.random(model, dice.randrange(99))
        if dice.random() < 0.8:
            free = {n for g in groups if not g.fixed for n in g.layers}
            scores = {n: s for n, s in scores.items() if n in free}
        by = {"rate": dice.choice([0.2, 0.5, 0.8, 0.95])}
        by = dice.choice([by, {"macs": dice.choice([0.3, 0.6])}])
        how = {
            "scope": dice.choice(["layer", "global"]),
            "residual": dice.choice(["tie", "scatter", "keep"]),
        }
        return plans.from_scores(model, scores, SHAPE, **by, **how)
    if way == "groups":
        return oracle.random_plan(groups, dice.randrange(9999), share=0.8)
    name = dice.choice(sorted(layers))
    size = len(layers[name])
    kept = sorted(dice.sample(range(size), dice.randint(1, size)))
    if way == "drop":
        names = surgery.droppable(model, SHAPE)
        return Plan(drop=[dice.choice(names)] if names else [])
    scatter = {name} if way == "scatter" and len(kept) < size else set()
    return Plan({name: kept}, scatter=scatter)


def silence(model, plan, x):
    """The whole network's output with hooks in the place of the plan."""
    extra = {p: plan.keep[c] for p, c in model.pads.items() if c in plan.keep}
    extra = {p: k for p, k in extra.items() if model.pads[p] not in plan.scatter}
    with oracle.hooked(model, plan, x, extra, behind=False):
        return flatten(oracle.evaluate(model, x))


def flatten(output):
    """All numbers of an output of any kind, as one row."""
    if isinstance(output, torch.Tensor):
        return output.flatten()
    items = output.values() if isinstance(output, dict) else output
    if hasattr(output, "__dict__"):
        items = vars(output).values()
    return torch.cat([flatten(item) for item in items if item is not None])


# -- a case ----------------------------------------------------------------------


def run_case(seed):
    """ "exact" or "refused: ...", or what went wrong ("WRONG ...", "CRASH ...")."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = oracle.roughen(Net(dice).double(), seed, neutral=True).eval()
        outcome = try_plan(model, dice)
        if isinstance(outcome, nn.Module) and dice.random() < 0.4:
            again = try_plan(outcome, dice)
            outcome = (
                again if isinstance(again, str) and again[0].isupper() else outcome
            )
    return outcome if isinstance(outcome, str) else "exact"


def try_plan(model, dice):
    """The shrunk network, where all three agree, or a line on what happened."""
    x = oracle.images(SHAPE)
    try:
        plan = draw_plan(model, dice)
        small, masked = (a(model, plan, SHAPE) for a in (surgery.shrink, surgery.mask))
        got, whole = (flatten(oracle.evaluate(m, x)) for m in (small, masked))
    except ValueError as error:
        line = str(error)
        return f"CRASH of many lines: {line}" if "\n" in line else f"refused: {line}"
    except Exception as error:  # any other kind is a fault by itself
        return f"CRASH {type(error).__name__}: {error}"
    model.kept, small.kept = [], []
    if got.shape != whole.shape:
        return f"WRONG shape {got.shape} {whole.shape}"
    outputs = [whole]
    quiet = LOUD.isdisjoint(kind for kind, *_ in model.steps)
    # What an earlier plan has scattered writes into a stream where no hook sits.
    quiet &= not any(isinstance(m, (Scatter, Bridge)) for m in model.modules())
    if quiet and not plan.drop:
        outputs.append(silence(model, plan, x))
    off = [oracle.difference(got, other) for other in outputs]
    if not max(off) < 1e-9:
        return f"WRONG by {off} (mask, hooks) for {plan}"
    return small


def main(first, last):
    """Run the cases, print the faults and how often each outcome was."""
    torch.set_num_threads(1)
    counts, reasons = Counter(), Counter()
    for seed in range(first, last):
        outcome = run_case(seed)
        counts[outcome.split(":")[0].split(" ")[0]] += 1
        if outcome[0].isupper():
            print(seed, outcome[:400], flush=True)
        elif outcome != "exact":
            reasons[outcome.split(":")[-1][-60:]] += 1
    print(f"seeds {first} to {last - 1}:", dict(counts))
    for reason, count in reasons.most_common(12):
        print(f"{count:6} {reason}")
    return not any(kind.isupper() for kind in counts)


if __name__ == "__main__":
    sys.exit(not main(*map(int, sys.argv[1:3])))
