"""What a long profile would cost: images trained on, times MACs, over a measured rate.

    .venv/bin/python .ci/hours.py cifar10 imagenet

Counted: training and selection, each image of each epoch once for every network that is
trained (half of the MACs for pruned ones). Not counted: evaluation, controls that are
networks of their own, what a notebook does beside. The rate is the median of the
unpruned networks of `RATE`, in MACs a second and forward with backward.
"""

import functools
import statistics
import sys

import pandas as pd
import plan
import torch

from lib import cost, models, paths, settings

IMAGES = {"cifar10": 45_000, "imagenet": 1_153_050}  # a tenth is held out
RATE = "compare_16_cpu.csv"


def count_passes(run: settings.Run) -> float:
    """Images that a run trains on, in units of the whole network."""
    told = settings.declared_parameters(run.notebook) | run.parameters
    book, everything = run.notebook, IMAGES[told["dataset"]]
    n = told.get("n_train") or everything

    def get(name: str):
        return told.get(name, 0)

    def some(name: str) -> int:
        return told.get(name) or n

    base = 0 if get("pretrained") else get("baseline_epochs") * n
    keep, tuned = get("keep") or 1 - get("rate") or 0.5, get("finetune_epochs")
    if book == "01_baseline":
        return base
    if book == "11_scop_selection":
        return len(told["controls"]) * told["select_epochs"] * 2 * some("select_images")
    if book == "12_scop_pruning":
        select = len(told["controls"]) * told["select_epochs"]
        select *= 2 * some("select_images")
        nets = (len(told["controls"]) + len(told["methods"])) * (1 + len(told["rates"]))
        return len(told["seeds"]) * (select + nets * tuned * n * keep)
    if book == "22_nisp_pruning":
        nets = 1 + len(told["methods"])
        return len(told["seeds"]) * (base + nets * tuned * n * keep)
    if book == "30_map_collection":
        points = 3 * told["rounds"] + 4 * told["interior"]
        return points * tuned * some("point_images") * 0.75
    if book == "32_map_pruning":
        nets = len(told["methods"]) * len(told["seeds"])
        return nets * tuned * some("point_images") * keep
    if book == "33_allocation":
        nets = len(told["methods"]) + told["lots"]
        grid = told["levels"] ** 3 * told["lengths"][0] * 0.6
        return base + (grid + nets * sum(told["lengths"]) * keep) * some("point_images")
    if book == "40_comparison":
        arms = sum(name.startswith("scop") for name in told["methods"])
        select = arms * told["select_epochs"] * 2 * some("select_images")
        epochs = sum(share * sum(told["lengths"]) for share in told["shares"])
        nets = len(told["methods"]) + len(told["controls"])
        more = len(told["shares"]) * len(told["lengths"]) * told["baseline_epochs"]
        more *= "scratch-compute" in told["controls"]
        longer = sum(name.startswith("bn_scale-") for name in told["controls"])
        more += longer * sum(told["lengths"])  # once for all shares
        return base + select + (nets * epochs + more) * n
    return 0


def count_macs(run: settings.Run) -> int:
    """Of its network, at the side of its images, on one image."""
    told = settings.declared_parameters(run.notebook) | run.parameters
    return count_net(told["net"], told.get("resolution") or told.get("size") or None)


@functools.cache
def count_net(name: str, side: int | None) -> int:
    shape = models.input_shape(name, image_size=side)
    with torch.device("meta"):
        return cost.count(models.build(name, image_size=shape[1]), shape).macs


def read_rate() -> tuple[float, str]:
    """MACs a second while training, and the device that the rows name."""
    rows = pd.read_csv(paths.RESULTS / RATE)
    rows = rows[rows["method"] == "unpruned"]
    return statistics.median(rows["images_per_s"] * rows["macs"]), rows["device"].iloc[
        0
    ]


def plan_hours(profile: str) -> dict[str, float]:
    """Runs that train, MACs (one image of an epoch counts once), core-days."""
    runs = [run for run in plan.read_runs(profile) if "net" in run.parameters]
    macs = sum(count_passes(run) * count_macs(run) for run in runs)
    return {"runs": len(runs), "macs": macs, "days": macs / read_rate()[0] / 86_400}


def main() -> None:
    for profile in sys.argv[1:]:
        found = plan_hours(profile)
        print(f"{profile}: {found['runs']} runs, {found['macs']:.1e} MACs, "
              f"{found['days']:,.0f} core-days on {read_rate()[1]}")  # fmt: skip


if __name__ == "__main__":
    main()
