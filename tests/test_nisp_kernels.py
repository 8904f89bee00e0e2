"""NISP's kernels: absolute weights and tied ranks against direct formulas and SciPy.

Without a GPU the Triton kernels run through Triton's interpreter.
"""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, NO_TRITON, both, interpreter  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.kernels import abs_matmul, absolute, centre_ranks, dispatch, ranks
from lib.nisp import propagate, rules

floats = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, splits and programs for shapes that are quick to interpret."""
    monkeypatch.setattr(absolute, "TILE", 64)
    monkeypatch.setattr(ranks, "TILE", 64)
    monkeypatch.setattr(ranks, "TILE_ON_GPU", 64)
    if dispatch.has_triton():
        from lib.kernels import absolute_triton, ranks_triton

        monkeypatch.setattr(absolute_triton, "COLUMNS", 16)
        monkeypatch.setattr(absolute_triton, "DEPTH", 16)
        monkeypatch.setattr(absolute_triton, "PROGRAMS", 6)
        monkeypatch.setattr(ranks_triton, "BLOCK", 16)


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return numbers.to(dtype).to(DEVICE)


class Allocations(TorchDispatchMode):
    """Results of operations, kept alive so that no storage is counted twice."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.kept: list[torch.Tensor] = []
        self.known = {v.untyped_storage().data_ptr() for v in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.kept += [v for v in tree_leaves(found) if isinstance(v, torch.Tensor)]
        return found

    def bytes(self) -> dict[int, int]:
        """Size of each storage that was not there before, by its place."""
        storages = [v.untyped_storage() for v in self.kept]
        sizes = {s.data_ptr(): s.nbytes() for s in storages}
        return {k: size for k, size in sizes.items() if k not in self.known}


# -- abs_matmul ------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 70, 33), (1, 33, 1), (1, 1, 40), (5, 17, 18), (17, 40, 1),
          (3, 1, 19), (20, 65, 50)]  # fmt: skip


def check_product(s, weight, found, error=1e-14):
    """Against the plain product, relative to the sum of all absolute terms."""
    s, wanted = s.double(), s.double() @ weight.double().abs()
    scale = s.abs() @ weight.double().abs()
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= error * scale).all()


@both
@floats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_plain_one(which, dtype, shape, small_tiles):
    count, depth, width = shape
    s, weight = draw(count, depth), draw(depth, width, seed=1, dtype=dtype)
    found = abs_matmul(s, weight, backend=which)
    assert found.dtype == torch.float64 and found.device == s.device
    check_product(s, weight, found)


@both
@pytest.mark.parametrize("count", [1, 3])
def test_product_with_default_tiles(which, count):
    s, weight = draw(count, 700), draw(700, 300, seed=1, dtype=torch.float32)
    check_product(s, weight, abs_matmul(s, weight, backend=which))


@both
@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 3, 9), (2, 1, 3, 9)], ids=str)
def test_product_keeps_batch_dimensions(which, shape, small_tiles):
    s, weight = draw(*shape), draw(9, 20, seed=1)
    found = abs_matmul(s, weight, backend=which)
    assert found.shape == (*shape[:-1], 20)
    check_product(s, weight, found)


@both
@pytest.mark.parametrize("count", [1, 4])
def test_product_takes_views_and_writes_nothing(which, count, small_tiles):
    base, weights = draw(2 * count, 80, seed=2), draw(60, 82, seed=3)
    s, weight = base[::2, ::2], weights[3:43, 1::2]
    before = base.clone(), weights.clone()
    check_product(s, weight, abs_matmul(s, weight, backend=which))
    turned = weight.T.contiguous().T
    check_product(s, turned, abs_matmul(s, turned, backend=which))
    one = s[:1].expand(5, -1)
    check_product(one, weight, abs_matmul(one, weight, backend=which))
    assert torch.equal(base, before[0]) and torch.equal(weights, before[1])


@both
@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
def test_product_of_nothing(which, shape):
    count, depth, width = shape
    found = abs_matmul(draw(count, depth), draw(depth, width), backend=which)
    assert torch.equal(found, torch.zeros(count, width).double().to(DEVICE))


@both
@pytest.mark.parametrize("count", [1, 2])
def test_product_sums_in_float64_and_rounds_once(which, count, small_tiles):
    s = torch.ones(count, 600, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((600, 3), -0.01, dtype=torch.bfloat16, device=DEVICE)
    found = abs_matmul(s, weight, backend=which)
    wanted = (600 * weight.double().abs()[0]).bfloat16().expand(count, 3)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


@both
def test_product_repeats_to_the_bit_and_is_outside_autograd(which, small_tiles):
    s = draw(1, 90).requires_grad_()
    weight = nn.Parameter(draw(90, 30, seed=1, dtype=torch.float32))
    pair = [abs_matmul(s, weight, backend=which) for _ in "ab"]
    assert torch.equal(*pair) and not pair[0].requires_grad


@both
def test_product_does_not_hide_damage(which):
    weight = draw(6, 5)
    weight[2, 3] = float("nan")
    found = abs_matmul(draw(1, 6), weight, backend=which)
    assert found.isnan().tolist() == [[False, False, False, True, False]]


def check_laws(which, seed, count, depth, width):
    s, weight = draw(count, depth, seed=seed), draw(depth, width, seed=seed + 1)
    found = abs_matmul(s, weight, backend=which)
    check_product(s, weight, found)
    assert torch.equal(abs_matmul(s, -weight, backend=which), found)
    assert torch.equal(abs_matmul(-s, weight, backend=which), -found)
    assert torch.equal(abs_matmul(4 * s, weight / 2, backend=which), 2 * found)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_product_ignores_signs_and_follows_scale(seed, count, depth, width):
    check_laws("torch", seed, count, depth, width)


@NO_TRITON
@pytest.mark.parametrize("count", [1, 3])
def test_product_laws_hold_in_triton(count, small_tiles):
    check_laws("triton", 3, count, 37, 21)


@both
@pytest.mark.parametrize("count", [1, 2])
def test_absolute_weights_are_never_whole(which, count, small_tiles):
    s, weight = draw(count, 120), draw(120, 110, seed=1, dtype=torch.bfloat16)
    with Allocations(s, weight) as seen:
        found = abs_matmul(s, weight, backend=which)
    sizes = seen.bytes()
    assert max(sizes.values()) <= 6 * found.nbytes < weight.nbytes
    assert sum(sizes.values()) < weight.nbytes


def test_linear_layers_go_through_the_kernel(monkeypatch):
    seen = []

    def watch(s, weight):
        seen.append(weight)
        return abs_matmul(s, weight)

    monkeypatch.setattr(rules, "abs_matmul", watch)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 12),
                        nn.ReLU(), nn.Linear(12, 3)).eval()  # fmt: skip
    scores = torch.rand(12, dtype=torch.float64)
    found = propagate(net, scores, (2, 2, 2))["1"]
    wanted = scores @ net[3].weight.detach().double().abs()
    assert any(weight is net[3].weight for weight in seen)
    factor = (found.sum() / wanted.sum()).item()  # of the common scale
    torch.testing.assert_close(found, factor * wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s": torch.zeros(2, 4)}, r"s \[..., O\] and weight \[O, I\], got \[2, 4\]"),
        ({"s": torch.tensor(1.0)}, r"got \[\] and \[3, 5\]"),
        ({"weight": torch.zeros(3)}, r"got \[2, 3\] and \[3\]"),
        ({"weight": torch.zeros(3, 5, 1)}, r"and \[3, 5, 1\]"),
        ({"s": torch.zeros(2, 3).long()}, "floating point, got torch.int64 and"),
        ({"weight": torch.zeros(3, 5).cfloat()}, "and torch.complex64"),
        ({"s": torch.zeros(2, 3, device="meta")}, "s is on meta, but weight on cpu"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_product_refuses_bad_input(change, reason):
    fine = {"s": torch.zeros(2, 3), "weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=reason):
        abs_matmul(**{**fine, **change})


# -- centre_ranks ----------------------------------------------------------------------


def rank_by_scipy(x: torch.Tensor) -> np.ndarray:
    """[D, N]"""
    return 2 * scipy.stats.rankdata(x.double().cpu(), axis=0).T - (len(x) + 1)


def check_ranks(x, which, dtype=torch.float32):
    before = x.clone()
    found = centre_ranks(x, backend=which)
    assert found.dtype == dtype and found.is_contiguous()
    assert found.device == x.device
    np.testing.assert_array_equal(found.cpu(), rank_by_scipy(x))
    assert torch.equal(x, before)


KINDS = {
    "normal": lambda x: x,
    "rectified": lambda x: x.relu(),
    "few values": lambda x: x.mul(2).round(),
    "two values": lambda x: (x > 0).to(x),  # rows that end alike share a tile
    "tied at the top": lambda x: x.clamp_max(0),
    "some columns tied": lambda x: x * (torch.arange(x.shape[1]) % 2).to(x),
    "all tied": lambda x: torch.full_like(x, -1.5),
    "negative zeros": lambda x: x.sign() * 0.0,
    "zeros of both signs": lambda x: torch.where(x > 1, x, x.sign() * 0.0),
    "rising": lambda x: torch.arange(x.numel()).to(x).view(x.shape),
    "falling": lambda x: -torch.arange(x.numel()).to(x).view(x.shape),
}


@both
@floats
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (11, 5), (33, 3), (70, 1)], ids=str)
def test_ranks_are_scipys(which, dtype, kind, shape, small_tiles):
    check_ranks(KINDS[kind](draw(*shape)).to(dtype), which)


@both
def test_ranks_with_default_tiles(which):
    check_ranks(draw(700, 3, dtype=torch.float32).relu(), which)


@both
@pytest.mark.parametrize("wide", [False, True])
def test_ranks_of_extreme_numbers(which, wide):
    inf, tiny, top = float("inf"), 1e-45, 3.4e38
    row = [0.0, tiny, -tiny, top, -top, inf, -inf, -0.0, 1.0, -inf, top, -1.0, inf]
    x = torch.tensor(row, dtype=torch.float64 if wide else torch.float32)
    if wide:  # apart in float64 only
        x = torch.cat([x, torch.tensor([1 + 1e-15, 1e300, -1e-300]).to(x)])
        x[-3:] = torch.tensor([1 + 1e-15, 1e300, -1e-300], dtype=torch.float64)
    x = torch.stack([x, -x, x.flip(0)], 1).to(DEVICE)
    check_ranks(x, which)


@both
def test_ranks_of_views(which, small_tiles):
    x = draw(20, 12, dtype=torch.float32).relu()
    for view in (x[::2, 1::3], x.T, x.T.contiguous().T, x[:, :1].expand(-1, 3)):
        check_ranks(view, which)


@both
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_ranks_of_nothing(which, shape):
    found = centre_ranks(torch.zeros(shape, device=DEVICE), backend=which)
    assert found.shape == shape[::-1]


@both
def test_ranks_beyond_float32_are_float64(which, monkeypatch):
    x = draw(21, 4).round()
    monkeypatch.setattr(ranks, "EXACT_FLOAT32", 20)
    check_ranks(x, which, torch.float64)
    check_ranks(x[:20], which)


def test_ranks_are_exact_up_to_the_last_sample_of_float32():
    order = torch.randperm(2**23, generator=torch.Generator().manual_seed(0))
    order[order == 2**23 - 2] = 2**23 - 1  # the top two tie
    found = centre_ranks(order[:, None].float())[0]
    wanted = 2 * order.double() + 1 - 2**23
    wanted[order == 2**23 - 1] = 2**23 - 2
    assert found.dtype == torch.float32 and torch.equal(found.double(), wanted)


@both
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(which, threads, small_tiles):
    x = draw(30, 7, dtype=torch.float32).relu()
    try:
        torch.set_num_threads(threads)
        check_ranks(x, which)
        check_ranks(x.double() / 3, which)
    finally:
        torch.set_num_threads(1)


columns = st.lists(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.5, 2.0, 1e-40, -3e38]), min_size=3,
             max_size=3),
    min_size=1, max_size=12,
)  # fmt: skip


@few
@given(columns, st.booleans(), st.integers(1, 40))
def test_tied_ranks_are_scipys_whatever_the_tile(rows, wide, tile):
    x = torch.tensor(rows, dtype=torch.float64).float().to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "TILE", tile)
        check_ranks(x.double() * 1.1 if wide else x, "torch")


@few
@given(seeds, st.integers(1, 60), st.integers(1, 4))
def test_ranks_sum_to_zero_and_follow_their_samples(seed, n, d):
    x = draw(n, d, seed=seed).mul(3).round()
    found = centre_ranks(x)
    assert (found.sum(1) == 0).all() and (found.abs() < n).all()
    assert torch.equal(centre_ranks(-x), -found)
    assert torch.equal(centre_ranks(x.exp()), found)
    moved = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    assert torch.equal(centre_ranks(x[moved]), found[:, moved])


@NO_TRITON
@settings(max_examples=10, deadline=None)
@given(columns)
def test_tied_ranks_hold_in_triton(rows):
    check_ranks(torch.tensor(rows, dtype=torch.float32, device=DEVICE), "triton")


@NO_TRITON
def test_triton_ranks_neither_count_nor_wait():
    x = draw(50, 6, dtype=torch.float32).relu()

    class Names(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen = (*self.seen, function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    from lib.kernels.ranks_triton import rank_rows

    rows = x.T.contiguous()
    with Names() as names:
        rank_rows(rows, torch.empty_like(rows))
    assert names.seen.count("sort") == 1
    assert not {"nonzero", "_local_scalar_dense", "unique_consecutive"} & {*names.seen}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": torch.zeros(4)}, r"\[N, D\], got torch.float32 \[4\]"),
        ({"features": torch.zeros(4, 2, 1)}, r"got torch.float32 \[4, 2, 1\]"),
        ({"features": torch.zeros(4, 2).long()}, r"got torch.int64 \[4, 2\]"),
        ({"features": torch.zeros(4, 2).cfloat()}, "got torch.complex64"),
        ({"backend": "numpy"}, "backend must be"),
    ],
)
def test_ranks_refuse_bad_input(change, reason):
    with pytest.raises(ValueError, match=reason):
        centre_ranks(**{"features": torch.zeros(4, 2), **change})


# -- which implementation runs ---------------------------------------------------------


def test_triton_is_never_replaced_silently(monkeypatch):
    x = torch.zeros(4, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    with pytest.raises(ValueError, match="needs a tensor on a GPU, got one on cpu"):
        centre_ranks(x, backend="triton")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        abs_matmul(x, x.T, backend="triton")


@NO_TRITON
def test_triton_is_what_runs(monkeypatch):
    from lib.kernels import absolute_triton, ranks_triton

    monkeypatch.setattr(absolute_triton, "multiply", lambda rows, weight: 7 + 0 * rows)
    x = torch.zeros(2, 2, device=DEVICE)
    assert (abs_matmul(x, x, backend="triton") == 7).all()
    monkeypatch.setattr(ranks_triton, "rank_rows", lambda rows, out: out.fill_(7))
    assert (centre_ranks(x, backend="triton") == 7).all()


def test_kernels_import_and_run_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from lib import kernels\n"
        "x = torch.randn(4, 4)\n"
        "kernels.abs_matmul(x, x); kernels.centre_ranks(x)\n"
        "assert not [m for m in sys.modules if m.endswith('_triton')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit
from lib.kernels import abs_matmul, centre_ranks, dispatch

class Target:
    def get_current_target(self): return GPUTarget("cuda", TARGET, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0

compiled, run = [], jit.JITFunction.run

def compile_only(self, *args, warmup, **rest):
    kernel = run(self, *args, warmup=True, **rest)
    if kernel is not None:  # helpers are compiled within their callers
        assert "cubin" in kernel.asm
        compiled.append(self.fn.__name__)
    return kernel

driver.set_active(Target())
jit.JITFunction.run = compile_only
dispatch.is_interpreting = lambda: True
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for count in (1, 3):
        s, weight = torch.rand(count, 40).double(), torch.randn(40, 50).to(dtype)
        abs_matmul(s, weight, backend="triton")
    centre_ranks(torch.rand(30, 4).to(dtype), backend="triton")
assert compiled.count("_multiply_span") == 6, compiled
assert compiled.count("_scatter_ranks") == 3, compiled
"""


@NO_TRITON
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on this GPU")
@pytest.mark.parametrize("target", [80, 90])
def test_kernels_compile_for_a_gpu(target, monkeypatch):
    # the interpreter takes programs that the compiler refuses
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    code = COMPILE.replace("TARGET", str(target))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
