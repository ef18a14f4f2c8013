"""examples/hosts/: each runs on a tiny model, and trains, resumes and shares work as docs/hosts.md says."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from tests.helpers.ranks import on_ranks
from tests.helpers.recording import OpLog
from tests.helpers.served import assert_servable

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file

from halo_tensor.transformers import HaloCallback

EXAMPLES = Path(__file__).parents[2] / "examples" / "hosts"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from tests.helpers.trainers import save_chat_model

    return str(save_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=[False, True], ids=["ddp", "fsdp2"])
def fsdp(request) -> bool:
    return request.param


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_is_short(path):
    if path.is_file():
        assert len(path.read_text().splitlines()) < 60


def test_trainer(folder, tmp_path):
    main, losses = example("with_trainer").main, lambda t: [e["loss"] for e in t.state.log_history if "loss" in e]
    words = ["--model", folder, "--output_dir", str(tmp_path), "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
    words += [
        "--length",
        "32",
        "--per_device_train_batch_size",
        "2",
        "--report_to",
        "none",
        "--use_cpu",
        "--disable_tqdm",
        "True",
    ]
    words += ["--halo", "int8", "--halo_balance", "1", "--learning_rate", "2e-3"]
    with OpLog() as log:
        whole = main(words)
    assert log.products().count(torch.int8) == (4 * 3 + 1) * 14
    resumed = main([*words, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])
    assert losses(resumed) == losses(whole) and losses(whole)[-1] < losses(whole)[0]
    assert_servable(whole.model, tmp_path / "served")


#: Rows of data and options of each method of with_trl.py.
METHODS = {
    "sft": ({"prompt": "t{}?", "completion": " {} rows"}, []),
    "dpo": ({"prompt": "t{}?", "chosen": " {} rows", "rejected": " none"}, []),
    "grpo": ({"prompt": "t{}?"}, ["--num_generations", "2", "--max_completion_length", "4", "--beta", "0.1"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_trl(method, folder, tmp_path):
    pytest.importorskip("trl")
    row, options = METHODS[method]
    rows = [{key: text.format(i % 7) for key, text in row.items()} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [method, "--model", folder, "--data", f"{tmp_path}/rows.jsonl", "--output_dir", f"{tmp_path}/out", *options]
    words += ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
    words += ["--report_to", "none", "--use_cpu"]
    words += ["--disable_tqdm", "True", "--bf16", "False", "--halo", "int8"]
    with OpLog() as log:
        trained = example("with_trl").main(words)
    assert log.products().count(torch.int8) >= 2 * 14 * (3 if method == "sft" else 4)
    if method != "sft":
        assert sum(isinstance(p, HaloWeight) for p in trained.ref_model.parameters()) == 14
    assert_servable(trained.model, tmp_path / "served")
    resumed = example("with_trl").main([*words, "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1"])
    for (name, p), q in zip(trained.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def forget_accelerate() -> None:
    """Make accelerate forget the plugins of an earlier Accelerator in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]


def accelerate_losses(*words: str) -> list[float]:
    forget_accelerate()
    torch.manual_seed(0)
    return example("with_accelerate").main(list(words))


def of_torchrun(world: int) -> None:
    """Set the environment of a rank as torchrun does; accelerate reads it."""
    values = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in values.items()}, MASTER_PORT="29500", ACCELERATE_USE_CPU="1")


@on_ranks(2)
def test_the_trainer_balances_alike_on_all_ranks(world, folder, tmp_path, fsdp):
    of_torchrun(world)
    forget_accelerate()
    words = ["--model", folder, "--output_dir", str(tmp_path), "--max_steps", "3", "--logging_steps", "1", "--length", "32"]
    words += ["--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]
    words += ["--save_strategy", "no", "--halo", "int8", "--halo_balance", "1", "--learning_rate", "2e-3"]
    if fsdp:
        words += [
            "--fsdp",
            "full_shard auto_wrap",
            "--fsdp_config",
            '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}',
        ]
    with OpLog() as log:
        trainer = example("with_trainer").main(words)
    assert log.products().count(torch.int8) == (3 * 3 + 1) * 14
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, HaloCallback))
    every = [None] * world
    dist.all_gather_object(every, {name: exponents.tolist() for name, exponents in callback.balance.items()})
    assert len(every[0]) == 14 and every[0] == every[1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@on_ranks(2)
def test_accelerate(world, folder, tmp_path, fsdp):
    """It accumulates micro-batches, FSDP2 trains as DDP does, and from a saved state both go on exactly."""
    of_torchrun(world)
    words = ["--model", folder, "--accumulate", "2", "--steps", "4"] + ["--fsdp"] * fsdp
    with OpLog() as log:
        whole = accelerate_losses(*words, "--save", f"{tmp_path}/state")
    assert log.products().count(torch.int8) == 4 * 2 * 3 * 14
    assert accelerate_losses(*words, "--resume", f"{tmp_path}/state") == whole[2:]
    assert whole[-1] < whole[0]
    if fsdp:
        assert accelerate_losses(*words[:-1]) == pytest.approx(whole, rel=1e-4), "as DDP does"


@on_ranks(2)
def test_ddp_of_a_compiled_hugging_face_model(world, folder, tmp_path):
    """Dynamo's DDPOptimizer splits the graph at buckets of gradients; the ranks train as one process that sees all data."""
    from transformers import AutoModelForCausalLM

    words = ["--model", folder, "--backend", "aot_eager", "--bucket", "1", "--steps", "3"]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ddp, losses = example("with_ddp").main(words)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    every = [None] * world
    dist.all_gather_object(every, losses)
    if dist.get_rank():
        return
    assert_servable(ddp.module, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(model, halo_config(1, "int8"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generators = [torch.Generator().manual_seed(rank) for rank in range(world)]
    for step in range(3):
        for rank, generator in enumerate(generators):
            ids = torch.randint(100, (2, 32), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / world).backward()
            assert every[rank][step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


@on_ranks(2)
def test_fsdp2(world, folder, tmp_path):
    """Two ranks train as DDP does; the gathered model is exported by the first one."""
    module = example("with_fsdp2")
    with OpLog() as log:
        losses = module.main(["--model", folder, "--steps", "3", "--export", f"{tmp_path}/served"])
    assert log.products().count(torch.int8) == 3 * 3 * 14
    _, expected = example("with_ddp").main(["--model", folder, "--backend", "eager", "--steps", "3"])
    assert losses == pytest.approx(expected, rel=1e-4)
    if dist.get_rank() == 0:
        state = load_file(tmp_path / "served" / "model.safetensors")
        assert sum(codes.dtype == torch.int8 for codes in state.values()) == 14
        assert sum(name.endswith("H128_seed0_input.weight") for name in state) == 14


@on_ranks(2)
def test_pipeline(world):
    """Each rank has half of the layers; together they train as one process."""
    module = example("with_pipeline")
    with OpLog() as log:
        part, losses = module.main(["--microbatches", "4", "--steps", "3"])
    assert log.products().count(torch.int8) >= 3 * 4 * 4 * 3, "steps, microbatches, layers, products"
    whole = nn.Sequential(*module.layers(4))
    quantize_(whole, halo_config(1, "int8"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    generator, expected = torch.Generator().manual_seed(1), []
    for _ in range(3):
        x, target = torch.randn(2, 64, module.WIDTH, generator=generator)
        each = [nn.functional.mse_loss(whole(a), b) for a, b in zip(x.chunk(4), target.chunk(4), strict=True)]
        for loss in each:
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(sum(loss.item() for loss in each) / 4)
    own = whole[dist.get_rank() * 2 : dist.get_rank() * 2 + 2]
    for (name, p), q in zip(part.named_parameters(), own.parameters(), strict=True):
        assert (p - q).norm() < 1e-3 * q.norm(), name
    if dist.get_rank() == world - 1:
        assert losses == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A Llama whose halves have whole blocks of the rotation."""
    from tests.helpers.small_models import llama

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    llama(hidden_size=256, intermediate_size=512, tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


@on_ranks(2, 4)
def test_tensor_parallelism(world, wide):
    """With two ranks, and on a mesh of 2 × 2 with FSDP2, a Llama trains as in one process that sees all data."""
    from transformers import AutoModelForCausalLM

    with OpLog() as log:
        losses = example("with_tensor_parallel").main(["--model", wide, "--dp", str(world // 2), "--steps", "3"])
    assert log.products().count(torch.int8) == 3 * 3 * 14
    every = [None] * world
    dist.all_gather_object(every, losses)
    assert all(each == every[rank // 2 * 2] for rank, each in enumerate(every)), "as the other ranks of its tp group"
    if dist.get_rank():
        return
    model = AutoModelForCausalLM.from_pretrained(wide)
    quantize_(model, halo_config(1, "int8"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        for replica in range(world // 2):
            torch.manual_seed(1000 * step + replica)
            ids = torch.randint(100, (2, 32))
            loss = model(input_ids=ids, labels=ids).loss
            (loss / (world // 2)).backward()
            assert every[2 * replica][step] == pytest.approx(loss.item(), rel=2e-3)
        optimizer.step()
        optimizer.zero_grad()
