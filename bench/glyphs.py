"""Images of letters and digits, made on this machine from the fonts that matplotlib ships.

62 classes (0-9, A-Z, a-z), 32×32 pixels, grey. A glyph of a random font is drawn at 48 points, and turned, sheared, stretched
and moved at random; then its contrast is scaled, and noise is added. Some classes differ in size only (o, O and 0), so no
model reaches 100 %. The same fonts are in both sets, with other distortions.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SIZE, CANVAS = 32, 96
#: Beginnings of the names of fonts that have these letters at their code points, and not as symbols.
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmb10", "cmss10", "cmtt10")


def fonts() -> list[Path]:
    """Return the files of the fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(path for path in folder.glob("*.ttf") if path.name.startswith(FONTS) and "Display" not in path.name)


def draw(path: Path) -> list[Image.Image]:
    """Return the glyphs of a font, one for each class."""
    font, images = ImageFont.truetype(str(path), 48), []
    for letter in CLASSES:
        image = Image.new("L", (CANVAS, CANVAS))
        ImageDraw.Draw(image).text((CANVAS // 2, CANVAS // 2), letter, fill=255, font=font, anchor="mm")
        images.append(image)
    return images


def make(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``samples`` images of each class [n, 1, 32, 32] in [0, 1] and their labels [n], in random order."""
    random, drawn = np.random.default_rng(seed), [draw(path) for path in fonts()]
    images, labels = [], []
    for label in np.repeat(np.arange(len(CLASSES)), samples):
        glyph = drawn[random.integers(len(drawn))][label]
        turn, shear = random.normal(0, 0.2), random.normal(0, 0.2)
        stretch = np.diag(np.exp(random.normal(0, 0.15, 2))) * CANVAS / SIZE * 0.62
        matrix = stretch @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[1, shear], [0, 1]]
        middle = matrix @ (np.full(2, SIZE / 2) + random.normal(0, 1.5, 2))
        (a, b), (c, d) = matrix
        x, y = CANVAS / 2 - middle
        small = glyph.transform((SIZE, SIZE), Image.Transform.AFFINE, (a, b, x, c, d, y), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, np.float32) / 255 * random.uniform(0.4, 1)
        images.append(np.clip(pixels + random.normal(0, 0.12, pixels.shape), 0, 1))
        labels.append(label)
    order = random.permutation(len(labels))
    return torch.tensor(np.stack(images)[order], dtype=torch.float32).unsqueeze(1), torch.tensor(np.array(labels)[order])
