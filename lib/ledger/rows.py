"""The rows that decide: committed tables, registered contrasts, and choices of them."""

from collections.abc import Iterable

import pandas as pd

from lib import paths
from lib.messages import check_known

ENOUGH = 6  # bases; of fewer, no signs are rare enough to exclude chance
# what a profile commits beside its rows, and a claim may ask
PARTS = ("ranks", "points", "swaps", "energies", "errors", "leads",
         "curves")  # fmt: skip


def read_contrasts(files: str = "") -> pd.DataFrame:
    """All registered contrasts, or those for the profile of the first of the files."""
    table = pd.read_csv(paths.PUBLISHED / "contrasts.csv", comment="#")
    profile = files.split("|")[0].removesuffix(".csv")
    return table[table["profile"] == profile] if files else table


def read_rows(files: str) -> pd.DataFrame:
    """Committed rows of files joined by "|", with their base; empty before they exist.

    A file that is neither there nor that of a known profile is refused. Rows without
    `base_id` are of one base, unless the unpruned accuracy differs from seed to seed.
    """
    profiles = {path.stem for path in (paths.NOTEBOOKS / "params").glob("*.yaml")}
    profiles |= set(read_contrasts()["profile"])
    known = {f"{name}.csv" for name in profiles}
    known |= {f"{name}_{part}.csv" for name in profiles for part in PARTS}
    known |= {path.name for path in paths.RESULTS.glob("*.csv")}
    check_known("file of rows", files.split("|"), known)
    there = [paths.RESULTS / name for name in files.split("|")]
    rows = [pd.read_csv(path) for path in there if path.is_file()]
    table = pd.concat(rows) if rows else pd.DataFrame()
    if rows and "base_id" not in table:
        bases = table.groupby("seed")["base"].first().nunique()
        table["base_id"] = table["seed"] if bases > 1 else 0
    return table


def choose_rows(rows: pd.DataFrame, where: Iterable[str]) -> pd.DataFrame:
    """Those with each `column=value`; ValueError for a value that no row has."""
    for item in where:
        column, value = item.split("=")
        check_known("column", [column], rows.columns)
        check_known(column, [value], set(rows[column].astype(str)))
        rows = rows[rows[column].astype(str) == value]
    return rows
