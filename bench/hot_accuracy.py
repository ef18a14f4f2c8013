"""Train a ViT and a ResNet from scratch in high precision and by HOT.

HOT runs with and without a quantiser chosen for each layer, and with activations compressed, on digits and on drawn letters.

    python bench/hot_accuracy.py                                    # both sets, both models, three seeds
    python bench/hot_accuracy.py --data glyphs --models vit --epochs 20
    python bench/hot_accuracy.py --tiny --name dry_run

"digits" are scikit-learn's 1797 handwritten digits, 8×8 pixels. "glyphs" are made by bench/glyphs.py: its docstring says how.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from statistics import mean, stdev

import glyphs
import results
import torch
import torch.nn.functional as F
import vit
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from halo_tensor import calibrate, hot_config, quantize_
from halo_tensor.analysis import measure_saved

#: name -> options of the config; None: high precision. LQS in a name: scales are chosen for each layer.
RECIPES: dict[str, dict | None] = {
    "high precision": None,
    "hot": {},
    "hot, LQS": {},
    "hot, LQS, all": {"activations": "all"},
    "hot, LQS, all-int4": {"activations": "all-int4"},
    "hot, LQS, whole rank": {"rank": None},
    "hot, LQS, X in int4": {"rank": None, "saved_bits": 4},
    "hot, LQS, X in int4, all": {"rank": None, "saved_bits": 4, "activations": "all"},
}
NOTES = (
    "Accuracy on images that were not trained on, in %, mean of the seeds. LQS: the scales of E in grad_input are chosen for "
    "each layer on four training batches. Whole rank: grad_weight keeps all sequencies. X in int4: so it does, and X is saved "
    "in 4 bits. all, all-int4: activations= of the config. Saved: by a forward of one batch, of the bytes in high precision. "
    "All in float32."
)


def load(data: str, args: argparse.Namespace) -> tuple:
    """Return images and labels to train on, and to test on."""
    if data == "glyphs":
        images, labels = glyphs.make(args.samples, 0)
        test_images, test_labels = glyphs.make(args.test_samples, 1)
    else:
        images, labels = vit.load_digits()
        images = F.interpolate(images, size=(16, 16), mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        cut = len(images) * 4 // 5
        images, labels, test_images, test_labels = (
            images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]]
        )  # fmt: skip
    middle, spread = images.mean(), images.std()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(t.to(device) for t in ((images - middle) / spread, labels, (test_images - middle) / spread, test_labels))


def make(model: str, data: tuple, tiny: bool) -> torch.nn.Module:
    size, classes = data[0].shape[-1], int(data[1].max()) + 1
    if model == "vit":
        config = ViTConfig(
            hidden_size=64 if tiny else 128, num_hidden_layers=2 if tiny else 4, num_attention_heads=4,
            intermediate_size=256 if tiny else 512, image_size=size, patch_size=size // 8, num_channels=1, num_labels=classes,
        )  # fmt: skip
        return ViTForImageClassification(config)
    config = ResNetConfig(
        num_channels=1, embedding_size=64, hidden_sizes=[64, 128], depths=[1, 1] if tiny else [2, 2], layer_type="basic",
        num_labels=classes, downsample_in_first_stage=False,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def prepare(model: torch.nn.Module, recipe: str, data: tuple, batch: int) -> float:
    """Convert a model, and return the bytes that it saves for backward, × high precision's."""

    def saved() -> int:
        with measure_saved(model) as found:
            model(pixel_values=data[0][:batch])
        return found.total

    model.train()
    plain = saved()
    options = RECIPES[recipe]
    if options is None:
        return 1.0
    config = hot_config(**options)
    if "LQS" in recipe:
        batches = [
            {"pixel_values": x, "labels": y} for x, y in zip(data[0].split(batch)[:4], data[1].split(batch)[:4], strict=True)
        ]
        config = calibrate(model, batches, config)
    quantize_(model, config)
    return saved() / plain


def trained(dataset: str, name: str, recipe: str, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return the accuracy in %, and the bytes that are saved for backward, × high precision's."""
    data = load(dataset, args)
    torch.manual_seed(seed)
    model = make(name, data, args.tiny).to(data[0].device)
    share = prepare(model, recipe, data, args.batch)
    torch.manual_seed(seed)
    if args.compile:
        model.compile(dynamic=False)
    return vit.train(model, data, args, f"{dataset} {name} {recipe} {seed}")[0], share


def row_of(dataset: str, name: str, recipe: str, found: list[tuple[float, float]]) -> dict:
    """Return a row of the table, of what :func:`trained` found for each seed."""
    accuracies = [accuracy for accuracy, _ in found]
    return {
        "trained": f"{name} on {dataset}",
        "recipe": recipe,
        "accuracy %": round(mean(accuracies), 2),
        "± of a seed": round(stdev(accuracies), 2) if len(accuracies) > 1 else None,
        "of each seed": " ".join(f"{a:.2f}" for a in accuracies),
        "saved": f"{found[-1][1]:.3f}",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = results.parser_of(__doc__, "hot_accuracy")
    parser.add_argument("--data", nargs="+", default=["digits", "glyphs"], choices=["digits", "glyphs"])
    parser.add_argument("--models", nargs="+", default=["vit", "resnet"], choices=["vit", "resnet"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--samples", type=int, default=200, help="images to train on of each class of glyphs")
    parser.add_argument("--test-samples", type=int, default=50, help="images to test on of each class of glyphs")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="how many train at a time")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--tiny", action="store_true", help="small models and sets, one epoch, for a dry run")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.test_samples, args.epochs, args.seeds = 8, 2, 1, args.seeds[:1]
    return args


def main() -> None:
    args = parse_args()
    rows: list[dict] = []
    title = f"Trained from scratch by HOT, {args.epochs} epochs, seeds {' '.join(map(str, args.seeds))}"
    jobs = list(product(args.data, args.models, args.recipes))
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        running = {job: [pool.submit(trained, *job, seed, args) for seed in args.seeds] for job in jobs}
        for job, seeds in running.items():
            rows.append(row_of(*job, [seed.result() for seed in seeds]))
            first = next(row for row in rows if row["trained"] == rows[-1]["trained"])
            rows[-1]["points below the first"] = round(first["accuracy %"] - rows[-1]["accuracy %"], 2)
            print(rows[-1], flush=True)
            results.write(args.name, title + ", tiny" * args.tiny, rows, NOTES, args.folder, quiet=True, panels=["trained"])


if __name__ == "__main__":
    main()
