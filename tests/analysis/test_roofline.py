"""Predicted time: against sums done by hand, and against the records of the benchmarks."""

import json
import statistics
from pathlib import Path

import pytest

from halo_tensor import halo_config, recipe_config
from halo_tensor.analysis import roofline
from halo_tensor.recipe import RECIPES, Recipe

RESULTS = Path(__file__).parents[2] / "bench" / "results"
T, I, O = 64, 32, 16


CEILINGS = roofline.Ceilings(
    "a GPU",
    {"bf16": 100.0, "int8": 200.0, "fp8": 250.0},
    {"bf16": 1.0, "int8": 0.5, "fp8": 0.8},
    40.0,
    5.0,
    4.0,
    2.0,
    "by hand",
)


SIZES = {"tokens": T, "in_features": I, "out_features": O}


OPERATIONS = 2 * T * I * O


def seconds(recipe, *products, ceilings=CEILINGS, **options):
    return roofline.seconds(recipe, SIZES, products or ("output", "grad_input", "grad_weight"), ceilings=ceilings, **options)


def test_time_in_high_precision():
    assert seconds(Recipe()) == pytest.approx(3 * OPERATIONS / 100)
    memory = [2 * (T * I + I * O + T * O) / 10] * 3  # of every product: both operands are read, the result is written
    slow = roofline.Ceilings("", {"bf16": 1e9}, {"bf16": 1.0}, 10.0, 1.0, 1.0, 1.0, "")
    assert seconds(Recipe(), ceilings=slow) == pytest.approx(sum(memory)), "bound by memory"
    assert seconds(Recipe(), "output", ceilings=slow) == pytest.approx(memory[0])


def test_time_in_eight_bits():
    """HALO-1 in int8: X and W are rotated along in_features, so grad_input and grad_weight undo one rotation each."""
    recipe = halo_config(1, "int8").recipe
    products = OPERATIONS / 200 + 2 * OPERATIONS / (200 * 0.5)
    x, w = (n * (2 + 2) / 4 for n in (T * I, I * O))  # read in bf16, written in two layouts, rotated
    e = {}  # how E enters each of its products
    for name in ("grad_input", "grad_weight"):
        e.setdefault(recipe.operand(name, ("tokens", "out_features")), []).append(name)
    e = sum(T * O * (2 + len(names)) / 5 for names in e.values())
    assert seconds(recipe) == pytest.approx(products + x + w + e)
    assert seconds(recipe, sharing=4) == pytest.approx(products + x / 4 + w + e)
    frozen = seconds(recipe, trained=False)  # one layout exists; the other is a copy of codes: read and written
    assert frozen == pytest.approx(products + x + e + 2 * I * O / 40)
    forward = seconds(recipe, "output")
    assert forward == pytest.approx(OPERATIONS / 200 + (T * I + I * O) * (2 + 1) / 4)
    fp8 = halo_config(0, "fp8").recipe
    assert seconds(fp8, "output") == pytest.approx(OPERATIONS / 250 + (T * I + I * O) * 3 / 5), "not rotated"
    for block, rate in ((256, 4), (512, 2), (None, 2)):
        wide = halo_config(1, "int8", block_size=block).recipe
        assert seconds(wide, "output") == pytest.approx(OPERATIONS / 200 + (T * I + I * O) * 3 / rate)


def test_block_scaled_codes_are_multiplied_in_high_precision():
    """No kernel takes block scales, so bf16 operands are read."""
    slow = roofline.Ceilings("", {"bf16": 100.0}, {"bf16": 1.0}, 10.0, 1e9, 1e9, 1e9, "")
    expected = max(OPERATIONS / 100, 2 * (T * I + I * O + T * O) / 10)
    assert seconds(RECIPES["jetfire"], "output", ceilings=slow) == pytest.approx(expected, rel=1e-4)


def test_ceilings_are_what_the_benchmarks_measured():
    gemm = json.loads((RESULTS / "gemm.json").read_text())["rows"]
    rotation = json.loads((RESULTS / "rotation.json").read_text())["rows"]

    def median(rows, column, contender):
        return statistics.median(float(row[column]) for row in rows if contender(row["contender"]))

    plain = {"bf16": "bf16 torch.mm", "int8": "int8 ours", "fp8": "fp8 ours"}
    for unit, name in plain.items():
        rate = median(gemm, "TFLOP/s", lambda c, name=name: c == name) * 1e12
        assert roofline.H100.products[unit] == pytest.approx(rate, rel=0.005)
        if unit != "bf16":
            undone = median(gemm, "TFLOP/s", lambda c, name=name: c == f"{name}, un-rotated") * 1e12
            assert roofline.H100.undo[unit] == pytest.approx(undone / rate, abs=0.015)
    both = {
        "quantize": "8 not rotated, both",
        "rotate": "8 rotated by 128, both",
        "rotate_wide": "8 rotated in full width, both",
    }
    for field, name in both.items():
        rate = median(rotation, "GB/s", lambda c, name=name: name in c) * 1e9
        assert getattr(roofline.H100, field) == pytest.approx(rate, rel=0.02)
    assert roofline.H100.copy == pytest.approx(median(rotation, "GB/s", lambda c: "copy" in c) * 1e9, rel=0.01)


def test_modelled_speeds_are_near_the_measured_ones():
    checked = 0
    for row in json.loads((RESULTS / "linear.json").read_text())["rows"]:
        if not row["contender"].startswith("halo"):
            continue
        n_in, n_out = map(int, row["in×out"].split("x"))
        sizes = {"tokens": 8192, "in_features": n_in, "out_features": n_out}
        level, dtype = row["contender"].removeprefix("halo").split("-")
        modelled = roofline.seconds(Recipe(), sizes) / roofline.seconds(halo_config(int(level), dtype).recipe, sizes)
        assert modelled == pytest.approx(float(row["× bf16"]), rel=0.08)
        checked += 1
    assert checked >= 20


def test_time_counts_what_is_computed():
    sizes = {"tokens": 8192, "in_features": 4096, "out_features": 4096}
    recipe = halo_config(1, "int8").recipe
    whole = roofline.seconds(recipe, sizes)
    frozen = roofline.seconds(recipe, sizes, ("output", "grad_input"), trained=False)
    assert 0.5 * whole < frozen < 0.7 * whole
    assert 0.85 * whole < roofline.seconds(recipe, sizes, sharing=3) < whole
    assert roofline.seconds(recipe_config("jetfire").recipe, sizes) > roofline.seconds(Recipe(), sizes)
    wide = halo_config(1, "int8", block_size=None).recipe
    assert roofline.seconds(wide, sizes) > 1.1 * whole
