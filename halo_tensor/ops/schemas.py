"""The schemas of ``torch.ops.halo.*``, how a rotation crosses the dispatcher, and which kind of mode listens there."""

import os
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from halo_tensor.recipe import Rotation

library = torch.library.Library("halo", "DEF")
#: Triton's interpreter runs the kernels on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: tensors of which a kernel may compute what it quantises: see producers
PRODUCER_INPUTS = 3
_KEYS = torch._C._TorchDispatchModeKey  # private, as of torch 2.11–2.15
_TRACING_MODES = (_KEYS.FAKE, _KEYS.FUNCTIONAL, _KEYS.PROXY)
for _schema in (
    "rotate_quantize(Tensor x, int[] left, int[] right, str format, str scale, Tensor? fold_rows, Tensor? fold_columns, "
    "bool rows, bool columns, Tensor? seed, Tensor? gain) -> (Tensor codes, Tensor codes_t, Tensor scales)",
    "rotate_quantize_(Tensor x, int[] left, int[] right, str format, str scale, Tensor(a!) codes, Tensor(b!) scales, "
    "Tensor? gain) -> ()",
    "requantize_(Tensor[] xs, int[] left, int[] right, str format, str scale, Tensor(a!)[] codes, Tensor(b!)[] scales, "
    "Tensor[] gains) -> ()",
    "quantize_pair(Tensor x, int[] left, str format, Tensor? fold_columns, Tensor? fold_rows) "
    "-> (Tensor codes, Tensor codes_t, Tensor row_scales, Tensor column_scales)",
    "quantize_pairs(Tensor a, Tensor b, str format, Tensor columns_a, Tensor rows_a, Tensor columns_b, Tensor rows_b) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "scaled_mm(Tensor a, Tensor b_t, Tensor? a_scale, Tensor? b_scale, Tensor? bias, int[] left, int[] right, "
    "SymInt[] shape, ScalarType dtype, Tensor? gain) -> Tensor",
    "rotate(Tensor x, int[] left, int[] right) -> Tensor",
    "unrotate(Tensor x, int[] left, int[] right, SymInt[] shape) -> Tensor",
    "pack_rows_(Tensor codes, str format, Tensor(a!) packed) -> ()",
    "unpack_rows(Tensor packed, str format) -> Tensor",
):
    library.define(_schema, tags=(torch.Tag.needs_exact_strides,))


def runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def is_symbolic() -> bool:
    """Whether ops are traced: values do not exist, or stand for those of a later run. Code must not depend on them, nor keep
    the tensors. True in FakeTensorMode and make_fx and while torch.compile traces; false in modes that only watch ops run."""
    return is_recorded() and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)


def is_recorded() -> bool:
    """Whether any dispatch mode is active: it may count ops, or match them with those of another run (FLOP counters, selective
    checkpointing, tracing), so every call must issue all of its ops, and take no result from another call."""
    return torch._C._len_torch_dispatch_stack() > 0


@cache
def fingerprint() -> str:
    """Of the library's sources: what was compiled with others must not be taken from a cache."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def encode(rotation: Rotation | None) -> list[int]:
    """Empty for none, else [block, seed], with seed −1 for no signs, or [block, seed, rank]."""
    if rotation is None:
        return []
    code = [rotation.edge, -1 if rotation.seed is None else rotation.seed]
    return code if rotation.rank is None else [*code, rotation.rank]


def decode(code: list[int]) -> Rotation | None:
    return Rotation(code[0], None if code[1] < 0 else code[1], *code[2:]) if code else None
