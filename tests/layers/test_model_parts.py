"""Heads, adapters and other parts of a model, on small models of transformers and PEFT."""

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_, recipe_config
from tests.helpers.recording import OpLog
from tests.helpers.small_models import IDS, SMALL, linears, llama

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

INT8 = halo_config(1, "int8", skip="")


def siglip():
    text = SMALL | {"vocab_size": 256, "intermediate_size": 256, "max_position_embeddings": 16, "projection_size": 128}
    vision = SMALL | {"intermediate_size": 256, "image_size": 32, "patch_size": 2}  # 256 positions
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def clip():
    text = SMALL | {"vocab_size": 512, "intermediate_size": 512, "max_position_embeddings": 16}
    vision = SMALL | {"intermediate_size": 256, "image_size": 32, "patch_size": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("make", [siglip, clip])
def test_encoders_with_layers_as_wide_as_the_vocabulary_have_no_head(make):
    model = make()
    report = quantize_(model, INT8, filter_fn=None)
    others = {name for name in report.skipped if "patch_embedding" not in name}
    assert all("its owner does not call it" in report.skipped[n] or n.endswith("in_proj_weight") for n in others)
    assert set(report.converted) == linears(model) - others and report.share > 0.9
    assert sum(name.endswith("mlp.fc1") for name in report.converted) >= 4


@pytest.mark.parametrize(("vocabulary", "width"), [(128, 256), (256, 256), (512, 512)])
def test_a_head_is_what_the_model_says(vocabulary, width):
    """Whether the vocabulary is as wide as the hidden states, as the MLP, or as neither."""
    model = llama(vocab_size=vocabulary, intermediate_size=width)
    report = quantize_(model, INT8)
    assert report.skipped == {"lm_head": "it is the output embedding"} and len(report.converted) == 14
    assert report.share == 1, "embeddings are not counted"


def test_a_head_that_peft_wraps_is_still_a_head():
    config = {**SMALL, "vocab_size": 256, "intermediate_size": 256, "tie_word_embeddings": False}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["lm_head", "dense"]))
    report = quantize_(model, INT8)
    head = "base_model.model.lm_head.base_layer"
    assert report.skipped[head] == "it is the output embedding" and len(report.converted) == 8


class HandWritten(nn.Module):
    """A language model without get_output_embeddings, whose MLP and hidden states can be as wide as its vocabulary."""

    def __init__(self, vocabulary: int, head: str | None, last: str | None = None, width: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(width, 256), "down": nn.Linear(256, width)}) for _ in "ab")
        for name, out in ((head, vocabulary), (last, 384)):
            if name is not None:
                self.add_module(name, nn.Linear(width, out, bias=False))


@pytest.mark.parametrize("vocabulary", [128, 256, 512])
@pytest.mark.parametrize(
    ("head", "last"), [("head", None), ("project", None), ("to_logits", "value"), ("output", "value"), (None, None)]
)
def test_heads_of_models_that_do_not_say(vocabulary, head, last):
    """The last layer whatever its name, and one that is named like a head wherever it is; but no part of a block."""
    model = HandWritten(vocabulary, head, last)
    report = quantize_(model, INT8)
    assert report.skipped == ({head: "it is the output embedding"} if head else {})
    assert set(report.converted) == linears(model) - {head}


def test_a_head_on_a_model_that_says_it_has_none():
    model = nn.ModuleDict({"body": llama().model, "head": nn.Linear(128, 128), "project": nn.Linear(128, 128)})
    assert quantize_(model, INT8).skipped == {"head": "it is the output embedding", "project": "it is the output embedding"}
    model = llama().model
    model.ctc_head, model.extra = nn.Linear(128, 128), nn.Linear(128, 128)
    assert quantize_(model, INT8).skipped == {"ctc_head": "it is the output embedding"}, "it says that it has none"
    sequential = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256))
    assert quantize_(sequential, INT8).converted == ["1"]


def test_a_head_of_a_model_that_names_its_input_embedding():
    """As FSMT's get_output_embeddings does, whose head has a weight of its own."""
    model = HandWritten(256, "output_projection", "value")
    model.get_output_embeddings = lambda: model.tokens
    assert quantize_(model, INT8).skipped == {"output_projection": "it is the output embedding"}


def test_matrices_stored_by_heads_are_counted():
    """XLNet's [in, heads, features of a head], which einsum multiplies; but not a bias of that shape, or a table."""
    config = {"vocab_size": 256, "d_model": 128, "n_layer": 1, "n_head": 4, "d_inner": 128}
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**config))
    with pytest.warns(UserWarning, match="only 29 % .*XLNetLMHeadModel"):
        found = quantize_(model, INT8)
    attention = {f"transformer.layer.0.rel_attn.{name}" for name in "qkvor"}
    assert {name for name in found.skipped if name != "lm_loss"} == attention
    assert found.share == 2 / 7 and set(found.converted) == {f"transformer.layer.0.ff.layer_{n}" for n in (1, 2)}
    model = nn.ModuleDict({"layer": nn.Linear(128, 128)})
    model.kernel, model.heads = nn.Parameter(torch.randn(128, 128, 4)), nn.Parameter(torch.randn(4, 128, 16))
    assert quantize_(model, INT8).share == 1, "neither is a matrix of 128 rows and columns"


@pytest.mark.parametrize(
    "options",
    [
        peft.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=128, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=8, encoder_hidden_size=128, prefix_projection=True, task_type="CAUSAL_LM"),
    ],
    ids=lambda options: type(options).__name__,
)
def test_prompt_encoders_are_adapters(options):
    model = peft.get_peft_model(llama(), options)
    found = quantize_(model, halo_config(1, "int8"))
    encoders = {name for name in linears(model) if "prompt_encoder" in name}
    assert encoders and {found.skipped.pop(name) for name in encoders} == {"it belongs to an adapter"}
    assert len(found.converted) == 14 and found.share == 1
    assert not any(isinstance(p, HaloWeight) for p in model.prompt_encoder.parameters())
    with OpLog() as log:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(log.products()) >= 14
    everything = quantize_(peft.get_peft_model(llama(), options), recipe_config("hot_llm", adapters=True))
    assert encoders <= set(everything.converted)
