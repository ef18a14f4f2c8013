"""bench/train.py on a CPU: every code path but the GPU's timers, and tables that several calls build."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "train.py"
sys.path[1:1] = [str(ROOT / "bench"), str(ROOT / "examples")]


def rows_of(folder: Path) -> list[dict]:
    path = folder / "train.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


@pytest.fixture
def train(monkeypatch):
    """Calls the script in this process, which has imported PyTorch."""

    def call(folder: Path, *options: str) -> tuple[str, list[dict]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--folder", str(folder), *options])
        with redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return out.getvalue(), rows_of(folder)

    return call


def test_several_calls_build_one_table(tmp_path, train):
    first = ["--tiny", "--folder", str(tmp_path), "--contenders", "halo1-int8", "bf16", "--models", "tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # rows of other threads are replaced
    done = subprocess.run([sys.executable, str(SCRIPT), *first], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path)
    assert [(row["contender"], row["recomputed"]) for row in rows] == [("halo1-int8", "nothing"), ("bf16", "nothing")]
    assert all(row["× bf16"] for row in rows)  # the first one got its own when bf16's was there
    bf16 = rows[1]

    more = ["--checkpointing", "layers", "--memory-budget", "0.5", "--contenders", "halo1-int8", "nonsense"]
    out, rows = train(tmp_path, "--models", "tiny-lora", *more)
    assert "there is no base 'nonsense'" in out
    assert rows[1] == bf16 and len(rows) == 3
    assert rows[2]["recomputed"] == "layers, budget 0.5" and rows[2]["× bf16"] is None

    _, rows = train(tmp_path, "--models", "tiny", "--contenders", "bf16", "--missing")
    assert rows[1] == bf16 and len(rows) == 3
    table = (tmp_path / "train.md").read_text()
    assert table.count("`python bench/train.py") == 2 and table.count("\n| tiny") == 3


def test_a_spent_budget_and_another_environment(tmp_path, train):
    made = {"date": "2026-01-01", "device": "another", "halo_tensor": "0.1.0", "torch": "2.11.0", "torchao": "0.18.0"}
    (tmp_path / "train.json").write_text(json.dumps({"environment": "elsewhere", "rows": [{"made": made}]}))
    out, _ = train(tmp_path, "--budget-seconds", "0", "--models", "tiny")
    assert "is replaced: it comes from elsewhere" in out and "stopped before bf16, tiny, 2×64" in out
