"""LoRA of PEFT in mixtures: on experts that are frozen and quantised, and beside them."""

import copy
import warnings

import pytest
import torch

from halo_tensor import HaloWeight, halo_config, quantize_
from halo_tensor.weight.low_rank import LowRankSum
from tests.helpers.errors import relative_error
from tests.helpers.mixtures import IDS, experts_of, mixture
from tests.helpers.recording import OpLog

peft = pytest.importorskip("peft")
if not hasattr(peft.LoraConfig(), "target_parameters"):
    pytest.skip("this PEFT adapts no parameters", allow_module_level=True)

INT8 = halo_config(1, "int8", min_features=16, frozen=True)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model, target_parameters=STACKS, seed=0, **options):
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**config, target_parameters=target_parameters))


@pytest.fixture
def same_experts(monkeypatch):
    """Let the tokens choose experts without looking at them: rounding must not change the choice."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    def forward(self, hidden_states):
        logits = hidden_states.reshape(-1, hidden_states.shape[-1]) @ self.weight.t()
        index = (torch.arange(len(logits)).unsqueeze(1) + torch.tensor([0, 2])) % 5
        return logits, logits.gather(1, index).softmax(-1), index

    for router in (GptOssTopKRouter, Qwen3MoeTopKRouter):
        monkeypatch.setattr(router, "forward", forward)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("first", ["quantize", "adapt"])
def test_adapters_of_frozen_experts(family, first, same_experts):
    """The base is multiplied in 8 bits and the adapters' factors as they are; no dense sum of both is made."""
    plain, model = mixture(family), mixture(family)
    if first == "quantize":
        quantize_(model, INT8)
    tuned, exact = adapted(model), adapted(plain)
    if first == "adapt":
        found = quantize_(model, INT8)
        assert any("experts.base_layer" in name for name in found.converted)
    exact.load_state_dict({k: v for k, v in tuned.state_dict().items() if "lora_" in k}, strict=False)
    with OpLog() as log, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*high precision.*")
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
    names = [name for name, _ in log.calls]
    assert names.count("grouped_mm") == 4 and "grouped_grad" not in names
    exact(input_ids=IDS, labels=IDS).loss.backward()
    compared = 0
    for (name, parameter), (_, expected) in zip(tuned.named_parameters(), exact.named_parameters(), strict=True):
        if "lora_" in name:
            assert 0.002 < relative_error(parameter.grad, expected.grad) < 0.06, name
            compared += "experts" in name
            if name.endswith("experts.lora_A.default.weight"):  # [experts · r, in], and no token goes to the last expert
                assert parameter.grad[:20].any() and not parameter.grad[20:].any()
        else:
            assert parameter.grad is None
    assert compared == 4
    with torch.no_grad():
        assert 0.002 < relative_error(tuned(IDS).logits, exact(IDS).logits) < 0.04
        with tuned.disable_adapter(), exact.disable_adapter():
            assert relative_error(tuned(IDS).logits, exact(IDS).logits) < 0.04
    (module,) = [m for m in tuned.modules() if type(m).__name__.endswith("Experts")]
    assert isinstance(module.down_proj, HaloWeight) and module.down_proj.master is None  # as it was before


def test_merging_quantises_the_sum(same_experts):
    model = mixture("Qwen3Moe")
    quantize_(model, INT8)
    tuned = adapted(model)
    with torch.no_grad():
        before = tuned(IDS).logits
        merged = tuned.merge_and_unload()
        (module,) = experts_of(merged).values()
        assert isinstance(module.down_proj, HaloWeight)
        assert 1e-3 < relative_error(merged(IDS).logits, before) < 0.04


def test_two_active_adapters_are_said_to_run_in_high_precision():
    model = mixture("Qwen3Moe")
    quantize_(model, INT8)
    tuned = adapted(model)
    tuned.add_adapter("second", copy.copy(tuned.peft_config["default"]))
    tuned.base_model.set_adapter(["default", "second"])
    with pytest.warns(UserWarning, match="Qwen3MoeExperts runs in high precision.*One active adapter"):
        tuned(IDS)


def test_adapters_of_attention_beside_frozen_experts():
    model = mixture("Qwen3Moe")
    quantize_(model, INT8)
    tuned = adapted(model, target_parameters=None)
    with OpLog() as log:
        tuned(input_ids=IDS, labels=IDS).loss.backward()
    names = [name for name, _ in log.calls]
    assert names.count("quantize_gated") == 1 and names.count("grouped_mm") == 4 and "grouped_grad" not in names
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert trained and all("q_proj.lora_" in name for name in trained)


def test_a_sum_of_low_rank_is_dense_to_everything_else():
    torch.manual_seed(0)
    from halo_tensor.recipe import INT8 as FORMAT
    from halo_tensor.recipe import halo

    dense = torch.randn(3, 16, 32)
    weight = HaloWeight.from_hp(dense, halo(1, FORMAT))
    left, right = torch.randn(3, 16, 2, requires_grad=True), torch.randn(3, 2, 32)
    kept = torch.baddbmm(weight, left, right, alpha=0.5)
    assert type(kept) is LowRankSum and kept.shape == dense.shape and kept.dtype == dense.dtype
    expected = dense + 0.5 * left @ right
    torch.testing.assert_close(kept * 2, expected * 2)
    torch.testing.assert_close(kept[1] @ torch.ones(32), expected[1] @ torch.ones(32))
    (actual,) = torch.autograd.grad((kept + 0).square().sum(), left)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), left)[0])
