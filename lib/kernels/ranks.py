"""Ranks within columns, ties sharing their mean, as integers around zero."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from lib.kernels.dispatch import choose_backend

TILE = 2**16  # values ranked at a time on a CPU
TILE_ON_GPU = 2**22  # and on a GPU, where sorting takes some 50 bytes a value
EXACT_FLOAT32 = 2**23  # half-integers up to here are exact in float32
LOW = np.uint64(2**32 - 1)  # the half of a word that holds a position


def centre_ranks(features: Tensor, *, backend: str | None = None) -> Tensor:
    """2 rank - (N + 1) within each column: integers whose sum is zero.

    features: [N, D], floating point, N samples of D features, no nan (not checked; its
    column is then without meaning). Returned: [D, N], the samples of a feature side by
    side in memory, float32 up to N = 2^23, where these integers and their halves are
    exact, float64 beyond. Ranks run from 1 to N, ties share their mean, and -0.0 ties
    with 0.0. Every implementation gives the same bits. backend: "triton", "torch", or
    None for the fitting one; "torch" ranks with NumPy on a CPU, `torch.get_num_threads`
    tiles at a time. Raises `ValueError` unless features are floating point [N, D].
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            "features must be floating point [N, D], got "
            f"{features.dtype} {list(features.shape)}"
        )
    implementation = choose_backend(features, backend)
    values = features.detach().T.clone(memory_format=torch.contiguous_format)
    values = values if values.dtype == torch.float64 else values.float()
    exact = torch.float32 if len(features) <= EXACT_FLOAT32 else torch.float64
    same = values.dtype == exact
    ranks = values if same else torch.empty_like(values, dtype=exact)
    if values.numel():
        _rank_tiles(values, ranks, implementation)
    return ranks


def _rank_tiles(values: Tensor, ranks: Tensor, implementation: str) -> None:
    """Rank values [D, N] some rows at a time; packed, on several threads."""
    step = max(1, (TILE_ON_GPU if values.is_cuda else TILE) // values.shape[1])
    tiles, outs = values.split(step), ranks.split(step)
    if implementation == "triton":
        from lib.kernels.ranks_triton import rank_rows as rank
    elif values.is_cuda or not all(map(_fits_float32, tiles)):
        rank = _rank_sorted
    else:
        with ThreadPoolExecutor(min(torch.get_num_threads(), len(tiles))) as pool:
            list(pool.map(_rank_packed, tiles, outs))  # NumPy lets others run
        return
    for rows, out in zip(tiles, outs, strict=True):
        rank(rows, out)


def _fits_float32(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 or torch.equal(rows.float().double(), rows)


def _rank_sorted(rows: Tensor, out: Tensor) -> None:
    """From the runs of equals in the sorted rows; any type and device."""
    keys, order = rows.sort(1)
    first = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[:, 1:], keys[:, :-1], out=first[:, 1:])
    begin = first.flatten().nonzero()[:, 0]
    end = torch.cat([begin[1:], begin.new_tensor([first.numel()])])
    total = (begin + end).repeat_interleave(end - begin, output_size=first.numel())
    # places count through all rows: twice those before a row, and once its own N, off
    offset = torch.arange(1, 2 * len(rows), 2, device=rows.device) * rows.shape[1]
    total = total.view_as(order) - offset[:, None]
    out.scatter_(1, order, total.to(out.dtype))


def _rank_packed(rows: Tensor, out: Tensor) -> None:
    """What float32 holds, on a CPU, several times faster: value and place in one word.

    NumPy sorts words without indices. The lowest value of a row, which a ReLU makes of
    half of them, needs its number only: its words are zero and sort at little cost.
    Nothing but NumPy from here on: PyTorch would start threads of its own on each.
    """
    out, n = out.numpy(), rows.shape[1]
    words, above = _pack(rows.numpy().astype(np.float32, copy=False))
    words.sort(axis=1)
    tied = n - np.array([np.count_nonzero(row) for row in above])  # with the lowest
    level = np.arange(1 - n, n, 2, dtype=out.dtype)
    live = np.concatenate([row[k:] for row, k in zip(words, tied, strict=True)])
    total = np.concatenate([level[k:] for k in tied])
    first = np.ones(len(live) + 1, dtype=bool)
    np.greater(live[1:] ^ live[:-1], LOW, out=first[1:-1])
    first[np.cumsum(n - tied)] = True  # runs end with their row
    _share_ranks(total, first)
    out[:] = (tied - n)[:, None]
    live &= LOW
    out.reshape(-1)[live.view(np.int64)] = total


def _pack(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words [R, N]: value above the lowest, then place in the tile; 0 for the lowest.

    And which values are above it.
    """
    bits = rows.view(np.int32)
    low = bits.min(axis=1, keepdims=True)
    if low.min() < 0:  # negative floats: -2^31 - bits, so that -0.0 meets 0.0
        sign = bits >> 31  # -1 or 0
        bits = ((sign & 0x7FFFFFFF) ^ bits) - sign  # many times as fast as a choice
        low = bits.min(axis=1, keepdims=True)
    above = bits != low
    words = (bits - low).view(np.uint32).astype(np.uint64)  # wraps, rightly
    words <<= np.uint64(32)
    places = np.arange(words.size, dtype=np.uint32).reshape(words.shape)
    words |= np.multiply(places, above, out=places)
    return words, above


def _share_ranks(total: np.ndarray, first: np.ndarray) -> None:
    """Give each run of equals the mean of its ends; `first` marks where runs begin."""
    here, after = first[:-1], first[1:]
    begin, last = np.flatnonzero(here > after), np.flatnonzero(here < after)
    if len(begin):
        mean = (total[begin] + total[last]) / 2
        total[~(here & after)] = np.repeat(mean, last - begin + 1)
