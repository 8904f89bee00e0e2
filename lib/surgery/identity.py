"""A shrunk network knows its plan, and so does its state."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from lib.plan import Kept
from lib.surgery.movers import device_of

MARK = "pruned_by"  # a buffer of the network: a digest of the plans that made it


def mark(small: nn.Module, kept: Kept) -> None:
    """Write the digest of what is kept, and of the plan before, into the network.

    Sizes alone do not tell two plans apart: a state of other channels would load.
    """
    before = getattr(small, MARK, None)
    found = hashlib.sha256(str(_read(before)).encode())
    for name, rows in sorted(kept.rows.items()):
        found.update(f"{name} {name in kept.scatter} {rows.tolist()}".encode())
    found.update(str(sorted(kept.dropped)).encode())
    number = int.from_bytes(found.digest()[:8], signed=True)
    small.register_buffer(MARK, torch.tensor(number).to(device_of(small)))
    if before is None:
        small._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            refuse_other_plan, with_module=True
        )


def refuse_other_plan(
    module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """While a state is loaded, before anything is: one of another plan is an error."""
    own, given = _read(getattr(module, MARK, None)), _read(state.get(prefix + MARK))
    if own is not None and given is not None and own != given:
        raise ValueError(
            f"the state is that of a network pruned by another plan ({given:x}, this "
            f"one's is {own:x}): load it with the plan that it was saved with"
        )


def _read(mark: Tensor | None) -> int | None:
    if mark is None or mark.is_meta:
        return None
    return int(mark.cpu()) % 2**64  # int64 keeps it with a sign
