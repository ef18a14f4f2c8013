"""The table of what ops and functions do with converted weights, and what ``help`` tells of them."""

import doctest
import pydoc

import pytest
import torch
from torch import nn

import halo_tensor
from halo_tensor import HaloWeight, halo_config, keep_products, quantize_
from halo_tensor.fsdp import precompute_scales
from halo_tensor.weight import ShardRole, handlers

aten = torch.ops.aten


def make() -> HaloWeight:
    layer = nn.Linear(128, 128, bias=False)
    quantize_(layer, halo_config(1, "int8"))
    return layer.weight


def test_a_handler_runs_in_place_of_an_op_or_passes_it_on(monkeypatch):
    monkeypatch.setattr(handlers, "_handlers", dict(handlers._handlers))
    seen = []

    @handlers.implements(aten.sum.default, torch.relu)
    def handler(op, weight, *args, **kwargs):
        seen.append(op)
        return "relu" if op is torch.relu else NotImplemented

    weight = make()
    assert torch.relu(weight) == "relu"
    assert torch.equal(weight.sum(), weight.dequantize().sum()) and seen == [torch.relu, aten.sum.default]


def test_fsdp_finds_its_hooks_and_users_their_values():
    """Each is added by a module that imports the class."""
    weight = make()
    assert callable(weight.fsdp_pre_all_gather) and callable(weight.fsdp_post_all_gather)
    assert weight._fsdp_flattened is False
    assert weight.detach().numpy().shape == (128, 128) and len(weight.tolist()) == 128
    assert all(isinstance(chunk, HaloWeight) for chunk in weight.detach().chunk(2))


def test_help_draws_the_roles_of_a_weight():
    text = pydoc.render_doc(HaloWeight, renderer=pydoc.plaintext)
    assert "whose ``F.linear`` follows a recipe" in text
    assert all(role.name in HaloWeight.__doc__ for role in ShardRole)
    assert [role for role in ShardRole if role.is_part] == [ShardRole.CHUNK, ShardRole.PADDED, ShardRole.SHARD]


@pytest.mark.parametrize("public", [HaloWeight, keep_products, precompute_scales])
def test_help_has_an_example_that_runs(public):
    assert public.__doc__ not in (None, torch.Tensor.__doc__)
    (test,) = doctest.DocTestFinder(recurse=False).find(public, public.__name__, globs={"halo_tensor": halo_tensor})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_ops_that_are_called_as_functions_write_and_differentiate():
    """DTensor calls them so, with __torch_function__ enabled."""
    weight = make()
    dense = torch.randn(128, 128)
    with torch.no_grad():
        aten.copy_.default(weight, dense)
    assert torch.equal(weight.dequantize(), dense)
    assert torch.equal(weight.codes, HaloWeight.from_hp(dense, weight.recipe).codes), "in step"
    assert aten.clone.default(weight).requires_grad
