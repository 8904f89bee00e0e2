"""From claims to verdicts: what is asked, together or alone, and what is stored."""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pandas as pd

from lib import paths, verdicts
from lib.ledger.kinds import ALONE, ANY, ARMS, find_test
from lib.ledger.rows import ENOUGH, choose_rows, read_contrasts, read_rows
from lib.messages import check_choice, check_known

TABLES = ("claims", "our_claims")
COMPUTED = ["effect", "low", "high", "n", "needed", "verdict"]
COLUMNS = [
    "id", "paper", "claim", "form", "distance", "kind", "rows", "filter", "unit",
    "least", "margin", *COMPUTED, "would_change",
]  # fmt: skip
TOGETHER = ("contrast", "ranks")  # corrected for all that is asked of the same rows
KINDS = (*TOGETHER, *ALONE, "test", "none")


def read(name: str) -> pd.DataFrame:
    """A table of claims as it is written: text only, an empty field is empty."""
    path = paths.PUBLISHED / f"{name}.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]


def compute(claims: pd.DataFrame) -> pd.DataFrame:
    """The same table with its columns `COMPUTED` filled, as text.

    Comparisons of one choice of rows are corrected together: hand over all claims at
    once. Raises `ValueError`, naming the claim, for one that points nowhere: at a file,
    a profile, a contrast, an arm, a printed number or a test that is unknown.

    Step by step in notebooks/41_claims.ipynb.
    """
    if not claims["id"].is_unique:
        twice = claims["id"][claims["id"].duplicated()].iloc[0]
        raise ValueError(f"claim {twice} stands twice in the ledger")
    families: dict[tuple, dict[str, Any]] = defaultdict(dict)
    for claim in claims.itertuples():
        with _named(claim):
            _ask(claim, families)
    results = []
    for claim in claims.itertuples():
        with _named(claim):
            results.append(_answer(claim, families))
    texts = {name: [_write(r.get(name)) for r in results] for name in COMPUTED}
    return claims.assign(**texts)


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
        for name in COMPUTED:
            a, b = getattr(old, name), getattr(new, name)
            number = a and b and name in ("effect", "low", "high")
            if abs(float(a) - float(b)) > 2e-3 if number else a != b:
                lines.append(f"{old.id}: {name} stored '{a}', its rows give '{b}'")
    return lines


def _split(claim) -> tuple[str, bool, tuple]:
    """The question without its `not`, whether it had one, and its family."""
    question, *where = claim.filter.removeprefix("not ").split("; ")
    family = claim.kind, claim.rows, tuple(where), claim.least, claim.margin
    return question, claim.filter.startswith("not "), family


def _ask(claim, families: dict) -> None:
    """Refuse a claim that points nowhere; put its comparison to its family."""
    check_choice("kind", claim.kind, KINDS)
    question, _, family = _split(claim)
    if claim.kind == "none":
        check_choice("filter", claim.filter, ("not tested", "not testable here"))
    if claim.kind == "test":
        find_test(claim.rows, question)
    if claim.kind not in (*TOGETHER, "loss"):
        return
    rows, registered = read_rows(claim.rows), read_contrasts(claim.rows)
    if len(registered) and claim.kind != "loss":
        check_known("contrast", [question], registered["contrast"])
    elif (arms := ARMS.fullmatch(question)) is None:
        raise ValueError(f"'{question}' is no comparison: write LEFT - RIGHT")
    elif len(rows):
        named = [name for side in arms.groups()[:2] for name in side.split("|")]
        check_known("arm", named, {*rows["method"], *[ANY] * (claim.kind == "loss")})
    families[family][question] = None


def _answer(claim, families: dict) -> dict[str, Any]:
    question, opposite, family = _split(claim)
    if claim.kind == "none":
        return {"verdict": claim.filter}
    if claim.kind == "test":
        return {"verdict": "contradicted" if opposite else "reproduced"}
    if claim.kind in ALONE:
        return ALONE[claim.kind](claim.rows, claim.filter, float(claim.margin or 0))
    limits = {
        "effect": float(claim.least or verdicts.EFFECT),
        "margin": float(claim.margin or verdicts.MARGIN),
    }
    if families[family][question] is None:
        kind, files, where, *_ = family
        families[family] = judge(kind, files, where, list(families[family]), limits)
    found = families[family][question]
    if found["n"] == 0:
        return {"n": 0, "verdict": "not tested"}
    sign = -1 if opposite else 1
    if found["n"] == 1:  # its seeds repeat its accidents: no interval
        return {"n": 1, "effect": sign * found["mean"], "verdict": "undecided"}
    interval = sorted([sign * found["low"], sign * found["high"]])
    low, high = sorted([sign * found["corrected_low"], sign * found["corrected_high"]])
    mean = sign * found["mean"]
    verdict = verdicts.decide(mean, tuple(interval), (low, high), **limits)
    return {"effect": mean, "low": low, "high": high, "n": found["n"],
            "needed": found["bases_needed"], "verdict": verdict}  # fmt: skip


# -- comparisons -----------------------------------------------------------------------


def judge(
    kind: str, files: str, where: tuple, asked: list[str], limits: dict[str, float]
) -> dict[str, dict]:
    """Every question asked of one choice of rows, judged together.

    A profile with registered contrasts answers all of them and no others, each at the
    longest fine-tuning with at least `ENOUGH` bases, else at the longest with two.
    """
    rows, registered = read_rows(files), read_contrasts(files)
    rows = choose_rows(rows, where) if len(rows) else rows
    if rows.empty or (kind == "ranks" and rows["base_id"].nunique() < 2):
        return {question: {"n": 0} for question in asked}
    if len(registered):
        every = pd.concat([verdicts.judge(part, registered).assign(length=length)
                           for length, part in rows.groupby("length")])  # fmt: skip
        every["enough"] = 1 * (every["n"] > 1) + (every["n"] >= ENOUGH)
        best = every.sort_values(["enough", "length"]).drop_duplicates(
            "contrast", keep="last"
        )
        return {row["contrast"]: row for row in best.to_dict("records")}
    if kind == "ranks":
        measure = rows["rank" if "rank" in rows else "lead"]
        rows = rows.assign(after=measure, val=measure, macs=1)
    differences, found = {}, {}
    for question in asked:
        left, right, before = ARMS.findall(question)[0]
        right, value = verdicts.pick_best(rows, right), before or "after"
        if rows["base_id"].nunique() > 1:
            gaps = verdicts.pair_arms(rows, left, right, value=value.strip())
            differences[question] = gaps.to_list()
        else:
            mean = rows.groupby("method")[value.strip()].mean()
            found[question] = {"n": 1, "mean": mean[left] - mean[right]}
    return found | {c.name: c.row for c in verdicts.compare(differences, **limits)}


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
