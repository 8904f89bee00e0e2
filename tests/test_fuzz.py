"""A seeded part of the fuzzer (`fuzz_surgery.py`): nothing wrong, nothing crashes."""

from collections import Counter

import fuzz_surgery
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_nets_and_plans_are_exact_or_refused(first):
    outcomes = {seed: fuzz_surgery.run_case(seed) for seed in range(first, first + 50)}
    faults = {seed: o for seed, o in outcomes.items() if o[0].isupper()}
    assert not faults
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    assert counts["exact"] > 15 and counts["refused"] > 10


def test_the_oracle_sees_a_wrong_result(monkeypatch):
    """A surgery that silences one channel too few is found out."""

    def sloppy(model, plan, shape):
        keep = {name: kept[1:] or kept for name, kept in plan.keep.items()}
        masked = mask(model, plan, shape)
        for name, kept in keep.items():
            gone = sorted(set(plan.keep[name]) - set(kept))
            masked.get_submodule(name).weight.data[gone] = 0
        return masked

    mask = fuzz_surgery.surgery.mask
    monkeypatch.setattr(fuzz_surgery.surgery, "mask", sloppy)
    outcomes = [fuzz_surgery.run_case(seed) for seed in range(25)]
    assert any(outcome.startswith("WRONG") for outcome in outcomes)
