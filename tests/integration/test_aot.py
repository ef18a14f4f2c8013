"""Every kernel compiles ahead of time for every generation of GPU, on a machine that has none.

The library's own functions run on fake CUDA tensors right up to the launch. So what compiles here is what a GPU would be given:
the same constants, specialised on the same strides and alignments. Only the driver is a stand-in.
"""

import gc
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from halo_tensor.compiler import kernels_ahead  # noqa: E402
from halo_tensor.fences import gluon, triton_launch  # noqa: E402
from halo_tensor.fences.fast_paths import AHEAD, CUBLAS, GLUON, LAUNCHER, PRECOMPILED, TMA, Refusal  # noqa: E402
from halo_tensor.kernels import ahead, loss_sm90  # noqa: E402
from halo_tensor.kernels import launch as launching  # noqa: E402
from halo_tensor.kernels import loss as loss_kernels  # noqa: E402
from halo_tensor.kernels import rotate as rotating  # noqa: E402
from halo_tensor.kernels.experts import products as grouped  # noqa: E402
from halo_tensor.kernels.experts import quantizers as of_experts  # noqa: E402
from halo_tensor.kernels.experts import rows as moving  # noqa: E402
from halo_tensor.kernels.experts import sm90 as grouped_sm90  # noqa: E402
from halo_tensor.kernels.experts import triton_products  # noqa: E402
from halo_tensor.kernels.launch import Launch  # noqa: E402
from halo_tensor.kernels.matmul import (  # noqa: E402
    cublas,
    epilogue,
    few_rows,
    sm90,
    tma,
)
from halo_tensor.kernels.matmul import plan as product  # noqa: E402
from halo_tensor.kernels.quantize import blocks, dequantize, masks, tiles, two_operands, whole_rows  # noqa: E402
from halo_tensor.kernels.quantize import codes as layout_of_codes  # noqa: E402
from halo_tensor.kernels.quantize import many as requantize  # noqa: E402
from halo_tensor.kernels.quantize import packing as packing_kernels  # noqa: E402
from halo_tensor.kernels.quantize import plan as quantizer  # noqa: E402
from halo_tensor.kernels.quantize import two_gradients as two  # noqa: E402
from halo_tensor.kernels.quantize.fast_math import fast_exp, libdevice, reciprocal, tanh  # noqa: E402
from halo_tensor.recipe import FP6_E2M3, FP8_E4M3, FP8_E5M2, INT8, Gate, Rotation  # noqa: E402
from halo_tensor.reference import experts as reference_of_experts  # noqa: E402
from halo_tensor.reference import ops as reference  # noqa: E402
from halo_tensor.reference.codes import aligned  # noqa: E402
from halo_tensor.reference.loss import Objective  # noqa: E402

#: compute capability -> (bytes of shared memory that a program may have, multiprocessors)
GPUS = {
    80: (163 * 1024, 108),
    86: (99 * 1024, 82),
    89: (99 * 1024, 128),
    90: (227 * 1024, 132),
    100: (227 * 1024, 148),
    120: (99 * 1024, 170),
}
BF16, FP32 = torch.bfloat16, torch.float32
OLD = triton.__version__.startswith(("3.6.", "3.7."))


def make_cubin(self, src, metadata, options, capability):
    """As Triton's, but keeps what ptxas says of registers: in the metadata, which Triton's cache keeps with the kernel."""
    target = re.search(r"\.target (\w+)", src)[1]
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(src)
        fusion = [] if options.enable_fp_fusion else ["--fmad=false"]
        command = [get_ptxas(self.target.arch).path, "-v", *fusion, f"--gpu-name={target}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        metadata["registers"] = int(re.search(r"Used (\d+) registers", log)[1])
        metadata["spilled"] = int(re.search(r"(\d+) bytes spill stores", log)[1])
        metadata["serialized"] = "wgmma.mma_async instructions are serialized" in log
        return cubin.read_bytes()


class Driver:
    """What Triton asks of a driver before a launch. Devices are numbered by their compute capability (cuda:90 is an sm_90), so
    nothing that is kept per device is shared between two of them, or with a GPU that is really there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def forget_plans():
    """Plans hold fake constants, which no other test may meet."""
    quantisers = layout_of_codes, whole_rows, tiles, requantize, packing_kernels, two, two_operands, blocks, masks, dequantize
    of_groups = grouped, of_experts, moving, grouped_sm90
    for module in (*quantisers, *of_groups, rotating, product, cublas, tma, loss_kernels, loss_sm90):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    requantize._plans.clear()


def check_arguments(kernel, arguments):
    """A plan's kernel is compiled once, then launched without a look at its arguments: they must be what it was made for."""
    assert kernel.metadata.target.arch == driver.active.capability, "compiled for another device"
    for declared, argument in zip(kernel.src.signature.values(), arguments, strict=True):
        if isinstance(argument, torch.Tensor | TensorDescriptor | gluon.TensorDescriptor):
            assert mangle_type(argument) == declared, "compiled for another dtype"


def rotated_elsewhere(x, left, right, dtype):
    """What rotates first: a kernel, or where there is no room for it PyTorch, whose own products are not compiled here."""
    if rotating.fits_tiles(x, left, right) and all(r is None or r.rank is None for r in (left, right)):
        return rotating.rotate(x, left, right, dtype)
    return x.new_empty(reference.rotated(x.shape[0], left), reference.rotated(x.shape[1], right), dtype=dtype)


@pytest.fixture
def launched(monkeypatch):
    """A function that makes a request on a device of some capability and returns the kernels that it launches."""
    kernels = []

    def launch(kernel, grid):
        kernels.append(kernel)
        return lambda *arguments, stream: check_arguments(kernel, arguments)

    def block_diagonal(rotation, edge, dtype, device, transposed):
        return torch.empty(edge, edge, dtype=dtype, device=device)

    monkeypatch.setattr(CompiledKernel, "__getitem__", launch)
    monkeypatch.setattr(CUDABackend, "make_cubin", make_cubin)
    stack = ExitStack()
    stack.enter_context(triton.knobs.cache.scope())
    triton.knobs.cache.dir += "-with-registers"
    # Constants: their values do not matter here, and the real functions would keep fakes for the tests that follow.
    for module in (whole_rows, tiles, two_operands, rotating, epilogue, blocks, dequantize, of_experts, triton_products):
        monkeypatch.setattr(module, "block_diagonal", block_diagonal)
    monkeypatch.setattr(grouped_sm90, "halves", lambda rotation, device: torch.empty(128, 64, dtype=BF16, device=device))
    for module in (sm90, grouped_sm90):
        monkeypatch.setattr(module, "_matrix", lambda rotation, device: torch.empty(128, 128, dtype=BF16, device=device))
    monkeypatch.setattr(whole_rows, "hadamard_factor", lambda n, device: torch.empty(n, n, device=device))
    monkeypatch.setattr(
        whole_rows, "_padded_factor", lambda n, edge, device: torch.empty(edge, edge, dtype=BF16, device=device)
    )
    monkeypatch.setattr(whole_rows, "rotation_signs", lambda rotation, device: torch.empty(rotation.edge, device=device))
    # PyTorch's own rotation, of what no kernel has room for.
    monkeypatch.setattr(quantizer, "rotate", rotated_elsewhere)
    # A fake CUDA tensor has no address, and where there is no CUDA it cannot be sliced.
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda t: 4096)
    monkeypatch.setattr(FakeTensor, "__getitem__", lambda t, s: torch.ops.aten.slice(t, 0, s.start, s.stop), raising=False)

    def run(capability, request):
        kernels.clear()
        properties = SimpleNamespace(multi_processor_count=GPUS[capability][1])
        monkeypatch.setattr(driver, "_active", Driver(capability))
        monkeypatch.setattr(launching, "current_device", lambda: capability)
        monkeypatch.setattr(launching, "current_raw_stream", lambda index: 0)
        monkeypatch.setattr(LAUNCHER, "disabled", True)  # it looks into kernels that a driver has loaded
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"sm_{capability}")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(triton_launch, "shared_memory", lambda index: GPUS[index][0])
        with FakeTensorMode():
            request(partial(torch.empty, device=f"cuda:{capability}"))
        return list(kernels)

    forget_plans()
    with stack:
        yield run
    forget_plans()


def check_fit(kernels, capability):
    """As a launch would."""
    limit = GPUS[capability][0]
    for kernel in kernels:
        if kernel.metadata.shared > limit:
            raise OutOfResources(kernel.metadata.shared, limit, f"shared memory of {kernel.name}")


#: Kernels that may spill registers, with the bytes that they do spill. On SM 9.0 each was measured and is faster so than with
#: smaller tiles or more warps.
SPILLS = {
    ("rows, widest, gain", None): 144,  # rows of 28672: 128 registers a thread
    ("pair, rotated", 90): 12,
    ("fp8, undo right", 90): 8,
    ("fp8, undo right, gain", 90): 112,
    ("int8, undo right, gain", 90): 76,
    ("int8, gain", 90): 204,
    ("fp8, undo both, fp32", 90): 132,
    ("statistics of a product", 90): 8,  # with a scale of logits
}


def check_registers(kernels, capability, name):
    """No kernel keeps numbers in memory because it lacks registers, but for those that are known."""
    allowed = SPILLS.get((name, capability), SPILLS.get((name, None), 0))
    spilled = {kernel.name: kernel.metadata.spilled for kernel in kernels}
    assert max(spilled.values()) <= allowed, spilled


def check_nan(kernels):
    """Which Triton's interpreter cannot show: its maximum always keeps a NaN."""
    for kernel in kernels:
        assert not re.search(r"\b(max|min)\.(xorsign\.abs\.)?b?f\d", kernel.asm["ptx"]), "a NaN would be dropped"


def check_subnormal(kernels):
    """Scales may be subnormal numbers, which Triton's interpreter never flushes to zero. (A floor may: of noise, in stochastic rounding.)"""
    for kernel in kernels:
        assert not re.search(r"\b(mul|add|sub|fma|max|min|div\.rn|cvt(?!\.rmi))\S*\.ftz", kernel.asm["ptx"])


def instructions(kernel) -> set[str]:
    """The matrix instructions in a kernel."""
    return set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", kernel.asm["ptx"]))


#: Every kernel and product once. The rest is compiled for the H100 alone: it takes long and differs little.
EVERYWHERE = {
    "rows", "rows, wide", "rows, full width", "many", "columns", "one scale", "tokens, low rank", "stochastic", "both", "pair, rotated", "rotate", "fp8", "fp8, undo right", "int8",
    "rows, gain", "rows, wide, gain", "fp8, gain", "fp8, undo right, gain", "int8, gain", "int8, undo right", "int8, undo right, gain",
    "int8, undo both", "int8, thin", "fp8, undo both", "rows, wide, fp32", "rows, blocks of 256", "pair",
    "rows, few", "rows, few, gain",
}  # fmt: skip
#: What sm_86 is compiled for: its code is sm_80's, with the shared memory of sm_89.
ON_86 = {"rows", "rows, wide", "rows, full width", "pair", "pair, rotated", "int8", "int8, undo right"}
#: What a GPU before Hopper, or of SM 12.x, has no room for: PyTorch rotates it first, and one kernel less runs on matrix units.
ELSEWHERE = {
    "rows, full width": {80, 86, 89, 120},
    "rows, wide, fp32": {80, 86, 89, 120},
    "rows, blocks of 256": {86, 89, 120},
}


def on_every_gpu(names):
    for capability in GPUS:
        for name in names:
            if capability == 90 or (name in EVERYWHERE and (capability != 86 or name in ON_86)):
                yield pytest.param(capability, name, id=f"sm_{capability}-{name}")


# Quantising and rotating.


def quantize(shape, left, right, scale, dtype=BF16, folds=False, rows=True, columns=True, noisy=False, gain=False):
    def request(empty, format):
        fold_rows = empty(reference.rotated(shape[0], left)) if folds else None
        seed = empty(1, dtype=torch.int64) if noisy else None
        x = empty(shape, dtype=dtype)
        by_column = empty(shape[1]) if gain else None
        quantizer.rotate_quantize(x, left, right, format, scale, fold_rows, None, rows, columns, None, seed, by_column)

    return request


def many(right, dtype=BF16, gain=False, width=4096, packed=False):
    def request(empty, format):
        xs = [empty(rows, width, dtype=dtype) for rows in (4096, 1024, 14336)]
        codes = [layout_of_codes.code_matrix(x, *x.shape, format) for x in xs]
        if packed:
            codes = [empty(x.shape[0], width // 4 * 3, dtype=torch.uint8) for x in xs]
        gains = [empty(width) for x in xs if gain]
        requantize.requantize_(xs, None, right, format, "row", codes, [empty(x.shape[0]) for x in xs], gains)

    return request


def pair(shape, left, dtype=BF16):
    def request(empty, format):
        quantizer.quantize_pair(empty(shape, dtype=dtype), left, format, empty(shape[1]), empty(shape[0]))

    return request


def both(shape, right, left, granularity="tensor", dtype=BF16, noisy=True):
    def request(empty, format):
        seed = empty(1, dtype=torch.int64) if noisy else None
        by = ("row", "column") if granularity == "index" else (granularity,) * 2
        x = empty(shape, dtype=dtype)
        quantizer.quantize_both(x, right, format, by[0], left, format, by[1], seed)

    return request


H, LOW = Rotation(128), Rotation(16, None, 8)
#: name -> (request, kernels that it launches)
QUANTIZE = {
    "rows": (quantize((8000, 4096), None, H, "row"), "whole_rows transpose_codes"),
    "rows, plain": (quantize((1000, 4096), None, None, "row"), "whole_rows transpose_codes"),
    "rows, wide": (quantize((1000, 14336), None, H, "row"), "whole_rows transpose_codes"),
    "rows, wide, fp32": (quantize((1000, 14336), None, H, "row", FP32), "whole_rows transpose_codes"),
    "rows, blocks of 256": (quantize((1000, 4096), None, Rotation(256), "row"), "whole_rows transpose_codes"),
    "rows, full width": (quantize((1000, 14336), None, Rotation(14336), "row"), "whole_rows transpose_codes"),
    "rows, gain": (quantize((8000, 4096), None, H, "row", gain=True), "whole_rows transpose_codes"),
    "rows, plain, gain": (quantize((1000, 4096), None, None, "row", gain=True), "whole_rows transpose_codes"),
    "rows, wide, gain": (quantize((1000, 14336), None, H, "row", gain=True), "whole_rows transpose_codes"),
    "rows, wide, fp32, gain": (quantize((1000, 14336), None, H, "row", FP32, gain=True), "whole_rows transpose_codes"),
    "rows, blocks of 256, gain": (
        quantize((1000, 14336), None, Rotation(256), "row", gain=True),
        "whole_rows transpose_codes",
    ),
    "rows, widest, gain": (quantize((1000, 28672), None, H, "row", gain=True), "whole_rows transpose_codes"),
    "rows, widest blocks, gain": (
        quantize((1000, 28672), None, Rotation(256), "row", gain=True),
        "whole_rows transpose_codes",
    ),
    "rows, full width, gain": (quantize((1000, 4096), None, Rotation(4096), "row", gain=True), "whole_rows transpose_codes"),
    "rows, few": (quantize((16, 4096), None, H, "row", columns=False), "whole_rows"),
    "rows, few, gain": (quantize((16, 8192), None, H, "row", columns=False, gain=True), "whole_rows"),
    "rows, few, narrow": (quantize((16, 512), None, H, "row", columns=False), "whole_rows"),
    "rows, few, plain": (quantize((16, 4096), None, None, "row", columns=False), "whole_rows"),
    "rows, few, wide": (quantize((16, 14336), None, H, "row", columns=False), "whole_rows"),
    "rows, few, fp32": (quantize((16, 8192), None, H, "row", FP32, columns=False), "whole_rows"),
    "many": (many(H), "whole_rows_of_many"),
    "many, plain": (many(None), "whole_rows_of_many"),
    "many, wide, gain": (many(H, gain=True, width=14336), "whole_rows_of_many"),
    "many, fp32": (many(H, FP32), "whole_rows_of_many"),
    "many, full width": (many(Rotation(4096)), "whole_rows_of_many"),
    "columns": (quantize((1000, 4096), None, None, "column", folds=True), "amax_tiles cast_tiles transpose_codes"),
    "unit": (quantize((1000, 4096), None, None, "unit"), "cast_tiles transpose_codes"),
    "one scale": (quantize((1000, 4096), None, H, "tensor"), "amax_tiles cast_tiles transpose_codes"),
    "tokens, low rank": (quantize((1000, 4096), LOW, None, "tensor", rows=False), "amax_of_operands cast_for_operands"),
    "tokens, low rank, fp32": (
        quantize((1000, 4096), LOW, None, "tensor", FP32, rows=False),
        "amax_of_operands cast_for_operands",
    ),
    "tokens, whole": (quantize((1000, 4096), H, None, "column", rows=False), "amax_of_operands cast_for_operands"),
    "tokens, by column": (quantize((1000, 4096), H, None, "column", folds=True, rows=False), "amax_tiles cast_tiles"),
    "stochastic": (quantize((1000, 4096), None, H, "row", columns=False, noisy=True), "amax_tiles cast_tiles"),
    "stochastic, both": (quantize((1000, 4096), None, None, "tensor", noisy=True), "amax_tiles cast_tiles transpose_codes"),
    "pair": (pair((1000, 4096), None), "amax_tiles cast_tiles"),
    "pair, rotated": (pair((1000, 4096), H), "amax_tiles cast_tiles"),
    "both": (both((1000, 4096), Rotation(16), LOW), "amax_of_operands cast_for_operands"),
    "both, by index": (both((1000, 4096), H, H, "index", noisy=False), "amax_of_operands cast_for_operands"),
    "both, nearest": (both((1000, 4096), Rotation(16), LOW, noisy=False), "amax_of_operands cast_for_operands"),
    "both, fp32": (both((1000, 4096), Rotation(16), LOW, dtype=FP32), "amax_of_operands cast_for_operands"),
    "rotate": (lambda empty, format: rotating.rotate(empty(1000, 4096, dtype=BF16), H, None, BF16), "rotate_tiles"),
}


@pytest.mark.parametrize(("capability", "name"), on_every_gpu(QUANTIZE))
def test_quantising(launched, capability, name):
    request, names = QUANTIZE[name]
    kernels = launched(capability, partial(request, format=FP8_E4M3 if capability >= 89 else INT8))
    assert [kernel.name for kernel in kernels] == names.split()
    if ("whole_rows" in names and ", plain" not in name) or name.startswith("tokens"):
        assert bool(instructions(kernels[0])) != (capability in ELSEWHERE.get(name, ())), "does it run on matrix units?"
    check_nan(kernels)
    check_subnormal(kernels)
    check_fit(kernels, capability)
    check_registers(kernels, capability, name)


@triton.jit
def swiglu(x0, x1, x2, row, column, inside):
    """As a compiled graph writes it."""
    t0 = tl.load(x0 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t1 = -t0
    t2 = fast_exp(t1)
    t3 = t2 + 1.0
    t4 = reciprocal(t3)
    t5 = t0 * t4
    t6 = tl.load(x1 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t7 = t5 * t6
    y0 = tl.where(inside, t7, 0.0)
    return y0.to(tl.bfloat16)


@triton.jit
def swiglu_backward(x0, x1, x2, row, column, inside):
    t0 = tl.load(x0 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t1 = tl.load(x1 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t2 = -t1
    t3 = fast_exp(t2)
    t4 = t3 + 1.0
    t5 = reciprocal(t4)
    t6 = t1 * t5
    t7 = t0 * t6
    t8 = tl.load(x2 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t9 = t0 * t8
    t10 = t9 * t5
    t11 = 1.0 - t5
    t12 = t1 * t11
    t13 = t12 + 1.0
    t14 = t10 * t13
    y0 = tl.where(inside, t7, 0.0)
    y1 = tl.where(inside, t14, 0.0)
    return y0.to(tl.bfloat16), y1.to(tl.bfloat16)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("right", [None, H], ids=["plain", "rotated"])
@pytest.mark.parametrize("gained", [False, True], ids=["", "gain"])
def test_quantising_what_is_not_written(launched, capability, right, gained):
    def request(empty):
        gate, up, codes = (empty(1000, 14336, dtype=dtype) for dtype in (BF16, BF16, FP8[0]))
        planned = whole_rows.plan_whole_rows(14336, BF16, gate.device, right, FP8_E4M3, gained, False, swiglu)
        gain = empty(14336) if gained else None
        planned((1000, 14336, 1, 14336), gate, up, None, gain, None, codes, empty(1000))

    (kernel,) = launched(capability, request)
    check_fit([kernel], capability)
    # Ahead of the loop, or in it, every load is of 16 bytes.
    loads = re.findall(r"(?:ld\.global|cp\.async\.c)\S* .*", kernel.asm["ptx"])
    assert loads and all("v4" in load or ", 0x10," in load for load in loads), loads


@triton.jit
def other_functions(x0, x1, x2, row, column, inside):
    t0 = tl.load(x0 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t1 = tl.load(x1 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t2 = tl.load(x2 + row * 14336 + column, mask=inside, other=0.0).to(tl.float32)
    t3 = tanh(t1)
    t4 = libdevice.erf(t2)
    y0 = tl.where(inside, t0 * t3, 0.0)
    y1 = tl.where(inside, t0 * t4, 0.0)
    return y0.to(tl.bfloat16), y1.to(tl.bfloat16)


@pytest.mark.parametrize(
    ("capability", "rows", "function"),
    [
        *((capability, 1000, swiglu_backward) for capability in GPUS),
        *((capability, 1024, swiglu_backward) for capability in (80, 90)),  # aligned
        (90, 1000, other_functions),
    ],
)
def test_quantising_two_that_are_not_written(launched, capability, rows, function):
    format, codes = (INT8, torch.int8) if capability < 89 else (FP8_E4M3, FP8[0])

    def request(empty):
        m, k = rows, 14336
        passes = two.plan_pairs(format, torch.device("cuda", capability), function)
        operands = [empty(m, k, dtype=BF16) for _ in range(3)] + [empty(n) for n in (m, m, k, k)]
        operands.append(empty(2 * (m + k), dtype=torch.int32))
        made = [empty(m, k, dtype=codes), empty(k, m, dtype=codes), empty(m), empty(k)] * 2
        passes[0]((m, k), *operands)
        passes[1]((m, k, k, aligned(m)), *operands, *made)

    kernels = launched(capability, request)
    assert [kernel.name for kernel in kernels] == ["amax_of_two", "cast_two"]
    check_nan(kernels)
    if function is swiglu_backward:  # libdevice's erf flushes in its own arithmetic
        check_subnormal(kernels)
    check_fit(kernels, capability)
    for kernel in kernels:
        ptx = kernel.asm["ptx"]
        wide = re.findall(r"ld\.global\S*v4|cp\.async\.c\S* .*, 0x10,", ptx)
        assert len(wide) >= 3, "the three matrices are not read 16 bytes at a time"
        if function is swiglu_backward:
            assert "ex2.approx.ftz" in ptx and "div.full" not in ptx, "the exact functions take longer than the memory does"


@pytest.mark.parametrize("name", ["rows", "rows, wide"])
def test_a_gain_stays_out_of_the_pipeline(launched, name):
    """Whose stages would otherwise hold it as well, and fewer programs or stages would fit."""
    without, with_gain = (launched(90, partial(QUANTIZE[n][0], format=FP8_E4M3))[0] for n in (name, f"{name}, gain"))
    assert with_gain.metadata.shared <= without.metadata.shared

    def copies(kernel):
        return kernel.asm["ptx"].count("cp.async.c")

    assert copies(with_gain) == copies(without) > 0


@pytest.mark.parametrize("name", ["rows", "pair"])
@pytest.mark.parametrize("format", [INT8, FP8_E5M2, FP6_E2M3], ids=str)
def test_quantising_to_other_formats(launched, format, name):
    check_fit(launched(90, partial(QUANTIZE[name][0], format=format)), 90)


@pytest.mark.parametrize(
    ("capability", "bits", "dtype"),
    [(90, 6, BF16), (90, 4, BF16), (90, 8, FP32), *((capability, 8, BF16) for capability in GPUS if capability != 86)],
)
def test_activations_in_blocks(launched, capability, bits, dtype):
    def request(empty):
        x = empty(8192, 4096, dtype=dtype)
        codes, scales = blocks.compress(x, bits)
        blocks.decompress(codes, scales, x.shape, dtype)

    kernels = launched(capability, request)
    assert [kernel.name for kernel in kernels] == ["compress_kernel", "decompress_kernel"]
    check_nan(kernels[:1])
    check_fit(kernels, capability)
    check_registers(kernels, capability, "blocks")
    assert all(map(instructions, kernels)), "they run on matrix units"


@pytest.mark.parametrize(
    ("capability", "rank", "dtype"),
    [(90, None, BF16), (90, 1, BF16), (90, 8, FP32), *((capability, 8, BF16) for capability in GPUS if capability != 86)],
)
def test_dequantising_transposed_codes(launched, monkeypatch, capability, rank, dtype):
    rotation = Rotation(16, None, rank)
    kept = reference.rotated(128, rotation)

    def block_diagonal(rotation, edge, dtype, device, transposed):
        return torch.empty(edge, max(16, kept), dtype=dtype, device=device)

    def request(empty):
        codes_t = empty(256, 802816 // 128 * kept, dtype=torch.int8)
        dequantize.dequantize(codes_t, empty((), dtype=FP32), rotation, (802816, 256), dtype)

    monkeypatch.setattr(dequantize, "block_diagonal", block_diagonal)
    kernels = launched(capability, request)
    assert [kernel.name for kernel in kernels] == ["dequantize_kernel"]
    check_fit(kernels, capability)
    check_registers(kernels, capability, "dequantize")
    (units,) = map(instructions, kernels)
    assert any("s8" in unit for unit in units) or capability == 100, "integers are multiplied"


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.bool], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_masks(launched, capability, dtype):
    def request(empty):
        x = empty(8192, 4096, dtype=dtype)
        masks.unpack_mask(masks.pack_mask(x), x.shape, dtype)
        if dtype != torch.bool:
            masks.masked(*masks.relu(x))

    kernels = launched(capability, request)
    names = ["pack_mask_kernel", "unpack_mask_kernel", "relu_kernel", "masked_kernel"]
    assert [kernel.name for kernel in kernels] == names[: 2 if dtype == torch.bool else 4]
    check_fit(kernels, capability)
    for kernel in kernels:
        loads, stores = (re.findall(rf"{op}\.global\.(?:\w+\.)*v[24]\.b(?:32|64)", kernel.asm["ptx"]) for op in ("ld", "st"))
        assert loads or kernel.name == "unpack_mask_kernel", "16 bytes at once"
        assert stores or kernel.name == "pack_mask_kernel"


@pytest.mark.parametrize("capability", GPUS)
def test_packing(launched, capability):
    def request(empty):
        codes = empty(1000, 4096, dtype=torch.float8_e4m3fn)
        packed = empty(1000, 3072, dtype=torch.uint8)
        packing_kernels.pack_rows_(codes, FP6_E2M3, packed)
        packing_kernels.unpack_rows(packed, FP6_E2M3)
        for width in (4096, 14336):
            many(H, width=width, packed=True)(empty, FP6_E2M3)

    if capability < 89:
        with pytest.raises(
            RuntimeError, match=f"sm_{capability} has compute capability 8.{capability % 10} and cannot multiply fp6"
        ):
            launched(capability, request)
        return
    kernels = launched(capability, request)
    assert [kernel.name for kernel in kernels] == ["pack_kernel", "unpack_kernel", *["whole_rows_of_many"] * 2]
    check_fit(kernels, capability)
    assert "st.global.b32" in kernels[1].asm["ptx"], "codes are not stored four at a time"


# The loss of a head.


#: name -> what is computed of the logits
OBJECTIVES = {"plain": Objective(), "everything": Objective(0.5, 30.0, 0.1, 1e-4)}


@pytest.mark.parametrize(
    ("capability", "columns", "name"),
    [
        *((capability, *case) for capability in GPUS for case in ((4096, "everything"), (257, "plain"))),
        *((90, *case) for case in ((4096, "plain"), (257, "everything"))),
    ],
)
def test_losses(launched, capability, name, columns):
    def request(empty):
        logits, targets = empty(8192, columns, dtype=torch.float16), empty(8192, dtype=torch.int64)
        arguments = logits, targets, empty(5, 8192), 128, OBJECTIVES[name]
        loss_kernels.update_statistics_(arguments[2], logits, targets, 128, OBJECTIVES[name])
        if capability >= 89:
            loss_kernels.quantize_gradient(*arguments, empty(8192, aligned(columns), dtype=FP8[0]), True)
        loss_kernels.dense_gradient(*arguments, logits.view(BF16))
        loss_kernels.scale_(empty(4096, dtype=BF16), empty(()))

    kernels = launched(capability, request)
    codes = ["column_magnitudes", "gradient_codes"] if capability >= 89 else []
    assert [k.name for k in kernels] == ["row_statistics", *codes, "gradient_dense", "scale_elements"]
    check_nan(kernels[1:])  # a NaN stays in the sum of exponentials, not in the largest logit
    check_fit(kernels, capability)
    check_registers(kernels, capability, name)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_statistics_of_a_product(launched, biased, scale):
    def request(empty):
        codes, w_codes = empty(8192, 2048, dtype=torch.int8), empty(16384, 2048, dtype=torch.int8)
        bias, targets = empty(16384, dtype=BF16) if biased else None, empty(8192, dtype=torch.int64)
        objective = Objective(scale)
        assert loss_sm90.why_not(codes.device, 8192, 16384, objective) is None
        loss_sm90.update_statistics_(empty(5, 8192), codes, w_codes, empty(8192), empty(16384), bias, targets, 128, objective)

    kernels = launched(90, request)
    assert [kernel.name for kernel in kernels] == ["logit_statistics", "merge_statistics"]
    assert not kernels[0].metadata.serialized and any("s32.s8" in name for name in instructions(kernels[0]))
    check_fit(kernels, 90)
    check_registers(kernels, 90, "statistics of a product")


# Products.


def multiply(size, codes, left, right, dtype=BF16, gain=False):
    def request(empty):
        (m, n, k), (a_codes, b_codes) = size, codes
        by_out = empty(n) if gain else None
        a, b_t, by_row, bias = empty(m, k, dtype=a_codes), empty(n, k, dtype=b_codes), empty(m), empty(n, dtype=dtype)
        by_column = empty(n) if right is None else None
        product.scaled_mm(a, b_t, by_row, by_column, bias, left, right, (m, n), dtype, by_out)

    return request


LARGE, FEW, THIN = (8192, 8192, 14336), (1000, 1024, 4096), (16, 4096, 4096)
WAVE = (2048, 2048, 4096)  # fewer tiles of 128×256 than multiprocessors, but not of 128×128
FP8, INT = (torch.float8_e4m3fn,) * 2, (torch.int8,) * 2
MULTIPLY = {
    "fp8": multiply(LARGE, FP8, None, None),
    "fp8, e5m2 by e4m3": multiply(LARGE, (torch.float8_e5m2, torch.float8_e4m3fn), None, None),
    "fp8, few tiles, fp32": multiply(FEW, FP8, None, None, FP32),
    "fp8, few tiles, undo right": multiply(FEW, FP8, None, H),
    "fp8, few tiles, undo both": multiply(FEW, FP8, H, H),
    "fp8, a wave": multiply(WAVE, FP8, None, None),
    "fp8, undo right": multiply(LARGE, FP8, None, H),
    "fp8, undo both": multiply(LARGE, FP8, H, H),
    "fp8, undo both, fp32": multiply(LARGE, FP8, H, H, FP32),
    "fp8, gain": multiply(LARGE, FP8, None, None, gain=True),
    "fp8, few tiles, fp32, gain": multiply(FEW, FP8, None, None, FP32, gain=True),
    "fp8, undo right, gain": multiply(LARGE, FP8, None, H, gain=True),
    "fp8, undo both, gain": multiply(LARGE, FP8, H, H, gain=True),
    "int8": multiply(LARGE, INT, None, None),
    "int8, undo right": multiply(LARGE, INT, None, H),
    "int8, gain": multiply(LARGE, INT, None, None, gain=True),
    "int8, undo right, gain": multiply(LARGE, INT, None, H, gain=True),
    "int8, few tiles": multiply(FEW, INT, None, None),
    "int8, thin": multiply(THIN, INT, None, H),
    "int8, undo both": multiply((8192, 8192, 4096), INT, H, H),
}


@pytest.mark.parametrize(("capability", "name"), on_every_gpu(MULTIPLY))
def test_multiplying(launched, capability, name):
    integer = name.startswith("int8")
    if capability < 89 and not integer:
        with pytest.raises(RuntimeError, match="sm_80 has compute capability 8.0 and cannot multiply fp8"):
            launched(capability, MULTIPLY[name])
        return
    kernel, *passes = launched(capability, MULTIPLY[name])
    # Only large fp8 products of SM 9.0, and float32 ones, undo a rotation on the left in their epilogue.
    in_epilogue = name == "fp8, undo both, fp32" or (capability == 90 and name in ("fp8, undo both", "fp8, undo both, gain"))
    assert [k.name for k in passes] == ["rotate_tiles"] * ("undo both" in name and not in_epilogue)
    # Triton has tcgen05 products of integers from 3.8 on.
    unit = {90: "wgmma.mma_async", 100: "mma.sync" if integer and OLD else "tcgen05.mma"}.get(capability, "mma.sync")
    kind = (
        "kind::i8"
        if integer and unit == "tcgen05.mma"
        else "s32.s8.s8"
        if integer
        else "kind::f8f6f4"
        if capability == 100
        else "f32.e5m2.e4m3"
        if "e5m2" in name
        else "f32.e4m3.e4m3"
    )
    assert any(i.startswith(unit) and kind in i for i in instructions(kernel)), instructions(kernel)
    copies = "cp.async.bulk.tensor" if capability >= 90 else "cp.async.cg.shared.global"
    assert copies in kernel.asm["ptx"], "operands are not copied ahead of the products"
    check_subnormal([kernel])
    check_fit([kernel, *passes], capability)
    check_registers([kernel, *passes], capability, name)


#: (rows, columns) that take each tile of the product of few rows.
FEW_ROWS = [(16, 1024), (64, 4096), (32, 14336), (32, 1024), (64, 1024), (16, 3072), (32, 3072), (16, 14336), (64, 14336)]


def few_rows_on_every_gpu():
    for capability in (80, 89, 90, 100, 120):
        for size in FEW_ROWS if capability == 90 else FEW_ROWS[:3]:
            yield capability, size, INT
            if capability >= 89:
                yield capability, size, FP8
    yield 90, (16, 3072), (torch.float8_e5m2, torch.float8_e4m3fn)


@pytest.mark.parametrize(("capability", "size", "codes"), few_rows_on_every_gpu())
def test_multiplying_few_rows(launched, monkeypatch, capability, size, codes):
    monkeypatch.setattr(few_rows, "is_hopper", lambda device: True)  # so far it is used on SM 9.0 only
    (m, n), integer = size, codes == INT
    (kernel,) = launched(capability, multiply((m, n, 4096), codes, None, None, gain=True))
    ptx = kernel.asm["ptx"]
    assert kernel.name == "few_rows_kernel" and instructions(kernel)
    assert ptx.count("cp.async.cg.shared.global") >= 8 and "bulk.tensor" not in ptx, "codes are not copied ahead"
    assert "cp.async.ca" not in ptx, "copies are narrow"
    if capability == 90 and not integer and n > 2112:
        assert all(i.startswith("wgmma") for i in instructions(kernel)), "codes are converted"
    assert ("griddepcontrol.wait" in ptx) == (capability >= 90 and n < 14336)
    check_subnormal([kernel])
    check_fit([kernel], capability)
    check_registers([kernel], capability, "few rows")


@pytest.mark.parametrize("name", ["fp8, undo right", "int8, undo right, gain"])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_multiplying_without_tma(launched, monkeypatch, capability, name):
    """The kernel for older GPUs fits newer ones too."""
    for path in (GLUON, TMA):
        monkeypatch.setattr(path, "disabled", True)
    (kernel,) = launched(capability, MULTIPLY[name])
    assert kernel.name == "mma_kernel" and "cp.async.bulk.tensor" not in kernel.asm["ptx"]
    check_subnormal([kernel])
    check_fit([kernel], capability)


# Experts: experts, top_k · tokens, in_features and the width between the products of three models, and their gates.

EXPERTS = {
    "qwen": (128, 65536, 2048, 768, Gate(), Rotation(128)),
    "gpt-oss": (32, 32768, 2880, 2880, Gate(1.702, 7.0, 1.0, interleaved=True), Rotation(64)),
    "mixtral": (8, 16384, 4096, 14336, Gate(), Rotation(128)),
}


def cut(empty, experts, rows):
    count = reference_of_experts.tile_count(rows, experts)
    return empty(count, 4, dtype=torch.int32), empty(experts + 2, dtype=torch.int32)


def multiply_groups(model, code):
    """All kinds of products of a layer: with a bias and a routing weight, un-rotated, and along tokens."""
    experts, rows, d, f, _, rotation = EXPERTS[model]

    def request(empty):
        tiles, starts = cut(empty, experts, rows)
        a, b = empty(rows, d, dtype=code), empty(experts, 2 * f, d, dtype=code)
        grouped.grouped_mm(a, b, tiles, starts, empty(rows), empty(experts, 2 * f), None, None, None, BF16, None)
        bias, weight = empty(experts, 2 * f, dtype=BF16), empty(rows)
        grouped.grouped_mm(a, b, tiles, starts, empty(rows), empty(experts, 2 * f), bias, weight, None, BF16, None)
        grouped.grouped_mm(a, b, tiles, starts, empty(rows), None, None, None, rotation, BF16, None)
        a_t, b_t = (empty(width, tiles.shape[0] * 128, dtype=code) for width in (d, f))
        grouped.grouped_grad(a_t, b_t, starts, empty(experts, d), rotation, BF16, None)

    return request


@pytest.mark.parametrize(
    ("capability", "code", "model"),
    [
        (80, INT[0], "qwen"),
        (89, FP8[0], "qwen"),
        *((c, code, "qwen") for c in (90, 100, 120) for code in (INT[0], FP8[0])),
        (90, INT[0], "gpt-oss"),  # rotated by blocks of 64, which are undone without sums of halves
    ],
)
def test_grouped_products(launched, capability, code, model):
    kernels = launched(capability, multiply_groups(model, code))
    # In Gluon int8 products of rows have two tiles, for short and for long sums.
    assert {k.name for k in kernels} == {"grouped_wgmma_kernel" if capability == 90 else "grouped_kernel"}
    for kernel in kernels:
        assert "cp.async" in kernel.asm["ptx"], "operands are not copied ahead of the products"
        assert instructions(kernel) and not kernel.metadata.serialized
    if capability == 90:
        assert all("1" in in_flight(kernel) for kernel in kernels)
        assert all("st.global.v4" in kernel.asm["ptx"] for kernel in kernels), "stores are narrow"
    check_subnormal(kernels)
    check_fit(kernels, capability)
    check_registers(kernels, capability, "grouped")


@pytest.mark.parametrize("code", [INT[0], FP8[0]])
def test_grouped_products_without_gluon(launched, monkeypatch, code):
    monkeypatch.setattr(GLUON, "disabled", True)
    kernels = launched(90, multiply_groups("qwen", code))
    assert {kernel.name for kernel in kernels} == {"grouped_kernel"}
    check_fit(kernels, 90)
    check_registers(kernels, 90, "grouped")


@pytest.mark.parametrize(("capability", "model"), [*((90, model) for model in EXPERTS), (80, "qwen"), (120, "qwen")])
def test_quantising_for_experts(launched, capability, model):
    experts, rows, d, f, gate, rotation = EXPERTS[model]

    def request(empty):
        tiles, starts = cut(empty, experts, rows)
        index, format = empty(rows, dtype=torch.int32), INT8
        moving.group_tiles(empty(experts, dtype=torch.int32), rows)
        moving.gather_codes(empty(8192, d, dtype=torch.int8), empty(8192), index)
        moving.turn_codes(empty(8192, d, dtype=torch.int8), index, tiles)
        moving.turn_stack(empty(experts, d, f, dtype=torch.int8))
        moving.turn_stack(empty(experts, d, f, dtype=BF16))
        moving.combine(empty(rows, d, dtype=BF16), empty(8192, 8, dtype=torch.int32), BF16)
        x, h, grad = empty(8192, d, dtype=BF16), empty(rows, 2 * f, dtype=BF16), empty(rows, f, dtype=BF16)
        of_experts.quantize_groups(x, index, empty(experts, d), tiles, format)
        of_experts.quantize_groups_t(x, index, empty(rows), empty(rows), tiles, starts, True, format)
        of_experts.quantize_gated(h, gate, rotation, format, empty(f))
        of_experts.quantize_gated_grad(h, grad, empty(rows), gate, empty(experts, 2 * f), tiles, True, format)
        of_experts.quantize_groups_t(h, None, None, empty(rows), tiles, starts, True, format)

    kernels = launched(capability, request)
    assert len(kernels) == 11
    check_nan(kernels)
    check_subnormal(kernels)
    check_fit(kernels, capability)
    check_registers(kernels, capability, "experts")


# What ptxas makes of them.


@pytest.mark.parametrize(
    "name",
    ["fp8", "fp8, undo right", "fp8, undo both, fp32", "int8, undo right", "int8, undo right, gain", "fp8, undo right, gain"],
)
def test_wgmma_is_asynchronous(launched, name):
    """Ptxas does not wait for every wgmma before the next, which it says only in its log (C7515)."""
    (kernel,) = launched(90, MULTIPLY[name])
    assert not kernel.metadata.serialized


def test_the_log_shows_wgmma_that_is_not(launched, monkeypatch):
    """So that the test above can fail: the un-rotation in a flattened loop."""

    def flattened(kernel, constants, blocks):
        return Launch(kernel, constants | {"FLATTEN": True}, blocks)

    monkeypatch.setattr(tma, "Launch", flattened)
    (kernel,) = launched(90, MULTIPLY["fp8, undo both"])
    assert kernel.metadata.serialized


def in_flight(kernel) -> set[str]:
    """How many wgmma a kernel leaves running where it waits for others."""
    return set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", kernel.asm["ptx"]))


@pytest.mark.parametrize("name", ["int8", "int8, undo right"])
def test_the_kernel_in_gluon_is_worth_its_lines(launched, name, monkeypatch):
    """On SM 9.0 integer products overlap in it, as they do not in what Triton makes of the other kernel. Should that change,
    the one in Gluon can go. (With a gain and a bias, epilogues spill a little; none of it is in the loop over k.)"""
    (kernel,) = launched(90, MULTIPLY[name])
    assert kernel.name == "wgmma_kernel" and in_flight(kernel) == {"0", "1"}
    assert kernel.metadata.spilled == 0
    assert "st.global.v4" in kernel.asm["ptx"] and "st.global.b" not in kernel.asm["ptx"], "stores are narrow"
    if "undo" in name:
        operands, matrix = 4 * (128 + 256) * 128, 2 * 128 * 128
        assert kernel.metadata.shared - operands - matrix < 64, "threads exchange columns before they store them"
    between = re.search(r"wait_group\.sync\.aligned 1;(.*?)cp\.async\.bulk\.tensor", kernel.asm["ptx"], re.DOTALL)
    assert "bar.sync" in between[1], "a warp may still read what is overwritten"
    monkeypatch.setattr(sm90, "why_not", lambda request: "it shall not")
    product.plan.cache_clear()
    (kernel,) = launched(90, MULTIPLY[name])
    assert kernel.name == "scaled_mm_kernel" and in_flight(kernel) == {"0"}


def test_which_products_are_in_gluon(launched):
    rest = {
        "int8, few tiles",
        "int8, thin",
        "fp8",
        "fp8, a wave",
        "fp8, few tiles, undo right",
        "fp8, undo both",
    }
    for name in ("int8", "int8, gain", "int8, undo both", "fp8, undo right", *rest):
        kernel = launched(90, MULTIPLY[name])[0]
        assert kernel.name == ("scaled_mm_kernel" if name in rest else "wgmma_kernel"), name


def test_threads_do_not_exchange_codes_of_two_operands(launched):
    """Nor does an element of E take a hash of its own."""
    _, cast = launched(90, partial(both((1024, 4096), Rotation(16), LOW), format=INT8))
    tiles, matrices = 3 * 64 * 64, 64 * 64 + 64 * 32
    assert cast.metadata.shared == 2 * (tiles + matrices), "codes go through shared memory"
    ptx = cast.asm["ptx"]
    assert "st.global.v4.b32" in ptx and "st.global.v2.b32" in ptx and not re.search(r"st\.global\.(v\d\.)?b(8|16)", ptx)
    hashes = ptx.count(str(0x21F0AAAD))
    assert hashes == 5 + 8, "of the seed and of two rows, which take two; of 32 elements"


# What takes the place of a fast path that cannot be prepared.


def one_warning_of(path, request):
    """What a request launches; it warns of ``path``."""
    path.failure = None
    with pytest.warns(UserWarning, match=f"fast path '{path.name}'") as caught:
        kernels = request()
    assert sum("halo_tensor" in str(w.message) for w in caught) == 1
    path.failure = None
    return kernels


def broken(*args, **kwargs):
    raise AttributeError("broken on purpose")


@pytest.mark.parametrize("where", ["_plan", "_layout", "wgmma_kernel"])
def test_without_gluon(launched, monkeypatch, where):
    """Also where the kernel does not compile, as under a Triton that has renamed what it calls."""
    kernel = sm90.gluon.jit(calls_what_is_gone) if where == "wgmma_kernel" else broken
    monkeypatch.setattr(gluon if where == "_layout" else sm90, where, kernel)
    (kernel,) = one_warning_of(GLUON, lambda: launched(90, MULTIPLY["int8"]))
    assert kernel.name == "scaled_mm_kernel"


def calls_what_is_gone(
    a, b, out, a_scale, b_scale, gain, bias, right,
    M, N, K,
    STAGES: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, INTEGER: tl.constexpr, A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    tl.renamed_in_this_version(M)


def test_without_cublas(launched, monkeypatch):
    def request(empty):
        a, b_t = (empty(8192, 4096, dtype=torch.float8_e4m3fn) for _ in range(2))
        product.scaled_mm(a, b_t, empty(8192), empty(8192), None, None, None, (8192, 8192), BF16)

    calls = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(kwargs["out"].shape))
    assert launched(90, request) == [] and calls == [(16, 16), (8192, 8192)], "tried on a small product first"
    cublas._multiplies.cache_clear()
    product.plan.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", broken)
    (kernel,) = one_warning_of(CUBLAS, lambda: launched(90, request))
    assert kernel.name == "scaled_mm_kernel"


def test_without_the_bare_launcher(launched, monkeypatch):
    monkeypatch.setattr(LAUNCHER, "why_off", lambda: None)
    monkeypatch.setattr(triton_launch, "bare", broken)
    (kernel,) = one_warning_of(LAUNCHER, lambda: launched(90, MULTIPLY["fp8, undo both"]))
    assert kernel.name == "scaled_mm_kernel", "it went through Triton's launcher"


@pytest.mark.parametrize(("owner", "where"), [(triton_launch, "through_triton"), (Launch, "_compile")], ids=str)
def test_without_kernels_that_are_compiled_beforehand(launched, monkeypatch, owner, where):
    dispatched = []
    monkeypatch.setattr(owner, where, broken)
    monkeypatch.setattr(Launch, "_by_triton", lambda self, *arguments: dispatched.append(self.kernel.fn.__name__))
    assert one_warning_of(PRECOMPILED, lambda: launched(90, MULTIPLY["fp8, undo both"])) == []
    assert dispatched == ["scaled_mm_kernel"]


def test_what_the_user_must_change_is_an_error(launched, recwarn):
    with pytest.raises(Refusal, match="sm_80 has compute capability 8.0 and cannot multiply fp8"):
        PRECOMPILED.attempt(launched, 80, MULTIPLY["fp8"])
    assert not [w for w in recwarn if "halo_tensor" in str(w.message)]


# What a plan is kept for.


def test_a_plan_keeps_to_a_dtype(launched):
    def request(empty):
        x = empty(1000, 4096, dtype=BF16)
        rotating.rotate(x, None, H, BF16)
        rotating.rotate(x, None, H, FP32)

    assert len(launched(90, request)) == 2


def test_a_plan_keeps_to_a_device(launched):
    """A compiled kernel is loaded on one device."""
    for capability in (90, 89):
        launched(capability, partial(QUANTIZE["rows, plain"][0], format=INT8))


def test_remembered_descriptors_keep_no_tensor_alive():
    """Where there is no TMA, there is no metadata of descriptors, and Triton hands the tensors on."""
    (encode,) = triton_launch._encoders(SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=[])), 1)
    codes = torch.empty(256, 128, dtype=torch.int8)
    encoded = encode(launching.describe(codes, (256, 128, 128), (128, 128)))
    assert encoded[0] == codes.data_ptr() and not any(isinstance(a, torch.Tensor) for a in encoded)


@pytest.mark.parametrize("described", [0, 1])
def test_the_function_beneath_the_launcher(monkeypatch, described):
    """It gets what it would get through Triton's launcher, tensors as their addresses."""
    calls = []

    def c_function(*args):
        flat = (a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg]))
        calls.append([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in flat])

    signature = dict(enumerate(["*i8", "*fp32", "i32", "constexpr"]))
    if described:
        signature[0] = "tensordesc<i8[128,128]>"
    theirs = CudaLauncher.__new__(CudaLauncher)
    vars(theirs).update(
        launch=wrap_handle_tensordesc(c_function, signature, []), num_ctas=1, launch_cooperative_grid=False, launch_pdl=False,
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, gsan_enabled=False,
        arg_annotations=["annotations"], kernel_signature=b"signature",
    )  # fmt: skip
    compiled = Compiled(theirs)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=SimpleNamespace(launch=c_function)))
    monkeypatch.setattr(triton_launch, "BuiltinFunctionType", FunctionType)
    tensors = torch.empty(256, 128, dtype=torch.int8), torch.empty(4)
    descriptors = [launching.describe(tensors[0], (256, 128, 128), (128, 128))][:described]
    dtypes = (torch.int8,)[:described]
    how = compiled, lambda sizes, tensors: descriptors, dtypes, ("constant",)
    ours, sizes = (
        triton_launch.bare(triton_launch.through_triton(*how), *how),
        launching.Sizes((3, 2, 1), (7,), ((256, 128, 128),)[:described], (0,)),
    )
    for _ in range(2):
        ours(sizes, tensors, [t.data_ptr() for t in tensors], 5)
    compiled[3, 2, 1](*descriptors, *tensors[described:], 7, "constant", stream=5)
    assert len(calls) == 3 and calls[0] == calls[1] == calls[2]
    listener = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", listener)
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "launch", lambda *args: calls.append("through Triton's launcher"))
        ours(sizes, tensors, [t.data_ptr() for t in tensors], 5)
    assert calls.pop() == "through Triton's launcher", "where somebody listens"
    assert calls[0][:5] == [3, 2, 1, 5, "function"] and calls[0][-3:] == [tensors[1].data_ptr(), 7, "constant"]


def test_two_threads_that_compile_one_plan(monkeypatch):
    """While one compiles with two stages, which do not fit, the other has found that out already."""
    launch = Launch(SimpleNamespace(fn=len, warmup=None), {"num_stages": 2})

    def warmup(*arguments, grid, num_stages, enable_fp_fusion):
        launch.constants = {"num_stages": 1}
        return SimpleNamespace(metadata=SimpleNamespace(shared=200 * num_stages))

    monkeypatch.setattr(launch.kernel, "warmup", warmup)
    monkeypatch.setattr(triton_launch, "shared_memory", lambda index: 300)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    assert launch._compile([], launch.sizes((1,), ()), 0).metadata.shared == 200 and launch.constants == {"num_stages": 1}


def test_threads_compile_what_one_thread_does(launched, monkeypatch, tmp_path):
    """The kernels of a layer's ops on an sm_90, each compiled once, while this thread compiles them too."""
    triton.knobs.cache.dir = str(tmp_path)
    compiled, compile, errors = [], JITFunction._do_compile, []

    def noting(self, key, *args, **kwargs):
        compiled.append((self.fn.__name__, key))
        return compile(self, key, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    monkeypatch.setattr(AHEAD, "enabled", True)
    for function in gc.get_objects():
        if issubclass(type(function), JITFunction):
            function.device_caches.clear()  # of what other tests have compiled

    def fake(compile):
        try:
            with FakeTensorMode():
                compile()
        except Exception as error:  # which the pool drops
            errors.append(error)

    def request(empty):
        with ThreadPoolExecutor(4) as pool:
            monkeypatch.setattr(ahead, "start", lambda compile: pool.submit(fake, compile))
            device, rotation, dtype = torch.device("cuda", 90), Rotation(128), torch.int8
            x, codes = ((4096, 2048), (2048, 1), BF16, device), ((4096, 2048), (2048, 1), dtype, device)
            vector, w = ((4096,), (1,), FP32, device), ((2048, 2048), (2048, 1), dtype, device)
            calls = [
                ("rotate_quantize", (x, (), (128, 0), "int8", "row", None, None, True, True, None, None, False)),
                ("quantize_pair", (x, (), "int8", None, vector, False)),
                ("scaled_mm", (codes, w, vector, None, None, (), (128, 0), (4096, 2048), BF16, None, False)),
            ]
            bodies = [pool.submit(fake, partial(kernels_ahead._compile, *call)) for call in calls]
            product.scaled_mm(
                empty(4096, 2048, dtype=dtype), empty(2048, 2048, dtype=dtype), empty(4096), None, None, None, rotation,
                (4096, 2048), BF16,
            )  # fmt: skip
            wait(bodies)  # which submit others

    kernels = launched(90, request)
    assert not errors and [kernel.name for kernel in kernels] == ["wgmma_kernel"]
    names = [name for name, _ in compiled]
    assert sorted(names) == ["amax_tiles", "cast_tiles", "transpose_codes", "wgmma_kernel", "whole_rows"]
    check_fit(kernels, 90)


class Compiled:
    """A kernel of Triton's that is launched by ``run``."""

    metadata = SimpleNamespace(target=GPUTarget("cuda", 80, 32), tensordesc_meta=[])
    function, packed_metadata = "function", (4, 1, 0)

    def __init__(self, run):
        self.run = run

    def __getitem__(self, grid):
        return lambda *args, stream: self.run(*grid, stream, self.function, self.packed_metadata, None, None, None, *args)
