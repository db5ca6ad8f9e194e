"""How long does the FedCLIP paper's experiment on PACS take as its authors' code runs it, and by `fedsim run`?

    uv run python benchmarks/paper.py
    uv run python benchmarks/paper.py --quick      # a few images and the embedded model: does it all run?

4 held-out domains x 200 rounds of one local epoch by 3 clients. The published loop (microsoft/PersonalizedFL, folder
fedclip, commit 441670e) reads and encodes each image again in every step and in every evaluation: after each round, of
the training, validation and test rows of the clients and of the held-out domain. In a step it also encodes one text for
each image. fedsim encodes each image once and trains on features.

Both are measured on a slice, on all cores, and scaled by the counts printed below:

- The published loop, written again here: seconds for each row of an epoch of training, for each row of an evaluation
  and for the class texts, with decoding, as PyTorch's DataLoader does it in the main process (its default, as there).
- `fedsim run` on files in the layout of PACS, twice: the first run encodes them, the second finds their features. The
  difference is the time of encoding. Rounds are timed on random features of PACS's sizes, by runs of few and of more
  rounds; a run of no more than one round is what starting costs.

Photos of smooth noise (JPEG, 227 x 227 pixels as in PACS), random weights of ViT-B-32, which cost what trained ones do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import open_clip
import pandas as pd
import torch
from _runs import parsed, parser_of
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, Dataset

from encode import photos, weights_of
from fedsim.clip.checkpoints import EMBEDDED, Weights
from fedsim.clip.model import Clip

SIZES = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
CLASSES = "dog", "elephant", "giraffe", "guitar", "horse", "house", "person"
PIXELS = 227, 227
BATCH = 32
PROMPT = "a picture of a {}"


@dataclass(frozen=True)
class Counts:
    """What the published loop passes through CLIP's towers, for all held-out domains together."""

    trained: int  # images in training steps, each with one text
    evaluated: int  # images in evaluations
    evaluations: int  # each of which encodes the texts of all classes

    @classmethod
    def of(cls, sizes: dict[str, int], rounds: int) -> "Counts":
        """As in its `getfeadataloader`: 60, 20 and 20 percent of a client's domain, all of a held-out one."""
        train, part = sum(int(0.6 * size) for size in sizes.values()), sum(int(0.2 * size) for size in sizes.values())
        clients = len(sizes) - 1
        each = clients * (train + 2 * part) + sum(sizes.values())
        return cls(rounds * clients * train, rounds * each, rounds * len(sizes) * (3 * clients + 1))


class Photos(Dataset):
    """Preprocessed images with the tokens of their class's text."""

    def __init__(self, files: list[Path], preprocess: Callable[[Image.Image], Tensor], tokens: Tensor) -> None:
        self.files, self.preprocess, self.tokens = files, preprocess, tokens

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.files[index]) as image:
            return self.preprocess(image), self.tokens[index % len(CLASSES)]


class Published:
    """The published loop on some images: frozen towers in every step and every evaluation."""

    def __init__(self, weights: Weights, files: list[Path]) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        clip = Clip(weights, self.device)
        self.model = clip.model.requires_grad_(False)
        self.tokens = open_clip.get_tokenizer(weights.model)([PROMPT.format(name) for name in CLASSES])
        self.loader = DataLoader(Photos(files, clip.preprocess, self.tokens), BATCH, shuffle=True, drop_last=True)
        with torch.no_grad():
            width = self.model.encode_text(self.tokens[:1].to(self.device)).shape[1]
        layers = nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=1)
        self.adapter = nn.Sequential(*layers).to(self.device)

    def train(self) -> None:
        """An epoch of a client, with an optimizer of its own."""
        values = {"lr": 5e-5, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
        optimizer = torch.optim.Adam(self.adapter.parameters(), **values)
        for images, tokens in self.loader:
            x = self.model.encode_image(images.to(self.device)).float()
            texts = normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=1)
            logits = self.model.logit_scale.exp() * normalize(self.adapter(x) * x, dim=1) @ texts.T
            target = torch.arange(len(x), device=self.device)
            loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def texts(self) -> Tensor:
        return normalize(self.model.encode_text(self.tokens.to(self.device)).float(), dim=1)

    @torch.no_grad()
    def evaluate(self, texts: Tensor) -> None:
        for images, _ in self.loader:
            x = self.model.encode_image(images.to(self.device)).float()
            (normalize(self.adapter(x) * x, dim=1) @ texts.T).argmax(1).cpu()


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fedsim_run(cache: Path, *flags: object) -> None:
    """The command, in a process and an output folder of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fedsim", "run", "--config", "paper", *map(str, flags), "--out", f"{out}/run"]
        environment = os.environ | {"FEDSIM_CACHE_DIR": str(cache)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def write_pacs(folder: Path, count: int) -> Path:
    """`count` images spread over PACS's domains and classes, in its layout."""
    groups = [folder / domain / name for domain in SIZES for name in CLASSES]
    for k, group in enumerate(groups):
        group.mkdir(parents=True)
        photos(group, count * (k + 1) // len(groups) - count * k // len(groups), PIXELS, seed=k)
    return folder


def write_features(folder: Path, sizes: dict[str, int], width: int = 512) -> Path:
    """Random features in PACS's sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = sum(sizes.values())
    labels = np.array(CLASSES)[np.arange(rows) % len(CLASSES)]
    domains = np.repeat(list(sizes), list(sizes.values()))
    x = rng.standard_normal((rows, width), np.float32)
    pd.DataFrame({"feature": list(x), "label": labels, "domain": domains}).to_parquet(folder / "features.parquet")
    texts = list(rng.standard_normal((len(CLASSES), width), np.float32))
    pd.DataFrame({"class": CLASSES, "prototype": texts}).to_parquet(folder / "classes.parquet")
    return folder


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backbone", default="ViT-B-32", help="an open_clip model name")
    parser.add_argument("--images", type=int, default=224, help="images of the slice")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the experiment")
    parser.add_argument("--measured-rounds", type=int, default=40, help="rounds of the longer run on features")
    parser.add_argument("--actors", type=int, help="of fedsim (default: as `fedsim run` chooses)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parsed(parser, backbone=EMBEDDED[0], images=BATCH, measured_rounds=1, repeats=1, actors=0)
    if args.images < BATCH:
        parser.error(f"--images must be at least {BATCH}, a batch of the published loop")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    report(args, Counts.of(SIZES, args.rounds), measured)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median seconds of each part; the parts take turns."""
    weights = weights_of(args.backbone, folder)
    root = write_pacs(folder / "pacs", args.images)
    loop = Published(weights, sorted(root.glob("*/*/*.jpg")))
    rows = len(loop.loader) * BATCH
    texts = loop.texts()
    common = () if args.actors is None else ("--actors", args.actors)
    common = *common, "--held-out", "sketch"
    files = *common, "--dataset", "pacs", "--data-dir", root
    if args.backbone != EMBEDDED[0]:
        files = *files, "--backbone", args.backbone, "--pretrained", folder / f"{args.backbone}.pt"
    features = *common, "--dataset", "features", "--data-dir", write_features(folder / "features", SIZES)
    taken: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        cache = folder / f"cache-{repeat}"
        parts: dict[str, Callable[[], object]] = {
            "train": loop.train,
            "evaluate": partial(loop.evaluate, texts),
            "texts": loop.texts,
            "cold": partial(fedsim_run, cache, *files, "--rounds", 1),
            "warm": partial(fedsim_run, cache, *files, "--rounds", 1),
            "start": partial(fedsim_run, cache, *features, "--rounds", 1),
            "rounds": partial(fedsim_run, cache, *features, "--rounds", 1 + args.measured_rounds),
        }
        for name, part in parts.items():
            taken.setdefault(name, []).append(seconds(part))
    each = {name: median(values) for name, values in taken.items()}
    return {
        "train": each["train"] / rows,
        "evaluate": each["evaluate"] / rows,
        "texts": each["texts"],
        "encode": max(0.0, median(a - b for a, b in zip(taken["cold"], taken["warm"], strict=True))) / args.images,
        "start": each["start"],
        "round": max(0.0, each["rounds"] - each["start"]) / args.measured_rounds,
    }


def report(args: argparse.Namespace, counts: Counts, measured: dict[str, float]) -> None:
    images, targets = sum(SIZES.values()), len(SIZES)
    parts = {
        "published loop": {
            "training steps, rows": (counts.trained, measured["train"]),
            "evaluations, rows": (counts.evaluated, measured["evaluate"]),
            "evaluations, class texts": (counts.evaluations, measured["texts"]),
        },
        "fedsim": {
            "encoding, images": (images, measured["encode"]),
            "starts": (targets, measured["start"]),
            "rounds": (targets * args.rounds, measured["round"]),
        },
    }
    lines = [
        {"": who, "part": part, "count": count, "ms each": 1000 * each, "hours": count * each / 3600}
        for who, work in parts.items()
        for part, (count, each) in work.items()
    ]
    table = pd.DataFrame(lines)
    print(f"\n{args.backbone}, {args.rounds} rounds, {targets} held-out domains, {images:,} images\n")
    print(table.to_markdown(index=False, floatfmt=("", "", ",.0f", ",.2f", ",.3f")))
    theirs, ours = (table[table[""] == who] for who in parts)
    trained = ours[ours.part != "encoding, images"]
    ratios = {
        "with encoding": theirs.hours.sum() / ours.hours.sum(),
        "features already there": theirs.hours.sum() / trained.hours.sum(),
    }
    passes = counts.trained + counts.evaluated
    print(f"\nimages through the tower: {passes:,} against {images:,}, {passes / images:,.0f} times as many")
    print("\npublished loop / fedsim, in hours\n")
    print(pd.DataFrame({"": list(ratios), "ratio": list(ratios.values())}).to_markdown(index=False, floatfmt=",.0f"))


if __name__ == "__main__":
    main()
