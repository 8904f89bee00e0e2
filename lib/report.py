"""Tables and figures: the last step of every notebook and of every profile.

    python -m lib.report --profile quick

prints the table of a profile that has run.
"""

import argparse

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib import paths, settings

KEYS = ["net", "dataset", "method", "rate", "keep", "residual", "epochs"]
RESULT_COLUMNS = [
    "method", "net", "dataset", "seed", "profile", "rate", "keep", "residual",
    "epochs", "d", "w", "r", "base", "before", "after", "macs", "params", "macs_down",
    "params_down", "seconds", "images_per_s", "precision", "device", "torch",
    "revision",
]  # fmt: skip
MADE_WITH = ("device", "torch", "revision")
QUICK = "quick"  # its numbers teach, they are not results


def collect_rows(profile: str, kind: str = "rows") -> pd.DataFrame:
    """One row per pruned network over all metrics.json of a profile.

    Device, torch and revision are the row's own where it names them, else its run's.
    `kind` "points": one row per measured point of an accuracy predictor instead.
    """
    rows = []
    for run in settings.read_profile(profile):
        if not _has_run(run):
            continue
        path = run.folder / "metrics.json"
        metrics = paths.read_json(path)
        try:
            made_with = {key: metrics["environment"][key] for key in MADE_WITH}
            found = metrics["rows"] if kind == "rows" else metrics.get(kind, [])
            rows += [made_with | row for row in found]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the metrics of a run ({error!r})") from None
    return pd.DataFrame(rows)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds; accuracies and reductions in percent."""
    if rows.empty:
        return rows
    keys = [key for key in KEYS if key in rows]
    if "epochs" in rows:
        rows = rows.assign(epochs=rows["epochs"].astype("Int64"))
    grouped = rows.groupby(keys, sort=False, dropna=False)
    table = grouped.agg(
        n=("seed", "nunique"), base=("base", "mean"), before=("before", "mean"),
        after=("after", "mean"), sd=("after", "std"),
        macs_down=("macs_down", "mean"), params_down=("params_down", "mean"),
    )  # fmt: skip
    table.insert(4, "delta", table["after"] - table["base"])
    return table.reset_index()


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


def save_figure(name: str, figure: Figure, numbers: pd.DataFrame) -> None:
    """Write `figures/NAME.png` and beside it the numbers it shows, `NAME.csv`."""
    folder = paths.figures_root()
    paths.write_atomic(
        folder / f"{name}.png",
        lambda tmp: figure.savefig(
            tmp, dpi=130, bbox_inches="tight", metadata={"Software": None}
        ),
    )
    paths.write_text(folder / f"{name}.csv", numbers.to_csv(index=False))


def figure_name(name: str, run: str) -> str:
    """`NAME` for the quick profile, `NAME_PROFILE[_VARIED]` for a run of another."""
    profile, *rest = run.split("/")
    return name if profile == QUICK else "_".join([name, profile, *rest[1:]])


def draw_results(rows: pd.DataFrame) -> Figure:
    """Accuracy against MACs for every method, mean and s.d. over seeds."""
    shown = rows.melt(
        ["method", "macs", "seed"], ["before", "after"],
        var_name="fine-tuning", value_name="top1",
    )  # fmt: skip
    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    sns.lineplot(
        shown.assign(macs=shown["macs"] / 1e6), x="macs", y="top1", hue="method",
        style="fine-tuning", style_order=["after", "before"], markers=True,
        errorbar="sd", err_style="bars", ax=axis,
    )  # fmt: skip
    axis.axhline(rows["base"].mean(), color="0.5", lw=1, ls=":")
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1))
    nets = ", ".join(f"{net} on {data}" for net, data in
                     rows[["net", "dataset"]].drop_duplicates().to_numpy())  # fmt: skip
    axis.set(xlabel="million MACs per image", ylabel="top-1, test (%)",
             title=f"{nets}; dotted: unpruned; bars: s.d.")  # fmt: skip
    return figure


def set_style() -> None:
    """The look of every figure: one theme, a palette safe for colour-blind readers."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")


def publish_results(profile: str, rows: pd.DataFrame) -> None:
    """Write the rows of a full profile to `data/results/PROFILE.csv`, one per run."""
    columns = [column for column in RESULT_COLUMNS if column in rows]
    _write_table(f"{profile}.csv", rows[columns])


def publish_points(profile: str, points: pd.DataFrame) -> None:
    """Write the measured points of a profile to `data/results/PROFILE_points.csv`."""
    order = [column for column in ("seed", "chain", "round") if column in points]
    told = [column for column in points if column not in ("seconds", *MADE_WITH)]
    points = points.sort_values(order, kind="stable").drop_duplicates(told)
    _write_table(f"{profile}_points.csv", points)


def _write_table(name: str, table: pd.DataFrame) -> None:
    path = paths.results_root() / name
    text = table.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    paths.write_text(path, text)
    print(f"wrote {paths.shown(path)}")


def main() -> None:
    """Print the table of a profile; keep it beside the runs, publish a full one."""
    parser = argparse.ArgumentParser(
        description="Print the results table of a profile."
    )
    parser.add_argument("--profile", default=QUICK)
    profile = parser.parse_args().profile
    rows, points = collect_rows(profile), collect_rows(profile, "points")
    done = [run for run in settings.read_profile(profile) if _has_run(run)]
    if not done:
        raise SystemExit(
            f"no results yet: run `make reproduce PROFILE={profile}` first"
        )
    if rows.empty and points.empty:
        print("no pruned network in this profile: its figures are its result")
    if not rows.empty:
        print_results(profile, rows)
    if not points.empty and profile != QUICK:
        publish_points(profile, points)


def _has_run(run: settings.Run) -> bool:
    return (run.folder / "metrics.json").is_file()


def print_results(profile: str, rows: pd.DataFrame) -> None:
    """Print the table of a profile's pruned networks; publish a full profile's."""
    table = format_table(summarise(rows))
    print(f"\n{table}\n")
    print(
        "base, before, after: top-1 on the test set in percent, unpruned, pruned and\n"
        "recalibrated, fine-tuned (last epoch); macs_down, params_down: reduction in\n"
        "percent, 1 MAC = 1 multiply-add of a convolution or linear layer; n: seeds."
    )
    folder = paths.runs_root() / profile
    paths.write_text(folder / "table.md", table + "\n")
    paths.write_text(folder / "table.json", rows.to_json(orient="records", indent=1))
    if profile != QUICK:
        publish_results(profile, rows)
        set_style()
        shown_columns = RESULT_COLUMNS[: RESULT_COLUMNS.index("macs_down") + 1]
        present = [column for column in shown_columns if column in rows]
        save_figure(f"results_{profile}", draw_results(rows), rows[present])


if __name__ == "__main__":
    main()
