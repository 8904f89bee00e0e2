"""Tables and figures: the last step of every notebook."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lib import paths, stages
from lib.messages import check_known
from lib.verdicts import MACHINE

KEYS = ["net", "dataset", "method", "share", "rate", "keep", "residual", "epochs"]
# what tells one network from another, whatever machine made it
NETWORK = (*KEYS, "base_id", "select_seed", "seed", "length", "lr", "d", "w", "r")
QUICK = "quick"  # its numbers teach, they are not results


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds; accuracies and reductions in percent."""
    if rows.empty:
        return rows
    if "epochs" in rows:
        rows = rows.assign(epochs=rows["epochs"].astype("Int64"))
    columns = ["base", "before", "after", "sd", "macs_down", "params_down"]
    columns += [name for name in ("ms", "time_share") if name in rows]
    table = _average(rows, [key for key in KEYS if key in rows], columns)
    table.insert(4, "delta", table["after"] - table["base"])
    return table.reset_index()


def _average(rows: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """n seeds or bases and the means over them, by `keys`; `sd` is that of `after`.

    Of several networks on one seed or base its mean counts.
    """
    unit = rows["seed"]
    if "base_id" in rows:  # of a profile some notebooks have bases, others seeds
        unit = rows["base_id"].fillna(unit)
    rows = rows.assign(unit=unit)
    grouped = rows.groupby([*keys, "unit"], sort=False, dropna=False, as_index=False)
    once = grouped.mean(numeric_only=True).groupby(keys, sort=False, dropna=False)
    told = {name: (name, "mean") for name in columns} | {"sd": ("after", "std")}
    return once.agg(n=("unit", "nunique"), **told)


def list_gaps(rows: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """What the first method of each pair is ahead of the second by, paired by seed.

    Columns: method, against; `before` and `after` fine-tuning the mean difference in
    points, `sd` the standard deviation of the one after, `ahead` on how many seeds it
    is positive. `rows` are of one setting: a method twice on a seed is a ValueError.
    """
    before, after = (rows.pivot(index="seed", columns="method", values=value)
                     for value in ("before", "after"))  # fmt: skip
    found = []
    for method, other in pairs:
        gap = (after[method] - after[other]).dropna()
        start = (before[method] - before[other]).mean()
        ahead = f"{(gap > 0).sum()} of {len(gap)}"
        found.append([method, other, start, gap.mean(), gap.std(), ahead])
    columns = ["method", "against", "before", "after", "sd", "ahead"]
    return pd.DataFrame(found, columns=columns)


def put_beside(
    rows: Iterable[dict] | pd.DataFrame, profile: str, **where
) -> pd.DataFrame:
    """Your run beside the full one: top-1 before and after fine-tuning, by method.

    `rows` are of the run at hand, `profile` names the committed rows, of which `where`
    (column=value) chooses. `n` counts seeds or bases, `sd` is over them; the headings
    say what was trained, and for how many epochs. Raises `ValueError` where the profile
    has no committed rows, or no such ones.
    """
    path = paths.RESULTS / f"{profile}.csv"
    if not path.is_file():
        raise ValueError(f"no rows of '{profile}' are committed ({paths.shown(path)})")
    full = pd.read_csv(path)
    for column, value in where.items():
        check_known("column", [column], full.columns)
        full = full[full[column] == value]
    if full.empty:
        raise ValueError(f"'{profile}' has no rows with {where}")
    sides = {"your run": pd.DataFrame(rows), "the full run": drop_repeats(full)}
    tables = {f"{name}: {_describe(part)}":
              _average(part, ["method"], ["before", "after", "sd"])
              for name, part in sides.items()}  # fmt: skip
    return pd.concat(tables, axis=1)


def drop_repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """Of networks that were made again on another machine those of the first alone."""
    told = [name for name in NETWORK if name in rows]
    kind = rows[[name for name in MACHINE if name in rows]].astype(str).agg(" ".join, 1)
    first = kind.groupby([rows[name] for name in told], dropna=False).transform("first")
    return rows[kind == first]


def _describe(rows: pd.DataFrame) -> str:
    """Network, images and length of the training that some rows had in common."""
    nets, images = (" + ".join(rows[name].unique()) for name in ("net", "dataset"))
    epochs = sorted(rows["epochs"].unique())
    told = ", ".join(f"{n:g}" for n in epochs)
    return f"{nets}, {images}, {told} epoch{'' if epochs == [1] else 's'}"


def save_figure(run: str, name: str, figure: Figure, numbers: pd.DataFrame) -> Path:
    """Write a picture and, beside it, the numbers it shows; return the picture's path.

    Both go to `figures/` in the folder of the run's profile: `NAME.png` and `NAME.csv`
    for the quick profile, `NAME_PROFILE[_VARIED]` for others. `make publish` copies
    them to the committed `figures/`.
    """
    profile, *rest = run.split("/")
    if profile != QUICK:
        name = "_".join([name, profile, *rest[1:]])
    path = stages.profile_folder(run) / "figures" / f"{name}.png"

    def write(tmp: Path) -> None:  # without matplotlib's version in the file
        figure.savefig(tmp, dpi=130, bbox_inches="tight", metadata={"Software": None})

    paths.write_atomic(path, write)
    paths.write_text(path.with_suffix(".csv"), numbers.to_csv(index=False))
    return path


def set_style() -> None:
    """The look of every figure: one theme, a palette safe for colour-blind readers."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
