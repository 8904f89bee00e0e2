"""Data collection: prune, fine-tune, measure, point by point, each point a file."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from torch import nn

from lib import paths, surgery, train
from lib.graph import Graph, build_graph
from lib.map3d.blocks import order_removal, probe_blocks
from lib.map3d.design import Chain
from lib.map3d.space import Shape, Space, score_channels
from lib.plan import Plan
from lib.stages import Sets, profile_folder, run_folder
from lib.train import Recipe
from lib.train.checkpoint import digest_identity, digest_images, digest_tensors

COLUMNS = [
    "chain", "round", "d", "w", "r", "top1", "blocks", "side", "macs", "params",
    "share", "seed", "epochs", "seconds",
]  # fmt: skip


def collect(
    model: nn.Module,
    space: Space,
    design: Sequence[Chain],
    sets: Sets,
    *,
    run: str,
    recipe: Recipe,
) -> pd.DataFrame:
    """Measure every point of `design`; one row a point, columns `COLUMNS`.

    Each chain starts from `model`; a point is pruned from the network of the point
    before, see `prune_once`, and fine-tuned by `recipe`, the unpruned point too, so
    that all have the same schedule. Shares, MACs and parameters are those of the
    network as it came out, not as asked for; points that the space cannot tell apart
    are measured once a chain. `top1`: validation accuracy in percent after the last
    epoch; the test set is not touched.

    Every point is a folder `points/...` of the profile of `run`, named after all that
    decides it: a collection that was killed goes on where it stopped, and several
    processes may measure different chains. ValueError: a design without points, a
    recipe with a resolution of its own. Source: Wang et al. 2021, algorithm 1.

    Step by step in notebooks/30_map_collection.ipynb.
    """
    if not design or not all(design):
        raise ValueError("the design has no point, or an empty chain")
    if recipe.resolution is not None:
        raise ValueError(
            f"the design decides on sides, the recipe on {recipe.resolution} pixels: "
            "leave the recipe's resolution out"
        )
    collection = _Collection(space, sets, recipe, profile_folder(run) / "points")
    rows = [row for chain in design for row in collection.measure_chain(model, chain)]
    return pd.DataFrame(rows)[COLUMNS].reset_index(drop=True)


def write_points(run: str, points: pd.DataFrame) -> Path:
    """Keep a table of points as `points.csv` of a run, for `read_points`."""
    path = run_folder(run) / "points.csv"
    return paths.write_text(path, points.to_csv(index=False))


def read_points(run: str) -> pd.DataFrame:
    """All points that runs of the profile of `run` have collected, each once.

    ValueError where they are of more than one network, set of images or kind of width
    (columns net, dataset, width, where there): one predictor cannot describe both.
    """
    folder = profile_folder(run)
    files = sorted(folder.rglob("points.csv"))
    if not files:
        raise ValueError(
            f"no points.csv below {paths.shown(folder)}: run 30_map_collection first"
        )
    found = []
    for file in files:
        with paths.reading(file, "table of points"):
            found.append(pd.read_csv(file))
    points = pd.concat(found, ignore_index=True)
    for column in [c for c in ("net", "dataset", "width") if c in points]:
        several = points[column].unique()
        if len(several) > 1:
            raise ValueError(
                f"points of different {column} below {paths.shown(folder)}: "
                f"{', '.join(map(str, several))}; give each a profile of its own"
            )
    return points.drop_duplicates([c for c in points if c != "seconds"])


def prune_once(
    model: nn.Module,
    space: Space,
    shape: Shape,
    sets: Sets,
    *,
    resolution: int | None = None,
    seed: int = 0,
    graph: Graph | None = None,
) -> Plan:
    """The plan that takes `model` to `shape`.

    Blocks go by linear probes on the validation images, at `resolution` (None: the
    native side), then channels by BatchNorm scale, then pixels.
    """
    graph = graph or build_graph(model, space.input_shape)
    order: list[str] = []
    if len(space.find_present(model)) > shape.blocks:
        order = order_removal(
            probe_blocks(model, sets.val, resolution=resolution, seed=seed, graph=graph)
        )
    scores = score_channels(model, space.input_shape, graph=graph)
    return space.plan(model, shape, order=order, scores=scores, graph=graph)


# -- one chain -----------------------------------------------------------------------


_Network = tuple[nn.Module, int]  # what a point leaves, and the side it was trained at


@dataclass(frozen=True)
class _Collection:
    """What all points of a collection share."""

    space: Space
    sets: Sets
    recipe: Recipe
    folder: Path

    def measure_chain(self, model: nn.Module, chain: Chain) -> Iterator[dict]:
        here, seen, name = (model, self.space.native), set(), _name_chain(chain)
        for number, asked in enumerate(chain, 1):
            shape = self.space.snap(*asked)
            if shape not in seen:
                seen.add(shape)
                here, row = self.measure_point(here, shape)
                yield {"chain": name, "round": number, **row}

    def measure_point(self, here: _Network, shape: Shape) -> tuple[_Network, dict]:
        """Prune, fine-tune and measure, or take up what was done of it."""
        place = self.folder / self.name_point(here, shape)
        plan, small = self.prune(here, shape, place / "plan.json")
        history = train.fit(
            small, self.sets.train,
            recipe=replace(self.recipe, resolution=plan.resolution),
            checkpoint=place / "finetune.pt", label=place.name.rpartition("-")[0],
        )  # fmt: skip
        done, there = place / "point.json", (small, shape.side)
        # A row is worth its weights: trained anew, they are measured anew.
        if done.is_file() and history.resumed == self.recipe.epochs:
            row = paths.read_json(done)
            with paths.reading(done, "measured point"):
                return there, {name: row[name] for name in COLUMNS[2:]}
        found = train.evaluate(small, self.sets.val, resolution=plan.resolution)
        row = {
            **self.space.measure(small, shape.side), "top1": found["top1"],
            "seed": self.recipe.seed, "epochs": self.recipe.epochs,
            "seconds": history.seconds,
        }  # fmt: skip
        paths.write_json(done, row)
        return there, row

    def prune(self, here: _Network, shape: Shape, path: Path) -> tuple[Plan, nn.Module]:
        """The plan of a point, stored when it is begun, and the network it makes."""
        model, side = here
        graph = build_graph(model, self.space.input_shape)
        if path.is_file():
            plan = Plan.load(path)
        else:
            plan = prune_once(
                model, self.space, shape, self.sets,
                resolution=None if side == self.space.native else side,
                seed=self.recipe.seed, graph=graph,
            )  # fmt: skip
            plan.save(path)
        if plan == Plan():
            return plan, copy.deepcopy(model)
        return plan, surgery.shrink(model, plan, self.space.input_shape, graph=graph)

    def name_point(self, here: _Network, shape: Shape) -> str:
        """A folder's name: the shape, the seed, and a digest of all that decides."""
        # By the weights that it is pruned from, not by its place in the chain: chains
        # of other designs that begin alike share their first points.
        model, side = here
        identity = {
            "recipe": self.recipe.identity,
            "space": [self.space.width, self.space.multiple],
            "images": [self.sets.train.name, digest_images(self.sets.train)],
            "judged by": digest_images(self.sets.val),
            "from": [side, digest_tensors("", *model.state_dict().values())],
        }
        size = f"{shape.blocks}blocks-width{shape.width}-{shape.side}px"
        return f"{size}-seed{self.recipe.seed}-{digest_identity(identity)}"


def _name_chain(chain: Chain) -> str:
    """Which dimensions a chain moves: "whole", "d", "w", "r", "dw"; in one go: "d*"."""
    axes = zip("dwr", zip(*chain, strict=True), strict=True)
    moved = "".join(name for name, axis in axes if min(axis) < 1)
    return (moved or "whole") + ("*" if moved and len(chain) == 1 else "")
