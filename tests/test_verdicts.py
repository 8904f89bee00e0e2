"""lib.verdicts against SciPy, brute force and drawn data."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lib import verdicts

numbers = st.lists(
    st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3)), min_size=3, max_size=8
).filter(lambda d: np.ptp(d) > 0.01)


def make_rows(arms: dict, **columns) -> pd.DataFrame:
    rows = [
        {
            "method": arm,
            "base_id": base,
            "after": value,
            "macs": 100,
            "net": "n",
            **columns,
        }
        for arm, values in arms.items()
        for base, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


@given(numbers)
def test_interval_and_p_are_scipys(d):
    d = np.array(d)
    expected = stats.ttest_1samp(d, 0.0)
    assert verdicts.find_p(d) == pytest.approx(expected.pvalue, abs=1e-12)
    interval = expected.confidence_interval(0.95)
    assert verdicts.interval_of(d) == pytest.approx(tuple(interval), abs=1e-9)


@given(numbers)
def test_sign_flips_are_scipys_exact_permutation_test(d):
    expected = stats.permutation_test(
        (np.array(d),), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert verdicts.flip_signs(d) == pytest.approx(expected.pvalue, abs=1e-9)


def test_sign_flips_need_six_bases():
    assert verdicts.flip_signs([1.0, 2, 3, 4, 5]) == 2 / 32
    assert verdicts.flip_signs([1.0, 2, 3, 4, 5, 6]) == 2 / 64 < 0.05


def step_down(p: list[float], alpha: float) -> list[bool]:
    """Rejections as Holm's paper words them: the smallest first, until one fails."""
    rejected = [False] * len(p)
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] > alpha / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


@given(st.lists(st.floats(1e-6, 0.2), min_size=1, max_size=8))
def test_holm_rejects_what_his_step_down_rejects(p):
    named = {str(i): value for i, value in enumerate(p)}
    levels = verdicts.holm_levels(named)
    assert [named[name] <= levels[name] for name in named] == step_down(p, 0.05)


@pytest.mark.parametrize(
    ("n", "least"), [(3, 0.98), (5, 0.51), (6, 0.43), (8, 0.35), (10, 0.30)]
)
def test_power_of_the_planned_numbers_of_bases(n, least):
    assert verdicts.find_power(least, 0.3, n) == pytest.approx(0.8, abs=0.03)
    assert verdicts.count_bases_needed(least * 1.03, 0.3) == n


def test_power_is_what_draws_say():
    draw = np.random.default_rng(0)
    d = draw.normal(0.4, 0.3, (20_000, 6))
    seen = (stats.ttest_1samp(d, 0.0, axis=1).pvalue < 0.05).mean()
    assert verdicts.find_power(0.4, 0.3, 6) == pytest.approx(seen, abs=0.01)


def judge(*differences):
    return verdicts.compare({"a - b": differences}).loc["a - b"]


def test_every_verdict_is_reached_by_its_rule():
    assert judge(1.0, 1.1, 0.9, 1.0).verdict == "reproduced"
    assert judge(-1.0, -1.1, -0.9, -1.0).verdict == "contradicted"
    assert judge(0.01, -0.02, 0.02, -0.01).verdict == "no difference"
    assert judge(1.0, -1.0, 0.5, -0.4).verdict == "undecided"
    assert judge(0.10, 0.11, 0.09, 0.10).verdict == "no difference", (
        "too small to matter"
    )
    shaky = (0.9, 0.3, 0.6, 0.4)
    assert judge(*shaky).verdict == "reproduced"
    rest = {f"c{i}": (1.0, -1.0, 0.5, -0.5) for i in range(9)}
    first = verdicts.compare({"a - b": shaky} | rest).iloc[0]
    assert first.verdict == "direction only" and first.bases_needed > 4


def test_a_mean_just_below_the_effect_is_not_reproduced():
    d = [0.19, 0.191, 0.189, 0.19, 0.19]
    assert judge(*d).verdict == "no difference"
    assert judge(*(x + 0.02 for x in d)).verdict == "reproduced"


def test_the_rule_is_wrong_as_often_as_it_says():
    """Ten true nulls with spread: something is called a finding in at most 5 %."""
    draw = np.random.default_rng(1)
    wrong = 0
    for _ in range(120):
        family = {str(i): draw.normal(0, 1, 6) for i in range(10)}
        found = set(verdicts.compare(family)["verdict"])
        wrong += bool(found & {"reproduced", "contradicted"})
    assert wrong / 120 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 120)


def test_bootstrap_covers_bases_and_images():
    draw = np.random.default_rng(2)
    shape = (6, 400)
    left, right = draw.random(shape) < 0.8, draw.random(shape) < 0.7
    low, high = verdicts.bootstrap_images(left, right)
    gap = 100 * (left.mean() - right.mean())
    assert low < gap < high
    spread = 100 * (left * 1.0 - right).std() / math.sqrt(left.size)
    assert 1.5 * spread < (high - low) / 2 < 4 * spread
    assert verdicts.bootstrap_images(left, left) == (0, 0)


def test_variance_is_split_as_it_was_drawn():
    draw = np.random.default_rng(3)
    rows = [
        {"base_id": b, "select_seed": s, "seed": f,
         "after": base + select + draw.normal(0, 0.5)}
        for b in range(300)
        for base in [draw.normal(0, 2)]
        for s in range(3)
        for select in [draw.normal(0, 1)]
        for f in range(3)
    ]  # fmt: skip
    parts = verdicts.split_variance(pd.DataFrame(rows))
    assert parts["base"] == pytest.approx(4, rel=0.2)
    assert parts["selection"] == pytest.approx(1, rel=0.15)
    assert parts["finetuning"] == pytest.approx(0.25, rel=0.1)
    named = [
        row | {"select_seed": 10 * row["base_id"] + row["select_seed"]} for row in rows
    ]
    assert verdicts.split_variance(pd.DataFrame(named)) == parts, "seeds are nested"
    with pytest.raises(ValueError, match="two bases"):
        verdicts.split_variance(pd.DataFrame(rows[:-1]))


def test_the_base_is_not_blamed_for_what_fine_tuning_scatters():
    """One selection a base, no effect of the base: its variance is nearly 0."""
    draw = np.random.default_rng(0)
    rows = [{"base_id": b, "select_seed": 0, "seed": f, "after": draw.normal()}
            for b in range(2000) for f in range(2)]  # fmt: skip
    parts = verdicts.split_variance(pd.DataFrame(rows))
    assert parts["base"] < 0.06 and math.isnan(parts["selection"])
    assert parts["finetuning"] == pytest.approx(1, rel=0.1)
    once = verdicts.split_variance(pd.DataFrame(rows[::2]))
    assert once["base"] == pytest.approx(1, rel=0.1) and math.isnan(once["finetuning"])


def test_variance_of_an_unbalanced_design_is_refused():
    """As many runs on every base, but not in every selection."""
    rows = [
        {"base_id": b, "select_seed": s, "seed": f, "after": b + s * f}
        for b in range(4) for s, runs in ((0, 1), (1, 3)) for f in range(runs)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="as many runs"):
        verdicts.split_variance(pd.DataFrame(rows))


def test_the_best_of_several_waits_until_all_of_them_are_measured():
    rows = make_rows({"a": [1, 2, 4], "b": [3, 3, 3], "r": [0, 0, 1]}, val=1.0)
    asked = pd.DataFrame({"contrast": ["x"], "left": ["a|b"], "right": ["r"]})
    assert verdicts.judge(rows, asked)["n"].tolist() == [3]
    short = rows[(rows["method"] != "b") | (rows["base_id"] == 0)]
    assert verdicts.judge(short, asked)["verdict"].tolist() == ["not tested"]
    assert verdicts.judge(rows[rows["method"] != "b"], asked)["n"].tolist() == [0]


def test_bases_needed_are_more_than_there_are():
    """Six would do by the t test; that eight left it open is the size of the effect."""
    found = judge(*(np.array([-1, 1] * 4) * 0.13 + 0.195))
    assert found.verdict == "direction only" and math.isnan(found.bases_needed)


def test_arms_are_paired_by_base():
    rows = make_rows({"a": [1, 2, 4], "b": [0, 0, 1]})
    again = make_rows({"a": [3, 2, 4]})  # a second fine-tuning of arm a
    both = pd.concat([rows, again])
    assert verdicts.pair_arms(rows, "a", "b").tolist() == [1, 2, 3]
    assert verdicts.pair_arms(both, "a", "b").tolist() == [2, 2, 3]
    assert verdicts.pair_arms(rows[:-1], "a", "b").tolist() == [1, 2]


def test_what_cannot_be_compared_is_refused_by_name():
    rows = make_rows({"a": [1, 2, 4], "b": [0, 0, 1]}, length=5)
    other = rows.assign(macs=np.where(rows["method"] == "a", 100, 110))
    for bad, message in [
        (rows[rows["method"] == "a"], "no rows of arm 'b'"),
        (rows[(rows["base_id"] == 0)], "1 base"),
        (rows.assign(after=[1, 2, math.nan, 0, 0, 1]), "not finite"),
        (rows.assign(length=[5, 5, 5, 20, 20, 20]), "differ in 'length'"),
        (other, "equal cost"),
        (rows.assign(macs=np.where(rows["method"] == "a", 100, 97)), "equal cost"),
        (
            rows.assign(precision=["float32"] * 5 + ["bfloat16"]),
            "base 2 .* two kinds of machine",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            verdicts.pair_arms(bad, "a", "b")
    assert len(verdicts.pair_arms(other, "a", "b", within=0.12)) == 3
    with pytest.raises(ValueError, match="two bases"):
        verdicts.compare({"a - b": [1.0]})
    with pytest.raises(ValueError, match="not finite"):
        verdicts.compare({"a - b": [1.0, math.inf]})


def test_arms_are_paired_within_a_machine():
    """A repeat on another machine pairs with what ran there, not with its double."""
    here = make_rows({"a": [1, 2, 4], "b": [0, 0, 1]}).assign(precision="float32")
    there = make_rows({"a": [9, 9, 9], "b": [7, 8, 9]}).assign(precision="bfloat16")
    both = pd.concat([here, there])
    mixed = both[(both["method"] == "a") | (both["precision"] == "float32")]
    assert verdicts.pair_arms(mixed, "a", "b").tolist() == [1, 2, 3]
    assert verdicts.pair_arms(both, "a", "b").tolist() == [1.5, 1.5, 1.5]
    gaps = verdicts.pair_all(mixed, "b")
    assert gaps["a"].tolist() == [1, 2, 3] and gaps["b"].tolist() == [0, 0, 0]
    one = both[both["base_id"] != 2]
    apart = here[(here["base_id"] == 2) & (here["method"] == "a")]
    with pytest.raises(ValueError, match=r"base 2 .* two kinds of machine"):
        verdicts.pair_arms(pd.concat([one, apart, there[5:]]), "a", "b")


def test_the_best_is_chosen_of_what_was_measured_where_the_other_side_was():
    """`b` is best by validation, but on two bases it ran elsewhere than `a`."""
    a = make_rows({"a": [1, 2, 4], "c": [0, 0, 1]}).assign(precision="float32", val=1)
    b = make_rows({"b": [9, 9, 9]}).assign(
        precision=["float32", "bfloat16", "bfloat16"]
    )
    rows = pd.concat([a, b.assign(val=5)])
    part, left, right = verdicts.pick_arms(rows, "a", "b|c")
    assert (left, right) == ("a", "c")
    assert verdicts.pair_arms(part, left, right).tolist() == [1, 2, 3]
    part, left, right = verdicts.pick_arms(rows, "b|c", "a")
    assert (left, right) == ("b", "a")
    assert set(verdicts.share_bases(part, "a|b")["base_id"]) == {0}
    assert verdicts.pick_arms(rows, "none", "a|c")[2] == "a|c"


def test_judging_compares_what_is_registered_and_says_what_is_not():
    draw = np.random.default_rng(5)
    base = draw.normal(80, 2, 8)
    noise = {name: draw.normal(0, 0.1, 8) for name in "abcd"}
    rows = make_rows({
        "a": base + 1 + noise["a"], "b": base + noise["b"], "c": base + noise["c"],
        "d": base[:1],
    })  # fmt: skip
    rows["val"] = rows["after"] + rows["method"].map({"a": 0, "b": 3, "c": 0, "d": 0})
    registered = pd.DataFrame(
        [["one", "a", "c"], ["best", "a|b", "c"], ["lost", "d", "c"], ["no", "a", "z"]],
        columns=["contrast", "left", "right"],
    ).assign(within=0.02)
    table = verdicts.judge(rows, registered).set_index("contrast")
    assert table["left"].tolist() == ["a", "b", "d", "a"]  # b by validation, not test
    assert table["n"].tolist() == [8, 8, 0, 0]
    assert table["verdict"].tolist() == [
        "reproduced", "no difference", "not tested", "not tested",
    ]  # fmt: skip
    by_hand = stats.ttest_rel(
        rows[rows["method"] == "a"]["after"], rows[rows["method"] == "c"]["after"]
    )
    assert table.loc["one", "p"] == pytest.approx(by_hand.pvalue, rel=1e-9)
    low, _ = by_hand.confidence_interval(0.975)  # Holm's first step of two
    assert table.loc["one", "corrected_low"] == pytest.approx(low, abs=1e-9)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hits_come_back_as_they_were_packed(hits):
    text = verdicts.pack_hits(np.array(hits))
    assert verdicts.unpack_hits(text, len(hits)).tolist() == hits
    with pytest.raises(ValueError, match="bits do not hold"):
        verdicts.unpack_hits(text, len(hits) + 8)


def test_the_best_of_several_is_one_that_all_bases_have():
    """A method on the luckiest base alone has the highest mean, and stands for none."""
    rows = make_rows({"one base": [90], "a": [85, 70, 72], "b": [84, 71, 73]})
    rows["val"] = rows["after"]
    assert verdicts.pick_best(rows, "one base|a|b") == "b"
    registered = pd.DataFrame(
        [{"contrast": "c", "within": 0.1, "left": "one base|a|b", "right": "a"}]
    )
    assert verdicts.judge(rows, registered)["verdict"].item() == "not tested"
    registered["left"] = "a|b"
    assert verdicts.judge(rows, registered)[["left", "n"]].values.tolist() == [["b", 3]]
    # 'c' has as many bases as 'a' and 'b', but a luckier one in place of base 0
    late = make_rows({"c": [0, 84, 72, 90]}).query("base_id > 0")
    rows = pd.concat([rows, late.assign(val=late["after"])])
    assert verdicts.pick_best(rows, "a|b|c") == "c", "84 and 72 against 70.5 and 72"
    with pytest.raises(ValueError, match=r"a \| far: no base has them all"):
        far = make_rows({"far": [0, 0, 0, 1, 2, 3]}).query("base_id > 2")
        verdicts.pick_best(pd.concat([rows, far.assign(val=1.0)]), "a|far")
