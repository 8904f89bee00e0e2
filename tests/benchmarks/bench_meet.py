"""`latency.meet`: a plan for a share of the time, timed anew once it is made.

    .venv/bin/python tests/benchmarks/bench_meet.py [--repeats 3]

ResNet-20 at 32 x 32 pixels, L1, batches of 8: a table is measured, a plan is made for
each share, and original and pruned network are then timed once more, in turns. Writes
meet.csv: the share asked for, what the second clock says, and how long the table took.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from lib import baselines, cost, latency, models, settings, surgery

SHAPE, BATCH = (3, 32, 32), 8
SHARES, RUNTIMES = (0.7, 0.5), ("eager", "channels_last")


def bench(runtime: str, repeat: int) -> list[dict]:
    torch.manual_seed(0)
    net = models.build("resnet20").eval()
    begin = time.perf_counter()
    table = latency.Table(net, SHAPE, batch=BATCH, runtime=runtime)
    spent, rows = time.perf_counter() - begin, []
    for share in SHARES:
        row = {"runtime": runtime, "repeat": repeat, "asked": share, "table_s": spent}
        try:
            plan = latency.meet(
                net, baselines.l1(net), SHAPE, share, table=table, residual="scatter",
                multiple=8,
            )  # fmt: skip
        except ValueError as error:
            rows.append(row | {"refused": str(error)})
            continue
        small = surgery.shrink(net, plan, SHAPE)
        found = latency.measure(
            net, small, SHAPE, batches=[BATCH], runtimes=[runtime], turns=41
        ).set_index("net")
        pruned = found.loc["pruned"]
        rows.append(row | {
            "measured": 1 / pruned["speedup"],
            "macs_share": cost.count(small, SHAPE).macs / cost.count(net, SHAPE).macs,
            "cpu": pruned["cpu"], "load": pruned["load"],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    settings.use_threads(1)
    rows = [
        row
        for repeat in range(repeats)
        for runtime in RUNTIMES
        for row in bench(runtime, repeat)
    ]
    table = pd.DataFrame(rows)
    if "measured" in table:
        table["off"] = table["measured"] / table["asked"] - 1
    table.round(4).to_csv(Path(__file__).with_name("meet.csv"), index=False)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
