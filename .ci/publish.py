"""The results table of a profile that has run; what of it is committed.

    .venv/bin/python .ci/publish.py --profile quick [--publish]

prints the table and keeps it beside the runs; `--publish` also copies what it drew and
measured to `figures/` and `data/results/`. No notebook imports this: an edit here makes
no run stale.
"""

import argparse
import shutil
from functools import partial

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib import paths, report, settings, stages
from lib.train import checkpoint

RESULT_COLUMNS = [
    "method", "net", "dataset", "base_id", "select_seed", "seed", "profile", "share",
    "length", "rate", "keep", "residual", "epochs", "lr", "sparsity", "d", "w", "r",
    "base", "before", "after", "val", "macs", "params", "macs_down", "params_down",
    "ms", "time_share", "timed", "shared_l1", "select_seconds", "select_images",
    "seconds", "images_per_s", "precision", "device", "torch", "revision",
]  # fmt: skip
MADE_WITH = ("device", "torch", "revision")
# what is replaced at once where rows are committed in parts
PART = ("base_id", "method", "share", "length", "precision")


def collect_rows(profile: str, kind: str = "rows") -> pd.DataFrame:
    """One row per pruned network over all metrics.json of a profile.

    Device, torch and revision are the row's own where it names them, else its run's.
    `kind`: "latency", or one of `paths.PARTS`, e.g. the points of a predictor.
    """
    rows = []
    for run in settings.read_profile(profile):
        if not run.metrics.is_file():
            continue
        metrics = paths.read_json(run.metrics)
        try:
            made_with = {key: metrics["environment"][key] for key in MADE_WITH}
            found = metrics["rows"] if kind == "rows" else metrics.get(kind, [])
            rows += [made_with | row for row in found]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{run.metrics}: not the metrics of a run ({error!r})"
            ) from None
    return pd.DataFrame(rows)


def format_table(table: pd.DataFrame) -> str:
    """The summary as a Markdown table, two decimals; an empty s.d. means one seed."""
    shown = table.copy()
    for column in shown:
        digits = "g" if column == "rate" else ".2f"
        shown[column] = [_format_value(value, digits) for value in shown[column]]
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in shown.values.tolist()]
    return "\n".join(lines)


def _format_value(value, digits: str) -> str:
    if pd.isna(value):
        return ""
    return f"{value:{digits}}" if isinstance(value, float) else str(value)


def draw_results(rows: pd.DataFrame) -> Figure:
    """Accuracy of every network before and after fine-tuning; a dot is a base or seed.

    A network is named by its method and by what else varies among the rows; the bar is
    the mean over its dots, the dotted line that of the unpruned networks.
    """
    told = [key for key in (*report.KEYS, "length", "lr", "sparsity") if key in rows]
    told.remove("method")
    if "length" in told and (rows["length"] == rows["epochs"]).all():
        told.remove("length")
    varied = [key for key in told if rows[key].nunique(dropna=False) > 1]
    names = []
    for row in rows.to_dict("records"):
        own = [key for key in varied if key != "sparsity" or row[key] > 0]
        names.append(", ".join([row["method"], *(f"{key} {row[key]}" for key in own)]))
    shown = rows.assign(network=names).sort_values("macs_down", kind="stable")
    order = list(dict.fromkeys(shown["network"]))
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, ("before", "after"), strict=True):
        sns.stripplot(
            shown, x=column, y="network", order=order, jitter=False, color="C0",
            alpha=0.7, ax=axis,
        )  # fmt: skip
        means = shown.groupby("network")[column].mean().reindex(order)
        axis.scatter(means, range(len(order)), marker="|", s=160, color="k", zorder=3)
        axis.axvline(rows["base"].mean(), color="0.5", lw=1, ls=":")
        axis.set(xlabel="top-1, test (%)", ylabel="")
        axis.set_title(f"{column} fine-tuning", fontsize="medium")
        axis.grid(axis="y", lw=0.4)
    nets = rows[["net", "dataset"]].drop_duplicates().to_numpy()
    title = ", ".join(f"{net} on {data}" for net, data in nets)
    figure.suptitle(f"{title}; dotted: unpruned", fontsize="medium")
    return figure


def main() -> None:
    """Print the table of a profile and keep it beside the runs; publish if asked."""
    parser = argparse.ArgumentParser(description="The results table of a profile.")
    parser.add_argument("--profile", default=report.QUICK)
    parser.add_argument("--publish", action="store_true", help="commit what it made")
    options = parser.parse_args()
    profile = options.profile
    try:
        runs = settings.read_profile(profile)
    except ValueError as error:
        raise SystemExit(f"publish: {error}") from None
    missing = [run.name for run in runs if not run.metrics.is_file()]
    blocked = all("base" in run.varied for run in runs)  # each base is an experiment
    if len(missing) == len(runs) or (missing and options.publish and not blocked):
        names = ", ".join(missing)
        raise SystemExit(
            f"no results yet of {names}: run `make reproduce PROFILE={profile}` first"
        )
    print_results(profile)
    if options.publish:
        publish(profile)


def print_results(profile: str) -> None:
    """Print the table of a profile's pruned networks, and keep it beside the runs."""
    rows = collect_rows(profile)
    if rows.empty:
        print("no pruned network in this profile: its figures are its result")
        return
    table = format_table(report.summarise(rows))
    print(f"\n{table}\n")
    print(
        "base, before, after: top-1 on the test set in percent, unpruned, pruned and\n"
        "recalibrated, fine-tuned (last epoch); macs_down, params_down: reduction in\n"
        "percent, 1 MAC = 1 multiply-add of a convolution or linear layer; n: seeds\n"
        "or bases; ms, time_share: milliseconds of the CPU for 8 images on one\n"
        "thread, and over those of the unpruned network."
    )
    folder = stages.profile_folder(profile)
    paths.write_text(folder / "table.md", table + "\n")
    paths.write_text(folder / "table.json", rows.to_json(orient="records", indent=1))
    if profile != report.QUICK:
        save_results(profile, rows)


def save_results(profile: str, rows: pd.DataFrame) -> None:
    """Draw `results_PROFILE` into the profile's folder."""
    report.set_style()
    shown_columns = RESULT_COLUMNS[: RESULT_COLUMNS.index("macs_down") + 1]
    present = [column for column in shown_columns if column in rows]
    report.save_figure(profile, "results", draw_results(rows), rows[present])


# -- what is committed -----------------------------------------------------------------


def publish(profile: str) -> None:
    """Copy a profile's figures to `figures/`, its rows and points to `data/results/`.

    Nothing else writes there. Of the quick profile only figures: its numbers teach. A
    profile that varies `base` is published in parts: committed rows of a base, method,
    share, length and precision that have not run here stay, and the bases themselves go
    to `data/results/bases`.
    """
    if profile != report.QUICK:
        for kind in ("rows", "latency", *paths.PARTS):
            table = collect_rows(profile, kind)
            if not table.empty:
                publish_table(profile, kind, table)
        publish_bases(profile)
    drawn = sorted((stages.profile_folder(profile) / "figures").glob("[!.]*"))
    if profile != report.QUICK:  # the picture of one base of several tells accidents
        drawn = [path for path in drawn if path.stem.endswith(f"_{profile}")]
    for path in drawn:
        paths.write_atomic(paths.FIGURES / path.name, partial(shutil.copyfile, path))
    print(f"wrote {len(drawn)} files to {paths.shown(paths.FIGURES)}")


def publish_table(profile: str, kind: str, table: pd.DataFrame) -> None:
    """Write `data/results/PROFILE[_KIND].csv`: the agreed columns, each point once."""
    suffix = "" if kind in ("rows", "latency") else f"_{kind}"
    path = paths.RESULTS / f"{profile}{suffix}.csv"
    digits = 6 if kind == "truth" else 4  # a channel's worth is below a thousandth
    if kind == "rows":
        table = table[[column for column in RESULT_COLUMNS if column in table]]
    if kind == "points":
        order = [name for name in ("seed", "chain", "round") if name in table]
        told = [name for name in table if name not in ("seconds", *MADE_WITH)]
        table = table.sort_values(order, kind="stable").drop_duplicates(told)
    if "base_id" in table and path.is_file():
        before = pd.read_csv(path)
        part = [column for column in PART if column in table and column in before]
        ran = pd.MultiIndex.from_frame(table[part].round(digits))
        others = before[~pd.MultiIndex.from_frame(before[part]).isin(ran)]
        table = pd.concat([others, table]).sort_values("base_id", kind="stable")
    text = table.to_csv(index=False, float_format=f"%.{digits}f", lineterminator="\n")
    print(f"wrote {paths.shown(paths.write_text(path, text))}")
    if kind == "rows" and "base_id" in table:  # those that have not run here as well
        save_results(profile, pd.read_csv(path))


def publish_bases(profile: str) -> None:
    """Copy the finished bases of a profile that names one, less optimizer's state."""
    if not any("base" in run.parameters for run in settings.read_profile(profile)):
        return
    for path in sorted((stages.profile_folder(profile) / "baselines").glob("*.pt")):
        state = checkpoint.load(path)
        if len(state["rows"]) < state["identity"]["epochs"]:
            continue  # killed meanwhile: the next run takes it up
        state["optimizer"] = {}
        paths.BASES.mkdir(parents=True, exist_ok=True)
        checkpoint.save(paths.BASES / path.name, state.pop("identity"), **state)
        print(f"wrote {paths.shown(paths.BASES / path.name)}")


if __name__ == "__main__":
    main()
