"""ImageNet and its variants, in the folders of CoOp's instructions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim import Config, InputError, run
from fedsim.datasets import TEST, TRAIN
from fedsim.registry import parse

NAMES = "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n"
WNIDS = "n01440764", "n01443537", "n01484850"


def pictures(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
        for shade in (0, 90):
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / f"{shade}.JPEG")


def imagenet(place: Path, images: str = "images", names: str | None = NAMES) -> Path:
    pictures(*(place / images / split / wnid for split in ("train", "val") for wnid in WNIDS))
    if names:
        (place / "classnames.txt").write_text(names)
    return place


def load(root: Path, **options):
    return parse("dataset", {"name": "imagenet", **options}).load(root)


def refusal(root: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("place", "images"), [("", "images"), ("", ""), ("imagenet", "images"), ("imagenet", "")])
def test_train_and_val_are_train_and_test_rows_named_by_classnames(tmp_path, place, images):
    imagenet(tmp_path / place, images)
    data = load(tmp_path)
    assert data.classes == ("tench", "goldfish", "great white shark") and data.domains == ("imagenet",)
    assert data.y.tolist() == [0, 0, 1, 1, 2, 2] * 2 and data.split.tolist() == [TRAIN] * 6 + [TEST] * 6
    assert data.notes == () and data.template == "a photo of a {}."


def variants(root: Path) -> Path:
    imagenet(root / "imagenet")
    pictures(*(root / "imagenetv2/imagenetv2-matched-frequency-format-val" / number for number in "012"))
    pictures(*(root / "imagenet-sketch/images" / wnid for wnid in WNIDS))
    pictures(root / "imagenet-adversarial/imagenet-a/n01443537", root / "imagenet-rendition/imagenet-r/n01484850")
    return root


def test_variants_are_domains_of_test_rows_and_may_lack_classes(tmp_path):
    data = load(variants(tmp_path))
    assert data.domains == ("imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r")
    assert (data.split[data.domain > 0] == TEST).all()
    rows = [data.y[data.domain == domain].tolist() for domain in range(1, 5)]
    assert rows == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [1, 1], [2, 2]]
    assert data.notes == (
        "imagenet-a lacks 2 of 3 classes: tench, great white shark",
        "imagenet-r lacks 2 of 3 classes: tench, goldfish",
    )
    assert refusal(tmp_path, absent_classes=False).startswith("every class needs images in every domain;")


def test_classes_are_chosen_by_folder_or_name_and_classnames_may_have_more(tmp_path):
    imagenet(tmp_path, names=NAMES + "n01491361 tiger shark\n")
    for classes in ("n01440764,n01484850", "tench,great white shark"):
        data = load(tmp_path, classes=classes)
        assert data.classes == ("tench", "great white shark") and np.bincount(data.y).tolist() == [4, 4]


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    assert refusal(tmp_path).endswith(f"in {tmp_path} or in a folder imagenet there; there are: train")
    root = imagenet(tmp_path / "a", names=None)
    assert refusal(root).startswith(f"data set imagenet needs {root / 'classnames.txt'}, with a line such as")
    root = imagenet(tmp_path / "b", names="n01440764 tench\nn01443537 goldfish\n")
    assert refusal(root).endswith("it has none for: n01484850")
    root = imagenet(tmp_path / "c", names=NAMES.replace("goldfish", "tench"))
    assert refusal(root).endswith("these have the same: 'tench' (n01440764, n01443537)")


def test_another_file_of_names_takes_the_place_of_classnames(tmp_path):
    root = imagenet(tmp_path / "imagenet", names=None)
    (tmp_path / "names.yaml").write_text("n01440764: a\nn01443537: b\nn01484850: c\n")
    assert load(root, class_names=tmp_path / "names.yaml").classes == ("a", "b", "c")


def test_a_run_trains_on_imagenet_and_is_tested_on_its_variants(tmp_path):
    held_out = "imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r"
    fields = {"data_dir": variants(tmp_path / "data"), "held_out": held_out, "rounds": 1, "actors": 0}
    report = run(Config(dataset="imagenet", out=tmp_path / "run", cache_dir=tmp_path / "cache", **fields))
    assert "imagenet-a lacks 2 of 3 classes: tench, great white shark" in report.facts["data_notes"]
