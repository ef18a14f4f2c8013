"""Kernels that pack INT4 codes and unpack them, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from halo_tensor import ops
from halo_tensor.kernels.quantize import nibbles
from halo_tensor.reference import nibbles as reference
from tests.helpers import interpreter
from tests.helpers.generated_code import calls_ops, compiled, work
from tests.helpers.interpreter import DEVICE, runs_kernels
from tests.helpers.kernel_checks import examples

LAYOUTS = {
    "contiguous": lambda codes: codes,
    "padded": lambda codes: torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16), value=99)[:, : codes.shape[1]],
    "misaligned": lambda codes: torch.nn.functional.pad(codes, (1, 2), value=99)[:, 1 : codes.shape[1] + 1],
    "transposed": lambda codes: codes.t().contiguous().t(),
}


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=6)


def codes_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator).to(DEVICE)


@runs_kernels
@given(
    rows=st.sampled_from([0, 1, 5, 32, 70]),
    columns=st.sampled_from([0, 1, 2, 16, 31, 48, 255, 256, 257, 512, 531]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
@examples
def test_the_reference(rows, columns, layout, seed):
    """Rows and columns of one program and of several."""
    codes = LAYOUTS[layout](codes_of(rows, columns, seed))
    packed = nibbles.pack_nibbles(codes)
    expected = reference.pack_nibbles(codes)
    assert torch.equal(packed, expected) and packed.stride() == expected.stride()
    wide = torch.nn.functional.pad(packed, (0, 3), value=99)[:, : packed.shape[1]]
    for read in (packed, wide):
        unpacked = nibbles.unpack_nibbles(read, columns)
        assert torch.equal(unpacked, codes) and unpacked.dtype == torch.int8
        assert unpacked.stride() == reference.unpack_nibbles(expected, columns).stride()


@runs_kernels
@pytest.mark.parametrize("columns", [512, 531])
def test_nothing_is_written_between_rows(columns):
    memory = torch.full((70, 544), 99, dtype=torch.int8, device=DEVICE)
    codes, target = codes_of(70, columns), memory[:, :columns]
    packed = reference.pack_nibbles(codes)
    nibbles._plan(nibbles.unpack_nibbles_kernel, codes.device)((70, columns, packed.stride(0), 544), packed, target)
    assert torch.equal(target, codes) and (memory[:, columns:] == 99).all()


@runs_kernels
@pytest.mark.parametrize("columns", [48, 51])
def test_a_compiled_graph_launches_the_kernels(columns):
    def f(codes):
        packed = ops.pack_nibbles(codes)
        return packed, ops.unpack_nibbles(packed, codes.shape[1])

    codes = LAYOUTS["padded"](codes_of(20, columns))
    results, code = compiled(f, codes)
    assert work(code)[1] == ["pack_nibbles_kernel", "unpack_nibbles_kernel"]
    assert not calls_ops(code)
    for made, expected in zip(results, f(codes), strict=True):
        assert torch.equal(made, expected) and made.stride() == expected.stride()


@runs_kernels
def test_numbers_of_columns_that_are_symbols():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def f(codes, columns):
        return ops.unpack_nibbles(ops.pack_nibbles(codes), columns)

    for columns in (48, 51, 64):
        codes = codes_of(20, columns)
        made = f(codes, columns)
        assert torch.equal(made, codes) and made.stride() == nibbles.unpack_nibbles(ops.pack_nibbles(codes), columns).stride()
