"""From rows of runs to verdicts: paired by base, by one rule written before the rows.

A replicate is a *base*: a network trained from its own seed, with selection and
fine-tuning nested in it. Two arms are compared base by base, so what a base is worth
cancels. Differences are in points (percent of the test images).
"""

import base64
import bisect
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

ALPHA = 0.05
EFFECT = 0.2  # points; a smaller gain is no gain that a reader would pay for
MARGIN = 0.3  # points; within it two arms count as equal
MACHINE = ("device", "precision", "torch")
MOST_FLIPS = 20  # bases up to which all 2^n signs are tried
VERDICTS = (
    "reproduced",
    "contradicted",
    "no difference",
    "direction only",
    "undecided",
    "not tested",
    "not testable here",
)


def pair_arms(
    rows: pd.DataFrame,
    left: str,
    right: str,
    *,
    value: str = "after",
    same: Sequence[str] = ("net", "dataset", "share", "length"),
    within: float = 0.02,
) -> pd.Series:
    """`value` of method `left` minus that of `right`, by base (mean over nested seeds).

    `rows` has the columns method, base_id, macs and `value`. Bases that have only one
    of the two arms are left out; one that has both on several kinds of machine (columns
    `MACHINE`) is paired within each. Raises `ValueError` where an arm is missing, where
    fewer than two bases are left, where a number is not finite, where the arms differ
    by more than `within` in MACs (a share) or at all in one of the columns `same`, and
    where a base has both arms, but never on one kind of machine.
    """
    both, names = rows[rows["method"].isin([left, right])], f"{left} - {right}"
    for arm in (left, right):
        if arm not in set(both["method"]):
            raise ValueError(f"no rows of arm '{arm}'")
    if not np.isfinite(both[value].astype(float)).all():
        raise ValueError(f"{names}: '{value}' is not finite everywhere")
    for column in [name for name in same if name in both]:
        if both[column].nunique(dropna=False) > 1:
            found = sorted(map(str, both[column].unique()))
            raise ValueError(f"{names}: arms differ in '{column}': {found}")
    work = both.groupby("method")["macs"].mean()
    if abs(work[left] / work[right] - 1) > within:
        raise ValueError(
            f"{names}: {work[left]:.0f} against {work[right]:.0f} MACs; arms are "
            "compared at equal cost"
        )
    gaps = pair_all(both, right, value=value)[left].dropna()
    arms = both.groupby("base_id")["method"].nunique()
    apart = set(arms.index[arms == 2]) - set(gaps.index)
    if apart:
        raise ValueError(
            f"{names}: base {min(apart)} has them on two kinds of machine "
            f"({', '.join(MACHINE)}); a base is compared on one machine"
        )
    if len(gaps) < 2:
        raise ValueError(f"{names}: {len(gaps)} base(s) in common, needs two")
    return gaps


def pair_all(rows: pd.DataFrame, against: str, *, value: str = "after") -> pd.DataFrame:
    """`value` of every method minus that of `against`: a row per base, paired.

    Paired within one kind of machine; a base that was measured on several has the mean.
    """
    kind = [name for name in MACHINE if name in rows]
    known = rows.assign(**{name: rows[name].fillna("") for name in kind})
    table = known.pivot_table(value, ["base_id", *kind], "method", aggfunc="mean")
    return table.sub(table[against], axis=0).groupby("base_id").mean()


def judge(
    rows: pd.DataFrame,
    registered: pd.DataFrame,
    *,
    effect: float = EFFECT,
    margin: float = MARGIN,
) -> pd.DataFrame:
    """Verdicts on the registered contrasts, from the rows of one budget and length.

    registered: columns contrast, left, right, and maybe within and value, see
    `pair_arms`. An arm is a method, or several joined by "|": that of them with the
    highest mean accuracy on the validation images (column `val`) stands for them.
    Returned, in that order: what was compared and the columns of `compare`; one whose
    arms, all that are named, have fewer than two bases in common is "not tested", and
    Holm's correction covers the others.
    """
    table, differences = [], {}
    for row in registered.to_dict("records"):
        part = share_bases(rows, f"{row['left']}|{row['right']}")
        part, left, right = pick_arms(part, row["left"], row["right"])
        table.append({"contrast": row["contrast"], "left": left, "right": right})
        if share_bases(part, f"{left}|{right}")["base_id"].nunique() > 1:
            how = {name: row[name] for name in ("within", "value") if name in row}
            gaps = pair_arms(part, left, right, **how)
            differences[row["contrast"]] = gaps.tolist()
    found = compare(differences, effect=effect, margin=margin).to_dict("index")
    untested = {"n": 0, "verdict": "not tested"}
    return pd.DataFrame([row | found.get(row["contrast"], untested) for row in table])


def share_bases(rows: pd.DataFrame, methods: str) -> pd.DataFrame:
    """The rows of the bases that have every method named: the best of all is asked."""
    names = set(methods.split("|"))
    known = rows[rows["method"].isin(names)].groupby("base_id")["method"].nunique()
    return rows[rows["base_id"].isin(known.index[known == len(names)])]


def pick_arms(
    rows: pd.DataFrame, left: str, right: str
) -> tuple[pd.DataFrame, str, str]:
    """What stands for each side, and the rows that compare the two.

    Those are measured where the left side was: on its bases, on its kind of machine.
    """
    left = pick_best(rows, left)
    where = ["base_id", *(name for name in MACHINE if name in rows)]
    places = rows.loc[rows["method"] == left, where].drop_duplicates()
    beside = rows.merge(places, on=where)
    return beside, left, pick_best(beside, right)


def pick_best(rows: pd.DataFrame, methods: str) -> str:
    """Of methods joined by "|" that with the highest mean `val`; one stays itself.

    Asked are those with the most bases, on all that these share; ValueError for none,
    or for rows without `val`.
    """
    names = methods.split("|")
    measured = rows[rows["method"].isin(names)]
    if len(names) == 1 or measured.empty:
        return methods
    if "val" not in measured:
        raise ValueError(f"the best of {methods} needs a column 'val', by validation")
    table = measured.pivot_table("val", "base_id", "method")
    whole = table.loc[:, table.count() == table.count().max()].dropna()
    if whole.empty:
        raise ValueError(f"{' | '.join(map(str, whole))}: no base has them all")
    return str(whole.mean().idxmax())


def list_networks(rows: pd.DataFrame, left: str) -> pd.DataFrame:
    """Rows with networks in place of methods: those of `left`, and all others once.

    Networks drawn by lot are others on every base, and two methods may end at one. A
    network is told by its shares and MACs; kept are those that all bases of `left`
    have, under that name, but for what equals `left` itself.
    """
    own = rows["method"] == left
    name = rows[["d", "w", "r", "macs"]].astype(str).agg(" ".join, axis=1)
    others = rows.assign(method=name)[~own & ~name.isin(name[own])]
    others = others.drop_duplicates(["method", "base_id"])
    bases = others.groupby("method")["base_id"].transform("nunique")
    whole = others[bases == rows[own]["base_id"].nunique()]
    return pd.concat([rows[own], whole])


def pack_hits(hits: np.ndarray) -> str:
    """Which images were classified rightly, bool [N], as text: a bit an image."""
    return base64.b85encode(np.packbits(np.asarray(hits, bool)).tobytes()).decode()


def unpack_hits(text: str, count: int) -> np.ndarray:
    """What `pack_hits` packed: bool [count]. ValueError: text of another length."""
    bits = np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8))
    if not 0 <= len(bits) - count < 8:
        raise ValueError(f"{len(bits)} bits do not hold {count} images")
    return bits[:count].astype(bool)


def compare(
    differences: Mapping[str, Sequence[float]],
    *,
    effect: float = EFFECT,
    margin: float = MARGIN,
) -> pd.DataFrame:
    """Judge all registered contrasts together: name -> differences by base.

    One correction (Holm 1979) covers all that are named: those registered that have
    rows. `effect` and `margin` are the rule's, for differences in another unit than
    points. Raises `ValueError` for fewer than two bases or for NaN.

    Returned by name, over `n` bases: `mean` and `sd` of the differences; `low`, `high`:
    their t interval at 95 %, and `corrected_low`, `corrected_high` the one that Holm's
    step asks for; `p`: of the t test against 0, two-sided, `p_flips` of the exact
    sign-flip test; `bases_needed`: the number that would decide an open case, NaN
    where no more of them would; `verdict`.
    """
    values = {name: _read(name, d) for name, d in differences.items()}
    p = {name: find_p(d) for name, d in values.items()}
    levels = holm_levels(p)
    found = {}
    for name, d in values.items():
        mean, sd, level = float(d.mean()), float(d.std(ddof=1)), levels[name]
        (low, high), corrected = interval_of(d), interval_of(d, level)
        verdict = decide(mean, (low, high), corrected, effect=effect, margin=margin)
        needed = math.nan
        if verdict in ("direction only", "undecided"):
            # what would be seen as a difference, at the level of this step
            more = count_bases_needed(max(abs(mean), effect), sd, alpha=level) or 0
            needed = more if more > len(d) else math.nan
        found[name] = {
            "n": len(d), "mean": mean, "sd": sd, "low": low, "high": high,
            "corrected_low": corrected[0], "corrected_high": corrected[1],
            "p": p[name], "p_flips": flip_signs(d), "bases_needed": needed,
            "verdict": verdict,
        }  # fmt: skip
    return pd.DataFrame.from_dict(found, orient="index")


def holm_levels(p: dict[str, float], alpha: float = ALPHA) -> dict[str, float]:
    """The level at which each p-value is judged: alpha / (m - rank), stepping down.

    From the first that is not below its level on, all keep that level: nothing behind
    it can be rejected (Holm 1979).
    """
    levels, stopped = {}, False
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        if not stopped:
            level = alpha / (len(p) - rank)
        levels[name] = level
        stopped = p[name] > level
    return levels


def decide(
    mean: float,
    interval: tuple[float, float],
    corrected: tuple[float, float],
    *,
    effect: float = EFFECT,
    margin: float = MARGIN,
) -> str:
    """The rule. `interval` is uncorrected, `corrected` wider or equal; in points.

    Step by step in notebooks/41_claims.ipynb.
    """
    low, high = corrected
    if low > 0 and mean >= effect:
        return "reproduced"
    if high < 0:
        return "contradicted"
    if -margin < low and high < margin:
        return "no difference"
    return "direction only" if interval[0] > 0 else "undecided"


def find_p(differences: np.ndarray) -> float:
    """p of the two-sided t test of mean 0; 1 where all differences are 0."""
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def interval_of(differences: np.ndarray, alpha: float = ALPHA) -> tuple[float, float]:
    """The t interval of the mean at 1 - alpha."""
    n = len(differences)
    half = stats.t.ppf(1 - alpha / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def flip_signs(differences: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p that the mean is 0, by all 2^n signs (Fisher 1935).

    It needs no normal distribution, only that each difference is as likely to have the
    other sign; with n bases it is at least 2 / 2^n, so below .05 from n = 6 on. NaN for
    more than `MOST_FLIPS` bases.
    """
    d = _read("sign flips", differences)
    if len(d) > MOST_FLIPS:
        return math.nan
    signs = np.array(list(itertools.product((-1, 1), repeat=len(d))))
    sums = np.abs(signs @ d)
    return float((sums >= abs(d.sum()) - 1e-9 * np.abs(d).sum()).mean())


def bootstrap_images(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """95 % of the difference in points, over bases and over test images at once.

    left, right: bool [bases, images], which image each network got right. Bases and
    images are drawn anew with replacement, both crossed, as both could have been others
    (Owen 2007): wider than an interval over either alone.
    """
    gap = left.astype(float) - right.astype(float)
    if gap.ndim != 2 or len(gap) < 2 or left.shape != right.shape:
        raise ValueError(f"needs [bases >= 2, images], got {left.shape}, {right.shape}")
    draw = np.random.default_rng(0)
    means = np.empty(2000)
    for i in range(len(means)):
        weights, counts = (
            np.bincount(draw.integers(n, size=n), minlength=n) for n in gap.shape
        )
        means[i] = weights @ gap @ counts / gap.size
    low, high = np.quantile(100 * means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def split_variance(rows: pd.DataFrame, *, value: str = "after") -> dict[str, float]:
    """Variance of `value` from base, selection in base, fine-tuning in selection.

    `rows`: balanced (else `ValueError`), columns base_id, select_seed, seed and
    `value`, of one arm. By mean squares (nested analysis of variance); a negative
    estimate counts as 0, a level of one member is NaN, a part of the level above.
    """
    nested = rows.groupby("base_id")["select_seed"].rank("dense")  # whatever its name
    cells = rows.assign(select_seed=nested).groupby(["base_id", "select_seed"])[value]
    counts = cells.size().unstack()
    selections, runs = counts.shape[1], int(counts.to_numpy()[0, 0])
    if len(counts) < 2 or (counts != runs).any(axis=None):
        raise ValueError("needs two bases, each with as many runs nested in it")
    fine = float(cells.var(ddof=1).mean())  # NaN of one run
    means = cells.mean().unstack()
    select = float(means.var(axis=1, ddof=1).mean())
    chance = 0.0 if runs == 1 else fine / runs  # of a mean over the runs
    base = float(means.mean(axis=1).var(ddof=1))
    parts = {
        "base": base - (chance if selections == 1 else select / selections),
        "selection": select - chance,
        "finetuning": fine,
    }
    return {k: v if math.isnan(v) else max(v, 0.0) for k, v in parts.items()}


def count_bases_needed(mean: float, sd: float, *, alpha: float = ALPHA) -> int | None:
    """The fewest bases with which a true difference `mean` is seen at a power of .8.

    By the noncentral t distribution, two-sided; None where more than 1,000 would be.
    """
    enough = range(2, 1001)
    place = bisect.bisect_left(
        enough, 0.8, key=lambda n: find_power(mean, sd, n, alpha=alpha)
    )
    return enough[place] if place < len(enough) else None


def find_power(mean: float, sd: float, n: int, *, alpha: float = ALPHA) -> float:
    """The chance that a t test over `n` bases sees a true difference `mean`."""
    if sd == 0:
        return 1.0 if mean else 0.0
    centre = abs(mean) / sd * math.sqrt(n)
    bound = stats.t.ppf(1 - alpha / 2, n - 1)
    return float(
        stats.nct.sf(bound, n - 1, centre) + stats.nct.cdf(-bound, n - 1, centre)
    )


def _read(name: str, differences: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(differences, float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name}: needs at least two bases, got {values.size}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a difference is not finite")
    return values
