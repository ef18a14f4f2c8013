"""bench/train.py on a CPU: every code path but the GPU's timers, and tables that several calls build."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("triton")
pytest.importorskip("peft")
SCRIPT = Path(__file__).parent.parent / "bench" / "train.py"


def train(folder: Path, *options: str) -> tuple[str, list[dict]]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    path = folder / "train.json"
    return done.stdout, json.loads(path.read_text())["rows"] if path.exists() else []


def test_several_calls_build_one_table(tmp_path):
    _, rows = train(tmp_path, "--contenders", "halo1-int8", "bf16", "--models", "tiny")
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


def test_a_spent_budget_and_another_environment(tmp_path):
    made = {"date": "2026-01-01", "device": "another", "halo_tensor": "0.1.0", "torch": "2.11.0", "torchao": "0.18.0"}
    (tmp_path / "train.json").write_text(json.dumps({"environment": "elsewhere", "rows": [{"made": made}]}))
    out, _ = train(tmp_path, "--budget-seconds", "0", "--models", "tiny")
    assert "is replaced: it comes from elsewhere" in out and "stopped before bf16, tiny, 2×64" in out
