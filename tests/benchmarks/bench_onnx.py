"""Ten pruned networks as ONNX files: the largest difference to torch, and how long.

Run from the repository's root: `python tests/benchmarks/bench_onnx.py [NET ...]`; needs
the extra `deploy`. Each net is pruned by random scores at rate .4 with the residual
stream tied, scattered and kept, written once, and run on batches of 1 and 3 images in
ONNX Runtime and OpenVINO; differences are relative to the largest output. `--write`
puts them into onnx.csv.
"""

import argparse
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle

from lib import baselines, latency, models, surgery
from lib import plan as plans
from lib.latency.runtimes import load_onnx

NETS = {
    "resnet20": 32, "resnet56": 32, "resnet20_b": 32, "densenet40": 32,
    "mobilenet_v2_cifar": 32, "resnet50": 64, "googlenet": 64, "mobilenet_v3_small": 64,
    "shufflenet_v2_x1_0": 64, "regnet_y_400mf": 64,
}  # fmt: skip
TABLE = Path(__file__).with_name("onnx.csv")


def bench(name: str, residual: str, path: Path) -> dict:
    """One row: a net pruned one way, written, read and compared."""
    torch.manual_seed(0)
    shape = (3, NETS[name], NETS[name])
    options = {"init_weights": False} if name == "googlenet" else {}
    model = oracle.roughen(models.build(name, **options)).eval()
    row = {"net": name, "residual": residual}
    try:
        plan = plans.from_scores(
            model, baselines.random(model, 0), shape, rate=0.4, residual=residual
        )
    except ValueError as error:
        return row | {"outcome": str(error).partition(". ")[0]}
    small = surgery.shrink(model, plan, shape)
    start = time.process_time()
    content = latency.export_onnx(small, path, shape).read_bytes()
    row |= {"outcome": "ok", "export_s": round(time.process_time() - start, 1)}
    for runtime in ("onnxruntime", "openvino"):
        gaps = []
        for batch in (1, 3):
            x = oracle.images(shape, torch.float32, count=batch)
            got = torch.from_numpy(np.array(load_onnx(content, x, runtime)()))
            gaps.append(oracle.difference(got, oracle.evaluate(small, x)))
        row[runtime] = f"{max(gaps):.1e}"
    return row


def main() -> None:
    """Print the table; say so where a difference is above 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    path = Path("/tmp") / "bench_onnx.onnx"
    for name in options.nets:
        for residual in ("tie", "scatter", "keep"):
            rows.append(bench(name, residual, path))
            print(*rows[-1].values(), flush=True)
    path.unlink(missing_ok=True)
    table = pd.DataFrame(rows).assign(
        **{f"{n}_version": version(n) for n in ("torch", "onnxruntime", "openvino")}
    )
    print(f"within 1e-5: {(table['onnxruntime'].dropna().astype(float) < 1e-5).all()}")
    if options.write:
        table.to_csv(TABLE, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
