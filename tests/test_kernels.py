"""Fused kernels against slow oracles: values, gradients, layouts, memory, refusals.

Without a GPU the Triton kernels run through Triton's interpreter.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, NO_TRITON, both, interpreter  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.kernels import backend, dispatch, mix_norm_relu, mmd, mmd2

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, partial sums and strips for shapes that are quick to interpret."""
    monkeypatch.setattr(mmd, "ROWS", 16)
    monkeypatch.setattr(mmd, "ROWS_ON_GPU", 16)
    if dispatch.has_triton():
        from lib.kernels import mix_triton, mmd_triton

        monkeypatch.setattr(mix_triton, "TILE", 32)
        monkeypatch.setattr(mix_triton, "WIDTH", 4)
        monkeypatch.setattr(mix_triton, "PROGRAMS", 6)
        monkeypatch.setattr(mmd_triton, "BLOCK", 16)
        monkeypatch.setattr(mmd_triton, "DEPTH", 16)


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return numbers.to(dtype).to(DEVICE)


def to_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_layer(*shape: int, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """x, beta, weight, bias; the vectors in float32 for half precision."""
    wide = torch.promote_types(dtype, torch.float32)
    vectors = (draw(shape[1], seed=seed + k, dtype=wide) for k in (1, 2, 3))
    beta, weight, bias = vectors
    x = (2 * draw(*shape, seed=seed) + 3).to(dtype)
    return [x, beta.sigmoid(), weight, bias]


def run(function, leaves, grad_seed: int = 9) -> list[torch.Tensor]:
    """Result, then the gradient to each leaf that is not None."""
    leaves = [v if v is None else v.detach().requires_grad_() for v in leaves]
    y = function(*leaves)
    y.backward(draw(*y.shape, seed=grad_seed, dtype=y.dtype))
    return [y.detach(), *(v.grad for v in leaves if v is not None)]


def mix_by_hand(x, beta, weight, bias, relu=True):
    """nn.BatchNorm in training mode on an explicitly mixed batch, in float64."""
    x, beta = x.double(), beta.double().view(-1, *[1] * (x.ndim - 2))
    half = len(x) // 2
    mixed = torch.cat([beta * x[:half] + (1 - beta) * x[half:], x[half:]])
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = kinds[x.ndim](x.shape[1], affine=False, dtype=torch.float64).to(x.device)
    y = norm.train()(mixed)
    if weight is not None:
        y = y * weight.double().view(beta.shape)
    if bias is not None:
        y = y + bias.double().view(beta.shape)
    return y.relu() if relu else y


def mmd2_by_loops(x, y, bandwidths, unbiased: bool) -> float:
    def kernel(a, b):
        square = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-square / (2 * s * s)) for s in bandwidths)

    def mean_within(rows):
        found = [
            kernel(a, b)
            for (i, a), (j, b) in itertools.product(enumerate(rows), repeat=2)
            if i != j or not unbiased
        ]
        return sum(found) / len(found)

    x, y = x.tolist(), y.tolist()
    across = [kernel(a, b) for a in x for b in y]
    return mean_within(x) + mean_within(y) - 2 * sum(across) / len(across)


def mmd2_whole(x, y, bandwidths, unbiased: bool) -> torch.Tensor:
    """The same on whole matrices in float64, for gradients."""
    z, n = torch.cat([x, y]).double(), len(x)
    squares = (z[:, None] - z[None]).square().sum(-1)
    kernel = sum(torch.exp(-squares / (2 * s * s)) for s in bandwidths)
    weights = torch.empty_like(kernel).fill_(-1 / (n * len(y)))
    for part, size in (slice(0, n), n), (slice(n, None), len(y)):
        weights[part, part] = 1 / (size * (size - unbiased))
    if unbiased:
        weights.fill_diagonal_(0)
    return (kernel * weights).sum()


def spread(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


# -- mix_norm_relu ---------------------------------------------------------------------

SHAPES = [(6, 5), (8, 3, 7), (6, 5, 5, 3), (4, 3, 2, 3, 2)]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_mix_is_batchnorm_of_the_mixed_batch(which, shape, last, small_tiles):
    leaves = make_layer(*shape)
    if last:
        leaves[0] = to_last(leaves[0])
    wanted = run(mix_by_hand, leaves)
    found = run(lambda *v: mix_norm_relu(*v, backend=which), leaves)
    assert found[0].stride() == leaves[0].stride()
    assert found[0].dtype == leaves[0].dtype
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=str,
)
def test_mix_in_low_precision(which, dtype, error, last, small_tiles):
    # without ReLU: rounding moves values across its kink
    leaves = make_layer(6, 5, 4, 3, dtype=dtype)
    if last:
        leaves[0] = to_last(leaves[0])
    wanted = run(lambda *v: mix_by_hand(*v, relu=False), leaves)
    found = run(lambda *v: mix_norm_relu(*v, relu=False, backend=which), leaves)
    assert found[0].dtype == found[1].dtype == dtype
    assert [g.dtype for g in found[2:]] == [torch.float32] * 3
    assert max(map(spread, found, wanted)) < error


@NO_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mix_default_tiles_agree(dtype):
    leaves = make_layer(10, 20, 7, 3, dtype=dtype)
    leaves[0] = to_last(leaves[0])
    pair = [
        run(lambda *v, w=w: mix_norm_relu(*v, relu=False, backend=w), leaves)
        for w in ("torch", "triton")
    ]
    error = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert max(map(spread, *pair)) < error


@both
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("weight", "bias"), [(True, True), (False, True), (False, False)]
)
def test_mix_gradients(which, relu, weight, bias):
    x, beta, w, b = make_layer(4, 2, 3)
    leaves = [x, beta, w if weight else None, b if bias else None]
    leaves = [v if v is None else v.requires_grad_() for v in leaves]
    assert torch.autograd.gradcheck(
        lambda *v: mix_norm_relu(*v, relu=relu, backend=which),
        leaves,
        fast_mode=which == "triton",
    )


@both
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 3)], ids=str)
def test_mix_gives_only_the_gradients_needed(which, needed):
    every = run(lambda *v: mix_norm_relu(*v, backend=which), make_layer(4, 3, 2))[1:]
    leaves = make_layer(4, 3, 2)
    for k in needed:
        leaves[k].requires_grad_()
    y = mix_norm_relu(*leaves, backend=which)
    y.backward(draw(*y.shape, seed=9))
    for k, leaf in enumerate(leaves):
        if k in needed:
            torch.testing.assert_close(leaf.grad, every[k])
        else:
            assert leaf.grad is None


@both
def test_mix_takes_views_and_expanded_gradients(which, small_tiles):
    x, beta, weight, bias = make_layer(6, 3, 4, 5)
    wanted = run(lambda *v: mix_by_hand(*v).mean(), [x, beta, weight, bias])
    wider = F.pad(x, (1, 2, 1, 1))[..., 1:-1, 1:-2]
    assert not wider.is_contiguous()
    strided = torch.stack([weight, bias], dim=1)
    leaves = [wider, beta, strided[:, 0], strided[:, 1]]
    found = run(lambda *v: mix_norm_relu(*v, backend=which).mean(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@both
def test_mix_keeps_a_small_variance_on_a_large_mean(which, small_tiles):
    leaves = make_layer(16, 2, 9, dtype=torch.float32)
    leaves[0] = leaves[0] + 3e4
    wanted = mix_by_hand(*leaves, relu=False)
    assert spread(mix_norm_relu(*leaves, relu=False, backend=which), wanted) < 5e-3


@both
def test_mix_does_not_hide_damage(which):
    leaves = make_layer(4, 3, 2)
    leaves[0][0, 1, 0] = math.nan
    y = mix_norm_relu(*leaves, backend=which)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


@both
def test_mix_repeats_to_the_bit(which, small_tiles):
    leaves = make_layer(6, 5, 4, 3, dtype=torch.float32)
    pair = [run(lambda *v: mix_norm_relu(*v, backend=which), leaves) for _ in "ab"]
    assert all(map(torch.equal, *pair))


def check_plain(which: str, seed: int, beta: float) -> None:
    x, _, weight, bias = make_layer(6, 3, 2, 2, seed=seed)
    half = draw(3, 3, 2, 2, seed=seed + 5)
    x = x if beta == 1 else torch.cat([half, half])
    share = torch.full_like(weight, beta).requires_grad_()
    y = mix_norm_relu(x, share, weight, bias, backend=which)
    plain = F.batch_norm(x, None, None, weight, bias, training=True).relu()
    torch.testing.assert_close(y, plain, rtol=1e-7, atol=1e-7)
    if beta != 1:
        y.square().sum().backward()
        assert share.grad.abs().max() == 0


@few
@given(seeds)
def test_mix_of_real_alone_is_plain_batchnorm(seed):
    check_plain("torch", seed, 1.0)


@few
@given(seeds, st.floats(0.0, 0.99))
def test_mix_with_itself_changes_nothing(seed, beta):
    check_plain("torch", seed, beta)


@NO_TRITON
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_mix_properties_hold_in_triton(beta):
    check_plain("triton", 3, beta)


@few
@given(seeds, st.floats(0.1, 50.0), st.floats(-20.0, 20.0))
def test_mix_ignores_scale_and_shift_of_its_input(seed, scale, shift):
    x, beta, weight, bias = make_layer(6, 3, 2, seed=seed)
    plain = mix_norm_relu(x, beta, weight, bias, eps=0.0)
    moved = mix_norm_relu(scale * x + shift, beta, weight, bias, eps=0.0)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(3, 2, 4)}, "half the batch must be knockoffs, got 3"),
        ({"x": torch.zeros(0, 2, 4)}, "2 or more values a channel"),
        ({"x": torch.zeros(4, 2, 0)}, "2 or more values a channel"),
        ({"x": torch.zeros(4)}, "must be floating point"),
        ({"x": torch.zeros(4, 2, dtype=torch.long)}, "must be floating point"),
        ({"beta": torch.ones(3)}, r"beta must be \[2\], got \[3\]"),
        ({"weight": torch.ones(1)}, r"weight must be \[2\]"),
        ({"bias": torch.ones(2, 1)}, r"bias must be \[2\]"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_mix_refuses_bad_input(change, reason):
    fine = {"x": torch.zeros(4, 2, 4), "beta": torch.ones(2), "weight": None}
    with pytest.raises(ValueError, match=reason):
        mix_norm_relu(**{**fine, "bias": None, **change})


# -- mmd2 ------------------------------------------------------------------------------

WIDTHS = (0.5, 1.0, 3.0)


@both
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (9, 20, 3)], ids=str)
def test_mmd2_is_the_double_loop(which, unbiased, sizes, small_tiles):
    n, m, d = sizes
    x, y = draw(n, d), 1.5 * draw(m, d, seed=1) + 0.5
    found = mmd2(x, y, WIDTHS, unbiased=unbiased, backend=which)
    assert found.shape == () and found.dtype == torch.float64
    wanted = mmd2_by_loops(x, y, WIDTHS, unbiased)
    assert found.item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@both
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("sizes", [(16, 32, 16), (17, 33, 5), (40, 15, 19)], ids=str)
def test_mmd2_across_tile_borders(which, unbiased, sizes, small_tiles):
    n, m, d = sizes
    samples = [draw(n, d), 1.5 * draw(m, d, seed=1)]
    wanted = run(lambda x, y: mmd2_whole(x, y, WIDTHS, unbiased), samples)
    found = run(
        lambda x, y: mmd2(x, y, WIDTHS, unbiased=unbiased, backend=which), samples
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
def test_mmd2_in_low_precision(which, dtype, error):
    samples = [draw(70, 40, dtype=dtype), (1.5 * draw(33, 40, seed=1)).to(dtype)]
    wanted = run(lambda x, y: mmd2_whole(x, y, (4.0, 8.0), True), samples)
    found = run(lambda x, y: mmd2(x, y, (4.0, 8.0), backend=which), samples)
    assert [v.dtype for v in found] == [torch.float32, dtype, dtype]
    assert max(map(spread, found, wanted)) < error


@both
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("needed", [(0, 1), (0,), (1,)], ids=str)
def test_mmd2_gradients(which, unbiased, needed):
    samples = [draw(4, 3), draw(5, 3, seed=1)]
    for k in needed:
        samples[k].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: mmd2(x, y, WIDTHS, unbiased=unbiased, backend=which),
        samples,
        fast_mode=which == "triton",
    )


@both
def test_mmd2_loses_nothing_far_from_zero(which):
    x, y = draw(20, 4, dtype=torch.float32), 1.3 * draw(20, 4, seed=1).float()
    near = mmd2(x, y, (1.0, 2.0), backend=which)
    far = mmd2(x + 1000, y + 1000, (1.0, 2.0), backend=which)
    assert far.item() == pytest.approx(near.item(), abs=1e-4)


@few
@given(seeds, st.integers(2, 40), st.integers(2, 40), st.booleans())
def test_mmd2_is_symmetric_and_ignores_order_and_place(seed, n, m, unbiased):
    x, y = draw(n, 3, seed=seed), draw(m, 3, seed=seed + 1) + 0.3
    plain = mmd2(x, y, WIDTHS, unbiased=unbiased)
    turned = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    for a, b in ((y, x), (turned, y), (x + 5, y + 5)):
        torch.testing.assert_close(
            mmd2(a, b, WIDTHS, unbiased=unbiased), plain, rtol=1e-8, atol=1e-12
        )


@few
@given(seeds, st.integers(1, 40))
def test_mmd2_of_identical_samples(seed, n):
    x = draw(n, 3, seed=seed)
    assert abs(mmd2(x, x, WIDTHS, unbiased=False).item()) < 1e-12
    y = draw(n, 3, seed=seed + 1)
    assert mmd2(x, y, WIDTHS, unbiased=False) > -1e-12


def test_mmd2_sums_over_bandwidths():
    x, y = draw(9, 3), draw(8, 3, seed=1) + 1
    parts = sum(mmd2(x, y, (width,)) for width in WIDTHS)
    torch.testing.assert_close(mmd2(x, y, WIDTHS), parts)


def test_unbiased_mmd2_is_zero_on_average_under_the_null():
    found = torch.stack(
        [mmd2(draw(15, 2, seed=2 * k), draw(20, 2, seed=2 * k + 1), (1.0,))
         for k in range(300)]
    )  # fmt: skip
    assert found.mean().abs() < 4 * found.std() / math.sqrt(len(found))
    assert found.min() < 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(4)}, r"must be \[n, d\] and \[m, d\]"),
        ({"x": torch.zeros(4, 3)}, r"got \[4, 3\] and \[4, 2\]"),
        ({"x": torch.zeros(1, 2)}, "2 or more rows, got 1 and 4"),
        ({"x": torch.zeros(0, 2), "unbiased": False}, "1 or more rows"),
        ({"x": torch.zeros(4, 2).double()}, "must share"),
        ({"bandwidths": ()}, "positive numbers"),
        ({"bandwidths": (1.0, 0.0)}, "positive numbers"),
        ({"bandwidths": (math.nan,)}, "positive numbers"),
        ({"backend": "numpy"}, "backend must be"),
    ],
)
def test_mmd2_refuses_bad_input(change, reason):
    fine = {"x": torch.zeros(4, 2), "y": torch.zeros(4, 2), "bandwidths": (1.0,)}
    with pytest.raises(ValueError, match=reason):
        mmd2(**{**fine, **change})


# -- memory ----------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Storages that operations return, with their sizes in elements."""

    def __init__(self):
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.kept += [v for v in tree_leaves(found) if isinstance(v, torch.Tensor)]
        return found

    def sizes(self, *known: torch.Tensor) -> list[int]:
        """float64 numbers in each distinct storage but those of known tensors."""
        seen = {v.untyped_storage().data_ptr() for v in known}
        sizes = {}
        for v in self.kept:
            place = v.untyped_storage().data_ptr()
            if place not in seen:
                sizes[place] = v.untyped_storage().nbytes() // 8
        return sorted(sizes.values(), reverse=True)


@both
def test_mmd2_holds_a_strip_of_the_matrix_at_most(which, small_tiles):
    x, y = draw(40, 2).requires_grad_(), draw(30, 2, seed=1).requires_grad_()
    with Allocations() as seen:
        torch.autograd.grad(mmd2(x, y, WIDTHS, backend=which), (x, y))
    assert 70 < seen.sizes(x, y)[0] <= 16 * 70 < 70**2


@NO_TRITON
def test_mix_in_triton_stores_only_its_results():
    x, *vectors = make_layer(8, 2, 4, 5)
    x, grad = to_last(x).requires_grad_(), to_last(draw(8, 2, 4, 5))
    with Allocations() as seen:
        y = mix_norm_relu(x, *vectors, backend="triton")
        torch.autograd.grad(y, x, grad)
    large = [n for n in seen.sizes(x, grad) if n >= x.numel() // 2]
    assert large == [x.numel()] * 2  # y and its gradient to x


# -- which implementation runs ---------------------------------------------------------


def test_backend_follows_the_device():
    assert backend(torch.zeros(1)) == "torch"
    if DEVICE == "cuda":
        wanted = "triton" if dispatch.has_triton() else "torch"
        assert backend(torch.zeros(1, device="cuda")) == wanted


def test_triton_is_never_replaced_silently(monkeypatch):
    x = torch.zeros(4, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    with pytest.raises(ValueError, match="needs a tensor on a GPU, got one on cpu"):
        mmd2(x, x, (1.0,), backend="triton")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        mix_norm_relu(x, torch.ones(2), None, None, backend="triton")


def test_kernels_import_and_run_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from lib import kernels\n"
        "x = torch.randn(4, 2)\n"
        "kernels.mix_norm_relu(x, torch.ones(2), None, None)\n"
        "kernels.mmd2(x, x, (1.0,))\n"
        "assert not [m for m in sys.modules if m.endswith(('mix_triton', 'd_triton'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from lib.kernels import dispatch, mix_norm_relu, mmd2

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0

compiled, run = set(), jit.JITFunction.run

def compile_only(self, *args, warmup, **rest):
    kernel = run(self, *args, warmup=True, **rest)
    if kernel is not None:  # helpers are compiled within their callers
        compiled.add(self.fn.__name__)
    return kernel

driver.set_active(Hopper())
jit.JITFunction.run = compile_only
dispatch.is_interpreting = lambda: True
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(4, 8, 4, 4).bfloat16().contiguous(memory_format=layout)
    beta = torch.rand(8, requires_grad=True)
    y = mix_norm_relu(x.requires_grad_(), beta, beta, None, backend="triton")
    y.sum().backward()
a, b = (torch.randn(40, 8, requires_grad=True) for _ in "ab")
mmd2(a, b, (1.0, 2.0), backend="triton").backward()
assert len(compiled) == 5, compiled
"""


@NO_TRITON
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on this GPU")
def test_kernels_compile_for_a_gpu(monkeypatch):
    # the interpreter takes programs that the compiler refuses
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=600)
