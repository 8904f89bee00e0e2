"""From claims to verdicts: what is asked, together or alone, and what is stored."""

import argparse
import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from lib import paths, verdicts
from lib.ledger.kinds import ALONE
from lib.ledger.rows import ENOUGH, choose_rows, read_arms, read_contrasts, read_rows
from lib.messages import check_choice, check_known

TABLES = ("claims", "our_claims")
COMPUTED = ["effect", "low", "high", "n", "needed", "verdict"]
COLUMNS = [
    "id", "paper", "claim", "form", "distance", "kind", "rows", "filter", "unit",
    "least", "margin", *COMPUTED, "would_change",
]  # fmt: skip


def read(name: str) -> pd.DataFrame:
    """A table of claims as it is written: text only, an empty field is empty."""
    path = paths.PUBLISHED / f"{name}.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]


def compute(claims: pd.DataFrame) -> pd.DataFrame:
    """The same table with its columns `COMPUTED` filled, as text.

    Where `distance` says how many epochs of fine-tuning, it is those that decide.

    Comparisons of one choice of rows are corrected together: hand over all claims at
    once. Raises `ValueError`, naming the claim, for one that points nowhere: at a file,
    a profile, a contrast, an arm, a printed number or a test that is unknown.

    Step by step in notebooks/41_claims.ipynb.
    """
    if not claims["id"].is_unique:
        twice = claims["id"][claims["id"].duplicated()].iloc[0]
        raise ValueError(f"claim {twice} stands twice in the ledger")
    results: dict[str, dict] = {}
    # comparisons that are corrected together: claim -> question
    families: dict[tuple, dict[Any, str]] = defaultdict(dict)
    claim: Any
    for claim in claims.itertuples():
        with _named(claim):
            check_choice("kind", claim.kind, ("contrast", "ranks", *ALONE))
            if claim.kind in ALONE:
                decide, margin = ALONE[claim.kind], float(claim.margin or 0)
                results[claim.id] = decide(claim.rows, claim.filter, margin)
                continue
            question, *where = claim.filter.removeprefix("not ").split("; ")
            check_question(question, claim.rows)
            family = claim.kind, claim.rows, tuple(where), claim.least, claim.margin
            families[family][claim] = question
    for (kind, files, where, least, margin), asked in families.items():
        limits = {"effect": float(least or verdicts.EFFECT),
                  "margin": float(margin or verdicts.MARGIN)}  # fmt: skip
        with _named(next(iter(asked))):
            questions = dict.fromkeys(asked.values())
            found = judge(kind, files, where, questions, limits)
        for claim, question in asked.items():
            opposite = claim.filter.startswith("not ")
            results[claim.id] = _answer(found[question], limits, opposite)
    ordered = [results[name] for name in claims["id"]]
    texts = {name: [_write(r.get(name)) for r in ordered] for name in COMPUTED}
    lengths = [result.get("length", 0) for result in ordered]
    told = [*map(_tell_length, claims["distance"], lengths)]
    return claims.assign(**texts, distance=told)


def _tell_length(distance: str, length: int) -> str:
    if not length:
        return distance
    epochs = f"{length:.0f} epoch{'s' * (length > 1)} of fine-tuning"
    return re.sub(r"\d+ epochs? of fine-tuning", epochs, distance)


@contextlib.contextmanager
def _named(claim) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"claim {claim.id}: {error}") from None


def list_changes(stored: pd.DataFrame, computed: pd.DataFrame) -> list[str]:
    """One line for each stored field that is not what its rows give."""
    lines = []
    for old, new in zip(stored.itertuples(), computed.itertuples(), strict=True):
        for name in ("distance", *COMPUTED):
            a, b = getattr(old, name), getattr(new, name)
            number = a and b and name in ("effect", "low", "high")
            if abs(float(a) - float(b)) > 2e-3 if number else a != b:
                lines.append(f"{old.id}: {name} stored '{a}', its rows give '{b}'")
    return lines


# -- comparisons -----------------------------------------------------------------------


def check_question(question: str, files: str) -> None:
    """ValueError for a contrast that is not registered, or an arm without rows."""
    rows, registered = read_rows(files), read_contrasts(files)
    if len(registered):
        check_known("contrast", [question], registered["contrast"])
    else:
        read_arms(question, rows)


def judge(
    kind: str,
    files: str,
    where: Iterable[str],
    asked: Iterable[str],
    limits: dict[str, float],
) -> dict[str, dict]:
    """Every question asked of one choice of rows, judged together.

    A profile with registered contrasts answers all of them and no others, each at the
    longest fine-tuning with at least `ENOUGH` bases, else at the longest with two.
    """
    rows, contrasts = choose_rows(read_rows(files), where), read_contrasts(files)
    bases = rows["base_id"].nunique() if len(rows) else 0
    if bases == 0 or (bases == 1 and kind == "ranks"):
        return {question: {"n": 0} for question in asked}
    if kind == "ranks":
        measure = rows["rank" if "rank" in rows else "lead"]
        rows = rows.assign(after=measure, val=measure, macs=1)
    if contrasts.empty:
        arms = [(question, *read_arms(question, rows)) for question in asked]
        if bases == 1:
            return {question: _subtract(rows, *pair) for question, *pair in arms}
        if kind == "ranks":
            return {name: _judge_each(rows, limits, *pair) for name, *pair in arms}
        contrasts = pd.DataFrame(arms, columns=["contrast", "left", "right", "value"])
    lengths = rows.groupby("length") if "length" in rows else [(0, rows)]
    every = pd.concat([verdicts.judge(part, contrasts, **limits).assign(length=length)
                       for length, part in lengths])  # fmt: skip
    every["enough"] = 1 * (every["n"] > 1) + (every["n"] >= ENOUGH)
    best = every.sort_values(["enough", "length"]).drop_duplicates(
        "contrast", keep="last"
    )
    return {row["contrast"]: row for row in best.to_dict("records")}


def _subtract(rows: pd.DataFrame, left: str, right: str, value: str) -> dict[str, Any]:
    """The difference on the one base that there is."""
    means = rows.groupby("method")[value].mean()
    left, right = (verdicts.pick_best(rows, side) for side in (left, right))
    return {"n": 1, "mean": means[left] - means[right]}


def _judge_each(
    rows: pd.DataFrame, limits: dict[str, float], left: str, right: str, value: str
) -> dict[str, Any]:
    """Against every rival of several: nothing was chosen beforehand, as by `val`.

    The least of the gaps and of their ends: an interval of the gap to the best rival.
    ValueError for several on the left: the best would be chosen by what is judged.
    """
    if "|" in left:
        raise ValueError(f"'{left} - {right}': several may stand on the right only")
    rivals = right.split("|")
    pairs = pd.DataFrame({"contrast": rivals, "left": left, "right": rivals})
    found = verdicts.judge(rows, pairs.assign(value=value), **limits)
    if (found["n"] < 2).any():
        return {"n": 0}
    ends = ["mean", "low", "high", "corrected_low", "corrected_high", "n"]
    return {**found[ends].min(), "bases_needed": found["bases_needed"].max(),
            "length": 0}  # fmt: skip


def _answer(found: dict[str, Any], limits: dict, opposite: bool) -> dict[str, Any]:
    """What is found, or its opposite, by the names of `COMPUTED`."""
    if found["n"] == 0:
        return {"n": 0, "verdict": "not tested"}
    sign = -1 if opposite else 1
    mean = sign * found["mean"]
    if found["n"] == 1:  # its seeds repeat its accidents: no interval
        return {"n": 1, "effect": mean, "verdict": "undecided"}
    plain, corrected = (
        tuple(sorted(sign * found[f"{kind}{end}"] for end in ("low", "high")))
        for kind in ("", "corrected_")
    )
    verdict = verdicts.decide(mean, plain, corrected, **limits)
    is_open = verdict in ("direction only", "undecided")  # of several rivals one may be
    return {
        "effect": mean, "low": corrected[0], "high": corrected[1], "n": found["n"],
        "needed": found["bases_needed"] if is_open else None,
        "verdict": verdict, "length": found["length"],
    }  # fmt: skip


def _write(value: Any) -> str:
    """A computed value as the tables have it: text; nothing for none and NaN."""
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.{0 if float(value).is_integer() else 3}f}"


def main() -> None:
    """Compute all verdicts; store them, or say where they part from those stored."""
    parser = argparse.ArgumentParser(description="Verdicts of the ledger.")
    parser.add_argument("--write", action="store_true", help="store what is computed")
    write = parser.parse_args().write
    stored = pd.concat({name: read(name) for name in TABLES})
    found = compute(stored)
    changes = list_changes(stored, found)
    print(found.groupby(level=0)["verdict"].value_counts().to_string())
    print("\n".join(changes) or "every stored verdict is what its rows give")
    if changes and not write:
        raise SystemExit("store them with `python -m lib.ledger --write`")
    for name in TABLES if write else ():
        text = found.loc[name].to_csv(index=False, lineterminator="\n")
        path = paths.write_text(paths.PUBLISHED / f"{name}.csv", text)
        print(f"wrote {paths.shown(path)}")
