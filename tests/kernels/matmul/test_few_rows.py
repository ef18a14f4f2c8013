"""The product of at most 64 rows: against the reference and the other backends, and where it is used."""

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from halo_tensor import ops
from halo_tensor.kernels.launch import cdiv
from halo_tensor.kernels.matmul import few_rows, tma
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.quantize import whole_rows
from halo_tensor.recipe import FP6_E3M2, FP8_E4M3, FP8_E5M2, INT8, Rotation
from halo_tensor.reference.codes import aligned
from tests.helpers import interpreter, launches
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import DEVICE, GPU, INTERPRETED, runs_kernels
from tests.helpers.kernel_checks import DTYPES, ROUNDING, codes_of, exact_product, gain_of, scales_of

BF16 = torch.bfloat16


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=8)


@pytest.fixture
def launched(monkeypatch):
    return launches.noted(monkeypatch)


def beside_others(codes: torch.Tensor) -> torch.Tensor:
    """The same codes in rows that go on: with NaN up to a multiple of 16 bytes, or 99."""
    other = float("nan") if codes.is_floating_point() else 99
    wide = torch.full((codes.shape[0], aligned(codes.shape[1]) + 16), other, device=codes.device).to(codes.dtype)
    view = wide[:, : codes.shape[1]]
    view.view(torch.int8).copy_(codes.view(torch.int8))
    return view


@pytest.fixture
def switch_off(monkeypatch):
    with launches.switch(monkeypatch) as switch_off:
        yield switch_off


@runs_kernels
@given(
    m=st.integers(1, 64),
    n=st.sampled_from([1, 16, 40, 72, 129]),
    k=st.one_of(st.integers(1, 100), st.sampled_from([512, 528, 1040, 1100])),
    formats=st.sampled_from([(INT8, INT8), (FP8_E4M3, FP8_E4M3), (FP8_E5M2, FP8_E4M3), (FP6_E3M2, FP6_E3M2)]),
    scales=st.tuples(*[st.sampled_from([None, "one", "vector"])] * 2),
    biased=st.booleans(),
    gained=st.booleans(),
    dtype=DTYPES,
    layouts=st.tuples(*[st.sampled_from(["contiguous", "misaligned", "transposed", "beside others"])] * 2),
)
@example(1, 1, 1, (INT8, INT8), ("vector", "vector"), True, True, torch.float32, ("beside others",) * 2)
@example(64, 129, 1100, (FP8_E4M3, FP8_E4M3), ("vector", "vector"), True, True, BF16, ("beside others",) * 2)
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate], deadline=None)
def test_every_epilogue(m, n, k, formats, scales, biased, gained, dtype, layouts):
    assume(dtype != torch.float16 or None not in scales)  # sums of codes are too large for it
    a, b_t = (
        beside_others(codes_of((rows, k), format)) if layout == "beside others" else codes_of((rows, k), format, layout)
        for rows, format, layout in zip((m, n), formats, layouts, strict=True)
    )
    a_scale, b_scale = scales_of(scales, (m, n), [format.max for format in formats])
    bias = torch.randn(n, device=DEVICE, dtype=dtype) if biased else None
    gain = gain_of(n) if gained else None
    arguments = a, b_t, a_scale, b_scale, bias, None, None, (m, n), dtype, gain
    y = ops.scaled_mm(*arguments)
    exact = exact_product(a, b_t, a_scale, b_scale, bias, gain=gain)
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    # Sums of int8 codes are exact, and those of fp8 in float32, so what is left is the rounding of the result. Triton's
    # interpreter truncates to bf16. fp8 on a GPU of SM 9.0 may keep about 14 bits of a sum.
    rounding = ROUNDING[dtype] * (1 if GPU or dtype != BF16 else 2)
    most = (rounding**2 + (2e-3**2 if GPU and not formats[0].uniform else 0)) ** 0.5
    few = y.numel() < 1000  # a matter of chance
    error = relative_error(y, exact)
    assert error < (3 if few else 1.2) * most + 1e-6
    assert error >= 0.8 * ROUNDING[dtype] or few


@runs_kernels
@pytest.mark.parametrize("m", [1, 7, 16, 17, 32, 33, 64])
def test_integers_as_the_other_backends(launched, switch_off, m):
    """Bit for bit: sums of integers have no order, and the epilogue is the same."""
    n, k = 72, 1100
    a, b_t = beside_others(codes_of((m, k), INT8)), codes_of((n, k), INT8)
    scales = scales_of(("vector", "vector"), (m, n), [127.0, 127.0])
    arguments = a, b_t, *scales, torch.randn(n, device=DEVICE), None, None, (m, n), torch.float32, gain_of(n)
    results = []
    for off in ((), ("few_rows",), ("few_rows", "tma")):
        switch_off(*off)
        results.append(ops.scaled_mm(*arguments))
    assert set(launched) == {"few_rows_kernel", "mma_kernel"} | ({"scaled_mm_kernel"} if tma.has_tma(a.device) else set())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@runs_kernels
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
def test_a_nan_stays_in_its_row(launched, format):
    if format is not INT8 and INTERPRETED:
        pytest.skip("Triton's interpreter makes 384 of a NaN in fp8")
    a, b_t, scale = codes_of((9, 256), format), codes_of((40, 256), format), torch.ones(9, device=DEVICE)
    if format is INT8:
        scale[3] = torch.nan
    else:
        a[3, 100] = torch.nan
    y = ops.scaled_mm(a, b_t, scale, None, None, None, None, (9, 40), BF16)
    assert launched == ["few_rows_kernel"]
    assert y[3].isnan().all() and y.isnan().sum() == 40


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter takes too long")
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
@pytest.mark.parametrize("size", [(16, 1024), (33, 512), (64, 1024), (8, 3072), (64, 4096), (16, 14336)])
def test_real_products(launched, switch_off, size, format):
    """Tiles of every width, as the other backends multiply, and the same in every call."""
    (m, n), k = size, 4096
    a, b_t = codes_of((m, k), format), codes_of((n, k), format)
    arguments = a, b_t, *scales_of(("vector", "vector"), (m, n), [format.max] * 2), None, None, None, (m, n), torch.float32
    y = ops.scaled_mm(*arguments)
    assert set(launched) == {"few_rows_kernel"} and all(torch.equal(ops.scaled_mm(*arguments), y) for _ in range(20))
    switch_off("few_rows")
    other = ops.scaled_mm(*arguments)
    assert torch.equal(y, other) if format is INT8 else relative_error(y, other) < 4e-3
    assert launched[-1] != "few_rows_kernel"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter launches one kernel after the other")
@pytest.mark.parametrize("captured", [False, True])
def test_launches_wait_for_each_other(captured):
    """A program that starts early reads nothing before the kernel ahead of it is done: each product reads the last one."""
    weights = [codes_of((2048, 2048), INT8) for _ in range(12)]
    x, scale = torch.randn(8, 2048, device=DEVICE, dtype=BF16), torch.rand(2048, device=DEVICE) / 2000

    def chain(wait: bool) -> torch.Tensor:
        y = x
        for weight in weights:
            codes, by_row = whole_rows.quantize_rows(y, Rotation(128), INT8, None, None, None)
            y = product.scaled_mm(codes, weight, by_row, scale, None, None, None, (8, 2048), BF16)
            if wait:
                torch.cuda.synchronize()
        return y

    expected = chain(wait=True)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(wait=False)
    for _ in range(50):
        if captured:
            y.zero_()
            graph.replay()
        else:
            y = chain(wait=False)
        assert torch.equal(y, expected) and expected.isfinite().all()


# Where it is used, and its tiles.


@pytest.mark.parametrize(("multiprocessors", "shared"), [(108, 163), (82, 99), (128, 99), (132, 227), (170, 99)])
@pytest.mark.parametrize("by_wgmma", [False, True])
def test_the_tiles(multiprocessors, shared, by_wgmma):
    """They fit, most multiprocessors have one, and enough is on its way to hide the latency of memory."""
    for n in (512, 1024, 2048, 3072, 4096, 6144, 8192, 14336, 128256):
        for few in (16, 32, 64):
            tile = few_rows.tile_for(n, few, by_wgmma, multiprocessors, shared * 1024)
            assert tile.k % (32 * tile.parts) == 0 and tile.stages >= 3
            assert (tile.stages - 1) * (tile.n + few) * tile.k <= shared * 1024
            programs = min(cdiv(n, tile.n), multiprocessors)
            assert programs >= (0.2 if few == 64 or by_wgmma else 0.45) * min(n / 16, multiprocessors)
            assert programs * (tile.stages - 1) * tile.n * tile.k >= 2**20 or n < 1024  # 4.8 TB/s for 200 ns


def kernel_for(m: int, **different) -> tuple[str, int]:
    """The kernel that is planned for ``m`` rows, and the launches that its plan holds."""
    options = {"a": torch.int8, "n": 4096, "row": None, "column": None} | different
    a, n, rotations = options["a"], options["n"], (options["row"], options["column"])
    planned = product.plan(torch.device("cpu"), a, a, n, 2, 2, False, None, *rotations, BF16)
    name = planned.variant((m, 4096, m, 4096, 4096)).launch.kernel.fn.__name__
    return name, len({id(variant.launch) for variant in planned.variants.values()})


@pytest.mark.parametrize("a", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.usefixtures("switch_off")
def test_which_products_it_serves(a):
    """At most 64 rows, by one launch for each of three classes. Another number of rows makes no other launch."""
    served = {m: kernel_for(m, a=a) for m in range(1, 201)}
    assert {m for m, (name, _) in served.items() if name == "few_rows_kernel"} == set(range(1, 65))
    assert {name for m, (name, _) in served.items() if m > 64} == {"scaled_mm_kernel"}
    assert served[64][1] == 3 and served[200][1] <= 5
    for rotations in ({"column": Rotation(128)}, {"row": Rotation(16)}):
        assert {kernel_for(m, a=a, **rotations) for m in (1, 16, 64)} == {("scaled_mm_kernel", 1)}


def test_it_can_be_switched_off(switch_off):
    switch_off("few_rows")
    assert kernel_for(8)[0] == "scaled_mm_kernel"
