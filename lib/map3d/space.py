"""The sub-networks of one network that depth, width and resolution span.

A `Space` turns shares (d, w, r) into a plan for a network that may be pruned already,
measures what a pruned network really keeps, and lists every network it can make with
its exact MACs.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import cost
from lib import plan as plans
from lib.graph import Graph, build_graph, dropped_units
from lib.graph.trace import trace
from lib.map3d.blocks import find_blocks
from lib.plan import Plan, resolve

WIDTHS = ("uniform", "inner")
FINEST = 16  # widths are multiples of 1/16, or of 1 / (the narrowest layer)


class Shape(NamedTuple):
    """A network of the space: kept blocks, width in `steps`, side in pixels."""

    blocks: int
    width: int
    side: int


def score_channels(
    model: nn.Module, input_shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Mean |gamma| of the BatchNorms that read each output channel of a layer.

    Slimming's criterion (Liu et al. 2017). Behind a convolution with its own BatchNorm
    this is `baselines.bn_scale`; a dense layer's channels are read by the BatchNorms of
    all layers after it, through concatenations. Layers that no BatchNorm reads score
    nothing. Raises `ValueError` where there is none at all.
    """
    graph, modules = build_graph(model, input_shape), dict(model.named_modules())
    total, readers = torch.zeros(2, graph.num_tags + 1, dtype=torch.float64)
    for name, tags in graph.norms.items():
        gamma = getattr(modules[name], "weight", None)
        if not isinstance(modules[name], _BatchNorm) or gamma is None:
            continue
        if len(gamma) == tags.numel():
            row = tags.flatten() % (graph.num_tags + 1)  # constants: the last slot
            total.index_add_(0, row, gamma.detach().abs().double().cpu())
            readers.index_add_(0, row, torch.ones(len(gamma)).double())
    scores = {
        name: total[layer.outputs] / readers[layer.outputs]
        for name, layer in graph.layers.items()
        if bool((readers[layer.outputs] > 0).all())
    }
    if not scores:
        raise ValueError("no BatchNorm reads a layer of the network; width needs one")
    return scores


class Space:
    """What depth, width and resolution can make of `model`.

    Depth: blocks replaced by the identity, never the one that opens a stage. Width: the
    same share of channels in every layer; "uniform" narrows the residual stream too
    (cost ~ w^2), "inner" only what lies inside residual branches (cost ~ w).
    Resolution: side of the square input, a multiple of `multiple` pixels: sizes that
    halve without a rest cost what r^2 says, others more. `input_shape` is (C, H, W).
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        *,
        width: str = "uniform",
        multiple: int = 4,
    ):
        if width not in WIDTHS:
            raise ValueError(f"width must be one of {WIDTHS}, got {width!r}")
        if input_shape[1] != input_shape[2]:
            raise ValueError(f"images must be square, got (C, H, W) = {input_shape}")
        if multiple < 1 or input_shape[1] < multiple:
            raise ValueError(
                f"multiple must lie between 1 and the side {input_shape[1]}, got "
                f"{multiple}"
            )
        self.input_shape, self.width, self.multiple = input_shape, width, multiple
        self.native = input_shape[1]
        self.blocks = find_blocks(model, input_shape)
        self.full = cost.count(model, input_shape)
        graph = build_graph(model, input_shape)
        scored = score_channels(model, input_shape)
        residual = "tie" if width == "uniform" else "keep"
        self._residual = residual
        self.channels = {
            name: len(graph.layers[name].outputs)
            for group in graph.groups
            if not group.fixed and not (residual == "keep" and group.joined)
            for name in group.layers
            if name in scored
        }
        if not self.channels:
            raise ValueError(
                f"width '{width}': no layer of the network can be narrowed"
            )
        self.steps = min(FINEST, *self.channels.values())

    @property
    def fewest(self) -> int:
        """The fewest blocks a network of the space can have."""
        return sum(not block.removable for block in self.blocks)

    @property
    def exponents(self) -> tuple[float, float, float]:
        """The paper's cost d w^2 r^2; d w r^2 where only inner layers are narrowed."""
        return (1.0, 2.0 if self.width == "uniform" else 1.0, 2.0)

    def snap(self, d: float, w: float, r: float) -> Shape:
        """The nearest network to the shares `d`, `w`, `r`, each in (0, 1]."""
        for name, share in (("d", d), ("w", w), ("r", r)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {share}")
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
    ) -> Plan:
        """What to remove from `model`, a network of the space, to reach `shape`.

        The paper's order: blocks first, those at the head of `order`; then, in every
        layer that is left, the channels with the lowest `scores`; then the side.
        `ValueError` where `model` is smaller than `shape` already, where `shape` is
        not of the space, and for a layer that must be narrowed and has no scores.
        """
        self._check_shape(shape)
        present = self.find_present(model)
        if len(present) < shape.blocks:
            raise ValueError(
                f"the network has {len(present)} blocks left, {shape.blocks} are wanted"
            )
        drop = [name for name in order if name in present]
        drop = drop[: len(present) - shape.blocks]
        if len(present) - len(drop) > shape.blocks:
            raise ValueError(
                f"{shape.blocks} blocks cannot be reached: {len(present)} are there, "
                f"{len(drop)} may go"
            )
        keep = self._narrow(model, shape.width, scores, drop)
        side = None if shape.side == self.native else shape.side
        return Plan(keep=keep, drop=drop, resolution=side)

    def spread_removal(self) -> list[str]:
        """Removable blocks: the last of each stage, then the ones before them, ..."""
        seen: dict[str, int] = {}
        places = []
        for number, block in enumerate(reversed(self.blocks)):
            if block.removable:
                turn = seen[block.stage] = seen.get(block.stage, 0) + 1
                places.append((turn, number, block.name))
        return [name for *_, name in sorted(places)]

    def find_present(self, model: nn.Module) -> list[str]:
        """Names of the blocks that `model` still has."""
        modules = dict(model.named_modules())
        return [
            block.name
            for block in self.blocks
            if not isinstance(modules[block.name], nn.Identity)
        ]

    def _check_shape(self, shape: Shape) -> None:
        limits = zip(
            Shape._fields,
            shape,
            (self.fewest, 1, 1),
            (len(self.blocks), self.steps, self.native),
            strict=True,
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise ValueError(
                    f"{name} must lie between {low} and {high}, got {value}; "
                    "`snap` turns shares into a network of the space"
                )

    def _narrow(self, model, width: int, scores, drop: list[str]) -> dict:
        modules, gone = dict(model.named_modules()), tuple(f"{n}." for n in drop)
        rates = {}
        for name, full in self.channels.items():
            if name in modules and not name.startswith(gone or "\0"):
                now = modules[name].weight.shape[0]
                wanted = max(_round(width * full / self.steps), 1)
                if now < wanted:
                    raise ValueError(
                        f"'{name}' has {now} channels left, {wanted} are wanted"
                    )
                if wanted < now:  # half a channel more, so that int() hits the count
                    rates[name] = (now - wanted + 0.5) / now
        if not rates:
            return {}
        missing = [name for name in rates if name not in scores]
        if missing:
            raise ValueError(
                f"no scores for '{missing[0]}', which must be narrowed; "
                "`score_channels(model, shape)` has all layers"
            )
        narrowed = plans.from_scores(
            model, {name: scores[name] for name in rates}, self.input_shape,
            rate=rates, residual=self._residual,
        )  # fmt: skip
        keep = narrowed.keep.items()
        return {n: kept for n, kept in keep if not n.startswith(gone or "\0")}

    def measure(self, model: nn.Module, side: int | None = None) -> dict:
        """What a pruned network really is, as columns of a table of points.

        d, w, r: shares kept of blocks, of the channels of the layers that are left, and
        of the side. blocks, side; macs and params, exact; share: of the full MACs.
        """
        side = side or self.native
        modules = dict(model.named_modules())
        left = [name for name in self.channels if name in modules]
        now = sum(modules[name].weight.shape[0] for name in left)
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
        low = self.multiple * math.ceil(self.native / 2 / self.multiple)
        return sorted({*range(low, self.native, self.multiple), self.native})

    def lattice(
        self,
        model: nn.Module,
        *,
        order: list[str] | None = None,
        narrowest: float = 0.5,
    ) -> pd.DataFrame:
        """Every network of the space with its exact MACs, without building one.

        `model` is the unpruned network; blocks go in `order` (default: evenly over the
        stages, see `spread_removal`; it matters where blocks differ in cost).
        Widths from `narrowest` on, sides from half the native one on. Columns d, w, r,
        blocks, width (in steps), side, macs, share. MACs are a sum over layers of the
        work at one position (depth and width decide it) times the number of positions
        (the side decides that).
        """
        order = self.spread_removal() if order is None else order
        widths = range(max(math.ceil(narrowest * self.steps), 1), self.steps + 1)
        depths = range(self.fewest, len(self.blocks) + 1)
        graph = build_graph(model, self.input_shape)
        work = self._tabulate_work(model, graph, order, depths, widths)
        positions = self._tabulate_positions(model, list(graph.layers))
        macs = np.rint(work @ positions).astype(np.int64)
        rows = [
            (blocks, width, side)
            for blocks in depths for width in widths for side in self.sides()
        ]  # fmt: skip
        table = pd.DataFrame(rows, columns=["blocks", "width", "side"])
        table["macs"] = macs.reshape(-1)
        table["share"] = table["macs"] / macs[-1, -1, -1]
        shares = [self.shares(Shape(*row)) for row in rows]
        table[["d", "w", "r"]] = np.array(shares)
        return table[["d", "w", "r", "blocks", "width", "side", "macs", "share"]]

    def _tabulate_positions(self, model: nn.Module, layers: list[str]) -> np.ndarray:
        """Output positions per image: [layers, sides]."""
        columns = []
        for side in self.sides():
            found = trace(model, (self.input_shape[0], side, side)).layers
            columns.append([sum(found[name].positions) for name in layers])
        return np.array(columns, dtype=np.float64).T

    def _tabulate_work(self, model, graph: Graph, order, depths, widths) -> np.ndarray:
        """MACs at one output position: [depths, widths, layers]."""
        even = {
            name: torch.arange(count, dtype=torch.float64)
            for name, count in self.channels.items()
        }
        narrowed = [Plan(keep=self._narrow(model, k, even, [])) for k in widths]
        kept = torch.stack([resolve(graph, p, check=False).units for p in narrowed])
        drops = [order[: len(self.blocks) - count] for count in depths]
        lost = torch.zeros(len(drops), kept.shape[1], dtype=torch.bool)
        there = np.ones((len(drops), len(graph.layers)))
        for i, drop in enumerate(drops):
            for block in drop:
                lost[i, dropped_units(graph, block)] = True
            gone = tuple(f"{block}." for block in drop) or "\0"
            there[i] = [not name.startswith(gone) for name in graph.layers]
        alive = (kept[None] & ~lost[:, None]).numpy()  # [depths, widths, units]
        return _count_work(graph, alive) * there[:, None]


def _count_work(graph: Graph, alive: np.ndarray) -> np.ndarray:
    """MACs at one output position for kept units [..., units]: [..., layers]."""
    layers = list(graph.layers.values())
    flat = alive.reshape(-1, alive.shape[-1]).astype(np.float64)
    inputs, outputs = (
        (_membership(graph, [getattr(layer, side) for layer in layers]) @ flat.T).T
        for side in ("inputs", "outputs")
    )
    depthwise = np.array([layer.depthwise for layer in layers])
    groups = np.where(depthwise, np.maximum(inputs, 1), [x.groups for x in layers])
    kernels = np.array([layer.kernel for layer in layers])
    work = kernels * outputs * inputs / groups
    return work.reshape(*alive.shape[:-1], len(layers))


def _membership(graph: Graph, tags: list[Tensor]) -> csr_array:
    """How often each unit is among the tags of each layer: [layers, units]."""
    units = [graph.unit_of(row).numpy() for row in tags]
    layer = np.repeat(np.arange(len(units)), [len(row) for row in units])
    shape = (len(units), graph.num_units + 1)
    return csr_array((np.ones(len(layer)), (layer, np.concatenate(units))), shape)


def _round(x: float) -> int:
    """To the nearest integer, halves up, forgiving the last bits."""
    return math.floor(x + 0.5 + 1e-9)
