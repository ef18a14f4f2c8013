"""What a checkpoint holds of a weight, tied to what it was made with, and damaged."""

import json
from pathlib import Path

import pytest
import torch

from halo_tensor import halo_config

transformers = pytest.importorskip("transformers")
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from halo_tensor.transformers import HaloQuantConfig  # noqa: E402
from tests.helpers.checkpoints import WEIGHT, copied, logits, replacing, weights  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
AutoClassifier = transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize(
    ("dtype", "changed", "says"),
    [
        ("int8", {"seed": 1}, "H128·seed0.*H128·seed1"),
        ("int8", {"seed": None}, "H128·seed0.*H128,"),
        ("int8", {"level": 0}, "H128·seed0.*not rotated"),
        ("fp6", {"level": 1, "dtype": "fp6_e3m2"}, "not rotated.*H128·seed0"),
        ("fp6", {"dtype": "fp6_e2m3"}, "fp6_e3m2.*fp6_e2m3"),
        ("fp8", {"block_size": 64}, "H128·seed0.*H64·seed0"),
        ("fp8", {"block_size": None}, "H128·seed0.*H256·seed0"),
        ("fp8", {"granularity": "tensor"}, "a scale per row.*one scale"),
        ("fp8", {"min_features": 200}, "no layer of this LlamaForCausalLM can be quantised"),
    ],
)
def test_a_config_that_codes_were_not_written_with_is_refused(quantised, tmp_path, dtype, changed, says):
    folder = copied(quantised[dtype], tmp_path, **changed)
    with pytest.raises(ValueError, match=f"(?s){'' if 'min_features' in changed else f'{WEIGHT}: .*'}{says}"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=says):
        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_levels_that_give_the_same_codes_read_one_another(quantised, tmp_path):
    again = AutoModel.from_pretrained(copied(quantised["int8"], tmp_path, level=2))
    assert torch.equal(logits(again), logits(AutoModel.from_pretrained(quantised["int8"])))
    assert all(w.recipe == halo_config(2, "int8").recipe for w in weights(again).values())


def test_the_file_says_which_layers_are_quantised(quantised, tmp_path):
    again = AutoModel.from_pretrained(copied(quantised["fp8"], tmp_path, skip="lm_head|down_proj"))
    assert len(weights(again)) == 7 and WEIGHT in weights(again)
    assert "model.layers.0.mlp.down_proj" not in again.hf_quantizer.report.skipped
    assert torch.equal(logits(again), logits(AutoModel.from_pretrained(quantised["fp8"])))


def _set(name, index, value):
    def change(tensors):
        tensors[name].view(torch.uint8 if "float8" in str(tensors[name].dtype) else tensors[name].dtype)[index] = value

    return change


DAMAGES = {
    "no codes": ("int8", lambda t: t.pop(WEIGHT), "its codes are missing"),
    "no scale": ("int8", lambda t: t.pop(WEIGHT + "_scale"), "its scale is missing"),
    "no scale, fp8": ("fp8", lambda t: t.pop(WEIGHT + "_scale"), "its scale is missing"),
    "no balance": ("int8", lambda t: t.pop(WEIGHT + "_balance"), r"as .*, balanced.*by config.json .* not balanced"),
    "no record": ("int8", lambda t: t.pop(WEIGHT + "_recipe"), "record of its recipe is missing"),
    "only codes": ("fp6", lambda t: [t.pop(WEIGHT + part) for part in ("_scale", "_recipe")], "its scale is missing"),
    "only codes, as a matrix": (
        "int8",
        lambda t: (
            [t.pop(WEIGHT + part) for part in ("_scale", "_balance", "_recipe")]
            and t.update({WEIGHT: t[WEIGHT].view(128, -1)})
        ),
        "its scale is missing",
    ),
    "only a scale": ("fp6", lambda t: [t.pop(WEIGHT + part) for part in ("", "_recipe")], "its codes are missing"),
    "only a record": ("fp6", lambda t: [t.pop(WEIGHT + part) for part in ("", "_scale")], "its codes are missing"),
    "a balance too many": ("fp8", lambda t: t.update({WEIGHT + "_balance": torch.zeros(256, dtype=torch.int8)}), "balanced"),
    "plain beside a scale": ("fp8", lambda t: t.update({WEIGHT: torch.zeros(128, 256)}), r"codes are float32 \[128, 256\]"),
    "fewer codes": ("int8", replacing(WEIGHT, lambda t: t[:-1]), r"its codes are int8 \[32767\]"),
    "fewer codes, fp6": ("fp6", replacing(WEIGHT, lambda t: t[:-3]), r"its codes are uint8 \[24573\]"),
    "codes of another dtype": ("int8", replacing(WEIGHT, torch.Tensor.short), "its codes are int16"),
    "codes in float": ("int8", replacing(WEIGHT, torch.Tensor.float), "its codes are float32"),
    "codes that are no fp8": ("fp8", replacing(WEIGHT, lambda t: t.float() + 1e-4), "not finite, or no fp8_e4m3"),
    "a code out of range": ("int8", _set(WEIGHT, 7, -128), "some of its codes are -128"),
    "a NaN among codes": ("fp8", _set(WEIGHT, 7, 0xFF), "codes are (NaN|not finite)"),
    "a NaN scale": ("int8", _set(WEIGHT + "_scale", 3, float("nan")), "not finite and positive"),
    "an infinite scale": ("fp8", _set(WEIGHT + "_scale", 3, float("inf")), "not finite and positive"),
    "a negative scale": ("fp6", _set(WEIGHT + "_scale", 3, -1.0), "not finite and positive"),
    "a scale of zero": ("int8", _set(WEIGHT + "_scale", 3, 0.0), "not finite and positive"),
    "fewer scales": ("int8", replacing(WEIGHT + "_scale", lambda t: t[:-1]), r"its scale is float32 \[127\]"),
    "one scale": ("fp8", replacing(WEIGHT + "_scale", lambda t: t[0]), r"its scale is float32 \[\]"),
    "a scale of another dtype": ("int8", replacing(WEIGHT + "_scale", torch.Tensor.bfloat16), "its scale is bfloat16"),
    "fewer exponents": ("int8", replacing(WEIGHT + "_balance", lambda t: t[1:]), r"its balance is int8 \[255\]"),
    "exponents in float": ("int8", replacing(WEIGHT + "_balance", torch.Tensor.float), "its balance is float32"),
    "an exponent out of range": ("int8", _set(WEIGHT + "_balance", 0, -128), "exponents of its balance"),
    "a changed record": ("fp6", _set(WEIGHT + "_recipe", 4, 0xFF), "its codes were written as"),
    "an empty record": ("fp6", replacing(WEIGHT + "_recipe", lambda t: t[:0]), r"its codes were written as \(\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_refused_by_name(quantised, tmp_path, damage):
    dtype, change, says = DAMAGES[damage]
    with pytest.raises(ValueError, match=f"(?s)weights that cannot be used:.*  {WEIGHT}: .*{says}") as error:
        AutoModel.from_pretrained(copied(quantised[dtype], tmp_path, change))
    assert str(error.value).count("\n") == 1, "the others are not accused"


def test_every_part_of_a_checkpoint_is_missed(quantised, tmp_path):
    names = load_file(quantised["int8"] / "model.safetensors").keys()
    parts = sorted(n for n in names if ".mlp." in n)
    assert len(parts) == 3 * 4
    for i, name in enumerate(parts):
        folder = copied(quantised["int8"], tmp_path / str(i), lambda t, name=name: t.pop(name))
        with pytest.raises(ValueError, match=f"  {name.partition('weight')[0]}weight: "):
            AutoModel.from_pretrained(folder)


def test_damaged_files_are_refused(quantised, tmp_path):
    model = AutoModel.from_pretrained(quantised["int8"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    for cut in (content[: len(content) // 2], content[:20], b""):
        shards[1].write_bytes(cut)
        with pytest.raises((SafetensorError, OSError)):
            AutoModel.from_pretrained(tmp_path / "shards")
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        AutoModel.from_pretrained(tmp_path / "shards")


def test_checkpoints_without_records_load_with_a_warning(quantised, tmp_path):
    """Those of halo_tensor 0.1.0."""

    def strip(tensors):
        for name in [n for n in tensors if n.endswith("_recipe")]:
            del tensors[name]

    with pytest.warns(UserWarning, match="does not say what its 7 quantised weights were made with") as caught:
        model = AutoModel.from_pretrained(copied(quantised["int8"], tmp_path / "old", strip))
    assert sum("quantised weights" in str(w.message) for w in caught) == 1
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(quantised["int8"])))
    model.save_pretrained(tmp_path / "new")
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "new", quantised["int8"])]
    assert files[0] == files[1]


def test_the_checkpoint_of_0_1_0_means_what_it_meant(tmp_path):
    """tests/fixtures/0.1.0/checkpoint was written by 0.1.0, whose default was fp8, with block_size=32 and min_features=32."""
    folder = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "checkpoint"
    with pytest.warns(UserWarning, match="does not say what its 7 quantised weights were made with"):
        model = AutoModel.from_pretrained(folder)
    assert model.config.quantization_config == HaloQuantConfig(1, "fp8", block_size=32, min_features=32)
    assert {w.recipe for w in weights(model).values()} == {halo_config(1, "fp8", block_size=32).recipe}
    with torch.no_grad():
        expected = model(torch.arange(8)[None]).logits
    assert expected.double().norm().item() == pytest.approx(1.76783, rel=0.01), "as 0.1.0 computed"
    model.save_pretrained(tmp_path)
    written, before = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path, folder))
    assert written == before
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(torch.arange(8)[None]).logits, expected)


def test_the_files_say_that_they_are_pytorchs(quantised):
    with safe_open(quantised["int8"] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        record = bytes(file.get_tensor(WEIGHT + "_recipe").tolist()).decode()
    assert record == "int8 [128, 256], a scale per row, rotated by H128·seed0, balanced"
