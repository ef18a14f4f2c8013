"""Reports of mixtures, and other looks at them."""

import math

import pytest
import torch
from torchao.quantization import FqnToConfig

from halo_tensor import HaloWeight, calibrate, find_nonfinite, halo_config, hot_config, quantize_, report
from halo_tensor.analysis import expert_roofline
from halo_tensor.analysis.ceilings import H200
from halo_tensor.calibration.selection import gradients_under
from halo_tensor.recipe import Recipe
from tests.helpers.errors import relative_error
from tests.helpers.moe_models import IDS, experts_of, mixture
from tests.helpers.recording import OpLog

pytest.importorskip("transformers")

INT8 = halo_config(1, "int8", min_features=16)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize("converted", [False, True])
def test_experts_are_reported_as_a_layer(converted):
    """Their gradient is compared in the model, and their products alone; the model stays as it was."""
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    module = experts_of(model)[name]
    if converted:
        quantize_(model, INT8)
    before, kind, hooks = dict(module._parameters), type(module), len(module._state_dict_hooks)
    with OpLog() as log:
        found = report(model, BATCH, candidates={"int8": INT8}, min_gain=0, min_sqnr=0, gpu="H200", step_tokens=8192)
    assert [n for n, _ in log.calls].count("quantize_gated") == 2, "in the model, and alone"
    assert found.share == 1 and "4 linear layers and the experts of 1 with 100 %" in str(found)
    assert 0.95 < found.candidates[0].cosine < 0.99999
    layer = found.layers[-1]
    assert (layer.name, layer.experts, layer.sides, layer.tokens) == (name, 6, "64→64, 6 experts", IDS.numel())
    assert "| model.layers.*.mlp.experts (1) | 64→64, 6 experts |" in str(found) and layer.recommended == "int8"
    assert all(20 < layer.fidelity["int8"][product].sqnr < 60 for product in ("output", "grad_input", "grad_weight"))
    shape = expert_roofline.ExpertShape(8192, 2, 6, 64, 96, 48)
    expected = [expert_roofline.seconds(recipe, shape, ceilings=H200) for recipe in (Recipe(), INT8.recipe)]
    assert list(layer.seconds.values()) == expected and set(layer.outliers) == {"X", "W", "E"}
    assert type(module) is kind and len(module._state_dict_hooks) == hooks == converted
    assert ("_halo_gate" in module.__dict__) is converted
    assert all(module._parameters[n] is p for n, p in before.items())
    without = report(model, BATCH, candidates={"int8": halo_config(1, "int8", min_features=16, skip="experts")}, min_gain=0)
    assert len(without.layers) == 4 and without.candidates[0].cosine != found.candidates[0].cosine
    assert "its name matches skip" in without.left_alone
    assert quantize_(model, found.config).converted.count(name) == 1


def test_experts_that_lose_or_err_become_exceptions():
    """By min_gain and by min_sqnr, between what each layer has."""
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    options = {"candidates": {"int8": INT8}, "gpu": "H200", "step_tokens": 4096}
    free = report(model, BATCH, min_gain=0, min_sqnr=0, **options)
    gains = {layer.name: layer.speed("int8") for layer in free.layers}
    errors = {layer.name: layer.worst("int8")[0] for layer in free.layers}
    assert free.exceptions == [] and free.candidates[0].speed == pytest.approx(
        sum(layer.seconds["high precision"] for layer in free.layers) / sum(layer.seconds["int8"] for layer in free.layers)
    )
    first = max(gains, key=gains.get)  # experts are faster than linear layers of 64 features
    assert first == name
    fast = report(model, BATCH, min_gain=(sorted(gains.values())[-2] + gains[name]) / 2, min_sqnr=0, **options)
    assert [layer.name for layer in fast.layers if layer.recommended == "int8"] == [name]
    assert set(quantize_(mixture("Qwen3Moe"), fast.config).converted) == {name}
    least = min(errors.values())
    assert errors[name] == least, "the errors of two products and a gate add up"
    exact = report(model, BATCH, min_gain=0, min_sqnr=least + 0.01, **options)
    assert name in [layer.name for layer in exact.exceptions]
    assert f"- {name}: high precision (" in str(exact) and name not in exact.config.fqn_to_config


def test_products_of_experts_that_do_not_train():
    model = mixture("GptOss")
    ((name, module),) = experts_of(model).items()
    module.requires_grad_(False)
    (layer,) = (x for x in report(model, BATCH, candidates={"int8": INT8}, min_gain=0).layers if x.name == name)
    assert layer.products == ("output", "grad_input") == tuple(layer.fidelity["int8"])
    module.down_proj.requires_grad_()
    (layer,) = (x for x in report(model, BATCH, candidates={"int8": INT8}, min_gain=0).layers if x.name == name)
    assert layer.products == ("output", "grad_input", "grad_weight") == tuple(layer.fidelity["int8"])


def test_a_recommendation_by_name_names_experts():
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    both = {"int8": INT8, "fp8": halo_config(0, "fp8", min_features=16)}
    found = report(model, BATCH, candidates=both, min_gain=0, min_sqnr=0, filter_fn=lambda m, n: "q_proj" in n or n == name)
    assert isinstance(found.config, FqnToConfig) and name in found.config.fqn_to_config
    assert set(quantize_(model, found.config).converted) == {name, "model.layers.0.self_attn.q_proj"}
    assert isinstance(experts_of(model)[name].down_proj, HaloWeight)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_calibrate_chooses_for_experts_too(family):
    """The first candidate that reaches the target, by the lowest cosine of output and gradients; both G count."""
    model = mixture(family)
    (name,) = experts_of(model)
    both = [halo_config(0, "fp6_e2m3", min_features=16), INT8]
    with OpLog() as log:
        chosen = calibrate(model, [BATCH], level="auto", candidates=both, target=0.0)
    assert [n for n, _ in log.calls].count("quantize_gated") == 2
    assert name in chosen.layers and len(chosen.layers) == 5 and chosen.layers[name] is both[0]
    coarse, fine = (chosen.measured[name][f"cosine of candidate {i}"] for i in (0, 1))
    assert 0.95 < coarse < fine < 0.99999
    between = calibrate(model, [BATCH], level="auto", candidates=both, target=(coarse + fine) / 2)
    assert between.layers[name] is INT8
    assert type(experts_of(model)[name].down_proj) is torch.nn.Parameter
    assert name in quantize_(model, between).converted


def test_calibrate_measures_what_experts_compute():
    model = mixture("Qwen3Moe")
    (module,) = experts_of(model).values()
    inputs = torch.randn(40, 64), torch.rand(40, 6).argsort(1)[:, :2], torch.rand(40, 2)
    e = torch.randn(40, 64)
    exact = gradients_under(module, None, inputs[0], e, *inputs[1:])
    x = inputs[0].clone().requires_grad_()
    y = module(x, *inputs[1:])
    expected = [y, *torch.autograd.grad(y, [x, module.gate_up_proj, module.down_proj], e)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(exact, expected, strict=True))
    quantised = gradients_under(module, INT8.recipe, inputs[0], e, *inputs[1:])
    assert all(0.002 < relative_error(a, b.detach()) < 0.05 for a, b in zip(quantised, expected, strict=True))


def test_calibrate_names_experts_that_can_follow_no_candidate():
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    with pytest.warns(
        UserWarning, match=f"1 layers can follow no candidate.*\n  {name}: experts cannot follow this recipe: X"
    ):
        chosen = calibrate(model, [BATCH], filter_fn=lambda module, name: "experts" in name or "q_proj" in name)
    assert list(chosen.layers) == ["model.layers.0.self_attn.q_proj"]
    assert name not in calibrate(model, [BATCH], hot_config(min_features=16)).layers, "the default filter knows it"


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
