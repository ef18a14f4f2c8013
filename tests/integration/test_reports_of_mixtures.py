"""Reports of mixtures, and other looks at them."""

import math

import pytest
import torch
from torchao.quantization import FqnToConfig

from halo_tensor import HaloWeight, calibrate, find_nonfinite, halo_config, quantize_, report
from tests.helpers.mixtures import IDS, experts_of, mixture
from tests.helpers.recording import OpLog

pytest.importorskip("transformers")

INT8 = halo_config(1, "int8", min_features=16)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("converted", [False, True])
def test_the_gradient_that_is_compared_is_that_of_experts_too(converted):
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    module = experts_of(model)[name]
    if converted:
        quantize_(model, INT8)
    before, kind, hooks = dict(module._parameters), type(module), len(module._state_dict_hooks)
    with OpLog() as log:
        found = report(model, BATCH, candidates={"int8": INT8}, min_gain=0, min_sqnr=0)
    assert [n for n, _ in log.calls].count("quantize_gated") == 1
    assert (
        found.share == 1
        and found.experts == {"int8": [name]}
        and "linear layers and the experts of 1 with 100 %" in str(found)
    )
    assert 0.95 < found.candidates[0].cosine < 0.99999
    assert type(module) is kind and len(module._state_dict_hooks) == hooks == converted
    assert ("_halo_gate" in module.__dict__) is converted
    assert all(module._parameters[n] is p for n, p in before.items())
    without = report(model, BATCH, candidates={"int8": halo_config(1, "int8", min_features=16, skip="experts")}, min_gain=0)
    assert without.experts == {"int8": []} and without.candidates[0].cosine != found.candidates[0].cosine
    assert "its name matches skip" in without.left_alone
    assert quantize_(model, found.config).converted.count(name) == 1


def test_a_recommendation_by_name_names_experts():
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    both = {"int8": INT8, "fp8": halo_config(0, "fp8", min_features=16)}
    found = report(model, BATCH, candidates=both, min_gain=0, min_sqnr=0, filter_fn=lambda m, n: "q_proj" in n or n == name)
    assert isinstance(found.config, FqnToConfig) and name in found.config.fqn_to_config
    assert set(quantize_(model, found.config).converted) == {name, "model.layers.0.self_attn.q_proj"}
    assert isinstance(experts_of(model)[name].down_proj, HaloWeight)


def test_calibrate_says_that_it_leaves_experts_out():
    model = mixture("Qwen3Moe")
    with pytest.warns(UserWarning, match="calibrate measures no experts, and 1 layers"):
        chosen = calibrate(model, [BATCH], level="auto", candidates=[INT8])
    (name,) = experts_of(model)
    assert name not in chosen.layers and len(chosen.layers) == 4
    chosen.layers[name] = INT8
    assert name in quantize_(model, chosen).converted


def test_a_nan_in_experts_is_found():
    model = mixture("Qwen3Moe")
    quantize_(model, INT8)
    with find_nonfinite(model) as found:
        model(**BATCH).loss.backward()
    assert not found
    (name,) = experts_of(model)
    with torch.no_grad():
        experts_of(model)[name].down_proj[0, 0, 0] = math.nan
    with find_nonfinite(model) as found:
        model(**BATCH).loss.backward()
    assert (found.first.layer, found.first.operand) == (name, "down_proj")
