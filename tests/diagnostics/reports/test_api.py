"""``report``: what it measures of a model, what it recommends, and the forms it is written in."""

import copy
import json
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import halo_tensor
from halo_tensor import Balanced, HaloWeight, balance_, halo_config, quantize_, recipe_config, report
from halo_tensor.analysis.ceilings import H100
from halo_tensor.calibration.candidates import CANDIDATES
from halo_tensor.diagnostics.reports.data import HIGH_PRECISION, CandidateReport
from halo_tensor.diagnostics.reports.recommendation import fastest
from halo_tensor.recipe import INT8, PRODUCTS
from tests.helpers.errors import relative_error, typical_error

INT8_HALO = {f"int8 HALO-{level}": halo_config(level, "int8") for level in (0, 1)}
WIDTH = 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """A small residual model that returns an object with a loss, as transformers' do."""

    def __init__(self, n=2):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(n))
        self.lm_head = nn.Linear(WIDTH, 50, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids, labels=None):
        x = self.dropout(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def batch(rows=3, length=50):
    ids = torch.randint(0, 50, (rows, length))
    return {"ids": ids, "labels": ids.roll(1, 1)}


def add_outliers(blocks, factor=30.0, channels=6):
    """Scale some output channels of every norm up and undo it in the layers that read them."""
    with torch.no_grad():
        for block in blocks:
            chosen = torch.randperm(WIDTH)[:channels]
            block.norm.weight[chosen] *= factor
            for layer in (block.gate, block.up):
                layer.weight[:, chosen] /= factor


@pytest.fixture(scope="module")
def found():
    """The report of a small model with the default candidates."""
    torch.manual_seed(0)
    model = Model()
    add_outliers(model.blocks)
    return report(model, batch(), min_cosine=0.98)


def test_products_are_those_that_training_computes():
    model, x = nn.Linear(256, 128, bias=False), torch.randn(100, 256, requires_grad=True)
    target = torch.randn(100, 128)

    def loss_fn(m, rows):
        return (m(rows) * target).sum()

    (layer,) = report(model, x, loss_fn=loss_fn, candidates=INT8_HALO).layers
    for name, config in INT8_HALO.items():
        converted = nn.Linear(256, 128, bias=False)
        converted.load_state_dict(model.state_dict())
        quantize_(converted, config)
        y = converted(x)
        grads = torch.autograd.grad(loss_fn(converted, x), [x, converted.weight])
        exact = x @ model.weight.T, target @ model.weight, target.T @ x
        for product, actual, expected in zip(PRODUCTS, (y, *grads), exact, strict=True):
            error = relative_error(actual, expected)
            assert layer.fidelity[name][product].sqnr == pytest.approx(-20 * torch.tensor(error).log10().item(), abs=0.01)
            assert 0.5 * typical_error(INT8) < error < 2 * typical_error(INT8)


def test_autocast_and_bfloat16_are_compared_with_float32():
    model, x = nn.Linear(256, 256), torch.randn(64, 256, requires_grad=True)

    def measured(m, rows):
        (layer,) = report(m, rows, loss_fn=lambda m, x: m(x).float().square().mean(), candidates=INT8_HALO).layers
        return layer.fidelity["int8 HALO-1"]

    exact = measured(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = measured(model, x)
    low = measured(model.bfloat16(), x.detach().bfloat16().requires_grad_())
    for product in PRODUCTS:
        assert autocast[product].sqnr == pytest.approx(exact[product].sqnr, abs=0.5)
        assert low[product].sqnr == pytest.approx(exact[product].sqnr, abs=0.5)


def test_measurements_of_each_layer(found):
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == [f"blocks.{i}.{name}" for i in range(2) for name in ("gate", "up", "down")]  # no lm_head
    assert {layer.sharing for name, layer in layers.items() if "down" not in name} == {2}
    assert layers["blocks.0.down"].sharing == 1
    for layer in found.layers:
        assert (layer.tokens, layer.products) == (150, tuple(PRODUCTS))
        assert set(layer.fidelity) == set(CANDIDATES) and set(layer.outliers) == {"X", "W", "E"}
    before, after = layers["blocks.1.up"].outliers["X"]
    assert before.kurtosis > 10 and after.kurtosis < before.kurtosis / 2


def test_the_whole_gradient_is_that_of_a_converted_model(found):
    torch.manual_seed(0)
    model = Model()
    add_outliers(model.blocks)
    model.eval()
    data = batch()
    weights = [p for name, p in model.named_parameters() if name.endswith(("gate.weight", "up.weight", "down.weight"))]
    loss = model(**data).loss
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    for candidate in found.candidates:
        quantize_(model, candidate.config)
        quantized = model(**data).loss
        layers = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and isinstance(m.weight, HaloWeight)]
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(quantized, layers)])
        halo_tensor.dequantize_(model)
        assert candidate.cosine == pytest.approx(torch.cosine_similarity(grads, exact, dim=0).item(), abs=1e-4)
        assert candidate.loss_change == pytest.approx((quantized - loss).item(), abs=1e-6)


# The rule.


def candidate(name, cosine, speed):
    return CandidateReport(name, None, cosine, 0.0, speed)


def test_int8_without_rotation_is_not_recommended_for_a_model_with_outliers(found):
    by_name = {c.name: c for c in found.candidates}
    assert found.recommended not in (None, "int8 HALO-0")
    assert 1 - by_name["int8 HALO-0"].cosine > 5 * (1 - by_name["int8 HALO-1"].cosine)
    assert by_name[found.recommended].cosine >= 0.98 and by_name["int8 HALO-0"].cosine < 0.999


def test_quantize_accepts_the_recommended_config(found):
    model = Model()
    assert len(quantize_(model, found.config).converted) == 6
    assert model.blocks[0].up.weight.recipe == found.config.recipe


def test_no_candidate_is_recommended_below_the_threshold():
    model, data = Model(1), batch()
    strict = report(model, data, candidates=INT8_HALO, min_cosine=0.9999999)
    assert strict.recommended is strict.config is strict.result is None
    assert "none of the candidates" in strict.verdict and "0.9999999" in strict.verdict
    assert {layer.recommended for layer in strict.layers} == {HIGH_PRECISION}
    assert "Keep high precision" in str(strict) and strict.to_html()
    assert report(model, data, candidates=INT8_HALO, min_cosine=0.0).recommended in INT8_HALO
    damaged = report(model, data, candidates=INT8_HALO, min_cosine=0.0, min_sqnr=90)
    assert damaged.recommended is None and "in 3 of 3 layers" in damaged.verdict


def test_candidates_that_take_different_layers():
    skips = {"all": "lm_head", "some": "gate|lm_head", "none": "blocks|lm_head"}
    configs = {name: halo_config(1, "int8", skip=skip) for name, skip in skips.items()}
    found = report(Model(1), batch(), candidates=configs)
    by_layer = {layer.name: set(layer.fidelity) for layer in found.layers}
    assert by_layer == {"blocks.0.gate": {"all"}, "blocks.0.up": {"all", "some"}, "blocks.0.down": {"all", "some"}}
    speeds = {c.name: c.speed for c in found.candidates}
    assert speeds["none"] == 1 > speeds["some"] > speeds["all"]
    assert found.recommended == "some" and [layer.name for layer in found.exceptions] == ["blocks.0.gate"]
    assert found.exceptions[0].recommended == HIGH_PRECISION and "some leaves it alone" in found.to_markdown()
    assert len(quantize_(Model(1), found.config).converted) == 2


def test_high_precision_can_compete_in_speed():
    model, data, bf16 = Model(1), batch(), halo_config(dtype="bf16")
    found = report(model, data, candidates=INT8_HALO | {"bf16": bf16})
    assert (found.recommended, found.config) == ("bf16", bf16)  # nothing pays in layers as narrow as these
    assert found.candidates[-1] == CandidateReport("bf16", bf16, pytest.approx(1.0), 0.0, 1.0)


def test_layers_that_a_recipe_damages_are_exceptions():
    model = Model()
    add_outliers(model.blocks[1:], factor=1000)
    data, only = batch(), {"no rotation": INT8_HALO["int8 HALO-0"]}
    found = report(model, data, candidates=only, min_cosine=0.0)
    assert [layer.name for layer in found.exceptions] == ["blocks.1.gate", "blocks.1.up"]
    for layer in found.exceptions:
        assert layer.worst("no rotation")[0] < 20 and layer.recommended == HIGH_PRECISION
    assert found.result.name == "as recommended" and found.result.cosine > 0.9 and found.candidates[0].cosine < 0.9
    assert "blocks.1.up" in str(found).split("recipe")[0] and "<code>blocks.1.up</code>" in found.to_html()
    assert "`quantize_(model, report.config)  # 4 layers by name`" in str(found)
    conversion = quantize_(model, found.config)
    assert conversion.converted == ["blocks.0.gate", "blocks.0.up", "blocks.0.down", "blocks.1.down"]

    mixed = report(model, data, candidates=only | {"fp8": halo_config(0, "fp8")}, min_cosine=0.0, min_sqnr=25)
    assert {layer.name: layer.recommended for layer in mixed.layers}["blocks.1.up"] == "fp8"


def test_exceptions_can_make_a_candidate_faithful():
    model, data = Model(), batch()
    add_outliers(model.blocks[1:], factor=1000)
    only = {"no rotation": INT8_HALO["int8 HALO-0"]}
    found = report(model, data, candidates=only, min_cosine=0.95)
    assert found.candidates[0].cosine < 0.95 < found.result.cosine
    assert found.recommended == "no rotation" and len(found.exceptions) == 2


# Balance.

BALANCED = INT8_HALO | {"int8 HALO-1, balanced": Balanced(halo_config(1, "int8"))}


def followed(model, data, found):
    """Return the cosine of the gradient of a model that follows a recommendation with the exact one, and the change of the loss."""
    names = [f"{layer.name}.weight" for layer in found.layers]

    def gradient(m):
        loss = m.eval()(**data).loss
        parameters = dict(m.named_parameters())
        grads = torch.autograd.grad(loss, [parameters[name] for name in names])
        return loss.item(), torch.cat([g.flatten() for g in grads])

    loss, exact = gradient(model)
    twin = copy.deepcopy(model)
    quantize_(twin, found.config)
    if found.balanced:
        balance_(twin, **data)
    quantized_loss, grads = gradient(twin)
    return torch.cosine_similarity(grads, exact, dim=0).item(), quantized_loss - loss, twin


def test_a_balanced_candidate_is_what_balance_makes_of_it():
    model, data = Model(), batch()
    add_outliers(model.blocks)
    found = report(model, data, candidates=BALANCED)
    plain, balanced = (found.candidates[i] for i in (1, 2))
    assert (plain.balanced, balanced.balanced, balanced.config) == (False, True, halo_config(1, "int8"))
    assert balanced.speed == plain.speed and 1 - balanced.cosine < (1 - plain.cosine) / 2
    assert found.recommended == "int8 HALO-1, balanced" and found.balanced and found.config == halo_config(1, "int8")
    cosine, change, twin = followed(model, data, found)
    # Balanced in the quantised model, where X is a little different.
    assert cosine == pytest.approx(balanced.cosine, abs=1e-4)
    assert change == pytest.approx(balanced.loss_change, abs=2e-4)
    for layer in found.layers:
        assert layer.fidelity["int8 HALO-1, balanced"].keys() == set(PRODUCTS)
        if not layer.name.endswith("down"):
            before, after = (layer.fidelity[c]["output"].sqnr for c in ("int8 HALO-1", "int8 HALO-1, balanced"))
            assert after > before + 5
    assert twin.blocks[0].up.weight.gain is not None and not isinstance(model.blocks[0].up.weight, HaloWeight)


def test_a_recommended_balance_is_said_in_every_form():
    model, data = Model(1), batch()
    add_outliers(model.blocks)
    found = report(model, data, candidates=BALANCED)
    plain = report(model, data, candidates=INT8_HALO)
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "balance_(model, **batch)" in text and "call balance_ after quantize_" in text
        assert text.index("quantize_(model, HaloConfig") < text.index("balance_(model, **batch)")
    assert not any("balance_" in text for text in (str(plain), plain.to_html()))
    numbers = json.loads(found.to_json())
    assert numbers["balanced"] and numbers["result"]["balanced"] and not json.loads(plain.to_json())["balanced"]
    assert [c["balanced"] for c in numbers["candidates"]] == [False, False, True]


def test_a_balance_that_gains_little_is_not_recommended():
    plain = candidate("plain", 0.996, 1.5)
    more = CandidateReport("balanced", None, 0.997, 0.0, 1.5, balanced=True)
    much = CandidateReport("balanced", None, 0.999, 0.0, 1.5, balanced=True)
    for order in ((plain, more), (more, plain)):
        assert fastest(list(order)) is plain
    assert fastest([plain, much]) is much and fastest([more]) is more
    found = report(Model(1), batch(), candidates=BALANCED)
    assert (found.recommended, found.balanced) != ("int8 HALO-1, balanced", True)


def test_exceptions_of_a_balanced_recipe_are_balanced_too():
    """As balance_ does it, which reaches every converted layer."""
    model, data = Model(), batch()
    add_outliers(model.blocks)
    only = {"balanced": BALANCED["int8 HALO-1, balanced"], "plain": halo_config(1, "int8"), "fp8": halo_config(1, "fp8")}
    worst = sorted(x.worst("balanced")[0] for x in report(model, data, candidates=only).layers)
    found = report(model, data, candidates=only, min_sqnr=(worst[0] + worst[1]) / 2, min_cosine=0.99)
    assert found.recommended == "balanced" and len(found.exceptions) == 1
    assert found.exceptions[0].recommended == HIGH_PRECISION  # the others were measured without a balance
    assert found.result.balanced and found.balanced
    cosine, _, twin = followed(model, data, found)
    assert cosine == pytest.approx(found.result.cosine, abs=1e-4)
    assert sum(getattr(m.weight, "gain", None) is not None for m in twin.modules() if isinstance(m, nn.Linear)) == 5


def test_an_earlier_balance_is_not_measured_and_not_lost():
    model, data = Model(), batch()
    add_outliers(model.blocks)
    plain = report(model, data, candidates=BALANCED)
    quantize_(model, halo_config(1, "int8"))
    balance_(model, **data)
    gains = [layer.gain for layer in model.parameters() if isinstance(layer, HaloWeight)]
    again = report(model, data, candidates=BALANCED)
    assert [c.cosine for c in again.candidates] == [c.cosine for c in plain.candidates]
    assert all(a is b for a, b in zip(gains, (p.gain for p in model.parameters() if isinstance(p, HaloWeight)), strict=True))


def test_a_balance_that_cannot_be_measured_is_an_error():
    with pytest.raises(ValueError, match="x quantises no output, so there is nothing to balance"):
        report(Model(1), batch(), candidates={"x": Balanced(halo_config(dtype="bf16"))})
    with pytest.raises(TypeError, match="a candidate is a config of halo_config"):
        report(Model(1), batch(), candidates=[Balanced("int8")])
    with pytest.raises(TypeError, match=r"quantize_\(model, balanced.config\), and then balance_"):
        quantize_(Model(1), Balanced(halo_config(1, "int8")))


# The model is left as it was.


def snapshot(model):
    return {
        "parameters": {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.mark.parametrize("failing", [None, "first", "second"])
@pytest.mark.parametrize("converted", [False, True])
def test_the_model_is_left_as_it_was(failing, converted):
    model, data = Model(1), batch()
    if converted:
        quantize_(model, halo_config(1, "int8"))
    model(**data).loss.backward()
    model.blocks[0].up.weight.grad = None
    model.train()
    model.dropout.eval()
    fired = []
    model.blocks[0].gate.weight.register_hook(fired.append)
    before, runs = snapshot(model), []

    def loss_fn(m, b):
        loss = m(**b).loss
        runs.append(1)
        if len(runs) == {"first": 1, "second": 2}.get(failing):
            raise KeyError("stop")
        return loss

    with torch.no_grad():
        if failing:
            with pytest.raises(KeyError):
                report(model, data, loss_fn=loss_fn, candidates=INT8_HALO)
        else:
            report(model, data, loss_fn=loss_fn, candidates=INT8_HALO)
    assert_same(before, snapshot(model))
    assert not fired
    assert isinstance(model.blocks[0].up.weight, HaloWeight) == converted


def test_a_converted_model_is_measured_by_its_dense_weights():
    model, data = Model(), batch()
    plain = report(model, data, candidates=INT8_HALO)
    quantize_(model, halo_config(0, "fp8"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # high precision is meant
        again = report(model, data, candidates=INT8_HALO)
    assert again.loss == plain.loss
    assert [layer.fidelity for layer in again.layers] == [layer.fidelity for layer in plain.layers]
    assert [c.cosine for c in again.candidates] == [c.cosine for c in plain.candidates]


# Kinds of models and batches.


def test_frozen_layers_have_no_grad_weight():
    model, data = Model(), batch()
    model.blocks[0].requires_grad_(False)
    layers = {layer.name: layer for layer in report(model, data, candidates=INT8_HALO).layers}
    assert layers["blocks.0.up"].products == ("output", "grad_input")
    assert layers["blocks.1.up"].products == tuple(PRODUCTS)
    model.embed.requires_grad_(False)
    layers = {layer.name: layer for layer in report(model, data, candidates=INT8_HALO).layers}
    assert layers["blocks.0.up"].products == ("output",) and "E" not in layers["blocks.0.up"].outliers


def test_only_adapters_trained_and_a_base_held_as_codes():
    model, data = Model(), batch()
    model.requires_grad_(False)
    model.embed.requires_grad_(True)  # stands for an adapter before the first layer
    quantize_(model, halo_config(1, "int8"))
    assert model.blocks[0].up.weight.master is None
    found = report(model, data, candidates=INT8_HALO)
    assert "all trainable" in found.gradient_of and all(0.9 < c.cosine < 1 for c in found.candidates)
    assert {layer.products for layer in found.layers} == {("output", "grad_input")}
    assert model.blocks[0].up.weight.master is None


def test_tied_weights_stay_tied():
    model, data = Model(), batch()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    found = report(model, data, candidates=INT8_HALO)
    assert not any("up" in layer.name for layer in found.layers) and len(found.layers) == 4
    everything = report(model, data, candidates=INT8_HALO, filter_fn=lambda m, name: "up" in name)
    assert all(0.99 < c.cosine < 1 for c in everything.candidates)  # of both layers' gradients, summed
    assert len(everything.layers) == 2 and model.blocks[1].up.weight is model.blocks[0].up.weight


def test_a_layer_called_twice_and_one_never_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x):
            return self.a(self.a(x) + self.a(x[:0]).sum()).square().mean()

    found = report(Twice(), torch.randn(100, 128), candidates=INT8_HALO, tokens=64)
    assert [layer.name for layer in found.layers] == ["a"]
    assert found.layers[0].tokens == 200 and found.sampled == 64 and 0.99 < found.candidates[1].cosine < 1


def test_calls_that_checkpointing_repeats_count_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x):
            return checkpoint(lambda x: self.second(self.first(x).tanh()), x, use_reentrant=False).square().mean()

    x = torch.randn(64, 128, requires_grad=True)
    found = report(Checkpointed(), x, candidates=INT8_HALO)
    assert [layer.tokens for layer in found.layers] == [64, 64]


def test_batches_may_be_mappings_or_tuples_and_losses_functions():
    model, data = Model(1), batch()
    by_mapping = report(model, data, candidates=INT8_HALO).loss
    assert report(model, (data["ids"], data["labels"]), candidates=INT8_HALO).loss == by_mapping

    def loss_fn(m, ids):
        return m(ids, ids.roll(1, 1)).loss

    assert report(model, data["ids"], loss_fn=loss_fn, candidates=INT8_HALO).loss == by_mapping


def test_errors_say_what_to_do():
    model, data = Model(1), batch()
    with pytest.raises(ValueError, match="no loss in the SimpleNamespace that Model returned: add labels"):
        report(model, data["ids"])
    with pytest.raises(ValueError, match=r"shape \[3, 50, 50\] where a scalar loss is needed"):
        report(model, data, loss_fn=lambda m, b: m(**b).logits)
    with pytest.raises(ValueError, match=r"the loss is nan, .* halo_tensor.find_nonfinite"):
        report(model, data, loss_fn=lambda m, b: m(**b).loss * torch.nan)
    with pytest.raises(ValueError, match="depends on no parameter"):
        report(model, data, loss_fn=lambda m, b: m(**b).loss.detach())
    with pytest.raises(ValueError, match=r"no layer of this Linear is eligible\n.*fewer than min_features=128"):
        report(nn.Linear(16, 16), torch.randn(2, 16))
    with pytest.raises(ValueError, match="filter_fn took none"):
        report(model, data, filter_fn=lambda m, name: False)
    with pytest.raises(ValueError, match="no candidate"):
        report(model, data, candidates={})
    with pytest.raises(TypeError, match="a candidate is a config of halo_config"):
        report(model, data, candidates=["int8"])
    with pytest.raises(ValueError, match="reaches none"):
        report(model, data, loss_fn=lambda m, b: m.embed.weight.sum())


def test_transformers_and_a_recipe_by_name():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, tie_word_embeddings=True))
    ids = torch.randint(0, 64, (2, 40))
    found = report(model, {"input_ids": ids, "labels": ids}, candidates=[recipe_config("switchback")])
    assert len(found.layers) == 7 and found.layers[0].sharing == 3
    (only,) = found.candidates
    assert "switchback" in only.name and 0.98 < only.cosine < 0.99999
    assert found.layers[0].fidelity[only.name]["grad_weight"].sqnr > 100  # which SwitchBack leaves in high precision


def test_speed_is_modelled_for_the_step():
    model, x = nn.Linear(1024, 1024), torch.randn(16, 1024)
    small, large = (
        report(model, x, loss_fn=lambda m, x: m(x).square().mean(), candidates=INT8_HALO, step_tokens=n) for n in (None, 8192)
    )
    assert (small.tokens, small.step_tokens) == (large.tokens, 16) and large.step_tokens == 8192
    assert large.candidates[0].speed > 1.3 * small.candidates[0].speed


def test_layers_that_would_be_slower_are_left_out_of_the_recommendation(machine):
    """Small layers save less than their launches take."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 128), nn.Linear(128, 1024)), torch.randn(32, 256)
    rates = {"products": {"bf16": 1.5e13, "int8": 6e13}, "multiprocessors": 1}
    ceilings = replace(H100, **rates, copy=1e15, quantize=1e15, rotate=1e15, tiles=1e15, launch=1e-6)
    options = {"loss_fn": lambda m, x: m(x).square().mean(), "candidates": INT8_HALO, "ceilings": ceilings}
    found = report(model, x, step_tokens=1024, **options)
    speeds = {layer.name: layer.speed("int8 HALO-0") for layer in found.layers}
    slow = [name for name, speed in speeds.items() if speed < 1]
    assert slow == ["1"] and [layer.name for layer in found.exceptions] == slow
    assert set(found.config.fqn_to_config) == speeds.keys() - slow and found.min_gain == 1.0
    assert f"- 1: high precision ({found.recommended} is modelled at 0." in str(found)
    assert report(model, x, step_tokens=1024, min_gain=0, **options).exceptions == []
    few = report(model, x, step_tokens=16, **options)
    assert few.config is None and "with 16 tokens a step, and no layer reaches min_gain=1" in few.verdict
    stands_in = report(model, x, **(options | {"ceilings": None}))
    assert stands_in.min_gain == 0 and stands_in.config is not None, "there is no GPU to be slower on"
    machine("NVIDIA H200", (9, 0))
    assert report(model, x, **(options | {"ceilings": None})).config is None


def test_a_candidate_without_kernels_is_measured_and_not_recommended():
    model, x = nn.Linear(128, 128), torch.randn(32, 128)
    configs = {"mxfp8": recipe_config("mxfp8"), "int8": halo_config(1, "int8")}
    found = report(model, x, loss_fn=lambda m, x: m(x).square().mean(), candidates=configs)
    assert found.recommended == "int8" and found.candidates[0].cosine > 0.99 and not found.candidates[0].has_kernels
    assert "| no kernel |" in str(found)
    alone = report(model, x, loss_fn=lambda m, x: m(x).square().mean(), candidates=[recipe_config("mxfp8")])
    assert alone.config is None and "no kernel computes with their scales" in alone.verdict


# Forms.


def test_markdown_and_json(found, tmp_path):
    text = found.to_markdown(tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text + "\n"
    for row in [*found.layers, *found.candidates]:
        assert row.name in text
    assert "a model, not a measurement" in str(found) and found.recommended in str(found)
    assert f"`quantize_(model, {found.config!r})`" in str(found)
    columns = {block.splitlines()[0].count("|") for block in str(found).split("\n\n") if block.startswith("|")}
    for block in (b for b in str(found).split("\n\n") if b.startswith("|")):
        assert {line.count("|") for line in block.splitlines()} == {block.splitlines()[0].count("|")}
    assert len(columns) == 2

    numbers = json.loads(found.to_json(tmp_path / "report.json"))
    assert numbers == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    first = numbers["layers"][0]
    assert first["fidelity"]["int8 HALO-1"]["output"]["sqnr"] == found.layers[0].fidelity["int8 HALO-1"]["output"].sqnr
    assert first["outliers"]["X"]["before"]["kurtosis"] > 0 and numbers["recommended"] == found.recommended
    assert "HaloConfig" in numbers["candidates"][0]["config"]


def test_html_is_well_formed_and_needs_no_other_file(found, tmp_path):
    class Check(HTMLParser):
        open: tuple = ()
        rows = 0

        def handle_starttag(self, tag, attrs):
            self.rows += tag == "tr"
            assert not {"src", "href"} & dict(attrs).keys()
            if tag != "meta":
                self.open = (*self.open, tag)

        def handle_endtag(self, tag):
            assert self.open[-1] == tag
            self.open = self.open[:-1]

    page = found.to_html(tmp_path / "report.html")
    check = Check()
    check.feed(page)
    assert not check.open and check.rows == 1 + 5 + 1 + 3 + 2 + 6  # headers, candidates, kinds, layers
    assert all(layer.name in page for layer in found.layers)


def test_png_is_drawn_and_matplotlib_is_asked_for(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found.to_png(tmp_path / "report.png")
    data = (tmp_path / "report.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.to_png(tmp_path / "other.png")
