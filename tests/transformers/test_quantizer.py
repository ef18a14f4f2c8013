"""Loading, saving and reloading quantised models through transformers' own entry points."""

import json
import shutil
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, quantize_
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from halo_tensor.transformers import HaloQuantConfig  # noqa: E402
from tests.helpers.checkpoints import CONFIGS, IDS, WEIGHT, copied, logits, replacing, weights  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
AutoClassifier = transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize(("level", "dtype"), [(1, "int8"), (0, "fp8"), (1, "fp6"), (0, "fp6")])
def test_loads_what_quantize_makes_and_reloads_it_bit_for_bit(plain, tmp_path, level, dtype):
    granularity = "tensor" if (level, dtype) == (0, "fp8") else "row"
    expected = AutoModel.from_pretrained(plain)
    quantize_(expected, halo_config(level, dtype, granularity=granularity, frozen=True))
    config = HaloQuantConfig(level, dtype, granularity=granularity)
    model = AutoModel.from_pretrained(plain, quantization_config=config)
    assert len(weights(model)) == 14 and all(w.master is None and not w.requires_grad for w in weights(model).values())
    with OpLog() as log:
        assert torch.equal(logits(model), logits(expected))
    assert len(log.products()) == 28

    model.save_pretrained(tmp_path / "quantised")
    again = AutoModel.from_pretrained(tmp_path / "quantised")
    assert weights(again).keys() == weights(model).keys()
    assert torch.equal(logits(again), logits(model))
    for name, weight in weights(again).items():
        assert torch.equal(weight.operand.scale, weights(model)[name].operand.scale)
        assert torch.equal(weight.dequantize(), weights(model)[name].dequantize())
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("quantised", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", ["int8", "fp6"])
def test_balanced_codes_are_saved_with_what_they_were_made_with(plain, tmp_path, dtype):
    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, dtype))
    unbalanced = logits(model)
    assert balance_(model, IDS) == 14
    assert not torch.equal(logits(model), unbalanced)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModel.from_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(again), logits(model))
    for name, weight in weights(again).items():
        assert torch.equal(weight.gain, weights(model)[name].gain)
        assert torch.equal(weight.dequantize(), weights(model)[name].dequantize())
    attention = again.model.layers[0].self_attn
    assert attention.q_proj.weight.gain is attention.k_proj.weight.gain
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("quantised", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.52), ("fp8", 0.52), ("fp6", 0.40)])
def test_the_checkpoint_is_as_small_as_the_codes(plain, tmp_path, dtype, share):
    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, dtype), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bf16 = sum(w.numel() * 2 for w in weights(model).values())
    of_weights = {n for n in tensors if n.removesuffix("_scale").removesuffix("_recipe") in weights(model)}
    stored = [tensors[n] for n in of_weights if not n.endswith("_recipe")]
    assert len(stored) == 28 and sum(tensors[n].nbytes for n in of_weights if n.endswith("_recipe")) < 14 * 100
    assert 0.9 * share * bf16 < sum(t.nbytes for t in stored) <= share * bf16
    # Everything else is as it was.
    original = AutoModel.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    others = tensors.keys() - of_weights
    assert others == original.keys() - weights(model).keys()
    assert all(torch.equal(tensors[n], original[n]) for n in others)


def test_dtypes_and_shards(plain, tmp_path):
    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(0, "fp8"), dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = AutoModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))
    wide = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert 0 < relative_error(logits(wide), logits(model)) < 0.05


def test_one_weight_at_a_time_is_in_high_precision(plain, monkeypatch):
    """While a weight is quantised, every earlier one is codes and no later one is there yet."""
    made, seen = HaloWeight.from_hp.__func__, []

    def from_hp(cls, master, recipe, frozen=False, gains=None, **options):
        seen.append(master)
        assert frozen
        return made(cls, master, recipe, frozen, gains, **options)

    monkeypatch.setattr(HaloWeight, "from_hp", classmethod(from_hp))
    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8"))
    masters = {s.data_ptr() for t in seen for s in get_untyped_storages(t)}
    held = {s.data_ptr() for p in model.parameters() for s in get_untyped_storages(p)}
    assert len(seen) == 14 and not masters & held


def test_dequantising_gives_a_plain_checkpoint(plain, tmp_path):
    for i, give_back in enumerate([lambda m: m.dequantize(), dequantize_]):
        model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8"))
        quantised = logits(model)
        give_back(model)
        assert not weights(model)
        model.save_pretrained(tmp_path / str(i))
        assert "quantization_config" not in json.loads((tmp_path / str(i) / "config.json").read_text())
        exported = AutoModel.from_pretrained(tmp_path / str(i))
        assert torch.equal(logits(exported), logits(model))
        assert 1e-4 < relative_error(logits(exported), quantised) < 0.03


def test_training_a_bare_quantised_model_is_refused_by_the_trainer(plain):
    from transformers.trainer_utils import validate_quantization_for_training

    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)


def test_errors(plain, tmp_path):
    with pytest.raises(ValueError, match="level must be one of 0, 1, 2"):
        HaloQuantConfig(level=3)
    with pytest.raises(ValueError, match="dtype 'bf16' does not"):
        HaloQuantConfig(dtype="bf16")
    with pytest.raises(ValueError, match="(?s)no layer of this LlamaForCausalLM can be quantised:.*min_features=512"):
        AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(min_features=512))
    with pytest.raises(ValueError, match="cannot be offloaded"):
        AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(), device_map={"model": 0, "lm_head": "cpu"})


def test_a_reader_without_the_registration_stops(plain, tmp_path, monkeypatch):
    from transformers.quantizers import auto

    AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8")).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "halo")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "halo")
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModel.from_pretrained(tmp_path)


def test_the_package_does_not_need_transformers():
    import subprocess
    import sys

    code = "import sys, halo_tensor; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_layers_are_chosen_as_by_quantize(plain):
    model = AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8", skip="lm_head|down_proj"))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and isinstance(m.weight, HaloWeight)]
    assert len(names) == 12 and not any("down_proj" in n for n in names)
    assert type(model.lm_head.weight) is nn.Parameter


def test_plain_weights_of_another_shape_are_mismatches(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 384}))
    # Transformers 5.6 looks at no shape of a quantised model.
    with pytest.raises(
        (RuntimeError, ValueError), match=f"ignore_mismatched_sizes|{WEIGHT}: it is .128, 256., where"
    ) as error:
        AutoModel.from_pretrained(folder, quantization_config=CONFIGS["int8"])
    if error.type is ValueError:
        return
    with pytest.warns(
        UserWarning, match="newly initialised.*down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"
    ):
        model = AutoModel.from_pretrained(folder, quantization_config=CONFIGS["int8"], ignore_mismatched_sizes=True)
    assert len(weights(model)) == 4 and type(model.get_parameter(WEIGHT)) is nn.Parameter
    assert model.get_parameter(WEIGHT).shape == (128, 384) and logits(model).isfinite().all()


def test_plain_parts_of_another_shape_are_refused(quantised, tmp_path):
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        folder = copied(quantised["fp8"], tmp_path / name, replacing(name, lambda t: t[:-16]))
        with pytest.raises((RuntimeError, ValueError), match=f"ignore_mismatched_sizes|  {name}: it is .*, where"):
            AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("labels", [4, 128])
def test_a_head_that_the_checkpoint_lacks_is_plain(quantised, tiny, tmp_path, labels):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [
            AutoClassifier.from_pretrained(quantised["fp8"], num_labels=labels),
            AutoClassifier.from_pretrained(tiny, num_labels=labels, quantization_config=CONFIGS["fp8"]),
        ]
    told = [str(w.message) for w in caught if "newly initialised" in str(w.message)]
    assert len(told) == (2 if labels == 128 else 0) and all(t.endswith(": score") for t in told)
    for model in models:
        model.config.pad_token_id = 0
        assert len(weights(model)) == 7
        assert type(model.score.weight) is nn.Parameter and model.score.weight.requires_grad
        assert 0.01 < model.score.weight.std() < 0.03, "initialised"
    with torch.no_grad():
        assert torch.equal(models[0].model(IDS)[0], models[1].model(IDS)[0])
    models[0].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = AutoClassifier.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, models[0].score.weight)
    assert torch.equal(logits(again), logits(models[0]))


def test_a_layer_that_the_plain_checkpoint_lacks_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors[WEIGHT]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="left in high precision and newly initialised.*: model.layers.0.mlp.down_proj$"):
        model = AutoModel.from_pretrained(folder, quantization_config=CONFIGS["int8"])
    assert len(weights(model)) == 6
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and len(weights(again)) == 6


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_options_of_loading_change_nothing(quantised, tiny, options):
    if "device_map" in options:
        pytest.importorskip("accelerate")
    expected = logits(AutoModel.from_pretrained(quantised["fp6"]))
    assert torch.equal(logits(AutoModel.from_pretrained(quantised["fp6"], **options)), expected)
    assert torch.equal(logits(AutoModel.from_pretrained(tiny, quantization_config=CONFIGS["fp6"], **options)), expected)


@pytest.mark.parametrize(("dtype", "half"), [("int8", torch.bfloat16), ("fp8", torch.float16), ("fp6", torch.bfloat16)])
def test_another_dtype_leaves_codes_as_they_are(quantised, tmp_path, dtype, half):
    model = AutoModel.from_pretrained(quantised[dtype])
    loaded, moved = AutoModel.from_pretrained(quantised[dtype], dtype=half), deepcopy(model).to(half)
    moved.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    for other in (loaded, moved, again):
        assert all(p.dtype == half for p in other.parameters())
        for name, weight in weights(model).items():
            same = other.get_parameter(name)
            assert torch.equal(same.codes.view(torch.uint8), weight.codes.view(torch.uint8))
            assert torch.equal(same.scale, weight.scale)
            assert torch.equal(same.dequantize(), weight.dequantize().to(half))
    assert relative_error(logits(loaded), logits(model)) < 0.05
    with pytest.raises(ValueError, match="half.* is not supported for quantized"):
        model.half()


def test_a_model_that_was_converted_otherwise_is_not_saved(quantised, tmp_path):
    model = AutoModel.from_pretrained(quantised["int8"])
    quantize_(model, halo_config(1, "int8", seed=1, frozen=True))
    with pytest.raises(ValueError, match="proj.weight was converted again, with another recipe"):
        model.save_pretrained(tmp_path)
    dequantize_(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_merged_adapters_are_saved_quantised(quantised, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(quantised["fp8"])
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert len(weights(merged)) == 7 and not torch.equal(logits(merged), before)
    merged.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert len(weights(again)) == 7 and torch.equal(logits(again), logits(merged))


def test_resized_embeddings_stay_plain_and_are_saved(quantised, tmp_path):
    model = AutoModel.from_pretrained(quantised["int8"])
    before = logits(model)
    model.resize_token_embeddings(256)
    assert len(weights(model)) == 7
    assert torch.equal(logits(model)[..., :192], before) and logits(model).shape[-1] == 256
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_a_converted_output_layer_that_is_resized_is_told(tiny):
    model = AutoModel.from_pretrained(tiny)
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert isinstance(model.lm_head.weight, HaloWeight)
    with pytest.warns(UserWarning, match=r"lm_head .192, 128. of a LlamaForCausalLM, which is converted, is replaced"):
        model.resize_token_embeddings(256)
    assert type(model.lm_head.weight) is nn.Parameter and len(weights(model)) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.resize_token_embeddings(128)  # plain to plain
        model.lm_head = deepcopy(model.model.layers[0].mlp.down_proj)  # plain to converted
        model.lm_head = model.model.layers[0].mlp.down_proj  # converted to converted
        model.model.layers[0].mlp.down_proj = nn.Identity()


def test_a_converted_output_layer_that_is_tied_is_not_resized(tiny):
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=True)
    model = AutoModel.from_config(config)
    quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    assert isinstance(model.lm_head.weight, HaloWeight) and model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="dequantize_.model. before changing its shape"):
        model.resize_token_embeddings(256)
    dequantize_(model)
    model.resize_token_embeddings(256)
    assert logits(model).shape[-1] == 256
