"""bench/outliers.py: a model with outliers, which is the same function, and the report of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "examples"), str(ROOT / "bench")]
import outliers  # noqa: E402

from halo_tensor.diagnostics import CANDIDATES  # noqa: E402
from tests.helpers.small_models import save_small_model, small_llama  # noqa: E402


def test_outliers_are_there_and_the_function_is_the_same():
    model, ids = small_llama(), torch.randint(0, 128, (2, 20))
    seen = []
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        before = model(ids).logits
        outliers.inject_outliers(model)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    ratio = (seen[1] / seen[0]).mean((0, 1))
    assert (ratio > 20).sum() == outliers.OUTLIERS
    torch.testing.assert_close(ratio[ratio > 20], torch.full([outliers.OUTLIERS], float(outliers.FACTOR)), rtol=1e-3, atol=0)


def test_the_report_is_written(tmp_path, monkeypatch):
    save_small_model(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--tokens", "64", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/outliers.py", *options])
    outliers.main()
    record = json.loads((tmp_path / "outliers.json").read_text())
    rows = {row["recipe"]: float(row["gradient cosine"]) for row in record["rows"]}
    assert rows.keys() >= CANDIDATES.keys() | {"int8 HALO-1, balanced"}
    assert rows["int8 HALO-1, balanced"] > rows["int8 HALO-1"] > rows["int8 HALO-0"]
    text = (tmp_path / "outliers.md").read_text()
    assert "Recommended: " in text and "| int8 HALO-1, balanced | " in text and "`python bench/outliers.py --model" in text
