"""The rows that decide: committed tables, registered contrasts, and choices of them."""

import re
from collections.abc import Iterable

import pandas as pd

from lib import paths
from lib.messages import check_known

ENOUGH = 6  # bases; of fewer, no signs are rare enough to exclude chance


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
    profiles = [path.stem for path in (paths.NOTEBOOKS / "params").glob("*.yaml")]
    parts = ["", *(f"_{part}" for part in paths.PARTS)]
    known = {f"{name}{part}.csv" for name in profiles for part in parts}
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
    for item in where if len(rows) else ():
        column, value = item.split("=")
        check_known("column", [column], rows.columns)
        check_known(column, [value], set(rows[column].astype(str)))
        rows = rows[rows[column].astype(str) == value]
    return rows


def pick_rates(files: str, methods: Iterable[str]) -> dict[str, float]:
    """The learning rate of each method: that of its trial with the best `val`.

    ValueError: a file without rows, a method that was never tried.
    """
    trials = read_rows(files).reset_index(drop=True)
    if trials.empty:
        raise ValueError(f"{files}: no trial is committed")
    check_known("trial of method", methods, set(trials["method"]))
    best = trials.loc[trials.groupby("method")["val"].idxmax()]
    rates = best.set_index("method")["lr"]
    return {method: float(rates[method]) for method in methods}


def read_arms(question: str, rows: pd.DataFrame, *others: str) -> tuple[str, str, str]:
    """Left, right and the compared column of `LEFT - RIGHT [before]`.

    ValueError for an arm that is neither a method of the rows nor one of `others`.
    """
    found = re.fullmatch(r"(\S+) - (\S+)( before)?", question)
    if found is None:
        raise ValueError(f"'{question}' is no comparison: write LEFT - RIGHT")
    left, right, before = found.groups()
    if len(rows):
        named = [*left.split("|"), *right.split("|")]
        check_known("arm", named, {*rows["method"], *others})
    return left, right, "before" if before else "after"
