"""bench/generations.py on a CPU: its arithmetic by the reference, its tables from made-up times, its kernel in the interpreter."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT / "examples")]
import generations  # noqa: E402
import plain_product  # noqa: E402

from halo_tensor import quantize_  # noqa: E402
from halo_tensor.recipe import FP8_E4M3, INT8  # noqa: E402
from tests.helpers import interpreter  # noqa: E402
from tests.helpers.errors import relative_error, typical_error  # noqa: E402
from tests.helpers.interpreter import DEVICE, runs_kernels, runs_the_others  # noqa: E402
from tests.helpers.recording import OpLog  # noqa: E402

on_a_cpu = pytest.mark.skipif(interpreter.INTERPRETED, reason="needs no kernels")


@runs_the_others
def test_in_the_interpreter():
    interpreter.run(__file__, at_least=3)


@runs_kernels
@pytest.mark.parametrize("which", [0, 1, 2], ids=["Y", "E_X", "G"])
def test_the_plain_product(which):
    """Of operands in the three orders that a layer has, in tiles that meet in several groups."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the interpreter has no 16-bit products
    x, w, e = (torch.randn(*shape, dtype=dtype, device=DEVICE) for shape in ((320, 64), (96, 64), (320, 96)))
    a, b = generations.operands_of_bf16(x, w, e)[which]
    y = plain_product.multiply(a, b, plain_product.Tile(32, 32, 32, 4, 2))
    assert y.dtype == dtype and relative_error(y, a.double() @ b.double()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.fixture
def on_cpu(monkeypatch):
    """The bench with the reference's ops on a CPU and small data."""
    monkeypatch.setattr(generations, "DEVICE", "cpu")
    monkeypatch.setattr(generations, "TOKENS", 256)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for data in (generations.product_data, generations.layer_data):
        data.cache_clear()
    yield
    for data in (generations.product_data, generations.layer_data):
        data.cache_clear()


@on_a_cpu
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
def test_products_are_held_against_what_they_should_be(format):
    torch.manual_seed(0)
    x, w = torch.randn(256, 128).bfloat16(), torch.randn(384, 128).bfloat16()
    contenders = generations.product_contenders(x, w, format)
    assert len(contenders) == 3
    for name, contender in contenders.items():
        truth = generations.exact(x, w, contender.gain)
        with OpLog() as log:
            y = contender.multiply()
        assert log.products() == [torch.int8 if format is INT8 else torch.float8_e4m3fn] and y.dtype == torch.bfloat16
        assert 0.6 * typical_error(format) < generations.error(y, truth) < 2 * typical_error(format), name
        own = generations.error(y, generations.exact(*contender.codes, contender.gain))
        assert 1e-4 < own < 0.003, "bf16's rounding alone"
    assert [contender.gain is not None for contender in contenders.values()] == [False, False, True]
    assert len(contender.gain.unique()) == 5


@on_a_cpu
@pytest.mark.parametrize("name", generations.RECIPES)
def test_a_step_is_that_of_a_converted_layer(name):
    torch.manual_seed(0)
    config, layer = generations.RECIPES[name], nn.Linear(256, 384, bias=False).bfloat16()
    x, e = torch.randn(128, 256).bfloat16().requires_grad_(), torch.randn(128, 384).bfloat16()
    w = layer.weight.detach().clone()
    quantize_(layer, config)
    y = layer(x)
    expected = y, *torch.autograd.grad(y, [x, layer.weight], e)
    with OpLog() as log:
        found = generations.linear_step(config.recipe, x.detach(), w, e)
    assert len(log.products()) == 3 and torch.bfloat16 not in log.products()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@on_a_cpu
def test_which_have_a_time():
    assert all(generations.has_a_time(INT8, (major, 0)) for major in (8, 9, 10, 12))
    assert [generations.has_a_time(FP8_E4M3, (major, 0)) for major in (8, 9, 10, 12)] == [True, False, False, True]
    assert [*generations.recipes(80)] == ["int8 HALO-1", "int8 HALO-2"] and len(generations.recipes(89)) == 3


@on_a_cpu
def test_tables_from_made_up_times(on_cpu, monkeypatch, tmp_path):
    compiled: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(generations, "running_as", lambda target: nullcontext())
    monkeypatch.setattr(generations, "compile_all", lambda target, *_: compiled.append(target))
    monkeypatch.setattr(generations, "sweep", lambda *_: plain_product.TILES[0])
    monkeypatch.setattr(plain_product, "multiply", plain_multiply)
    monkeypatch.setattr(
        generations.results, "made", lambda: {"date": "2026-01-01", "device": "d", "halo_tensor": "0.3.0", "command": "c"}
    )
    monkeypatch.setattr(generations, "median", lambda f, reps: 4e-3 if "plain" in repr(f) or "bf16" in repr(f) else 2e-3)
    argv = ["generations.py", "--folder", str(tmp_path), "--name", "t", "--shapes", "256x384x128", "--layers", "256x512"]
    monkeypatch.setattr(sys, "argv", argv)
    generations.main()
    assert compiled == [80, 86, 89]
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["target"] for row in rows] == ["sm_80"] * 4 + ["sm_86"] * 4 + ["sm_89"] * 7
    bf16, int8 = rows[:2]
    assert (bf16["× bf16"], int8["× bf16"], bf16["tile"], int8["tile"]) == ("1.00", "2.00", "128×128×64, 4, 3", None)
    assert (bf16["µs"], bf16["TFLOP/s"], int8["µs"], int8["TFLOP/s"]) == (4, 6, 2, 13), "25 MFLOP"
    assert 0.1 < bf16["error, %"] < 0.3 and 0.7 < int8["error, %"] < 2 and 0.05 < int8["kernel's, %"] < 0.3
    fp8 = rows[-1]
    assert fp8["contender"] == "fp8, un-rotated, with gain" and fp8["µs"] is fp8["TFLOP/s"] is None and fp8["error, %"] > 2
    layers = json.loads((tmp_path / "t_linear.json").read_text())["rows"]
    assert [row["contender"] for row in layers[-4:]] == [generations.BF16, *generations.RECIPES]
    assert [row["× bf16"] for row in layers[-4:]] == ["1.00", "2.00", "2.00", None] and layers[-1]["ms"] is None
    assert layers[-3]["TFLOP/s"] == 101 and all(0.5 < layers[-3][key] < 3 for key in ("error of Y, %", "of E_X, %", "of G, %"))
    assert "nothing here was measured on a GPU of that target" in (tmp_path / "t.md").read_text()


def plain_multiply(a, b, tile):
    return a @ b


@on_a_cpu
def test_what_fails_is_named(on_cpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("does not run\nmore")

    monkeypatch.setattr(generations, "sweep", fail)
    monkeypatch.setattr(generations, "scaled_mm", fail)
    why_not: dict = {}
    assert generations.product_rows(80, "256x384x128", (9, 0), 1, why_not) == []
    assert why_not == dict.fromkeys(
        [
            ("sm_80", "256×384×128", name)
            for name in (generations.BF16, "int8", "int8, un-rotated", "int8, un-rotated, with gain")
        ],
        "RuntimeError: does not run",
    )
    why_not.clear()
    monkeypatch.setattr(generations, "median", lambda f, reps: 2.0)
    rows = generations.linear_rows(80, "256x256", (9, 0), 1, why_not)
    assert [row["× bf16"] for row in rows] == [None, None] and list(why_not) == [("sm_80", "256x256", generations.BF16)]


@on_a_cpu
def test_tiles_that_do_not_fit_are_left_out(monkeypatch):
    needed = dict(zip(plain_product.TILES, (50, 60, 100, 101, 200), strict=True))
    tried: list = []

    def time(f, rep, return_mode):
        f()
        return -len(tried)

    monkeypatch.setattr(plain_product, "shared_memory", lambda a, b, tile: needed[tile])
    monkeypatch.setattr(plain_product, "multiply", lambda a, b, tile: tried.append(tile))
    monkeypatch.setattr(plain_product, "do_bench_cudagraph", time)
    a = torch.empty(256, 256)
    assert plain_product.fastest(a, a, 100, 1) == plain_product.TILES[2] and tried == [*plain_product.TILES[:3]]


@on_a_cpu
def test_all_is_compiled_before(on_cpu, monkeypatch):
    ran: list = []
    monkeypatch.setattr(plain_product, "shared_memory", lambda a, b, tile: ran.append((a.stride(), b.stride(), tile)))
    monkeypatch.setattr(generations, "scaled_mm", lambda *args: ran.append(args[0].dtype))
    monkeypatch.setattr(generations, "linear_step", lambda recipe, *_: ran.append(recipe))
    generations.compile_all(89, ["256x384x128"], ["256x512"])
    assert len({entry for entry in ran if isinstance(entry, tuple)}) == 3 * len(plain_product.TILES)
    assert ran.count(torch.int8) == ran.count(torch.float8_e4m3fn) == 3
    assert {config.recipe for config in generations.RECIPES.values()} <= {*ran}


@on_a_cpu
def test_arguments():
    args = generations.parse_args(["--targets", "80", "--layers"])
    assert args.targets == [80] and args.layers == [] and args.shapes == generations.SHAPES and args.name == "generations"
    with pytest.raises(SystemExit):
        generations.parse_args(["--targets", "90"])


@pytest.mark.gpu
@pytest.mark.skipif(not interpreter.GPU, reason="needs a GPU")
def test_on_a_gpu(monkeypatch, tmp_path):
    argv = ["generations.py", "--folder", str(tmp_path), "--targets", "80", "--shapes", "512x256x512", "--layers", "512x256"]
    monkeypatch.setattr(sys, "argv", [*argv, "--reps", "1"])
    generations.main()
    for name, contenders in (("generations", 4), ("generations_linear", 3)):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(record["rows"]) == contenders and not record["missing"]
        assert all(
            0.1 < value < 3 for row in record["rows"] for key, value in row.items() if "error" in key or key.startswith("of ")
        )
