"""ONNX: one file that other programs run, with any number of images in a batch."""

import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from lib import paths
from lib.graph.watch import dtype_of
from lib.settings import CHW
from lib.surgery.copying import copy_model


def export_onnx(model: nn.Module, path: str | Path, input_shape: CHW) -> Path:
    """Write `model` in evaluation as an ONNX file for images [N, C, H, W], any N.

    `input_shape` is (C, H, W). The model is left as found, wherever its tensors lie.
    Raises `ValueError` where onnx and onnxscript are not installed, and where torch
    cannot trace the network.
    """
    require("onnx", "onnxscript")
    twin = copy_model(model).cpu().eval()
    x = torch.zeros(2, *input_shape, dtype=dtype_of(twin))

    def write(tmp: Path) -> None:
        said = io.StringIO()  # the exporter tells every step
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                twin, (x,), tmp, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=({0: Dim("n")},),
            )  # fmt: skip

    try:
        return paths.write_atomic(path, write)
    except OSError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        line = str(cause).strip().partition("\n")[0]
        raise ValueError(
            f"{os.path.basename(path)}: {type(model).__name__} at input shape "
            f"{tuple(input_shape)} cannot be exported: {type(cause).__name__}: {line}"
        ) from error


def require(*packages: str) -> None:
    """ValueError with the line to type unless all of the packages can be imported."""
    from importlib.util import find_spec

    for name in packages:
        if find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed: `.venv/bin/pip install -e .[deploy]`"
            )
