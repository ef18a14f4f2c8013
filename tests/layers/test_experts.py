"""Experts of transformers' mixtures: converted, run, saved and restored, on small models of five families."""

import copy
import io

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, dequantize_, halo_config, hot_config, quantize_
from halo_tensor.layers.experts import top_k_of
from halo_tensor.recipe import Gate
from tests.helpers.errors import relative_error
from tests.helpers.expert_layers import GPT_OSS, exact_experts
from tests.helpers.moe_models import FAMILIES, IDS, experts_of, mixture
from tests.helpers.recording import OpLog

transformers = pytest.importorskip("transformers")

INT8 = halo_config(1, "int8", min_features=16)
FUSED = {"grouped_mm": 4, "grouped_grad": 2, "quantize_gated": 1, "combine": 2}


def layer(family: str, config=INT8, **options):
    """Experts that are converted, and their copy in float64."""
    model = mixture(family, **options)
    (experts,) = experts_of(model).values()
    exact = copy.deepcopy(experts).double()
    quantize_(model, config, filter_fn=lambda module, name: module is experts)
    return experts, exact


def batch(tokens=60, unused=True):
    torch.manual_seed(2)
    index = torch.rand(tokens, 5 if unused else 6).argsort(1)[:, :2]
    return torch.randn(tokens, 64), index, torch.rand(tokens, 2) + 0.1, torch.randn(tokens, 64)


def exact_run(module, x, index, weights, e):
    """Output and gradients in float64, by a loop over experts."""
    turned = (lambda w: w.transpose(1, 2)) if module.is_transposed else lambda w: w
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    biases = [parameters.get(f"{name}_proj_bias") for name in ("gate_up", "down")]
    stacks = [turned(parameters[f"{name}_proj"]) for name in ("gate_up", "down")]
    y = exact_experts(x, index, weights, *stacks, *biases, gate=Gate() if module.is_concatenated else GPT_OSS)
    gradients = torch.autograd.grad(y, [x, weights, *parameters.values()], e.double())
    return y, dict(zip(("x", "weights", *parameters), gradients, strict=True))


def run(module, x, index, weights, e):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, index, weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return y, dict(zip(("x", "weights", *names), torch.autograd.grad(y, [x, weights, *parameters], e), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_within_a_window(family):
    """The fused products run, errors are those of int8, and an expert without tokens has gradients of exact zeros."""
    module, exact = layer(family)
    with OpLog() as log:
        y, gradients = run(module, *batch())
    names = [name for name, _ in log.calls]
    assert {name: names.count(name) for name in FUSED} == FUSED
    expected, exact_gradients = exact_run(exact, *batch())
    assert 0.005 < relative_error(y, expected) < 0.025
    for name, gradient in gradients.items():
        error = relative_error(gradient, exact_gradients[name])
        assert error < 1e-6 if name == "down_proj_bias" else 0.005 < error < 0.035, (name, error)
        if name not in ("x", "weights"):
            assert gradient[:5].any() and not gradient[5].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_converted_trained_and_restored(family):
    """With its attention; the state dict is a plain one both ways, and each step brings codes up to date."""
    model = mixture(family)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    found = quantize_(model, INT8)
    (name,) = experts_of(model)
    assert name in found.converted and found.share == 1 and f"{name.rpartition('.')[0]}.gate" not in found.converted
    (module,) = experts_of(model).values()
    assert all(isinstance(w, HaloWeight) for w in (module.gate_up_proj, module.down_proj))
    assert module.gate_up_proj.in_features_first == (family == "GptOss")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert module.down_proj.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] - 0.05
    state = model.state_dict()
    assert all(type(value) is torch.Tensor and value.dtype == torch.float32 for value in state.values())
    assert not torch.equal(state[f"{name}.down_proj"], plain[f"{name}.down_proj"])
    with torch.no_grad():
        trained = model(IDS).logits
        twin = mixture(family, seed=1)
        quantize_(twin, INT8)
        twin.load_state_dict({key: value.clone() for key, value in state.items()})
        assert torch.equal(twin(IDS).logits, trained)
        other = mixture(family, seed=1)
        quantize_(other, INT8)
        other.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
        assert torch.equal(other(IDS).logits, trained)
        dequantize_(model)
        assert not any(isinstance(p, HaloWeight) for p in model.parameters())
        assert type(module) is type(next(iter(experts_of(mixture(family)).values())))
        dense = model(IDS).logits
        mine = mixture(family, seed=1)
        mine.load_state_dict(state)
        assert torch.equal(mine(IDS).logits, dense) and 1e-4 < relative_error(trained, dense) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_generation_copies_and_pickles(family, tmp_path):
    model = mixture(family).eval()
    quantize_(model, INT8)
    (module,) = experts_of(model).values()
    with torch.no_grad():
        expected = model(IDS).logits
        assert model.generate(IDS[:, :6], max_new_tokens=3, do_sample=False).shape == (2, 9)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(IDS).logits, expected)
            (own,) = experts_of(other).values()
            assert own is not module and type(own) is type(module)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, experts_implementation="halo")
        quantize_(loaded, INT8)
        assert torch.equal(loaded.eval()(IDS).logits, expected)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_activation_checkpointing_and_compiled_code_give_the_same(family):
    model = mixture(family).train()
    quantize_(model, INT8)

    def gradients(run):
        model.zero_grad()
        run(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    assert any("experts.down_proj" in name for name in expected)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    model.gradient_checkpointing_enable()
    with OpLog() as log:
        recomputed = gradients(model)
    assert [name for name, _ in log.calls].count("grouped_mm") == 6
    for name, gradient in expected.items():
        assert torch.equal(recomputed[name], gradient), name
        assert relative_error(compiled[name], gradient) < 1e-2, name


@pytest.mark.parametrize("sentinel", [6, 9])
def test_sentinels_of_expert_parallelism(sentinel):
    """Copies for experts of other ranks add nothing, and their routing weights get no gradient."""
    module, exact = layer("GptOss")
    module._is_expert_parallel = True
    x, index, weights, e = batch()
    index = index.masked_fill(torch.rand(index.shape) < 0.4, sentinel)
    y, gradients = run(module, x, index, weights, e)
    expected, exact_gradients = exact_run(exact, x, index, weights, e)
    assert relative_error(y, expected) < 0.03 and not gradients["weights"][index == sentinel].any()
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) < 0.04, name


def test_the_recipe_chooses_the_ops():
    """HALO-2 rotates tokens too, and is not fused; fp8 is."""
    for config, fused in ((halo_config(2, "int8", min_features=16), False), (halo_config(0, "fp8", min_features=16), True)):
        module, exact = layer("Qwen3Moe", config)
        with OpLog() as log:
            y, gradients = run(module, *batch())
        assert ("quantize_gated" in [name for name, _ in log.calls]) is fused
        expected, exact_gradients = exact_run(exact, *batch())
        for actual, exact_one in ((y, expected), (gradients["down_proj"], exact_gradients["down_proj"])):
            assert 0.004 < relative_error(actual, exact_one) < 0.08


def test_frozen_experts_hold_codes_only():
    model = mixture("Qwen3Moe")
    (module,) = experts_of(model).values()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    quantize_(model, INT8)
    assert module.down_proj.master is None and module.down_proj.codes.dtype == torch.int8
    assert "frozen, codes only" in repr(module) and "6 experts, 64→96, 48→64, halo(level=1" in repr(module)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert module.down_proj.grad is None and model.model.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("options", [{"keep_codes": False}, {"memory": "low"}])
def test_less_memory_gives_the_same_output(options):
    for family in ("Qwen3Moe", "GptOss"):
        model, thrifty = mixture(family), mixture(family)
        quantize_(model, INT8)
        quantize_(thrifty, halo_config(1, "int8", min_features=16, **options))
        out = thrifty(input_ids=IDS, labels=IDS)
        assert torch.equal(out.logits, model(IDS).logits)
        out.loss.backward()
        (module,) = experts_of(thrifty).values()
        assert module.down_proj.grad.any()


# Which gate.


class _Named(nn.Module):
    """The attributes of experts, with another gate."""

    def __init__(self, apply, **numbers):
        super().__init__()
        self.has_gate, self.config = True, transformers.MixtralConfig()
        self._apply_gate = apply
        for name, value in numbers.items():
            setattr(self, name, value)


def test_gates_are_recognised_by_what_they_compute():
    from halo_tensor.layers.expert_gates import gate_of

    def clamped(h):
        gate, up = h.chunk(2, -1)
        return nn.functional.silu(gate.clamp(max=9.5)) * up.clamp(-9.5, 9.5)

    def swiglu(h):
        gate, up = h.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    def gelu(h):
        gate, up = h.chunk(2, -1)
        return nn.functional.gelu(gate) * up

    def swapped(h):
        return swiglu(torch.cat(h.chunk(2, -1)[::-1], -1))

    assert gate_of(_Named(swiglu)) == Gate() == gate_of(_Named(swiglu, swiglu_limit=7.0))
    assert gate_of(_Named(clamped, swiglu_limit=9.5)) == Gate(limit=9.5)
    for unknown in (gelu, swapped, clamped, lambda h: h / 0, lambda h: None):
        assert gate_of(_Named(unknown, swiglu_limit=7.0)) is None


def test_an_unknown_gate_is_called_as_it_is():
    """GELU is not fused, and its products are quantised all the same."""
    module, exact = layer("Qwen3Moe", hidden_act="gelu")
    x, index, weights, e = batch()
    with OpLog() as log:
        y, _ = run(module, x, index, weights, e)
    names = [name for name, _ in log.calls]
    assert "quantize_gated" not in names and names.count("grouped_mm") == 4
    exact.config._experts_implementation = "eager"
    assert 0.005 < relative_error(y, exact(x.double(), index, weights.double())) < 0.03


def test_experts_without_a_gate_and_with_a_norm():
    from transformers.integrations import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_post_expert_norm=True)
    class Normed(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 6
            self.up_proj = nn.Parameter(torch.randn(6, 48, 64) / 8)
            self.down_proj = nn.Parameter(torch.randn(6, 64, 48) / 7)
            self.act_fn, self.post_expert_norm = nn.ReLU(), nn.RMSNorm(64)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for expert in range(6):
                token, place = torch.where(top_k_index == expert)
                y = self.act_fn(hidden_states[token] @ self.up_proj[expert].t()) @ self.down_proj[expert].t()
                y = self.post_expert_norm(y) * top_k_weights[token, place, None]
                out = out.index_add(0, token, y)
            return out

    config = transformers.MixtralConfig()
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = Normed(config)
    exact = copy.deepcopy(module).double()
    assert quantize_(module, INT8).converted == [""]
    x, index, weights, e = batch()
    y, gradients = run(module, x, index, weights, e)
    given = [x.double().requires_grad_(), weights.double().requires_grad_(), *exact.parameters()]
    expected = exact(given[0], index, given[1])
    assert 0.005 < relative_error(y, expected) < 0.03
    for (name, actual), b in zip(gradients.items(), torch.autograd.grad(expected, given, e.double()), strict=True):
        assert 0.002 < relative_error(actual, b) < 0.12, name  # ReLU's step passes or stops what is near it
    index[0] = 6  # no expert: the norm of a row of zeros adds nothing
    assert not module(x, index, weights)[0].any()


# What is left alone.


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_token(family):
    (module,) = experts_of(mixture(family, num_experts_per_tok=3)).values()
    assert top_k_of(module) == 3
    module.top_k = 2
    assert top_k_of(module) == 2
    module.top_k, module.config.num_experts_per_tok = [2, 4], 0
    assert top_k_of(module) is None


def test_reasons_of_experts_that_are_left_alone():
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    share = sum(p.numel() for p in experts_of(model)[name].parameters())
    with pytest.warns(UserWarning, match="only"):
        found = quantize_(model, halo_config(1, "int8", min_features=60))
    assert found.skipped[name] == "fewer than min_features=60 features on a side"
    assert found.sizes[name] == share and f"{name}: fewer" in str(found) and "of the parameters)" in str(found)
    skipped = quantize_(mixture("Qwen3Moe"), halo_config(1, "int8", min_features=16, skip="experts"))
    assert skipped.skipped[name] == "its name matches skip='experts'"
    with pytest.warns(UserWarning, match="only"):
        per_tensor = quantize_(mixture("Qwen3Moe"), halo_config(1, "int8", min_features=16, granularity="tensor"))
    assert "X needs one scale per token" in per_tensor.skipped[name]
    with pytest.warns(UserWarning, match="only"):
        assert "experts cannot follow" in quantize_(mixture("Qwen3Moe"), hot_config(min_features=16)).skipped[name]
    with pytest.warns(UserWarning, match="only"):
        narrow = quantize_(mixture("Qwen3Moe", moe_intermediate_size=24), INT8)
    assert "multiples of 16" in narrow.skipped[name]

    tied = mixture("Qwen3Moe", layers=2)
    first, second = experts_of(tied).values()
    second.down_proj = first.down_proj
    with pytest.warns(UserWarning, match="only"):
        assert set(quantize_(tied, INT8).skipped.values()) >= {"its weight is tied to another layer's"}

    own = mixture("Qwen3Moe")
    (module,) = experts_of(own).values()
    module.__class__ = type("Mine", (type(module),), {"forward": lambda self, *args: args[0]})
    with pytest.warns(UserWarning, match="only"):
        assert quantize_(own, INT8).skipped[name] == "it is a Mine, whose forward may be its own"
    with pytest.raises(ValueError, match="Mine: it is a Mine, whose forward may be its own"):
        quantize_(own, INT8, filter_fn=lambda module, n: n == name)


def test_a_plain_weight_in_converted_experts_warns():
    module, _ = layer("Qwen3Moe")
    x, index, weights, _ = batch()
    module.down_proj = nn.Parameter(module.down_proj.dequantize().clone())
    with pytest.warns(UserWarning, match="Qwen3MoeExperts runs in high precision, since a weight was replaced"):
        module(x, index, weights)


def test_the_name_without_a_conversion_warns():
    import halo_tensor.transformers  # noqa: F401  it registers the name

    model = mixture("Qwen3Moe")
    expected = model(IDS).logits
    model.set_experts_implementation("halo")
    with pytest.warns(UserWarning, match="it is not converted. Call quantize_"):
        assert torch.equal(model(IDS).logits, expected)
    quantize_(model, INT8)
    with OpLog() as log:
        model(IDS)
    assert ("grouped_mm", torch.int8) in log.calls


def test_converted_twice_with_another_config_and_by_name():
    model = mixture("Qwen3Moe")
    (name,) = experts_of(model)
    module = experts_of(model)[name]
    own = type(module)
    quantize_(model, INT8)
    fp8 = halo_config(0, "fp8", min_features=16)
    assert name in quantize_(model, fp8).converted
    assert module.down_proj.recipe == fp8.recipe and type(module).__mro__[1] is own
    from halo_tensor import LayerConfigs

    only = mixture("Qwen3Moe")
    found = quantize_(only, LayerConfigs({name: INT8}))
    assert found.converted == [name] and isinstance(experts_of(only)[name].down_proj, HaloWeight)
