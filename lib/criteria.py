"""Every criterion under one name, and what a channel is truly worth.

`score_channels` is the one way to all of them, so that a comparison differs in the
criterion and in nothing else; `measure_truth` asks the network itself.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lib import baselines, nisp, scop, train
from lib.data import ImageSet, batches_for
from lib.graph import Graph
from lib.graph.watch import modes_kept
from lib.messages import check_choice
from lib.scop.controls import ARMS
from lib.stages import Base

SCOP = tuple(f"scop-{arm}" for arm in ARMS)
CRITERIA = (*SCOP, *nisp.METHODS, "fpgm", "taylor")
OF_WEIGHTS = {*baselines.OF_WEIGHTS, "nisp-mag", "nisp-uniform"}
CONTROLS = (
    "unpruned", "scratch", "scratch-compute", "scratch-shared", "l1-distilled",
    "bn_scale-sparse", "bn_scale-longer",
)  # fmt: skip


def check_names(methods: Sequence[str], controls: Sequence[str]) -> None:
    """Refuse unknown criteria and controls before anything is trained."""
    for name in methods:
        check_choice("method", name, CRITERIA)
    for name in controls:
        check_choice("control", name, CONTROLS)


class Scored(NamedTuple):
    """Scores per layer, and what they cost: seconds of the wall clock, images seen.

    Seconds are those of a training's rows, in whose epochs a selection is counted. Of a
    control that is trained only the use counts, not the training: it is made once for
    all networks of a profile.
    """

    scores: dict[str, Tensor]
    seconds: float
    images: int


def score_channels(
    criterion: str,
    base: Base,
    layers: Sequence[str],
    *,
    select: train.Recipe,
    select_images: int = 0,
    control_epochs: int = 0,
    num_images: int = 2000,
) -> Scored:
    """Scores of the channels of `layers` by one of `CRITERIA`.

    "scop-ARM": the selection of `scop.learn_betas` by the recipe `select`, on
    `select_images` images; the others are those of `nisp.score_layers` and
    `lib.baselines`, on `num_images` where they look at images. The seed of every draw
    is that of `select`. ValueError: an unknown criterion, a layer without a score.
    """
    check_choice("criterion", criterion, CRITERIA)
    model, images = base.model, base.sets.train
    seen = 0 if criterion in OF_WEIGHTS else min(num_images, len(images))
    options: dict[str, Any] = {"num_images": num_images, "seed": select.seed}
    options["graph"] = base.graph
    begin, seconds = time.perf_counter(), 0.0
    if criterion in SCOP:
        betas = scop.learn_betas(
            base, criterion.removeprefix("scop-"), recipe=select,
            num_images=select_images, control_epochs=control_epochs,
        )  # fmt: skip
        scores = scop.importance(model, betas)
        seconds = sum(row["seconds"] for row in betas.history)  # now, or when learnt
        seen = select.epochs * min(select_images or len(images), len(images))
    elif criterion == "fpgm":
        scores = baselines.fpgm(model)
    elif criterion == "taylor":
        scores = baselines.taylor(model, images, **options)
    else:
        scores = nisp.score_layers(criterion, model, images, **options)
    lacking = [name for name in layers if name not in scores]
    if lacking:
        raise ValueError(f"criterion '{criterion}' has no score for {lacking[0]}")
    seconds = seconds or time.perf_counter() - begin
    return Scored({name: scores[name] for name in layers}, seconds, seen)


# -- the truth ----------------------------------------------------------------------


def measure_truth(
    model: nn.Module,
    images: ImageSet,
    layers: Sequence[str],
    *,
    graph: Graph,
    batch_size: int = 500,
) -> dict[str, Tensor]:
    """By how much the loss rises when a channel is silenced, alone: float64 [channels].

    Silenced: what the BatchNorm behind the layer makes of it is set to zero, as a
    scattered plan does. Mean cross-entropy in nats over `images`, in evaluation mode;
    only what comes after the layer is computed anew. ValueError: a layer without a
    BatchNorm that runs once, a forward that torch.fx does not trace or that works in
    place.

    Step by step in notebooks/03_criteria.ipynb.
    """
    traced = baselines.trace_with_fx(model)
    calls = defaultdict(list)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[node.target].append(node)
    sites = {}
    for name in layers:
        found = calls[graph.pairs.get(name)]
        if len(found) != 1:
            raise ValueError(f"'{name}' has no BatchNorm of its own behind it")
        sites[name] = found[0]
    truth: dict[str, Tensor] = {}
    with modes_kept(model), torch.inference_mode():
        traced.eval()
        for x, y in batches_for(model, images, batch_size):
            for name, risen in _silence_each(traced, sites, x, y).items():
                truth[name] = truth.get(name, 0) + risen * len(y) / len(images)
    return truth


def _silence_each(
    traced: fx.GraphModule, sites: Mapping[str, fx.Node], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The rise of the loss on one batch, for every channel of every site."""
    whole = fx.Interpreter(traced, garbage_collect_values=False)
    loss = F.cross_entropy(whole.run(x).double(), y)
    known = dict(whole.env)

    def rerun(site: fx.Node, value: Tensor) -> Tensor:
        # values behind the site are left out, so that they are made anew
        before = dict(itertools.takewhile(lambda item: item[0] != site, known.items()))
        before[site] = value
        output = fx.Interpreter(traced).run(x, initial_env=before)
        return F.cross_entropy(output.double(), y)

    risen = {}
    for name, site in sites.items():
        value = known[site]
        found = torch.empty(value.shape[1], dtype=torch.float64)
        for channel in range(value.shape[1]):
            silent = value.clone()
            silent[:, channel] = 0
            found[channel] = rerun(site, silent) - loss
        risen[name] = found
        # A step that works in place has written over values that are kept for all runs.
        if not torch.equal(rerun(site, value), loss):
            raise ValueError(f"the forward works in place behind '{name}'")
    return risen
