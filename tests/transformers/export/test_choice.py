"""choose: which layers become codes, and the reasons of the others."""

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_, recipe_config
from halo_tensor.recipe import INT8, Operand, Product, Recipe, Rotation

pytest.importorskip("transformers")
from halo_tensor.transformers.export.choice import PLAIN, UNCONVERTED, choose, leave_partners, listed, misfit, stacks

INT = halo_config(1, "int8")
LOW_RANK = Operand(INT8, in_features=Rotation(16, None, 8))


class Block(nn.Module):
    def __init__(self, **leaves: nn.Module):
        super().__init__()
        for name, module in leaves.items():
            setattr(self, name, module)


def attention(key: int = 128) -> nn.Module:
    return Block(
        q_proj=nn.Linear(128, 128), k_proj=nn.Linear(128, key), v_proj=nn.Linear(128, 128), o_proj=nn.Linear(128, 128)
    )


def converted(model: nn.Module, config=INT, **options) -> nn.Module:
    quantize_(model, config, **options)
    return model


def test_reasons():
    model = Block(a=nn.Linear(128, 128), hot=nn.Linear(128, 128), small=nn.Linear(8, 8))
    quantize_(model.hot, recipe_config("hot_llm"), filter_fn=lambda *_: True)
    converted(model, filter_fn=lambda m, name: name == "a")
    choice = choose(model)
    assert list(choice.codes) == ["a"] and choice.codes["a"] is model.a.weight.operand
    assert choice.ignored == {"hot": PLAIN, "small": UNCONVERTED} and not choice.lost


def test_layers_that_vllm_merges_stay_together():
    """k has too few features to be converted, so q and v are written in high precision, too."""
    model = converted(Block(self_attn=attention(64), mlp=Block(gate_proj=nn.Linear(128, 256), up_proj=nn.Linear(128, 256))))
    choice = choose(model)
    assert list(choice.codes) == ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert choice.lost == ["self_attn.q_proj", "self_attn.v_proj"] and choice.ignored["self_attn.k_proj"] == UNCONVERTED
    assert choice.ignored["self_attn.q_proj"] == "vLLM merges it with self_attn.k_proj, self_attn.v_proj, which differ"
    choice.leave("mlp.up_proj", "a test")
    leave_partners(choice)
    assert list(choice.codes) == ["self_attn.o_proj"]


def test_partners_in_different_formats_are_left():
    model = attention()
    quantize_(model, halo_config(1, "fp8"), filter_fn=lambda m, name: name == "q_proj")
    converted(model, filter_fn=lambda m, name: name in ("k_proj", "v_proj", "o_proj"))
    model = nn.ModuleDict({"attn": model})
    assert list(choose(model).codes) == ["attn.o_proj"]


def test_a_tied_weight_is_written_in_high_precision():
    model = Block(embed=nn.Embedding(128, 128), head=nn.Linear(128, 128, bias=False), a=nn.Linear(128, 128))
    model.head.weight = model.embed.weight
    choice = choose(converted(model, filter_fn=lambda m, _: isinstance(m, nn.Linear)))
    assert list(choice.codes) == ["a"] and choice.ignored == {"head": "its weight is tied to another layer's"} and choice.lost


def test_experts_are_written_in_high_precision():
    model = converted(Block(a=nn.Linear(128, 128), experts=nn.Module()))
    model.experts.up = nn.Parameter(HaloWeight.from_hp(torch.randn(2, 128, 128), INT.recipe))
    choice = choose(model)
    assert list(choice.codes) == ["a"] and choice.lost == ["experts.up"] and stacks(model) == [r"re:.*\.experts(\..*)?$"]


def test_codes_follow_writes_to_the_master():
    model = converted(Block(a=nn.Linear(128, 128)))
    model.a.weight.master.data.mul_(3)
    model.a.weight.master.add_(1)
    after = choose(model).codes["a"].dequantize()
    assert (
        torch.allclose(after, model.a.weight.dequantize(), atol=0.1) and (after - model.a.weight.dequantize()).abs().max() > 0
    )


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (halo_config(2, "int8").recipe, None),
        (halo_config(0, "fp8", granularity="tensor").recipe, None),
        (recipe_config("switchback").recipe, None),
        (halo_config(1, "fp6").recipe, "its products are in fp6_e2m3"),
        (recipe_config("ideal_int8").recipe, "it has scales per unit of X"),
        (Recipe(Product(LOW_RANK, LOW_RANK)), "of full rank"),
    ],
)
def test_recipes(recipe, reason):
    found = misfit(recipe)
    assert found is None if reason is None else reason in found


def test_what_else_a_server_leaves_in_high_precision():
    router, experts = nn.Module(), nn.Module()
    router.weight, experts.up = nn.Parameter(torch.zeros(4, 128)), nn.Parameter(torch.zeros(4, 128, 256))
    model = Block(
        embed=nn.Embedding(8, 128), norm=nn.LayerNorm(128), mlp=Block(gate=router, experts=experts), a=nn.Linear(8, 8)
    )
    assert stacks(model) == ["mlp.gate", r"re:.*\.experts(\..*)?$"]


def test_long_lists_are_cut():
    assert listed("abcd", most=3) == "a, b, c and 1 more" and listed("ab") == "a, b"
