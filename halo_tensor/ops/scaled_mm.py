"""The Triton matrix product of quantised operands: R_left (diag(s_a) A Bᵀ diag(s_b)) Rᵀ_right diag(gain) + bias.

Both operands are read K-major, which is the only order that 8-bit tensor cores take. One persistent program per multiprocessor
walks the output tiles in groups that share operand rows (so that they meet in L2); tensor descriptors make the loads TMA on
SM ≥ 9.0 and masked pointer loads below. Scales, the undoing of rotations, the gain, the bias and the cast happen on the
accumulator, before anything is written. Where two others are faster they take over: cuBLAS, and on SM 9.0
:mod:`halo_tensor.ops.hopper`.
"""

from functools import lru_cache, reduce
from operator import add
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halo_tensor.fences import CUBLAS, GLUON
from halo_tensor.ops import sm80
from halo_tensor.ops.device import INTEGERS_ON_SM100, check_device, has_tma, is_hopper
from halo_tensor.ops.epilogue import EDGE, finish
from halo_tensor.ops.formats import aligned
from halo_tensor.ops.hadamard import block_diagonal
from halo_tensor.ops.launch import Launch, Tiles, shared_memory
from halo_tensor.ops.reference import LONGEST_SUM
from halo_tensor.ops.rotate import Matrix, norm, transposed, unrotate
from halo_tensor.ops.rotate_quantize import dense
from halo_tensor.ops.tile_order import place_of
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
hopper: Any = GLUON.load("halo_tensor.ops.hopper")


class Tile(NamedTuple):
    """How one product is cut: output tile, depth, grouping of tiles, warps, pipeline stages, programs that share a
    multiprocessor, columns that an epilogue stores at a time, and whether the loops over tiles and over k are one."""

    m: int
    n: int
    k: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    resident: int = 1
    part: int = EDGE
    flatten: bool = False


def tile_for(
    generation: int, m: int, n: int, integer: bool, left: bool, right: bool, wide_output: bool, multiprocessors: int
) -> Tile:
    """The launch table.

    The rows of SM 9.0 were measured on an H100 (docs/notes). Those of SM 10.x and 12.x are the largest tiles whose kernels
    spill no registers; they were compiled and not run.

    Args:
        generation: the major compute capability, 9, 10 or 12.
        left, right: whether a rotation is undone there; on the left it takes tiles of its block.
        wide_output: whether the result is float32.
    """
    undo = left or right

    def fewer_than_multiprocessors(height: int, width: int) -> bool:
        return triton.cdiv(m, height) * triton.cdiv(n, width) < multiprocessors

    if m <= 64:
        return Tile(64, 128, warps=4, stages=4, flatten=not undo)
    if fewer_than_multiprocessors(128, 128) and not left:
        return Tile(64, 128, warps=4, stages=4, resident=2, flatten=not undo)
    if generation == 12:  # 100 KB of shared memory for two programs, and accumulators in registers
        return Tile(128, 128, 64, warps=4, stages=4, resident=2, part=32)
    if generation == 10 and integer and _VERSION < INTEGERS_ON_SM100:  # as on SM 8.0
        return Tile(128, 128, warps=4, stages=3, resident=2, part=64)
    if generation == 10:
        return Tile(128, 256, stages=4) if undo and not (wide_output or integer) else Tile(128, 128, stages=4)
    # Flattened, the loads of the next tile overlap the epilogue of this one. But ptxas (C7515) serialises all wgmma where an
    # accumulator meets another product inside a loop that is still running.
    whole = Tile(128, 256, stages=4) if undo else Tile(128, 256, stages=4, part=256, flatten=True)
    # Triton waits for every int8 product before the next: a second program fills the gaps.
    if integer or fewer_than_multiprocessors(128, 256):
        return Tile(128, 128, warps=4, stages=3, resident=2, flatten=not undo)
    if wide_output and not undo:  # float32 results need the shared memory of the larger tile
        return Tile(128, 128, warps=8, stages=4, flatten=True)
    return whole


@triton.jit
def scaled_mm_kernel(
    a, b, out, a_scale, b_scale, gain, bias, left, right,
    M, N, K, ROWS_OUT, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    INTEGER: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, GAIN: tl.constexpr, BIASED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, NORM: tl.constexpr, PART: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The constants are those of :func:`halo_tensor.ops.epilogue.finish`."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    accumulator_type: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), dtype=accumulator_type)
        for k in range(tl.cdiv(K, BK)):
            a_tile = a.load([tile_m * BM, k * BK])
            b_tile = b.load([tile_n * BN, k * BK])
            acc = tl.dot(a_tile, b_tile.T, acc, out_dtype=accumulator_type)

        finish(
            acc, out, a_scale, b_scale, gain, bias, left, right, tile_m, tile_n, M, N, ROWS_OUT, stride,
            A_SCALE, B_SCALE, GAIN, BIASED, LEFT, RIGHT, NORM, PART,
        )  # fmt: skip


def fits_epilogue(rotation: Rotation | None) -> bool:
    """Whether a rotation can be undone on an output tile."""
    return rotation is not None and rotation.rank is None and rotation.edge in (16, 32, 64, 128)


def scaled_mm(
    a: torch.Tensor,
    b_t: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    left: Rotation | None,
    right: Rotation | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`halo_tensor.ops.reference.scaled_mm`; scales are numbers or vectors."""
    if a.dtype == torch.int8 and a.shape[1] > LONGEST_SUM:
        parts = zip(a.split(LONGEST_SUM, 1), b_t.split(LONGEST_SUM, 1), strict=True)
        y = reduce(add, (scaled_mm(*part, a_scale, b_scale, None, left, right, shape, torch.float32, gain) for part in parts))
        return (y if bias is None else y.add_(bias)).to(dtype)
    in_right = right if fits_epilogue(right) and b_t.shape[0] == shape[1] else None
    in_left = left if fits_epilogue(left) and _left_in_epilogue(a, b_t, shape[0], dtype) else None
    if in_left == left and in_right == right:
        return _product(a, b_t, a_scale, b_scale, gain, bias, in_left, in_right, shape[0], dtype)
    # What the epilogue cannot undo is undone in a pass of its own. The bias follows, and where that pass rotates columns, the
    # gain.
    rows = shape[0] if in_left else a.shape[0]
    in_gain, gain = (gain, None) if in_right == right else (None, gain)
    # Still rotated, or before the gain, a result may be outside of float16's range.
    wide = torch.float32 if dtype == torch.float16 else dtype
    y = _product(a, b_t, a_scale, b_scale, in_gain, None, in_left, in_right, rows, wide)
    y = unrotate(y, None if in_left else left, None if in_right else right, shape, wide)
    y = y if gain is None else y.mul_(gain)
    y = y if bias is None else y.add_(bias)
    return y if wide == dtype else y.to(dtype)


def _left_in_epilogue(a: torch.Tensor, b_t: torch.Tensor, rows: int, dtype: torch.dtype) -> bool:
    """Whether an epilogue undoes a rotation on the left. It does so without spilled registers only on SM 9.0, for floating
    codes and tiles of 128×256; elsewhere a pass of its own is faster, but for float32, which only PyTorch rotates."""
    if a.device.type != "cuda" or dtype == torch.float32:
        return True
    return (
        is_hopper(a.device)
        and a.dtype != torch.int8
        and triton.cdiv(rows, 128) * triton.cdiv(b_t.shape[0], 256) >= _multiprocessors(a.device)
    )


def _product(a, b_t, a_scale, b_scale, gain, bias, left, right, rows: int, dtype: torch.dtype) -> torch.Tensor:
    a, b_t = _readable(a), _readable(b_t)
    a_scale, b_scale, gain, bias = dense(a_scale), dense(b_scale), dense(gain), dense(bias)
    out = a.new_empty((rows, b_t.shape[0]), dtype=dtype)
    if gain is None and _vendor_is_faster(a, b_t, a_scale, b_scale, bias, left or right, dtype):
        a_scale, b_scale = (
            _ones(n, a.device) if s is None else s for s, n in ((a_scale, a.shape[0]), (b_scale, b_t.shape[0]))
        )
        VendorProduct()(a, b_t, a_scale, b_scale, out)
        return out
    if a.shape[1] == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    launch, matrices = _plan(
        Matrix.of(a), Matrix.of(b_t), rows, _kind(a_scale), _kind(b_scale), gain is not None,
        None if bias is None else bias.dtype, left, right, dtype,
    )  # fmt: skip
    launch(a, b_t, out, *(out if t is None else t for t in (a_scale, b_scale, gain, bias, *matrices)))
    return out


class VendorProduct:
    """cuBLAS's product with row and column scales, called like a :class:`Launch`.

    By a private name, since the public one, ``torch.nn.functional.scaled_mm``, cannot write to a given ``out``.
    """

    constants: dict[str, Any] = {}  # noqa: RUF012 as a launch has them

    def __call__(self, a, b_t, a_scale, b_scale, out) -> None:
        if not isinstance(a, torch.Tensor):
            return a.record(self, (a, b_t, a_scale, b_scale, out))
        scales = {"scale_a": a_scale.unsqueeze(1), "scale_b": b_scale.unsqueeze(0)}
        torch._scaled_mm(a, b_t.t(), **scales, out_dtype=out.dtype, use_fast_accum=True, out=out)

    def source(self) -> str:
        return "halo_tensor.ops.scaled_mm.VendorProduct()"


def _vendor_is_faster(a, b_t, a_scale, b_scale, bias, rotation, dtype) -> bool:
    """cuBLAS multiplies fp8 with row and column scales 3–15 % faster where the contraction is short. But choosing its kernel
    takes the CPU 25 µs more than a launch of ours, every time, which products below this size do not gain (docs/notes)."""
    (m, k), n = a.shape, b_t.shape[0]
    return (
        a.dtype == b_t.dtype == torch.float8_e4m3fn
        and dtype == torch.bfloat16
        and rotation is None
        and bias is None
        and all(scale is None or scale.ndim == 1 for scale in (a_scale, b_scale))
        and m * n * k >= 2 * 10**10
        and 1024 <= k <= 8192
        and n % 16 == k % 16 == 0
        and a.is_contiguous()
        and b_t.is_contiguous()
        and is_hopper(a.device)
        and _has_vendor(a.device)
    )


@lru_cache
def _has_vendor(device: torch.device) -> bool:
    """Whether cuBLAS multiplies a small pair as :class:`VendorProduct` asks it to."""

    def multiply() -> bool:
        a, b_t = (torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device) for _ in range(2))
        VendorProduct()(a, b_t, _ones(16, device), _ones(16, device), a.new_empty((16, 16), dtype=torch.bfloat16))
        return True

    return CUBLAS.attempt(multiply) is not None


@lru_cache
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float32, device=device)


@lru_cache(maxsize=4096)
def _plan(a: Matrix, b_t: Matrix, rows, a_kind, b_kind, gained, bias_dtype, left, right, dtype) -> tuple[Launch, tuple]:
    """The launch for a product, and the matrices of its rotations."""
    (m, k), n, device = a.shape, b_t.shape[0], a.device
    integer = a.dtype == torch.int8
    check_device((INT8 if integer else FP8_E4M3,), device)
    multiprocessors = _multiprocessors(device)
    epilogue = {"A_SCALE": a_kind, "B_SCALE": b_kind, "GAIN": gained, "BIASED": bias_dtype is not None, "INTEGER": integer}
    if _in_gluon(a, b_t, left, right):
        planned = GLUON.attempt(hopper.plan, a, b_t, right, epilogue, multiprocessors, dtype, bias_dtype)
        if planned is not None:
            return planned
    if not has_tma(device):
        return sm80.plan(a, b_t, rows, left, right, epilogue, shared_memory(device), multiprocessors)
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    tile = tile_for(
        generation, m, n, integer, left is not None, right is not None, dtype.itemsize > 2, multiprocessors
    )  # fmt: skip
    programs = min(multiprocessors * tile.resident, triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n))
    matrix_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # Triton's interpreter has no 16-bit products
    matrices = (
        block_diagonal(left, tile.m, matrix_dtype, device, transposed=False) if left else None,
        block_diagonal(right, EDGE, matrix_dtype, device, transposed=True) if right else None,
    )
    constants = {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group, "PROGRAMS": programs, **epilogue,
        "LEFT": left is not None, "RIGHT": right is not None, "NORM": norm(left, right),
        "FLATTEN": tile.flatten, "PART": min(tile.part, tile.n),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tiles = Tiles((m, k), a.stride, (tile.m, tile.k)), Tiles((n, k), b_t.stride, (tile.n, tile.k))
    return Launch(scaled_mm_kernel, (programs,), (m, n, k, rows, n), constants, tiles), matrices


def _in_gluon(a: Matrix, b_t: Matrix, left: Rotation | None, right: Rotation | None) -> bool:
    return hopper is not None and hopper.suits(a, b_t, left, right, _multiprocessors(a.device))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _kind(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else 1 + scale.ndim


def _readable(codes: torch.Tensor) -> torch.Tensor:
    """``codes`` as a descriptor can read them: contiguous rows that begin at multiples of 16 bytes. 8-bit tensor cores take
    their operands in no other order, so a transposed view is transposed in memory first."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    if codes.stride(0) == 1:  # the transpose of a row-major matrix
        return transposed(codes.t())
    return codes.new_empty_strided(codes.shape, (aligned(codes.shape[1]), 1)).copy_(codes)
