"""Sets in the formats of the Hugging Face hub: real tables, written by its own library."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim import InputError
from fedsim.clients import make_clients
from fedsim.datasets import TEST, TRAIN, UNASSIGNED
from fedsim.errors import Stopped
from fedsim.registry import parse

datasets = pytest.importorskip("datasets")
NAMES = ["zebra", "ant", "bee"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()


def table(rows: int, seed: int, **columns):
    draw = np.random.default_rng(seed)
    pictures = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(rows)]
    values = {"image": pictures, "label": [k % 3 for k in range(rows)], "style": ["photo", "ink"] * (rows // 2)}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "style": datasets.Value("string")}
    for name, (kind, column) in columns.items():
        kinds[name], values[name] = kind, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


def saved(root: Path, form: str, **splits) -> Path:
    if form == "save_to_disk":
        datasets.DatasetDict(splits).save_to_disk(str(root))
    else:
        root.mkdir()
        for name, rows in splits.items():
            rows.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
    return root


def load(root: Path | None, **options):
    return parse("dataset", {"name": "huggingface", **options}).load(root)


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_a_set_on_disk_has_its_splits_labels_and_images(tmp_path, form):
    train, test = table(6, 0), table(4, 1)
    images = load(saved(tmp_path / "set", form, train=train, test=test), domain="style")
    assert images.classes == ("zebra", "ant", "bee") and images.domains == ("ink", "photo")
    assert images.y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0] and images.domain.tolist() == [1, 0] * 5
    assert images.split.tolist() == [TRAIN] * 6 + [TEST] * 4
    for row, original in enumerate([*train["image"], *test["image"]]):
        assert np.array_equal(np.asarray(images.open(row)), np.asarray(original))


def test_both_forms_have_one_fingerprint_and_travel_without_their_pixels(tmp_path):
    splits = {"train": table(40, 0), "test": table(10, 1)}
    disk, parquet = (load(saved(tmp_path / form, form, **splits)) for form in ("save_to_disk", "parquet"))
    assert disk.fingerprint() == parquet.fingerprint()
    sent = pickle.dumps(parquet)
    assert len(sent) < 10_000 and pickle.loads(sent).files[45] == parquet.files[45]


def test_one_split_is_left_to_the_partition_and_strings_are_classes(tmp_path):
    words = {"label": (datasets.Value("string"), ["dog", "cat"] * 3)}
    images = load(saved(tmp_path / "set", "parquet", train=table(6, 0, **words)))
    assert images.classes == ("cat", "dog") and images.y.tolist() == [1, 0] * 3
    assert set(images.split.tolist()) == {UNASSIGNED} and images.domains == ("images",)


@pytest.mark.parametrize(
    ("options", "columns", "sentence"),
    [
        ({"label": "coarse"}, {}, "has no column 'coarse'; there are: image, label, style"),
        ({"image": "style"}, {}, r"column style needs to hold images, not Value"),
        (
            {},
            {"label": (datasets.Value("int64"), [0, 1] * 3)},
            "column label needs class labels with names, or strings",
        ),
        (
            {},
            {"label": (datasets.ClassLabel(names=NAMES), [0, 1, -1] * 2)},
            "every row needs a class; 2 of 6 have none",
        ),
    ],
)
def test_a_column_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, options, columns, sentence):
    with pytest.raises(InputError, match=sentence):
        load(saved(tmp_path / "set", "parquet", train=table(6, 0, **columns)), **options)


def test_other_splits_and_an_empty_folder_are_refused(tmp_path):
    both = saved(tmp_path / "set", "save_to_disk", train=table(2, 0), unsupervised=table(2, 1))
    with pytest.raises(InputError, match="splits other than train, validation and test: unsupervised"):
        load(both)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected Parquet shards, or a folder written by save_to_disk"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"needs --dataset\.hub OWNER/NAME, or a folder as --data-dir, and not both"):
        load(None)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Stopped, match="the hub's set owner/no-such-set cannot be loaded: ") as caught:
        load(None, hub="owner/no-such-set")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (datasets.Value("string"), ["zoe", "ada", "bob"] * 2),
        (datasets.Value("int64"), [30, 10, 20] * 2),
        (datasets.ClassLabel(names=["ada", "bob", "zoe"]), [2, 0, 1] * 2),
    ],
)
def test_a_column_of_owners_gives_the_clients_of_the_partition_natural(tmp_path, kind, values):
    images = load(saved(tmp_path / "set", "parquet", train=table(6, 0, writer=(kind, values))), owner="writer")
    assert images.owner is not None and images.owner.tolist() == [2, 0, 1] * 2
    population = make_clients(images, parse("partition", "natural"), None, (), 0)
    assert [(client.train % 3).tolist() for client in population] == [[1], [2], [0]]


def test_owners_that_are_missing_are_refused(tmp_path):
    root = saved(tmp_path / "set", "parquet", train=table(6, 0, writer=(datasets.Value("string"), ["zoe", None] * 3)))
    with pytest.raises(InputError, match="column writer needs text or integers, one for each row"):
        load(root, owner="writer")
    with pytest.raises(InputError, match="has no column 'author'; there are: image, label, style, writer"):
        load(root, owner="author")


def test_images_of_chosen_classes_are_still_read_one_by_one(tmp_path):
    images = load(saved(tmp_path / "set", "parquet", train=table(60, 0)), classes="zebra,bee")
    assert images.classes == ("zebra", "bee") and images.y.tolist() == [0, 1] * 20
    every = load(tmp_path / "set")
    assert images.files[1] == every.files[2] and images.files[2:4] == [every.files[3], every.files[5]]
    assert len(pickle.dumps(images)) < 10_000


def test_a_column_gives_the_group_of_each_row(tmp_path):
    rows = table(4, 0, gender=(datasets.ClassLabel(names=["male", "female"]), [1, 0, 0, 1]))
    images = load(saved(tmp_path / "set", "parquet", train=rows), group="gender")
    assert images.groups == ("female", "male") and images.group.tolist() == [0, 1, 1, 0]
    assert images.take(np.array([1, 3])).group.tolist() == [1, 0]
