"""Models of transformers that compute their loss without making logits."""

import copy
import pickle
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from halo_tensor import halo_config, quantize_  # noqa: E402
from halo_tensor.transformers import fuse_head_, unfuse_head_  # noqa: E402
from halo_tensor.transformers.lazy_logits import Form, LazyLogits  # noqa: E402
from tests.helpers.ranks import on_ranks  # noqa: E402
from tests.helpers.recording import OpLog  # noqa: E402

V = 1003
SIZES = {
    "vocab_size": V,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
#: name of an architecture -> what its config has besides
KINDS = {
    "Llama": {},
    "Gemma2": {"head_dim": 32, "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 2.0},
}


def tiny(kind="Llama", **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind] | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # so that probabilities differ, as those of a trained model do
        model.get_output_embeddings().weight.mul_(8)
    return model


def batch(length=24):
    ids = torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, **given):
    """The loss, and the gradients of all parameters by name."""
    model.zero_grad()
    outputs = model(**given)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def angle(a, b):
    """1 − cos of gradients by name."""
    assert a.keys() == b.keys()
    a, b = (torch.cat([g.flatten() for g in gradients.values()]).double() for gradients in (a, b))
    return 1 - torch.cosine_similarity(a, b, 0).item()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_trains_alike_and_is_unchanged_elsewhere(kind, tied):
    model, given = tiny(kind, tie_word_embeddings=tied), batch()
    prompt = given["input_ids"][:, :4]
    count = torch.tensor(77)
    plain, expected = gradients(model, **given, num_items_in_batch=count)
    generated = model.generate(prompt, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt))
    fuse_head_(model)
    with OpLog() as log:
        fused, made = gradients(model, **given, num_items_in_batch=count)
    assert [name for name, _ in log.calls].count("linear_cross_entropy") == 1
    assert 0 < abs(fused.loss - plain.loss) < 3e-3 * plain.loss
    assert 1e-6 < angle(expected, made) < 3e-3
    assert ("lm_head.weight" in made) != tied
    assert isinstance(fused.logits, LazyLogits) and fused.logits.shape == plain.logits.shape
    assert repr(fused.logits) == f"LazyLogits([2, 24, {V}], not computed)"
    torch.testing.assert_close(fused.logits.compute(), plain.logits)
    without = model(given["input_ids"])
    assert type(without.logits) is torch.Tensor and torch.equal(without.logits, plain.logits)
    again = model.generate(prompt, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(again, generated)
    unfuse_head_(model)
    assert torch.equal(model(**given, num_items_in_batch=count).loss, plain.loss)


def test_what_reads_logits_gets_them():
    model, given = tiny(), batch()
    plain = model(**given).logits
    fuse_head_(model, backward="bf16")
    logits = model(**given).logits
    assert torch.equal(logits.argmax(-1), plain.argmax(-1)) and torch.equal(logits[:, -1], plain[:, -1])
    assert torch.equal(torch.softmax(logits, -1), torch.softmax(plain, -1))
    assert torch.equal(logits + 1, plain + 1) and torch.equal(1 - logits, 1 - plain) and (logits == plain).all()
    assert len(logits) == 2 and logits.size(-1) == V and logits.dtype == plain.dtype and logits.device == plain.device
    assert torch.equal(pickle.loads(pickle.dumps(logits)), plain) and torch.equal(next(iter(logits)), plain[0])
    assert logits.detach().numpy().shape == plain.shape
    fresh = model(**given).logits
    fresh.square().mean().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0, "they are part of the graph"


def test_the_forms_of_logits():
    y = torch.randn(3, 5)

    class Head:
        def note_read(self):
            pass

    lazy = LazyLogits(y, 5, lambda hidden: hidden, Head(), y.dtype)
    assert (lazy * 2 / 4)._form == Form(0.5)
    capped = torch.tanh(lazy * 3 / 4) * 4
    assert isinstance(capped, LazyLogits) and capped._form == Form(3.0, 4.0)
    torch.testing.assert_close(capped.compute(), torch.tanh(y * 3 / 4) * 4)
    assert isinstance(2 * lazy.float().contiguous(), LazyLogits)
    half = lazy.to(torch.float16).to("cpu")
    assert isinstance(half, LazyLogits) and half.dtype == half.compute().dtype == torch.float16 and half.dim() == 2
    for value in (lazy * y, torch.tanh(torch.tanh(lazy)), torch.tanh(lazy) * -2.0, lazy / y, lazy.half(), lazy.to("meta")):
        assert type(value) is torch.Tensor


@pytest.mark.parametrize("options", [{}, {"forward": "bf16", "backward": "bf16"}, {"label_smoothing": 0.1}], ids=str)
def test_options(options):
    model, given = tiny(), batch()
    plain = model(**given)
    fuse_head_(model, **options)
    expected = plain.loss
    if "label_smoothing" in options:
        labels = given["labels"][:, 1:].flatten()
        logits = plain.logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(model(**given).loss, expected, rtol=1e-5 if "forward" in options else 3e-3, atol=0)


def test_a_converted_model():
    model, given = tiny(), batch()
    _, expected = gradients(model, **given)
    quantize_(model, halo_config(level=1, dtype="int8"), filter_fn=lambda module, name: True)
    fuse_head_(model)
    with OpLog() as log:
        _, made = gradients(model, **given)
    assert "linear_cross_entropy" in [name for name, _ in log.calls]
    assert 1e-5 < angle(expected, made) < 1e-2


def test_a_frozen_head():
    model, given = tiny(), batch()
    model.lm_head.weight.requires_grad_(False)
    _, expected = gradients(model, **given)
    fuse_head_(model)
    _, made = gradients(model, **given)
    assert "lm_head.weight" not in made and angle(expected, made) < 3e-3


def test_compiled_as_one_graph_for_any_length():
    model = tiny()
    fuse_head_(model)
    counter = CompileCounterWithBackend("eager")  # the graph itself: tests/products/test_loss.py
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (24, 20, 28):
        expected, wanted = gradients(model, **batch(length))
        outputs, made = gradients(compiled, **batch(length))
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert max((made["_orig_mod." + n] - g).abs().max() for n, g in wanted.items()) < 1e-5
        assert isinstance(outputs.logits, LazyLogits)
    assert counter.frame_count == 2, "one graph for the first length, and one for all"


@pytest.mark.parametrize("accelerated", [False, True], ids=["", "accelerate"])
def test_autocast(accelerated):
    model, given = tiny(), batch()
    if accelerated:  # it converts what a forward under autocast returns
        operations = pytest.importorskip("accelerate.utils.operations")
        model.forward = operations.convert_outputs_to_fp32(model.forward)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reads its logits")
        plain, expected = gradients(model, **given)
        fuse_head_(model)
        fused, made = gradients(model, **given)
    assert made["lm_head.weight"].dtype == torch.float32 and angle(expected, made) < 3e-3
    assert isinstance(fused.logits, LazyLogits) and fused.logits.dtype == plain.logits.dtype
    torch.testing.assert_close(fused.logits.compute(), plain.logits)  # as in the forward, though autocast has ended


def test_gradient_checkpointing_and_copies():
    model, given = tiny(), batch()
    fuse_head_(model)
    _, expected = gradients(model, **given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _, copied = gradients(other, **given)
        assert angle(expected, copied) < 1e-9
        assert other.lm_head.fused_state is not model.lm_head.fused_state
    model.gradient_checkpointing_enable()
    model.train()
    _, made = gradients(model, **given)
    assert angle(expected, made) < 1e-9


@pytest.mark.parametrize("trained", [False, True], ids=["adapter", "modules_to_save"])
def test_peft(trained):
    peft = pytest.importorskip("peft")
    options = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]} if trained else {"target_modules": ["lm_head"]}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    torch.manual_seed(0)
    model, given = peft.get_peft_model(tiny(), config), batch()
    plain, expected = gradients(model, **given)
    fuse_head_(model)
    with OpLog() as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        fused, made = gradients(model, **given)
    assert "linear_cross_entropy" in [name for name, _ in log.calls]
    assert abs(fused.loss - plain.loss) < 3e-3 * plain.loss and angle(expected, made) < 3e-3
    torch.testing.assert_close(fused.logits.compute(), plain.logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base = model(**given)
        assert abs(base.loss - model.base_model.model.loss_function(base.logits.compute(), given["labels"], V)) < 1e-2
    model(given["input_ids"])


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    given = batch(16)
    data = [{name: rows[i] for name, rows in given.items()} for i in range(2)] * 8
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1, report_to=[],
        learning_rate=1e-3, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    runs = []
    for fused in (False, True):
        model = tiny()
        if fused:
            fuse_head_(model)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        predicted = trainer.predict(data[:2]).predictions
        runs.append(([row["loss"] for row in trainer.state.log_history if "loss" in row] + [evaluated], predicted))
    (plain, logits), (fused, fused_logits) = runs
    assert plain[0] > plain[3] and len(plain) == 5
    assert max(abs(a - b) for a, b in zip(plain, fused, strict=True)) < 5e-3 * plain[0]
    assert logits.shape == fused_logits.shape and abs(logits - fused_logits).mean() < 0.05 * abs(logits).mean()


@pytest.mark.parametrize("options", [{"forwards": "int8"}, {"bias": None}], ids=str)
def test_unknown_options(options):
    with pytest.raises(ValueError, match="its options are forward, backward, label_smoothing, z_loss, chunk, scratch"):
        fuse_head_(tiny(), **options)


def test_what_cannot_be_fused():
    with pytest.raises(ValueError, match="Sequential contains no causal language model"):
        fuse_head_(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model = tiny()
    model.loss_function = len
    with pytest.raises(ValueError, match="is len: only transformers' ForCausalLMLoss"):
        fuse_head_(model)
    model = tiny()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head is a Sequential"):
        fuse_head_(model)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="LoRA with dropout: set lora_dropout=0"):
        fuse_head_(model)


def test_a_warning_where_nothing_is_gained():
    model, given = tiny(), batch()
    fuse_head_(model)
    model.lm_head = torch.nn.Linear(128, V, bias=False)
    with pytest.warns(UserWarning, match="the head was replaced after fuse_head_"):
        model(**given)
    model = tiny()
    fuse_head_(model)
    model._loss_function = lambda logits, labels, vocab_size: logits[:, :-1].sum()
    with pytest.warns(UserWarning, match="reads its logits"):
        model(**given)


@on_ranks(2)
@pytest.mark.parametrize("head", ["root", "separate", "tied", "converted"])
def test_fsdp2(world, head):
    """The whole gradient is that of a model that is not sharded. ``head``: the group that it is in, or what it is."""
    given = batch()

    def fused():
        model = tiny(tie_word_embeddings=head == "tied")
        if head == "converted":
            quantize_(model, halo_config(), filter_fn=lambda module, name: name == "lm_head")
        fuse_head_(model)
        return model

    expected, wanted = gradients(fused(), **given)
    model = fused()
    mesh = init_device_mesh("cpu", (world,))
    for module in [*model.model.layers, *([model.lm_head] if head == "separate" else [])]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        outputs, made = gradients(model, **given)
        torch.testing.assert_close(outputs.loss, expected.loss)
        whole = {name: gradient.full_tensor() for name, gradient in made.items()}
        if head == "converted":  # FSDP2 gathers its codes, and backward multiplies with their values
            assert 0 < angle(whole, wanted) < 1e-3
            continue
        for name, gradient in wanted.items():
            torch.testing.assert_close(whole[name], gradient, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert type(model(**given).logits) is torch.Tensor
    with pytest.raises(RuntimeError, match="FSDP has sharded the head again"):
        gradients(model, **given)[0].logits.argmax(-1)
