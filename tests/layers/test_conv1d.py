"""transformers' Conv1D, whose weight is the transpose of a linear layer's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from halo_tensor import dequantize_, halo_config, quantize_, recipe_config, report
from tests.helpers.errors import relative_error
from tests.helpers.recording import OpLog
from tests.helpers.small_models import IDS, gpt2

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402

INT8 = halo_config(1, "int8", skip="")


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
