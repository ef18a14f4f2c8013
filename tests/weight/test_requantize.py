"""Codes of many weights are made together: after an op that wrote to them, or at the end of an optimiser's step."""

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from halo_tensor import HaloWeight, balance_, halo_config, quantize_
from halo_tensor.fences.fast_paths import FOREACH
from tests.helpers.recording import OpLog
from tests.helpers.weights import in_step


def model_of(*dtypes: str, frozen: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False) for _ in dtypes]
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.requires_grad_(not frozen)
        quantize_(layer, halo_config(1, dtype, min_features=0), filter_fn=lambda *_: True)
        if not frozen:
            layer.weight.grad = torch.randn(64, 64)
    return nn.Sequential(*layers)


class Decayed(torch.optim.Optimizer):
    """Writes to each weight twice, by itself."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)
        if closure is not None:
            self.seen = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def counts(log: OpLog) -> dict[str, int]:
    names = [name for name, _ in log.calls]
    return {name: names.count(name) for name in ("requantize_", "rotate_quantize_")}


def test_a_step_makes_codes_once():
    model = model_of("int8", "int8", "fp8", "int8", "fp8")
    versions = [layer.weight.operand.codes._version for layer in model]
    with OpLog() as log:
        Decayed(model.parameters()).step()
    assert counts(log) == {"requantize_": 2, "rotate_quantize_": 0}, "one op for each format"
    assert all(in_step(layer.weight) and not layer.weight.is_behind for layer in model)
    assert [layer.weight.operand.codes._version for layer in model] > versions
    with OpLog() as log, torch.no_grad():  # no optimiser runs
        model[0].weight.mul_(2)
        model[0].weight.add_(1)
    assert counts(log) == {"requantize_": 0, "rotate_quantize_": 2}


def test_a_closure_sees_the_codes_of_what_was_written():
    model, x = model_of("int8", "int8"), torch.randn(4, 64)
    expected = model_of("int8", "int8")
    with torch.no_grad():
        for layer in expected:
            layer.weight.mul_(0.5)
    optimizer = Decayed(model.parameters())
    optimizer.step(lambda: model(x))
    assert torch.equal(optimizer.seen, expected(x))
    assert all(in_step(layer.weight) for layer in model)


def test_an_error_in_a_step_leaves_no_old_codes_behind():
    model, x = model_of("int8", "int8"), torch.randn(4, 64)
    optimizer = Decayed(model.parameters())

    def fail():
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        optimizer.step(fail)
    assert all(layer.weight.is_behind for layer in model)
    model(x)
    assert all(in_step(layer.weight) for layer in model)
    optimizer.step()
    assert all(in_step(layer.weight) for layer in model)


def test_frozen_weights_are_written_at_once():
    """They have no master that tells later of the write."""
    model = model_of("int8", "int8", frozen=True)
    before = [layer.weight.operand.codes.clone() for layer in model]
    for layer in model:
        layer.weight.grad = torch.randn(64, 64)
    Decayed(model.parameters()).step()
    assert not any(torch.equal(layer.weight.operand.codes, codes) for layer, codes in zip(model, before, strict=True))


def test_balanced_weights_and_packed_ones_are_kinds_of_their_own():
    model = model_of("fp6", "fp6", "fp6", "fp6")
    balance_(model[0], torch.randn(8, 64))
    for layer in model[2:]:
        layer.weight.operand = layer.weight.operand.packed()
    with OpLog() as log:
        Decayed(model.parameters()).step()
    assert counts(log) == {"requantize_": 1, "rotate_quantize_": 2}
    for layer in model:
        weight = layer.weight
        fresh = HaloWeight.from_hp(weight.master, weight.recipe, gains=weight.gains).operand
        fresh = fresh.packed() if weight.operand.is_packed else fresh
        assert all(map(torch.equal, fresh.parts, weight.operand.parts))


LISTS = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_weights_are_updated_as_plain_ones(name):
    model = model_of("int8", "int8")
    plain = [nn.Parameter(layer.weight.master.clone()) for layer in model]
    for p, layer in zip(plain, model, strict=True):
        p.grad = layer.weight.grad
    for parameters in (plain, [*model.parameters()]):
        optimizer = getattr(torch.optim, name)(parameters, lr=0.1, weight_decay=0.1, foreach=True) if name != "Rprop" else (
            torch.optim.Rprop(parameters, lr=0.1, foreach=True)
        )  # fmt: skip
        for _ in range(2):
            optimizer.step()
    for p, layer in zip(plain, model, strict=True):
        assert torch.equal(p, layer.weight.master) and in_step(layer.weight)


def test_optimisers_choose_lists_for_weights_as_for_plain_ones(monkeypatch):
    assert FOREACH.state() == "on"
    monkeypatch.setattr(optimizers, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
    called, multiply = [], torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: (called.append(args[0]), multiply(*args))[1])
    model = model_of("int8", "int8")
    torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1).step()
    assert any(p is model[0].weight for p in called[0]), "in a loop over weights it would not be called"
