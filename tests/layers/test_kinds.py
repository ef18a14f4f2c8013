"""Which layers of a model are converted, and what is said of the others, on small models of transformers and PEFT."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from torch import nn

from halo_tensor import HaloWeight, dequantize_, halo_config, hot_config, layer_filter, quantize_, recipe_config, report
from halo_tensor.layers.subclasses import adds_nothing
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402

INT8 = halo_config(1, "int8", skip="")
IDS = torch.arange(64).view(2, 32)
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options):
    config = {**SMALL, "vocab_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options))


def gpt2(**options):
    config = {"vocab_size": 128, "n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": 64}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | no_dropout | options))


def falcon():
    config = {**SMALL, "vocab_size": 128, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": True}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**config))


def mixtral():
    config = {**SMALL, "vocab_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))


def linears(model) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}


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


def test_mixtures_are_said_to_be_left_alone():
    model = mixtral()
    with pytest.warns(UserWarning, match="only") as caught:
        found = quantize_(model, halo_config(1, "int8"))
    (message,) = [str(w.message) for w in caught]
    stacks = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    attention = sum(model.get_submodule(n).weight.numel() for n in found.converted)
    assert found.share == attention / (attention + stacks) < 0.2 and len(found.converted) == 8
    assert f"only {100 * found.share:.0f} % of the parameters in the linear layers of this MixtralForCausalLM" in message
    assert "mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj, model.layers.1" in message
    assert (
        f"a stack of matrices, as of experts, which is not called through F.linear ({100 * (1 - found.share):.0f} %" in message
    )
    assert f"with {100 * found.share:.0f} % of the linear layers' parameters" in str(found)


def test_most_of_a_model_converted_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(llama(), halo_config(1, "int8"))
        skipped = quantize_(llama(), halo_config(1, "int8", skip="lm_head|mlp"))  # is what the caller wants
        chosen = quantize_(llama(), halo_config(1, "int8"), filter_fn=lambda m, name: name.endswith("q_proj"))
        quantize_(gpt2(), halo_config(1, "int8"))
    assert skipped.share < 0.5 and chosen.share == pytest.approx(0.1)
    with pytest.warns(UserWarning, match=r"(?s)only 39 % .*gate_proj, .* and 3 more: a width that .* 16 \(61 % of"):
        quantize_(llama(intermediate_size=264), halo_config(1, "int8"))


def test_the_loader_and_report_say_it_too(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    model = mixtral()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="only .* % of the parameters in the linear layers of this MixtralForCausalLM"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HaloQuantConfig())
    only = {"int8": halo_config(1, "int8")}
    with pytest.warns(UserWarning, match="only .* % of the parameters in the linear layers of this MixtralForCausalLM"):
        found = report(model, {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share < 0.2 and found.to_dict()["share"] == found.share
    for text in (str(found), found.to_markdown(), found.to_html()):
        assert "gain nothing" in text and "mlp.experts.gate_up_proj" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(llama(), {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share == 1 and "gain nothing" not in str(found) and "with 100 % of the linear layers'" in str(found)


class Matmul(nn.Linear):
    """As FalconLinear."""

    def forward(self, input):
        hidden_states = input @ self.weight.T
        return hidden_states if self.bias is None else hidden_states + self.bias


class Addmm(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight.t()).view(*x.shape[:-1], self.out_features)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x.to(self.weight.dtype), weight=self.weight, bias=self.bias)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class OtherWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 1.0, self.bias)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training) @ self.weight.T + self.bias


class Careless(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class _OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, e):
        return e @ ctx.saved_tensors[0], None


class OwnBackward(nn.Linear):
    def forward(self, x):
        return _OwnBackward.apply(x, self.weight)


class Remembering(Matmul):
    def forward(self, x):
        self.latest = x
        return super().forward(x)


class TwoArguments(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Matmul, Addmm, Counting])
def test_classes_that_add_nothing_are_served(kind):
    layer, twin = kind(128, 256), nn.Linear(128, 256)
    twin.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer)
    random = torch.get_rng_state()
    assert quantize_(model, INT8).converted == ["0"] and quantize_(twin, INT8).converted == [""]
    assert torch.equal(torch.get_rng_state(), random)
    x, e = torch.randn(2, 16, 128, requires_grad=True), torch.randn(2, 16, 256)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for either in (model, *copies, twin):
        with OpLog() as log:
            either(x).backward(e)
        assert log.products() == [torch.int8] * 3
    for either in (model, *copies):
        for a, b in zip(either.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert quantize_(model, halo_config(0, "fp8")).converted == ["0"]
    assert getattr(layer, "calls", 1) == 1, "what a forward does besides is still done, and was not by the test of it"
    dequantize_(model)
    assert type(model[0]) is kind and type(layer.weight) is nn.Parameter
    assert type(copies[0][0]).__name__ == kind.__name__


@pytest.mark.parametrize("kind", [Halved, Tuple, OtherWeight, Dropping, Careless, OwnBackward, Remembering, TwoArguments])
def test_classes_that_add_something_are_not(kind):
    layer = kind(128, 128)
    assert not adds_nothing(layer) and not hasattr(layer, "latest")
    with pytest.raises(ValueError, match=f"it is a {kind.__name__}, whose forward may be its own"):
        quantize_(nn.Sequential(layer), INT8)
    assert adds_nothing(nn.Linear(16, 16)) and (kind is not Careless or adds_nothing(kind(16, 16, bias=False)))
    patched = Matmul(128, 128)
    patched.forward = lambda x: x  # as accelerate's hooks do, around a forward that is no longer the class's
    assert not adds_nothing(patched)


def test_falcon(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    model = falcon().eval()
    model.save_pretrained(tmp_path)
    exact = model(IDS).logits
    only = {"int8": halo_config(1, "int8")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(model, {"input_ids": IDS, "labels": IDS}, candidates=only)
    assert found.share == 1 and found.recommended == "int8" and 0.97 < found.candidates[0].cosine < 0.99999
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    assert "_own_class" not in type(model.transformer.h[0].mlp.dense_h_to_4h).__dict__
    with OpLog() as log:
        assert torch.equal(model(IDS).logits, exact)
    assert log.products() == []
    assert quantize_(model, halo_config(1, "int8")).share == 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HaloQuantConfig()).eval()
    for quantised in (model, loaded):
        with OpLog() as log:
            assert 1e-4 < relative_error(quantised(IDS).logits, exact) < 0.05
        assert log.products() == [torch.int8] * 8
    loaded.save_pretrained(tmp_path / "quantised")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("config", [INT8, halo_config(2, "int8"), halo_config(0, "fp8"), recipe_config("switchback")], ids=str)
def test_conv1d_is_the_linear_layer_of_its_transpose(config):
    plain, linear = Conv1D(256, 128), nn.Linear(128, 256)
    linear.load_state_dict({"weight": plain.weight.t(), "bias": plain.bias})
    layer = nn.Sequential(copy.deepcopy(plain))
    assert quantize_(layer, config).converted == ["0"] and quantize_(linear, config).converted == [""]
    assert isinstance(layer[0], Conv1D) and type(layer[0].weight) is nn.Parameter and layer[0].weight.shape == (128, 256)
    x, e = torch.randn(2, 16, 128), torch.randn(2, 16, 256)
    results = []
    for model in (layer, linear):
        own = x.clone().requires_grad_()
        with OpLog() as log:
            y = model(own)
            y.backward(e)
        assert len(log.products()) == (2 if config == recipe_config("switchback") else 3)
        weight, bias = model.parameters()
        results.append([y, own.grad, weight.grad if model is linear else weight.grad.t(), bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x), layer.parameters(), e), results[0][2:], strict=True):
        torch.testing.assert_close(a if a.ndim == 1 else a.t(), b)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), layer(x)) and not torch.equal(again(x), plain(x))
    dequantize_(layer)
    assert type(layer[0]) is Conv1D and torch.equal(layer(x), plain(x))


def test_gpt2_trains_and_takes_adapters(tmp_path):
    from halo_tensor.transformers import HaloQuantConfig

    model, config = gpt2(), halo_config(1, "int8")
    plain = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    found = report(model, {"input_ids": IDS, "labels": IDS}, candidates={"int8": config})
    assert found.share == 1 and found.recommended == "int8" and 0.97 < found.candidates[0].cosine < 0.99999
    assert all(layer.fidelity["int8"].keys() == {"output", "grad_input", "grad_weight"} for layer in found.layers)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    converted = quantize_(model, config)
    assert len(converted.converted) == 4 and converted.share == 1
    again = report(model, {"input_ids": IDS, "labels": IDS}, candidates={"int8": config})
    assert [layer.fidelity for layer in again.layers] == [layer.fidelity for layer in found.layers]
    assert again.candidates[0].cosine == found.candidates[0].cosine and model.transformer.h[0].mlp.c_fc.recipe == config.recipe
    losses = []
    for either in (model, plain):
        optimizer = torch.optim.AdamW(either.parameters(), lr=1e-3)
        for _ in range(3):
            loss = either(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["c_attn", "c_fc"], init_lora_weights=False))
    with OpLog() as log:
        expected = adapted(IDS).logits
    assert len(log.products()) == 4
    assert relative_error(adapted.merge_and_unload()(IDS).logits, expected) < 0.05
    with pytest.raises(
        ValueError, match=r"c_attn.*a Conv1D holds no codes: load without HaloQuantConfig, then call quantize_"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HaloQuantConfig())


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


def test_a_filter_may_take_containers():
    model = llama()
    found = quantize_(model, halo_config(1, "int8"), filter_fn=lambda module, name: ".mlp" in name)
    assert found.converted == [n for n in linears_in_order(model) if ".mlp" in n] and len(found.converted) == 6
    model = nn.Sequential(nn.Embedding(64, 128), nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128)), nn.ReLU())
    assert quantize_(model, halo_config(1, "int8"), filter_fn=lambda *_: True).converted == ["1.0"]
    with pytest.raises(
        ValueError, match="converts the weight of nn.Linear .* of Sequential: no layer of a kind that it knows"
    ):
        torchao.quantization.quantize_(model, halo_config(1, "int8"), filter_fn=lambda *_: True)
    with pytest.raises(ValueError, match="it has no nn.Linear, nn.Conv2d or Conv1D"):
        quantize_(nn.Sequential(nn.Embedding(128, 128)), halo_config(1, "int8"), filter_fn=lambda *_: True)


def linears_in_order(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "config", [INT8, halo_config(1, "fp6", frozen=True), halo_config(0, "fp8", keep_codes=False), hot_config()], ids=str
)
@pytest.mark.parametrize("sides", [(0, 128), (128, 0)])
def test_layers_without_features(config, sides):
    model = nn.ModuleDict({"empty": nn.Linear(*sides), "full": nn.Linear(128, 128)})
    plain = copy.deepcopy(model)
    found = quantize_(model, config, filter_fn=lambda *_: True)
    assert found.converted == ["full"] and "nothing to multiply" in found.skipped["empty"]
    results = []
    for either in (model, plain):
        x = torch.randn(4, sides[0], requires_grad=True)
        y = either["empty"](x)
        y.sum().backward()
        results.append((y, x.grad, either["empty"].weight.grad))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    assert quantize_(copy.deepcopy(plain), halo_config(1, "int8", min_features=0)).skipped.keys() == {"empty"}
    dequantize_(model)


@pytest.mark.parametrize("config", [INT8, halo_config(2, "int8", granularity="tensor"), hot_config()], ids=str)
@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 128)])
def test_no_tokens(config, shape):
    layers = nn.ModuleDict({"linear": nn.Linear(128, 256), "conv1d": Conv1D(256, 128)})
    assert len(quantize_(layers, config).converted) == 2
    for layer in layers.values():
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], 256) and x.grad.shape == shape
        assert layer.weight.grad.shape == layer.weight.shape and not layer.weight.grad.any() and not layer.bias.grad.any()


def test_layers_that_are_nearly_linear():
    """Each is left alone for a reason that is its own, and its parameters are counted."""
    model = nn.ModuleDict(
        {
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(128, 128)),
            "spectral": torch.nn.utils.spectral_norm(nn.Linear(128, 128)),
            "lstm": nn.LSTM(128, 128),
            "bilinear": nn.Bilinear(128, 128, 128),
            "lazy": nn.LazyLinear(128),
            "plain": nn.Linear(128, 128),
        }
    )
    model.position_embeddings = nn.Parameter(torch.randn(256, 128))
    with pytest.warns(UserWarning, match="only 0.72 % of the parameters"):
        found = quantize_(model, halo_config(1, "int8"))
    assert found.converted == ["plain"] and found.skipped == {
        "normed": "its weight is computed from others in every forward",
        "spectral": "its weight is computed from others in every forward",
        "lazy": "its weight has no shape before the first batch",
        "lstm.weight_ih_l0": "a matrix of a LSTM, which is no layer",
        "lstm.weight_hh_l0": "a matrix of a LSTM, which is no layer",
        "bilinear.weight": "a stack of matrices, as of experts, which is not called through F.linear",
    }
    assert found.sizes["spectral"] == found.sizes["plain"] == 128 * 128 and "lazy" not in found.sizes


def test_a_layer_of_two_parents_is_converted_once():
    layer = nn.Linear(128, 128).requires_grad_(False)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    expected = nn.Sequential(copy.deepcopy(layer))
    quantize_(expected, halo_config(1, "fp6"))
    found = quantize_(model, halo_config(1, "fp6"))
    assert found.converted == ["a.0"] and model["a"][0] is model["b"][0]
    assert torch.equal(model["b"][0].weight.dequantize(), expected[0].weight.dequantize()), "frozen codes are rounded once"


def test_the_filter_is_torchaos_too():
    accept = layer_filter(llama(), INT8)
    assert not accept(nn.Sequential(), "x") and accept(nn.Linear(128, 128), "y") and accept(Matmul(128, 128), "z")
