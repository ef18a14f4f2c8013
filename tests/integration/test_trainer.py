"""transformers' Trainer and TRL's SFTTrainer drive a converted model as they drive any other: they train, evaluate, save,
resume and recompute activations, and its products run in 8 bits while they do."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from tests.helpers.recording import OpLog
from tests.helpers.trainers import arguments, losses, products, save_chat_model, trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

INT8 = halo_config(1, "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with its tokenizer."""
    return save_chat_model(tmp_path_factory.mktemp("model"))


def converted(folder, config=INT8):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if config is not None:
        quantize_(model, config)
    return model


def test_trains_close_to_high_precision_and_evaluates(folder, tmp_path):
    plain = trainer(converted(folder, None), tmp_path / "plain")
    plain.train()
    ours = trainer(converted(folder), tmp_path / "ours")
    with OpLog() as log:
        ours.train()
    assert products(log) == 4 * 14 * 3
    assert losses(ours) != losses(plain)
    assert losses(ours) == pytest.approx(losses(plain), rel=0.02) and losses(ours)[-1] < losses(ours)[0]
    with OpLog() as log:
        metrics = ours.evaluate()
    assert products(log) == 14 and metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=0.02)


def test_saves_plain_checkpoints_and_resumes_exactly(folder, tmp_path):
    options = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer(converted(folder), tmp_path, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not any(isinstance(p, HaloWeight) for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    resumed = trainer(converted(folder), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not isinstance(p, HaloWeight) or torch.equal(p.operand.codes, q.operand.codes), name


def test_the_best_checkpoint_is_loaded_into_the_converted_model(folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    best = trainer(converted(folder), tmp_path, **options)
    best.train()
    weights = [p for p in best.model.parameters() if isinstance(p, HaloWeight)]
    assert len(weights) == 14
    evaluations = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert best.evaluate()["eval_loss"] == min(evaluations)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(folder, tmp_path, reentrant):
    plain = trainer(converted(folder), tmp_path, max_steps=2)
    plain.train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ours = trainer(converted(folder), tmp_path, max_steps=2, **options)
    with OpLog() as log:
        ours.train()
    assert products(log) == 2 * 14 * 4, "every output is computed twice"
    assert losses(ours) == losses(plain)


def test_mixed_precision(folder, tmp_path):
    ours = trainer(converted(folder), tmp_path, bf16=True)
    with OpLog() as log:
        ours.train()
    assert products(log) == 4 * 14 * 3
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    assert losses(ours)[-1] < losses(ours)[0]


def test_adapters_on_a_base_quantised_while_loading(folder, tmp_path):
    peft = pytest.importorskip("peft")
    from halo_tensor.transformers import HaloQuantConfig

    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HaloQuantConfig(1, "int8"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    ours = trainer(model, tmp_path, save_steps=2, gradient_checkpointing=True)
    ours.train()
    assert losses(ours)[-1] < losses(ours)[0]
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.named_parameters() if name in before)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists(), "only the adapter is saved"
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=HaloQuantConfig(1, "int8")),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    resumed = trainer(model, tmp_path, save_steps=2, gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(ours)


@pytest.fixture(scope="module")
def chats():
    datasets = pytest.importorskip("datasets")
    turns = [(f"How many rows has t{i % 7}?", f"SELECT COUNT(*) FROM t{i % 7}") for i in range(40)]
    return datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": ask}], "completion": [{"role": "assistant", "content": answer}]}
            for ask, answer in turns
        ]
    )


def sft(model, folder, output, chats, **options):
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(**arguments(output, max_length=128, bf16=False, **options))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return trl.SFTTrainer(
        model, args=config, train_dataset=chats, eval_dataset=chats.select(range(8)), processing_class=tokenizer
    )


@pytest.mark.parametrize("packing", [False, True])
def test_sft(folder, tmp_path, chats, packing):
    options = {"packing": packing, "gradient_checkpointing": False}
    plain = sft(converted(folder, None), folder, tmp_path / "plain", chats, **options)
    plain.train()
    ours = sft(converted(folder), folder, tmp_path / "ours", chats, save_steps=2, **options)
    with OpLog() as log:
        ours.train()
    assert products(log) == 4 * 14 * 3
    assert losses(ours) == pytest.approx(losses(plain), rel=0.02) and losses(ours)[-1] < losses(ours)[0]
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=0.02)
    resumed = sft(converted(folder), folder, tmp_path / "ours", chats, save_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert losses(resumed) == losses(ours)


def test_sft_with_adapters_and_checkpointing(folder, tmp_path, chats):
    peft = pytest.importorskip("peft")
    pytest.importorskip("trl")
    import trl

    model = converted(folder, None).requires_grad_(False)
    quantize_(model, INT8)
    config = trl.SFTConfig(**arguments(tmp_path, max_length=128, bf16=False, gradient_checkpointing=True))
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = trl.SFTTrainer(model, args=config, train_dataset=chats, processing_class=tokenizer, peft_config=lora)
    ours.train()
    assert losses(ours)[-1] < losses(ours)[0]
    bases = [m.weight for n, m in ours.model.named_modules() if isinstance(m, nn.Linear) and n.endswith("base_layer")]
    assert len(bases) == 14 and all(w.master is None for w in bases)


@pytest.fixture(scope="module")
def preferences():
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    rows = [{"prompt": f"t{i % 7}?", "chosen": f" {i % 7} rows", "rejected": " none"} for i in range(16)]
    return datasets.Dataset.from_list(rows)


def dpo(model, folder, output, preferences, **options):
    import trl

    ref_model = options.pop("ref_model", None)
    args = trl.DPOConfig(**arguments(output, max_steps=2, max_length=64, bf16=False, gradient_checkpointing=False, **options))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return trl.DPOTrainer(model, ref_model, args=args, train_dataset=preferences, processing_class=tokenizer)


def told_of_the_reference(caught) -> bool:
    return any("none of its reference model" in str(w.message) for w in caught)


def test_a_reference_model_in_high_precision_is_told(folder, tmp_path, preferences):
    ours = dpo(converted(folder), folder, tmp_path / "plain", preferences)
    assert not any(isinstance(p, HaloWeight) for p in ours.ref_model.parameters()), "what TRL makes of the path"
    with pytest.warns(UserWarning, match="14 layers of the model are converted and none of its reference model"):
        ours.train()
    assert losses(ours)[0] != pytest.approx(math.log(2), abs=1e-6)
    # As the warning says.
    ours = dpo(converted(folder), folder, tmp_path / "converted", preferences)
    assert len(quantize_(ours.ref_model, INT8).converted) == 14
    with OpLog() as log, warnings.catch_warnings(record=True) as caught:
        ours.train()
    assert products(log) == 2 * 14 * (3 + 1) and not told_of_the_reference(caught)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6), "the model is its reference"


def test_a_copied_reference_model_is_converted_and_follows(folder, tmp_path, preferences):
    """TRL's create_reference_model, and TR-DPO, which writes to it."""
    create_reference_model = pytest.importorskip("trl.experimental.utils").create_reference_model
    model = converted(folder)
    reference = create_reference_model(model)
    options = {"ref_model": reference, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    ours = dpo(model, folder, tmp_path, preferences, **options)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    with OpLog() as log, warnings.catch_warnings(record=True) as caught:
        ours.train()
    assert products(log) == 2 * 14 * (3 + 1) and not told_of_the_reference(caught)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)
    coded = {name: p for name, p in reference.named_parameters() if isinstance(p, HaloWeight)}
    assert len(coded) == 14
    for name, weight in coded.items():
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight.codes, HaloWeight.from_hp(weight.dequantize(), weight.recipe).codes), "in step"


def test_adapters_need_no_reference_model(folder, tmp_path, preferences):
    peft = pytest.importorskip("peft")
    from halo_tensor.transformers import HaloQuantConfig

    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HaloQuantConfig(1, "int8"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = dpo(model, folder, tmp_path, preferences)
    with OpLog() as log, warnings.catch_warnings(record=True) as caught:
        ours.train()
    assert ours.ref_model is None and not told_of_the_reference(caught)
    assert products(log) == 2 * (14 + 11 + 14), "outputs, gradients of inputs that need one, and the reference's outputs"
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"])
def test_every_trainer_with_a_reference_is_watched(folder, name):
    trainer = getattr(pytest.importorskip("trl"), name)
    converted(folder)
    watched = trainer.train
    assert watched.warns_of_references and watched.__name__ == "train"
    converted(folder)
    assert trainer.train is watched, "once"
