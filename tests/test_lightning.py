"""HaloPrecision in Lightning's Trainer and in Fabric."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from halo_tensor import HaloWeight, halo_config, quantize_
from tests.helpers.recording import OpLog
from tests.helpers.training import make

pytest.importorskip("lightning", reason="lightning is not installed")
import lightning

from halo_tensor.lightning import HaloPrecision

EXAMPLE = Path(__file__).parents[1] / "examples" / "hosts" / "with_lightning.py"


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make(converted=False)
        self.losses = []

    def training_step(self, batch):
        loss = nn.functional.mse_loss(self.model(batch), batch.roll(1, 1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


ROWS = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
OPTIONS = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(folder, plugin, steps: int = 4, resume=None) -> Module:
    module = Module()
    callback = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_top_k=-1)
    trainer = lightning.Trainer(max_steps=steps, plugins=plugin, callbacks=[callback], gradient_clip_val=1.0, **OPTIONS)
    trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=64), ckpt_path=resume)
    return module


def test_the_trainer_trains_and_resumes(tmp_path):
    plugin = HaloPrecision(level=1, dtype="int8")
    with OpLog() as log:
        whole = fit(tmp_path, plugin)
    assert log.products().count(torch.int8) == 4 * 4 * 3
    assert len(plugin.conversion.converted) == 4 and whole.losses[-1] < whole.losses[0]
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=False)
    assert not any(isinstance(value, HaloWeight) for value in checkpoint["state_dict"].values()), "checkpoints are plain"
    resumed = fit(tmp_path / "resumed", HaloPrecision("int8"), resume=tmp_path / "step=2.ckpt")
    assert resumed.losses == whole.losses[2:]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_example(tmp_path):
    """examples/hosts/with_lightning.py: a language model is trained, resumed and exported for a server."""
    pytest.importorskip("transformers")
    from tests.helpers.served import assert_servable
    from tests.helpers.small_models import save_small_model

    save_small_model(tmp_path / "model")
    script = runpy.run_path(str(EXAMPLE))
    words = ["--model", f"{tmp_path}/model", "--steps", "2", "--folder", f"{tmp_path}/out"]
    with OpLog() as log:
        whole = script["main"](words)
    assert log.products().count(torch.int8) == 2 * 3 * 14
    assert_servable(whole.lightning_module.model, tmp_path / "served")
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    resumed = script["main"]([*words[:2], "--steps", "4", "--folder", f"{tmp_path}/resumed", "--resume", str(checkpoint)])
    assert resumed.global_step == 4


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_rest_of_the_model_has_its_own_precision(tmp_path, precision):
    with OpLog() as log:
        module = fit(tmp_path, HaloPrecision("int8", precision=precision), steps=1)
    assert torch.int8 in log.products()
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}


def test_fabric_trains_as_a_plain_loop_does():
    def losses(model, optimizer, backward) -> list[float]:
        found = []
        for _ in range(3):
            loss = nn.functional.mse_loss(model(ROWS), ROWS.roll(1, 1))
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            found.append(loss.item())
        return found

    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=HaloPrecision("int8"))
    model = fabric.setup_module(make(converted=False))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
    plain = make(converted=False)
    quantize_(plain, halo_config(1, "int8"))
    expected = losses(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), lambda loss: loss.backward())
    assert losses(model, optimizer, fabric.backward) == expected


def test_what_would_not_train_is_refused():
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=HaloPrecision("int8"))
    model = make(converted=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="an AdamW holds the old ones"):
        fabric.setup(model, optimizer)
    with pytest.raises(ValueError, match="no layer of this Linear was converted"):
        fabric.setup_module(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="precision must be one of 32-true, bf16-true, bf16-mixed; got '16-mixed'"):
        HaloPrecision("int8", precision="16-mixed")
    with pytest.raises(ValueError, match="HaloPrecision sees no batch: call balance_"):
        HaloPrecision("int8", balance=1)
    with pytest.raises(ValueError, match="halo has no key 'lvel'"):
        HaloPrecision(lvel=1)
