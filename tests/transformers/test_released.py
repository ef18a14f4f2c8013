"""Checkpoints that other libraries released in 8 bits, as a base: fp8 with blocks, and compressed-tensors."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from halo_tensor import HadamardQuantTensor, HaloWeight, halo_config, quantize_
from halo_tensor.weight.tensor import dense_value

transformers = pytest.importorskip("transformers", "5.21")

from transformers.quantizers import AutoHfQuantizer  # noqa: E402

from halo_tensor.transformers import HaloQuantConfig  # noqa: E402
from halo_tensor.transformers.layouts import layout_of  # noqa: E402
from tests.helpers.checkpoints import IDS, WEIGHT, copied, logits, replacing, weights  # noqa: E402
from tests.helpers.recording import OpLog  # noqa: E402
from tests.helpers.released import fp8_config, w8a8_config, write_released  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
E4M3 = torch.float8_e4m3fn
LAYOUTS = {
    "blocks": (fp8_config(), (128, 128), E4M3, "weight_scale_inv"),
    "whole": (fp8_config(None), (None, None), E4M3, "weight_scale_inv"),
    "w8a8 int8": (w8a8_config(), (1, None), torch.int8, "weight_scale"),
    "w8a8 fp8": (w8a8_config("float", "tensor"), (None, None), E4M3, "weight_scale"),
    "w8a8 blocks": (w8a8_config("float", "block", block_structure=[128, 128]), (128, 128), E4M3, "weight_scale"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder of a plain model with 320 intermediate features, 2.5 blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 4}
    folder = tmp_path_factory.mktemp("odd")
    config = transformers.LlamaConfig(vocab_size=192, num_hidden_layers=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blocks(odd, tmp_path_factory):
    """The folder of the same model in fp8 with blocks."""
    return write_released(odd, tmp_path_factory.mktemp("blocks"), *LAYOUTS["blocks"])[0]


def load(folder, quantization=None, **kwargs):
    return AutoModel.from_pretrained(folder, quantization_config=quantization or HaloQuantConfig(1, "int8"), **kwargs)


FORMATS = [(1, "int8", torch.bfloat16), (0, "fp8", torch.float32), (1, "fp6", torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "level", "dtype", "half"), [*((n, *FORMATS[0]) for n in LAYOUTS), *(("blocks", *f) for f in FORMATS[1:])]
)
def test_codes_are_those_of_the_dequantised_model(odd, tmp_path, name, level, dtype, half):
    folder, values = write_released(odd, tmp_path / "released", *LAYOUTS[name])
    model = load(folder, HaloQuantConfig(level, dtype), dtype=half)
    expected = AutoModel.from_pretrained(odd, dtype=half)
    expected.load_state_dict(values)
    dense = {name: p.detach().clone() for name, p in expected.named_parameters()}
    quantize_(expected, halo_config(level, dtype, frozen=True))
    assert len(weights(model)) == 14 and weights(model).keys() == weights(expected).keys()
    for layer, weight in weights(model).items():
        other = weights(expected)[layer]
        assert weight.master is None and not weight.requires_grad and weight.dtype == half
        assert torch.equal(weight.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(weight.scale, other.scale)
    assert torch.equal(logits(model), logits(expected))
    cosines = model.halo_recoding.cosines
    assert cosines.keys() == weights(model).keys()
    low, high = {"int8": (0.9999, 0.999999), "fp8": (0.999, 1.0), "fp6": (0.998, 0.99995)}[dtype]
    for layer, cosine in cosines.items():
        actual, exact = (t.flatten().double() for t in (weights(model)[layer].operand.dequantize(), dense[layer]))
        assert cosine == pytest.approx(torch.cosine_similarity(actual, exact, 0).item(), abs=1e-7)
        assert low < cosine <= high + 1e-9
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert saved.keys() == vars(HaloQuantConfig()).keys() and saved["quant_method"] == "halo"
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "saved")), logits(model))


def test_the_report(blocks):
    model = load(blocks)
    recoding = model.halo_recoding
    assert model.hf_quantizer.recoding is recoding and recoding.plain == ["lm_head.weight", "model.embed_tokens.weight"]
    assert recoding.cosines[recoding.worst] == min(recoding.cosines.values()) <= recoding.mean < 1
    text = str(recoding)
    assert text.startswith("14 weights of a checkpoint (fp8: float8_e4m3fn with a scale for a block of 128×128 or the weight)")
    assert f"cosine {recoding.mean:.5f} on average, at least {recoding.cosines[recoding.worst]:.5f} ({recoding.worst})" in text
    assert "left so: lm_head.weight, model.embed_tokens.weight" in text
    peft = pytest.importorskip("peft")
    assert peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).halo_recoding is recoding


def test_layers_that_the_checkpoint_has_in_high_precision_stay_so(odd, tmp_path):
    config = fp8_config(modules_to_not_convert=["k_proj"])
    folder, values = write_released(odd, tmp_path, config, *LAYOUTS["blocks"][1:], skip=("lm_head", "k_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for frozen in (True, False):
            model = load(folder, HaloQuantConfig(1, "int8", frozen=frozen))
            assert len(weights(model)) == 12
            for i, layer in enumerate(model.model.layers):
                assert type(layer.self_attn.k_proj.weight) is nn.Parameter
                assert torch.equal(layer.self_attn.k_proj.weight, values[f"model.layers.{i}.self_attn.k_proj.weight"])
            assert "model.layers.0.self_attn.k_proj.weight" in model.halo_recoding.plain
    report = load(folder).hf_quantizer.report
    assert report.skipped["model.layers.1.self_attn.k_proj"] == "the checkpoint has it in high precision"


def test_8_bit_weights_of_other_layers_are_dequantised_with_a_warning(odd, tmp_path):
    folder, values = write_released(odd, tmp_path, *LAYOUTS["w8a8 int8"], skip=())
    with pytest.warns(UserWarning, match="(?s)dequantised to float32 .*: lm_head.weight, model.layers.0.mlp.up_proj.weight"):
        model = load(folder, HaloQuantConfig(1, "int8", skip="up_proj"))
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        assert name in model.halo_recoding.dequantised and torch.equal(model.get_parameter(name), values[name])
    assert len(weights(model)) == len(model.halo_recoding.cosines) == 12


class Live(TorchDispatchMode):
    """The largest number of bytes, at any time, of tensors of floating dtypes of 16 bits or more that ops made."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (HadamardQuantTensor, HaloWeight)) for t in types):
            return NotImplemented  # the subclass handles the op, and calls others on its inner tensors
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if (
                type(tensor) is torch.Tensor
                and tensor.device.type == "cpu"
                and tensor.is_floating_point()
                and tensor.itemsize > 1
            ):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return made


def test_a_few_weights_at_a_time_are_in_high_precision(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=5, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    folder, _ = write_released(tmp_path / "plain", tmp_path / "released", *LAYOUTS["blocks"])

    def no_threads(*args, **kwargs):
        raise AssertionError("threads would load weights ahead")

    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", no_threads)
    with Live() as live:
        model = load(folder, dtype=torch.bfloat16)
    assert len(weights(model)) == 35
    left = sum(p.nbytes for p in model.parameters() if not isinstance(p, HaloWeight))
    largest, total = 256 * 512 * 2, sum(w.numel() for w in weights(model).values()) * 2
    assert largest < live.peak - left < 10 * largest < total / 2, "each is quantised in float32"

    with Live() as live:  # what it would be
        load(folder, HaloQuantConfig(1, "int8", frozen=False), dtype=torch.bfloat16)
    assert live.peak > total


def test_adapters_train_with_8_bit_products(blocks):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = load(blocks)
    codes = {name: weight.codes.clone() for name, weight in weights(model).items()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        with OpLog() as log:
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Nothing trains below the first layer's inputs: q, k and v of the first layer have no gradient of their input.
    assert log.products() == [torch.int8] * (14 + 11), "forward and backward"
    assert losses[-1] < 0.7 * losses[0]
    kept = {name.replace("base_model.model.", "").replace("base_layer.", ""): w for name, w in weights(model).items()}
    assert kept.keys() == codes.keys() and all(torch.equal(kept[name].codes, c) for name, c in codes.items())


@pytest.mark.parametrize("name", ["blocks", "w8a8 int8"])
def test_full_training_starts_from_the_dequantised_values(odd, tmp_path, name):
    from transformers.trainer_utils import validate_quantization_for_training

    folder, values = write_released(odd, tmp_path / "released", *LAYOUTS[name])
    model = load(folder, HaloQuantConfig(1, "int8", frozen=False))
    validate_quantization_for_training(model)
    assert len(weights(model)) == 14 and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(dense_value(p), values[name]) for name, p in model.named_parameters())
    assert len(model.halo_recoding.cosines) == 14 and 0.9999 < model.halo_recoding.mean < 1
    frozen = load(folder)
    assert torch.equal(logits(model), logits(frozen)) and model.halo_recoding.cosines == frozen.halo_recoding.cosines
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        with OpLog() as log:
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert log.products() == [torch.int8] * 3 * 14 and losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    trained = AutoModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(dense_value(p), trained.get_parameter(n)) for n, p in model.named_parameters())


def test_full_training_from_a_plain_checkpoint(odd):
    model, expected = load(odd, HaloQuantConfig(1, "int8", frozen=False)), AutoModel.from_pretrained(odd)
    quantize_(expected, halo_config(1, "int8"))
    assert len(weights(model)) == 14 and torch.equal(logits(model), logits(expected))
    assert all(w.requires_grad for w in weights(model).values()) and not hasattr(model, "halo_recoding")


MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 128,
        "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    },
}  # fmt: skip


def released_mixture(tmp_path, kind, width):
    """A released mixture whose experts have ``width`` intermediate features, and its dequantised values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": width, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=192, num_hidden_layers=2, num_key_value_heads=4, num_experts_per_tok=2, **sizes, **MIXTURES[kind]
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "plain")
    return write_released(tmp_path / "plain", tmp_path / "released", *LAYOUTS["blocks"], skip=("lm_head", "mlp.gate."))


def check_experts(experts, values, equal):
    for i in range(4):
        parts = [values[f"model.layers.1.mlp.experts.{i}.{name}_proj.weight"] for name in ("gate", "up", "down")]
        assert equal(dense_value(experts.gate_up_proj)[i], torch.cat(parts[:2])) and equal(
            dense_value(experts.down_proj)[i], parts[2]
        )


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_codes(tmp_path, kind):
    folder, values = released_mixture(tmp_path, kind, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load(folder)
    experts = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = experts._parameters[name]
        assert isinstance(weight, HaloWeight) and weight.master is None
        assert 0.9999 < model.halo_recoding.cosines[f"model.layers.1.mlp.experts.{name}"] < 1
    check_experts(experts, values, lambda a, b: 0 < (a - b).norm() < 0.02 * b.norm())
    assert not model.halo_recoding.dequantised
    with OpLog() as log:
        logits(model)
    assert any("grouped" in name for name, _ in log.calls)
    model.save_pretrained(tmp_path / "codes")
    again = AutoModel.from_pretrained(tmp_path / "codes")
    assert torch.equal(logits(again), logits(model)) and weights(again).keys() == weights(model).keys()

    trained = load(folder, HaloQuantConfig(1, "int8", frozen=False))
    check_experts(trained.model.layers[1].mlp.experts, values, torch.equal)
    assert trained.halo_recoding.cosines == pytest.approx(model.halo_recoding.cosines, abs=1e-6)
    assert isinstance(trained.model.layers[1].mlp.experts._parameters["down_proj"], HaloWeight)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_are_not_converted_are_dequantised_with_a_warning(tmp_path, kind):
    folder, values = released_mixture(tmp_path, kind, 96)
    with pytest.warns(UserWarning, match="8-bit in the checkpoint, and dequantised to float32 .*1.mlp.experts.down_proj"):
        model = load(folder)
    assert {f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")} <= set(
        model.halo_recoding.dequantised
    )
    assert weights(model).keys() == model.halo_recoding.cosines.keys() and len(weights(model)) >= 11
    check_experts(model.model.layers[1].mlp.experts, values, torch.equal)
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names and not any("scale_inv" in name for name in names)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "saved")), logits(model))


def damaged(folder, tmp_path, change, **quantization):
    return copied(folder, tmp_path / "damaged", change, **quantization)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{WEIGHT}_scale_inv"), f"{WEIGHT}: its scale is missing"),
        (lambda t: t.pop(WEIGHT), f"{WEIGHT}: its codes are missing"),
        (
            replacing(f"{WEIGHT}_scale_inv", lambda s: s[:, :2]),
            f"{WEIGHT}: its scale is float32 .1, 2., which does not divide",
        ),
        (replacing(WEIGHT, lambda w: w.view(torch.int8)), f"{WEIGHT}: it is int8 .*config.json says fp8: float8_e4m3fn"),
        (replacing(f"{WEIGHT}_scale_inv", lambda s: s / 0), f"{WEIGHT}: some of its values are not finite"),
        (replacing("model.norm.weight", lambda w: w.to(E4M3)), "model.norm.weight: it is 8-bit, and no scale in a layout"),
    ],
)
def test_weights_that_cannot_be_read_are_named(blocks, tmp_path, change, message):
    for frozen in (True, False):
        with pytest.raises(ValueError, match=f"(?s)weights that cannot be used:\n  {message}"):
            load(damaged(blocks, tmp_path, change), HaloQuantConfig(frozen=frozen))


def test_layouts_and_configs_that_do_not_fit(odd, blocks, quantised, tmp_path):
    with pytest.raises(ValueError, match="its fmt is 'e5m2'"):
        load(copied(blocks, tmp_path / "a", fmt="e5m2"))
    with pytest.raises(ValueError, match="its quant_method is 'awq'"):
        load(copied(blocks, tmp_path / "b", quant_method="awq"))
    # transformers ignores a method that it does not know
    with pytest.raises(ValueError, match="down_proj.weight is 8-bit, and config.json does not say how"):
        load(copied(blocks, tmp_path / "c", quant_method="of another library"))
    plain = copied(blocks, tmp_path / "d", lambda t: t.update(load_file(odd / "model.safetensors")))
    with pytest.raises(ValueError, match="(?s)cannot be used:.*_proj.weight: it is float32 .*, where the config.json says"):
        load(plain)

    def without_scales(tensors):
        tensors.update(load_file(odd / "model.safetensors"))
        for name in [name for name in tensors if name.endswith("scale_inv")]:
            del tensors[name]

    with pytest.raises(ValueError, match="config.json says that this checkpoint is quantised .*, and none of its weights is"):
        load(copied(blocks, tmp_path / "e", without_scales))
    with pytest.raises(ValueError, match="frozen=False is for plain checkpoints and those of other libraries"):
        load(quantised["int8"], HaloQuantConfig(frozen=False))
    with pytest.raises(ValueError, match="no layer of this LlamaForCausalLM can be quantised"):
        load(blocks, HaloQuantConfig(min_features=1024))


def test_other_configs_are_merged_as_before(blocks):
    """transformers still refuses configs of other classes."""
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config but you are passing a BitsAndBytesConfig"):
        AutoModel.from_pretrained(blocks, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    config = HaloQuantConfig(1, "int8")
    load(blocks, config)
    assert vars(config) == vars(HaloQuantConfig(1, "int8")), "the user's config stays as it was"
    own = transformers.FineGrainedFP8Config(weight_block_size=(64, 128))
    merged = AutoHfQuantizer.merge_quantization_configs(own, config)
    assert merged is not config and merged.level == 1 and "64×128" in str(layout_of(merged.source))


def test_values_are_those_of_transformers(tiny, tmp_path):
    """With widths that blocks divide, which transformers 5.23 needs to dequantise."""
    folder, _ = write_released(tiny, tmp_path, *LAYOUTS["blocks"])
    config = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = AutoModel.from_pretrained(folder, quantization_config=config)
    ours = load(folder, HaloQuantConfig(frozen=False))
    assert len(weights(ours)) == 7
    assert all(torch.equal(dense_value(ours.get_parameter(name)), p) for name, p in theirs.named_parameters())


SCHEMES = [
    ("int", "channel", {}),
    ("float", "channel", {}),
    ("float", "tensor", {}),
    ("float", "block", {"block_structure": [128, 128]}),
    ("int", "group", {"group_size": 32}),
]


@pytest.mark.parametrize(("kind", "strategy", "sizes"), SCHEMES)
def test_files_that_compressed_tensors_writes(odd, tmp_path, kind, strategy, sizes):
    pytest.importorskip("compressed_tensors", reason="the extra compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply

    from tests.helpers.released import coded

    model = AutoModel.from_pretrained(odd)
    arguments = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, **sizes)
    tokens = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)  # int without it is packed in int32
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=tokens if kind == "int" else None)
    apply(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    dtype = {"int": torch.int8, "float": E4M3}[kind]
    block = {"channel": (1, None), "tensor": (None, None), "block": (128, 128), "group": (1, 32)}[strategy]
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.copy_(coded(layer.weight.detach(), block, dtype)[1].view(layer.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))

    ours = load(tmp_path, HaloQuantConfig(frozen=False))
    theirs = AutoModel.from_pretrained(tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert len(weights(ours)) == 14 and len(weights(load(tmp_path))) == 14
    assert all(torch.equal(dense_value(ours.get_parameter(name)), p) for name, p in theirs.named_parameters())
    assert 0.9999 < ours.halo_recoding.cosines[WEIGHT] < 1
