"""Fine-tuning a small Llama end to end, through transformers, and the comparison of recipes on it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halo_tensor import dequantize_, halo_config, quantize_
from tests.helpers.small_models import TEXT, save_small_model, small_llama

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def finetune(config, steps: int = 30) -> list[float]:
    """Losses on ASCII characters of Python's documentation."""
    model = small_llama()
    if config is not None:
        assert len(quantize_(model, config).converted) == 14
    ids = torch.tensor([min(ord(c), 127) for c in TEXT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        batch = ids[step * 512 : (step + 1) * 512].view(4, 128)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def high_precision():
    losses = finetune(None)
    assert losses[-1] < 0.75 * losses[0], "the model learns"
    return losses


@pytest.mark.parametrize(
    "config",
    [halo_config(1, "int8"), halo_config(2, "int8"), halo_config(0, "fp8"), halo_config(1, "fp8"), halo_config(1, "fp6")],
    ids=lambda c: f"halo{c.level}_{c.dtype}",
)
def test_the_loss_tracks_high_precision(config, high_precision):
    losses = finetune(config)
    assert losses != high_precision
    assert losses[-1] == pytest.approx(high_precision[-1], rel=0.02)


def test_the_identity_is_bit_identical(high_precision):
    assert finetune(halo_config(1, "bf16")) == high_precision


def test_a_finetuned_model_exports_to_plain_transformers(tmp_path):
    model = small_llama()
    quantize_(model, halo_config(1, "int8"))
    ids = torch.randint(0, 128, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    dequantize_(model)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


#: Runs an example, and says on stderr when the library and what it needs are imported.
IMPORT_FIRST = (
    "import runpy, sys; import halo_tensor; print('imported', file=sys.stderr); "
    "sys.argv[:] = sys.argv[1:]; sys.path[0] = sys.argv[0].rpartition('/')[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run_example(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IMPORT_FIRST, str(ROOT / "examples" / "compare.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_example_takes_any_model_and_data(tmp_path):
    save_small_model(tmp_path / "model")
    rows = [{"text": TEXT[i : i + 500]} for i in range(0, 20000, 500)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--steps", "4", "--length", "64", "--valid", "4", "--dtype", "float32"]
    recipes = ["--recipes", "high", "halo1-int8", "halo0-fp8-tensor", "switchback"]
    done = run_example("--model", "model", "--data", "data.jsonl", *options, *recipes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stderr.partition("imported\n")[2].replace("\r", "\n").splitlines()
    assert shown and [line for line in shown if line and not re.match(r"[\w-]+: +\d+%\|", line)] == [], "progress bars only"
    report = (tmp_path / "outputs" / "compare.md").read_text()
    assert (tmp_path / "outputs" / "compare.png").stat().st_size > 10_000
    lines = [line.split("|") for line in report.splitlines() if line.startswith("| ")][1:]
    assert [cells[1].strip() for cells in lines] == recipes[1:]
    high, ours, *_ = (float(cells[3]) for cells in lines)
    assert ours == pytest.approx(high, rel=0.01)
    assert "0.25×" in lines[1][7] or "0.26×" in lines[1][7], "int8 against float32, shared by q, k, v and by gate, up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "halo7-int8"], "level must be one of 0, 1, 2; got 7"),
        (["--recipes", "mine"], "name must be one of 'switchback'"),
        (["--model", "/nowhere/model"], "cannot load the model '/nowhere/model'"),
    ],
)
def test_the_example_says_what_is_missing_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "compare.py"), run_name="__main__")
    assert isinstance(ended.value.code, str), "which Python prints without a traceback, and exits with 1"
    assert message in ended.value.code and "\n" not in ended.value.code
