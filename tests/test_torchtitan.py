"""The overrides for torchtitan: which layers they claim, and torchtitan's Trainer with its debug models, FSDP2 and compile."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from halo_tensor import halo_config
from halo_tensor.torchtitan import HaloLinear, globs_but, halo_experts, halo_linear

ROOT = Path(__file__).parents[1]
TARGET, EXPERTS = "halo_tensor.torchtitan.halo_linear", "halo_tensor.torchtitan.halo_experts"
#: torchtitan 0.3 trains with parts of PyTorch that came with 2.14.
trains = pytest.mark.skipif(not hasattr(dist, "set_timeout"), reason="torchtitan 0.3 trains with PyTorch 2.14 and newer")


def claimed(module: str, **options) -> tuple[set[str], set[str]]:
    """Names of the layers of a debug model that are converted, and of those that are not; numbers of layers are left out."""
    registry = pytest.importorskip(f"torchtitan.models.{module}")
    config = registry.model_registry("debugmodel").model
    apply_overrides(OverrideConfig(imports=[(TARGET, options)]), config)
    layers = {re.sub(r"\d+\.", "", name): type(cfg) for name, cfg, *_ in config.traverse(Linear.Config)}
    ours = {name for name, kind in layers.items() if kind is HaloLinear.Config}
    return ours, layers.keys() - ours


FEED_FORWARD = {f"layers.feed_forward.{name}" for name in ("w1", "w2", "w3")}


def test_layers_that_are_claimed():
    ours, others = claimed("llama3", dtype="int8")
    assert ours == FEED_FORWARD | {"layers.attention.qkv_linear.wqkv", "layers.attention.wo"} and others == {"lm_head"}
    ours, others = claimed("deepseek_v3", dtype="fp8")
    assert ours > FEED_FORWARD and "layers.moe.shared_experts.w2" in ours
    assert others == {"lm_head", "layers.moe.router.gate"}


def test_a_layer_that_cannot_follow_is_named(caplog):
    ours, others = claimed("gpt_oss", dtype="int8")
    assert ours == {"layers.attention.qkv_linear.wqkv"} and "layers.attention.wo" in others
    assert "leaves a ScaledBiasRowwiseLinear.Config [256, 4096] alone: its forward may be its own" in caplog.text


def test_experts_that_are_claimed(caplog):
    """Those of DeepSeek, Qwen3 and gpt-oss; others are named, with the reason."""
    for module, name in (("deepseek_v3", "GroupedExperts"), ("qwen3", "GroupedExperts"), ("gpt_oss", "GptOssGroupedExperts")):
        registry = pytest.importorskip(f"torchtitan.models.{module}")
        config = registry.model_registry("debugmodel_moe" if module == "qwen3" else "debugmodel").model
        apply_overrides(OverrideConfig(imports=[(EXPERTS, {"dtype": "int8"})]), config)
        found = {type(cfg).__qualname__ for _, cfg, *_ in config.traverse(GroupedExperts.Config)}
        assert found == {f"Halo{name}.Config"}
    config = GroupedExperts.Config(dim=128, hidden_dim=256, num_experts=4)
    experts = halo_experts(config, level=2).build()
    assert type(experts).__name__ == "HaloGroupedExperts" and experts.w2_EDF.recipe == halo_config(2, "int8").recipe
    assert halo_experts(config, recipe="mxfp8") is config
    assert "leaves a GroupedExperts.Config [4, 256, 128] alone: " in caplog.text
    narrow = GroupedExperts.Config(dim=128, hidden_dim=24, num_experts=4)
    assert halo_experts(narrow) is narrow and "alone: fewer than min_features=128 features on a side" in caplog.text


def test_globs_match_all_but_two_endings():
    from fnmatch import fnmatch

    globs = globs_but(".gate", "lm_head")
    for name in ("a.wo", "a.w1", "a.o_gate", "a.head", "x_head", "film_head2", "e", "d", "a.crate", "gate"):
        assert any(fnmatch(name, glob) for glob in globs), name
    for name in ("lm_head", "model.lm_head", "a.router.gate"):
        assert not any(fnmatch(name, glob) for glob in globs), name


def test_options():
    config = Linear.Config(in_features=128, out_features=256)
    assert halo_linear(config, level=2).halo == halo_config(2, "int8") and halo_linear(config, dtype="fp8").halo.level == 0
    layer = halo_linear(config, keep_codes=False).build()
    assert isinstance(layer, Linear) and layer.weight.operand is None
    for options, message in [
        ({"lvel": 1}, "halo has no key 'lvel'; its keys are"),
        ({"dtype": "int9"}, "dtype must be one of 'int8'"),
        ({"balance": 1}, "takes no balance, report and layers"),
        ({"skip": "w1"}, r"takes no skip, .* an override of your own chooses layers by @override\(fqns"),
        ({"memory": "low"}, "takes no memory=low, which is about a whole model"),
    ]:
        with pytest.raises(ValueError, match=message):
            halo_linear(config, **options)
        with pytest.raises(ValueError, match=message.replace("halo_linear", "halo_experts")):
            halo_experts(GroupedExperts.Config(dim=128, hidden_dim=256, num_experts=4), **options)


@pytest.mark.parametrize("option", [{"tp": 2}, {"spmd_backend": "full_dtensor"}])
def test_a_weight_that_would_become_a_dtensor_is_refused(option):
    layer = halo_linear(Linear.Config(in_features=128, out_features=256)).build()
    with pytest.raises(ValueError, match="a converted HaloLinear is sharded by FSDP2 only: set --parallelism"):
        layer.parallelize(SimpleNamespace(**{"ep": 1, "tp": 1, "spmd_backend": "default"} | option))
    assert layer.parallelize(SimpleNamespace(ep=2, tp=1, spmd_backend="default")) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, and texts where torchtitan's c4_test has them."""
    from transformers import AutoTokenizer

    from tests.helpers.trainers import save_chat_model

    folder = save_chat_model(tmp_path_factory.mktemp("titan"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "^", "eos_token": "~"})
    tokenizer.save_pretrained(folder)
    texts = folder / "tests" / "assets" / "c4_test"
    texts.mkdir(parents=True)
    rows = [{"text": f"How many rows has table t{i % 7}? It has {i % 7} rows. " * 20} for i in range(200)]
    (texts / "data.json").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def train(folder: Path, *options: str, ranks: int = 1) -> tuple[dict[int, float], int]:
    """The losses by step, and how many products ran in int8, or how many are in compiled graphs: see :func:`train_mixture`."""
    losses, linear, _ = run_trainer(folder, *options, ranks=ranks)
    return losses, linear


def train_mixture(folder: Path, *options: str, ranks: int = 1) -> tuple[dict[int, float], int, int]:
    """The same of DeepSeek's debug model, and the number of products of experts."""
    return run_trainer(folder, "--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel", *options, ranks=ranks)


def run_trainer(folder: Path, *options: str, ranks: int) -> tuple[dict[int, float], int, int]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "tests/helpers/titan_on_cpu.py"), str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    losses = {int(step): float(loss) for step, loss in re.findall(r"step:\s*(\d+)\s+loss:\s*([\d.]+)", text)}
    linear, of_experts = re.search(r"int8 products: (\d+), of experts: (\d+)", text).groups()
    return losses, int(linear), int(of_experts)


@trains
def test_the_debug_model_trains_and_resumes(folder):
    options = ["--training.steps", "4", "--checkpoint.enable", "--checkpoint.interval", "2"]
    whole, products = train(folder, *options)
    assert whole[4] < whole[1] - 1 and products >= 4 * 30 * 3
    shutil.rmtree(folder / "out" / "checkpoint" / "step-4")
    resumed, _ = train(folder, *options)
    assert resumed == {step: loss for step, loss in whole.items() if step > 2}


@trains
def test_the_debug_model_trains_compiled_and_sharded(folder):
    compiled = ["--compile.enable", "--compile.backend", "counting"]
    eager, products = train(folder, "--training.steps", "2", ranks=2)
    assert products >= 2 * 30 * 3
    losses, products = train(folder, "--training.steps", "2", *compiled, ranks=2)
    assert products >= 5 * 3, "torchtitan compiles a block once, or once for each block"
    assert losses == pytest.approx(eager, rel=1e-3)


@trains
def test_a_mixture_trains_and_resumes(folder):
    """Five layers with experts. A product that is recomputed counts twice."""
    options = ["--training.steps", "3", "--checkpoint.enable", "--checkpoint.interval", "2", "--dump_folder", "mixture"]
    whole, linear, of_experts = train_mixture(folder, *options)
    assert whole[3] < whole[1] - 1 and linear >= 3 * 39 * 3 and of_experts >= 3 * 5 * 9
    shutil.rmtree(folder / "mixture" / "checkpoint" / "step-3")
    resumed, *_ = train_mixture(folder, *options)
    assert resumed == {3: whole[3]}


@trains
def test_a_mixture_trains_compiled_and_sharded(folder):
    compiled = ["--compile.enable", "--compile.backend", "counting"]
    eager, linear, of_experts = train_mixture(folder, "--training.steps", "2", ranks=2)
    assert linear >= 2 * 39 * 3 and of_experts >= 2 * 5 * 9
    losses, _, of_experts = train_mixture(folder, "--training.steps", "2", *compiled, ranks=2)
    assert of_experts >= 9, "torchtitan compiles a block once, or once for each block"
    assert losses == pytest.approx(eager, rel=1e-3)
