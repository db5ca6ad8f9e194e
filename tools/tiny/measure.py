"""Zero-shot accuracy of the shipped model, as a user of open_clip gets it.

`uv run python tools/tiny/measure.py`, with `--photos FOLDER` for images in folders by
class, or in folders of domains of such folders.
"""

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

import ship
from distil import ASSETS
from words import PROMPT

GLYPHS = ASSETS / "glyphs" / "glyphs.parquet"
_BATCH = 32


class ZeroShot:
    """The model behind one function: images and class names to predictions."""

    def __init__(self, file: Path) -> None:
        self.clip, self.preprocess, self.tokenizer = ship.load(file)

    @torch.inference_mode()
    def images(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """(N, D) unit rows."""
        pixels, found = map(self.preprocess, images), []
        while part := list(islice(pixels, _BATCH)):
            found.append(self.clip.encode_image(torch.stack(part), normalize=True))
        return torch.cat(found)

    @torch.inference_mode()
    def names(self, names: list[str]) -> torch.Tensor:
        """(C, D) unit rows."""
        prompts = self.tokenizer([PROMPT.format(name) for name in names])
        return self.clip.encode_text(prompts, normalize=True)


def glyphs(model: ZeroShot) -> None:
    """Prints accuracy by domain on the unseen concepts, on all, and of the commonest answer."""
    rows = pq.read_table(GLYPHS).to_pylist()
    began = time.perf_counter()
    found = model.images(Image.open(io.BytesIO(row["image"])) for row in rows)
    print(f"{len(rows) / (time.perf_counter() - began):.0f} images a second, decoding and all")
    labels, classes, right = _judge(model, found, [row["label"] for row in rows])
    domains = np.array([row["domain"] for row in rows])
    test = np.array([row["split"] == "test" for row in rows])
    print(f"{'glyphs':12}  unseen     all  always the same label (unseen)")
    means = []
    for domain in sorted(set(domains)):
        here = domains == domain
        counts = np.bincount(labels[here & test])
        row = right[here & test].mean(), right[here].mean(), counts.max() / counts.sum()
        means.append(row)
        print(f"{domain:12}" + "".join(f"{100 * value:8.1f}" for value in row))
    print(f"{'mean':12}" + "".join(f"{100 * value:8.1f}" for value in np.mean(means, 0)))
    for i, name in enumerate(classes):
        print(f"  {name}: {100 * right[test & (labels == i)].mean():.0f}")


def photos(model: ZeroShot, root: Path) -> None:
    """Prints accuracy by domain of the images below a folder."""
    domains = defaultdict(list)
    for file in sorted(f for f in root.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png")):
        domains[file.parent.parent.name].append(file)
    for domain, files in domains.items():
        found = model.images(Image.open(file) for file in files)
        _, _, right = _judge(model, found, [file.parent.name for file in files])
        print(f"{domain}: {100 * right.mean():.1f} of {len(files)}")


def _judge(model, found, labels) -> tuple[np.ndarray, list[str], np.ndarray]:
    classes = sorted(set(labels))
    rows = np.array([classes.index(label) for label in labels])
    named = model.names([name.replace("_", " ") for name in classes])
    return rows, classes, (found @ named.T).argmax(1).numpy() == rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ship.MODEL)
    parser.add_argument("--photos", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = options.model.read_bytes()
    print(f"{len(weights):,} bytes, sha256 {sha256(weights).hexdigest()}")
    model = ZeroShot(options.model)
    glyphs(model)
    if options.photos:
        photos(model, options.photos)


if __name__ == "__main__":
    main()
