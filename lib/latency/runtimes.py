"""The programs that run a network here, behind one call each, on one thread.

    eager          torch as it is
    channels_last  the same, with the channels of a pixel side by side in memory
    compile        torch.compile with frozen weights; BatchNorm goes into convolutions
    onnxruntime    the ONNX file in ONNX Runtime
    openvino       the ONNX file in OpenVINO, in float32

All take float32 on the CPU; the first three also run where a GPU holds the model.
"""

import importlib.util
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from lib import paths
from lib.graph.watch import dtype_of
from lib.messages import check_choice
from lib.settings import CHW, RUNTIMES
from lib.surgery.copying import copy_model

NEEDS = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
Call = Callable[[], object]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread while inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_missing(runtime: str) -> str | None:
    """Why a runtime cannot be used here, in one line; None where it can."""
    check_choice("runtime", runtime, RUNTIMES)
    if runtime == "compile" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        return "compile needs a C++ compiler (g++), which is not on the PATH"
    try:
        require(*NEEDS.get(runtime, ()))
    except ValueError as error:
        return f"runtime '{runtime}': {error}"
    return None


def check_runtime(runtime: str) -> None:
    """ValueError unless the runtime is known and installed."""
    if reason := find_missing(runtime):
        raise ValueError(reason)


def version_of(runtime: str) -> str:
    """The version of the package that runs it."""
    return version(runtime if runtime in NEEDS else "torch")


@one_thread()
def prepare(model: nn.Module, x: Tensor, runtime: str) -> Call:
    """A call without arguments that runs `model` in evaluation on the batch `x`.

    It returns the first output, as a tensor or an array; a copy is run. ValueError: a
    runtime that is unknown or not installed, a network that it cannot read.
    """
    check_runtime(runtime)
    if runtime in NEEDS:
        shape = (x.shape[1], x.shape[2], x.shape[3])
        return load_onnx(read_onnx(model, shape), x, runtime)
    twin = copy_model(model).eval()
    if runtime == "channels_last":
        twin = twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    forward = _compile(twin, x) if runtime == "compile" else twin

    def call() -> object:
        with torch.inference_mode():
            made = forward(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            return made

    return call


def _compile(model: nn.Module, x: Tensor) -> Callable:
    """Compiled for the shape of `x`, weights frozen into the code."""
    from torch._dynamo import config as limits
    from torch._inductor import config

    compiled = torch.compile(model, dynamic=False)
    # torch gives up on a forward that it has compiled for eight networks and runs it
    # as it is: pruned nets share the forward of their class.
    many = {"recompile_limit": 10**6, "accumulated_recompile_limit": 10**6}
    try:
        with config.patch(freezing=True), limits.patch(many), torch.inference_mode():
            compiled(x)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be compiled: {type(error).__name__}: {line}"
        ) from error
    return compiled


# -- ONNX: one file that other programs run --------------------------------------------


def export_onnx(model: nn.Module, path: str | Path, input_shape: CHW) -> Path:
    """Write `model` in evaluation as an ONNX file for images [N, C, H, W], any N.

    `input_shape` is (C, H, W). The model is left as found. ValueError: onnx and
    onnxscript are not installed, torch cannot trace the network.
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
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed: `.venv/bin/pip install -e .[deploy]`"
            )


def read_onnx(model: nn.Module, input_shape: CHW) -> bytes:
    """The content of the ONNX file of a model."""
    with tempfile.TemporaryDirectory() as folder:
        return export_onnx(model, Path(folder) / "net.onnx", input_shape).read_bytes()


@one_thread()
def load_onnx(content: bytes, x: Tensor, runtime: str) -> Call:
    """An ONNX file's content in one of the programs that read it, on one thread."""
    batch = x.detach().cpu().numpy()
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: batch}
        return lambda: session.run(None, feed)[0]
    import openvino

    core = openvino.Core()
    exact = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.read_model(content, b"")
    model.reshape(list(batch.shape))
    request = core.compile_model(model, "CPU", exact).create_infer_request()
    return lambda: request.infer([batch], share_inputs=True)[0]
