"""Train a small ViT and a small ResNet from scratch, in high precision and by HOT's recipes, side by side.

    python examples/vit.py                                                  # scikit-learn's digits, three seeds
    python examples/vit.py --models vit --recipes high hot hot_llm --seeds 0
    python examples/vit.py --data path/to/folder --image-size 64 --patch 8  # one folder of images per class

Recipes are "hot", "hot_lqs" (a quantiser chosen for each layer), "hot_int4" (INT4 for grad_weight too, which HOT's authors
found to fail), and any other name for ``recipe_config``. The models are transformers' own, randomly initialised. The table is
printed and written to a file.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from common import add_record_argument, fail, file, integer, number, record
from torch import nn
from tqdm import tqdm

from halo_tensor import calibrate, dequantize_, environment, hot_config, quantize_, recipe_config
from halo_tensor.analysis import measure_saved
from halo_tensor.recipe import RECIPES


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's 1797 handwritten digits: images [n, 1, 8, 8] in [0, 1], and labels [n]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fail("the default data come in scikit-learn: pip install scikit-learn, or pass --data FOLDER")
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def load_folder(path: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of ``path``/<class>/* as [n, 3, size, size] in [0, 1], and labels in the order of the folder names."""
    import numpy as np
    from PIL import Image

    classes = sorted(p for p in Path(path).glob("*") if p.is_dir())
    files = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
    if len(classes) < 2:
        fail(f"{path!r} must hold a folder of images for each of at least two classes")
    pixels = [np.array(Image.open(file).convert("RGB").resize((size, size))) for file, _ in files]
    return torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255, torch.tensor([label for _, label in files])


def make_vit(channels: int, classes: int, size: int, patch: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=size,
        patch_size=patch, num_channels=channels, num_labels=classes,
    )  # fmt: skip
    return ViTForImageClassification(config)


def make_resnet(channels: int, classes: int, size: int, patch: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=channels, embedding_size=64, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic",
        num_labels=classes,
    )  # fmt: skip
    return ResNetForImageClassification(config)


MODELS = {"vit": make_vit, "resnet": make_resnet}


def train(model: nn.Module, data: tuple, args: argparse.Namespace, title: str) -> tuple[float, float]:
    """Return the accuracy on held-out images in percent, and the median seconds of a step."""
    images, labels, test_images, test_labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, max(steps, 2), pct_start=0.1)
    times, bar = [], tqdm(total=steps, desc=title, leave=False)
    for _ in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(args.batch):
            if len(chosen) < args.batch:
                continue
            start = time.perf_counter()
            loss = F.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
            times.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(pixel_values=x).logits.argmax(1) for x in test_images.split(256)])
    return 100 * (predicted == test_labels).float().mean().item(), sorted(times)[len(times) // 2]


def config_of(recipe: str, model: nn.Module, data: tuple, batch: int):
    """Return HOT with a quantiser for each layer, chosen on four training batches, for "hot_lqs"; or else a recipe by name."""
    if recipe != "hot_lqs":
        return recipe_config(recipe, min_features=64)
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(data[0].split(batch)[:4], data[1].split(batch), strict=False)]
    return calibrate(model, batches, hot_config())


def run(name: str, recipe: str, data: tuple, args: argparse.Namespace) -> dict:
    """Return one line of the table, with means over the seeds."""
    accuracies, seconds = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = MODELS[name](data[0].shape[1], int(data[1].max()) + 1, args.image_size, args.patch).to(data[0].device)
        # In high precision, what the same layers save for backward is counted.
        report = quantize_(model, config_of("hot" if recipe == "high" else recipe, model, data, args.batch))
        if recipe == "high":
            dequantize_(model)
        with measure_saved(model, report.converted) as saved:
            model(pixel_values=data[0][: args.batch])
        torch.manual_seed(seed)
        accuracy, time = train(model, data, args, f"{name} {recipe} {seed}")
        accuracies.append(accuracy)
        seconds.append(time)
    return {
        "model": name,
        "recipe": recipe,
        "accuracy %": f"{mean(accuracies):.2f}",
        "of each seed": " ".join(f"{a:.2f}" for a in accuracies),
        "layers": len(report.converted),
        "saved by them, MiB": f"{saved.layers / 2**20:.2f}",
        "saved in all, MiB": f"{saved.total / 2**20:.2f}",
        "s/step": f"{mean(seconds):.3f}",
    }


def report(rows: list[dict], path: Path) -> None:
    """Print a Markdown table, and write it to ``path`` with the command and the environment."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    text = "\n".join(["python " + " ".join(sys.argv), "", environment().line(), "", *lines]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["high", "hot", "hot_lqs", "hot_int4"],
        choices=["high", "hot_lqs", *RECIPES],
        metavar="RECIPE",
    )
    parser.add_argument("--data", help="a folder with one folder of images per class (default: scikit-learn's digits)")
    parser.add_argument("--image-size", type=integer(1), default=32, help="to which images are scaled")
    parser.add_argument("--patch", type=integer(1), default=8)
    parser.add_argument("--epochs", type=integer(1), default=12)
    parser.add_argument("--batch", type=integer(1), default=64)
    parser.add_argument("--lr", type=number(above=0), default=1e-3)
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=file, default="outputs/vit.md")
    add_record_argument(parser)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits() if args.data is None else load_folder(args.data, args.image_size)
    images = F.interpolate(images, size=(args.image_size, args.image_size), mode="bilinear")
    images = ((images - images.mean()) / images.std()).to(device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = len(images) * 4 // 5
    train_set, test_set = order[:cut], order[cut:]
    if args.batch > cut:
        fail(f"--batch {args.batch} is more than the {cut} images to train on")
    data = (images[train_set], labels[train_set].to(device), images[test_set], labels[test_set].to(device))
    rows = []
    for name in args.models:
        for recipe in args.recipes:
            rows.append(run(name, recipe, data, args))
            print(rows[-1], flush=True)
    report(rows, args.output)
    source = args.data or "scikit-learn's digits"
    title = f"Trained from scratch on {source}, {args.epochs} epochs, seeds {' '.join(map(str, args.seeds))}"
    record(args.record, title, rows)


if __name__ == "__main__":
    main()
