"""What refusals have in common: the nearest known name, a choice out of a few."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one, else all of them."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known: {shown or 'none'}"


def check_choice(what: str, value: object, choices: Iterable[object]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{what} must be one of {choices}, got {value!r}")


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` for the first of the names `given` that is not `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what} '{name}' is unknown{suggest(name, known)}")


def check_finite(what: str, values: Mapping[str, Any], advice: str = "") -> None:
    """Raise `ValueError` for the first of the tensors by name that holds NaN or inf."""
    for name, tensor in values.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{what} of '{name}' is not finite{advice}")
