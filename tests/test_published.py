"""Numbers quoted from papers: every file has one form, and print is checked by sums."""

import itertools
import math
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from lib import paths
from lib.models import registry

COLUMNS = [
    "dataset", "net", "method", "variant", "quantity", "value", "unit", "table",
    "source", "status", "note",
]  # fmt: skip
KEY = ["dataset", "net", "method", "variant", "quantity"]
FILLED = [name for name in COLUMNS if name not in ("variant", "note")]
UNITS = {"percent", "points", "count", "ratio", "M", "G", "ms"}
STATUSES = {"read", "second-hand", "unverified"}
OURS = ("contrasts", "claims", "our_claims")  # what is registered and claimed here
FILES = sorted(p for p in paths.PUBLISHED.glob("*.csv") if p.stem not in OURS)
# an absolute or home path, a folder of a checkout, a backslash, a file of notes or code
PATH = re.compile(
    r"(?<![\w.:/])[~.]*/\w"
    r"|(?<![\w.-])(shared|work|home|root|tmp|data|papers|lib|notebooks)/"
    r"|\\|\w\.(md|txt|py|ipynb|csv)\b"
)
MISPRINT = re.compile(r"printed (-?\d+\.\d+), base and pruned give (-?\d+\.\d+)")
ROUNDING = Decimal("0.01")  # one unit of the last digit printed


def read_rows(path) -> pd.DataFrame:
    """A file as it is written: text only, an empty field is an empty string."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def rows(request) -> pd.DataFrame:
    return read_rows(request.param)


@pytest.fixture(scope="module")
def scop() -> pd.DataFrame:
    return read_rows(paths.PUBLISHED / "scop.csv")


@pytest.fixture(scope="module")
def nisp() -> pd.DataFrame:
    return read_rows(paths.PUBLISHED / "nisp.csv")


@pytest.fixture(scope="module")
def deit_b() -> pd.DataFrame:
    return read_rows(paths.PUBLISHED / "deit_b.csv")


# -- every file ------------------------------------------------------------------------


def test_columns_are_the_agreed_ones(rows):
    assert list(rows.columns) == COLUMNS and len(rows) > 0


def test_values_are_finite_numbers(rows):
    for text in rows["value"]:
        assert re.fullmatch(r"-?\d+(\.\d+)?", text), text
        assert math.isfinite(float(text))


def test_units_and_statuses_are_known(rows):
    assert set(rows["unit"]) <= UNITS and set(rows["status"]) <= STATUSES


def test_fields_are_filled_and_trimmed(rows):
    for name in COLUMNS:
        assert (rows[name] == rows[name].str.strip()).all(), name
    for name in FILLED:
        assert (rows[name] != "").all(), name


def test_no_number_is_given_twice(rows):
    assert rows[rows.duplicated(KEY, keep=False)][KEY].values.tolist() == []


def test_no_field_names_a_path(rows):
    cells = set(rows[COLUMNS].to_numpy().ravel())
    assert [cell for cell in cells if PATH.search(cell)] == []


def test_what_was_not_seen_says_so(rows):
    unseen = rows["source"].str.contains("not checked")
    assert (unseen == (rows["status"] == "unverified")).all()
    copied = rows["source"].str.contains("third-party copy")
    assert (rows.loc[copied, "status"] == "second-hand").all()


def test_differences_are_points(rows):
    difference = rows["quantity"].str.contains("_(?:gap|loss)$")
    assert (difference == (rows["unit"] == "points")).all()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/work/x", True), ("see ~/notes", True), ("../paper", True),
        ("shared/papers", True), ("C:\\x", True), ("scop.md, section 2", True),
        ("uniform rate 0.35 gives 44.99/43.52", False), ("params/FLOPs", False),
        ("official repository figure imagenet.PNG", False),
        ("https://github.com/huawei-noah/Pruning", False),
    ],
)  # fmt: skip
def test_paths_are_told_from_fractions_and_addresses(text, found):
    assert bool(PATH.search(text)) == found


# -- SCOP ------------------------------------------------------------------------------


def find_misprints(table: pd.DataFrame) -> dict[tuple, tuple[str, Decimal]]:
    """Gaps that are not pruned minus base: key -> (as printed, what the two give)."""
    values = {tuple(row[:-1]): row[-1] for row in table[[*KEY, "value"]].values}
    found = {}
    for key, gap in values.items():
        *place, quantity = key
        if not quantity.endswith("_gap"):
            continue
        error = quantity.replace("_gap", "_error")
        pruned, base = values[*place, error], values[*place, f"{error}_base"]
        given = Decimal(pruned) - Decimal(base)
        if abs(Decimal(gap) - given) > ROUNDING:
            found[key] = gap, given
    return found


def test_a_gap_is_pruned_minus_base_unless_its_note_says_otherwise(scop):
    noted = {}
    for row in scop.itertuples():
        if match := MISPRINT.search(row.note):
            key = tuple(getattr(row, name) for name in KEY)
            noted[key] = match[1], Decimal(match[2])
    assert noted == find_misprints(scop) and len(noted) > 0


@pytest.mark.parametrize(
    ("gap", "wrong"),
    [("0.58", False), ("0.57", False), ("0.56", True), ("-0.58", True)],
)
def test_a_wrong_gap_is_found(gap, wrong):
    place = ["imagenet", "resnet18", "scop", "A"]
    names = ["top1_error_base", "top1_error", "top1_gap"]
    values = zip(names, ["30.24", "30.82", gap], strict=True)
    table = pd.DataFrame([[*place, *v] for v in values], columns=[*KEY, "value"])
    assert (len(find_misprints(table)) == 1) == wrong


def test_gaps_are_points_and_the_rest_percent(scop):
    is_gap = scop["quantity"].str.endswith("_gap")
    assert (scop["unit"] == is_gap.map({True: "points", False: "percent"})).all()


def test_error_rates_come_with_their_base_on_imagenet(scop):
    table = scop[scop["table"] == "ImageNet table"]
    assert (table["status"] == "read").all()
    for place, group in table.groupby(KEY[:4]):
        names = set(group["quantity"])
        assert "macs_down" in names and names & {"top1_error", "top5_error"}, place
        for top in ("top1", "top5"):
            three = {f"{top}_error_base", f"{top}_error", f"{top}_gap"}
            assert not names & three or three <= names, place


def test_the_numbers_of_the_abstract_are_those_of_the_table(scop):
    table = scop[scop["source"].str.contains("abstract")].set_index("quantity")
    assert set(table["net"] + table["variant"]) == {"resnet101B"}
    assert table["value"].to_dict() == {
        "top1_gap": "0.01", "params_down": "57.8", "macs_down": "60.2"
    }  # fmt: skip


# -- NISP ------------------------------------------------------------------------------


def find_disorder(table: pd.DataFrame, variants: list[str]) -> set[tuple[str, str]]:
    """(variant, quantity) that cuts no more than the next, which halves one layer less.

    Both of each such pair.
    """
    values = {(r.variant, r.quantity): Decimal(r.value) for r in table.itertuples()}
    found = set()
    for more, less in itertools.pairwise(variants):
        for quantity in ("params_down", "macs_down"):
            pair = (more, quantity), (less, quantity)
            if values[pair[0]] <= values[pair[1]]:
                found |= set(pair)
    return found


def test_halving_one_layer_more_cuts_more_unless_swapped(nisp):
    rows = nisp[(nisp["net"] == "caffenet") & (nisp["method"] == "nisp")]
    swapped = rows[rows["note"].str.contains("swapped")]
    noted = {(row.variant, row.quantity) for row in swapped.itertuples()}
    assert noted == find_disorder(rows, ["A", "B", "C"]) and len(noted) == 2


def test_a_disorder_is_found():
    values = ["60", "50", "50", "55"]
    names = itertools.product("AB", ["params_down", "macs_down"])
    rows = [[*name, value] for name, value in zip(names, values, strict=True)]
    table = pd.DataFrame(rows, columns=["variant", "quantity", "value"])
    assert find_disorder(table, ["A", "B"]) == {("A", "macs_down"), ("B", "macs_down")}


def test_all_of_table_1_is_there(nisp):
    table = nisp[(nisp["table"] == "Table 1") & (nisp["method"] == "nisp")]
    places = table.groupby(["net", "variant"])["quantity"].apply(set)
    assert {net + variant for net, variant in places.index} == {
        "caffenetA", "caffenetB", "caffenetC", "caffenetD", "googlenet_bvlc",
        "resnet34A", "resnet34B", "resnet50A", "resnet50B", "resnet56", "resnet110",
    }  # fmt: skip
    for place, names in places.items():
        loss = names - {"params_down", "macs_down"}
        assert len(names) == 3 and loss <= {"top1_gap", "accuracy_loss"}, place


def test_a_loss_of_unknown_kind_says_so(nisp):
    unknown = nisp["note"].str.contains("top-1 or top-5 is not known")
    assert (unknown == (nisp["quantity"] == "accuracy_loss")).all() and unknown.any()


def test_nets_are_built_here(nisp):
    for name in set(nisp["net"]):
        registry.find_builder(name)


# -- DeiT-B ----------------------------------------------------------------------------

TERMS = ["1", "a", "t", "a^2", "at", "t^2"]
LAYERS = 12


def read_points(table: pd.DataFrame) -> np.ndarray:
    """[points, 3]: shares of attention and activation layers kept, top-1."""
    rows = table[table["quantity"] == "top1"]
    shares = rows["variant"].str.extract(r"^a (\d\.\d\d), t (\d\.\d\d)$")
    return np.column_stack([shares.astype(float), rows["value"].astype(float)])


def read_fit(table: pd.DataFrame) -> np.ndarray:
    """[6] coefficients as printed, in the order of TERMS."""
    rows = table[table["quantity"] == "coefficient"]
    return rows.set_index("variant")["value"][TERMS].to_numpy(float)


def expand(a: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.stack([a**0, a, t, a * a, a * t, t * t], axis=1)


def find_best(fit: np.ndarray, layers: int = 16) -> tuple[int, int]:
    """Attention and activation layers, `layers` in all, that a fit puts first."""
    kept = np.arange(layers - LAYERS, LAYERS + 1)
    best = kept[np.argmax(expand(kept / LAYERS, (layers - kept) / LAYERS) @ fit)]
    return int(best), int(layers - best)


def test_points_are_shares_of_twelve_layers(deit_b):
    points = read_points(deit_b)
    assert len(points) == 22 and len(deit_b) == 22 + len(TERMS) + 2
    shares = points[:, :2]
    assert (shares == np.round(np.round(shares * LAYERS) / LAYERS, 2)).all()
    assert len(np.unique(shares, axis=0)) == 22
    assert (shares.min(axis=1) < 1).sum() == 21 and (shares.max(axis=1) < 1).sum() == 5


def test_fewer_layers_never_score_more(deit_b):
    points = read_points(deit_b)
    less = (points[:, None, :2] <= points[None, :, :2]).all(axis=2)
    more = points[:, None, 2] > points[None, :, 2]
    assert not (less & more).any()


def test_the_printed_fit_is_not_that_of_its_table_and_its_notes_say_so(deit_b):
    a, t, top1 = read_points(deit_b).T
    fit, *_ = np.linalg.lstsq(expand(a, t), top1, rcond=None)
    printed = read_fit(deit_b)
    assert (np.abs(fit - printed) > 4).all()
    notes = deit_b[deit_b["quantity"] == "coefficient"].set_index("variant")["note"]
    found = notes[TERMS].str.extract(r"print (\S+); not the least .* gives (\S+)$")
    assert np.abs(found[0].astype(float) - printed).max() < 0.01
    assert np.abs(found[1].astype(float) - fit).max() < 0.0051


def test_the_two_fits_put_the_optimum_two_layers_apart(deit_b):
    a, t, top1 = read_points(deit_b).T
    fit, *_ = np.linalg.lstsq(expand(a, t), top1, rcond=None)
    rows = deit_b[deit_b["quantity"] == "optimum"].set_index("variant")["value"]
    kept = [round(float(rows[name]) * LAYERS) for name in "at"]
    assert find_best(read_fit(deit_b)) == tuple(kept) == (8, 8)
    assert find_best(fit) == (10, 6)
