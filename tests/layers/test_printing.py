"""``print(model)`` shows which layers are converted, and how."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from halo_tensor import HaloWeight, balance_, dequantize_, halo_config, hot_config, quantize_, recipe_config
from halo_tensor.layers.printing import describe_recipe
from halo_tensor.recipe import INT4, INT8, RECIPES, Operand, Product, Recipe, Rotation, halo, hot

PLAIN = "Linear(in_features=128, out_features=128, bias=False)"


def make(config=None, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.ReLU())
    quantize_(model, config or halo_config(1, "int8"), **options)
    return model


def shown(model: nn.Module) -> str:
    """The line of the layer in ``print(model)``."""
    return next(line for line in repr(model).splitlines() if "(0): " in line).split("(0): ")[1]


def converted(words: str) -> str:
    return f"{PLAIN[:-1]}, {words})"


def test_a_converted_layer_tells_its_recipe_and_its_codes():
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    assert shown(model) == PLAIN
    quantize_(model, halo_config(1, "int8"))
    assert shown(model) == converted("halo(level=1, int8, block 128), codes kept")
    quantize_(model, halo_config(2, "fp8", block_size=64, granularity="tensor", seed=3))
    assert shown(model) == converted("halo(level=2, fp8_e4m3, block 64, seed 3, per tensor), codes kept")
    dequantize_(model)
    assert shown(model) == PLAIN and "extra_repr" not in model[0].__dict__


def test_what_a_weight_holds_is_shown():
    assert shown(make(halo_config(0, "int8", keep_codes=False))) == converted(
        "halo(level=0, int8), quantised in every forward"
    )
    assert shown(make(recipe_config("switchback", frozen=True))) == converted("switchback, frozen, codes only")
    assert shown(make(hot_config(min_features=0))) == converted("hot, codes kept"), "for grad_input"
    assert shown(make(hot_config(min_features=0, keep_codes=False))) == converted("hot, quantised in every backward")
    assert shown(make(halo_config(1, "bf16"))) == converted("high precision")
    model = make()
    balance_(model, torch.randn(8, 128) * torch.arange(1, 129))
    assert shown(model) == converted("halo(level=1, int8, block 128), balanced, codes kept")


def test_copies_show_their_own_weight():
    model = make()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert shown(other) == shown(model) != PLAIN
        dequantize_(other)
        assert shown(other) == PLAIN and shown(model) != PLAIN


def test_a_layer_whose_weight_was_replaced_shows_no_recipe():
    model = make()
    model[0].weight = nn.Parameter(torch.randn(128, 128))
    assert shown(model) == PLAIN


def test_an_extra_repr_of_the_user_stays():
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    model[0].extra_repr = lambda: "mine"
    quantize_(model, halo_config(1, "int8"))
    assert shown(model) == "Linear(mine)"
    dequantize_(model)
    assert shown(model) == "Linear(mine)"


def test_a_deleted_model_is_freed_at_once():
    model = make()
    repr(model)
    layer = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_sharded_and_gathered_layers():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = make()
        before = shown(model)
        fully_shard(model[0], mesh=mesh)
        assert not isinstance(model[0].weight, HaloWeight) and shown(model).removeprefix("FSDP") == before
        model[0].unshard()
        assert isinstance(model[0].weight, HaloWeight) and shown(model).removeprefix("FSDP") == before
    finally:
        dist.destroy_process_group()


def test_layers_of_other_kinds():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(nn.Conv2d(64, 64, 3), transformers.Conv1D(64, 128))
    plain = repr(model)
    quantize_(model, hot_config())
    assert "HaloConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), input saved by hot)" in repr(model)
    assert "HaloConv1D(nf=64, nx=128, hot)" in repr(model)
    quantize_(model, hot_config(quantized_convolutions="all"))
    assert "HaloConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), hot, quantized convolutions: all)" in repr(model)
    dequantize_(model)
    assert repr(model) == plain


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_named(name):
    assert describe_recipe(RECIPES[name]) == name


def test_recipes_without_a_name():
    assert describe_recipe(halo(1, INT8, "row", Rotation(None, None))) == "halo(level=1, int8, full width, no signs)"
    assert describe_recipe(hot(4)) == "recipe(grad_input int4, grad_weight int8)"
    assert describe_recipe(hot(None, saved=INT4)) == "recipe(grad_input int4, grad_weight int8·int4)"
    rotated = Operand(tokens=Rotation(16, None))
    assert describe_recipe(Recipe(grad_weight=Product(rotated, rotated))) == "recipe(grad_weight rotated)"
    assert describe_recipe(hot(grad_weight=INT4)) == "hot_int4"
