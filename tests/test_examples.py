"""examples/finetune.py and what it is made of: data, packing, scores, exact resuming, adapters and FSDP."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import data  # noqa: E402
import evaluation  # noqa: E402
import finetune  # noqa: E402

from halo_tensor import HaloWeight, balance_  # noqa: E402
from tests.test_finetune import save_small_model  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(i: int) -> list[dict]:
    return [
        {"role": "user", "content": f"How many rows has table t{i % 7}?"},
        {"role": "assistant", "content": f"SELECT COUNT(*) FROM t{i % 7}"},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer that has a chat template, and chats."""
    folder = tmp_path_factory.mktemp("examples")
    save_small_model(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"eos_token": "~", "pad_token": "~"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat(i)}) for i in range(200)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def options(folder: Path, output: Path, *more: str) -> list[str]:
    steps = ["--steps", "4", "--warmup", "1", "--batch", "2", "--length", "128", "--micro", "1", "--lr", "2e-3"]
    paths = ["--model", str(folder / "model"), "--dataset", str(folder / "chats.jsonl"), "--output", str(output)]
    return [*paths, *steps, "--metric", "sql", "--answers", "2", *more]


def run(monkeypatch, folder: Path, output: Path, *more: str) -> tuple[list[float], dict]:
    """Losses and the result of a run in this process."""
    monkeypatch.setitem(evaluation.EXACT, "sql", (evaluation.sql, 8))
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options(folder, output, *more)])
    finetune.main()
    return read(output)


def read(output: Path) -> tuple[list[float], dict]:
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    return losses, json.loads((output / "result.json").read_text())


def test_only_what_the_assistant_says_is_learnt(tokenizer):
    turns = [*chat(1), {"role": "user", "content": "And t2?"}, {"role": "assistant", "content": "SELECT 2"}]
    ids, labels = data.encode(tokenizer, turns)
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != data.IGNORED]
    assert tokenizer.decode(learnt) == "SELECT COUNT(*) FROM t1\nSELECT 2\n"
    assert tokenizer.decode(ids) == data.render(tokenizer, turns)
    assert all(label in (i, data.IGNORED) for i, label in zip(ids, labels, strict=True))


def test_a_tokenizer_without_a_template_gets_one(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    ids, _ = data.encode(bare, chat(1))
    assert bare.decode(ids) == "user:\nHow many rows has table t1?~\nassistant:\nSELECT COUNT(*) FROM t1~\n"
    bare.eos_token = None
    assert data.prompt_of(bare, chat(1)) == "user:\nHow many rows has table t1?\nassistant:\n"


def test_packing_changes_no_loss(folder, tokenizer):
    examples = [data.encode(tokenizer, chat(i)) for i in range(9)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    packed = data.pack(examples, 128, 0)
    assert len(packed["labels"]) < 9 and all(values.shape[1] == 128 for values in packed.values())
    alone = [evaluation.mean_loss(model, data.pack([example], len(example[0]), 0), 1) for example in examples]
    counts = [sum(label != data.IGNORED for label in labels) for _, labels in examples]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert evaluation.mean_loss(model, packed, 2) == pytest.approx(expected, rel=1e-5)


def test_rows_hold_examples_whole_and_once():
    examples = [([i] * (1 + i % 50), [i] * (1 + i % 50)) for i in range(1, 200)]
    rows = data.pack(examples, 64, 0)
    ids = rows["input_ids"][rows["labels"] != data.IGNORED]
    assert sorted(ids.tolist()) == sorted(i for example, _ in examples for i in example)
    starts = (rows["position_ids"] == 0) & (rows["labels"] != data.IGNORED)
    assert starts.sum() == len(examples)
    assert len(rows["labels"]) < 1.25 * len(ids) / 64


def test_batches_can_start_anywhere(tokenizer):
    examples = [data.encode(tokenizer, chat(i)) for i in range(50)]
    stream = data.batches(examples, 2, 128, 0, seed=3)
    epochs = [next(stream) for _ in range(40)]
    later = data.batches(examples, 2, 128, 0, seed=3, start=33)
    for expected, actual in zip(epochs[33:], later, strict=False):
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    other = next(data.batches(examples, 2, 128, 0, seed=4))
    assert not torch.equal(other["input_ids"], epochs[0]["input_ids"])


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        (evaluation.sql, ['SELECT  a FROM t WHERE b = "x";', "select a from t\nwhere b = 'x'"], "SELECT a FROM t"),
        (evaluation.number, ["so 3*4\n#### 1,200", "#### 1200.0 apples"], "1200"),
        (evaluation.number, ["#### 1,234,567", "1234567.0 #### 1234567"], "#### 1234568"),
        (
            evaluation.meaning,
            ["inform(name[Portal], year[2007])", "inform( year[2007],name[portal] )"],
            "inform(name[Portal])",
        ),
    ],
)
def test_scores(key, same, other):
    assert key(same[0]) == key(same[1]) is not None
    assert key(other) != key(same[0])
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": same[0]}]] * 2
    assert evaluation.exact_match([same[1], other], chats, key) == 0.5
    assert evaluation.exact_match(["nonsense", ""], chats, key) == 0


def test_a_resumed_run_is_the_run_it_resumes(folder, tmp_path, monkeypatch):
    whole, result = run(monkeypatch, folder, tmp_path / "a", "--save-every", "2")
    assert len(whole) == 4 and whole[-1] < whole[0]
    assert result["validation loss"] < whole[0] and result["answers"] == 2
    resumed, again = run(monkeypatch, folder, tmp_path / "a", "--resume", str(tmp_path / "a" / "step-2"))
    assert resumed == whole
    assert again["validation loss"] == result["validation loss"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert not any("halo" in type(p).__module__ for p in plain.parameters())
    # Micro-batches and recomputing activations change rounding at most.
    other, _ = run(monkeypatch, folder, tmp_path / "b", "--micro", "2", "--checkpointing")
    assert other == pytest.approx(whole, rel=5e-3)


def test_adapters(folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    whole, result = run(monkeypatch, folder, tmp_path, "--lora", "4", "--save-every", "2", "--dtype", "fp8", "--level", "0")
    assert whole[-1] < whole[0] and result["validation loss"] < whole[0]
    more = ("--lora", "4", "--dtype", "fp8", "--level", "0", "--resume", str(tmp_path / "step-2"))
    resumed, _ = run(monkeypatch, folder, tmp_path, *more)
    assert resumed == whole
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_balanced_run_resumes_with_the_balance_of_the_pretrained_weights(folder, tmp_path, monkeypatch):
    gains = []

    def recorded(model, *args, **kwargs):
        count = balance_(model, *args, **kwargs)
        gains.append([m.weight.gain.clone() for m in model.modules() if isinstance(getattr(m, "weight", None), HaloWeight)])
        return count

    monkeypatch.setattr(finetune, "balance_", recorded)
    more = ("--balance", "--level", "1", "--lr", "2e-2")  # weights that move far would be balanced differently
    whole, result = run(monkeypatch, folder, tmp_path / "a", *more, "--save-every", "2")
    resumed, again = run(monkeypatch, folder, tmp_path / "a", *more, "--resume", str(tmp_path / "a" / "step-2"))
    assert resumed == whole and again["validation loss"] == result["validation loss"]
    assert len(gains) == 2 and len(gains[0]) == 14 and any(g.max() > g.min() for g in gains[0])
    assert all(torch.equal(a, b) for a, b in zip(*gains, strict=True))


def test_adapters_of_a_balanced_base(folder, tmp_path, monkeypatch, tokenizer):
    """The base is rounded once, with its gains, and a run resumes."""
    pytest.importorskip("peft")
    more = ("--balance", "--lora", "4", "--save-every", "2")
    whole, _ = run(monkeypatch, folder, tmp_path, *more)
    resumed, _ = run(monkeypatch, folder, tmp_path, *more, "--resume", str(tmp_path / "step-2"))
    assert resumed == whole and whole[-1] < whole[0]

    monkeypatch.setattr(sys, "argv", ["finetune.py", *options(folder, tmp_path, *more)])
    args = finetune.parse_args()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").to(args.device)
    examples = [data.encode(tokenizer, chat(i)) for i in range(50)]
    adapted = finetune.prepare(copy.deepcopy(plain), examples, 0, args)
    bases = {name: m.weight for name, m in adapted.named_modules() if name.endswith("base_layer")}
    assert len(bases) == 14
    for name, weight in bases.items():
        dense = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer")).weight
        once = HaloWeight.from_hp(dense.detach(), weight.recipe, frozen=True, gains=weight.gains)
        assert weight.master is None and torch.equal(weight.codes, once.codes) and torch.equal(weight.scale, once.scale)


def test_two_ranks_train_as_one(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of which there may be one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    losses, result = run(monkeypatch, folder, tmp_path / "one", "--balance")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *torchrun,
        str(EXAMPLES / "finetune.py"),
        *options(folder, tmp_path / "two", "--balance", "--save-every", "4", "--answers", "0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    sharded, their_result = read(tmp_path / "two")
    assert sharded == pytest.approx(losses, rel=5e-3)
    assert their_result["validation loss"] == pytest.approx(result["validation loss"], rel=5e-3)
    # What two ranks saved, one resumes: there is nothing left to do, so it only reports.
    (tmp_path / "two" / "result.json").unlink()
    _, again = run(monkeypatch, folder, tmp_path / "two", "--balance", "--resume", str(tmp_path / "two" / "step-4"))
    assert again["validation loss"] == pytest.approx(their_result["validation loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "nowhere.jsonl"], "there is no file 'nowhere.jsonl': pass one of sql, viggo, gsm8k"),
        (["--level", "7"], "level must be one of 0, 1, 2"),
        (["--balance", "--dtype", "bf16"], "--dtype bf16 rounds neither: leave one of them out"),
        (["--length", "16"], "no answer of 179 chats begins within 16 tokens: pass a larger --length"),
        (["--resume", "nowhere/step-2"], "there is no checkpoint nowhere/step-2: pass a folder step-N that --save-every"),
        (["--batch", "0"], "2"),  # argparse's, which prints why
    ],
)
def test_one_sentence_says_what_is_wrong(folder, tmp_path, monkeypatch, more, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, tmp_path, *more)


def test_lines_that_are_no_json(tmp_path):
    path = tmp_path / "chats.jsonl"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(SystemExit, match="every line of .* must be a JSON object with messages"):
            data.read_chats(str(path))


def test_lines_end_at_line_ends_only(tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "é"}]
    path.write_text(json.dumps({"messages": chat}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.read_chats(str(path)) == [chat]
    with pytest.raises(SystemExit, match="has one chat"):
        data.load_chats(str(path))


def test_what_is_cut_before_its_answer_is_left_out():
    cut, kept = ([1] * 20, [data.IGNORED] * 16 + [1] * 4), ([1] * 8, [data.IGNORED] * 4 + [1] * 4)
    assert data.learnable([cut, kept], 16) == [kept]


def test_a_checkpoint_of_other_options(folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    run(monkeypatch, folder, tmp_path, "--save-every", "4")
    with pytest.raises(SystemExit, match="is of another model, or of other options than these"):
        run(monkeypatch, folder, tmp_path, "--lora", "4", "--resume", str(tmp_path / "step-4"))


def test_dropout_is_resumed_too(folder, tmp_path, monkeypatch):
    def dropping(*args):
        model, tokenizer = load_model(*args)
        model.config.attention_dropout = 0.2
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        return model, tokenizer

    load_model = finetune.load_model
    monkeypatch.setattr(finetune, "load_model", dropping)
    whole, _ = run(monkeypatch, folder, tmp_path, "--save-every", "2")
    resumed, _ = run(monkeypatch, folder, tmp_path, "--resume", str(tmp_path / "step-2"))
    other, _ = run(monkeypatch, folder, tmp_path / "other", "--seed", "1")
    assert resumed == whole != other


def test_without_the_hub_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"cannot load b-mc2/sql-create-context.*pip install datasets.*\.jsonl"):
        data.load_chats("sql")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sql", {"question": "How many?", "context": "CREATE TABLE t (a INTEGER)", "answer": "SELECT COUNT(*) FROM t"}),
        ("viggo", {"target": "Portal is good.", "meaning_representation": "give_opinion(name[Portal], rating[good])"}),
        ("gsm8k", {"question": "What is 6 × 7?", "answer": "6 × 7 = <<6*7=42>>42\n#### 42"}),
    ],
)
def test_rows_of_the_hub_become_chats_that_can_be_scored(name, row, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list([row] * 3))
    train, valid = data.load_chats(name, limit=2)
    assert len(train) == len(valid) == 2 and [message["role"] for message in train[0]] == ["user", "assistant"]
    assert all(row[column] in train[0][0]["content"] for column in row if column not in ("answer", "meaning_representation"))
    key, _ = evaluation.EXACT[name]
    assert evaluation.exact_match([train[0][1]["content"]] * 2, valid, key) == 1
    assert any(label != data.IGNORED for label in data.encode(tokenizer, train[0])[1])
