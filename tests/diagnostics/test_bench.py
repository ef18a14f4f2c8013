"""``python -m halo_tensor bench``: what it prints and returns. It runs the reference on a CPU, with made-up times."""

import argparse
import runpy
import sys
from functools import partial

import pytest
import torch
from torch import nn

from halo_tensor import halo_config
from halo_tensor.diagnostics import bench
from tests.helpers.recording import OpLog

CPU = torch.device("cpu")
PATHS = {"launcher": "on", "gluon": "off: no GPU of compute capability 9.0"}
FOUND = {"torch": "2.13", "triton": "3.6.0", "halo_tensor": "0.3.0", "fast paths": PATHS}


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA B300 SXM6 AC")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 3))
    monkeypatch.setattr(bench, "driver", lambda: "580.1")
    monkeypatch.setattr(bench, "environment", lambda: FOUND)
    monkeypatch.setattr(bench, "source_commit", lambda: "abc")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def small(compiled: bool = False) -> list[bench.Case]:
    block = bench.Case("block", partial(bench.Block, 256, 512, 2, 1), 256, 256, compiled)
    return [block, bench.Case("linear", partial(nn.Linear, 256, 384, bias=False), 256, 384, compiled)]


def test_the_command_refuses_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["halo_tensor", "bench"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("halo_tensor", run_name="__main__")
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and err == f"{bench.NO_GPU}\n" and not out


@pytest.mark.parametrize("compiled", [False, True])
def test_the_table_has_times_and_errors(card, monkeypatch, capsys, compiled):
    times = iter([4.0, 2.0, 3.0, 2.0])
    products = []

    def milliseconds(step):
        with OpLog() as log:
            step()
        products.append(log.products())
        return next(times)

    monkeypatch.setattr(bench, "milliseconds", milliseconds)
    with torch.compiler.set_stance("force_eager"):
        assert bench.bench(halo_config(1, "int8"), CPU, arguments("--batch", "2", "--length", "32"), small(compiled)) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "NVIDIA B300 SXM6 AC (compute capability 10.3), driver 580.1, torch 2.13, Triton 3.6.0, halo_tensor 0.3.0 (commit abc); 2×32 tokens\n\n"
        "Fast paths: gluon, off: no GPU of compute capability 9.0\n\n"
        "| forward + backward | | bf16 ms | int8 HALO-1 ms | × bf16 | error |\n"
    )
    how = "compiled" if compiled else "eager"
    assert f"| block | {how} | 4.000 | 2.000 | 2.00 |" in out and f"| linear | {how} | 3.000 | 2.000 | 1.50 |" in out
    errors = [float(line.split("|")[6].strip(" %")) for line in out.splitlines() if how in line]
    assert all(0.5 < error < 5 for error in errors) and "wrong" not in out and "Without a row" not in out
    assert products == [[], [torch.int8] * 21, [], [torch.int8] * 3], "three products of each layer under the recipe alone"


def test_a_wrong_result_is_marked_and_fails_the_command(card, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *_: (1.0, 1.0, float("inf")))
    assert bench.bench(halo_config(1, "int8"), CPU, arguments(), small()) == 1
    assert "| inf % **wrong** |" in capsys.readouterr().out
    exact = torch.ones(3)
    assert bench._relative_error(exact * 1.25, exact) == 0.25
    assert bench._relative_error(exact * float("nan"), exact) == float("inf")


def test_cases_without_a_row_are_listed_with_the_reason(card, monkeypatch, capsys):
    def measure(case, *_):
        if case.name == "block":
            raise RuntimeError("does not run\nmore")
        return 2.0, 1.0, 0.01

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.bench(halo_config(0, "fp8"), CPU, arguments(), small()) == 0
    out = capsys.readouterr().out
    assert "- block, eager: RuntimeError: does not run\n" in out and "| linear | eager | 2.000 | 1.000 | 2.00 | 1 % |" in out
    assert bench.bench(halo_config(0, "fp8"), CPU, arguments("--seconds", "-1"), small()) == 1
    assert "- linear, eager: -1 s were over" in capsys.readouterr().out


def test_the_recipe_is_chosen_by_the_gpu(card, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(bench, "bench", lambda config, *_: ran.append(config) or 0)
    for words in ((), ("--level", "2"), ("--dtype", "fp6")):
        assert bench.run(arguments(*words)) == 0
    assert ran == [halo_config(0, "fp8"), halo_config(2, "int8"), halo_config(1, "fp6")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 3090")
    assert bench.run(arguments()) == 0 and ran[-1] == halo_config(1, "int8")
    assert bench.run(arguments("--dtype", "fp8")) == 2 and len(ran) == 4
    assert "cannot multiply fp8_e4m3" in capsys.readouterr().err
    assert [case.compiled for case in bench.cases()] == [False] * 4 + [True] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_table_on_a_gpu(capsys):
    todo = [*small(), *small(compiled=True)]
    assert (
        bench.bench(halo_config(1, "int8"), torch.device("cuda", 0), arguments("--batch", "1", "--length", "512"), todo) == 0
    )
    out = capsys.readouterr().out
    assert out.count("eager") == out.count("compiled") == 2 and "driver unknown" not in out
