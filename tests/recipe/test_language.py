"""The recipe language: what can be said, and what is refused."""

import copy

import pytest

from halo_tensor import recipe as r
from halo_tensor.recipe import FP8_E4M3, INT8, PRODUCTS, TENSOR, Operand, Product, Recipe, Rotation, Scales

R = Rotation()


def test_halo_as_published():
    """The table of the paper's placements (levels × products), with one scale per operand."""
    for level in (0, 1, 2):
        recipe = r.halo(level, INT8, "tensor")
        features = R if level else None
        x = w = Operand(INT8, TENSOR, in_features=features)
        e = Operand(INT8, TENSOR)
        assert recipe.output == Product(x, w)
        assert recipe.grad_input == Product(Operand(INT8, TENSOR, tokens=R if level == 2 else None), w)
        assert recipe.grad_weight == Product(e, x)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_rows_quantise_x_and_w_once(level):
    """Folding: the very same operand serves two products, so it is quantised and saved once."""
    recipe = r.halo(level, INT8, "row")
    assert recipe.output.left == recipe.grad_weight.right
    assert recipe.output.right == recipe.grad_input.right
    assert recipe.grad_weight.right.granularity.is_per(PRODUCTS["grad_weight"][2]), "folded: it lies along the contraction"
    assert recipe.grad_input.right.granularity.is_per(PRODUCTS["grad_input"][2])


def test_full_width_has_a_block_for_tokens():
    recipe = r.halo(2, INT8, rotation=Rotation(None, 3))
    assert recipe.output.left.in_features == Rotation(None, 3)
    assert recipe.grad_input.left.tokens == Rotation(128, 3)


def test_identity_and_formats():
    assert Recipe().is_identity and Recipe().formats == ()
    assert not Recipe(grad_weight=Product(Operand(tokens=R), Operand(tokens=R))).is_identity
    assert r.switchback().formats == (INT8,)
    assert r.switchback().grad_weight == Product()


def test_recipes_are_values():
    recipe = r.halo(1, FP8_E4M3)
    assert recipe == r.halo(1, FP8_E4M3) and hash(recipe) == hash(r.halo(1, FP8_E4M3))
    assert recipe != r.halo(2, FP8_E4M3)
    assert copy.deepcopy(recipe) == recipe


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ({"output": Product(Operand(INT8, in_features=R), Operand(INT8))}, "output contracts in_features.*same rotation"),
        ({"grad_weight": Product(Operand(INT8), Operand(INT8, tokens=R))}, "grad_weight contracts tokens"),
        ({"output": Product(Operand(INT8, out_features=R), Operand(INT8))}, "left operand is a matrix over tokens and in_"),
        (
            {"output": Product(Operand(INT8), Operand(INT8, Scales.per(tokens=1)))},
            "cannot carry a rotation or a scale on tokens",
        ),
        ({"output": Product(Operand(INT8), Operand(FP8_E4M3))}, "int8 with fp8_e4m3, which no matrix unit does"),
        ({"grad_input": Product(Operand(INT8), Operand())}, "int8 with high precision"),
        ({"output": Product(Operand(INT8), Operand(INT8, Scales.per(in_features=1)))}, "only E is"),
        ({"grad_input": Product(Operand(INT8, Scales.per(out_features=1)), Operand(INT8))}, "Put it on the other dimension"),
        ({"output": Product(Operand(INT8, Scales.per(rows=32, columns=32)), Operand(INT8))}, "either both operands or none"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(products, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**products)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="must be a layout of scales, such as .*got 'tokens'"):
        Operand(INT8, "tokens")
    with pytest.raises(ValueError, match=r"not along rows or columns; got Scales\(row\)"):
        Operand(INT8, Scales.per(rows=1))
    with pytest.raises(ValueError, match="at least 2 wide"):
        Rotation(1)
    with pytest.raises(ValueError, match="seed must be None or in"):
        Rotation(128, -1)
