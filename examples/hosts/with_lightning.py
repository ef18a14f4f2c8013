"""Lightning: train a language model in low precision.

python examples/hosts/with_lightning.py --model HuggingFaceTB/SmolLM2-135M --steps 100
"""

import argparse

import lightning
import torch
from transformers import AutoModelForCausalLM

from halo_tensor.lightning import HaloPrecision


class LanguageModel(lightning.LightningModule):
    def __init__(self, model: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model)

    def training_step(self, batch):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def main(words: list[str] | None = None) -> lightning.Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--halo", default="int8", help="int8, fp8, fp6, a recipe, a .json of LayerConfigs, or a JSON object")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-true", "bf16-mixed"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", help="a checkpoint")
    parser.add_argument("--folder", default="outputs")
    args = parser.parse_args(words)
    module = LanguageModel(args.model)
    rows = torch.randint(100, (256, 64), generator=torch.Generator().manual_seed(0))  # put your data here
    trainer = lightning.Trainer(
        max_steps=args.steps,
        default_root_dir=args.folder,
        plugins=HaloPrecision(args.halo, precision=args.precision),
        log_every_n_steps=1,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8), ckpt_path=args.resume)
    return trainer


if __name__ == "__main__":
    main()
