"""A balance as a dict of tensors: another model is balanced alike, and what does not fit is refused."""

import copy

import pytest
import torch

from halo_tensor import balance_
from halo_tensor.calibration.balance import balance_over
from halo_tensor.calibration.balance_state import balance_of, set_balance
from tests.helpers.training import make


def batch(seed: int) -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, 128)


def test_another_model_gets_the_same_balance():
    model, other, x = make(), make(), batch(0)
    assert balance_of(model) == {}
    assert balance_(model, x) == 4
    state = balance_of(model)
    assert {exponents.dtype for exponents in state.values()} == {torch.int8} and any(e.any() for e in state.values())
    assert set_balance(other, state) == 4
    assert torch.equal(model(x), other(x)) and balance_of(other).keys() == state.keys()
    for name, exponents in balance_of(other).items():
        assert torch.equal(exponents, state[name])


def test_several_batches_are_one_statistic():
    model, once = make(), make()
    assert balance_over(model, [((batch(0),), {}), ((batch(1),), {})]) == balance_(once, torch.cat([batch(0), batch(1)])) == 4
    for name, exponents in balance_of(model).items():
        assert torch.equal(exponents, balance_of(once)[name])


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, x = make(), batch(0)
    balance_(model, x)
    state, before = balance_of(model), copy.deepcopy(model)
    plain = make(converted=False)
    for other, changed, message in [
        (plain, state, "names 0.up, which is no converted layer with codes"),
        (model, state | {"1.gone": state["0.up"]}, "names 1.gone, which is no converted layer"),
        (model, state | {"1.down": state["0.up"]}, r"has shape \[128\] .* expected \[256\]"),
        (model, state | {"1.up": torch.full_like(state["1.up"], 9)}, "exponents up to 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            set_balance(other, changed)
    assert torch.equal(model(x), before(x))
