"""Checkpoints of a run: what they must agree on, reading and writing them."""

import hashlib
import itertools
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import paths
from lib.data import ImageSet
from lib.train.recipe import Recipe


def digest_tensors(text: str, *tensors: Tensor) -> str:
    """A short hash of a text and of tensors, their shapes included."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def identify(
    model: nn.Module, recipe: Recipe, train_set: ImageSet, precision: str
) -> dict:
    """What a checkpoint must agree on to be taken up."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    facts = [train_set.mean, train_set.std, train_set.pad, train_set.flip]
    return {
        **asdict(recipe),
        "precision": precision,
        "data": digest_tensors(str(facts), train_set.images, train_set.labels),
        "trained": digest_tensors(" ".join(trained)),
        "start": digest_tensors(
            " ".join(model.state_dict().keys()), *model.state_dict().values()
        ),
    }


def resume(
    checkpoint, identity: dict, model: nn.Module, optimizer
) -> tuple[list[dict], dict]:
    """Load the last finished epoch; the rows so far and what they were made with."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return [], {}
    checkpoint = Path(checkpoint)
    state = load_checkpoint(checkpoint)
    differs = [k for k, v in identity.items() if state["identity"].get(k) != v]
    if differs:
        numbers = itertools.count(1)
        names = (checkpoint.with_name(f"{checkpoint.name}.old{i}") for i in numbers)
        aside = next(name for name in names if not name.exists())
        os.replace(checkpoint, aside)
        print(
            f"{paths.shown(checkpoint)} was made with another {', '.join(differs)}; "
            f"kept as {aside.name}, starting afresh"
        )
        return [], {}
    model.load_state_dict(state["model"])
    own = ("lr", "fused", "foreach", "capturable")  # belong to the device, not the run
    groups = [{k: g[k] for k in own if k in g} for g in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update(kept)
    return state["rows"], state.get("made_with", {})


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of `fit`: identity, model, optimizer, rows; never pickled code.

    A missing or damaged file is one error that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        missing = {"identity", "model", "optimizer", "rows"} - state.keys()
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to "
            "start afresh"
        ) from error
    if missing:
        raise ValueError(f"{path}: not a checkpoint of fit, it lacks {sorted(missing)}")
    return state


def save(checkpoint, identity: dict, model, optimizer, *, rows, made_with) -> None:
    """Write the checkpoint of a finished epoch, where one is wanted."""
    if checkpoint is None:
        return
    state = {
        "identity": identity,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rows": rows,
        "made_with": made_with,
    }
    paths.write_atomic(checkpoint, lambda tmp: torch.save(state, tmp))
