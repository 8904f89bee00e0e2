"""Which implementation of a kernel runs: Triton on a GPU, PyTorch elsewhere."""

import functools
import importlib.util
import os

from torch import Tensor


def backend(tensor: Tensor) -> str:
    """`"triton"` for a tensor on a GPU where Triton is installed, else `"torch"`."""
    return "triton" if tensor.is_cuda and has_triton() else "torch"


def choose_backend(tensor: Tensor, wanted: str | None) -> str:
    """The wanted implementation, or the fitting one for None.

    Raises `ValueError` for an unknown name, and where Triton is wanted but cannot run;
    on CPU tensors it runs through its interpreter, if TRITON_INTERPRET=1.
    """
    if wanted is None:
        return backend(tensor)
    if wanted not in {"triton", "torch"}:
        raise ValueError(f"backend must be 'triton', 'torch' or None, got {wanted!r}")
    if wanted == "triton" and not has_triton():
        raise ValueError("backend 'triton' was asked for, but triton is not installed")
    if wanted == "triton" and not (tensor.is_cuda or is_interpreting()):
        raise ValueError(
            f"backend 'triton' needs a tensor on a GPU, got one on {tensor.device}; "
            "TRITON_INTERPRET=1, set before the first call, interprets it on a CPU"
        )
    return wanted


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module put in its place that has no spec
        return False


def is_interpreting() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on"}
