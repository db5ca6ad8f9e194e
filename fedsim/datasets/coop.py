"""The recognition sets of CoOp, by its split files: Caltech101, OxfordPets, Flowers102, Food101, DTD and others.

Source: Zhou et al. 2022, arXiv 2109.01134; file layouts and text templates as in the authors' code, KaiyangZhou/CoOp,
commit ff61507, datasets/ and trainers/zsclip.py.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedsim.datasets import TEST, TRAIN, VAL, FixedDataset, Images
from fedsim.datasets._names import canonical_names
from fedsim.datasets._tree import checked
from fedsim.datasets._walk import display_name, folders
from fedsim.errors import InputError, counted, listing
from fedsim.registry import component

SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}
DOMAIN = "images"  # the sets have no visual domains

# The text of a class, by the name in the split file's name, `split_zhou_NAME.json`.
TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}
AIRCRAFT_TEMPLATE = "a photo of a {}, a type of aircraft."
DEFAULT_TEMPLATE = "a photo of a {}."


class Item(NamedTuple):
    """An image of a split file: its path, its label and the name of its class."""

    path: str
    label: int
    name: str
    split: int


@component
class CoOp(FixedDataset):
    """`--data-dir` is a set's folder, with its `split_zhou_*.json`, or FGVCAircraft's `variants.txt`, and its images.

    Classes have the order of the labels in the file, so that base and new classes are those of CoOp; train, validation
    and test rows are those of the file. The text of a class is CoOp's for the set, unless `--prompt` gives another.
    """

    spaces: bool = True  # as in CoOp's code

    def read(self, root: Path | None) -> Images:
        root = checked(root, "coop")
        place, file = _find(root)
        items = _aircraft(place) if file.name == "variants.txt" else _split_file(file)
        base, paths = _locate(place, file, items)
        names = _class_names(file, items)
        spelling = canonical_names("class", Counter(names[item.label] for item in items), file)
        template = TEMPLATES.get(file.stem.removeprefix("split_zhou_"), DEFAULT_TEMPLATE)
        return Images(
            files=[Path(path) for path in paths],
            names=[display_name(path.removeprefix(f"{base}/")) for path in paths],
            y=np.array([item.label for item in items], np.int64),
            domain=np.zeros(len(items), np.int64),
            classes=tuple(spelling[name] for name in names),
            domains=(DOMAIN,),
            split=np.array([item.split for item in items], np.int8),
            template=AIRCRAFT_TEMPLATE if file.name == "variants.txt" else template,
        )


def _find(root: Path) -> tuple[Path, Path]:
    """The set's folder, at most one below `root`, and its split file."""
    found = []
    for place in (root, *folders(root)):
        found += [(place, file) for file in sorted(place.glob("split_zhou_*.json"))]
        if (place / "variants.txt").is_file():
            found.append((place, place / "variants.txt"))
    if len(found) == 1:
        return found[0]
    has = listing(str(file.relative_to(root)) for _, file in found) or listing(sorted(p.name for p in root.iterdir()))
    raise InputError(
        f"expected one split_zhou_*.json, or FGVCAircraft's variants.txt, in {root} or in a folder there; "
        f"there are: {has or 'no files'}"
    )


def _split_file(file: Path) -> list[Item]:
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} needs to be JSON in UTF-8: {error}") from None
    if not isinstance(splits, dict) or (missing := [name for name in SPLITS if name not in splits]):
        given = "an object without " + listing(missing) if isinstance(splits, dict) else type(splits).__name__
        raise InputError(f"{file} needs an object with lists train, val and test, not {given}")
    if odd := [name for name in SPLITS if not isinstance(splits[name], list)]:
        raise InputError(f"{file} needs lists train, val and test; these are no lists: {listing(odd)}")
    return [_item(file, name, k, entry, code) for name, code in SPLITS.items() for k, entry in enumerate(splits[name])]


def _item(file: Path, name: str, position: int, entry: Any, code: int) -> Item:
    match entry:
        case [str(path), int(label), str(class_name)] if label >= 0 and not isinstance(label, bool):
            return Item(path, label, class_name, code)
    raise InputError(f"{file.name}: {name}[{position}] needs [path, label, class name], not {json.dumps(entry)[:80]}")


def _aircraft(place: Path) -> list[Item]:
    """FGVCAircraft: variants in the order of `variants.txt`, images by `images_variant_{train,val,test}.txt`."""
    variants = _lines(place / "variants.txt")
    number = {name: k for k, name in enumerate(variants)}
    items = []
    for split, code in SPLITS.items():
        file = place / f"images_variant_{split}.txt"
        for k, line in enumerate(_lines(file), 1):
            image, _, name = line.partition(" ")
            if name not in number:
                raise InputError(f"{file.name}:{k} names the variant {name!r}, which is not in variants.txt")
            items.append(Item(f"{image}.jpg", number[name], name, code))
    return items


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"FGVCAircraft needs variants.txt and images_variant_train, _val and _test.txt; no {file}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} needs to be UTF-8 text: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _locate(place: Path, file: Path, items: list[Item]) -> tuple[Path, list[str]]:
    """The folder that the paths of a split file start from, at most two below the set's, and all paths.

    Archives wrap the images in folders of their own (`images/`, `2750/`, `caltech-101/101_ObjectCategories/`).
    """
    if not items:
        raise InputError(f"{file} names no images")
    level = [place]
    for _ in range(3):
        for base in level:
            if (base / items[0].path).exists():
                paths = [f"{base}/{item.path}" for item in items]
                if missing := [path for path in paths if not os.path.exists(path)]:
                    count = counted(len(missing), "image")
                    raise InputError(f"{file.name} names {count} missing from {base}: {listing(missing, 3)}")
                return base, paths
        level = [folder for base in level for folder in folders(base)]
    raise InputError(f"{file.name} names {items[0].path}, which is neither in {place} nor up to two folders below it")


def _class_names(file: Path, items: list[Item]) -> list[str]:
    """The name of each label, in the order of the labels."""
    names: dict[int, str] = {}
    for item in items:
        if names.setdefault(item.label, item.name) != item.name:
            raise InputError(f"{file.name} gives label {item.label} two names: {names[item.label]!r} and {item.name!r}")
    if gaps := [label for label in range(max(names) + 1) if label not in names]:
        raise InputError(f"{file.name}: labels need to run from 0 without gaps; no image has: {listing(gaps, 10)}")
    return [names[label] for label in range(len(names))]
