"""Depth: which blocks a network has, and how much each adds to what can be read off.

DBP (Wang, Zhao et al. 2019) puts a linear classifier behind every block of the frozen
network; a block whose classifier hardly beats that of the block before is redundant.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lib import surgery, train
from lib.data import ImageSet
from lib.graph import Graph
from lib.graph.watch import recorded
from lib.settings import CHW

FOLDS = 2  # of the images that probes are judged on, each on the folds it did not see


@dataclass(frozen=True)
class Block:
    """One block: its module's name, that of its stage, whether it may be removed."""

    name: str
    stage: str
    removable: bool


def find_blocks(
    model: nn.Module, input_shape: CHW, *, graph: Graph | None = None
) -> list[Block]:
    """The blocks of a residual or dense network, in forward order.

    A block is a module that the identity can replace (`surgery.droppable`), or one of
    the same class: a residual block, or one layer of a dense block. Those in one
    container form a stage; the block that opens a stage is never removable, whether or
    not it changes the shape. ValueError: a network without a removable block.
    """
    modules = dict(model.named_modules())
    free = surgery.droppable(model, input_shape, graph=graph)
    free = [n for n in free if not any(other.startswith(f"{n}.") for other in free)]
    kinds = {type(modules[name]) for name in free}
    blocks, opened = [], set()
    for name, module in modules.items():
        if type(module) in kinds:
            stage = name.rpartition(".")[0]
            blocks.append(Block(name, stage, name in free and stage in opened))
            opened.add(stage)
    if not any(block.removable for block in blocks):
        raise ValueError(
            f"{type(model).__name__} has no block that can be removed: it needs stages "
            "of residual blocks or dense layers with more than one of them; take a "
            "deeper network, such as resnet20"
        )
    return blocks


def probe_blocks(
    model: nn.Module,
    images: ImageSet,
    *,
    resolution: int | None = None,
    seed: int = 0,
    graph: Graph | None = None,
) -> pd.DataFrame:
    """What a linear classifier reads off behind every block.

    Features are averaged over positions and frozen; multinomial logistic regression is
    fitted on one half and judged on the other, in turn. `images` should be validation
    images: a network has learnt its training images by heart, and the test set is for
    the end. One row a block, behind a first row "stem": block, stage, removable,
    accuracy (percent), gain over the row before (points; 0 for the stem).
    """
    least = int(torch.bincount(images.labels.cpu()).min())
    if least < FOLDS:
        raise ValueError(f"{images.name}: a class has {least} image(s), need {FOLDS}")
    blocks = find_blocks(model, images.shape, graph=graph)
    features = collect_features(model, images, blocks, resolution=resolution)
    labels = images.labels.cpu().numpy()
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    guesses = [cross_val_predict(probe, x, labels, cv=split) for x in features.values()]
    accuracies = [100 * int((y == labels).sum()) / len(labels) for y in guesses]
    return pd.DataFrame(
        {
            "block": list(features),
            "stage": ["", *(block.stage for block in blocks)],
            "removable": [False, *(block.removable for block in blocks)],
            "accuracy": accuracies,
            "gain": np.diff(accuracies, prepend=accuracies[0]),
        }
    )


def collect_features(
    model: nn.Module,
    images: ImageSet,
    blocks: list[Block],
    *,
    resolution: int | None = None,
) -> dict[str, np.ndarray]:
    """Channel means [N, channels] before the first block ("stem") and behind each."""
    names = [block.name for block in blocks]
    found: dict[str, list[Tensor]] = {name: [] for name in ("stem", *names)}
    with (
        recorded(model, names[:1], inputs=True) as entering,
        recorded(model, names) as leaving,
    ):
        for _ in train.forward(model, images, resolution=resolution):
            made = {"stem": entering[names[0]], **leaving}
            for name, calls in made.items():
                found[name].append(calls.pop().flatten(2).mean(2).float().cpu())
    return {name: torch.cat(rows).numpy() for name, rows in found.items()}


def order_removal(probes: pd.DataFrame) -> list[str]:
    """Removable blocks, least gain first (ties: the earlier block first)."""
    # rounded, for differences of percents that are one number of images tie
    free = probes[probes["removable"]].round({"gain": 9})
    return free.sort_values("gain", kind="stable")["block"].tolist()
