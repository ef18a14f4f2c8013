"""Plans and compiled kernels are for classes of sizes: a new number of tokens makes none."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from triton.runtime import JITFunction

from halo_tensor import halo_config, hot_config, quantize_
from halo_tensor.fences import triton_launch
from halo_tensor.fences.fast_paths import LAUNCHER
from halo_tensor.kernels import launch as launching
from halo_tensor.kernels import rotate as rotating
from halo_tensor.kernels.launch import Launch, SizedLaunch
from halo_tensor.kernels.matmul import cublas, few_rows, request, sm80, sm90, tma
from halo_tensor.kernels.matmul import plan as product
from halo_tensor.kernels.quantize import kernels, tiles, two_gradients, two_operands, whole_rows
from halo_tensor.kernels.quantize import plan as quantizer
from halo_tensor.kernels.stand_ins import StandIn
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from tests.helpers import interpreter
from tests.helpers.errors import relative_error
from tests.helpers.interpreter import INTERPRETED

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
H, LOW = Rotation(128), Rotation(16, None, 8)
PLANS = (
    rotating.plan_transpose, rotating.plan_rotate, whole_rows.plan_whole_rows, tiles.plan_tiles, product.plan,
    two_gradients.plan_pairs, two_operands.plan_operands,
)  # fmt: skip


def lengths(most: int, count: int) -> list[int]:
    """1, 2, 3, 4, 6, 8 and so on, with their neighbours, then whatever comes, half of them multiples of 16."""
    edges = sorted(step << i for i in range(most.bit_length()) for step in (1, 3))
    draw = random.Random(0)
    others = [draw.randint(1, most) // step * step or step for step in (1, 16) for _ in range(count)]
    return [n for edge in edges for n in (edge, edge + 1, edge + 16, edge + 20) if n <= most] + others


def forget() -> None:
    for plan in PLANS:
        plan.cache_clear()


def planned() -> int:
    return sum(plan.cache_info().misses for plan in PLANS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What is left of a step, without its kernels, is too little to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=4)


# Whole layers, of which nothing but the arithmetic of kernels is left out.


@pytest.mark.skipif(not INTERPRETED, reason="see test_in_the_interpreter")
@pytest.mark.parametrize(
    "config",
    [halo_config(1, "int8"), halo_config(2, "int8"), halo_config(0, "fp8"), halo_config(1, "fp6"), hot_config()],
    ids=["HALO-1 int8", "HALO-2 int8", "HALO-0 fp8", "HALO-1 fp6", "HOT"],
)
def test_no_length_is_planned_for(monkeypatch, config):
    made, launched = [], []
    make = Launch.__init__
    monkeypatch.setattr(Launch, "__init__", lambda self, *args: (made.append(args), make(self, *args))[1])

    def call(self, sizes, first, *tensors):
        if isinstance(first, StandIn):
            return first.record(SizedLaunch(self, sizes), (first, *tensors))
        launched.append(sizes)

    monkeypatch.setattr(Launch, "__call__", call)
    layer = nn.Sequential(nn.Linear(128, 144))
    quantize_(layer, config)
    forget()

    def step(tokens: int) -> None:
        layer(torch.zeros(tokens, 128, requires_grad=True)).sum().backward()

    for tokens in lengths(2100, 0):
        step(tokens)
    before, launches = (len(made), planned()), len(launched)
    assert 6 <= before[0] < 40 and 3 <= before[1] < 20, "is it the kernels that run?"
    for tokens in lengths(2100, 100)[-200:]:
        step(tokens)
    assert (len(made), planned()) == before
    assert len(launched) - launches >= 200 * 6 and len({sizes.integers for sizes in launched}) > 200


# What is compiled, as on a GPU of SM 9.0 with few multiprocessors, whose driver is a stand-in.


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that are compiled, and the calls of those that are."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter compiles nothing")
    kernels, launches = [], []

    class Compiled:
        metadata = SimpleNamespace(shared=0)

        def __getitem__(self, grid):
            return lambda *arguments, stream: launches.append(grid)

    def warmup(self, *arguments, grid, **options):
        kernels.append((self.fn.__name__, [a for a in arguments if isinstance(a, int)]))
        return Compiled()

    monkeypatch.setattr(JITFunction, "warmup", warmup)
    monkeypatch.setattr(LAUNCHER, "disabled", True)
    monkeypatch.setattr(launching, "current_device", lambda: -1)
    monkeypatch.setattr(launching, "current_raw_stream", lambda index: 0)
    monkeypatch.setattr(triton_launch, "shared_memory", lambda index: 227 * 1024)
    for module in (tiles, product, cublas, sm90):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    for module in (request, product, few_rows, tma, sm90):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(cublas, "_multiplies", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: launches.append("vendor"))
    forget()
    yield kernels, launches
    forget()


def codes_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype).new_empty_strided((rows, columns), ((columns + 15) // 16 * 16, 1))


def step(m: int, format=INT8, right=H, k: int = 256, n: int = 512) -> None:
    """What a layer of in_features ``k`` and out_features ``n`` launches for ``m`` tokens."""
    dtype = torch.int8 if format is INT8 else FP8
    x, e, w, w_t = torch.empty(m, k, dtype=BF16), torch.empty(m, n, dtype=BF16), codes_of(n, k, dtype), codes_of(k, n, dtype)
    of_w = torch.empty(n)
    codes, codes_t, scales = quantizer.rotate_quantize(x, None, right, format, "row", None, None, True, True)
    product.scaled_mm(codes, w, scales, of_w, None, None, None, (m, n), BF16)
    pair = quantizer.quantize_pair(e, None, format, of_w, scales)
    product.scaled_mm(pair[0], w_t, pair[2], None, None, None, right, (m, k), BF16)
    product.scaled_mm(pair[1], codes_t, pair[3], None, None, None, right, (n, k), BF16)


def low_rank(m: int) -> None:
    """HOT's X and its E, rotated along tokens and along features."""
    x, w = torch.empty(m, 256, dtype=BF16), codes_of(256, 256, torch.int8)
    quantizer.rotate_quantize(x, LOW, None, INT8, "tensor", None, None, False, True)
    codes, _, scale = quantizer.rotate_quantize(x, None, Rotation(16), INT8, "tensor", None, None, True, False)
    product.scaled_mm(codes, w, scale, scale, None, Rotation(16), Rotation(16), (m // 16 * 16, 256), BF16)


STEPS = [step, lambda m: step(m, FP8_E4M3), lambda m: step(m, FP8_E4M3, None), lambda m: step(m, k=100, n=104), low_rank]


@pytest.mark.parametrize("launch", STEPS, ids=["int8", "fp8", "fp8, not rotated", "narrow", "low rank"])
def test_no_length_is_compiled_for(compiled, launch):
    kernels, launches = compiled
    for tokens in lengths(4096, 0):
        launch(max(tokens, 16) if launch is low_rank else tokens)
    before, visited = len(kernels), len(launches)
    assert 14 <= before < 35 and visited > 100
    for tokens in lengths(4096, 100)[-200:]:
        launch(max(tokens, 16) if launch is low_rank else tokens)
    assert kernels[before:] == [] and len(launches) - visited >= 200 * 5
    # A length of 1 is no constant: what Triton is shown is another odd number.
    assert not [name for name, integers in kernels if 1 in integers[:2]]


def test_classes_that_differ_in_nothing_share_a_launch(compiled):
    planned = product.plan(torch.device("cpu"), FP8, FP8, 512, 2, 0, False, None, None, H, BF16)
    variants = [planned.variant((m, 256, m, 256, 256)) for m in (8, 30, 64, 65, 128, 300, 512, 4096)]
    classes = {request.size_class(m, 512, 8) for m in (8, 30, 64, 65, 128, 300, 512, 4096)}
    assert len(planned.variants) == len(classes) > len({id(variant.launch) for variant in variants}) > 1


def test_the_vendors_product_is_for_its_sizes_only(compiled):
    _, launches = compiled
    for m, k, stride in ((65536, 1024, 1024), (65536, 1024, 1040), (64, 1024, 1024), (65536, 1040, 1040)):
        launches.clear()
        a, b = torch.empty(0, dtype=FP8).new_empty_strided((m, k), (stride, 1)), torch.empty(512, k, dtype=FP8)
        product.scaled_mm(a, b, torch.empty(m), torch.empty(512), None, None, None, (m, 512), BF16)
        assert launches == ["vendor"] if stride == k and m > 64 else "vendor" not in launches


# What a compiled kernel knows of integers.


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing")
@pytest.mark.parametrize(
    "kernel", [kernels.whole_rows, kernels.cast_tiles, kernels.transpose_codes, few_rows.few_rows_kernel, tma.scaled_mm_kernel, sm80.mma_kernel, sm90.wgmma_kernel],
    ids=lambda kernel: kernel.fn.__name__,
)  # fmt: skip
def test_integers_of_one_kind_compile_to_one_kernel(kernel):
    """By Triton's own rules, but that a size of 1 is an odd number."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    parameters = [p for p in kernel.params if not p.is_constexpr and (p.name.isupper() or p.name.startswith("stride"))]
    assert {"M", "K"} <= {p.name for p in parameters}
    for parameter in parameters:
        known = {}
        for n in (1, 2, 15, 16, 17, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1):
            shown = 17 if n == 1 and parameter.name.isupper() else n
            unspecialised = parameter.do_not_specialize, parameter.do_not_specialize_on_alignment
            theirs = native_specialize_impl(CUDABackend, shown, False, *(not flag for flag in unspecialised))
            assert known.setdefault(launching._kind(n, parameter), theirs) == theirs, (parameter.name, n)
        assert len(known) >= 2


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "bound"), [(halo_config(1, "int8"), 1e-3), (halo_config(0, "fp8"), 5e-3)], ids=["int8", "fp8"]
)
def test_lengths_on_a_gpu(monkeypatch, config, bound):
    """The same without stand-ins: Triton compiles nothing, looks nothing up, and results are those of the first visit.

    The units of fp8 sum in fewer bits than float32, so backends that sum in another order round some outputs otherwise.
    """
    made, looked_up = [], []
    make, warmup = Launch.__init__, JITFunction.warmup
    monkeypatch.setattr(Launch, "__init__", lambda self, *args: (made.append(args), make(self, *args))[1])
    monkeypatch.setattr(
        JITFunction, "warmup", lambda self, *args, **kwargs: (looked_up.append(self), warmup(self, *args, **kwargs))[1]
    )
    layer = nn.Sequential(nn.Linear(1024, 2048, device="cuda", dtype=BF16))
    quantize_(layer, config)
    everything = torch.randn(8192, 1024, device="cuda", dtype=BF16)
    forget()

    def results(tokens: int) -> list[torch.Tensor]:
        x = everything[:tokens].detach().requires_grad_()
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, layer[0].weight], everything[:tokens].repeat(1, 2))]

    whole = results(8192)
    for tokens in lengths(8192, 0):
        results(tokens)
    before = len(made), len(looked_up)
    for tokens in lengths(8192, 100)[-200:]:
        y, e_x, _ = results(tokens)
        assert relative_error(y, whole[0][:tokens]) < bound and relative_error(e_x, whole[1][:tokens]) < 2e-2
    assert (len(made), len(looked_up)) == before
