"""bench/study.py: what several processes do, and one record out of theirs. Runs are made up."""

import json
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT / "examples"), str(ROOT / "bench")]
import contenders  # noqa: E402
import split  # noqa: E402
import study  # noqa: E402
import study_results  # noqa: E402

from halo_tensor.weight.tensor import dense_value  # noqa: E402
from tests.helpers.small_models import save_small_model  # noqa: E402

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
    return run | {"cosine": 0.9, "by recipe": 2 + validation, "tokens/s": speed, "made": made}


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
    assert (bf16["change"], bf16["validation loss"], bf16["by recipe"]) == (None, "1.5000 ± 0.7071", "3.5000 ± 0.7071")
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


def chats_of(count: int) -> list:
    def turns(i: int) -> list:
        question, answer = {"role": "user", "content": f"Who is {i}?"}, {"role": "assistant", "content": f"name{i}end"}
        return [question, answer]

    return [turns(i) for i in range(count)]


def test_no_prompt_is_in_two_parts():
    chats = chats_of(200)
    again = [[{"role": "user", "content": " who  is 199? "}, chats[0][1]], [chats[3][0], chats[1][1]]]  # of known prompts
    parts = split.split([*again, *chats], 40)
    assert parts.held_out == chats[-40:]
    digests = [set(map(split.digest, part)) for part in (parts.train, parts.held_out, parts.reserved)]
    assert not digests[0] & digests[1] and not digests[0] & digests[2] and not digests[1] & digests[2]
    assert len(parts.train) + len(parts.reserved) == 161 and again[0] not in parts.train + parts.reserved
    assert (again[1] in parts.reserved) == (chats[3] in parts.reserved) and again[1] in parts.reserved + parts.train
    assert 10 < len(parts.reserved) < 30  # an eighth
    other = split.split([*reversed(chats[:-40]), *chats[-40:]], 40)
    assert sorted(map(str, other.reserved)) == sorted(str(c) for c in parts.reserved if c not in again), "of its prompt alone"
    assert parts.described()["held out"] == 40 and parts.described()["train"] == len(parts.train)
    with pytest.raises(AssertionError, match="a prompt is in two parts"):
        split.check_disjoint([chats[:2], chats[1:3]])
    for count, held_out, why in ((5, 5, "cannot be held out"), (5, 0, "cannot be held out"), (2, 1, "none is left to ")):
        with pytest.raises(SystemExit, match=why):
            split.split(chats_of(count), held_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    save_small_model(path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "model")
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(path / "model")
    lines = [json.dumps({"messages": chat}) for chat in chats_of(60)]
    (path / "chats.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("final", [False, True])
def test_training_never_sees_what_is_evaluated(folder, monkeypatch, final):
    options = ["--smoke", "--data", str(folder / "chats.jsonl"), "--model", str(folder / "model"), "--dtype", "float32"]
    monkeypatch.setattr(study, "draw", lambda *_: None)
    read: dict[str, list[str]] = {"trained": [], "answered": []}
    made = []

    def batches(examples, *args, **kwargs):
        for rows in study_batches(examples, *args, **kwargs):
            read["trained"] += text_of(rows)
            yield rows

    def text_of(rows):
        return [made[0].tokenizer.decode(row) for row in rows["input_ids"]]

    def answers(model, tokenizer, chats, *args):
        read["answered"] += [chat[-1]["content"] for chat in chats]
        return study_answers(model, tokenizer, chats, *args)

    class Noted(study.Study):
        def __init__(self, args):
            made.append(self)
            super().__init__(args)

    study_batches, study_answers = study.batches, study.answers
    for name, value in {"batches": batches, "answers": answers, "Study": Noted}.items():
        monkeypatch.setattr(study, name, value)
    recipe = "halo1-int8" + contenders.BALANCED
    monkeypatch.setattr(study, "queue", lambda *_: [] if final else [("as shipped", recipe, 0)])
    argv = [*options, "--no-compile", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["bench/study.py", *argv, *(["--final", "0.9"] if final else [])])
    study.main()

    parts = made[0].parts
    evaluated = parts.reserved[:3] if final else parts.held_out
    assert len(parts.train) > 40 and len(evaluated) == 3
    kept_apart = [chat[-1]["content"] for chat in parts.held_out + parts.reserved]
    if not final:
        assert len(read["trained"]) >= 3 * 2  # of the cosine, the balance and the steps
    assert not [answer for answer in kept_apart for text in read["trained"] if answer in text]
    assert set(read["answered"]) == {chat[-1]["content"] for chat in evaluated}
    validated = " ".join(text_of(made[0].valid_rows))
    assert all(chat[-1]["content"] in validated for chat in evaluated)
    assert not [chat for chat in parts.train if chat[-1]["content"] in validated]

    record = json.loads((folder / f"study{'_final_0.9' if final else ''}.json").read_text())
    assert record["parts"] == parts.described() and record["settings"]["final"] == ("0.9" if final else None)
    assert ("release 0.9 on the reserved part" in record["title"]) == final
    assert f"answers to 3 {'reserved' if final else 'held-out'} prompts" in record["notes"]
    assert {run["recipe"] for run in record["runs"]} == ({"untrained"} if final else {"untrained", recipe})


def test_chats_of_the_hub_end_with_the_held_out_ones(monkeypatch):
    chats = chats_of(3000)
    monkeypatch.setattr(study, "load_chats", lambda name, limit: (chats[:limit], chats[2000 : 2000 + limit]))
    assert study.chats_of("sql", 100) == chats[:800] + chats[2000:2100]


def test_the_reserved_part_is_for_one_commit_of_a_release(folder, monkeypatch, capsys):
    options = ["--data", str(folder / "chats.jsonl"), "--final", "1.0"]
    for commit, said in ((None, "unknown"), ("abc-dirty", "abc-dirty")):
        monkeypatch.setattr(study.results, "commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit):
            study.parse_args(options)
        assert f"this is {said}: commit first" in capsys.readouterr().err
    monkeypatch.setattr(study.results, "commit", lambda: "abc")
    args = study.parse_args(options)
    assert (args.commit, args.name) == ("abc", "study_final_1.0")
    path = folder / f"{args.name}.json"
    write(path, [], **{name: getattr(args, name) for name in study.SETTINGS})
    monkeypatch.setattr(study.results, "commit", lambda: "def")
    monkeypatch.setattr(sys, "argv", ["bench/study.py", *options, "--folder", str(folder)])
    with pytest.raises(SystemExit, match="study_final_1.0.json has other settings"):
        study.main()


def test_what_a_run_measures(folder, monkeypatch):
    """On bf16, so that every figure has a twin that is computed otherwise."""
    options = ["--smoke", "--data", str(folder / "chats.jsonl"), "--model", str(folder / "model"), "--dtype", "float32"]
    args = study.parse_args([*options, "--no-compile"])
    args.steps = 3
    made = study.Study(args)
    rows = made.valid_rows = {name: values[:1].repeat(3, 1) for name, values in made.valid_rows.items()}  # 1½ batches
    learnt = (rows["labels"][2] != -100).nonzero().flatten()
    rows["labels"][2, learnt[1:]] = -100  # of which the last has one token to learn
    plain = "as shipped"
    model = made.model("bf16", 0)
    model.load_state_dict(made.states[plain])
    assert made.cosine(plain, model) == pytest.approx(1, abs=1e-6)
    other = {name: torch.randn_like(p) * 0.02 + 2 * made.exact[plain][name] for name, p in made.exact[plain].items()}
    monkeypatch.setattr(made, "gradient", lambda model: other)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (other, made.exact[plain])]
    assert made.cosine(plain, model) == pytest.approx(torch.cosine_similarity(*flat, dim=0).item(), abs=1e-3)
    assert 0.01 < made.cosine(plain, model) < 0.99
    monkeypatch.undo()

    expected = study.mean_loss(model, made.valid_rows, 1)
    assert made.loss_by_recipe(model) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(study, "_elapsed", lambda a, b: 0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fitted = made.fit(model, 0)
    assert fitted["tokens/s"] == args.batch * args.length / 0.25
    moved = [(p - before[name]).abs().max().item() for name, p in model.named_parameters()]
    assert all(0 < m < 4 * args.lr for m in moved), "AdamW moves by at most the learning rate in a step"
    assert made.loss_by_recipe(model) != pytest.approx(expected, rel=1e-6)
    evaluated = made.evaluate(model.state_dict())
    assert evaluated["validation"] == pytest.approx(made.loss_by_recipe(model), rel=1e-5), "of the weights that were trained"
    monkeypatch.setattr(made, "fit", lambda model, seed: {"trained": study.mean_loss(model, made.valid_rows, 1)})
    again = made.run(plain, "bf16", 1)
    assert again["trained"] == pytest.approx(expected, rel=1e-5), "every run begins with the shipped weights"


def test_speeds_of_the_study_are_against_the_same_seed():
    speeds = {("bf16", 0): 100.0, ("bf16", 1): 200.0, ("halo1-int8", 0): 50.0, ("halo1-int8", 1): 50.0}
    bf16, halo = study_results.table([made_up(recipe, seed, 1.0, speed) for (recipe, seed), speed in speeds.items()])
    assert (bf16["× bf16"], halo["× bf16"], halo["tokens/s"]) == ("1.00", "0.38", 50)  # the median of ½ and ¼
