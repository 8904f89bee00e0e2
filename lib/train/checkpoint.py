"""Checkpoints: files that know what they belong to.

An identity is a dict of plain values on all that decides a result (settings, digests of
images and weights). A file is taken up when its identity is the one asked for, put
aside with the names of what differs when it is another's, and refused when damaged.
"""

import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lib import paths
from lib.data import ImageSet
from lib.train import processes


def digest_tensors(text: str, *tensors: Tensor) -> str:
    """A short hash of a text and of tensors, their shapes included."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        # The shape between the bytes: [2, 8] and [4, 4] of the same numbers differ.
        digest.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def digest_images(images: ImageSet) -> str:
    """A short hash of images, labels and how batches of them are made."""
    facts = [images.mean, images.std, images.pad, images.flip]
    return digest_tensors(str(facts), images.fingerprint(), images.labels)


def digest_identity(identity: dict) -> str:
    """A short hash of an identity, for the names of files."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return digest_tensors(text)[:10]


def save(path: str | Path | None, identity: dict, **parts) -> None:
    """Write identity and parts (tensors, plain values), whole or not at all.

    Without a path nothing is written. Of several processes the first writes, and none
    goes on before the file is there. OSError names the file and the cause.
    """
    if path is None:
        return

    def write(tmp: Path) -> None:
        with open(tmp, "wb") as file:  # torch's own files lose the cause of an error
            torch.save({"identity": identity, **parts}, file)

    with processes.first_ahead():
        if processes.rank() == 0:
            paths.write_atomic(path, write)


def load(path: str | Path, parts: Iterable[str] = ()) -> dict:
    """Read what `save` wrote, on the CPU; pickled code is never run.

    FileNotFoundError or ValueError, naming the file: missing, damaged (a single bit is
    enough), without an identity or one of `parts`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with paths.reading(path, "checkpoint"):
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()  # torch does not look at the checksums
        if wrong is not None:
            raise ValueError(f"wrong checksum of {wrong}")
        state = torch.load(path, weights_only=True, map_location="cpu")
        lacking = {"identity", *parts} - state.keys()
    if lacking:
        raise ValueError(
            f"{path}: not a checkpoint of this kind, it lacks {sorted(lacking)}"
        )
    return state


def take_up(
    path: str | Path | None, identity: dict, parts: Iterable[str] = ()
) -> dict | None:
    """The state that `save` wrote for this identity; None where there is none yet.

    Another's file is renamed to the first free `NAME.old1`, `NAME.old2`, ..., which is
    said together with what differs. Errors as of `load`; a damaged file stays.
    """
    if path is None:
        return None
    path = Path(path)
    # The first process may rename the file; the others then find none, as it did.
    with processes.first_ahead():
        if not path.is_file():
            return None
        state = load(path, parts)
        # Only what is asked for: a file may know more facts, of a later version of lib.
        differs = [k for k, v in identity.items() if state["identity"].get(k) != v]
        if not differs:
            return state
        (aside,) = put_aside(path)
        print(
            f"{paths.shown(path)} was made with another {', '.join(differs)}; "
            f"kept as {aside.name}, starting afresh"
        )
        return None


def put_aside(*files: Path) -> list[Path]:
    """Rename files that belong together to the first free `NAME.old1`, `.old2`, ..."""
    for i in itertools.count(1):
        aside = [path.with_name(f"{path.name}.old{i}") for path in files]
        if not any(path.exists() for path in aside):
            break
    for path, name in zip(files, aside, strict=True):
        os.replace(path, name)
    return aside
