"""The tables of benchmarks that need a GPU, from made-up times: rates, ratios, and notes on what failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT / "examples")]
import accuracy  # noqa: E402
import contenders  # noqa: E402
import gain  # noqa: E402
import gemm  # noqa: E402
import hot  # noqa: E402
import linear  # noqa: E402
import memory  # noqa: E402
import rotation  # noqa: E402

from halo_tensor import HaloWeight  # noqa: E402
from tests.helpers.small_models import small_llama  # noqa: E402


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


def fail():
    raise RuntimeError("does not run\nmore")


def table(module, monkeypatch, folder: Path, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", [module.__file__, "--folder", str(folder), "--name", "t", *options])
    module.main()
    return json.loads((folder / "t.json").read_text())


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def test_a_peers_tuner_tries_all_that_it_knows(monkeypatch):
    """That of torchao's int8 product, each configuration for as long as the notes of a table say."""
    kernel = pytest.importorskip("torchao.prototype.quantized_training.int8_mm")._scaled_int8_mm_kernel
    ran, timed = [], []

    def do_bench(call, warmup, rep, quantiles):
        timed.append({"warmup": warmup, "rep": rep})
        call()
        return [1.0 / len(timed)] * 3

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel.fn, "run", lambda *args, **options: ran.append(options))
    monkeypatch.setitem(vars(kernel), "do_bench", None)
    contenders.convert(nn.Sequential(nn.Linear(16, 16, bias=False)), "torchao-int8")
    codes, scale = torch.ones(16, 16, dtype=torch.int8), torch.ones(16)
    kernel.run(codes, codes, codes, scale, scale, *[16] * 3, *[16, 1] * 3, grid=(1,))
    assert timed == [contenders.TUNING] * len(kernel.configs) and len(timed) > 20
    assert ran[:-1] == [{"grid": (1,)} | config.all_kwargs() for config in kernel.configs]
    assert ran[-1] == ran[-2], "the fastest"


def test_rates_of_products(monkeypatch):
    times = {"bf16 torch.mm": 4.0, gemm.VENDOR["fp8"]: 2.0, "fp8 ours": 1.0, gemm.VENDOR["int8"]: 3.0, "int8 ours": 1.5}
    products = [(name, name[:4].strip(), lambda name=name: name) for name in times] + [("int8 broken", "int8", fail)]
    monkeypatch.setattr(gemm, "products", lambda m, n, k: products)
    monkeypatch.setattr(gemm, "do_bench_cudagraph", lambda f, rep, return_mode: times[f()])
    why_not = {}
    rows = gemm.measure("1000x2000x494500", 1, why_not)  # 1978 GFLOP
    assert why_not == {("1000×2000×494500", "int8 broken"): "RuntimeError: does not run"}
    assert column(rows, "TFLOP/s") == [494, 989, 1978, 659, 1319] and column(rows, "µs") == [4e3, 2e3, 1e3, 3e3, 1.5e3]
    assert column(rows, "× vendor") == [None, "1.00", "2.00", "1.00", "2.00"]
    assert column(rows, "% of ceiling") == [50, 50, 100, 33, 67]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert set(column(gemm.measure("10x10x10", 1, {}), "% of ceiling")) == {None}


def test_rates_of_passes(monkeypatch):
    codes = torch.empty(100, 100, dtype=torch.int8)
    made = {rotation.INDUCTOR: lambda x: (codes, None), "both": lambda x: (codes, codes.t()), "broken": lambda x: fail()}
    monkeypatch.setattr(rotation, "DEVICE", "cpu")
    monkeypatch.setattr(rotation, "contenders", lambda format, m, k: made)
    times = {"copy": 0.5, rotation.INDUCTOR: 1.0, "both": 2.0}
    order = iter(times.values())
    monkeypatch.setattr(rotation, "do_bench_cudagraph", lambda f, rep, return_mode: rotation.TURNS * next(order) * 1e-3)
    why_not = {}
    rows = rotation.measure("100x100", ["int8"], 1, why_not)
    assert column(rows, "GB/s") == [80, 30, 20] and column(rows, "µs") == [0.5, 1.0, 2.0]  # reads 20 kB; writes 20, 10, 20
    assert column(rows, "× Inductor's") == [None, "1.00", "2.00"] and column(rows, "% of copy") == [100, 38, 25]
    assert list(why_not) == [("100×100", "int8 broken")]


def test_speeds_of_a_layer(monkeypatch, tmp_path):
    times = {"bf16": (4.0, 6.0, 1.0), "halo1-int8": (2.0, 2.0, 0.5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        linear.results, "made", lambda: {"date": "2026-01-01", "device": "d", "halo_tensor": "0.1.0", "command": "c"}
    )
    monkeypatch.setattr(linear, "measure", lambda name, *_: times[name] if name in times else fail())
    monkeypatch.setattr(linear.chart, "draw", lambda *_: None)
    options = ["--shapes", "1000x2000", "--tokens", "1000", "--contenders"]
    record = table(linear, monkeypatch, tmp_path, *options, "bf16", "halo1-int8", "torchao-int8")
    rows = record["rows"]
    assert column(rows, "× bf16") == ["1.00", "2.00"] and column(rows, "× bf16 (plain)") == ["1.00", "3.00"]
    assert column(rows, "TFLOP/s") == [3, 6]  # three products of 4 GFLOP
    assert record["missing"]["torchao-int8"] == "RuntimeError: does not run", "though it was the last"
    assert record["missing"]["halo0-fp8"] == linear.results.NOT_ASKED
    assert table(linear, monkeypatch, tmp_path, *options, "halo1-int8")["rows"][0]["× bf16"] is None


def test_speeds_with_hot(monkeypatch, tmp_path):
    made_up = {"bf16": (4.0, 3.0), "hot": (2.0, 1.0), "fp32": (16.0, 12.0), "hot fp32": (8.0, 3.0)}
    by_contender = {hot.CONTENDERS[name]: times for name, times in made_up.items()}
    monkeypatch.setattr(hot, "measure_layer", lambda of, *_: by_contender[of] if of in by_contender else fail())
    record = table(hot, monkeypatch, tmp_path, "--tiny", "--models", "--contenders", "hot", *made_up, "luq")
    rows = record["rows"]
    assert column(rows, "ms") == [2.0, 4.0, 2.0, 16.0, 8.0]
    assert column(rows, "× bf16") == ["2.00", "1.00", "2.00", "0.25", "0.50"]
    assert column(rows, "× fp32") == ["8.00", "4.00", "8.00", "1.00", "2.00"]
    assert column(rows, "backward × fp32") == ["12.00", "4.00", "12.00", "1.00", "4.00"]
    assert record["missing"]["luq"] == "RuntimeError: does not run"
    alone = table(hot, monkeypatch, tmp_path, "--tiny", "--models", "--contenders", "hot")["rows"][0]
    assert alone["× bf16"] is alone["× fp32"] is alone["backward × fp32"] is None


def test_hots_contenders_run_in_their_own_precision(monkeypatch, tmp_path):
    found = {}

    def of_layer(contender, *_):
        found[contender.dtype, contender.tf32] = torch.backends.cuda.matmul.allow_tf32
        return 1.0, 1.0

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(hot, "measure_layer", of_layer)
    try:
        table(hot, monkeypatch, tmp_path, "--tiny", "--models", "--contenders", "bf16", "fp32", "fp32 TF32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    float32 = torch.float32
    assert found == {(torch.bfloat16, False): False, (float32, False): False, (float32, True): True}


def test_memory_is_less_than_bf16s(monkeypatch, tmp_path):
    def measure(model, contender, args):
        if contender == "halo1-int8":
            raise ValueError("converts no convolution\nmore")
        return {"model": "vit", "contender": contender, "saved by them, MiB": {"bf16": 4.0, "hot": 1.0}[contender]}

    monkeypatch.setattr(memory, "measure", measure)
    record = table(memory, monkeypatch, tmp_path, "--tiny", "--models", "vit", "--contenders", "bf16", "hot", "halo1-int8")
    assert column(record["rows"], "× bf16") == ["1.000", "0.250"]
    assert record["missing"]["halo1-int8"] == "ValueError: converts no convolution"


def test_live_bytes():
    with memory.LiveBytes() as live:
        x = torch.empty(1000)  # 4000 bytes
        y = x + 1
        del x
        z = y.view(10, 100)
    assert live.peak == 8000 and z.shape == (10, 100)
    with memory.LiveBytes() as live:
        for _ in range(3):
            torch.empty(1000)
    assert 4000 <= live.peak <= 8000


def test_fidelity_against_float32(monkeypatch, tmp_path):
    exact, other = torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 0.0]).double()
    answers = iter([(2.0, exact, 400), (2.25, other, 100)])
    monkeypatch.setattr(accuracy, "load_model", lambda *_: (None, None))
    monkeypatch.setattr(accuracy, "load_tokens", lambda tokenizer, data, limit: torch.arange(limit))
    monkeypatch.setattr(accuracy, "gradient", lambda *_: next(answers))
    for name in ("quantize_", "dequantize_"):
        monkeypatch.setattr(accuracy, name, lambda *_: None)
    (row,) = table(accuracy, monkeypatch, tmp_path, "--recipes", "int8 HALO-1")["rows"]
    assert (row["gradient cosine"], row["gradient error"]) == ("0.6000", "0.800")  # 9 / (5 · 3), 4 / 5
    assert row["change of the loss"] == "+0.2500" and row["saved for backward"] == "0.500× bf16's"  # a quarter of float32's


def test_the_gradient_does_not_depend_on_the_batch():
    model = small_llama(300)
    rows = torch.randint(300, (5, 32))
    loss, whole, _ = accuracy.gradient(model, rows, 5)
    parts = accuracy.gradient(model, rows, 2)
    assert parts[0] == pytest.approx(loss, rel=1e-4) and (parts[1] - whole).norm() < 1e-3 * whole.norm()
    projections = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert whole.dtype == torch.float64 and len(whole) == projections > 0


def small():
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)).bfloat16()


@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if "no-codes" not in name])
def test_every_contender_trains_and_is_not_bf16(name):
    torch.manual_seed(0)
    model, exact, x = small(), small(), torch.randn(2, 32, 64).bfloat16()
    exact.load_state_dict(model.state_dict())
    contenders.convert(model, name)
    with torch.compiler.set_stance("force_eager"):
        y, expected = model(x), exact(x)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected.square().mean().backward()
    pairs = [(y, expected), *((p.grad, q.grad) for p, q in zip(model.parameters(), exact.parameters(), strict=True))]
    error, *of_gradients = (((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
    if name == "bf16" or name in contenders.RECIPES:  # HOT's forward is bf16's
        assert error == 0 and (max(of_gradients) == 0) == (name == "bf16")
    else:
        assert 0.001 < error < 0.15
    if name == contenders.FP8_ALL_GATHER:
        assert all(hasattr(p, "fsdp_pre_all_gather") for p in model.parameters())
        contenders.precompute_scales(name, model)


def test_weights_are_quantised_anew_where_there_is_no_optimiser():
    model, codes = small(), []
    contenders.convert(model, "halo1-int8")
    requantize = HaloWeight.requantize
    try:
        HaloWeight.requantize = lambda weight, *args: codes.append(weight)
        contenders.requantize(model)
    finally:
        HaloWeight.requantize = requantize
    assert codes == [model[0].weight, model[1].weight] or len(codes) == 2


def test_fsdp_steps_on_a_cpu(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "bench/fsdp.py", "--tiny"]
    run += ["--contenders", "halo1-int8", "bf16", "--folder", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "fsdp.json").read_text())
    ours, bf16 = record["rows"]
    assert (
        ours["× bf16"] is None and bf16["× bf16"] == "1.00" and 0 < float(ours["gathered GiB"]) <= float(bf16["gathered GiB"])
    )
    assert record["command"].startswith("torchrun --standalone --nproc-per-node 2 bench/fsdp.py --tiny")
    assert "torchao-rowwise" in record["missing"] and "halo1-int8" not in record["missing"]


def test_predicted_and_measured_speeds(monkeypatch, tmp_path):
    times = {"bf16": 4.0, "halo1-int8": 2.5, "bf16-frozen": 3.0, "halo1-int8-frozen": 1.5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gain.results, "made", lambda: {"date": "2026-01-01", "device": "d", "halo_tensor": "0.1.0", "command": "c"}
    )
    monkeypatch.setattr(gain.linear, "measure", lambda name, *_, **__: (times[name], None, 0.0) if name in times else fail())
    monkeypatch.setattr(gain, "predicted", lambda name, *_: 1.84 if name.endswith("frozen") else 1.6)
    options = ["--shapes", "512x1024", "--contenders", *times, "hot"]
    record = table(gain, monkeypatch, tmp_path, *options)
    rows = record["rows"]
    assert column(rows, "× bf16") == ["1.00", "1.60", "1.00", "2.00"] and column(rows, "predicted")[1::2] == ["1.60", "1.84"]
    assert column(rows, "error") == ["+0 %", "+0 %", "+0 %", "-8 %"] and column(rows, "µs")[1] == 2500
    assert record["missing"]["hot"] == "RuntimeError: does not run"
    why_not = {}
    assert not list(gain.rows_of(gain.parse_args([*options, "--seconds=-1"]), why_not)) and not why_not, "no time is left"
