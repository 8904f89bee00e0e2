"""`latency.meet`: a plan for a share of the time, timed anew once it is made.

    .venv/bin/python tests/benchmarks/bench_meet.py [--repeats 1]

ResNet-20 at 32 pixels in batches of 64 and ResNet-18 at 64 pixels in batches of 8, L1,
residual streams tied: a plan is made for each share, and original and pruned network
are then timed once more, in turns. Writes meet.csv: the share asked for, what the
second clock says, and the seconds that the plan took, the first with its table.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from lib import baselines, cost, latency, models, settings, surgery

NETS = {"resnet20": ((3, 32, 32), 64, 4), "resnet18": ((3, 64, 64), 8, 8)}
SHARES, RUNTIMES = (0.7, 0.5), ("eager", "onnxruntime")


def bench(name: str, runtime: str, repeat: int) -> list[dict]:
    shape, batch, multiple = NETS[name]
    torch.manual_seed(0)
    net = models.build(name).eval()
    begin = time.perf_counter()
    table, rows = latency.Table(net, shape, batch=batch, runtime=runtime), []
    made = time.perf_counter() - begin
    for share in SHARES:
        row = {"net": name, "batch": batch, "runtime": runtime, "repeat": repeat,
               "asked": share}  # fmt: skip
        begin = time.perf_counter()
        try:
            plan = latency.meet(
                net, baselines.l1(net), shape, share, table=table, residual="tie",
                multiple=multiple,
            )  # fmt: skip
        except ValueError as error:
            row["refused"], plan = str(error), None
        row["seconds"], made = made + time.perf_counter() - begin, 0.0
        if plan is None:
            rows.append(row)
            continue
        small = surgery.shrink(net, plan, shape)
        found = latency.measure(
            net, small, shape, batches=[batch], runtimes=[runtime], turns=41
        ).set_index("net")
        pruned = found.loc["pruned"]
        rows.append(row | {
            "measured": 1 / pruned["speedup"],
            "macs_share": cost.count(small, shape).macs / cost.count(net, shape).macs,
            "cpu": pruned["cpu"], "load": pruned["load"],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    settings.use_threads(1)
    rows = [
        row
        for repeat in range(repeats)
        for name in NETS
        for runtime in RUNTIMES
        for row in bench(name, runtime, repeat)
    ]
    table = pd.DataFrame(rows)
    if "measured" in table:
        table["off"] = table["measured"] / table["asked"] - 1
    table.round(4).to_csv(Path(__file__).with_name("meet.csv"), index=False)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
