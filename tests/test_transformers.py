"""Loading, saving and reloading quantised models through transformers' own entry points."""

import json

import pytest
import torch
from torch import nn
from torch.distributed._tools.common_utils import get_untyped_storages

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, quantize_
from tests.util import OpLog, relative_error

transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402

from halo_tensor.transformers import HaloQuantConfig  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
IDS = torch.arange(64).view(2, 32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a saved model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
    )
    folder = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500KB")
    return folder


def weights(model) -> dict[str, HaloWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, HaloWeight)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


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
    stored = [t for n, t in tensors.items() if n.removesuffix("_scale") in weights(model)]
    assert 0.9 * share * bf16 < sum(t.nbytes for t in stored) <= share * bf16
    # Everything else is as it was.
    original = AutoModel.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    others = {n for n in tensors if n.removesuffix("_scale") not in weights(model)}
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

    def from_hp(cls, master, recipe, frozen=False, gains=None):
        seen.append(master)
        assert frozen
        return made(cls, master, recipe, frozen, gains)

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


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(plain, tmp_path):
    AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig(1, "int8")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["quant_method"] == "halo"
    config["quantization_config"]["dtype"] = "fp8"
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError):
        AutoModel.from_pretrained(tmp_path)


def test_a_config_with_a_field_that_is_not_known_is_refused(plain, tmp_path):
    AutoModel.from_pretrained(plain, quantization_config=HaloQuantConfig()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["dtype"] == HaloQuantConfig().dtype == "int8", "what a default was is written"
    config["quantization_config"]["groups"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has a field 'groups' that this halo_tensor does not know \(it knows .*level, dtype"
    ):
        AutoModel.from_pretrained(tmp_path)


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
