"""Predicted time of experts: against sums done by hand, and against what was measured on an H200."""

import json
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_tensor import halo_config
from halo_tensor.analysis import expert_roofline as experts
from halo_tensor.analysis.ceilings import H200, Ceilings, time_of
from halo_tensor.analysis.expert_roofline import ExpertShape, seconds
from halo_tensor.recipe import PRODUCTS, Recipe

INT8, FP8, LEVEL_2 = (halo_config(*how).recipe for how in ((1, "int8"), (1, "fp8"), (2, "int8")))
FORWARD, FROZEN = ("output",), ("output", "grad_input")
MODELS = {
    "qwen": ExpertShape(8192, 8, 128, 2048, 1536, 768),
    "gpt-oss": ExpertShape(8192, 4, 32, 2880, 5760, 2880),
    "mixtral": ExpertShape(8192, 2, 8, 4096, 28672, 14336),
}
shapes = st.builds(
    ExpertShape,
    *(st.integers(1, n) for n in (20000, 8, 256)),
    *(st.integers(1, n).map(lambda n: 128 * n) for n in (64, 64, 32)),
    st.booleans(),
    st.booleans(),
)


def without_codes(recipe, shape, products=tuple(PRODUCTS), trained=True):
    """As benchmarks measure: weights hold codes, in both orders if they train."""
    made = experts._passes_of_weights(recipe, shape, True, trained, "rotate") if trained else ()
    return seconds(recipe, shape, products, trained=trained, ceilings=H200) - time_of(made, H200)


@pytest.mark.parametrize(
    ("model", "bf16", "products"), [("qwen", 4.04, 2.05), ("gpt-oss", 9.43, 4.16), ("mixtral", 29.5, 12.79)]
)
def test_products_are_near_what_was_measured(model, bf16, products):
    """docs/notes/experts.md, in ms: bf16's products with the gate between them, and the six products in int8."""
    shape, every = MODELS[model], tuple(PRODUCTS)
    high = sum(experts._products(Recipe(), shape, every, H200)) + time_of(experts._gate(shape, True), H200)
    assert high * 1e3 == pytest.approx(bf16, rel=0.04)
    assert sum(experts._products(INT8, shape, every, H200)) * 1e3 == pytest.approx(products, rel=0.05)


def record(name: str) -> dict[tuple[str, str], float]:
    """Return the seconds of bench/results, by model and contender."""
    rows = json.loads((Path(__file__).parents[2] / "bench" / "results" / f"{name}.json").read_text())["rows"]
    return {(row["model"], row["contender"]): row["ms"] / 1e3 for row in rows}


@pytest.mark.parametrize("model", MODELS)
def test_layers_are_near_the_record(model):
    """With routing; of weights that hold their codes, and of weights that are quantised in every step."""
    shape, held, written = MODELS[model], record("experts"), record("experts_written")
    assert seconds(Recipe(), shape, ceilings=H200) == pytest.approx(held[model, "bf16"], rel=0.08)
    frozen = {"halo1-int8, frozen": seconds(INT8, shape, FROZEN, trained=False, ceilings=H200)}
    predicted = {"halo1-int8": without_codes(INT8, shape), "halo1-fp8": without_codes(FP8, shape)} | frozen
    compared = {name: ms for name, ms in predicted.items() if (model, name) in held}
    assert "halo1-int8" in compared and compared == pytest.approx({name: held[model, name] for name in compared}, rel=0.08)
    for name, recipe in (("halo1-int8", INT8), ("halo1-fp8", FP8)):
        assert seconds(recipe, shape, ceilings=H200) == pytest.approx(written[model, name], rel=0.08)


#: A GPU whose rates are easy to divide by.
CEILINGS = Ceilings(
    name="a GPU", products={"bf16": 100.0, "int8": 200.0, "fp8": 250.0}, undo={"bf16": 1.0, "int8": 0.5, "fp8": 0.8}, copy=40.0,
    quantize=5.0, rotate=4.0, rotate_wide=2.0, tiles=3.0, rotate_pair=2.5, rotate_rows=1.8, rotate_rows_wide=1.7,
    rotate_both=1.6, rotate_both_wide=1.4, noisy=1.5, source="by hand", launch=1e-3,
)  # fmt: skip
BY_HAND = ExpertShape(1024, 2, 4, 128, 64, 32)  # 512 rows an expert


def test_forward_by_hand():
    rows, padded = 2048, 4 * (512 + 64)
    high = 2 * padded * (64 * (128 + 64) + 128 * (32 + 64)) / (100 * 0.9) + 2 * rows * (64 + 128) / 40  # products
    high += (7 * 2 * rows * 128 + 2 * rows * (64 + 32)) / 40  # routing, and the gate
    assert seconds(Recipe(), BY_HAND, FORWARD, ceilings=CEILINGS) == pytest.approx(high + 10e-3 + experts.SORTING)
    low = 2 * padded * (64 * (128 + 128) + 128 * (32 + 128)) / (200 * 0.93) + 2 * rows * (64 + 128) / 40
    low += 3 * 1024 * 128 / 4 + 2 * rows * 128 / 40 + (2 * 64 + 32) * rows / (0.55 * 40) + 2 * (rows + 1024) * 128 / 40
    weights = 3 * 4 * 128 * (64 + 32) / (0.75 * 40)
    assert seconds(INT8, BY_HAND, FORWARD, ceilings=CEILINGS) == pytest.approx(low + weights + 7e-3 + experts.SORTING)
    assert seconds(INT8, BY_HAND, FORWARD, trained=False, ceilings=CEILINGS) == pytest.approx(low + 6e-3 + experts.SORTING)


def test_grad_weight_by_hand():
    """It contracts whole tiles of tokens, writes each expert's gradient, and undoes a rotation."""
    m, n = 64, 128
    compute = 2 * 4 * m * n * (512 + 64 + 128) / (200 * 0.93 * 0.5)
    assert experts._along_tokens(BY_HAND, m, n, "int8", True, CEILINGS) == pytest.approx(compute + 2 * 4 * m * n / 40 + 1e-3)
    compute = 2 * 4 * m * n * (512 + 64) / (100 * 0.9)
    assert experts._along_tokens(BY_HAND, m, n, "bf16", False, CEILINGS) == pytest.approx(compute + 2 * 4 * m * n / 40 + 1e-3)


def test_few_rows_read_the_weights():
    """One token of a large layer is bound by memory, and experts without tokens are not read."""
    shape = ExpertShape(1, 8, 128, 2048, 1536, 768)
    least = 2 * 8 * 2048 * 1536 / H200.copy
    assert least < experts._of_rows(shape, 1536, 2048, "bf16", False, H200) < 2 * least + 1e-5
    assert experts._padded(0.5) == 128 * (1 - exp(-0.5)) and experts._padded(64) == 128 and experts._padded(640) == 704


@given(shapes, st.sampled_from([Recipe(), INT8, FP8, LEVEL_2]))
def test_no_time_is_below_that_of_its_operations(shape, recipe):
    operations = 2 * shape.rows * (shape.in_features * (shape.up + shape.down))
    unit = experts.unit_of(recipe.output)
    every = seconds(recipe, shape, ceilings=H200)
    assert every > 3 * operations / H200.products[unit]
    frozen, forward = (seconds(recipe, shape, products, trained=False, ceilings=H200) for products in (FROZEN, FORWARD))
    assert forward < frozen < every and forward > operations / H200.products[unit]
    more = shape._replace(tokens=2 * shape.tokens)
    assert every < seconds(recipe, more, ceilings=H200) < 2.1 * every
    faster = replace(H200, products={u: 2 * rate for u, rate in H200.products.items()})
    assert every / 2 < seconds(recipe, shape, ceilings=faster) < every


@given(shapes)
def test_what_costs_more(shape):
    """A gate that is not fused, a rotation of tokens, and gradients that are transposed."""
    fused = shape._replace(fused=True, in_features_first=False)
    usual = seconds(INT8, fused, ceilings=H200)
    assert seconds(INT8, fused._replace(in_features_first=True), ceilings=H200) > usual
    assert seconds(LEVEL_2, fused, ceilings=H200) > usual
    assert seconds(Recipe(), shape, ceilings=H200) == seconds(Recipe(), fused, ceilings=H200), "of this library alone"
    fp6 = halo_config(1, "fp6_e2m3").recipe
    packed, unpacked = (seconds(r, shape, FROZEN, trained=False, ceilings=H200) for r in (fp6, FP8))
    assert packed == pytest.approx(unpacked + 2 * (1.75 * shape.elements / H200.copy + H200.launch))
