"""Published CIFAR-10 weights of ResNet-20/32/56: found, or fetched, and checked.

Source: github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), test top-1 91.73, 92.63 and
93.39 % on images normalised by mean (.485, .456, .406) and s.d. (.229, .224, .225).
"""

import hashlib
import http.client
import shutil
import urllib.request
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from lib import paths

URL = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
)
FILES = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet56": "resnet56-4bfd9763.th",
}
SHA256 = {
    "resnet20": "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    "resnet32": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    "resnet56": "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
}
NETWORK_ERRORS = (URLError, TimeoutError, ConnectionError, http.client.HTTPException)


def load_weights(name: str) -> dict[str, Tensor]:
    """State dict of the published net `name`, on the CPU, keys as in `CifarResNet`.

    The file is `<data root>/weights/<file>`, fetched on first use. Raises ValueError
    on a wrong digest, FileNotFoundError without network, PermissionError where the
    data root cannot be written.
    """
    path = paths.data_root() / "weights" / FILES[name]
    if path.is_file():
        check_digest(path, SHA256[name], shown=str(path))
    else:
        download(URL + FILES[name], path, SHA256[name])
    published = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    # Saved from a DataParallel net.
    return {key.removeprefix("module."): value for key, value in published.items()}


def check_digest(path: Path, digest: str, *, shown: str) -> None:
    """Raise ValueError unless the SHA-256 of `path` is `digest`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{shown}: SHA-256 should be {digest}, found {found}")


def download(url: str, path: Path, digest: str) -> None:
    """Fetch `url` to `path`; only a complete file with the right digest stays."""

    def fill(tmp: Path) -> None:
        fetch(url, tmp)
        check_digest(tmp, digest, shown=f"{path} (from {url}, not kept)")

    print(f"{path.name}: fetching {url}")
    try:
        paths.write_atomic(path, fill)
    except NETWORK_ERRORS as error:
        reason = getattr(error, "reason", None) or error
        raise FileNotFoundError(
            f"{path}: no such file, and {url} did not answer ({reason}); "
            "put the file there by hand"
        ) from None
    except OSError as error:
        raise PermissionError(
            f"{path.parent}: cannot write here ({error.strerror}); "
            "set PRUNING_DATA to a folder that can be written"
        ) from None


def fetch(url: str, path: Path) -> None:
    """Copy what `url` answers into `path`; gives up after a minute of silence."""
    with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
