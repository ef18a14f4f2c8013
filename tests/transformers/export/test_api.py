"""export_compressed_tensors: the compressed-tensors package reads what was written, and computes what was trained."""

import json

import pytest
import torch

from halo_tensor import LayerConfigs, balance_, dequantize_, halo_config, quantize_, recipe_config
from halo_tensor.analysis.capture import hooked
from tests.helpers.errors import relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.recording import OpLog

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

from halo_tensor.transformers import HaloQuantConfig, export_compressed_tensors  # noqa: E402
from tests.helpers.served import WHY, dequantised, exact_activations, logits, read, sections, served_output  # noqa: E402

IDS = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
LAYERS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
CONFIGS = {
    "int8": halo_config(1, "int8"),
    "int8 without signs": halo_config(1, "int8", seed=None),
    "int8, full width": halo_config(1, "int8", block_size=None),
    "int8, a scale per tensor": halo_config(1, "int8", granularity="tensor"),
    "int8 without codes": halo_config(1, "int8", keep_codes=False),
    "fp8": halo_config(0, "fp8"),
    "fp8 level 1": halo_config(1, "fp8"),
}


def llama(dtype=torch.float32, **fields):
    """Its norms are unequal, so that activations have outliers and a rotation and a balance matter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 4} | fields)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p.copy_(torch.exp2(torch.randn(p.shape)))
    return model.to(dtype)


def train(model, steps=1):
    """Train, and assert that it was in low precision."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    with OpLog() as log:
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(log.products()) >= steps * 7
    return model.eval()


def converted(config, **fields):
    model = llama(**fields)
    quantize_(model, config)
    return model


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "fp8 level 1"])
def test_compressed_tensors_computes_what_was_trained(name, tmp_path):
    pytest.importorskip("compressed_tensors", reason=WHY)
    model = train(converted(CONFIGS[name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported = export_compressed_tensors(model, tmp_path)
    assert exported.layers == [f"model.layers.0.{layer}" for layer in LAYERS]
    assert exported.ignored == {"lm_head": "it was not converted"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model does not change"

    trained, server = logits(model, IDS), read(tmp_path)
    served = logits(server, IDS)
    if CONFIGS[name].keep_codes:  # without quantised activations, only rounding of float32 differs
        assert relative_error(logits(exact_activations(server), IDS), logits(dequantised(model), IDS)) < 1e-5
    dequantize_(model)
    plain = logits(model, IDS)
    # The package's step of int8 is 0.4 % wider than ours, so the errors are not equal, but of one size.
    error = relative_error(trained, plain)
    assert 1e-4 < error < 0.06
    least = 0.7 if CONFIGS[name].granularity == "row" else 0.3  # a scale per token is finer than one per tensor
    assert least * error < relative_error(served, plain) < 1.4 * error
    if CONFIGS[name].dtype == "fp8":
        assert relative_error(served, trained) < 1e-5, "the same codes of activations, too"
    elif CONFIGS[name].granularity == "row":
        assert 1e-6 < relative_error(served, trained) < 1.4 * error
    if name == "int8":
        assert relative_error(logits(read(tmp_path, transformed=False), IDS), trained) > 0.3, "the rotation matters"


@pytest.mark.parametrize("name", ["int8", "int8 without signs", "fp8 level 1"])
def test_a_servers_arithmetic_gives_the_outputs_of_training(name, tmp_path):
    """What vLLM's kernels compute from the files alone, on the inputs that reach the layers: 127 steps of int8, 448 of fp8."""
    model = converted(CONFIGS[name])
    exported = export_compressed_tensors(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    seen = {}
    with hooked(
        {n: model.get_submodule(n) for n in exported.layers}, lambda n: lambda m, a, _, y: seen.update({n: (a[0], y)})
    ):
        logits(model, IDS)
    assert len(seen) == 7
    for layer, (x, y) in seen.items():
        assert relative_error(served_output(state, layer, x), y) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int8 without signs", "fp8", "fp8 level 1"])
def test_on_a_gpu(name, tmp_path):
    """In bf16, trained; int8 is balanced. Outputs in bf16 differ from float64 by 0.17 %."""
    model = llama(hidden_size=2048, intermediate_size=5504).to("cuda", torch.bfloat16)
    ids = IDS.cuda()
    quantize_(model, CONFIGS[name])
    if CONFIGS[name].dtype == "int8":
        assert balance_(model, ids) == 7
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    exported = export_compressed_tensors(model, tmp_path)
    assert len(exported.layers) == 7, "every balance is folded"
    state = {key: value.cuda() for key, value in load_file(tmp_path / "model.safetensors").items()}
    seen = {}
    with hooked(
        {n: model.get_submodule(n) for n in exported.layers}, lambda n: lambda m, a, _, y: seen.update({n: (a[0], y)})
    ):
        logits(model, ids)
    for layer, (x, y) in seen.items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(state[f"{layer}.weight"], weight.codes)
        x = x if weight.gain is None else x * weight.undo_gain.to(x.dtype)
        folded = state[f"{layer}.weight_scale"].flatten() / weight.scale  # what the next layer's gain has multiplied
        assert relative_error(served_output(state, layer, x) / folded, y) < 0.006


@pytest.mark.parametrize("frozen", [False, True])
def test_codes_are_written_as_they_are(frozen, tmp_path):
    model = llama().requires_grad_(not frozen)
    quantize_(model, halo_config(1, "int8"))
    weights = {name: p for name, p in model.named_parameters() if name.endswith("proj.weight")}
    with OpLog() as log:
        export_compressed_tensors(model, tmp_path)
    assert not log.calls, "nothing is rotated or quantised"
    state = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        assert (weight.master is None) == frozen
        assert torch.equal(state[name], weight.codes) and state[name].dtype == torch.int8
        assert torch.equal(state[f"{name}_scale"], weight.scale[:, None])


def test_a_model_in_bf16_with_a_tied_head_and_biases(tmp_path):
    pytest.importorskip("compressed_tensors", reason=WHY)
    model = llama(torch.bfloat16, tie_word_embeddings=True, attention_bias=True)
    quantize_(model, halo_config(1, "int8"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    train(model)
    with pytest.warns(
        UserWarning, match=r"vLLM refuses layers that have a transform and a bias, as model.layers.0.self_attn.q_proj"
    ):
        export_compressed_tensors(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    scheme = sections(tmp_path)["transform_config"]["config_groups"]["H128_seed0"]
    assert (scheme["precision"], scheme["type"], scheme["head_dim"]) == ("torch.bfloat16", "random-hadamard", 128)
    server = read(tmp_path)
    assert 1e-4 < relative_error(logits(server, IDS), logits(model, IDS)) < 0.05
    assert server.lm_head.weight is server.model.embed_tokens.weight


def test_layers_in_different_formats(tmp_path):
    pytest.importorskip("compressed_tensors", reason=WHY)
    model = llama()
    attention = {f"model.layers.0.{name}": halo_config(1, "int8") for name in LAYERS[:4]}
    mlp = {f"model.layers.0.{name}": halo_config(0, "fp8") for name in LAYERS[4:]}
    quantize_(model, LayerConfigs(attention | mlp))
    export_compressed_tensors(train(model), tmp_path)
    config = sections(tmp_path)
    assert config["format"] == "mixed-precision"
    assert {g["format"]: len(g["targets"]) for g in config["config_groups"].values()} == {
        "int-quantized": 4,
        "float-quantized": 3,
    }
    assert relative_error(logits(exact_activations(read(tmp_path)), IDS), logits(dequantised(model), IDS)) < 1e-5


def test_a_merged_adapter(tmp_path):
    """LoRA on a frozen base of codes: merging writes through the weights, and their new codes are exported."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("compressed_tensors", reason=WHY)
    model = llama().requires_grad_(False)
    quantize_(model, halo_config(1, "int8"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    plain = logits(adapted, IDS)
    train(adapted, steps=4)
    trained = logits(adapted, IDS)
    with pytest.raises(TypeError, match=r"got a PeftModelForCausalLM: export what its merge_and_unload\(\) returns"):
        export_compressed_tensors(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"the model has adapters: export what merge_and_unload\(\) returns"):
        export_compressed_tensors(adapted.base_model.model, tmp_path)
    merged = adapted.merge_and_unload()
    assert len(export_compressed_tensors(merged, tmp_path).layers) == 7
    served = logits(read(tmp_path), IDS)
    learnt = relative_error(plain, trained)
    assert 1e-4 < relative_error(served, trained) < learnt / 4, "what the adapter has learnt is in the codes"


def test_a_model_that_was_loaded_as_codes(tmp_path, tiny):
    """Its own quantizer and its names are not in the exported checkpoint, and it still saves itself afterwards."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, quantization_config=HaloQuantConfig(1, "int8"))
    export_compressed_tensors(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    export_compressed_tensors(again, tmp_path / "c")
    a, c = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    assert a.keys() == c.keys() and all(torch.equal(a[name], c[name]) for name in a)
    assert sections(tmp_path / "a")["quant_method"] == "compressed-tensors" and "seed" not in sections(tmp_path / "a")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[name], model.get_parameter(name).codes) and not any("_recipe" in key for key in a)


def test_shards_and_a_tokenizer(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model = converted(halo_config(1, "int8"), hidden_size=512, intermediate_size=1024)
    model.save_pretrained = lambda path, **options: type(model).save_pretrained(
        model, path, **options | {"max_shard_size": "2MB"}
    )
    export_compressed_tensors(model, tmp_path, Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and "model.layers.0.mlp.up_proj.weight_scale" in index


@on_ranks(2)
def test_a_sharded_model_is_refused(world, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = converted(halo_config(1, "int8"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight is sharded. Gather the model first, .*full_state_dict=True"
    ):
        export_compressed_tensors(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            halo_config(1, "fp6"),
            r"(?s)cannot be exported as W8A8:\n.*q_proj, .*k_proj, .*v_proj and 4 more: its products are in fp6_e2m3",
        ),
        (recipe_config("jetfire"), "it has scales per 32x32 of X and per 32x32 of W: only those of granularity"),
        (
            recipe_config("hot_llm"),
            "(?s)no layer of this LlamaForCausalLM can be exported.*its forward product is in high precision",
        ),
        (None, r"(?s)no layer of this LlamaForCausalLM can be exported.*call quantize_.*it was not converted"),
    ],
)
def test_what_cannot_be_represented_is_one_error(config, message, tmp_path):
    model = llama()
    if config is not None:
        quantize_(model, config)
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_other_bad_input(tmp_path):
    model = converted(halo_config(1, "int8"))
    with pytest.raises(TypeError, match="got a OptimizedModule: torch.compile has wrapped it"):
        export_compressed_tensors(torch.compile(model), tmp_path)
    with pytest.raises(TypeError, match="got a Linear: only such a model has the config.json"):
        export_compressed_tensors(torch.nn.Linear(128, 128), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; pass a folder"):
        export_compressed_tensors(model, tmp_path / "file")
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        export_compressed_tensors(converted(halo_config(1, "int8")).to("meta"), tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj.weight has a NaN or Inf"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hqq = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["hqq"]
    model.hf_quantizer = hqq.__new__(hqq)
    with pytest.raises(ValueError, match="is quantised by transformers' HqqHfQuantizer"):
        export_compressed_tensors(model, tmp_path)


@pytest.mark.parametrize("heads", [4, 2])
def test_a_balanced_model(heads, tmp_path):
    pytest.importorskip("compressed_tensors", reason=WHY)
    model = converted(halo_config(1, "int8"), num_key_value_heads=heads, hidden_size=256)
    assert balance_(model, IDS) == 7
    train(model)
    if heads == 4:
        exported = export_compressed_tensors(model, tmp_path)
    else:
        with pytest.warns(
            UserWarning, match=r"in high precision, although .*: 1 of 7 layers, .*o_proj \(its balance cannot be folded"
        ):
            exported = export_compressed_tensors(model, tmp_path)
    assert len(exported.layers) == (7 if heads == 4 else 6)
    server = read(tmp_path)
    plain = dequantised(model)
    if heads == 4:
        assert relative_error(logits(exact_activations(server), IDS), logits(plain, IDS)) < 1e-5
    else:
        assert 1e-4 < relative_error(logits(server, IDS), logits(model, IDS)) < 0.03
