"""Checkpoints of mixtures whose experts are codes: written, read, dequantised, mixed with plain ones, and damaged."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

from halo_tensor import HaloWeight  # noqa: E402
from halo_tensor.transformers import HaloQuantConfig  # noqa: E402
from tests.helpers.checkpoints import copied, replacing, weights  # noqa: E402
from tests.helpers.moe_models import IDS, mixture  # noqa: E402
from tests.helpers.recording import OpLog  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
EXPERTS = "model.layers.0.mlp.experts"
DOWN = f"{EXPERTS}.down_proj"


def config(level=1, dtype="int8", **more):
    return HaloQuantConfig(level, dtype, min_features=16, **more)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def files(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders: a plain Qwen3-MoE, and the same with experts of int8."""
    folder = tmp_path_factory.mktemp("mixture")
    mixture("Qwen3Moe").save_pretrained(folder / "plain")
    AutoModel.from_pretrained(folder / "plain", quantization_config=config()).save_pretrained(folder / "int8")
    return folder


# Conversions of transformers that split experts, rename them besides, and none.
@pytest.mark.parametrize(("family", "dtype"), [("Qwen3Moe", "int8"), ("Mixtral", "fp8"), ("GptOss", "fp6")])
def test_a_round_trip_bit_for_bit(family, dtype, tmp_path):
    """The codes and scales of experts are those that were saved, and a second save writes the same file."""
    mixture(family).save_pretrained(tmp_path / "plain")
    model = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=config(1 if dtype == "int8" else 0, dtype))
    model.save_pretrained(tmp_path / "codes", max_shard_size="30KB" if family == "GptOss" else "1GB")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(newly initialised|high precision)")
        again = AutoModel.from_pretrained(tmp_path / "codes")
    held, read = weights(model), weights(again)
    assert held.keys() == read.keys() and sum(w.ndim == 3 for w in read.values()) == 2
    for name, weight in held.items():
        other = read[name]
        assert isinstance(other, HaloWeight) and other.master is None and other.recipe == weight.recipe
        assert torch.equal(other.codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert torch.equal(other.scale, weight.scale) and other.in_features_first == weight.in_features_first
        assert type(other.operand) is type(weight.operand) and other.operand.granularity == weight.operand.granularity
    with OpLog() as log:
        assert torch.equal(logits(model), logits(again))
    assert [n for n, _ in log.calls].count("grouped_mm") == 4, "both models multiply codes"
    assert again.hf_quantizer.report.converted == model.hf_quantizer.report.converted
    again.save_pretrained(tmp_path / "again", max_shard_size="30KB" if family == "GptOss" else "1GB")
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("codes", "again"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_what_the_file_holds(saved):
    tensors = files(saved / "int8")
    assert tensors[DOWN].shape == (6 * 64 * 48,) and tensors[DOWN].dtype == torch.int8
    assert tensors[f"{DOWN}_scale"].shape == (6, 64) and tensors[f"{DOWN}_scale"].dtype == torch.float32
    record = bytes(tensors[f"{DOWN}_recipe"].tolist()).decode()
    assert record == "int8 [6, 64, 48], a scale per row, rotated by H16·seed0, not balanced"
    own = files(saved / "plain")
    of_experts = {name for name in own if ".experts." in name}
    assert (
        tensors.keys() - {n for n in tensors if "_proj" in n or "lm_head" in n} <= own.keys()
        and not of_experts & tensors.keys()
    )


@pytest.mark.parametrize("saves", [False, True])
def test_dequantised_experts_have_the_names_of_the_original(saved, tmp_path, saves):
    """Also after the codes were saved, for which the model's own conversions are set aside."""
    model = AutoModel.from_pretrained(saved / "int8")
    if saves:
        model.save_pretrained(tmp_path / "codes")
    value = weights(model)[DOWN].dequantize()
    model.dequantize().save_pretrained(tmp_path / "plain")
    tensors = files(tmp_path / "plain")
    assert tensors.keys() == files(saved / "plain").keys()
    assert torch.equal(tensors[f"{EXPERTS}.3.down_proj.weight"], value[3])
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "plain")), logits(model))


def test_some_experts_are_codes_and_others_plain(tmp_path):
    mixture("Qwen3Moe", layers=2).save_pretrained(tmp_path / "plain")
    model = AutoModel.from_pretrained(tmp_path / "plain", quantization_config=config(skip="layers.1.mlp"))
    model.save_pretrained(tmp_path / "codes")
    tensors, own = files(tmp_path / "codes"), files(tmp_path / "plain")
    other = "model.layers.1.mlp.experts"
    assert torch.equal(tensors[f"{other}.5.up_proj.weight"], own[f"{other}.5.up_proj.weight"]) and DOWN in tensors
    again = AutoModel.from_pretrained(copied(tmp_path / "codes", tmp_path / "without skip", skip=""))
    assert torch.equal(logits(again), logits(model))
    report = again.hf_quantizer.report
    assert report.skipped[other] == "it was plain when it was saved" and EXPERTS in report.converted
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "codes" / "model.safetensors").read_bytes()

    def without(tensors):
        for name in [n for n in tensors if n.startswith(other)]:
            del tensors[name]

    with pytest.warns(UserWarning, match=f"newly initialised, since the checkpoint has no weights that fit: {other}"):
        missing = AutoModel.from_pretrained(copied(tmp_path / "codes", tmp_path / "missing", without, skip=""))
    assert missing.hf_quantizer.report.skipped[other] == "its weight is not in the checkpoint"


DAMAGES = {
    "no codes": (DOWN, lambda t: t.pop(DOWN), "its codes are missing"),
    "no scale": (DOWN, lambda t: t.pop(f"{DOWN}_scale"), "its scale is missing"),
    "no record": (DOWN, lambda t: t.pop(f"{DOWN}_recipe"), "the record of its recipe is missing"),
    "scales of rows": (DOWN, replacing(f"{DOWN}_scale", torch.Tensor.flatten), r"float32 \[384\], where .* float32 \[6, 64\]"),
    "fewer codes": (DOWN, replacing(DOWN, lambda t: t[:-1]), r"its codes are int8 \[18431\]"),
    "a NaN scale": (DOWN, replacing(f"{DOWN}_scale", lambda t: t * float("nan")), "not finite and positive"),
    "nothing of one weight": (
        DOWN,
        lambda t: [t.pop(f"{DOWN}{part}") for part in ("", "_scale", "_recipe")],
        "its codes are missing, and the experts' other weight has some",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_refused_by_name(saved, tmp_path, damage):
    name, change, says = DAMAGES[damage]
    with pytest.raises(ValueError, match=f"(?s)weights that cannot be used:.*  {name}: .*{says}") as error:
        AutoModel.from_pretrained(copied(saved / "int8", tmp_path, change))
    assert str(error.value).count("\n") == 1, "the others are not accused"


def test_another_recipe_and_a_reader_without_this_library(saved, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)gate_up_proj: its codes were written as .*seed0.*seed1"):
        AutoModel.from_pretrained(copied(saved / "int8", tmp_path / "seed", seed=1))
    folder = copied(saved / "int8", tmp_path / "lost")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="If these are codes, config.json has lost the quantization_config"):
        AutoModel.from_pretrained(folder, quantization_config=config())
