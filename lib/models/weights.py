"""Files of published weights: found, or fetched, and checked; CIFAR-10's ResNets.

Source of ResNet-20/32/56: github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), test
top-1 91.73, 92.63 and 93.39 % on images normalised by mean (.485, .456, .406) and s.d.
(.229, .224, .225).
"""

import hashlib
import io
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import paths

URL = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
)
SHA256 = {
    "resnet20": "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    "resnet32": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    "resnet56": "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
}
FILES = {name: f"{name}-{digest[:8]}.th" for name, digest in SHA256.items()}


def load_weights(name: str) -> dict[str, Tensor]:
    """State dict of the published net `name`, on the CPU, keys as in `CifarResNet`.

    The file is `<data root>/weights/<file>`, fetched on first use. Raises ValueError
    on a wrong digest, FileNotFoundError where it can be neither found nor fetched.
    """
    folders = [paths.data_root() / "weights"]
    published = find_or_fetch(URL + FILES[name], SHA256[name], folders)["state_dict"]
    # Saved from a DataParallel net.
    return {key.removeprefix("module."): value for key, value in published.items()}


def find_or_fetch(url: str, digest: str, folders: Sequence[Path]) -> Any:
    """What torch saved in the file of `url`, on the CPU.

    From the first of `folders` that has it, else fetched to the first of all.
    ValueError unless the file's SHA-256 begins with `digest`.
    """
    places = [folder / url.rpartition("/")[2] for folder in folders]
    path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        download(url, path, digest)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(digest):
        found = found[: len(digest)]
        raise ValueError(f"{path}: SHA-256 should be {digest}, found {found}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def download(url: str, path: Path, digest: str) -> None:
    """Fetch `url` to `path`; only a complete file stays whose digest begins so."""
    print(f"{path.name}: fetching {url}")
    try:
        fetch = torch.hub.download_url_to_file
        paths.write_atomic(path, lambda tmp: fetch(url, str(tmp), digest, False))
    except RuntimeError as error:
        raise ValueError(f"{path}: not kept, from {url}: {error}") from None
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"{path}: no such file, and it could not be fetched from {url} ({error}); "
            "put it there by hand, or let PRUNING_DATA name a folder that has it"
        ) from None
