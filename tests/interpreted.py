"""What tests of kernels share: device, backends, and Triton's interpreter."""

import pytest
import torch

from lib.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = pytest.mark.skipif(
    not dispatch.has_triton(), reason="triton is not installed"
)
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]
both = pytest.mark.parametrize("which", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton reads this when the modules with its kernels are first imported."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
