"""Sets without visual domains: CoOp's split files, and folders of images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fedsim import InputError
from fedsim.clients import make_clients
from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL
from fedsim.registry import parse

PETS = {  # labels in the order of the file, which is not that of names
    "train": [["beagle_1.jpg", 1, "beagle"], ["yorkie_1.jpg", 0, "yorkshire_terrier"], ["sphynx_1.jpg", 2, "Sphynx"]],
    "val": [["beagle_2.jpg", 1, "beagle"], ["sphynx_2.jpg", 2, "Sphynx"]],
    "test": [["yorkie_2.jpg", 0, "yorkshire_terrier"]],
}


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(file.name), 0, 0)).save(file)


def pets(root: Path, splits=None, name: str = "OxfordPets", images: str = "images") -> Path:
    """The layout of CoOp's oxford_pets."""
    splits = PETS if splits is None else splits
    root.mkdir(parents=True, exist_ok=True)
    (root / f"split_zhou_{name}.json").write_text(json.dumps(splits))
    for items in PETS.values():
        for path, *_ in items:
            picture(root / images / path)
    return root


def load(name: str, root: Path, **options):
    return parse("dataset", {"name": name, **options}).load(root)


def test_a_split_file_gives_labels_names_splits_and_the_sets_own_text(tmp_path):
    images = load("coop", pets(tmp_path / "oxford_pets"))
    assert images.classes == ("yorkshire terrier", "beagle", "Sphynx")
    assert images.y.tolist() == [1, 0, 2, 1, 2, 0]
    assert images.split.tolist() == [TRAIN, TRAIN, TRAIN, VAL, VAL, TEST]
    assert images.domains == ("images",) and images.template == "a photo of a {}, a type of pet."
    assert images.open(1).size == (8, 8) and images.names[1] == "yorkie_1.jpg"


@pytest.mark.parametrize("images", ["", "2750", "caltech-101/101_ObjectCategories"])
def test_images_are_found_wherever_an_archive_puts_them(tmp_path, images):
    assert len(load("coop", pets(tmp_path, images=images))) == 6


def test_the_set_may_be_one_folder_below_and_underscores_may_stay(tmp_path):
    pets(tmp_path / "data" / "oxford_pets", name="SUN397")
    images = load("coop", tmp_path / "data", spaces=False)
    assert images.classes[0] == "yorkshire_terrier" and images.template == "a photo of a {}."


def test_aircraft_come_by_their_text_files(tmp_path):
    (tmp_path / "variants.txt").write_text("747-400\nA320\n")
    for split, lines in {"train": ["1 A320", "2 747-400"], "val": ["3 A320"], "test": ["4 747-400"]}.items():
        (tmp_path / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    for number in range(1, 5):
        picture(tmp_path / "images" / f"{number}.jpg")
    images = load("coop", tmp_path)
    assert images.classes == ("747-400", "A320") and images.y.tolist() == [1, 0, 1, 0]
    assert images.split.tolist() == [TRAIN, TRAIN, VAL, TEST]
    assert images.template == "a photo of a {}, a type of aircraft."


def changed(**items) -> dict:
    return {**PETS, **items}


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (
            changed(test=[["yorkie_9.jpg", 0, "yorkshire_terrier"]]),
            "names 1 image missing from .*images: .*yorkie_9.jpg",
        ),
        (changed(test=[["yorkie_2.jpg", 4, "fox"]]), "labels need to run from 0 without gaps; no image has: 3"),
        (changed(test=[["yorkie_2.jpg", 0, "fox"]]), "gives label 0 two names: 'yorkshire_terrier' and 'fox'"),
        (changed(test=[["yorkie_2.jpg", "0", "fox"]]), r'test\[0\] needs \[path, label, class name\], not \["yorkie'),
        (changed(test=[["yorkie_2.jpg", 3, "Beagle"]]), "these class names differ only in capitals or blanks"),
        ({"train": []}, "needs an object with lists train, val and test, not an object without val, test"),
        ([], "needs an object with lists train, val and test, not list"),
        ({"train": [], "val": [], "test": []}, "names no images"),
    ],
)
def test_a_split_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, splits, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        load("coop", pets(tmp_path, splits))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_split_file_or_with_two_is_refused(tmp_path):
    picture(tmp_path / "images" / "1.jpg")
    with pytest.raises(InputError, match=r"expected one split_zhou_\*.json.* there are: images"):
        load("coop", tmp_path)
    pets(tmp_path), pets(tmp_path, name="Food101")
    with pytest.raises(InputError, match=r"there are: split_zhou_Food101\.json, split_zhou_OxfordPets\.json"):
        load("coop", tmp_path)


def tree(root: Path, *folders: str) -> Path:
    for folder in folders:
        for name in ("1.png", "2.png"):
            picture(root / folder / name)
    return root


def test_a_folder_of_classes_is_split_by_the_seed(tmp_path):
    images = load("image_folder", tree(tmp_path, "cat", "dog"))
    assert images.classes == ("cat", "dog") and set(images.split.tolist()) == {UNASSIGNED}
    assert images.domains == ("images",) and len(images) == 4


def test_split_folders_are_splits_and_a_class_may_be_absent_from_one(tmp_path):
    images = load("image_folder", tree(tmp_path, "train/cat", "train/dog", "valid/dog", "test/cat"))
    by_split = {code: {images.classes[k] for k in images.y[images.split == code]} for code in (TRAIN, VAL, TEST)}
    assert by_split == {TRAIN: {"cat", "dog"}, VAL: {"dog"}, TEST: {"cat"}}
    clients = make_clients(images, parse("partition", "iid"), 2, (), seed=0)
    assert sum(len(clients[k].train) for k in range(2)) == 4 and sum(len(clients[k].test) for k in range(2)) == 2


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["train/cat", "test/cat", "dog"], "holds splits, test, train, and other folders: dog"),
        (["val/cat", "test/cat"], "expected the folders train, val and test in .* there are: test, val"),
        (["train/cat", "training/cat"], "expected the folders train, val and test in .* there are: train, training"),
        ([""], "expected class/file in .*; no class folders in: images; images are one level too high"),
    ],
)
def test_a_folder_of_another_shape_is_refused(tmp_path, folders, sentence):
    with pytest.raises(InputError, match=sentence):
        load("image_folder", tree(tmp_path, *folders))
