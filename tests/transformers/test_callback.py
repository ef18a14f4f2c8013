"""HaloCallback in transformers' Trainer and in TRL's trainers: it converts, balances, reports, logs and refuses."""

import math
import warnings

import pytest
import torch

from halo_tensor import HaloWeight, balance_, halo_config, quantize_
from tests.helpers.recording import OpLog
from tests.helpers.trainers import Rows, arguments, losses, products, save_chat_model, trainer

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from halo_tensor.transformers import HaloCallback  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def weights(model) -> dict[str, HaloWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, HaloWeight)}


def test_trains_as_after_quantize(folder, tmp_path):
    model = plain(folder)
    quantize_(model, halo_config(1, "int8"))
    ours = trainer(model, tmp_path)
    ours.train()
    logged = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    callback = HaloCallback(level=1, dtype="int8")
    switched = trainer(plain(folder), tmp_path, [Logger(), callback])
    with OpLog() as log:
        switched.train()
    assert products(log) == 4 * 14 * 3
    assert losses(switched) == losses(ours)
    assert len(callback.conversion.converted) == 14
    assert logged[0]["halo/layers"] == 14 and logged[0]["halo/share"] == 1.0


def test_a_balance_on_the_trainers_data_is_resumed_exactly(folder, tmp_path):
    """The gains are those of the first batch, taking it does not change the order of the data, and they come back from the
    checkpoint: a resumed run whose weights differ would measure others."""
    options = {"save_steps": 2}
    whole = trainer(plain(folder), tmp_path / "whole", [HaloCallback("int8", balance=1)], **options)
    first = next(iter(trainer(plain(folder), tmp_path / "other").get_train_dataloader()))
    state = torch.get_rng_state()
    whole.train()
    by_hand = plain(folder)
    quantize_(by_hand, halo_config(1, "int8"))
    assert balance_(by_hand, first["input_ids"]) == 14
    assert all(torch.equal(w.gain, weights(whole.model)[name].gain) for name, w in weights(by_hand).items())
    torch.set_rng_state(state)
    again = trainer(by_hand, tmp_path / "by_hand")
    again.train()
    assert losses(again) == losses(whole), "the data come in the same order"

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "halo_balance.pt").exists()
    other = plain(folder)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(torch.linspace(0.1, 10, p.shape[-1]))
    resumed = trainer(other, tmp_path / "whole", [HaloCallback("int8", balance=1)], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    for (name, p), q in zip(weights(whole.model).items(), weights(resumed.model).values(), strict=True):
        assert torch.equal(p, q) and torch.equal(p.gain, q.gain), name


def test_reports_on_the_first_batch(folder, tmp_path):
    callback = HaloCallback("int8", report=True)
    ours = trainer(plain(folder), tmp_path, [callback], max_steps=1)
    ours.train()
    assert "HALO" in (tmp_path / "halo_report.html").read_text().upper()
    logs = ours.state.log_history[0]
    cosines = {name: value for name, value in logs.items() if name.startswith("halo/cosine/")}
    assert len(cosines) == len(callback.report.candidates) >= 3 and all(0.9 < value < 1 for value in cosines.values())


def test_batches_may_be_given(folder, tmp_path):
    batch = {"input_ids": Rows(4).ids}
    callback = HaloCallback("int8", balance=batch)
    trainer(plain(folder), tmp_path, [callback], max_steps=1).train()
    by_hand = plain(folder)
    quantize_(by_hand, halo_config(1, "int8"))
    balance_(by_hand, **batch)
    assert all(
        torch.equal(2.0 ** callback.balance[name.removesuffix(".weight")], w.gain) for name, w in weights(by_hand).items()
    )
    with pytest.raises(ValueError, match=r"fewer than balance=9"):
        trainer(plain(folder), tmp_path, [HaloCallback("int8", balance=9)]).train()


def test_what_cannot_be_converted_is_refused(folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = plain(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = TrainingArguments(**arguments(tmp_path))
    with pytest.raises(ValueError, match="an SGD holds the old ones"):
        Trainer(model, args, callbacks=[HaloCallback("int8")], optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"no layer of this LlamaForCausalLM was converted(.|\n)*min_features=4096"):
        trainer(plain(folder), tmp_path, [HaloCallback("int8", min_features=4096)])
    quantize_(model, halo_config(1, "int8"))
    with pytest.raises(ValueError, match="14 layers of this LlamaForCausalLM are converted already"):
        trainer(model, tmp_path, [HaloCallback("int8")])


def test_a_model_that_was_not_converted_is_not_trained(folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    late = trainer(plain(folder), tmp_path)
    late.add_callback(HaloCallback("int8"))
    with pytest.raises(ValueError, match="has converted nothing"):
        late.train()
    args = TrainingArguments(**arguments(tmp_path))
    new = Trainer(args=args, model_init=lambda: plain(folder), train_dataset=Rows(8), callbacks=[HaloCallback("int8")])
    with pytest.raises(ValueError, match="as model_init makes"):
        new.train()


def test_sft_with_adapters(folder, tmp_path):
    peft, trl, datasets = (pytest.importorskip(name) for name in ("peft", "trl", "datasets"))
    rows = [{"prompt": f"How many rows has t{i % 7}?", "completion": f" {i % 7} rows"} for i in range(16)]
    config = trl.SFTConfig(**arguments(tmp_path, max_length=64, bf16=False, gradient_checkpointing=True))
    ours = trl.SFTTrainer(
        plain(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[HaloCallback("int8", balance=1)],
    )
    with OpLog() as log:
        ours.train()
    assert products(log) > 0 and losses(ours)[-1] < losses(ours)[0]
    bases = weights(ours.model)
    assert len(bases) == 14 and all(w.master is None and w.gain is not None for w in bases.values())


@pytest.mark.parametrize("balance", [0, 1])
def test_the_reference_of_dpo_is_converted_alike(folder, tmp_path, balance):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": f"t{i % 7}?", "chosen": f" {i % 7} rows", "rejected": " none"} for i in range(16)]
    args = trl.DPOConfig(**arguments(tmp_path, max_steps=2, max_length=64, bf16=False, gradient_checkpointing=False))
    ours = trl.DPOTrainer(
        plain(folder),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[HaloCallback("int8", balance=balance)],
    )
    with OpLog() as log, warnings.catch_warnings(record=True) as caught:
        ours.train()
    assert not any("reference model" in str(w.message) for w in caught)
    assert losses(ours)[0] == pytest.approx(math.log(2), abs=1e-6), "the model is its reference"
    assert products(log) == 2 * 14 * (3 + 1) + 14 * balance, "the batch that is balanced on runs once"
    assert len(weights(ours.ref_model)) == 14


def test_grpo(folder, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    prompts = datasets.Dataset.from_list([{"prompt": f"t{i % 7}?"} for i in range(8)])
    args = trl.GRPOConfig(
        **arguments(tmp_path, max_steps=1, bf16=False, gradient_checkpointing=False),
        num_generations=4,
        max_completion_length=4,
        beta=0.1,
    )
    tokens = AutoTokenizer.from_pretrained(folder)(["t1? 1 rows", "t2? 2 rows"], return_tensors="pt", padding=True)
    callback = HaloCallback("int8", balance={"input_ids": tokens["input_ids"]})
    ours = trl.GRPOTrainer(
        plain(folder),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=args,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[callback],
    )
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    with OpLog() as log, warnings.catch_warnings(record=True) as caught:
        ours.train()
    assert not any("reference model" in str(w.message) for w in caught)
    assert products(log) > 14 * (3 + 1)
    assert any(not torch.equal(p, before[name]) for name, p in ours.model.named_parameters())
    for name, w in weights(ours.ref_model).items():
        assert torch.equal(w.gain, weights(ours.model)[name].gain) and torch.equal(w, before[name])
    kls = [entry["kl"] for entry in ours.state.log_history if "kl" in entry]
    assert kls[0] == 0, "the model is its reference"


def test_batches_that_are_no_inputs_are_refused(folder, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    args = trl.GRPOConfig(**arguments(tmp_path, bf16=False), num_generations=4, max_completion_length=8)
    ours = trl.GRPOTrainer(
        plain(folder),
        reward_funcs=lambda completions, **_: [0.0 for _ in completions],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "t?"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[HaloCallback("int8", balance=1)],
    )
    with pytest.raises(ValueError, match="are nothing that LlamaForCausalLM.forward takes: pass batches"):
        ours.train()
