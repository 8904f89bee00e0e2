"""The ledger: every claim, the rows that decide it, the verdict that follows from them.

    python -m lib.ledger [--write]

Two tables in `data/published`: `claims.csv`, the claims of the three papers, and
`our_claims.csv`, those of this repository. What is claimed and which rows decide is
written by hand; the columns `COMPUTED` are filled from committed rows, by the rule of
`lib.verdicts`. A claim that says two things has a row for each (S11a, S11b).

kind       rows                    filter
contrast   of `data/results`       a registered contrast, or `LEFT - RIGHT [before]`,
                                   before fine-tuning; then columns, `; share=0.5`
loss       of `data/results`       `LEFT - RIGHT` at any cost: LEFT loses at most
                                   `margin`; RIGHT `any`: the best network of all
fit        of `data/results`       `product` or `lines`, see `map3d.find_misfit`
ranks      of `data/results`       `LEFT - RIGHT`, rank correlations, mean over layers
size       of `data/published`     `net=NET [variant=] rate= [layers=] [quantity=]`
latency    of `data/results`       `column=value ...`, the networks timed in runtimes
test       a file of `tests`       the test that decides
none                               `not tested` or `not testable here`

`not` in front of a contrast or a test asks for the opposite. Several files, networks or
right-hand arms are joined by "|". `n` counts bases, of `size` printed numbers; `low`
and `high` are the interval that decides, corrected for all that was asked of its rows.
"""

import argparse
import ast
import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
import torch

from lib import baselines, cost, map3d, models, paths, plan, scop, surgery, verdicts
from lib.graph import build_graph
from lib.messages import check_choice, check_known

TABLES = ("claims", "our_claims")
COMPUTED = ["effect", "low", "high", "n", "needed", "verdict"]
COLUMNS = [
    "id", "paper", "claim", "form", "distance", "kind", "rows", "filter", "unit",
    "least", "margin", *COMPUTED, "would_change",
]  # fmt: skip
KINDS = ("contrast", "loss", "fit", "ranks", "size", "latency", "test", "none")
ENOUGH = 6  # bases; of fewer, no signs are rare enough to exclude chance
ANY = "any"
ARMS = re.compile(r"(\S+) - (\S+)( before)?")


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
    if claim.kind not in ("contrast", "loss", "ranks"):
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
    if claim.kind == "size":
        return compare_sizes(claim.rows, claim.filter, float(claim.margin))
    if claim.kind == "loss":
        return compare_losses(claim.rows, question, float(claim.margin))
    if claim.kind == "fit":
        return judge_form(claim.rows, claim.filter)
    if claim.kind == "latency":
        return compare_times(claim.rows, claim.filter, float(claim.margin))
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
        rows = rows.assign(after=rows["rank"], val=rows["rank"], macs=1)
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


def choose_rows(rows: pd.DataFrame, where: Iterable[str]) -> pd.DataFrame:
    """Those with each `column=value`; ValueError for a value that no row has."""
    for item in where:
        column, value = item.split("=")
        check_known("column", [column], rows.columns)
        check_known(column, [value], set(rows[column].astype(str)))
        rows = rows[rows[column].astype(str) == value]
    return rows


def compare_losses(files: str, question: str, margin: float) -> dict[str, Any]:
    """Is LEFT within `margin` points of RIGHT, which may cost more? By the t interval.

    "reproduced" where the interval lies above -margin, "contradicted" where it lies
    below; at the longest fine-tuning with `ENOUGH` bases, else at that with most.
    """
    rows = read_rows(files)
    found: dict[tuple, dict] = {}
    for length, part in rows.groupby("length") if len(rows) else ():
        left, right, _ = ARMS.findall(question)[0]
        if right == ANY:
            part = verdicts.list_networks(part, left)
            right = "|".join(sorted(set(part["method"]) - {left}))
        left, right = (verdicts.pick_best(part, side) for side in (left, right))
        paired = ("net", "dataset", "length")
        n = verdicts.count_common(part, left, right)
        if n > 1:
            gaps = verdicts.pair_arms(part, left, right, same=paired, within=math.inf)
            low, high = verdicts.interval_of(gaps.to_numpy())
            needed = None
            if low <= -margin <= high:
                needed = verdicts.count_bases_needed(gaps.mean() + margin, gaps.std())
            found[min(n, ENOUGH), length] = {
                "effect": gaps.mean(), "low": low, "high": high, "n": n,
                "needed": needed,
                "verdict": "reproduced" if low > -margin
                else "contradicted" if high < -margin else "undecided",
            }  # fmt: skip
    return found[max(found)] if found else {"n": 0, "verdict": "not tested"}


def judge_form(file: str, form: str) -> dict[str, Any]:
    """What a form of the accuracy misses: "contradicted" where p is below .05.

    "reproduced" where that is no more than chance leaves (`low` to `high`: 0 to that).
    """
    points = read_rows(file)
    if len(points) == 0 or points["base_id"].nunique() < 2:
        return {"n": 0, "verdict": "not tested"}
    found = map3d.find_misfit(points, form)
    verdict = "reproduced" if found["misfit"] <= found["noise"] else "undecided"
    verdict = "contradicted" if found["p"] < verdicts.ALPHA else verdict
    return {"effect": found["misfit"], "low": 0.0, "high": found["noise"],
            "n": found["n"], "verdict": verdict}  # fmt: skip


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
    known = {
        f"{name}{end}.csv" for name in profiles for end in ("", "_ranks", "_points")
    }
    known |= {path.name for path in paths.RESULTS.glob("*.csv")}
    check_known("file of rows", files.split("|"), known)
    there = [paths.RESULTS / name for name in files.split("|")]
    rows = [pd.read_csv(path) for path in there if path.is_file()]
    table = pd.concat(rows) if rows else pd.DataFrame()
    if rows and "base_id" not in table:
        bases = table.groupby("seed")["base"].first().nunique()
        table["base_id"] = table["seed"] if bases > 1 else 0
    return table


# -- sizes and tests -------------------------------------------------------------------


def compare_sizes(file: str, networks: str, margin: float) -> dict[str, Any]:
    """The largest miss of counted against printed reductions (points), over networks.

    SCOP's rows take a share of every convolution inside the blocks, scattered; others
    one of every layer, or of those whose names begin with `layers=`, streams tied.
    """
    check_known("file", [file], [path.name for path in paths.PUBLISHED.glob("*.csv")])
    table = pd.read_csv(paths.PUBLISHED / file, keep_default_na=False)
    own = table[table["method"] == file.removesuffix(".csv")]
    printed = own.set_index(["net", "variant", "quantity"])["value"].astype(float)
    misses = []
    for network in networks.split(" | "):
        given = dict(item.split("=") for item in network.split())
        down = measure_size(given["net"], float(given["rate"]), given.get("layers", ""),
                            inside=file == "scop.csv")  # fmt: skip
        for quantity in given.get("quantity", "macs_down,params_down").split(","):
            key = given["net"].removesuffix("_b"), given.get("variant", ""), quantity
            check_known("printed number", [str(key)], map(str, printed.index))
            misses.append(down[quantity] - printed[key])
    worst = max(misses, key=abs)
    verdict = "reproduced" if abs(worst) <= margin else "contradicted"
    return {"effect": worst, "n": len(misses), "verdict": verdict}


def compare_times(file: str, networks: str, margin: float) -> dict[str, Any]:
    """How far the time kept lies above the MACs kept (shares), by runtime.

    `effect` is the mean over runtimes, `low` and `high` their range: of measured times,
    no interval. "contradicted" where every runtime misses by more than `margin`.
    """
    there = [path.name for path in paths.RESULTS.glob("*.csv")]
    check_known("file of rows", [file], there)
    rows = pd.read_csv(paths.RESULTS / file)
    rows = choose_rows(rows, networks.split("; "))
    over = 1 / rows["speedup"] - rows["macs_share"]
    within = over.abs() <= margin
    verdict = "reproduced" if within.all() else "undecided"
    return {"effect": over.mean(), "low": over.min(), "high": over.max(),
            "n": rows["runtime"].nunique(),
            "verdict": verdict if within.any() else "contradicted"}  # fmt: skip


def measure_size(net: str, rate: float, layers: str = "", *, inside: bool) -> dict:
    """Reductions (percent) of a network without weights, shrunk by equal scores."""
    shape = models.input_shape(net)
    with torch.device("meta"):
        whole = models.build(net, num_classes=1000 if shape[1] > 100 else 10)
    graph, scores = build_graph(whole, shape), baselines.uniform(whole)
    if inside:
        wanted = scop.block_layers(whole, shape, graph=graph)
    else:
        wanted = [name for name in scores if name.startswith(layers)]
    # what goes is rounded down in SCOP's code; for others the nearest number is kept
    rates = {
        n: rate if inside else (c - round((1 - rate) * c) + 0.5) / c
        for n, c in ((n, len(scores[n])) for n in wanted)
    }
    chosen = plan.from_scores(
        whole, {n: scores[n] for n in wanted}, shape, rate=rates,
        residual="scatter" if inside else "tie", graph=graph,
    )  # fmt: skip
    small = surgery.shrink(whole, chosen, shape, graph=graph)
    return cost.count(small, shape).down_from(cost.count(whole, shape))


def find_test(file: str, name: str) -> None:
    """Raise `ValueError` unless `file` has a test of that name."""
    files = [paths.shown(path) for path in (paths.ROOT / "tests").glob("test_*.py")]
    check_known("file", [file], files)
    nodes = ast.walk(ast.parse((paths.ROOT / file).read_text(encoding="utf-8")))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    check_known("test", [name], names)


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


if __name__ == "__main__":
    main()
