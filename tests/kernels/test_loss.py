"""The kernels of a head's cross-entropy against the definition, in Triton's interpreter or on a GPU."""

import pytest
import torch

from halo_tensor.kernels import loss as kernels
from halo_tensor.kernels.quantize.codes import code_matrix
from halo_tensor.recipe import FP8_E4M3
from halo_tensor.reference import loss as reference
from halo_tensor.reference.loss import Objective
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE, runs_kernels

PLAIN = Objective()
EVERYTHING = Objective(scale=0.5, softcap=4.0, smoothing=0.1, z_loss=1e-2, ignore_index=3)
OBJECTIVES = [PLAIN, Objective(softcap=2.0), Objective(smoothing=0.2), Objective(scale=-2.0, z_loss=0.1), EVERYTHING]
#: tokens and columns: whole tiles, a part of one, a single row, a single column, more than a program holds of a row.
SHAPES = [(16, 128), (70, 200), (1, 130), (17, 1), (3, 5000)]

CASES = [*((shape, PLAIN) for shape in SHAPES), *((SHAPES[1], objective) for objective in OBJECTIVES[1:])]


@interpreter.runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=25)


def example(tokens: int, columns: int, objective: Objective, first: int = 256, dtype: torch.dtype = torch.float16):
    """Logits of one part from column ``first`` on, targets of which one is ignored and others lie in other parts, weights."""
    generator = torch.Generator().manual_seed(tokens + columns)
    logits = (4 * torch.randn(tokens, columns, generator=generator)).to(DEVICE, dtype)
    targets = torch.randint(first - columns, first + 2 * columns, (tokens,), generator=generator)
    targets[0] = first + columns - 1
    targets[tokens // 2] = objective.ignore_index
    weights = torch.rand(tokens, generator=generator) - 0.2
    return logits, targets.to(DEVICE), weights.to(DEVICE)


def statistics_of(logits, targets, first, objective) -> torch.Tensor:
    """Statistics of another part and of this one, by the definition; every target is found."""
    statistics = reference.fresh_statistics(len(targets), logits.device)
    reference.update_statistics_(statistics, logits.flip(0).roll(1, 1), targets, first + logits.shape[1], objective)
    reference.update_statistics_(statistics, logits, targets, first, objective)
    statistics[reference.CHOSEN].nan_to_num_(nan=1.0)
    return statistics


@runs_kernels
@pytest.mark.parametrize(("shape", "objective"), CASES, ids=str)
def test_statistics(shape, objective):
    logits, targets, _ = example(*shape, objective)
    expected, statistics = (reference.fresh_statistics(shape[0], logits.device) for _ in range(2))
    for part, first in ((logits, 256), (logits.flip(0), 256 + shape[1])):
        reference.update_statistics_(expected, part, targets, first, objective)
        kernels.update_statistics_(statistics, part, targets, first, objective)
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=2e-5 * shape[1] ** 0.5, equal_nan=True)
    assert statistics[reference.CHOSEN].isfinite().any() or shape[0] == 1, "a single token is ignored"


@runs_kernels
@pytest.mark.parametrize(("shape", "objective"), [*(case for case in CASES if case[0][1] < 5000), ((600, 70), PLAIN)], ids=str)
def test_codes(shape, objective):
    """Exponentials differ in the last bits, so that a code at a tie may be its neighbour."""
    logits, targets, weights = example(*shape, objective)
    statistics = statistics_of(logits, targets, 256, objective)
    factors, _ = reference.gradient_factors(statistics, targets, weights, 9999, objective)
    wide = code_matrix(logits, shape[0], shape[1] + 32, FP8_E4M3)
    codes = wide[:, 16 : 16 + shape[1]]
    made = codes, *kernels.quantize_gradient(logits, targets, factors, 256, objective, codes, True)
    expected = reference.quantize_gradient(logits, targets, factors, 256, objective)
    for codes, wanted in zip(made[:2], expected[:2], strict=True):
        assert codes.dtype == wanted.dtype == torch.float8_e4m3fn and codes.stride(0) % 16 == 0
        order, order_wanted = (ordered(c) for c in (codes, wanted))
        assert (order - order_wanted).abs().max() <= 1
        assert (order != order_wanted).float().mean() < 2e-2
        assert wanted.float().abs().max() == 448 or objective.softcap or objective.smoothing or shape[0] == 1
    torch.testing.assert_close(made[2], expected[2], rtol=1e-3, atol=1e-38)
    torch.testing.assert_close(made[3], expected[3], rtol=1e-4, atol=1e-5)
    assert (made[0][shape[0] // 2].float() == 0).all(), "the token is ignored"


def ordered(codes: torch.Tensor) -> torch.Tensor:
    """The place of each fp8 code among all codes in order."""
    bits = codes.contiguous().view(torch.int8).to(torch.int32)
    return torch.where(bits < 0, -(bits & 127), bits)


@runs_kernels
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_dense_gradient_in_the_memory_of_the_logits(objective):
    logits, targets, weights = example(70, 200, objective)
    factors, _ = reference.gradient_factors(statistics_of(logits, targets, 256, objective), targets, weights, 999, objective)
    expected = reference.gradient(logits, targets, factors, 256, objective)
    out = torch.empty_like(logits, dtype=torch.float32)
    kernels.dense_gradient(logits, targets, factors, 256, objective, out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    if DEVICE.type == "cuda":  # Triton's interpreter has one memory for each dtype of a pointer
        kernels.dense_gradient(logits, targets, factors, 256, objective, logits.view(torch.bfloat16))
        torch.testing.assert_close(logits.view(torch.bfloat16), expected.bfloat16(), rtol=1e-2, atol=1e-6)


@runs_kernels
def test_nan_and_inf_are_shown():
    logits, targets, weights = example(70, 200, PLAIN)
    logits[5, 7], logits[6, 3] = torch.nan, torch.inf
    statistics = reference.fresh_statistics(70, logits.device)
    kernels.update_statistics_(statistics, logits, targets, 256, PLAIN)
    factors, scale = reference.gradient_factors(statistics, targets, weights, 200, PLAIN)
    losses = reference.losses(statistics, targets, 200, PLAIN)
    assert not losses[5:7].isfinite().any() and scale[5:7].isnan().all()
    codes = code_matrix(logits, *logits.shape, FP8_E4M3)
    _, scales, _ = kernels.quantize_gradient(logits, targets, factors, 256, PLAIN, codes, False)
    assert scales.isnan().all(), "so that all products with either operand are NaN"
    assert DEVICE.type == "cpu" or codes[5:7].float().isnan().all()  # the interpreter knows no NaN of fp8


@runs_kernels
def test_columns_of_minus_inf_have_no_gradient():
    """Padded entries of a vocabulary may have a bias of −Inf."""
    logits, targets, weights = example(20, 200, PLAIN)
    logits[:, 100:] = -torch.inf
    targets.clamp_(max=300)
    statistics = reference.fresh_statistics(20, logits.device)
    kernels.update_statistics_(statistics, logits[:, 100:].contiguous(), targets, 356, PLAIN)
    kernels.update_statistics_(statistics, logits, targets, 256, PLAIN)
    assert statistics[reference.TOTAL].isfinite().all()
    factors, _ = reference.gradient_factors(statistics, targets, weights, 200, PLAIN)
    codes = code_matrix(logits, *logits.shape, FP8_E4M3)
    codes_t, scales, _ = kernels.quantize_gradient(logits, targets, factors, 256, PLAIN, codes, False)
    assert (codes_t[100:].float() == 0).all() and scales.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_scaling(factor):
    x = torch.randn(5, 1000, device=DEVICE)
    expected = x * factor
    kernels.scale_(x, torch.tensor(factor, device=DEVICE))
    assert torch.equal(x, expected)
