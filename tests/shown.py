"""Commands as the documentation shows them, and the same at a small size."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd

from fedsim.datasets.glyphs import Glyphs

PROJECT = Path(__file__).parents[1]
PACS = "art_painting", "cartoon", "photo", "sketch"
EACH = 2  # pictures of a class and domain

# No number that follows a flag is above this; flags that are added at the end set what a command leaves open.
MOST = {"--clients": 200, "--cohort": 20, "--eval-clients": 20, "--augment": 1, "--rounds": 1, "--trials": 2}


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in indented lines: continued lines joined, comments left out."""
    joined = re.sub(r" *\\\n *", " ", text)
    lines = re.findall(r"^ {4}((?:uv|pip|python|export|fedsim) .+)$", joined, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def smaller(words: list[str], most: dict[str, int], swaps: dict[str, str]) -> list[str]:
    """A command with its numbers capped, each of them once, and with words that only a reader can fill in replaced."""
    result, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag = word
        elif flag in most and word.isdigit():
            word = str(min(int(word), most[flag]))
            if word in result[len(result) - result[::-1].index(flag) :]:
                continue
        result.append(swaps.get(word, word))
    return result


def write_drawings(folder: Path, domains: tuple[str, ...], each: int = EACH) -> Path:
    """`each` embedded drawings of every class as files of `folder/domain/class`, in domains of these names."""
    images = Glyphs().load(None)
    for domain, name in enumerate(domains):
        for label, word in enumerate(images.classes):
            there = folder / name / word
            there.mkdir(parents=True)
            for row in np.flatnonzero((images.domain == domain) & (images.y == label))[:each]:
                images.open(row).save(there / f"{row}.png")
    return folder


def write_features(folder: Path, domains: tuple[str, ...], classes: int = 4, rows: int = 20, width: int = 16) -> Path:
    """Features of every domain and class: `rows` that scatter around the prototype."""
    rng = np.random.default_rng(0)
    class_embeddings = rng.standard_normal((classes, width))
    table = [
        {"feature": class_embeddings[label] + rng.standard_normal(width), "label": f"c{label}", "domain": domain}
        for domain in domains
        for label in range(classes)
        for _ in range(rows)
    ]
    folder.mkdir(parents=True)
    pd.DataFrame(table).to_parquet(folder / "features.parquet")
    names = [f"c{label}" for label in range(classes)]
    pd.DataFrame({"class": names, "prototype": list(class_embeddings)}).to_parquet(folder / "classes.parquet")
    return folder
