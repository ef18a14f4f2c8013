"""PEFT, unmodified, on a frozen quantised base."""

import copy

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, dequantize_, halo_config, quantize_
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog, saved_bytes

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

INT8, FP8 = halo_config(1, "int8"), halo_config(0, "fp8")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)


def adapted(config=INT8, layers: int = 2, **options) -> PeftModel:
    """A base quantised and then adapted, with an adapter that does something."""
    model = llama(layers)
    if config is not None:
        quantize_(model.requires_grad_(False), config)
    model = get_peft_model(model, lora(**options))
    stir(model)
    return model


@torch.no_grad()
def stir(model) -> None:
    """PEFT starts with B = 0."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def bases(model) -> list[HaloWeight]:
    return [p for p in model.parameters() if isinstance(p, HaloWeight)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rank", [8, 128])
def test_before_or_after_only_the_base_is_converted(rank):
    after = adapted(r=rank, lora_alpha=16)
    before = get_peft_model(llama(), lora(r=rank, lora_alpha=16))
    report = quantize_(before, INT8)
    stir(before)
    assert len(report.converted) == 14 and all(name.endswith("base_layer") for name in report.converted)
    assert {r for n, r in report.skipped.items() if "lora_" in n} == {"it belongs to an adapter"}
    for model in (before, after):
        assert len(bases(model)) == 14 and all(w.master is None for w in bases(model))
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        with OpLog() as log:
            model(input_ids=IDS)
        assert log.products() == [torch.int8] * 14
    after.load_state_dict(before.state_dict())
    quantize_(after, INT8)  # a converted base can be converted again
    assert relative_error(logits(after), logits(before)) < 5e-3


@pytest.mark.parametrize(
    ("config", "options"),
    [(INT8, {}), (FP8, {}), (halo_config(1, "fp6"), {}), (INT8, {"use_rslora": True}), (FP8, {"use_dora": True})],
    ids=["int8", "fp8", "fp6", "rslora", "dora"],
)
def test_gradients_of_adapters_follow_those_on_a_plain_base(config, options):
    model, plain = adapted(config, **options), adapted(None, **options)
    if "use_dora" in options:  # the magnitudes were taken from the base as it is; take them from the same
        plain.load_state_dict({n: t for n, t in model.state_dict().items() if "magnitude" in n}, strict=False)
    with OpLog() as log:
        actual = gradients(model)
    assert len(log.products()) == 14 + 11, "nothing is trained before the first q, k and v, and no base has a grad_weight"
    expected = gradients(plain)
    assert actual.keys() == expected.keys() and all("lora_" in name for name in actual)
    error = relative_error(*(torch.cat([g[n].flatten() for n in expected]) for g in (actual, expected)))
    assert 0.002 < error < {"int8": 0.05, "fp8": 0.15, "fp6": 0.15}[config.dtype]


def test_the_base_saves_nothing_for_backward():
    layer = nn.Sequential(nn.Linear(256, 512))
    layer.requires_grad_(False)
    model = get_peft_model(copy.deepcopy(layer), LoraConfig(r=8, target_modules=["0"]))
    quantize_(model, INT8)
    x = torch.randn(64, 256, requires_grad=True)
    with saved_bytes() as saved:
        model(x)
    assert saved(model) == 64 * 256 * 4 + 64 * 8 * 4, "what A and B read"
    model.base_model.disable_adapter_layers()
    with saved_bytes() as saved:
        model(x)
    assert saved(model) == 0


def test_modules_to_save_train():
    # An embedding or head is left alone; a linear layer that is to be trained needs a high-precision copy: adapt first.
    model = adapted(modules_to_save=["lm_head"])
    assert any("lm_head" in name for name in gradients(model))
    options = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    model = get_peft_model(llama(), lora(**options))
    quantize_(model, INT8)
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n and isinstance(p, HaloWeight)]
    assert len(trained) == 2 and all(w.master is not None and w.requires_grad for w in trained)
    assert sum("modules_to_save" in name for name in gradients(model)) == 2
    with pytest.raises(ValueError, match="frozen when it was converted"):
        logits(adapted(**options))


def test_several_adapters():
    model = adapted()
    model.add_adapter("other", lora(r=4))
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(other, base), "its B is zero"
    assert relative_error(first, base) > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    assert not torch.equal(logits(model), first)
    model.delete_adapter("default")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_is_exact_within_rounding(options, safe):
    model = adapted(**options)
    expected, base = logits(model), [w.dequantize() for w in bases(model)]
    model.merge_adapter(safe_merge=safe)
    assert all(w.master is None for w in bases(model)), "a merged base is still codes only"
    with OpLog() as log:
        merged = logits(model)
    assert len(log.products()) == 14
    assert 1e-4 < relative_error(merged, expected) < 0.03
    model.unmerge_adapter()
    assert 1e-4 < relative_error(logits(model), expected) < 0.03
    for weight, before in zip(bases(model), base, strict=True):
        assert 1e-4 < relative_error(weight.dequantize(), before) < 0.02


def test_exported_models_score_the_same_in_plain_transformers(tmp_path):
    model = adapted()
    expected, loss = logits(model), model(input_ids=IDS, labels=IDS).loss
    requantised = copy.deepcopy(model).merge_and_unload()
    assert len(bases(requantised)) == 14
    dequantize_(requantised)
    dequantize_(model)  # first, so that the merged weights are not rounded again
    exact = model.merge_and_unload()
    errors = []
    for i, export in enumerate((exact, requantised)):
        export.save_pretrained(tmp_path / str(i))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert not bases(loaded)
        assert loaded(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(loss.item(), rel=2e-3)
        errors.append(relative_error(logits(loaded), expected))
    assert 1e-4 < errors[0] < errors[1] < 0.03


def test_adapters_are_interchangeable_with_plain_peft(tmp_path):
    ours, plain = adapted(), adapted(None)
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("ours", "plain")]
    assert files[0] == files[1]
    base = llama()
    quantize_(base.requires_grad_(False), INT8)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "plain")), logits(ours))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = adapted().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with OpLog() as log:
        actual = gradients(model)
    assert len(log.products()) >= 14 * 3
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", [INT8, halo_config(1, "fp6")], ids=lambda c: c.dtype)
def test_a_block_compiles_whole(config):
    model = adapted(config, layers=1)
    block = model.get_base_model().model.layers[0]
    x = torch.randn(2, 32, 128, requires_grad=True)
    angles = model.get_base_model().model.rotary_emb(x, torch.arange(32).unsqueeze(0))
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    # tests/reference/test_packing.py and test_compile.py take Inductor to the same graphs.
    f = torch.compile(lambda x: block(x, position_embeddings=angles), fullgraph=True, backend="aot_eager")
    y, expected = f(x), block(x, position_embeddings=angles)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert relative_error(a, b) < 0.02


def train(model, steps: int = 12) -> list[float]:
    """Losses on one text, a fixed permutation of the tokens repeated."""
    tokens = torch.randperm(128, generator=torch.Generator().manual_seed(3)).repeat(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        starts = (torch.arange(4) * 37 + step * 11) % 256
        batch = torch.stack([tokens[s : s + 64] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", [INT8, halo_config(2, "int8"), FP8], ids=lambda c: f"{c.level}-{c.dtype}")
def test_adapter_training_follows_high_precision(config):
    expected, actual = train(adapted(None)), train(adapted(config))
    assert expected[-1] < 0.95 * expected[0], "it learns"
    assert actual != expected
    assert sum(actual[-5:]) == pytest.approx(sum(expected[-5:]), rel=0.01)


def test_loaded_quantised_then_adapted(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    llama().save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = get_peft_model(load(tmp_path, quantization_config=HaloQuantConfig(1, "int8")), lora())
    stir(model)
    reference = adapted()
    assert torch.equal(logits(model), logits(reference))
    assert gradients(model).keys() == gradients(reference).keys()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_an_adapter_that_writes_into_the_base_needs_its_master():
    """SHiRA adds a sparse trainable matrix to a clone of the base weight."""

    def shira(**options):
        base = nn.Sequential(nn.Linear(128, 128)).requires_grad_(False)
        quantize_(base, halo_config(1, "int8", **options))
        return get_peft_model(base, peft.ShiraConfig(r=4, target_modules=["0"]))

    x = torch.randn(4, 128)
    with pytest.raises(ValueError, match="something trainable was added to this weight.* frozen=False in the config"):
        shira()(x)
    model = shira(frozen=False)
    with OpLog() as log:
        model(x).sum().backward()
    assert log.products() and set(log.products()) == {torch.int8}
    assert [p.grad is not None for n, p in model.named_parameters() if "shira" in n] == [True]
