"""transformers' Trainer: fine-tune a causal LM in low precision.

python examples/hosts/with_trainer.py --model HuggingFaceTB/SmolLM2-135M --output_dir out --halo int8 --halo_balance 1
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Collator

from halo_tensor.transformers import HaloArguments


@dataclass
class Script:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    text: str = field(default=__file__, metadata={"help": "a text file to train on"})
    length: int = 128


def main(words: list[str] | None = None) -> Trainer:
    script, training, halo = HfArgumentParser((Script, TrainingArguments, HaloArguments)).parse_args_into_dataclasses(words)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(script.text) as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    rows = [{"input_ids": row} for row in ids[: len(ids) // script.length * script.length].view(-1, script.length)]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(script.model),
        training,
        train_dataset=rows,
        data_collator=Collator(tokenizer, mlm=False),
        callbacks=halo.callbacks(),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()
