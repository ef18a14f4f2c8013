"""bench/generate.py on a CPU: the step that it times, and its table from made-up times."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT / "examples")]
import generate  # noqa: E402


def test_the_step_is_that_of_a_plain_model(monkeypatch):
    monkeypatch.setattr(generate, "DEVICE", "cpu")
    model = generate.model_of("tiny").float()
    torch.manual_seed(0)
    step = generate.step_of(model, 3)
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3, generate.KEPT))
    expected = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    first, second = step(), step()
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second), "a step leaves something for the next"


def test_the_table(monkeypatch, tmp_path):
    times = iter([4.0, 2.0, 3.0, 1.0])
    monkeypatch.setattr(generate, "DEVICE", "cpu")
    monkeypatch.setattr(generate, "eager_ms", lambda step: (step(), next(times))[1])
    monkeypatch.setattr(generate, "graph_ms", lambda step: (step(), next(times))[1])
    options = ["--shapes", "tiny", "--batches", "2", "--contenders", "bf16", "halo1-int8", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/generate.py", *options])
    generate.main()
    plain, ours = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert plain["eager, × bf16"] == plain["graph, × bf16"] == "1.00"
    assert (ours["eager, × bf16"], ours["graph, × bf16"]) == ("1.33", "2.00")
