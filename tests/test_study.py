"""bench/study.py: what several processes do, and one record out of theirs. Runs are made up."""

import json
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
sys.path[1:1] = [str(ROOT / "examples"), str(ROOT / "bench")]
import contenders  # noqa: E402
import study  # noqa: E402
import study_results  # noqa: E402

from halo_tensor.weight import dense_value  # noqa: E402

RECIPES = [*study.MAIN, *study.OTHERS]


def test_parts_do_every_run_once():
    tasks = study.queue(RECIPES, 8, 3)
    assert len(tasks) == len(set(tasks)) == 2 * (8 * len(study.MAIN) + 3 * len(study.OTHERS))
    parts = [study.share(tasks, part, 8) for part in range(8)]
    assert sorted(task for part in parts for task in part) == sorted(tasks)
    work = [sum(1 if task[1].startswith("bf16") else 2 for task in part) for part in parts]
    assert max(work) < 1.5 * min(work)
    for part in parts:
        matters = [task[1] in study.MAIN for task in part]
        assert matters == sorted(matters, reverse=True)
        groups = [study.group_of(*task[1:]) for task in part]
        changes = sum(a != b for a, b in pairwise(groups))
        assert changes + 1 == len(set(groups))  # none is compiled twice


def test_a_seed_is_one_of_the_rotation_too():
    def rotation(recipe, seed):
        model = contenders.nn.ModuleDict({"proj": contenders.nn.Linear(128, 128, bias=False)})
        contenders.convert(model, recipe, seed)
        return model["proj"].weight.recipe.output.left.in_features

    assert rotation("halo1-int8", 5).seed == 5 and rotation("halo0-int8", 5) is None
    assert contenders.rotated("halo2-fp6") and not contenders.rotated("halo0-fp6") and not contenders.rotated("bf16")


def made_up(recipe: str, seed: int, validation: float, speed: float | None = None) -> dict:
    run = {"model": "as shipped", "recipe": recipe, "seed": seed, "validation": validation, "exact": 0.5}
    made = {"date": "2026-11-22", "device": "a", "halo_tensor": "0.1.0", "commit": "c", "torch": "2", "torchao": "0"}
    made["command"] = "python bench/study.py --part 0/2"
    return run | {"cosine": 0.9, "by recipe": validation, "tokens/s": speed, "made": made}


def write(path: Path, runs: list[dict], **settings) -> None:
    record = {"title": "t", "notes": "n", "settings": settings, "runs": runs}
    path.write_text(json.dumps(record))


def test_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/study.py", "--join"])
    with pytest.raises(SystemExit, match="there is no .*study_part"):
        study_results.join("study", tmp_path)
    write(tmp_path / "study.json", [made_up("bf16", 0, 1.0, 100.0)], lr=1)
    write(tmp_path / "study_part0.json", [made_up("halo1-int8", 0, 1.01), made_up("bf16", 1, 2.0)], lr=1)
    write(tmp_path / "study_part1.json", [made_up("halo1-int8", 1, 2.06)], lr=2)
    write(tmp_path / "study_part_mine.json", [], lr=1)
    with pytest.raises(SystemExit, match="study_part1.json has other settings"):
        study_results.join("study", tmp_path)
    write(tmp_path / "study_part1.json", [made_up("halo1-int8", 1, 2.06)], lr=1)
    study_results.join("study", tmp_path)
    record = json.loads((tmp_path / "study.json").read_text())
    assert [(run["recipe"], run["seed"]) for run in record["runs"]] == [
        ("bf16", 0), ("bf16", 1), ("halo1-int8", 0), ("halo1-int8", 1),
    ]  # fmt: skip
    assert record["command"] == "python bench/study.py --part 0/2\npython bench/study.py --join"
    bf16, halo = record["rows"]
    assert halo["change"] == "+2.00% ± 1.00%"  # 1 % and 3 %
    assert (bf16["tokens/s"], halo["tokens/s"], halo["× bf16"]) == (100, None, None)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["study.json", "study_part_mine.json"]


@pytest.mark.parametrize("recipe", ["halo0-fp8", "torchao-tensorwise"])
def test_drawn_gains_round_otherwise_and_no_worse(recipe):
    """So that seeds of a recipe without signs have roundings of their own: a control of its mean."""
    exact = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False))
    # Numbers that end at a bound, as torch 2.11's normal ones in bfloat16 do, would have one largest in all draws.
    torch.nn.init.normal_(exact[0].weight, std=0.05)
    exact = exact.bfloat16()
    model = deepcopy(exact)
    contenders.convert(model, recipe + contenders.DRAWN)
    x = torch.randn(64, 256).bfloat16()

    def gradient(model):
        model.zero_grad()
        model(x).square().sum().backward()
        return model[0].weight.grad.float().flatten()

    expected = gradient(exact)
    errors = [gradient(model) - expected]
    for seed in (0, 1):
        contenders.draw_gains(model, seed)
        errors.append(gradient(model) - expected)
    assert torch.equal(dense_value(model[0].weight), exact[0].weight), "what is trained is the same"
    norms = [e.norm().item() for e in errors]
    assert 0.01 * expected.norm() < max(norms) < 1.1 * min(norms)
    assert (torch.corrcoef(torch.stack(errors)) - torch.eye(3)).abs().max() < 0.5
    contenders.draw_gains(model, 0)
    assert torch.equal(gradient(model) - expected, errors[1]), "a seed is a draw"
