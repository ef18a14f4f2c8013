"""fold: gains go where they change no bit, and nowhere else."""

import pytest
import torch

from halo_tensor import halo_config, quantize_
from halo_tensor.calibration.balance import set_gains
from halo_tensor.operand.gains import of_exponents

transformers = pytest.importorskip("transformers")
from halo_tensor.transformers.export import balance  # noqa: E402
from halo_tensor.transformers.export.choice import choose  # noqa: E402

IDS = torch.arange(48).view(2, 24) % 64
BLOCK = "model.layers.0."


def llama(kind="Llama", **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes | {"num_key_value_heads": 2, "head_dim": 64} | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    quantize_(model, halo_config(1, "int8"))
    return model


def gains(width: int, seed: int):
    return of_exponents(torch.randint(-3, 4, (width,), generator=torch.Generator().manual_seed(seed)))


def balanced(model, *groups: str):
    """Give each group of layers its own gains."""
    for seed, names in enumerate(groups):
        for name in names.split():
            weight = model.get_submodule(BLOCK + name).weight
            set_gains(weight, gains(weight.shape[1], seed))
    return model


QKV, MLP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"


def test_each_kind_of_layer_has_its_place():
    model = balanced(llama(), QKV, MLP, "self_attn.o_proj", "mlp.down_proj")
    choice = choose(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = balance.fold(model, choice)
    sources = ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"]
    assert all(torch.equal(f, gains(len(f), i)[1]) for i, f in enumerate(factors[BLOCK + name] for name in sources))
    assert set(factors) == {BLOCK + name for name in sources} and len(choice.codes) == 7
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model is as it was"
    assert all(choice.codes[name].gain is not None for name in choice.codes)


def test_what_is_applied():
    """A norm's weight, or the scales of rows and the bias; the weight of a layer in high precision."""
    factor = torch.tensor([2.0, 0.5])
    state = {
        "n.weight": torch.ones(2),
        "a.weight": torch.ones(2, 3),
        "a.weight_scale": torch.ones(2, 1),
        "a.bias": torch.ones(2),
    }
    state |= {"b.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    balance.apply({"n": factor, "a": factor, "b": factor}, state)
    assert torch.equal(state["n.weight"], factor) and torch.equal(state["a.bias"], factor)
    assert torch.equal(state["a.weight_scale"], factor[:, None]) and torch.equal(state["a.weight"], torch.ones(2, 3))
    assert torch.equal(state["b.weight"], factor[:, None].expand(2, 3).bfloat16())


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        (["self_attn.q_proj self_attn.k_proj", "self_attn.v_proj"], ["q_proj", "k_proj", "v_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
    ],
)
def test_a_norm_takes_no_gain_that_a_reader_does_not_share(groups, left):
    choice = choose(model := balanced(llama(), *groups))
    assert balance.fold(model, choice) == {}
    assert choice.lost == [f"{BLOCK}self_attn.{name}" for name in left]


def test_grouped_queries():
    choice = choose(model := balanced(llama(num_attention_heads=4, head_dim=32), "self_attn.o_proj"))
    assert balance.fold(model, choice) == {} and choice.ignored[f"{BLOCK}self_attn.o_proj"] == balance.NOT_FOLDED


def test_another_kind_of_norm_is_found_out_by_running_it():
    """Gemma's norm multiplies by 1 + its weight, so a factor of the weight is not one of the output."""
    choice = choose(model := balanced(llama("Gemma"), QKV))
    before = model(input_ids=IDS).logits
    assert balance.fold(model, choice) == {}
    assert choice.lost == [BLOCK + name for name in QKV.split()]
    assert torch.equal(model(input_ids=IDS).logits, before)
