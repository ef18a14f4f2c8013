"""bench/experts.py on a CPU: all contenders but torchao's compute the same layer."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path[1:1] = [str(Path(__file__).parents[2] / "bench"), str(Path(__file__).parents[2] / "examples")]
bench = __import__("experts")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("gate", [m.gate for m in bench.MODELS.values()][:2], ids=str)
def test_contenders_agree(monkeypatch, rows, gate):
    """The gradients of X that a step leaves are alike."""
    model, args = (
        bench.Model(4, 2, 64, 32, gate),
        bench.parse_args(["--no-compile", "--tokens", "40", *["--rows", "--written"] * rows]),
    )
    found = {}
    for name in [c for c in bench.CONTENDERS if c != "torchao-fp8"]:
        torch.manual_seed(0)
        step = bench.step_of(name, model, args, "cpu", torch.bfloat16)
        step()
        x = next(c.cell_contents for c in step.__closure__ if getattr(c.cell_contents, "requires_grad", False))
        found[name] = x.grad.float()
    for name, gradient in found.items():
        error = (gradient - found["bf16"]).norm() / found["bf16"].norm()
        assert error < (0.12 if "fp8" in name else 0.05), name
        assert (error > 0.004) == (not name.startswith("bf16"))


def test_weights_of_a_frozen_layer_take_half():
    model, args = bench.Model(4, 2, 64, 32), bench.parse_args(["--no-compile", "--tokens", "8"])
    sizes = {c: bench.step_of(c, model, args, "cpu").bytes for c in ("bf16", "halo1-int8", "halo1-int8, frozen")}
    assert sizes["halo1-int8, frozen"] < 0.55 * sizes["bf16"] < sizes["bf16"] < sizes["halo1-int8"]


def test_operations_are_those_of_the_formula():
    assert bench.MODELS["qwen"].operations(8192) == 3 * 618475290624
