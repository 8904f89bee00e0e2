"""Images that stay on disk: what a set has in place of its tensor of pixels."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.data.listing import NONE_LEFT, Files
from lib.data.pictures import BROKEN_IMAGE, Fit, explain, show
from lib.settings import check_int

Broken = list[tuple[int, str]]  # files that cannot be read: number and reason


@dataclass(frozen=True, eq=False)
class Stream:
    """Pictures `index` (int64 [N]) of a source, as if they were uint8 [N, H, W, C].

    It has what sets and batches use of a tensor; nothing is decoded before it is asked
    for. One that cannot be read is replaced by the next readable one of its class in
    the same part of the set, so that batches keep their size and their labels.
    device: where batches go. workers: processes that decode; None: PRUNING_WORKERS,
    else as many as torch has threads. What comes out does not depend on it.
    """

    source: Files
    index: np.ndarray
    fit: Fit
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    workers: int | None = None
    dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        """[N, H, W, C]."""
        return torch.Size((len(self.index), *self.fit.shape))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Any) -> Any:
        """One picture's pixels for a number, else the stream of those chosen."""
        if not isinstance(which, slice):
            which = torch.as_tensor(which).cpu().numpy()
        found = self.index[which]
        if not np.ndim(found):
            return next(self.read([np.arange(len(self))[which][None]]))[0]
        return replace(self, index=np.ascontiguousarray(found))

    def to(self, device: torch.device | str) -> "Stream":
        """The same, with batches on `device`."""
        return replace(self, device=torch.empty(0, device=device).device)

    def scale(self, side: int) -> "Stream":
        """The same with pictures of `side` x `side` pixels."""
        return replace(self, fit=replace(self.fit, sides=(*self.fit.sides, side)))

    def fingerprint(self) -> Tensor:
        """What tells these pictures from others: names, order, content of a hundred."""
        # of all of them it would take as long as an epoch
        names, some = self.source.names, np.linspace(0, len(self) - 1, 100).astype(int)
        digest = hashlib.sha256(repr(self.fit).encode())
        for part in (names.text, names.ends, self.source.labels, self.index):
            digest.update(part.tobytes())
        for i in self.index[some] if len(self) else ():
            with contextlib.suppress(OSError), self.source.open(i) as file:
                digest.update(file.read())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def load(self) -> Tensor:
        """All pixels, decoded in threads."""
        # here, for threads that import it at a time can find it half imported
        import torchvision.transforms.v2  # noqa: F401

        pixels = torch.empty(self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            shown = pool.map(lambda at: self._show(at, None), range(len(self)))
            for at, (picture, broken) in enumerate(shown):
                pixels[at] = picture
                self.source.add_broken(broken)
        self.source.tell_broken()
        return pixels

    def read(
        self, picks: Iterable[Any], key: tuple[int, int] | None = None
    ) -> Iterator[Tensor]:
        """Pixels uint8 [B, H, W, C] of each list of positions, decoded by workers.

        `key` (seed, epoch) draws the crops of a fit by area, one for each picture.
        ValueError: too many broken files.
        """
        picks = [np.asarray(pick) for pick in picks]
        import torchvision  # noqa: F401  # once, not in every worker

        stream = DataLoader(
            _Parts(self, key), batch_size=None, sampler=picks,
            num_workers=self._count_workers() if len(picks) > 1 else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from torch's own
        )  # fmt: skip
        try:
            for pixels, broken in stream:
                self.source.add_broken(broken)
                yield pixels.to(self.device, non_blocking=True)
        finally:
            self.source.tell_broken()

    def _count_workers(self) -> int:
        told = os.environ.get("PRUNING_WORKERS", "")
        if self.workers is None and told:
            number = int(told) if told.isdecimal() else told
            return check_int("PRUNING_WORKERS", number, 0)
        return torch.get_num_threads() if self.workers is None else self.workers

    def _show(self, at: int, key: tuple[int, int] | None) -> tuple[Tensor, Broken]:
        """The picture at a position, or the next readable one of its class."""
        broken: Broken = []
        for i in self._list_stand_ins(at):
            try:
                with self.source.open(i) as file:
                    content = file.read()
                pixels = show(content, self.fit, key and (*key, i))
                return pixels, broken
            except BROKEN_IMAGE as error:
                broken.append((i, explain(error)))
        broken.append((NONE_LEFT, ""))  # an error would not leave a worker in one line
        return torch.zeros(self.fit.shape, dtype=torch.uint8), broken

    def _list_stand_ins(self, at: int) -> Iterator[int]:
        # Within this part of the set: the picture of a validation image must not come
        # from the training images. In order of position, so that it is always the same.
        yield int(self.index[at])
        same = self.source.labels[self.index] == self.source.labels[self.index[at]]
        for other in np.roll(np.flatnonzero(same), -np.count_nonzero(same[: at + 1])):
            yield int(self.index[other])


class _Parts(Dataset):
    """Whole batches, so that one process decodes each."""

    def __init__(self, stream: Stream, key: tuple[int, int] | None):
        self.stream, self.key = stream, key

    def __getitem__(self, positions: np.ndarray) -> tuple[Tensor, Broken]:
        shape = (len(positions), *self.stream.fit.shape)  # a share may be empty
        pixels, met = torch.empty(shape, dtype=torch.uint8), Broken()
        for place, at in enumerate(positions):
            pixels[place], broken = self.stream._show(int(at), self.key)
            met += broken
        return pixels, met
