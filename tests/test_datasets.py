"""Data sets: real files in, rows, names and sentences out."""

import json
import os
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from fedsim.clients import make_clients
from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, Features, Images
from fedsim.datasets._check import unreadable
from fedsim.errors import InputError, listing
from fedsim.registry import available, parse

PACS = ["art_painting", "cartoon", "photo", "sketch"]
DOMAINNET = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
VLCS = ["Caltech101", "LabelMe", "SUN09", "VOC2007"]
ENDINGS = ".jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp"


def a_picture(file: Path, shade: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file)
    return file


def a_tree(root: Path, domains, classes=("cat", "dog"), files=("1.png", "2.jpg")) -> Path:
    for domain in domains:
        for name in classes:
            for file in files:
                a_picture(root / domain / name / file)
    return root


def lists(folder: Path, form: str, domains, lines) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        text = "".join(f"{domain}/{line}\n" for line in lines)
        (folder / form.format(domain)).write_text(text)


def load(name: str, root: Path | None, **options):
    return parse("dataset", {"name": name, **options}).load(root)


def refusal(name: str, root: Path | None, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(name, root, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def shared() -> Path:
    """Data that the project may look at and not keep."""
    default = Path(__file__).parents[2] / "shared" / "data"
    place = Path(os.environ.get("FEDSIM_SHARED_DATA", default))
    if not place.is_dir():
        pytest.skip("no shared data: FEDSIM_SHARED_DATA names no folder, and there is none next to the repository")
    return place


# --- any folder


def test_a_folder_is_read_in_sorted_order_and_nothing_is_decoded(tmp_path):
    a_tree(tmp_path, ["b", "a"], classes=["dog", "alarm_clock"])
    (tmp_path / "a" / "dog" / "1.png").write_bytes(b"not looked at")
    images = load("folder", tmp_path)
    assert images.domains == ("a", "b")
    assert images.classes == ("alarm_clock", "dog")  # underscores and all
    assert images.names[:4] == ["a/alarm_clock/1.png", "a/alarm_clock/2.jpg", "a/dog/1.png", "a/dog/2.jpg"]
    assert images.y.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert images.domain.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert images.files[7] == tmp_path / "b" / "dog" / "2.jpg"
    assert images.open(7).size == (8, 8)


def test_what_is_no_image_in_a_folder_is_passed_over(tmp_path):
    a_tree(tmp_path, ["a"])
    for stray in ["readme.txt", "a/list.csv", "a/dog/notes.txt", "a/dog/._1.png", ".git/hooks/x", "a/.cache/1.png"]:
        (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stray).write_bytes(b"")
    assert load("folder", tmp_path).names == ["a/cat/1.png", "a/cat/2.jpg", "a/dog/1.png", "a/dog/2.jpg"]


def test_a_folder_given_relatively_is_found_from_another_working_directory(tmp_path, monkeypatch):
    a_tree(tmp_path / "mine", ["a"])
    monkeypatch.chdir(tmp_path)
    images = load("folder", Path("mine"))
    monkeypatch.chdir("/")
    assert images.open(0).size == (8, 8)


@pytest.mark.parametrize("name", ["folder", "pacs", "vlcs", "office_home", "domainnet", "features"])
def test_no_data_dir_is_refused(name):
    assert refusal(name, None).startswith(f"data set {name} ")


@pytest.mark.parametrize("name", ["folder", "pacs", "vlcs", "office_home", "domainnet"])
def test_a_data_dir_that_is_no_folder_is_refused(name, tmp_path):
    assert refusal(name, tmp_path / "nowhere").endswith(f"{tmp_path / 'nowhere'} is not a folder")
    assert refusal(name, a_picture(tmp_path / "x.png")).endswith("x.png is not a folder")


def test_a_folder_without_folders_is_refused(tmp_path):
    a_picture(tmp_path / "x.png")
    assert refusal("folder", tmp_path) == f"expected domain/class/file in {tmp_path}; there are no folders"


def test_domains_without_classes_are_refused(tmp_path):
    a_picture(tmp_path / "a" / "x.png")
    assert refusal("folder", tmp_path) == (
        f"expected domain/class/file in {tmp_path}; no class folders in: a; "
        "images are one level too high, directly in: a"
    )


def test_a_class_that_a_domain_lacks_is_named_with_the_domain(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    a_tree(tmp_path, ["b"], classes=["owl"])
    assert refusal("folder", tmp_path) == (
        "every class needs images in every domain; there are none in: a/owl; the classes are: cat, dog, owl; "
        "--dataset.classes chooses classes, --dataset.absent-classes true accepts this"
    )


def test_a_class_without_images_is_named_with_the_domain(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    for file in (tmp_path / "b" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert refusal("folder", tmp_path) == (
        f"every class needs images in every domain; there are none in: b/dog (2 .txt); images end in {ENDINGS}; the "
        "classes are: cat, dog; --dataset.classes chooses classes, --dataset.absent-classes true accepts this"
    )


def test_what_systems_and_tools_leave_in_a_tree_is_not_data(tmp_path):
    names = load("folder", a_tree(tmp_path, ["a", "b"])).names
    leftovers = [".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/._1.png"]
    leftovers += [".git/1.png", "Thumbs.db", "desktop.ini", "._1.png", "$RECYCLE.BIN/1.png", ".DS_Store"]
    for place in ["", "a", "a/dog", "b/cat/sub"]:
        for leftover in leftovers:
            a_picture((tmp_path / place / leftover).with_suffix(".png")).rename(tmp_path / place / leftover)
    images = load("folder", tmp_path)
    assert images.names == names and images.notes == ()


def test_files_that_do_not_end_like_images_are_counted(tmp_path):
    a_tree(tmp_path, ["a", "b"], files=["1.png", "2.JPG"])
    for file in ["a/cat/3.gif", "a/dog/3.gif", "b/cat/4.HEIC", "b/cat/README"]:
        (tmp_path / file).write_bytes(b"")
    images = load("folder", tmp_path)
    assert len(images) == 8
    assert images.notes == ("left out 4 files not named like an image: 1 without an ending, 2 .gif, 1 .heic",)


def test_the_endings_are_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert listing(IMG_EXTENSIONS) == ENDINGS


@pytest.mark.parametrize(
    "splits", [["train", "val", "test"], ["Training", "Testing"], ["valid", "photo"], ["validation", "train"]]
)
def test_splits_are_not_taken_for_visual_domains(tmp_path, splits):
    a_tree(tmp_path, splits)
    refused = listing(sorted(set(splits) - {"photo"}))
    assert refusal("folder", tmp_path) == (
        f"expected domain/class/file in {tmp_path}; {refused} are splits and not visual "
        "domains: join them, since fedsim splits each domain itself, or rename these folders"
    )


@pytest.mark.parametrize("splits", [["train", "test"], ["train", "val", "labels"], ["valid", "Training", "test"]])
def test_splits_are_not_taken_for_classes(tmp_path, splits):
    a_tree(tmp_path, ["a", "b"], classes=splits)
    assert refusal("folder", tmp_path) == (
        f"expected domain/class/file in {tmp_path}; where classes should be, there are splits: "
        f"{listing(sorted(splits))}"
    )


def test_train_is_a_class_where_no_other_split_is(tmp_path):
    assert load("folder", a_tree(tmp_path, ["a", "b"], classes=["bus", "train"])).classes == ("bus", "train")


def test_a_folder_alone_between_domain_and_classes_is_seen_through(tmp_path):
    for domain in ["amazon", "webcam"]:
        a_tree(tmp_path / domain, ["images"])
        (tmp_path / domain / "interest_points" / "cat").mkdir(parents=True)
    images = load("folder", tmp_path)
    assert images.domains == ("amazon", "webcam") and images.classes == ("cat", "dog")
    assert images.names[-1] == "webcam/images/dog/2.jpg"
    assert images.notes == (
        "classes are the folders in amazon/images, webcam/images, each of which is the only folder with images in its "
        "domain",
    )


def test_archives_unpacked_below_their_own_name_are_seen_through(tmp_path):
    for domain in DOMAINNET:
        a_tree(tmp_path / domain, [domain])
    assert load("domainnet", tmp_path).classes == ("cat", "dog")


def test_a_data_dir_one_level_too_high_is_refused(tmp_path):
    a_tree(tmp_path / "office", ["art", "photo"])
    assert refusal("folder", tmp_path) == (
        f"expected domain/class/file in {tmp_path}; art, photo in {tmp_path / 'office'} cannot be the classes: each "
        f"holds no images but the same folders, cat, dog; is {tmp_path / 'office'} what --data-dir should be?"
    )


def test_folders_inside_of_a_class_belong_to_it(tmp_path):
    a_tree(tmp_path, ["a", "b"], files=["one/1.png", "2.png"])
    assert load("folder", tmp_path).names[:2] == ["a/cat/2.png", "a/cat/one/1.png"]


@pytest.mark.parametrize(("link", "target"), [("a/cat/loop", ".."), ("a/loop", "../a"), ("b/dog/x", "."), ("c", ".")])
def test_a_link_that_leads_back_is_refused(tmp_path, link, target):
    a_tree(tmp_path, ["a", "b"])
    (tmp_path / link).symlink_to(target)
    assert "is a link back to" in refusal("folder", tmp_path)


def test_linked_folders_are_read_where_no_link_leads_back(tmp_path):
    a_tree(tmp_path / "disk", ["a", "b"])
    (tmp_path / "data").mkdir()
    for domain in ["a", "b"]:
        (tmp_path / "data" / domain).symlink_to(tmp_path / "disk" / domain)
    images = load("folder", tmp_path / "data")
    assert len(images) == 8 and images.notes == ()


def test_an_image_linked_into_its_own_class_is_one_image(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    (tmp_path / "a" / "cat" / "3.png").symlink_to("1.png")
    (tmp_path / "a" / "cat" / "more").symlink_to(tmp_path / "a" / "cat" / "sub")
    a_picture(tmp_path / "a" / "cat" / "sub" / "4.png")
    images = load("folder", tmp_path)
    assert images.names[:4] == ["a/cat/1.png", "a/cat/2.jpg", "a/cat/more/4.png", "a/dog/1.png"]
    assert images.notes == (
        "left out 2 links to images of the same class and domain, such as a/cat/3.png to a/cat/1.png",
    )


def test_an_image_linked_into_two_classes_is_told(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    (tmp_path / "b" / "dog" / "3.png").symlink_to(tmp_path / "a" / "cat" / "1.png")
    images = load("folder", tmp_path)
    assert len(images) == 9
    assert images.notes == ("1 image linked to a file of another class or domain, such as b/dog/3.png to a/cat/1.png",)


def test_class_names_of_macos_and_linux_are_one_class(tmp_path):
    linux, macos = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    a_tree(tmp_path, ["a"], classes=[linux])
    a_tree(tmp_path, ["b"], classes=[macos])
    a_tree(tmp_path, ["c"], classes=[linux, macos])
    images = load("folder", tmp_path)
    assert images.classes == (linux,) and images.y.tolist() == [0] * 8


def test_names_that_differ_only_in_capitals_are_refused_with_their_images(tmp_path):
    a_tree(tmp_path, ["Sketch", "sketch ", "photo"])
    assert refusal("folder", tmp_path) == (
        f"{tmp_path}: these domain names differ only in capitals or blanks: 'Sketch' (4 rows), 'sketch ' (4 rows)"
    )
    a_tree(tmp_path / "other", ["a", "b"], classes=["Cat", "cat"])
    assert "'Cat' (4 rows), 'cat' (4 rows)" in refusal("folder", tmp_path / "other")


def test_a_file_name_that_is_not_utf8_is_read_and_shown_by_its_bytes(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    os.rename(tmp_path / "a" / "cat" / "1.png", os.fsencode(tmp_path / "a" / "cat") + b"/caf\xe9.png")
    images = load("folder", tmp_path)
    assert images.names[1] == "a/cat/caf\\xe9.png"
    assert images.open(1).size == (8, 8) and images.fingerprint()


def test_a_class_folder_that_is_not_utf8_is_refused(tmp_path):
    a_tree(tmp_path, ["a"])
    os.rename(tmp_path / "a" / "cat", os.fsencode(tmp_path / "a") + b"/caf\xe9")
    assert refusal("folder", tmp_path).endswith("needs to be UTF-8; it is not in: 'caf\\udce9'")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    a_tree(tmp_path, ["a", "b"])
    closed = tmp_path / "a" / "cat" / "closed"
    closed.mkdir(mode=0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read every folder")
    with pytest.raises(PermissionError, match="closed"):
        load("folder", tmp_path)


# --- well-known sets, as they are on disks


@pytest.mark.parametrize("wrapped", ["", "kfold", "PACS", "PACS/kfold", "pacs/images"])
def test_pacs_is_found_in_what_archives_wrap_around_it(tmp_path, wrapped):
    a_tree(tmp_path / wrapped, PACS)
    images = load("pacs", tmp_path)
    assert list(images.domains) == PACS
    assert images.names[0] == "art_painting/cat/1.png"
    assert (images.split == UNASSIGNED).all()


@pytest.mark.parametrize("place", ["pacs/splits", "pacs", "pacs/images", "."])
def test_pacs_reads_the_authors_lists(tmp_path, place):
    a_tree(tmp_path / "pacs" / "images", PACS, files=["1.png", "2.png", "3.png"])
    if place == ".":
        tmp_path = tmp_path / "pacs"
    lists(tmp_path / place, "{}_train_kfold.txt", PACS, ["cat/1.png 1", "dog/2.png 2"])
    lists(tmp_path / place, "{}_crossval_kfold.txt", PACS, ["cat/3.png 1", "dog/3.png 2"])
    images = load("pacs", tmp_path, split="own")
    assert [name for name in images.names if name.startswith("photo")] == [
        "photo/cat/1.png",
        "photo/cat/3.png",
        "photo/dog/2.png",
        "photo/dog/3.png",
    ]
    assert images.split.tolist() == [TRAIN, VAL, TRAIN, VAL] * 4
    assert images.y.tolist() == [0, 0, 1, 1] * 4


def test_lists_outside_of_the_data_dir_are_not_read(tmp_path):
    a_tree(tmp_path / "pacs" / "images", PACS)
    lists(tmp_path / "pacs", "{}_train_kfold.txt", PACS, ["cat/1.png 1"])
    lists(tmp_path / "pacs", "{}_crossval_kfold.txt", PACS, ["dog/1.png 2"])
    assert len(load("pacs", tmp_path / "pacs", split="own")) == 8
    assert "photo_train_kfold.txt" in refusal("pacs", tmp_path / "pacs" / "images", split="own")


def test_own_split_without_lists_names_them(tmp_path):
    a_tree(tmp_path, PACS)
    sentence = refusal("pacs", tmp_path, split="own")
    assert f"{tmp_path} lacks art_painting_train_kfold.txt, cartoon_train_kfold.txt" in sentence
    assert sentence.endswith("split 'seeded' needs none")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cat/1.png", "photo_train_kfold.txt:1 needs 'domain/class/file number', not 'photo/cat/1.png'"),
        ("cat/9.png 1", "photo_train_kfold.txt:1 names photo/cat/9.png, which is not in "),
        ("dog/2.jpg 2", "photo_crossval_kfold.txt:1 names photo/dog/2.jpg, which another split has too"),
    ],
)
def test_a_bad_line_of_a_list_is_told_by_file_and_number(tmp_path, line, complaint):
    a_tree(tmp_path, PACS)
    lists(tmp_path, "{}_train_kfold.txt", PACS, ["cat/1.png 1"])
    lists(tmp_path, "{}_crossval_kfold.txt", PACS, ["dog/2.jpg 2"])
    lists(tmp_path, "{}_train_kfold.txt", ["photo"], [line])
    assert refusal("pacs", tmp_path, split="own").startswith(complaint)


def test_lists_are_read_as_windows_and_tabs_write_them(tmp_path):
    a_tree(tmp_path, PACS)
    for domain in PACS:
        lines = f"\ufeff{domain}/cat/1.png 1\r\n\r\n  {domain}/dog/2.jpg\t2  \r\n"
        (tmp_path / f"{domain}_train_kfold.txt").write_text(lines, encoding="utf-8", newline="")
    lists(tmp_path, "{}_crossval_kfold.txt", PACS, ["dog/1.png 2"])
    images = load("pacs", tmp_path, split="own")
    assert images.split.tolist() == [TRAIN, VAL, TRAIN] * 4
    assert images.notes == (f"left out 4 of 16 images, which no split file in {tmp_path} names",)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            ["cat/1.png 1", "cat/8.png 1", "dog/9.png 2"],
            "2 names photo/cat/8.png, which is not in {}, and 1 more of 17 lines name missing images",
        ),
        (["cat/1.png 2"], "1 gives photo/cat/1.png the number 2; other lines give cat 1"),
        (["dog/1.png 2", "owl/1.png 3"], "2 names photo/owl/1.png, which is not in {}"),
    ],
)
def test_lists_that_do_not_fit_the_images_are_refused(tmp_path, lines, complaint):
    a_tree(tmp_path, PACS)
    lists(tmp_path, "{}_train_kfold.txt", PACS, ["cat/1.png 1", "dog/1.png 2"])
    lists(tmp_path, "{}_crossval_kfold.txt", PACS, ["cat/2.jpg 1", "dog/2.jpg 2"])
    lists(tmp_path, "{}_train_kfold.txt", ["photo"], lines)
    assert refusal("pacs", tmp_path, split="own") == f"photo_train_kfold.txt:{complaint}".format(tmp_path)


def test_two_classes_of_one_number_are_refused(tmp_path):
    a_tree(tmp_path, PACS)
    lists(tmp_path, "{}_train_kfold.txt", PACS, ["cat/1.png 1", "dog/1.png 1"])
    lists(tmp_path, "{}_crossval_kfold.txt", PACS, ["cat/2.jpg 1"])
    assert refusal("pacs", tmp_path, split="own") == (
        "art_painting_train_kfold.txt:2 gives art_painting/dog/1.png the number 1, which is that of cat"
    )


def test_a_class_that_no_list_names_is_refused(tmp_path):
    a_tree(tmp_path, PACS)
    lists(tmp_path, "{}_train_kfold.txt", PACS, ["cat/1.png 1"])
    lists(tmp_path, "{}_crossval_kfold.txt", PACS, ["cat/2.jpg 1"])
    assert refusal("pacs", tmp_path, split="own").endswith("name no image of the classes: dog")


def test_two_folders_of_one_domain_are_not_chosen_between(tmp_path):
    a_tree(tmp_path, [*PACS, "Sketch_"])
    assert refusal("pacs", tmp_path) == (
        f"{tmp_path} has more than one folder for the domain sketch: 'Sketch_' (4 images), 'sketch' (4 images)"
    )


def test_domains_that_are_missing_are_told_with_those_that_there_are(tmp_path):
    a_tree(tmp_path / "PACS", PACS[:3])
    assert refusal("pacs", tmp_path) == (
        f"expected the folders art_painting, cartoon, photo, sketch; {tmp_path / 'PACS'} lacks sketch "
        "and has: art_painting, cartoon, photo"
    )


@pytest.mark.parametrize("name", ["pacs", "vlcs", "office_home", "domainnet"])
def test_a_wrong_root_is_told_what_was_expected_and_what_is_there(tmp_path, name):
    a_tree(tmp_path, ["north", "south"])
    sentence = refusal(name, tmp_path)
    assert sentence.startswith("expected the folders ")
    assert sentence.endswith("and has: north, south")
    (tmp_path / "empty").mkdir()
    assert refusal(name, tmp_path / "empty").endswith("and has: no folders")


def test_two_copies_of_a_set_are_not_chosen_between(tmp_path):
    a_tree(tmp_path / "small", PACS)
    a_tree(tmp_path / "large", PACS)
    assert refusal("pacs", tmp_path).endswith(f"there are: {tmp_path / 'large'}, {tmp_path / 'small'}")
    assert len(load("pacs", tmp_path / "small")) == 16


@pytest.mark.parametrize("real", ["Real World", "Real_World", "RealWorld", "Real", "real_world"])
def test_office_home_is_found_however_real_world_is_spelled(tmp_path, real):
    a_tree(tmp_path / "office_home", ["Art", "Clipart", "product", real], classes=["Alarm_Clock"])
    images = load("office_home", tmp_path)
    assert images.domains == ("Art", "Clipart", "Product", "Real World")
    assert images.classes == ("Alarm_Clock",)
    assert images.names[-1] == f"{real}/Alarm_Clock/2.jpg"


@pytest.mark.parametrize("folder", ["domain_net", "domain_net/splits"])
def test_domainnet_reads_the_authors_lists(tmp_path, folder):
    a_tree(tmp_path / "domain_net", DOMAINNET)
    lists(tmp_path / folder, "{}_train.txt", DOMAINNET, ["cat/1.png 0", "dog/1.png 1"])
    lists(tmp_path / folder, "{}_test.txt", DOMAINNET, ["cat/2.jpg 0"])  # dog/2.jpg: a duplicate, say
    images = load("domainnet", tmp_path, split="own")
    assert list(images.domains) == DOMAINNET
    assert images.split.tolist() == [TRAIN, TEST, TRAIN] * 6
    assert len(load("domainnet", tmp_path)) == 24


def test_vlcs_of_domainbed_is_read(tmp_path):
    a_tree(tmp_path / "VLCS", VLCS, classes=["bird", "car", "chair", "dog", "person"])
    images = load("vlcs", tmp_path)
    assert list(images.domains) == VLCS
    assert images.classes == ("bird", "car", "chair", "dog", "person")


def old_vlcs(root: Path) -> Path:
    for domain in ["CALTECH", "LABELME", "PASCAL", "SUN"]:
        for split in ["train", "crossval", "test"]:
            a_tree(root / "VLCS" / domain, [split], classes="01234", files=[f"{split}_imgs_1.jpg"])
            a_tree(root / "VLCS" / domain, ["full"], classes="01234", files=[f"{split}_imgs_1.jpg"])
    return root


def test_vlcs_in_numbered_folders_gets_names_and_no_image_twice(tmp_path):
    images = load("vlcs", old_vlcs(tmp_path))
    assert list(images.domains) == VLCS
    assert images.classes == ("bird", "car", "chair", "dog", "person")
    assert len(images) == 4 * 5 * 3
    assert images.names[5] == "CALTECH/crossval/0/crossval_imgs_1.jpg"
    assert (images.split == UNASSIGNED).all()


def test_vlcs_keeps_its_own_split(tmp_path):
    images = load("vlcs", old_vlcs(tmp_path), split="own")
    for code, name in [(TRAIN, "train"), (VAL, "crossval"), (TEST, "test")]:
        assert [f"/{name}/" in image for image in images.names] == (images.split == code).tolist()


def test_vlcs_with_a_sixth_number_is_refused(tmp_path):
    a_tree(tmp_path, VLCS, classes=["0", "1", "7"])
    assert refusal("vlcs", tmp_path) == (f"class folders in {tmp_path} have a name, or a number from 0 to 4; not: 7")


def test_vlcs_with_nothing_but_full_is_read(tmp_path):
    for domain in VLCS:
        a_tree(tmp_path / domain, ["full"], classes="01234")
    assert load("vlcs", tmp_path).names[0] == "Caltech101/full/0/1.png"


def test_vlcs_lacking_a_split_folder_is_refused(tmp_path):
    a_tree(tmp_path, VLCS, classes=["bird"])
    assert refusal("vlcs", tmp_path, split="own") == (
        f"expected the split folders train, crossval, test in {tmp_path / 'Caltech101'}; "
        "it lacks train, crossval, test and has: bird"
    )
    for domain in VLCS:
        (tmp_path / domain / "bird").rename(tmp_path / domain / "full")
    a_tree(tmp_path / "SUN09", ["train"])
    assert "it lacks crossval, test and has: full, train" in refusal("vlcs", tmp_path)


@pytest.mark.parametrize("level", ["full", "train"])
def test_vlcs_with_classes_next_to_splits_is_refused(tmp_path, level):
    a_tree(tmp_path, VLCS, classes=["bird"])
    a_tree(tmp_path / "SUN09", [level], classes=["bird"])
    assert refusal("vlcs", tmp_path) == (
        f"{tmp_path / 'SUN09'} has the folders of a split, {level}, and next to them others, "
        "which would not be read: bird"
    )


# --- features of one's own

HALF = pa.list_(pa.float16(), 2)
X = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]


def halves(rows) -> pa.Array:
    return pa.array([np.array(row, "<f2").tobytes() for row in rows], pa.binary(4))


def parquet(root: Path, *, classes=None, metadata=None, **rows) -> Path:
    classes = {"class": ["cat", "dog"], "prototype": [[3.0, 4.0], [0.0, 2.0]], **(classes or {})}
    table = pa.table({name: column for name, column in classes.items() if column is not None})
    pq.write_table(table.replace_schema_metadata(metadata), root / "classes.parquet")
    rows = {"feature": X, "label": ["cat", "dog", "cat"], "domain": ["b", "a", "b"], **rows}
    rows = {name: column for name, column in rows.items() if column is not None}
    pq.write_table(pa.table(rows), root / "features.parquet", row_group_size=2)
    return root


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pa.array(X, HALF), np.float16),
        (pa.array(X, pa.list_(pa.float16())), np.float16),
        (halves(X), np.float16),
        (pa.array(X, pa.list_(pa.float32(), 2)), np.float32),
        (pa.array(X, pa.large_list(pa.float32())), np.float32),
        (pa.array(X, pa.list_(pa.float64())), np.float32),
    ],
)
def test_features_come_as_halves_or_floats_in_every_usual_column(tmp_path, column, dtype):
    features = load("features", parquet(tmp_path, feature=column))
    assert features.x.dtype == dtype
    assert features.x.tolist() == X
    assert not features.x.flags.writeable


def test_features_have_labels_domains_and_unit_class_embeddings(tmp_path):
    features = load("features", parquet(tmp_path))
    assert features.classes == ("cat", "dog") and features.y.tolist() == [0, 1, 0]
    assert features.domains == ("a", "b") and features.domain.tolist() == [1, 0, 1]
    assert features.y.dtype == features.domain.dtype == np.int64
    assert (features.split == UNASSIGNED).all()
    assert features.class_embeddings.dtype == np.float64
    assert features.class_embeddings == pytest.approx(np.array([[0.6, 0.8], [0.0, 1.0]]))


def test_features_take_label_numbers_and_dictionaries_too(tmp_path):
    coded = pa.array(["b", "a", "b"]).dictionary_encode()
    features = load("features", parquet(tmp_path, label=pa.array([1, 0, 1], pa.int8()), domain=coded))
    assert features.y.tolist() == [1, 0, 1]
    assert features.domain.tolist() == [1, 0, 1]


def test_features_may_bring_their_split(tmp_path):
    assert load("features", parquet(tmp_path, split=["train", None, "test"])).split.tolist() == [
        TRAIN,
        UNASSIGNED,
        TEST,
    ]
    assert refusal("features", parquet(tmp_path, split=["train", "dev", "test"])) == (
        "features.parquet: split needs train, val, test or null, not: dev"
    )


def test_the_logit_scale_is_what_the_user_says_then_the_file_then_100(tmp_path):
    assert load("features", parquet(tmp_path)).logit_scale == 100
    parquet(tmp_path, metadata={"logit_scale": "12.5"})
    assert load("features", tmp_path).logit_scale == 12.5
    assert load("features", tmp_path, logit_scale=7).logit_scale == 7
    for wrong in ["high", "-1", "nan"]:
        assert refusal("features", parquet(tmp_path, metadata={"logit_scale": wrong})).endswith(f"not '{wrong}'")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"label": None}, "features.parquet lacks the columns label; it has: feature, domain"),
        ({"classes": {"prototype": None}}, "classes.parquet lacks the columns prototype; it has: class"),
        (
            {"feature": [[1, 0], [np.nan, 2], [3, np.inf]]},
            "features.parquet: feature needs finite numbers; NaN or infinite in 2 rows (1, 2)",
        ),
        (
            {"feature": [[1.0, 0.0], [None, 2.0], [3.0, 4.0]]},
            "features.parquet: feature needs finite numbers; NaN or infinite in 1 row (1)",
        ),
        (
            {"feature": [[1.0, 1e300], [0.0, 2.0], [3.0, 4.0]]},
            "features.parquet: feature needs finite numbers; NaN or infinite in 1 row (0)",
        ),
        ({"feature": pa.array([X[0], None, None], HALF)}, "features.parquet: feature is null in 2 rows (1, 2)"),
        ({"domain": ["a", None, "b"]}, "features.parquet: domain is null in 1 row (1)"),
        (
            {"feature": [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0, 5.0]]},
            "features.parquet: feature needs 2 numbers, like the first prototype; 3 in 1 row (2)",
        ),
        (
            {"feature": pa.array([[1.0] * 3] * 3, pa.list_(pa.float32(), 3))},
            "features.parquet: feature needs 2 numbers, like the first prototype; 3 in 3 rows (0, 1, 2)",
        ),
        (
            {"feature": [[1, 0], [0, 2], [3, 4]]},
            "features.parquet: feature needs lists of half, float or double, or the bytes of halves, "
            "not list<element: int64>",
        ),
        (
            {"feature": pa.array([b"abc"] * 3, pa.binary(3))},
            "features.parquet: feature needs 2 numbers, like the first prototype; 1.5 in 3 rows (0, 1, 2)",
        ),
        (
            {"feature": [1.0, 2.0, 3.0]},
            "features.parquet: feature needs lists of half, float or double, or the bytes of halves, not double",
        ),
        (
            {"label": ["cat", "owl", "elk"]},
            "features.parquet: labels that classes.parquet does not have: elk, owl; it has: cat, dog",
        ),
        (
            {"label": [0, 2, -1]},
            "features.parquet: numbers as labels need to be the rows of classes.parquet, all of 0 to 1; these are "
            "-1, 0, 2; or write the names of classes",
        ),
        (
            {"domain": [["a"], ["b"], ["a"]]},
            "features.parquet: domain needs text or integers, not list<element: string>",
        ),
        (
            {"classes": {"class": ["cat", "cat"]}},
            "classes.parquet needs each class once; more than once: cat",
        ),
        (
            {"classes": {"prototype": [[3.0, 4.0], [0.0, 0.0]]}},
            "classes.parquet: a prototype needs a length above 0, which these have not: dog",
        ),
        (
            {"classes": {"prototype": [[3.0, 4.0], [1.0]]}},
            "classes.parquet: prototype needs 2 numbers, like the first prototype; 1 in 1 row (1)",
        ),
        (
            {"classes": {"prototype": [[3.0, np.nan], [1.0, 0.0]]}},
            "classes.parquet: prototype needs finite numbers; NaN or infinite in 1 row (0)",
        ),
        ({"feature": pa.array([], HALF), "label": [], "domain": []}, "features.parquet has no rows"),
    ],
)
def test_features_that_cannot_be_used_are_refused(tmp_path, rows, complaint):
    assert refusal("features", parquet(tmp_path, **rows)) == complaint


def test_feature_files_that_are_missing_or_broken_are_told(tmp_path):
    assert refusal("features", tmp_path) == f"no classes.parquet in {tmp_path}; there is: nothing"
    parquet(tmp_path)
    (tmp_path / "features.parquet").rename(tmp_path / "feature.parquet")
    assert refusal("features", tmp_path) == (
        f"no features.parquet in {tmp_path}; there is: classes.parquet, feature.parquet"
    )
    whole = (tmp_path / "feature.parquet").read_bytes()
    (tmp_path / "features.parquet").write_bytes(whole[: len(whole) // 2])
    assert refusal("features", tmp_path).startswith(f"{tmp_path}/features.parquet is not whole and valid Parquet: ")


# --- glyphs


@pytest.fixture
def glyphs() -> Images:
    return load("glyphs", None)


@pytest.fixture
def by_concept() -> Images:
    return load("glyphs", None, split="concepts")


def test_glyphs_are_embedded_and_leave_the_split_to_the_partition(glyphs):
    assert all(isinstance(file, bytes) for file in glyphs.files)
    assert not glyphs.unseen_test and set(glyphs.split.tolist()) == {UNASSIGNED}
    assert unreadable(glyphs) == []


def test_glyphs_are_split_as_pacs_is_and_a_held_out_domain_is_tested_whole(glyphs):
    clients = make_clients(glyphs, parse("partition", "by_domain"), None, ("ink",), seed=0)
    assert clients.trainers == 4
    for client in (clients[k] for k in range(4)):
        rows = len(client.train), len(client.val), len(client.test)
        assert abs(rows[0] / sum(rows) - 0.6) < 0.01 and abs(rows[1] - rows[2]) <= 1
    ink = np.flatnonzero(glyphs.domain == glyphs.domains.index("ink"))
    assert clients[4].test.tolist() == ink.tolist()


def test_a_split_of_glyphs_by_concept_is_the_sets_own(by_concept):
    assert by_concept.unseen_test and set(by_concept.split.tolist()) == {TRAIN, VAL, TEST}


def test_no_glyph_is_tested_or_validated_on_a_concept_that_is_trained_on(by_concept):
    import fedsim

    table = pq.read_table(Path(fedsim.__file__).parent / "assets" / "glyphs" / "glyphs.parquet")
    splits_of = {}
    for concept, split in zip(table["concept"].to_pylist(), by_concept.split.tolist(), strict=True):
        splits_of.setdefault(concept, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_glyphs_have_every_class_in_every_domain(glyphs):
    cells = set(zip(glyphs.domain.tolist(), glyphs.y.tolist(), strict=True))
    assert len(cells) == len(glyphs.domains) * len(glyphs.classes)


def test_glyphs_take_no_data_dir(tmp_path):
    assert refusal("glyphs", tmp_path) == (
        f"data set glyphs is embedded and takes no --data-dir, but {tmp_path} was given"
    )


# --- images that cannot be decoded


def in_memory(files: list[bytes]) -> Images:
    zeros = np.zeros(len(files), np.int64)
    return Images(
        files=files,
        names=[f"image {row}" for row in range(len(files))],
        y=zeros,
        domain=zeros,
        classes=("cat",),
        domains=("a",),
        split=zeros.astype(np.int8),
    )


def encoded(kind: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    out = BytesIO()
    Image.fromarray(noise).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "whole",
    [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("WEBP")],
    ids=["jpeg", "progressive", "png", "webp"],
)
def test_a_truncated_image_is_found_wherever_it_ends(whole):
    images = in_memory([whole, whole[:-40], whole[: len(whole) // 2], whole[:40], b"", whole])
    assert [row for row, _ in unreadable(images)] == [1, 2, 3, 4]
    assert unreadable(images)[3] == (4, "the file is empty")
    for row, _ in unreadable(images):
        with pytest.raises(InputError, match=f"image {row} cannot be read: "):
            images.open(row)


def test_unreadable_files_come_by_index_with_a_reason(tmp_path):
    a_tree(tmp_path, ["a", "b"], files=[f"{n:03}.png" for n in range(50)])
    images = load("folder", tmp_path)
    images.files[150].write_text("<html>404</html>")
    images.files[3].unlink()
    found = unreadable(images, threads=4)
    assert [row for row, _ in found] == [3, 150]
    assert found[0][1] == "No such file or directory"
    assert found[1][1] == "no known image format"


def test_the_check_refuses_to_run_blindfold(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        unreadable(in_memory([]))


# --- every data set, by being there


@pytest.fixture
def a_root(tmp_path):
    """A small data set on disk for each name; a file in fedsim/datasets without one fails its tests."""

    def root_of(name: str) -> Path | None:
        if name == "glyphs":
            return None
        if name == "features":
            return parquet(tmp_path)
        if name == "image_folder":
            return a_tree(tmp_path, ["train", "test"])
        if name == "imagenet":
            (tmp_path / "classnames.txt").write_text("cat tabby\ndog beagle\n")
            return a_tree(tmp_path, ["train", "val"])
        if name == "coop":
            return a_split_file(a_tree(tmp_path, ["images"]))
        if name == "suite":
            for member in ("one", "two"):
                a_split_file(a_tree(tmp_path / member, ["images"]))
            return tmp_path
        if name == "huggingface":
            return parquet_shards(tmp_path)
        domains = {
            "pacs": PACS,
            "domainnet": DOMAINNET,
            "vlcs": VLCS,
            "office_home": ["Art", "Clipart", "Product", "Real"],
        }
        return a_tree(tmp_path, domains.get(name, ["a", "b"]))

    return root_of


def a_split_file(root: Path) -> Path:
    """CoOp's file for all images below `root / "images"`."""
    classes = ["dog", "cat"]
    items = [[f"{name}/{file}", k, name] for k, name in enumerate(classes) for file in ("1.png", "2.jpg")]
    splits = {"train": items[:2], "val": items[2:3], "test": items[3:]}
    (root / "split_zhou_Caltech101.json").write_text(json.dumps(splits))
    return root


def parquet_shards(root: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(4)]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}, features=kinds)
    rows.to_parquet(str(root / "train-00000-of-00001.parquet"))
    return root


MADE = {"synthetic"}  # on demand, without end: see test_population.py
THERE = sorted(set(available("dataset")) - MADE)


@pytest.mark.parametrize("name", THERE)
def test_every_data_set_keeps_the_contract(name, a_root):
    data = load(name, a_root(name))
    n = len(data)
    assert n > 0
    assert data.y.shape == data.domain.shape == data.split.shape == (n,)
    assert data.y.dtype == data.domain.dtype == np.int64 and data.split.dtype == np.int8
    assert set(data.y.tolist()) == set(range(len(data.classes)))
    assert set(data.domain.tolist()) == set(range(len(data.domains)))
    assert set(data.split.tolist()) <= {TRAIN, VAL, TEST, UNASSIGNED}
    assert isinstance(data.classes, tuple) and isinstance(data.domains, tuple)
    if isinstance(data, Features):
        assert data.x.shape == (n, data.class_embeddings.shape[1])
    else:
        assert len(data.files) == len(data.names) == len(set(data.names)) == n
        assert data.open(n - 1).convert("RGB").size
        assert data.take(np.array([n - 1, 0])).names == [data.names[n - 1], data.names[0]]


@pytest.mark.parametrize("name", THERE)
def test_every_data_set_loads_the_same_rows_twice(name, a_root):
    root = a_root(name)
    first, second = load(name, root), load(name, root)
    assert (first.y == second.y).all() and (first.domain == second.domain).all()
    assert isinstance(first, Features) or first.fingerprint() == second.fingerprint()


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="split"):
        parse("dataset", {"name": "pacs", "split": "mine"})


# --- data that the project may look at


def test_real_pacs_pictures_are_whole(shared):
    images = load("pacs", shared / "pacs_mini")
    assert len(images) == 4 * 7 * 12
    assert images.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert unreadable(images) == []


def test_real_features_are_told_apart_by_their_class_embeddings(shared):
    features = load("features", shared / "pacs_conse")
    assert features.x.shape == (9991, 384) and features.x.dtype == np.float16
    assert features.class_embeddings.shape == (7, 384)
    right = (features.x.astype(np.float32) @ features.class_embeddings.T).argmax(1) == features.y
    assert right.mean() > 2 / 7  # twice what guessing gives
