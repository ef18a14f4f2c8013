"""examples/finetune.py and what it is made of: data, packing, scores, exact resuming, adapters and FSDP."""

import copy
import errno
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import checkpoints  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import evaluation  # noqa: E402
import finetune  # noqa: E402
import memory_modes  # noqa: E402
import vit  # noqa: E402

from halo_tensor import HaloWeight, balance_  # noqa: E402
from tests.helpers.small_models import save_small_model  # noqa: E402

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
    # As if it had been stopped within step 3, its log cut, and a later checkpoint half written.
    shutil.rmtree(tmp_path / "a" / "step-4")
    (tmp_path / "a" / ".step-4.partial").mkdir()
    log = tmp_path / "a" / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3])[:-20])
    resumed, again = run(monkeypatch, folder, tmp_path / "a", "--resume", str(tmp_path / "a"), "--save-every", "4")
    assert resumed == whole
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == [".lock", "log.jsonl", "model", "result.json", "run.json", "step-2", "step-4"]
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
    assert not list((tmp_path / "two").glob(".*.partial")) and len(list((tmp_path / "two" / "step-4").glob("*.distcp"))) == 2
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
    ],
)
def test_one_sentence_says_what_is_wrong(folder, tmp_path, monkeypatch, more, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, tmp_path, *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch", "0"], "argument --batch: must be a whole number, at least 1; got '0'"),
        (["--lora", "0"], "argument --lora: must be a whole number, at least 1; got '0'"),
        (["--limit", "-5"], "argument --limit: must be a whole number, at least 1; got '-5'"),
        (["--steps", "2.5"], "argument --steps: must be a whole number, at least 0; got '2.5'"),
        (["--seed", str(2**63)], f"argument --seed: must be a whole number, at least 0; got '{2**63}'"),
        (["--save-every", "-2"], "argument --save-every: must be a whole number, at least 1; got '-2'"),
        (["--lr", "nan"], "argument --lr: must be a finite number, more than 0; got 'nan'"),
        (["--lr", "0"], "argument --lr: must be a finite number, more than 0; got '0'"),
        (["--weight-decay", "inf"], "argument --weight-decay: must be a finite number, at least 0; got 'inf'"),
        (["--output", "{file}"], "argument --output: {file} is no folder that can be written to"),
        (["--output", "{file}/below"], "argument --output: {file} is no folder that can be written to"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys, more, message):
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(finetune, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, folder, tmp_path, *(option.format(file=path) for option in more))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message.format(file=path))


def test_numbers_at_their_bounds_are_options(folder, tmp_path, monkeypatch):
    more = ["--warmup", "0", "--seed", str(2**63 - 1), "--weight-decay", "0", "--lr", "1e-9", "--lora", "1", "--answers", "0"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options(folder, tmp_path, *more)])
    args = finetune.parse_args()
    assert (args.warmup, args.seed, args.weight_decay, args.lr, args.lora) == (0, 2**63 - 1, 0.0, 1e-9, 1)


USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ": must be a JSON object with messages (Expecting"),
        ("[]", ": must be a JSON object with messages, not a list"),
        ("[" * 100_000, ": must be a JSON object with messages ("),
        ({}, ": messages must be a list of messages, not nothing"),
        ({"messages": []}, ": messages must be a list of messages, not []"),
        ({"messages": "hello"}, ': messages must be a list of messages, not "hello"'),
        ({"messages": ["hello"]}, ', message 1: must be an object with role and content, not "hello"'),
        ({"messages": [{"content": "?"}, ASSISTANT]}, ", message 1: role must be a name, such as user or assistant, not nothing"),
        ({"messages": [USER, {"role": 1, "content": "!"}]}, ", message 2: role must be a name, such as user or assistant, not 1"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, ", message 1: content must be a text, or a list of parts of type text, not nothing"),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, ", message 2: content must be a text, or a list of parts of type text, not nothing"),
        ({"messages": [USER, ASSISTANT | {"content": 7}]}, ", message 2: content must be a text, or a list of parts of type text, not 7"),
        ({"messages": [USER | {"content": []}, ASSISTANT]}, ", message 1: content must be a text, or a list of parts of type text, not []"),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, ASSISTANT]},
            ', message 1, part 2: only parts of type text can be learnt from, not "image_url"',
        ),
        ({"messages": [USER | {"content": ["a"]}, ASSISTANT]}, ', message 1, part 1: only parts of type text can be learnt from, not "a"'),
        ({"messages": [USER | {"content": [{"type": "text"}]}, ASSISTANT]}, ", message 1, part 1: text must be a string, not nothing"),
        ({"messages": [USER]}, ": the last message must be the assistant's, which is learnt, not the user's"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_chat_is_named_with_its_file_and_line(tmp_path, row, message):
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": chat(1)})
    path.write_text(f"{good}\n\n{row if isinstance(row, str) else json.dumps(row)}\n{good}\n")
    with pytest.raises(SystemExit) as ended:
        data.read_chats(str(path))
    assert f"{path}, line 3{message}" in ended.value.code and "\n" not in ended.value.code


def test_content_in_parts_is_its_text(tmp_path):
    """As OpenAI's format has it."""
    path = tmp_path / "chats.jsonl"
    whole = chat(1)
    start, end = ({"type": "text", "text": text} for text in (whole[0]["content"][:7], whole[0]["content"][7:]))
    parts = [{"role": "user", "content": [start, end]}, whole[1]]
    path.write_text(json.dumps({"messages": parts}))
    assert data.read_chats(str(path)) == [whole]


def test_data_that_cannot_be_read(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match="cannot read .*chats.jsonl as UTF-8"):
        data.read_chats(str(path))
    path.write_text("")
    with pytest.raises(SystemExit, match="chats.jsonl' has no chats"):
        data.read_chats(str(path))
    path.write_text(json.dumps({"text": 3}))
    with pytest.raises(SystemExit, match="chats.jsonl, line 1: must have messages, or a text that is a string"):
        common.load_tokens(tokenizer, str(path), 10)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(SystemExit, match="chat template does not take the chat 'How many.*no such role"):
        data.encode(strict, chat(1))


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


def test_a_run_is_resumed_with_its_own_options(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path, "--save-every", "1", "--steps", "1")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "chats.jsonl").write_text((folder / "chats.jsonl").read_text().replace("table t1", "table u1"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(other / "model")
    monkeypatch.setattr(finetune, "prepare", lambda *args: pytest.fail("resumed"))
    for more, message in [
        (["--level", "1"], r"\(--level: 2 there, 1 here\)"),
        (["--seed", "1", "--dtype", "fp8"], r"\(--dtype: int8 there, fp8 here; --seed: 0 there, 1 here\)"),
        (["--batch", "4"], "--batch: 2 there, 4 here"),
        (["--length", "64"], "--length: 128 there, 64 here"),
        (["--lr", "1e-3"], r"\(--lr: 0.002 there, 0.001 here\)"),
        (["--steps", "2"], r"\(--steps: 1 there, 2 here\)"),
        (["--balance"], "--balance: False there, True here; --micro: None there, 1 here"),
        (["--lora", "4"], "--lora: None there, 4 here"),
        (["--weights", "bfloat16"], "--weights: float32 there, bfloat16 here"),
        (["--limit", "100"], "--dataset and --limit: 179 chats of fingerprint .* there, 100 chats"),
        (["--dataset", str(other / "chats.jsonl")], r"\(--dataset and --limit: 179 chats .* there, 179 chats"),
        (["--model", str(other / "model")], r"\(--model: weights of fingerprint .* there, weights"),
    ]:
        with pytest.raises(SystemExit, match=f"step-1 is of a run with other options .*{message}"):
            run(monkeypatch, folder, tmp_path, "--steps", "1", *more, "--resume", str(tmp_path / "step-1"))
    # Names of files, and what decides speed and memory only, may change.
    shutil.copy(folder / "chats.jsonl", other / "same.jsonl")
    more = ["--dataset", str(other / "same.jsonl"), "--micro", "2", "--checkpointing", "--resume", str(tmp_path)]
    with pytest.raises(pytest.fail.Exception, match="resumed"):
        run(monkeypatch, folder, tmp_path, "--steps", "1", *more)
    # A new run does not begin among the checkpoints of this one.
    with pytest.raises(SystemExit, match=r"has files of another run \(step-1\): pass another --output, or continue that run"):
        run(monkeypatch, folder, tmp_path)


def trained(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def checkpoint(folder: Path, steps: int = 1, run: checkpoints.Run | None = None) -> tuple[checkpoints.Run, torch.nn.Module]:
    run = run or checkpoints.Run("mine", {"--seed": 0})
    model, optimizer = trained(steps)
    folder.mkdir(exist_ok=True)
    checkpoints.write_identity(folder, run, 0)
    assert checkpoints.save(model, optimizer, run, steps, folder / f"step-{steps}", True)
    return run, model


def restored(path: Path) -> torch.nn.Module:
    model, optimizer = trained(99)
    checkpoints.restore(model, optimizer, checkpoints.find(path))
    return model


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    run, model = checkpoint(tmp_path, 2)
    assert torch.equal(restored(tmp_path)[0].weight, model[0].weight)
    other, optimizer = trained(5)

    def failing(error):
        def finish(writer, *args, **kwargs):
            assert list(Path(writer.path).glob("*.distcp")), "the shards are written"
            raise error

        return finish

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", failing(OSError(errno.ENOSPC, "No space left on device")))
    for steps in (2, 4):
        assert not checkpoints.save(other, optimizer, run, steps, tmp_path / f"step-{steps}", True)
        out = capsys.readouterr().out
        assert f"step-{steps} was not written (OSError: [Errno 28] No space left on device); the training goes on" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "step-2"]

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(other, optimizer, run, 4, tmp_path / "step-4", True)
    assert (tmp_path / ".step-4.partial").exists(), "as a killed process leaves it"
    assert checkpoints.find(tmp_path).steps == 2
    assert torch.equal(restored(tmp_path)[0].weight, model[0].weight)

    monkeypatch.undo()
    (tmp_path / "step-2").rename(tmp_path / ".step-2.earlier")  # a process killed between two renames
    checkpoints.open_run(tmp_path, run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json", "step-2"]
    assert checkpoints.save(other, optimizer, run, 2, tmp_path / "step-2", True)
    assert torch.equal(restored(tmp_path / "step-2")[0].weight, other[0].weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "run.json", "step-2"]


def test_only_whole_checkpoints_of_the_same_run_are_candidates(tmp_path):
    options = {"--seed": 0}
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path / "elsewhere", 9, checkpoints.Run("another", options))
    shutil.move(tmp_path / "elsewhere" / "step-9", tmp_path / "step-9")
    assert checkpoints.find(tmp_path).checkpoint == tmp_path / "step-2"
    for resumed in (None, checkpoints.find(tmp_path / "step-2")):
        with pytest.raises(SystemExit, match=r"has files of another run \(.*step-9.*\): pass another --output"):
            checkpoints.begin(tmp_path, options, resumed)
    shutil.rmtree(tmp_path / "step-9")
    assert checkpoints.begin(tmp_path, options, checkpoints.find(tmp_path)).steps == 2
    # Into the folder of another run, too, even one without checkpoints.
    checkpoints.write_identity(tmp_path / "elsewhere", checkpoints.Run("another", options), 0)
    with pytest.raises(SystemExit, match=r"has files of another run \(elsewhere\)"):
        checkpoints.begin(tmp_path / "elsewhere", options, checkpoints.find(tmp_path))
    assert checkpoints.begin(tmp_path / "elsewhere", options, None).id not in ("mine", "another")
    with pytest.raises(SystemExit, match="has no checkpoint yet: start it again without --resume"):
        checkpoints.find(tmp_path / "elsewhere")
    (tmp_path / "step-2" / "run.json").write_text("{")
    with pytest.raises(SystemExit, match=r"step-2/run.json is missing or damaged"):
        checkpoints.find(tmp_path / "step-2")


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    claimed, refused = checkpoints.claimed(tmp_path / "new"), pytest.raises(SystemExit, match="another process is training")
    with claimed, refused, checkpoints.claimed(tmp_path / "new"):
        pass
    with checkpoints.claimed(tmp_path / "new"):
        pass


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["metadata", "within the metadata", "values"])
def test_no_code_of_a_checkpoint_is_run(tmp_path, place):
    checkpoint(tmp_path)
    folder, ran = tmp_path / "step-1", tmp_path / "ran"
    if place == "values":
        state = {"model": {"0.weight": Payload(ran), "0.bias": Payload(ran)}, "optimizer": {}}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    else:
        with (folder / ".metadata").open("rb") as file:
            metadata = pickle.load(file)
        metadata.planner_data = Payload(ran)
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(ran) if place == "metadata" else metadata))
        with (folder / ".metadata").open("rb") as file:
            pickle.load(file)
        ran.rmdir()  # so it would have run
    with pytest.raises(SystemExit) as ended:
        restored(folder)
    assert not ran.exists()
    assert "step-1 is damaged (" in ended.value.code and "\n" not in ended.value.code
    if place != "values":
        assert ".metadata asks for posix.mkdir, which no checkpoint needs" in ended.value.code


def test_values_that_are_no_tensors_are_not_unpickled(tmp_path):
    """Though the metadata says that there are such."""
    model, optimizer = trained()
    weights, moments = checkpoints.get_state_dict(model, optimizer, options=checkpoints.TRAINED)
    ran = tmp_path / "ran"
    state = {"model": weights | {"0.bias": Payload(ran)}, "optimizer": moments["state"]}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    dcp.load(dict(copy.deepcopy({"model": weights})), checkpoint_id=tmp_path / "step-1", no_dist=True)
    ran.rmdir()  # so it would have run
    checkpoints.write_identity(tmp_path / "step-1", checkpoints.Run("mine", {}), 1)
    with pytest.raises(SystemExit, match=r"is damaged \(UnpicklingError: model.0.bias is no tensor\)"):
        restored(tmp_path / "step-1")
    assert not ran.exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "noise", "missing"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, name, damage):
    checkpoint(tmp_path)
    file = tmp_path / "step-1" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    with pytest.raises(SystemExit) as ended:
        restored(tmp_path / "step-1")
    expected = "there is no checkpoint" if (name, damage) == (".metadata", "missing") else "step-1 is damaged ("
    assert expected in ended.value.code
    assert "\n" not in ended.value.code


def test_a_log_that_was_cut(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    line = '{"step": %d, "loss": 1.0}\n'
    path.write_text(line % 1 + line % 2 + line % 3 + (line % 4)[:15])
    log = checkpoints.Log(path, 2)
    assert "log.jsonl, line 4 was cut: it is left out" in capsys.readouterr().out
    log.write({"step": 3, "loss": 2.0})
    assert [json.loads(text)["loss"] for text in path.read_text().splitlines()] == [1.0, 1.0, 2.0]
    for middle in ("nonsense\n", "7\n", '{"loss": 1.0}\n', "\n", "\udcff\n"):
        path.write_bytes((line % 1 + middle + line % 2).encode(errors="surrogateescape"))
        with pytest.raises(SystemExit, match=r"log.jsonl, line 2 is not the entry of a step"):
            checkpoints.Log(path, 2)
    path.write_text("nonsense")
    checkpoints.Log(path, 0)  # a new run does not read it
    assert path.read_text() == ""


def test_a_full_disk_does_not_lose_the_trained_weights(folder, tmp_path, monkeypatch, capsys):
    output, spare = tmp_path / "full", tmp_path / "spare"
    spare.mkdir()
    full = OSError(errno.ENOSPC, "No space left on device")
    save_pretrained, write_whole = transformers.LlamaForCausalLM.save_pretrained, checkpoints.write_whole

    def save(model, place, **kwargs):
        (place / "model.safetensors").touch()
        if output in place.parents:
            raise full
        save_pretrained(model, place, **kwargs)

    def write(path, text):
        if path.name == "result.json":
            raise full
        write_whole(path, text)

    class Full:
        name = "log.jsonl"

        def write(self, data):
            return len(data) - 1

    def open_run(*args):
        log = opened(*args)
        log.file = Full()
        return log

    opened = checkpoints.open_run
    monkeypatch.setattr(checkpoints, "open_run", open_run)
    monkeypatch.setattr(checkpoints, "write_whole", write)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save)
    monkeypatch.setattr(finetune.tempfile, "gettempdir", lambda: str(spare))
    with pytest.raises(SystemExit, match=r"result.json was not written .*; the trained weights are in .*spare.*model"):
        run(monkeypatch, folder, output, "--steps", "2")
    out = capsys.readouterr().out
    assert out.count("log.jsonl ends before step 1 (No space left on device); the training goes on") == 1
    assert f"not written to {output / 'model'}: OSError: [Errno 28]" in out and '"validation loss"' in out
    (exported,) = spare.glob("finetune-*/model")
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (folder / "model", exported))
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    assert not (output / "model").exists() and not (output / ".model.partial").exists()

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", lambda *args, **kwargs: shutil.copy("/nowhere", "/"))
    with pytest.raises(SystemExit, match="the trained weights could not be written .*/full/model.*spare.*: make room"):
        run(monkeypatch, folder, output, "--steps", "0")


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


def test_tables_of_the_examples_are_kept_as_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vit, "load_digits", lambda: (torch.rand(80, 1, 8, 8), torch.arange(80) % 10))
    arguments = ["--models", "vit", "--recipes", "high", "hot", "--seeds", "0", "--epochs", "1", "--batch", "32"]
    arguments += ["--image-size", "16", "--output", str(tmp_path / "vit.md"), "--record", str(tmp_path / "records" / "vit")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["examples/vit.py", *arguments])
    vit.main()
    record = json.loads((tmp_path / "records" / "vit.json").read_text())
    assert [(row["model"], row["recipe"], row["layers"]) for row in record["rows"]] == [
        ("vit", "high", 12),
        ("vit", "hot", 12),
    ]
    assert (
        record["command"].startswith("python examples/vit.py --models vit --recipes high hot")
        and "torch" in record["environment"]
    )
    assert "| vit | hot |" in (tmp_path / "records" / "vit.md").read_text()

    lora = runpy.run_path(str(EXAMPLES / "lora.py"))  # another module has that name in bench
    runs = [lora["Run"](name, [2.0, 1.0], 1.5, 1.25, 0.5, 2**21, 2**20) for name in ("high", "halo1-int8")]
    common.record(tmp_path / "lora", "title", lora["rows"](runs))
    row = json.loads((tmp_path / "lora.json").read_text())["rows"][1]
    expected = {"recipe": "halo1-int8", "train loss": 1.5, "validation loss": 1.5, "merged, plain": 1.25, "s/step": 0.5}
    assert row.items() >= (expected | {"base weights, MiB": 2.0, "saved for backward, MiB": 1.0}).items()


def test_memory(capsys):
    rows = memory_modes.main(["--memory", "speed", "low", "--steps", "3", "--lr", "3e-3"])
    assert [row["memory"] for row in rows] == ["speed", "low"] and len(capsys.readouterr().out.splitlines()) == 2
    assert all(row["last loss"] < row["first loss"] for row in rows)
    assert rows[1]["predicted GiB"] < rows[0]["predicted GiB"]
