"""Kinds of claims that are decided alone: one function each, from rows to a verdict.

Each returns the fields of `lib.ledger.COMPUTED` that it fills.
"""

import ast
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from lib import baselines, cost, map3d, models, paths, plan, scop, surgery, verdicts
from lib.graph import build_graph
from lib.ledger.rows import ENOUGH, choose_rows, read_arms, read_rows
from lib.messages import check_choice, check_known

ANY = "any"


def compare_losses(files: str, question: str, margin: float) -> dict[str, Any]:
    """Is LEFT within `margin` points of RIGHT, which may cost more? By the t interval.

    "reproduced" where the interval lies above -margin, "contradicted" where it lies
    below; at the longest fine-tuning with `ENOUGH` bases, else at that with most.
    """
    rows = read_rows(files)
    named, rival, value = read_arms(question, rows, ANY)
    if value != "after":
        raise ValueError(f"'{question}': a loss is one of the accuracy after")
    found: dict[tuple, dict] = {}
    for length, part in rows.groupby("length") if len(rows) else ():
        left, right = named, rival
        if right == ANY:
            part = verdicts.list_networks(part, left)
            right = "|".join(sorted(set(part["method"]) - {left}))
        else:
            part = verdicts.share_bases(part, f"{left}|{right}")
        part, left, right = verdicts.pick_arms(part, left, right)
        paired = ("net", "dataset", "length")
        n = verdicts.share_bases(part, f"{left}|{right}")["base_id"].nunique()
        if n > 1:
            gaps = verdicts.pair_arms(part, left, right, same=paired, within=math.inf)
            held = _hold(gaps.to_numpy(), least=-margin)
            found[min(n, ENOUGH), length] = held | {"length": length}
    return found[max(found)] if found else {"n": 0, "verdict": "not tested"}


def judge_form(file: str, form: str, _margin: float = 0) -> dict[str, Any]:
    """What a form of the accuracy misses: "contradicted" where p is below .05.

    "reproduced" where that is no more than chance leaves (`low` to `high`: 0 to that).
    """
    points = read_rows(file)
    if points.empty or points["base_id"].nunique() < 2:
        return {"n": 0, "verdict": "not tested"}
    found = map3d.find_misfit(points, form)
    verdict = "reproduced" if found["misfit"] <= found["noise"] else "undecided"
    verdict = "contradicted" if found["p"] < verdicts.ALPHA else verdict
    return {"effect": found["misfit"], "low": 0.0, "high": found["noise"],
            "n": found["n"], "verdict": verdict}  # fmt: skip


def judge_bound(file: str, question: str, margin: float) -> dict[str, Any]:
    """Is the largest value of a base at most `margin`? By the t interval over bases.

    `ANY` in place of an arm: on every base the arm whose largest value is smallest.
    """
    asked, *where = question.split("; ")
    rows = choose_rows(read_rows(file), where)
    if rows.empty or rows["base_id"].nunique() < 2:
        return {"n": 0, "verdict": "not tested"}
    arm, values = _read_column(asked, rows, ANY)
    largest = values.groupby(["base_id", "method"]).max().unstack()
    bounded = largest.min(axis=1) if arm == ANY else largest[arm].dropna()
    return _hold(bounded.to_numpy(), most=margin)


def judge_ratio(files: str, question: str, margin: float) -> dict[str, Any]:
    """Is `LEFT: COLUMN / RIGHT: COLUMN` at most `margin`? By the t interval over bases.

    Each side is the mean of its rows of a base.
    """
    if any(read_rows(file).empty for file in files.split("|")):
        return {"n": 0, "verdict": "not tested"}
    rows = read_rows(files)
    sides = question.split(" / ")
    if len(sides) != 2:
        raise ValueError(f"a ratio has two sides, LEFT / RIGHT, got '{question}'")
    means = [_read_column(side, rows)[1].groupby("base_id").mean() for side in sides]
    ratio = (means[0] / means[1]).dropna()
    if len(ratio) < 2:
        return {"n": len(ratio), "verdict": "not tested"}
    return _hold(ratio.to_numpy(), most=margin)


def _read_column(asked: str, rows: pd.DataFrame, *others: str) -> tuple[str, pd.Series]:
    """The arm and the values of `ARM: COLUMN`, by base and method.

    `others`: arms that are welcome beside the methods of the rows.
    """
    arm, found, column = asked.partition(": ")
    if not found:
        raise ValueError(f"'{asked}' names no values: write ARM: COLUMN")
    check_known("arm", [arm], {*rows["method"], *others})
    check_known("column", [column], rows.columns)
    if arm != ANY:
        rows = rows[rows["method"] == arm]
    values = rows.set_index(["base_id", "method"])[column]
    if not np.isfinite(values).all():
        raise ValueError(f"'{column}' is not finite everywhere in the rows of {arm}")
    return arm, values


def compare_speeds(file: str, question: str, _margin: float) -> dict[str, Any]:
    """How many epochs more RIGHT needs than LEFT to the accuracy that both reach.

    By base, on the validation accuracy after each epoch: the first epoch that has
    reached the lower one of the two curves' maxima. By the t interval over bases.
    """
    curves = read_rows(file)
    if curves.empty:
        return {"n": 0, "verdict": "not tested"}
    arms = question.split(" - ")
    check_known("arm", arms, set(curves["method"]))
    values = curves.pivot_table("val", ["method", "epoch"], "base_id")
    best = values.groupby("method").cummax()
    left, right = (best.loc[arm] for arm in arms)
    ends = pd.concat([left.iloc[-1], right.iloc[-1]], axis=1)
    goal = ends.dropna().min(axis=1)
    if len(goal) < 2:
        return {"n": len(goal), "verdict": "not tested"}
    later = (right[goal.index] < goal).sum() - (left[goal.index] < goal).sum()
    return _hold(later.to_numpy(), least=0)


def _hold(
    values: np.ndarray, *, least: float = -math.inf, most: float = math.inf
) -> dict[str, Any]:
    """Does the mean of these values, one a base, keep to a bound? By its t interval."""
    low, high = verdicts.interval_of(values)
    verdict = "undecided"
    if least < low and high < most:
        verdict = "reproduced"
    elif high < least or most < low:
        verdict = "contradicted"
    bound = least if math.isinf(most) else most
    needed = verdicts.count_bases_needed(values.mean() - bound, values.std(ddof=1))
    return {
        "effect": values.mean(), "low": low, "high": high, "n": len(values),
        "needed": needed if verdict == "undecided" else None, "verdict": verdict,
    }  # fmt: skip


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


def judge_test(file: str, question: str, _margin: float = 0) -> dict[str, Any]:
    """The test of that name, which passes, decides; ValueError where there is none."""
    files = [paths.shown(path) for path in (paths.ROOT / "tests").glob("test_*.py")]
    check_known("file", [file], files)
    nodes = ast.walk(ast.parse((paths.ROOT / file).read_text(encoding="utf-8")))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    name = question.removeprefix("not ")
    check_known("test", [name], names)
    return {"verdict": "reproduced" if name == question else "contradicted"}


def leave_open(_file: str, verdict: str, _margin: float = 0) -> dict[str, Any]:
    """No rows decide: the filter says why."""
    check_choice("filter", verdict, ("not tested", "not testable here"))
    return {"verdict": verdict}


ALONE: dict[str, Callable[[str, str, float], dict[str, Any]]] = {
    "loss": compare_losses,
    "fit": judge_form,
    "bound": judge_bound,
    "ratio": judge_ratio,
    "speed": compare_speeds,
    "size": compare_sizes,
    "latency": compare_times,
    "test": judge_test,
    "none": leave_open,
}
