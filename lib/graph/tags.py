"""How channel tags travel through one operation.

A *tag* is the number of an output channel of a layer. The tags of a tensor are an
int64 tensor of as many dimensions, of size 1 along every dimension in which they do not
vary: those of an activation [N, C, H, W] have the shape [1, C, 1, 1]. An element-wise
operation keeps them, an addition ties two rows of them, a concatenation joins them,
`view` and `transpose` act on the tags themselves (`lib.graph.moves`). What has no rule
freezes the tags it reads, with the reason, so that nothing is pruned on a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONSTANT = -1  # the tag of a channel that no layer makes: zero padding, a constant

ADDITIONS = {"add", "add_", "sub", "sub_"}
ELEMENTWISE = ADDITIONS | set(
    "mul mul_ div div_ relu relu_ relu6 hardtanh hardtanh_ hardswish hardswish_ "
    "hardsigmoid hardsigmoid_ sigmoid sigmoid_ silu silu_ mish mish_ gelu tanh tanh_ "
    "elu elu_ selu celu softplus leaky_relu leaky_relu_ threshold threshold_ clamp "
    "clamp_ clamp_min clamp_min_ clamp_max pow abs neg exp sqrt rsqrt reciprocal "
    "square rsub maximum minimum where native_dropout dropout _to_copy to clone "
    "detach alias _prelu_kernel prelu "
    "contiguous lift_fresh zeros_like ones_like empty_like rand_like bernoulli "
    "bernoulli_".split()
)
# Those that may give another type, layout or number of tensors are run for real.
SHAPE_KEEPING = ELEMENTWISE - set("_to_copy to clone contiguous native_dropout".split())
SPATIAL = set(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_avg_pool1d "
    "upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d "
    "_upsample_nearest_exact2d reflection_pad2d replication_pad2d".split()
)
PIXELS = {"pixel_shuffle", "pixel_unshuffle"}
CONSTANTS = {"new_zeros", "new_ones", "new_full", "new_empty"}
REDUCTIONS = {"mean", "sum", "amax", "amin"}
MOVES = set(
    "view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze "
    "expand slice select split split_with_sizes chunk unbind flip roll index "
    "index_select constant_pad_nd channel_shuffle native_channel_shuffle".split()
)


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of the pass: its shape, what is known of it, and its tags.

    `place` is its position among the values, -1 for what the pass did not make.
    `constant` says that no image changes it, `parameter` which of the model's
    parameters it is or is the transpose of; `content` is the tensor where a constant
    holds numbers, not just a shape. `tags` are None where channels were lost.
    """

    shape: tuple[int, ...]
    place: int = -1
    constant: bool = False
    parameter: str | None = None
    content: Tensor | None = None
    tags: Tensor | None = None


class Ledger:
    """All tags given out, which of them are tied, and which must not be touched.

    `ties` are pairs [2, n]; `added` and `bound` list the tags tied by an addition and
    by anything else; `frozen` holds tags with a reason; `wide` those of channels that
    the model's own code picks by number; `vectors` the parameters that lie along
    channels: name -> (dimension, tags).
    """

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[Tensor] = []
        self.added: list[Tensor] = []
        self.bound: list[Tensor] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.wide: list[Tensor] = []
        self.vectors: dict[str, tuple[int, Tensor]] = {}
        self.met: set[str] = set()  # parameters that the operation at hand added there

    def fresh(self, size: int) -> Tensor:
        """New tags [size]."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor, *, added: bool = False) -> None:
        """Channel i of `a` and channel i of `b` stand or fall together."""
        a, b = a.flatten(), b.flatten()
        if a is b or torch.equal(a, b):
            return
        pairs = torch.stack([a, b])
        # A constant has no layer to cut it in, so it stays, and who is tied to it.
        if pairs.numel() and int(pairs.min()) < 0:
            self.freeze(pairs[:, (pairs < 0).any(0)], "they are tied to constants")
            pairs = pairs[:, (pairs >= 0).all(0)]
        self.ties.append(pairs)
        (self.added if added else self.bound).append(pairs.flatten())

    def freeze(self, tags: Tensor | None, reason: str) -> None:
        """These channels must all stay, because of `reason`."""
        if tags is not None:
            flat = tags.flatten()
            self.frozen.append((flat[flat >= 0], reason))

    def widen(self, tags: Tensor) -> None:
        """Tensors keep these channels: code between layers picks them by number."""
        flat = tags.flatten()
        self.wide.append(flat[flat >= 0])

    def row(self, value: Value, dim: int, size: int, where: str) -> Tensor:
        """The tags along `dim` as a row [size]; other dimensions must not vary.

        Channels that were lost behind an operation without a rule get new tags, which
        are frozen with all that will be tied to them.
        """
        tags = value.tags
        if value.constant and tags is None:
            return torch.full((size,), CONSTANT)
        if tags is not None and tags.numel() in (1, tags.shape[dim % tags.ndim]):
            return tags.flatten().expand(size)
        self.freeze(tags, f"{where} reads channels from two dimensions")
        return self.unknown(size, where)

    def unknown(self, size: int, where: str) -> Tensor:
        """New tags [size] for channels that could not be followed: they must stay."""
        row = self.fresh(size)
        self.freeze(row, f"{where} reads channels behind an operation without a rule")
        return row

    # -- rules: what an operation makes of the tags of its operands ---------------

    def elementwise(
        self, name: str, operands: Sequence[Value], shape: Sequence[int], where: str
    ) -> Tensor | None:
        """Values broadcast against one another; channels keep their places."""
        # Activations say where the channels are; parameters beside them follow.
        rows = [x.tags for x in operands if x.tags is not None and not x.constant]
        vectors = [x.tags for x in operands if x.tags is not None and x.constant]
        if not rows and not vectors:
            return None
        moving = [row for row in (*rows, *vectors) if not _is_constant(row)]
        for x in operands:
            if (x.constant and x.tags is None) or _is_constant(x.tags):
                for row in moving:
                    self._meet_constant(x, row, shape, where)
            elif x.tags is None:
                for row in (*rows, *vectors):
                    self.freeze(row, f"{where} mixes in channels that have no rule")
        rows = [row for row in rows if not _is_constant(row)] or rows[:1]
        rows, vectors = ([_widen(r, len(shape)) for r in x] for x in (rows, vectors))
        if rows:  # a parameter that lies along the pixels concerns no channel
            rows = [self._join(rows, added=name in ADDITIONS, where=where)]
            dims = [d for d, n in enumerate(rows[0].shape) if n > 1]
            vectors = [v for v in vectors if any(v.shape[d] > 1 for d in dims)]
        return self._join([*rows, *vectors], added=False, where=where)

    def _join(self, rows: list[Tensor], *, added: bool, where: str) -> Tensor:
        """Channel i of every row is channel i of the result."""
        if len(rows) == 1:
            return rows[0]
        widest = max(rows, key=lambda row: row.numel())
        # One number for all channels cannot follow any of them.
        for row in rows:
            if row.numel() == 1 and widest.numel() > 1:
                self.freeze(row, f"{where} spreads it over all channels")
        rows = [r for r in rows if r.numel() > 1 or widest.numel() == 1]
        if any(r.shape != widest.shape for r in rows):
            for row in rows:
                self.freeze(row, f"{where} combines channels along two dimensions")
            return widest
        if all(torch.equal(r, widest) for r in rows):
            return widest
        # A sum has tags of its own: what binds the sum further on must not count as
        # binding the layers in front of it, which may yet be scattered one by one.
        result = self.fresh(widest.numel()).view(widest.shape) if added else widest
        constant = torch.stack([r < 0 for r in rows])
        if not added or not bool(constant.any()):
            for row in rows:
                self.tie(row, result, added=added)
            return result
        for row in rows:
            self.tie(row[row >= 0], result[row >= 0], added=True)
        # What is added to a constant is there in any case; a channel that is constant
        # on all sides has nobody to follow.
        self.widen(torch.stack(rows)[:, constant.any(0)])
        return torch.where(constant.all(0), CONSTANT, result)

    def _meet_constant(
        self, x: Value, row: Tensor, shape: Sequence[int], where: str
    ) -> None:
        """A parameter that lies along the channels is pruned with them; else frozen."""
        size = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
        row = _widen(row, len(shape))
        dims = [d for d, n in enumerate(row.shape) if n > 1]
        if not any(size[d] > 1 for d in dims):
            return
        dim = dims[0] - (len(shape) - len(x.shape))
        if x.parameter is None or len(dims) != 1 or x.shape[dim] != row.shape[dims[0]]:
            self.freeze(row, f"{where} combines it with a constant that has channels")
        else:
            self.lie_along(x.parameter, dim, row, where)

    def lie_along(self, parameter: str, dim: int, row: Tensor, where: str) -> None:
        """The parameter has an entry per channel along `dim`, pruned with it."""
        self.met.add(parameter)
        known, tags = self.vectors.setdefault(parameter, (dim, row.flatten()))
        if known != dim or tags.numel() != row.numel():
            for each in (tags, row):
                self.freeze(each, f"{where} uses '{parameter}' along two dimensions")
        else:
            self.tie(tags, row)

    def vector(self, parameter: str, shape: Sequence[int]) -> Tensor | None:
        """The tags of a parameter that has one dimension, for what is made of it."""
        dims = [d for d, n in enumerate(shape) if n > 1]
        if len(dims) != 1:
            return None
        (dim,) = dims
        if parameter not in self.vectors:
            self.vectors[parameter] = (dim, self.fresh(shape[dim]))
        known, tags = self.vectors[parameter]
        layout = [1] * len(shape)
        layout[dim] = shape[dim]
        if known == dim and tags.numel() == shape[dim]:
            self.met.add(parameter)
            return tags.view(layout)
        self.freeze(tags, f"'{parameter}' is used along two dimensions")
        return None

    def spatial(self, name: str, x: Value, where: str) -> Tensor | None:
        """Pooling and resizing: channels are dimension 1 and stay."""
        tags = x.tags
        if tags is None or all(n == 1 for n in tags.shape[2:]):
            return tags
        self.freeze(tags, f"{where} runs '{name}' across channels")
        return None

    def shuffle_pixels(self, name: str, x: Value, r: int, where: str) -> Tensor | None:
        """r^2 channels become the pixels of one, or the pixels of one r^2 channels."""
        tags = x.tags
        if tags is None or tags.numel() == 1:
            return tags
        if tags.numel() != tags.shape[1]:
            self.freeze(tags, f"{where} runs '{name}' across channels")
            return None
        if name == "pixel_unshuffle":
            return tags.repeat_interleave(r * r, 1)
        first = tags.reshape(-1, r * r)[:, :1]
        self.tie(first.expand(-1, r * r), tags)
        return first.reshape(1, -1, *tags.shape[2:])

    def reduce(
        self,
        name: str,
        x: Value,
        dims: int | Sequence[int],
        keepdim: bool,
        where: str,
    ) -> Tensor | None:
        """A sum, mean or maximum over dimensions other than the channels."""
        tags = x.tags
        if tags is None:
            return None
        named = [dims] if isinstance(dims, int) else dims or range(tags.ndim)
        gone = {d % tags.ndim for d in named}
        if any(tags.shape[d] > 1 for d in gone):
            self.freeze(tags, f"{where} takes the '{name}' over channels")
            return None
        if keepdim:
            return tags
        return tags.reshape([n for d, n in enumerate(tags.shape) if d not in gone])

    def cat(self, operands: Sequence[Value], dim: int, where: str) -> Tensor:
        """Tags one behind the other along `dim`."""
        ndim = len(operands[0].shape)
        dim %= ndim
        constant = torch.full([1] * ndim, CONSTANT)
        tags = [constant if x.tags is None else x.tags for x in operands]
        for i, x in enumerate(operands):  # unknown is not constant: it freezes
            if x.tags is None and not x.constant:
                along = [x.shape[d] if d == dim else 1 for d in range(ndim)]
                tags[i] = self.unknown(x.shape[dim], where).view(along)
        # Joined along tokens or pixels: channel i of every piece is channel i of all.
        if all(
            t.shape[dim] == 1 < t.numel() and t.shape == tags[0].shape for t in tags
        ):
            return self._join(tags, added=False, where=where)  # of tokens, say
        parts = [
            t.expand([x.shape[d] if d == dim else -1 for d in range(ndim)])
            for t, x in zip(tags, operands, strict=True)
        ]
        layouts = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
        if len(layouts) == 1:
            return compress(torch.cat(parts, dim), only=dim)
        for part in parts:
            self.freeze(part, f"{where} concatenates differently laid out channels")
        full = [p.expand(x.shape) for p, x in zip(parts, operands, strict=True)]
        return compress(torch.cat(full, dim))


def _is_constant(tags: Tensor | None) -> bool:
    return tags is not None and bool((tags < 0).all())


def _widen(row: Tensor, ndim: int) -> Tensor:
    if row.ndim == ndim:
        return row
    return row.view((1,) * (ndim - row.ndim) + tuple(row.shape))


def compress(tags: Tensor, *, only: int | None = None) -> Tensor:
    """Give tags size 1 along every dimension in which the tags do not vary."""
    for dim in range(tags.ndim) if only is None else [only]:
        if tags.shape[dim] > 1:
            first = tags.narrow(dim, 0, 1)  # stride 0: expanded, one number in memory
            if tags.stride(dim) == 0 or torch.equal(tags, first.expand_as(tags)):
                tags = first
    return tags
