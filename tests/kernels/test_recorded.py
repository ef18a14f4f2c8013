"""Functions whose launches are recorded and repeated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from halo_tensor.kernels import recorded
from halo_tensor.kernels.quantize import plan
from halo_tensor.kernels.recorded import Program, Recorded, record
from halo_tensor.kernels.rotate import transposed
from halo_tensor.kernels.stand_ins import Memory, StandIn, Unsupported
from halo_tensor.recipe import INT8, Rotation
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, GPU, runs_kernels


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=7)


def pair(numbers, x, fold):
    """Both operands of a gradient, which need zeroed memory for magnitudes, and a transpose of one of them."""
    rows, columns, row_scales, column_scales = plan.quantize_pair(x, None, INT8, None, fold)
    return rows, transposed(columns), None, row_scales, column_scales


def drawn(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) * 3


@runs_kernels
@settings(deadline=None, max_examples=8)
@given(m=st.integers(1, 90), k=st.integers(1, 5).map(lambda n: 32 * n), folds=st.booleans())
def test_a_program_gives_what_its_function_gives(m, k, folds):
    function = Recorded(pair)
    for call in range(4):
        x, fold = drawn(m, k), torch.rand(m, device=DEVICE) + 0.5 if folds else None
        made, expected = function((m, k, folds), x, fold), pair(None, x, fold)
        assert [None if y is None else (y.shape, y.stride(), y.dtype) for y in made] == [
            None if y is None else (y.shape, y.stride(), y.dtype) for y in expected
        ]
        assert all(y is z is None or torch.equal(y, z) for y, z in zip(made, expected, strict=True))
        assert isinstance(function.programs[m, k, folds], Program) == (call > 0)


@runs_kernels
def test_memory_of_one_program():
    """Temporary matrices do not overlap and begin at multiples of 16 bytes; results are allocations of their own."""
    program = record(lambda x: pair(None, x, None), (drawn(37, 96),))
    results = [r for r in program.results if r is not None]
    assert len(results) == 4 and program.results[2] is None
    spans = set()
    for step in program.steps:
        for a in step.arguments:
            if a.storage == 1 + len(results):
                nbytes = Memory(a.shape, a.stride, a.dtype, DEVICE).nbytes()
                assert a.offset % 16 == 0 and a.offset + nbytes <= program.temporary_bytes
                spans.add((a.offset, a.offset + nbytes))
    assert len(spans) >= 3, "magnitudes of rows, of columns, and the codes that are transposed"
    for a in spans:
        for b in spans - {a}:  # magnitudes of rows and of columns are parts of what is filled with zeros
            inside = any(outer[0] <= inner[0] and inner[1] <= outer[1] for outer, inner in ((a, b), (b, a)))
            assert a[1] <= b[0] or b[1] <= a[0] or inside


@runs_kernels
def test_other_pointers_and_devices_run_the_function(monkeypatch):
    def quantized(numbers, x):
        return plan.rotate_quantize(x, None, Rotation(32), INT8, "row", None, None, True, False)

    function = Recorded(quantized)
    memory = torch.randn(1 + 4 * 64, device=DEVICE, dtype=torch.bfloat16)
    aligned, misaligned = memory[:-1].view(4, 64), memory[1:].view(4, 64)
    for _ in range(2):
        function("4", aligned)
    assert torch.equal(function("4", misaligned)[0], quantized("4", misaligned)[0])
    ran = []
    monkeypatch.setattr(function, "function", lambda *args: ran.append(args) or (aligned,))
    function("4", aligned)
    assert not ran
    function("4", misaligned)
    assert len(ran) == 1


@runs_kernels
def test_functions_that_compute_run_every_time():
    calls = []

    def doubled(numbers, x):
        calls.append(type(x))
        return (x * 2,)

    function = Recorded(doubled)
    for _ in range(3):
        assert torch.equal(function(0, torch.ones(2, device=DEVICE))[0], torch.full((2,), 2.0, device=DEVICE))
    assert calls.count(StandIn) == 1 and calls.count(torch.Tensor) == 3
    assert record(lambda x: (x.t(),), (drawn(2, 32),)) is None, "a view is no new tensor"


@runs_kernels
def test_few_programs_are_remembered(monkeypatch):
    monkeypatch.setattr(recorded, "_REMEMBERED", 2)
    function = Recorded(lambda m, x: plan.rotate_quantize(x, None, None, INT8, "row", None, None, True, False))
    for m in (1, 2, 3, 4):
        for _ in range(2):
            function(m, drawn(m, 32))
    assert len(function.programs) <= 2


@runs_kernels
@pytest.mark.parametrize(("dtype", "value"), [(torch.int32, 0), (torch.float32, 1.0)])
def test_filled_memory(dtype, value):
    """Every call fills it anew, results too."""

    def function(x):
        filled = x.new_empty(5000, dtype=dtype)
        return (x.new_zeros(5000, dtype=dtype) if value == 0 else x.new_ones(5000, dtype=dtype), filled)

    with pytest.raises(Unsupported, match="sum"):
        StandIn.of_tensor([], drawn(2, 2)).sum()
    program = record(lambda x: function(x)[:1], (drawn(2, 2),))
    for _ in range(2):
        (made,) = program.repeat(drawn(2, 2))
        assert made.dtype == dtype and bool((made == value).all())
        made.fill_(7)


@pytest.mark.gpu
@runs_kernels
def test_hooks_of_triton_see_launches():
    import triton

    function, seen = Recorded(pair), []
    for _ in range(3):
        function(0, drawn(64, 64), None)
    assert all(step.bound for step in function.programs[0].steps) and GPU
    hook = lambda metadata: seen.append(metadata)  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        function(0, drawn(64, 64), None)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == len(function.programs[0].steps) - 1, "the function runs, in which PyTorch fills with zeros"
