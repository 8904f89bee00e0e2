"""The sub-networks of one network that depth, width and resolution span.

A `Space` turns shares (d, w, r) into a plan for a network that may be pruned already,
measures what a pruned network really keeps, and lists every network it can make with
its exact MACs.
"""

import math
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import cost
from lib import plan as plans
from lib.graph import Graph, build_graph
from lib.graph.leaves import filters_of
from lib.map3d.blocks import find_blocks
from lib.messages import check_choice, check_finite
from lib.plan import Plan, resolve
from lib.settings import ABOVE_ONE, ABOVE_ZERO, CHW, check_float, check_int

# what a plan does with the residual stream, and the exponent of w in the cost
WIDTHS = {"uniform": ("tie", 2.0), "inner": ("keep", 1.0), "scatter": ("scatter", 1.5)}
FINEST = 16  # widths are multiples of 1/16, or of 1 / (the narrowest layer)
LEAST = 0.5  # width and side at which the list of networks begins


class Shape(NamedTuple):
    """A network of the space: kept blocks, width in `steps`, side in pixels."""

    blocks: int
    width: int
    side: int


def score_channels(
    model: nn.Module, input_shape: CHW, *, graph: Graph | None = None
) -> dict[str, Tensor]:
    """Mean |gamma| of the BatchNorms that read each output channel of a layer.

    Slimming's criterion (Liu et al. 2017). Behind a convolution with its own BatchNorm
    this is `baselines.bn_scale`; a dense layer's channels are read by the BatchNorms of
    all layers after it, through concatenations. Layers that no BatchNorm reads score
    nothing. ValueError: no score at all.
    """
    graph = graph or build_graph(model, input_shape)
    modules, slots = dict(model.named_modules()), graph.num_tags + 1
    total, readers = torch.zeros(2, slots, dtype=torch.float64)
    for name, tags in graph.norms.items():
        gamma = getattr(modules[name], "weight", None)
        if not isinstance(modules[name], _BatchNorm) or gamma is None:
            continue
        if len(gamma) == tags.numel():
            row = tags.flatten() % slots  # constants: the last slot
            scale = gamma.detach().abs().double().cpu()
            total += torch.bincount(row, scale, slots)
            readers += torch.bincount(row, minlength=slots)
    scores = {
        name: total[layer.outputs] / readers[layer.outputs]
        for name, layer in graph.layers.items()
        if bool((readers[layer.outputs] > 0).all())
    }
    if not scores:
        raise ValueError("no BatchNorm reads a layer of the network; width needs one")
    check_finite("the score", scores)
    return scores


class Space:
    """What depth, width and resolution can make of `model`.

    Depth: blocks replaced by the identity, never the one that opens a stage. Width: the
    same share of channels in every layer; "uniform" narrows the residual stream too
    (cost ~ w^2), "inner" only what lies inside residual branches (cost ~ w), "scatter"
    every convolution of a branch, the last one written back full-width (between them).
    Resolution: side of the square input, a multiple of `multiple` pixels: sizes that
    halve without a rest cost what r^2 says, others more.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: CHW,
        *,
        width: str = "uniform",
        multiple: int = 4,
        graph: Graph | None = None,
    ):
        check_choice("width", width, WIDTHS)
        if input_shape[1] != input_shape[2]:
            raise ValueError(f"images must be square, got (C, H, W) = {input_shape}")
        check_int("multiple", multiple, 1, input_shape[1] + 1)
        self.input_shape, self.width, self.multiple = input_shape, width, multiple
        self.native = input_shape[1]
        self.graph = graph or build_graph(model, input_shape)
        self.blocks = find_blocks(model, input_shape, graph=self.graph)
        self.full = cost.count(model, input_shape)
        self.channels = self._count_channels(model)
        self.steps = min(FINEST, *self.channels.values())

    def _count_channels(self, model: nn.Module) -> dict[str, int]:
        """The layers that width narrows, with their full number of channels."""
        scored = score_channels(model, self.input_shape, graph=self.graph)
        inside = tuple(f"{block.name}." for block in self.blocks)
        found: dict[str, int] = {}
        for group in self.graph.groups:
            names = [n for n in group.layers if n in scored and not group.fixed]
            if self.width == "inner" and group.joined:
                names = []
            elif self.width == "scatter":
                free = set(group.scatterable if group.joined else names)
                names = [n for n in names if n in free and n.startswith(inside)]
            found |= {n: len(self.graph.layers[n].outputs) for n in names}
        if not found:
            raise ValueError(f"width '{self.width}': no layer can be narrowed")
        return found

    @property
    def fewest(self) -> int:
        """The fewest blocks a network of the space can have."""
        return sum(not block.removable for block in self.blocks)

    @property
    def exponents(self) -> tuple[float, float, float]:
        """The paper's cost d w^2 r^2, with the exponent of w that the width has."""
        return (1.0, WIDTHS[self.width][1], 2.0)

    def snap(self, d: float, w: float, r: float) -> Shape:
        """The nearest network to the shares `d`, `w`, `r`, each in (0, 1]."""
        for name, share in (("d", d), ("w", w), ("r", r)):
            check_float(name, share, ABOVE_ZERO, ABOVE_ONE)
        blocks = max(_round(d * len(self.blocks)), self.fewest)
        sides = [*range(self.multiple, self.native, self.multiple), self.native]
        side = min(sides, key=lambda s: (round(abs(s - r * self.native), 9), -s))
        return Shape(blocks, max(_round(w * self.steps), 1), side)

    def shares(self, shape: Shape) -> tuple[float, float, float]:
        """(d, w, r) of a network of the space."""
        return (
            shape.blocks / len(self.blocks),
            shape.width / self.steps,
            shape.side / self.native,
        )

    def plan(
        self,
        model: nn.Module,
        shape: Shape,
        *,
        order: list[str],
        scores: dict[str, Tensor],
        graph: Graph | None = None,
    ) -> Plan:
        """What to remove from `model`, a network of the space, to reach `shape`.

        The paper's order: blocks first, those at the head of `order`; then, in every
        layer that is left, the channels with the lowest `scores`; then the side.
        ValueError: a `model` that is smaller than `shape` already, a `shape` that is
        not of the space, a layer that must be narrowed and has no scores.
        """
        check_int("blocks", shape.blocks, self.fewest, len(self.blocks) + 1)
        check_int("width", shape.width, 1, self.steps + 1)
        check_int("side", shape.side, 1, self.native + 1)
        present = self.find_present(model)
        if len(present) < shape.blocks:
            raise ValueError(
                f"the network has {len(present)} blocks left, {shape.blocks} are wanted"
            )
        surplus = len(present) - shape.blocks
        drop = [name for name in order if name in present][:surplus]
        if len(drop) < surplus:
            raise ValueError(
                f"{shape.blocks} blocks cannot be reached: {len(present)} are there, "
                f"{len(drop)} may go"
            )
        narrow = self._narrow(model, shape.width, scores, drop, graph)
        side = None if shape.side == self.native else shape.side
        return replace(narrow, resolution=side)

    def spread_removal(self) -> list[str]:
        """Removable blocks: the last of each stage, then the ones before them, ..."""
        stages: dict[str, list[str]] = {}
        for block in reversed(self.blocks):
            if block.removable:
                stages.setdefault(block.stage, []).append(block.name)
        turns = zip_longest(*stages.values())
        return [name for turn in turns for name in turn if name is not None]

    def find_present(self, model: nn.Module) -> list[str]:
        """Names of the blocks that `model` still has."""
        modules = dict(model.named_modules())
        return [
            block.name
            for block in self.blocks
            if not isinstance(modules[block.name], nn.Identity)
        ]

    def _narrow(
        self, model: nn.Module, width: int, scores, drop: list[str], graph: Graph | None
    ) -> Plan:
        """What drops blocks and narrows every other layer that is too wide."""
        modules, rates = dict(model.named_modules()), {}
        gone = tuple(f"{block}." for block in drop)
        for name, full in self.channels.items():
            if name not in modules or name.startswith(gone):
                continue
            now = len(filters_of(modules[name]))
            wanted = max(_round(width * full / self.steps), 1)
            if now < wanted:
                raise ValueError(
                    f"'{name}' has {now} channels left, {wanted} are wanted"
                )
            # a quarter of a channel more, so that the last bits of a rate, which is
            # rounded down to whole channels, cannot lose one
            if wanted < now:
                rates[name] = (now - wanted + 0.25) / now
        if not rates:
            return Plan(drop=drop)
        # Scores only of layers that stay: a tied sum must not count a dropped block's.
        narrowed = plans.from_scores(
            model, {n: scores[n] for n in rates if n in scores}, self.input_shape,
            rate=rates, residual=WIDTHS[self.width][0], graph=graph,
        )  # fmt: skip
        return _leave_out(narrowed, drop)

    def measure(self, model: nn.Module, side: int | None = None) -> dict:
        """What a pruned network really is, as columns of a table of points.

        d, w, r: shares kept of blocks, of the channels of the layers that are left, and
        of the side. blocks, side; macs and params, exact; share: of the full MACs.
        """
        side = side or self.native
        modules = dict(model.named_modules())
        left = [name for name in self.channels if name in modules]
        now = sum(len(filters_of(modules[name])) for name in left)
        spent = cost.count(model, (self.input_shape[0], side, side))
        blocks = len(self.find_present(model))
        return {
            "d": blocks / len(self.blocks),
            "w": now / sum(self.channels[name] for name in left),
            "r": side / self.native,
            "blocks": blocks,
            "side": side,
            "macs": spent.macs,
            "params": spent.params,
            "share": spent.macs / self.full.macs,
        }

    def sides(self) -> list[int]:
        """Multiples of `multiple` from half the native side up, and the native side."""
        low = self.multiple * math.ceil(LEAST * self.native / self.multiple)
        return sorted({*range(low, self.native, self.multiple), self.native})

    def lattice(
        self, model: nn.Module, *, order: list[str] | None = None
    ) -> pd.DataFrame:
        """Every network of the space with its exact MACs, without building one.

        `model` is the unpruned network; blocks go in `order` (default: as
        `spread_removal` says). Widths and sides from one half on. Columns d, w, r,
        blocks, width (in steps), side, macs, share.
        """
        order = self.spread_removal() if order is None else order
        widths = range(max(math.ceil(LEAST * self.steps), 1), self.steps + 1)
        # Which channels of a layer stay makes no difference to the work.
        even = {n: torch.arange(count).double() for n, count in self.channels.items()}
        narrow = {w: self._narrow(model, w, even, [], self.graph) for w in widths}
        # Depth and width decide a layer's work at one position, the side how many there
        # are: MACs are the sum over layers of one times the other, exact in integers.
        positions, rows = self._count_positions(model), []
        for blocks in range(self.fewest, len(self.blocks) + 1):
            drop = order[: len(self.blocks) - blocks]
            for width in widths:
                work = _count_work(self.graph, _leave_out(narrow[width], drop))
                for side, macs in zip(self.sides(), positions @ work, strict=True):
                    shape = Shape(blocks, width, side)
                    rows.append((*self.shares(shape), *shape, macs))
        columns = ["d", "w", "r", *Shape._fields, "macs"]
        table = pd.DataFrame(rows, columns=columns)
        return table.assign(share=table["macs"] / int(table["macs"].iloc[-1]))

    def _count_positions(self, model: nn.Module) -> np.ndarray:
        """Output positions per image, int64 [sides, layers]."""
        rows = []
        for side in self.sides():
            found = build_graph(model, (self.input_shape[0], side, side)).layers
            rows.append([sum(found[n].positions) for n in self.graph.layers])
        return np.array(rows)


def _leave_out(chosen: Plan, drop: list[str]) -> Plan:
    """The plan that drops blocks as well, and says nothing of the layers in them."""
    gone = tuple(f"{block}." for block in drop)
    left = {n: kept for n, kept in chosen.keep.items() if not n.startswith(gone)}
    return Plan(keep=left, scatter=chosen.scatter & left.keys(), drop=drop)


def _count_work(graph: Graph, chosen: Plan) -> np.ndarray:
    """MACs of each layer at one output position, int64 [layers]."""
    kept = resolve(graph, chosen, check=False)
    work = [
        layer.count_work(
            int(kept.units[graph.columns[name]].sum()), int(kept.rows[name].sum())
        )
        if name in kept.rows
        else 0
        for name, layer in graph.layers.items()
    ]
    return np.array(work)


def _round(x: float) -> int:
    """To the nearest integer, halves up, forgiving the last bits."""
    return math.floor(x + 0.5 + 1e-9)
