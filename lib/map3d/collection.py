"""Data collection: prune, fine-tune, measure, point by point, each point a file."""

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib import paths, surgery, train
from lib.map3d.blocks import order_removal, probe_blocks
from lib.map3d.design import Chain
from lib.map3d.space import Shape, Space, score_channels
from lib.plan import Plan
from lib.stages import Sets, profile_folder, run_folder
from lib.train.checkpoint import digest_tensors
from lib.train.recipe import Recipe

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
    seed: int = 0,
    epochs: int,
    lr: float,
    warmup: float = 0.0,
    batch_size: int = 128,
) -> pd.DataFrame:
    """Measure every point of `design`; one row a point, columns `COLUMNS`.

    Each chain starts from `model`; a point is pruned from the network of the point
    before (blocks by linear probes on the validation images, then channels by BatchNorm
    scale, then smaller images) and fine-tuned for `epochs`, the unpruned point too, so
    that all have the same schedule. Shares, MACs and parameters are those of the
    network as it came out, not as asked for; points that the space cannot tell apart
    are measured once a chain. `top1`: validation accuracy in percent after the last
    epoch; the test set is not touched.

    Every point is a folder `points/...` of the profile of `run`, named after all that
    decides it: a collection that was killed goes on where it stopped, and several
    processes may measure different chains. Source: Wang et al. 2021, algorithm 1.
    """
    if not design or not all(design):
        raise ValueError("the design has no point, or an empty chain")
    recipe = {"epochs": epochs, "lr": lr, "warmup": warmup, "batch_size": batch_size}
    Recipe(seed=seed, **recipe)  # refuses bad settings before the first probe
    folder = profile_folder(run) / "points"
    rows = []
    for chain in design:
        rows += _measure_chain(model, space, chain, sets, folder, seed, recipe)
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
    points = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    for column in [c for c in ("net", "dataset", "width") if c in points]:
        found = points[column].unique()
        if len(found) > 1:
            raise ValueError(
                f"points of different {column} below {paths.shown(folder)}: "
                f"{', '.join(map(str, found))}; give each a profile of its own"
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
) -> Plan:
    """The plan that takes `model` to `shape`: probes, scales and sides, in that order.

    Probes run on the validation images, at `resolution` (None: the native side), and
    only where blocks must go.
    """
    order: list[str] = []
    if len(space.find_present(model)) > shape.blocks:
        probes = probe_blocks(model, sets.val, resolution=resolution, seed=seed)
        order = order_removal(probes)
    scores = score_channels(model, sets.train.shape)
    return space.plan(model, shape, order=order, scores=scores)


@contextmanager
def sparsify(model: nn.Module, strength: float) -> Iterator[None]:
    """While inside, training pulls every BatchNorm's scale towards zero.

    Adds `strength` * sign(gamma) to the gradient, not to the loss: Slimming's L1 stage
    (Liu et al. 2017; 1e-4 for VGG, 1e-5 for deep ResNets and DenseNet-40 in its code).
    Optional before `collect`: `with sparsify(model, 1e-4): train.fit(model, ...)`.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be 0 or more and finite, got {strength}")
    scales = [m.weight for m in model.modules() if isinstance(m, _BatchNorm)]
    hooks = [
        gamma.register_hook(
            lambda grad, gamma=gamma: grad + strength * gamma.detach().sign()
        )
        for gamma in scales
        if gamma is not None and gamma.requires_grad
    ]
    if not hooks:
        raise ValueError("the network has no BatchNorm scale to make sparse")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- one chain -----------------------------------------------------------------------


@dataclass
class _Network:
    """What the point before left: a network and the side it was trained at."""

    model: nn.Module
    side: int


def _measure_chain(model, space, chain: Chain, sets, folder, seed, recipe) -> list:
    here, seen, rows = _Network(model, space.native), set(), []
    name = _name_chain(chain)
    for number, asked in enumerate(chain, 1):
        shape = space.snap(*asked)
        if shape in seen:
            continue
        seen.add(shape)
        here, row = _measure_point(here, space, shape, sets, folder, seed, recipe)
        rows.append({"chain": name, "round": number, **row})
    return rows


def _measure_point(
    here: _Network, space, shape: Shape, sets: Sets, folder: Path, seed: int, recipe
) -> tuple[_Network, dict]:
    place = folder / _name_point(here, space, shape, sets, seed, recipe)
    done = place / "point.json"
    plan = _read_plan(place, here, space, shape, sets, seed)
    small = _shrink(here.model, plan, sets.train.shape)
    history = train.fit(
        small, sets.train, sets.val, seed=seed, resolution=plan.resolution,
        checkpoint=place / "finetune.pt", label=place.name.rpartition("-")[0], **recipe,
    )  # fmt: skip
    if done.is_file() and history.resumed == recipe["epochs"]:
        return _Network(small, shape.side), _read_row(done)
    top1 = (
        history.rows[-1]["val_top1"]
        if history.rows
        else train.evaluate(small, sets.val, resolution=plan.resolution)["top1"]
    )
    row = {
        **space.measure(small, shape.side), "top1": top1, "seed": seed,
        "epochs": recipe["epochs"], "seconds": history.seconds,
    }  # fmt: skip
    paths.write_json(done, row)
    return _Network(small, shape.side), row


def _read_row(path: Path) -> dict:
    row = paths.read_json(path)
    if not isinstance(row, dict) or not {*COLUMNS[2:]} <= row.keys():
        raise ValueError(f"{path}: not a measured point; delete it to measure it anew")
    return row


def _read_plan(place: Path, here: _Network, space, shape, sets, seed) -> Plan:
    """The stored plan of a point that was begun, else a new one, stored."""
    path = place / "plan.json"
    if path.is_file():
        return Plan.load(path)
    side = None if here.side == space.native else here.side
    plan = prune_once(here.model, space, shape, sets, resolution=side, seed=seed)
    plan.save(path)
    return plan


def _shrink(model: nn.Module, plan: Plan, shape: tuple[int, int, int]) -> nn.Module:
    if plan == Plan():
        return copy.deepcopy(model)
    with warnings.catch_warnings():  # a smaller side alone removes nothing
        warnings.filterwarnings("ignore", "the plan removes nothing")
        return surgery.shrink(model, plan, shape)


def _name_chain(chain: Chain) -> str:
    """Which dimensions a chain moves: "whole", "d", "w", "r", "dw", ..."""
    moved = "".join(
        m
        for m, axis in zip("dwr", zip(*chain, strict=True), strict=True)
        if min(axis) < 1
    )
    return (moved or "whole") + ("" if len(chain) > 1 or not moved else "*")


def _name_point(here, space, shape: Shape, sets, seed: int, recipe: dict) -> str:
    """A folder's name: the shape, the seed, and a digest of all else that decides."""
    facts = [sorted(recipe.items()), here.side, space.width, space.multiple]
    images, held = sets.train, sets.val
    facts += [images.name, images.mean, images.std, images.pad, images.flip]
    digest = digest_tensors(
        str([*facts, held.mean, held.std]),
        images.images, images.labels, held.images, held.labels,
        *here.model.state_dict().values(),
    )  # fmt: skip
    short = hashlib.sha256(digest.encode()).hexdigest()[:10]
    size = f"{shape.blocks}blocks-width{shape.width}-{shape.side}px"
    return f"{size}-seed{seed}-{short}"
