"""Which classes of a data set are used, and their names in the prompt."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim import Config, InputError, run
from fedsim.cli.flags import parse_run
from fedsim.registry import parse


def tree(root: Path, **classes: str) -> Path:
    """Domains with their classes, `ink="cat dog"`: two images of each."""
    for domain, names in classes.items():
        for name in names.split():
            (root / domain / name).mkdir(parents=True)
            for shade in (0, 90):
                Image.new("RGB", (8, 8), (shade, 0, 0)).save(root / domain / name / f"{shade}.png")
    return root


def load(root: Path | None, name: str = "folder", **options):
    return parse("dataset", {"name": name, **options}).load(root)


def refusal(root: Path | None, name: str = "folder", **options) -> str:
    with pytest.raises(InputError) as caught:
        load(root, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# --- a choice of classes


def test_only_the_chosen_classes_are_read_in_the_order_of_the_set(tmp_path):
    images = load(tree(tmp_path, ink="cat dog owl", oil="cat dog owl"), classes="owl,cat")
    assert images.classes == ("cat", "owl") and images.y.tolist() == [0, 0, 1, 1] * 2
    assert images.names[2] == "ink/owl/0.png"
    assert images.notes == ("left out 4 of 12 rows, of 1 other class",)


def test_a_class_that_is_not_chosen_may_be_absent_from_a_domain(tmp_path):
    images = load(tree(tmp_path, ink="cat dog", oil="cat dog owl yak"), classes=["cat", "dog"])
    assert images.classes == ("cat", "dog") and len(images) == 8
    assert images.notes == ("left out 4 of 12 rows, of 2 other classes",)


def test_all_classes_may_be_chosen(tmp_path):
    assert load(tree(tmp_path, ink="cat dog", oil="cat dog"), classes="cat,dog").notes == ()


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ("cat,fox,yak", "--dataset.classes names classes that do not exist: fox, yak; there are: cat, dog"),
        ("", "--dataset.classes needs the names of two classes or more, comma-separated, and has none"),
        ("cat, cat", "--dataset.classes needs the names of two classes or more, comma-separated, and has only 'cat'"),
    ],
)
def test_a_choice_that_is_none_is_refused(tmp_path, classes, sentence):
    assert refusal(tree(tmp_path, ink="cat dog"), classes=classes) == sentence


def test_a_domain_without_the_chosen_classes_is_refused(tmp_path):
    root = tree(tmp_path, ink="cat dog", oil="owl yak")
    for absent in (False, True):
        assert refusal(root, classes="cat,dog", absent_classes=absent) == (
            "no row of the chosen classes in the domains: oil"
        )


def test_the_split_of_a_set_holds_for_the_chosen_classes(tmp_path):
    domains = "art_painting", "cartoon", "photo", "sketch"
    tree(tmp_path, **dict.fromkeys(domains, "cat dog owl"))
    for domain in domains:
        lines = [f"{domain}/{name}/{{}}.png {k}\n" for k, name in enumerate(("cat", "dog", "owl"), 1)]
        (tmp_path / f"{domain}_train_kfold.txt").write_text("".join(line.format(0) for line in lines))
        (tmp_path / f"{domain}_crossval_kfold.txt").write_text("".join(line.format(90) for line in lines))
    images = load(tmp_path, "pacs", split="own", classes="dog,owl")
    assert images.classes == ("dog", "owl") and images.split.tolist() == [0, 1, 0, 1] * 4


def test_glyphs_and_features_have_the_choice_too(features_dir):
    glyphs = load(None, "glyphs")
    some = load(None, "glyphs", classes=",".join(glyphs.classes[3:5]))
    expected = [file for file, label in zip(glyphs.files, glyphs.y, strict=True) if label in (3, 4)]
    assert some.classes == glyphs.classes[3:5] and some.files == expected
    every, two = load(features_dir, "features"), load(features_dir, "features", classes="pig,dog")
    rows = np.flatnonzero(np.isin(every.y, (1, 3)))
    assert two.classes == ("dog", "pig") and np.array_equal(two.x, every.x[rows]) and not two.x.flags.writeable
    assert np.array_equal(two.class_embeddings, every.class_embeddings[[1, 3]])
    assert np.array_equal(two.y, every.y[rows] // 2)


def test_the_synthetic_set_keeps_its_number_of_classes():
    assert len(load(None, "synthetic", classes=3).classes) == 3


# --- absent classes


def test_absent_classes_are_accepted_if_asked_for_and_shown(tmp_path):
    images = load(tree(tmp_path, ink="cat dog owl", oil="cat"), absent_classes=True)
    assert images.classes == ("cat", "dog", "owl") and np.bincount(images.domain).tolist() == [6, 2]
    assert images.notes == ("oil lacks 2 of 3 classes: dog, owl",)


def test_features_of_a_class_may_be_absent_and_this_is_shown(features_dir):
    features = load(features_dir, "features", classes="cat,pig")
    assert features.notes == ("left out 180 of 360 rows, of 2 other classes",)


# --- names in the prompt


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classnames.txt", "n01440764 tench\n\nn01443537 great white shark\n"),
        ("names.txt", "\ufeffn01443537\tgreat white shark\nn01440764\ttench\n"),
        ("names.yaml", "n01440764: tench\nn01443537: great white shark\n"),
    ],
)
def test_a_file_gives_classes_the_names_for_the_prompt(tmp_path, file, text):
    root = tree(tmp_path / "set", ink="n01443537 n01440764")
    images = load(root, class_names=written(tmp_path / file, text))
    assert images.classes == ("tench", "great white shark") and images.names[0] == "ink/n01440764/0.png"


def test_classes_are_chosen_by_either_name_and_the_others_need_no_name(tmp_path):
    root, file = tree(tmp_path / "set", ink="n1 n2 n3"), written(tmp_path / "names.txt", "n1 tench\nn3 fox\n")
    for classes in ("n1,n3", "tench,fox", "n1,fox"):
        assert load(root, class_names=file, classes=classes).classes == ("tench", "fox")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("n1 tench\n", "the file of class names needs a name for every class; it has none for: n2"),
        ("n1 tench\nn2 fox\nn3 yak\n", "{} names classes that the data set does not have: n3; there are: n1, n2"),
        ("n1 tench\nn2 tench\n", "every class needs a name of its own; these have the same: 'tench' (n1, n2)"),
        ("n1 tench\nn2 Tench\n", "the names of the classes: these class names differ only in capitals or blanks: "),
        ("n1 tench\nn2\n", "names.txt:2 needs a class and its name, such as 'n01440764 tench', not 'n2'"),
        ("n1 tench\nn1 fox\n", "names.txt:2 names class n1 a second time"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path, text, sentence):
    root, file = tree(tmp_path / "set", ink="n1 n2"), written(tmp_path / "names.txt", text)
    assert refusal(root, class_names=file).startswith(sentence.format(file))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- n1\n", "{} must be a mapping of classes to names, got list"),
        ("n1: [tench]\nn2: fox\n", "{}: the name of class n1 needs to be text, not ['tench']"),
        ("n1: tench\nn2:\n", "{}: the name of class n2 needs to be text, not None"),
        ("n1: tench\nn1: fox\n", "{}, line 2, is not YAML: n1 is given twice"),
    ],
)
def test_a_yaml_file_of_names_that_does_not_fit_is_refused(tmp_path, text, sentence):
    root, file = tree(tmp_path / "set", ink="n1 n2"), written(tmp_path / "names.yaml", text)
    assert refusal(root, class_names=file) == sentence.format(file)


def test_a_file_of_names_that_is_missing_is_named(tmp_path):
    sentence = f"--dataset.class-names needs a file; {tmp_path / 'x.txt'} is none"
    assert refusal(tree(tmp_path / "set", ink="n1 n2"), class_names=tmp_path / "x.txt") == sentence


def test_underscores_are_kept_unless_spaces_are_asked_for(tmp_path):
    root = tree(tmp_path, ink="alarm_clock desk_lamp")
    assert load(root).classes == ("alarm_clock", "desk_lamp")
    assert load(root, spaces=True).classes == ("alarm clock", "desk lamp")
    assert load(root, spaces=True, classes="alarm clock,desk_lamp").classes == ("alarm clock", "desk lamp")
    tree(tmp_path, ink="alarm-clock")
    sentence = "every class needs a name of its own; these have the same: 'alarm clock' (alarm_clock, n1)"
    file = written(tmp_path / "names.txt", "")
    assert "needs a name for every class" in refusal(root, class_names=file)
    (root / "ink" / "alarm-clock").rename(root / "ink" / "n1")
    written(file, "n1 alarm clock\nalarm_clock alarm_clock\ndesk_lamp lamp\n")
    assert refusal(root, class_names=file, spaces=True) == sentence


# --- a run


def test_options_of_classes_are_flags_and_part_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tree(tmp_path / "set", ink="a_b n2 n3")
    argv = ["--dataset", "folder", "--data-dir", str(root), "--dataset.classes", "n2,a_b", "--dataset.spaces", "true"]
    config, _ = parse_run([*argv, "--dataset.class-names", "names.txt"])
    fields = config.experiment()["dataset"]
    assert fields["classes"] == ["n2", "a_b"] and fields["spaces"] is True
    assert fields["class_names"] == str(tmp_path / "names.txt")
    assert Config(**config.plain()) == config


def test_a_run_uses_the_chosen_classes_and_says_so(tmp_path):
    root = tree(tmp_path / "set", ink="n1 n2 n3", oil="n1 n2")
    file = written(tmp_path / "names.yaml", "n1: red square\nn2: dark square\n")
    fields = {"data_dir": root, "rounds": 1, "actors": 0, "out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    fields |= {"train_share": 0.5, "held_out": "oil"}
    dataset = {"name": "folder", "class_names": file, "classes": "n1,n2"}
    report = run(Config(dataset=dataset, **fields))
    assert report.classes == ["red square", "dark square"]
    assert report.facts["data_notes"] == "left out 2 of 10 rows, of 1 other class"
    written(file, "n1: red square\nn2: black square\n")
    with pytest.raises(InputError, match=r"the images, the class names or the weights behind .* have changed"):
        run(Config(dataset=dataset, **fields | {"rounds": 2}))
