"""Launches on whole rows: those of few rows give the codes of the others."""

import pytest
import torch

pytest.importorskip("triton")

from halo_tensor.kernels.launch import Launch
from halo_tensor.kernels.quantize import whole_rows
from halo_tensor.recipe import FP8_E4M3, INT8, Rotation
from tests.helpers import interpreter
from tests.helpers.interpreter import GPU, runs_kernels
from tests.helpers.kernel_checks import assert_same_bytes, gain_of, matrix

H = Rotation(16, 3)


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=6)


@runs_kernels
@pytest.mark.parametrize(
    ("width", "rotation", "of_a_program", "gained", "format"),
    [
        (64, None, 16, False, INT8),
        (576, H, 2, True, INT8),
        (576, H, 2, False, FP8_E4M3),
        (2048, Rotation(128), 1, True, FP8_E4M3),
        (512, Rotation(256), 1, False, INT8),
        (768, Rotation(768), 1, False, INT8),
    ],
    ids=str,
)
def test_a_row_has_the_same_codes_among_few(monkeypatch, width, rotation, of_a_program, gained, format):
    """And they come from more programs."""
    rows, launched, call = 70, [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, sizes, *t: (launched.append(sizes.grid[0]), call(self, sizes, *t))[1])
    x, gain = matrix(rows, width, torch.bfloat16 if GPU else torch.float32), gain_of(width) if gained else None
    codes, scales = whole_rows.quantize_rows(x, rotation, format, gain, None, None)
    assert launched.pop() < rows / of_a_program
    for few in (1, 7, 64) if GPU else (1, 7):
        first, of_first = whole_rows.quantize_rows(x[:few], rotation, format, gain, None, None)
        assert_same_bytes(first, codes[:few])
        assert torch.equal(of_first, scales[:few])
        assert launched.pop() == -(-few // of_a_program)


@pytest.mark.parametrize("rows", [1, 8, 9, 8000])
def test_the_class_of_few_rows(rows):
    planned = whole_rows.plan_whole_rows(4096, torch.bfloat16, torch.device("cpu"), None, INT8, False, False)
    alone = planned.variant((rows, 4096, 1, 4096)).launch.constants["ROWS"] == 1
    assert alone == (rows <= whole_rows.FEW["cpu"])
