"""Write the measured parts of README.md from rows; nothing measured is typed there.

    .venv/bin/python .ci/readme.py [--check]

A part stands between `<!-- rows NAME -->` and `<!-- end -->`; NAME is one of `PARTS`.
`--check` writes nothing and fails where README.md and the rows part.
"""

import re
import sys
from functools import partial
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).parent))
import hours

from lib import ledger, paths, report, verdicts

README = paths.ROOT / "README.md"
NETS = paths.ROOT / "tests" / "benchmarks" / "nets.csv"
MARKED = re.compile(r"(<!-- rows (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "l1": "L1 norm", "random": "random", "gamma": "\\|γ\\| alone",
    "scop-shuffle": "SCOP, shuffled images", "scop-generator": "SCOP, generator",
    "scop-noise": "SCOP, noise", "scop-none": "SCOP without a control",
    "scop-constant": "SCOP, a constant image", "scop-swap_gan": "SCOP, swap_gan",
    "bn_scale": "\\|γ\\| of the BatchNorm", "fpgm": "FPGM", "taylor": "Taylor",
    "unpruned": "not pruned, fine-tuned as long", "l1-distilled": "L1 norm, distilled",
    "nisp": "NISP", "nisp-sharp": "NISP, sharper bound", "nisp-norm":
    "NISP, judged behind BatchNorm", "nisp-mag": "NISP from the classifier's weights",
    "layerwise": "Inf-FS layer by layer", "scratch": "same architecture from scratch",
    "scratch-compute": "from scratch, as much compute in all",
    "scratch-shared": "from scratch, as much compute a network, were 27 pruned",
    "bn_scale-sparse": r"\|γ\|, the base trained longer with a penalty on it",
    "bn_scale-longer": r"\|γ\|, the base trained longer without",
    "map": "MAP's optimum", "map-2": "MAP's second", "map-3": "MAP's third",
    "depth": "depth alone", "width": "width alone (stream too)", "resolution":
    "resolution alone", "equal": "equal split",
    "compound": "compound scaling, reversed", "map-3d":
    "MAP's best that prunes all three",
    "width-scatter": "width alone, scattered", "width-branch":
    "width alone, inside the blocks", "width-uniform": "width alone, stream too",
    "lattice": "random networks of this cost, mean",
}  # fmt: skip
# the claim that a paper beats what it sets out to replace
AGAINST_RIVAL = {"SCOP": "S12a", "NISP": "N11a", "MAP": "M1a"}
SHORT = {"l1": "L1", "map": "MAP"}


def read(profile):
    return pd.read_csv(paths.RESULTS / f"{profile}.csv")


def show(values, digits=2):
    """Mean and s.d. of a column; the mean alone where there is one value."""
    mean, spread = values.mean(), values.std(ddof=1)
    found = f"{mean:.{digits}f}"
    return found if pd.isna(spread) else f"{found} ± {spread:.{digits}f}"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def accuracies(profile, split=()):
    """Top-1 before and after fine-tuning of each method, and what it costs."""
    rows = read(profile)
    keys = ["method", *split]
    lines = []
    for key, part in rows.groupby(keys, sort=False):
        name, *rest = key if isinstance(key, tuple) else (key,)
        before = "" if name == "scratch" else show(part["before"])
        kept = [f"{100 - part[column].mean():.1f} %" for column in
                ("macs_down", "params_down")]  # fmt: skip
        if "time_share" in rows:
            kept.append(f"{100 * part['time_share'].mean():.0f} %")
        lines.append([NAMES.get(name, name), *rest, before, show(part["after"]), *kept])
    head = ["method", *split, "before fine-tuning", "after", "MACs kept", "params kept"]
    head += ["time kept"] * ("time_share" in rows)
    return f"{describe(rows)}\n\n{markdown(head, lines)}"


def describe(rows):
    """One line on what was measured: net, images, length, seeds, bases."""
    net, images = rows[["net", "dataset"]].iloc[0]
    epochs = int(rows["epochs"].max())
    whole = rows.drop_duplicates("base")["base"]
    seeds, bases = rows["seed"].nunique(), len(whole)
    return (
        f"{net}, {images}, unpruned {show(whole)} %; top-1 on the test images in "
        f"percent, mean ± s.d. of {seeds} seeds on {bases} base{'s' * (bases > 1)}, "
        f"{epochs} epoch{'s' * (epochs > 1)} of fine-tuning (`{rows['profile'][0]}`)."
    )


def comparison(profile, against="l1", shares=(), share=0.5):
    """By base: each method at each length, and its gap to one on the same base.

    `shares`: columns that say what a network is, left empty where a method stands for
    several networks. `share`: of the MACs that stay.
    """
    rows = read(profile)
    half = rows[rows["share"].isin([share, 1.0])]
    lengths = sorted(half["length"].unique())
    last = half[half["length"] == lengths[-1]]
    counts = half.groupby("length")["base_id"].nunique()
    order = last.groupby("method").agg(n=("base_id", "nunique"), top=("after", "mean"))
    order = order.sort_values(["n", "top"], ascending=False).index  # the whole first
    order = order.append(pd.Index(half["method"].unique()).difference(order))
    lines = []
    for method in order:
        own = half[half["method"] == method]
        cells = [NAMES.get(method, method)]
        one = own["select_seed"].nunique() == 1
        cells += [f"{own[c].mean():.2f}" if one else "" for c in shares]
        for length in lengths:
            part = half[half["length"] == length]
            # repeats on another machine count in gaps alone
            once = report.drop_repeats(part[part["method"] == method])
            found, bases = once.groupby("base_id")["after"].mean(), counts[length]
            few = f" ({len(found)} of {bases} bases)" if 0 < len(found) < bases else ""
            cells.append(f"{show(found)}{few}" if len(found) else "")
            cells.append(gap_to(part, method, against, of=len(found)))
        lines.append(cells)
    told = ", ".join(
        f"{number(epochs, 'epoch')} on {number(count, 'base')}"
        for epochs, count in counts.items()
    )
    net, images = rows[["net", "dataset"]].iloc[0]
    kept = "half" if share == 0.5 else f"{100 * share:g} %"
    head = ["method", *shares]
    for n in lengths:
        head += [number(n, "epoch"), f"above {SHORT.get(against, against)} [95 %]"]
    return (
        f"{net}, {images}, {kept} of the MACs, fine-tuned for {told}; bases "
        f"{show(rows.drop_duplicates('base_id')['base'])} %; top-1 on the test images "
        f"in percent, mean ± s.d. over bases (`{profile}`).\n\n{markdown(head, lines)}"
    )


def number(count, what):
    return f"{count} {what}{'' if count == 1 else 's'}"


def gap_to(rows, method, against, of=0):
    """Mean gap to `against`, paired by base, with its t interval from two bases on.

    Where it rests on fewer than `of` bases, it says on how many.
    """
    table = verdicts.pair_all(rows, against)
    if method not in table:
        return ""
    gaps = table[method].dropna().to_numpy()
    if method == against or len(gaps) == 0:
        return ""
    if len(gaps) == 1:
        return f"{gaps[0]:+.2f}"
    low, high = verdicts.interval_of(gaps)
    few = f", {len(gaps)} bases" if len(gaps) < of else ""
    return f"{gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}]{few}"


def strategies(profile):
    rows = read(profile)
    lines = [
        [NAMES.get(name, name), *(f"{part[axis].iloc[0]:.2f}" for axis in "dwr"),
         f"{100 - part['macs_down'].mean():.1f} %", show(part["before"]),
         show(part["after"])]
        for name, part in rows.groupby("method", sort=False)
    ]  # fmt: skip
    head = ["strategy", "d", "w", "r", "MACs kept", "before fine-tuning", "after"]
    return f"{describe(rows)}\n\n{markdown(head, lines)}"


def findings():
    """Five sentences: one per paper, one on what a criterion decides, one on length."""
    claims = ledger.read("claims")
    lines = []
    for paper, part in claims.groupby("paper", sort=False):
        yes, no = ((part["verdict"] == v).sum() for v in ("reproduced", "contradicted"))
        claim = part.set_index("id").loc[AGAINST_RIVAL[paper]]
        lines.append(
            f"**{paper}**: that {claim.form} is {tell(claim)}; of its {len(part)} "
            f"rows in the ledger {yes} are reproduced here, {no} contradicted, and "
            f"{len(part) - yes - no} open."
        )
    lines += weigh(ledger.read_rows("compare_16_cpu.csv|compare_16_long_cpu.csv"))
    return "\n".join(f"{place}. {line}" for place, line in enumerate(lines, 1))


def weigh(rows):
    """What the choice of channels decides beside pruning at all, and beside length."""
    rows = report.drop_repeats(rows[rows["share"].isin([0.5, 1.0])])
    anew = rows[rows["method"] == "scratch-compute"]
    rows = rows[~rows["method"].str.contains("scratch|distilled|-sparse|-longer")]
    bases = rows.groupby("length")["base_id"].agg(set)
    bases = bases[bases.map(len) >= ledger.ENOUGH]
    common = set.intersection(*bases)  # means over others are other means

    def average(rows, length):
        part = rows[(rows["length"] == length) & rows["base_id"].isin(common)]
        table = part.pivot_table("after", "base_id", "method")
        return table.dropna(axis="columns").mean() if len(table) == len(common) else {}

    tops = {length: average(rows, length) for length in bases.index}
    # the longest with most ways: fewer than all were fine-tuned for long
    told_of = max(tops, key=lambda length: (len(tops[length]), length))
    last = tops[told_of]
    pruned = last.drop("unpruned")
    best, least = pruned.idxmax(), pruned.idxmin()
    scratch = average(anew, told_of)
    told = ""
    if len(scratch):
        told = (", from scratch with as much compute in all: "
                f"{scratch['scratch-compute']:.1f} %")  # fmt: skip
    yield (
        f"Of {len(pruned)} ways to choose channels at half of the MACs none ends above "
        f"{last[best]:.1f} % ({NAMES[best]}) or below {last[least]:.1f} % "
        f"({NAMES[least]}) after {number(told_of, 'epoch')} of fine-tuning; unpruned "
        f"and fine-tuned as long: {last['unpruned']:.1f} %{told} (means of "
        f"{len(common)} bases)."
    )
    if len(tops) > 1:
        leads = [f"{top['l1'] - top['random']:.1f}" for top in tops.values()]
        part = rows[rows["base_id"].isin(common) & (rows["length"] == max(tops))]
        gain = tops[max(tops)]["random"] - tops[min(tops)]["random"]
        yield (
            f"After {enumerate_all(tops)} epochs of fine-tuning the L1 norm leads "
            f"random channels by {enumerate_all(leads)} points (the last: "
            f"{gap_to(part, 'l1', 'random')}), while random channels gain {gain:.1f} "
            "points."
        )


def enumerate_all(items):
    *rest, last = map(str, items)
    return f"{', '.join(rest)} and {last}"


def tell(claim):
    """Verdict, effect, interval and bases of a claim that bases have judged."""
    effect, low, high = map(float, (claim.effect, claim.low, claim.high))
    return (
        f"**{claim.verdict}** ({effect:+.2f} {claim.unit}, {low:.2f} to {high:.2f}, "
        f"{claim.n} bases; {claim.distance.split(';')[0]})"
    )


def decided():
    """The claims of all papers that several bases have decided."""
    claims = ledger.read("claims")
    measured = claims[
        claims["kind"].isin(["contrast", "loss", "ranks", "bound", "ratio"])
    ]
    measured = measured[measured["n"].replace("", "0").astype(int) > 1]
    done = measured[measured["verdict"] != "undecided"]
    lines = [f"- {row.id}: {row.form}: {tell(row)}." for row in done.itertuples()]
    lines.append(
        f"- Measured on several bases and undecided: {len(measured) - len(done)} "
        "more; each says in the ledger how many bases would decide it."
    )
    return "\n".join(lines)


def nets():
    """One sentence on the table of other people's nets."""
    rows = pd.read_csv(NETS, keep_default_na=False)
    counts = rows["outcome"].value_counts()
    errors = rows[["error_mask", "error_hooks"]].stack()
    errors = pd.to_numeric(errors[errors != ""])
    refused = ", ".join(rows.loc[rows["outcome"] == "refused", "net"])
    theirs = rows["theirs"][rows["theirs"] != ""].value_counts()
    words = {"fails": "that fail or run out of time"}
    told = ", ".join(f"{n} {words.get(name, name)}" for name, n in theirs.items())
    return (
        f"Of {len(rows)} nets of timm {counts.get('half', 0)} are pruned to half of "
        f"their MACs, with an error of at most {errors.max():.1e} in float64; refused: "
        f"{refused}. Torch-Pruning on {theirs.sum()} of them: {told} "
        "(`tests/benchmarks/nets.csv`)."
    )


def planned():
    """What the long profiles would cost here: why a GPU is asked for."""
    lines = []
    for profile in ("cifar10", "imagenet"):
        found = hours.plan_hours(profile)
        macs, days = f"{found['macs']:.1e} MACs", f"{found['days']:,.0f} core-days"
        lines.append(f"- `{profile}`: {found['runs']} runs that train, {macs}, {days}.")
    rate, device = hours.read_rate()
    lines.append(
        f"\nAt {rate / 1e9:.1f} GMAC/s, forward with backward counted once, as "
        f"measured on {device.split(',')[0]}, one thread (`{hours.RATE}`)."
    )
    return "\n".join(lines)


PARTS = {
    "planned": planned,
    "nets": nets,
    "findings": findings,
    "decided": decided,
    "compare_16_cpu": partial(comparison, "compare_16_cpu"),
    "compare_16_long_cpu": partial(comparison, "compare_16_long_cpu"),
    "compare_16_small_cpu": partial(comparison, "compare_16_small_cpu", share=0.35),
    "allocate_16_cpu": partial(
        comparison, "allocate_16_cpu", against="map", shares=("d", "w", "r")
    ),
    "cifar10_cpu": partial(accuracies, "cifar10_cpu", split=("rate",)),
    "scop_cifar10_cpu": partial(
        accuracies, "scop_cifar10_cpu", split=("rate", "residual")
    ),
    "nisp_lenet_cpu": partial(accuracies, "nisp_lenet_cpu"),
    "nisp_cifarnet_cpu": partial(accuracies, "nisp_cifarnet_cpu"),
    "nisp_resnet20_cpu": partial(accuracies, "nisp_resnet20_cpu"),
    "map_resnet20_cpu": partial(strategies, "map_resnet20_cpu"),
}


def fill(text):
    """The text with every marked part written anew; unknown names are refused."""

    def write(found):
        name = found[2]
        if name not in PARTS:
            sys.exit(f"readme: no part '{name}'; have {', '.join(PARTS)}")
        return f"{found[1]}{PARTS[name]()}\n{found[3]}"

    return MARKED.sub(write, text)


def main():
    before = README.read_text(encoding="utf-8")
    after = fill(before)
    if "--check" in sys.argv[1:]:
        if after != before:
            sys.exit("README.md and data/results part: run `make readme`")
    else:
        paths.write_text(README, after)


if __name__ == "__main__":
    main()
