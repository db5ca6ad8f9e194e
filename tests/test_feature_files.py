"""Features from files: what their labels, domains and numbers mean, or one sentence on why that cannot be known."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.errors import InputError
from fedsim.registry import parse

X = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [2.0, 1.0]]
LABELS, DOMAINS = ["cat", "dog", "owl", "dog"], ["ink", "oil", "ink", "oil"]
CLASSES, PROTOTYPES = ["cat", "dog", "owl"], [[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]]


def save(root: Path, *, classes=None, about=None, scale=None, **rows) -> Path:
    """Writes the two files; columns are replaced by name, and left out where they are None."""
    columns = {"class": CLASSES, "prototype": PROTOTYPES, **(classes or {})}
    metadata = scale and {"logit_scale": scale}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), root / "classes.parquet")
    rows = {"feature": X, "label": LABELS, "domain": DOMAINS, **rows}
    table = pa.table({name: column for name, column in rows.items() if column is not None})
    pq.write_table(table.replace_schema_metadata(about), root / "features.parquet")
    return root


def load(root: Path, **options):
    return parse("dataset", {"name": "features", **options}).load(root)


def refusal(root: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def named(features) -> list[str]:
    return [features.classes[label] for label in features.y]


# --- labels


@pytest.mark.parametrize("kind", [int, str])
def test_numbers_that_classes_are_called_by_are_names_in_whatever_order_they_come(tmp_path, kind):
    order = [2, 0, 1]
    classes = {"class": [kind(number) for number in order], "prototype": [PROTOTYPES[number] for number in order]}
    features = load(save(tmp_path, classes=classes, label=[0, 1, 2, 1]))
    assert named(features) == ["0", "1", "2", "1"]
    assert features.class_embeddings[features.y[0]] == pytest.approx([0.6, 0.8])
    assert load(save(tmp_path, classes=classes, label=["0", "1", "2", "1"])).y.tolist() == features.y.tolist()


def test_numbers_with_names_by_hugging_face_are_these_names(tmp_path):
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["owl", "cat", "dog"]}}}}
    save(tmp_path, label=[1, 2, 0, 2], about={"huggingface": json.dumps(about)})
    assert named(load(tmp_path)) == LABELS
    about["info"]["features"]["label"]["names"] = ["owl", "cat", "Dog"]
    save(tmp_path, label=[1, 2, 0, 2], about={"huggingface": json.dumps(about)})
    assert refusal(tmp_path) == (
        "features.parquet: labels that classes.parquet does not have: Dog; it has: cat, dog, owl"
    )


@pytest.mark.parametrize("labels", [[1, 2, 3, 2], [0, 2, 0, 2], [-1, 0, 1, 2]])
def test_numbers_of_classes_that_have_other_names_are_rows_and_may_not_skip_any(tmp_path, labels):
    assert named(load(save(tmp_path, label=[0, 1, 2, 1]))) == LABELS
    assert refusal(save(tmp_path, label=labels)) == (
        "features.parquet: numbers as labels need to be the rows of classes.parquet, all of 0 to 2; these are "
        f"{', '.join(str(label) for label in sorted(set(labels)))}; or write the names of classes"
    )


def test_a_class_without_rows_is_said(tmp_path):
    assert load(save(tmp_path)).notes == ("ink lacks 1 of 3 classes: dog", "oil lacks 2 of 3 classes: cat, owl")
    features = load(save(tmp_path, label=["cat", "dog", "cat", "dog"]))
    assert features.notes[0] == "1 of 3 classes compete without a row: owl"


@pytest.mark.parametrize("name", ["label", "domain"])
@pytest.mark.parametrize(
    "column, kind",
    [
        ([0.0, 1.0, 2.0, np.nan], "double (pandas makes integers double where one is missing)"),
        ([True, False, True, False], "bool"),
        ([b"cat", b"dog", b"owl", b"dog"], "binary"),
    ],
)
def test_labels_and_domains_are_text_or_integers(tmp_path, name, column, kind):
    save(tmp_path, **{name: pa.array(column)})
    assert refusal(tmp_path) == f"features.parquet: {name} needs text or integers, not {kind}"


def test_every_kind_of_text_and_integer_is_read(tmp_path):
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for kind in kinds:
        columns = {name: pa.array(column).cast(kind) for name, column in (("label", LABELS), ("domain", DOMAINS))}
        features = load(save(tmp_path, **columns))
        assert named(features) == LABELS and features.domains == ("ink", "oil")
    features = load(save(tmp_path, domain=pa.array([10, 2, 10, 2], pa.uint8())))
    assert features.domains == ("10", "2") and features.domain.tolist() == [0, 1, 0, 1]


def test_names_that_differ_only_in_capitals_or_blanks_are_refused(tmp_path):
    assert refusal(save(tmp_path, domain=["ink", "oil", "Ink", "oil "])) == (
        "features.parquet: these domain names differ only in capitals or blanks: 'Ink' (1 row), 'ink' (1 row), "
        "'oil' (1 row), 'oil ' (1 row)"
    )
    classes = {"class": ["cat", "dog", "Cat"]}
    assert refusal(save(tmp_path, classes=classes)).startswith(
        "classes.parquet: these class names differ only in capit"
    )
    assert "every row needs a class" in refusal(save(tmp_path, classes={"class": ["cat", "dog", " "]}))


def test_one_name_in_two_forms_of_unicode_is_one_name(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    save(tmp_path, classes={"class": [composed, "dog", "owl"]}, label=[decomposed, "dog", "owl", composed])
    assert named(load(tmp_path)) == [composed, "dog", "owl", composed]
    save(tmp_path, domain=[decomposed, "oil", composed, "oil"])
    assert load(tmp_path).domains == (composed, "oil")


# --- numbers


def test_a_row_of_zeros_has_no_direction_and_is_refused(tmp_path):
    rows = [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    expected = "features.parquet: feature needs a length above 0; it is all zeros in 2 rows (0, 2)"
    assert refusal(save(tmp_path, feature=rows)) == expected
    assert refusal(save(tmp_path, feature=pa.array(rows, pa.list_(pa.float16(), 2)))) == expected


def test_rows_that_have_no_length_in_floats_are_refused(tmp_path):
    rows = [[3e-13, 4e-13], [3e30, 4e30], [0.0, 1e-11], [3e18, 4e18]]
    expected = "features.parquet: feature needs a length from 1e-12 to 1.8e19; others are in 2 rows (0, 1)"
    assert refusal(save(tmp_path, feature=rows)) == expected
    assert len(load(save(tmp_path, feature=rows[2:] * 2))) == 4


def test_tensors_of_fixed_shape_and_bytes_of_any_kind_are_read(tmp_path):
    storage = pa.array(X, pa.list_(pa.float32(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 1)), storage)
    assert load(save(tmp_path, feature=tensors)).x.tolist() == X
    halves = [np.array(row, "<f2").tobytes() for row in X]
    for kind in (pa.binary(), pa.large_binary(), pa.binary(4)):
        features = load(save(tmp_path, feature=pa.array(halves, kind)))
        assert features.x.dtype == np.float16 and features.x.tolist() == X
    floats = pa.array([np.array(row, "<f4").tobytes() for row in X])
    assert refusal(save(tmp_path, feature=floats)) == (
        "features.parquet: feature needs 2 numbers, like the first prototype; 4 in 4 rows (0, 1, 2, 3)"
    )


def test_a_column_that_is_sliced_when_it_is_written_keeps_its_rows(tmp_path):
    save(tmp_path, feature=pa.array([[9.0, 9.0], *X], pa.list_(pa.float32(), 2)).slice(1))
    assert load(tmp_path).x.tolist() == X


def test_many_batches_are_read_in_order_and_rows_are_counted_over_all_of_them(tmp_path):
    n = 20_000  # more than two batches
    x = np.stack([np.arange(1, n + 1), np.ones(n)], axis=1).astype(np.float32)
    columns = {"label": np.resize(LABELS, n), "domain": np.resize(DOMAINS, n)}
    assert np.array_equal(load(save(tmp_path, feature=list(x), **columns)).x, x)
    x[[3, 15_000]] = np.nan
    assert refusal(save(tmp_path, feature=list(x), **columns)) == (
        "features.parquet: feature needs finite numbers; NaN or infinite in 2 rows (3, 15000)"
    )


def test_prototypes_keep_the_precision_that_float64_needs_and_are_the_same_in_float32(tmp_path):
    class_embeddings = np.array(PROTOTYPES, np.float32) * np.float32(1.1)
    found = load(save(tmp_path, classes={"prototype": list(class_embeddings)})).class_embeddings
    expected = class_embeddings.astype(np.float64) / np.linalg.norm(
        class_embeddings.astype(np.float64), axis=1, keepdims=True
    )
    assert found.dtype == np.float64 and np.array_equal(found, expected)
    assert abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-15


@pytest.mark.parametrize(
    "scale, guess",
    [
        ("4.605170249938965", ", and 4.60517 looks like the logarithm of 100"),
        ("2.6593", ", and 2.6593 looks like the logarithm of 14.29"),
        ("0.07", ", and 0.07 looks like its inverse, 14.29"),
        ("1e30", ""),
    ],
)
def test_a_logit_scale_that_looks_like_a_logarithm_or_an_inverse_is_refused_unless_it_is_insisted_on(
    tmp_path, scale, guess
):
    save(tmp_path, scale=scale)
    assert refusal(tmp_path) == (
        f"classes.parquet: logit_scale in the metadata is what cosines are multiplied with, 5 to 1000{guess}; "
        f"--dataset.logit_scale {float(scale):g} takes it as it is"
    )
    if float(scale) < 1e6:
        assert load(tmp_path, logit_scale=float(scale)).logit_scale == float(scale)


# --- files


def test_a_folder_of_parts_is_read_whether_or_not_its_folders_name_the_domains(tmp_path):
    table = pq.read_table(save(tmp_path) / "features.parquet")
    for partitioned in ([], ["domain"]):
        folder = tmp_path / f"{len(partitioned)}"
        folder.mkdir()
        os.link(tmp_path / "classes.parquet", folder / "classes.parquet")
        pq.write_to_dataset(table, folder / "features.parquet", partition_cols=partitioned)
        (folder / "features.parquet" / "_SUCCESS").touch()
        features = load(folder)
        order = [X.index(row) for row in features.x.tolist()]
        assert sorted(order) == [0, 1, 2, 3]
        assert named(features) == [LABELS[row] for row in order]
        assert [features.domains[k] for k in features.domain] == [DOMAINS[row] for row in order]


def test_a_folder_without_parts_has_no_rows(tmp_path):
    save(tmp_path)
    (tmp_path / "features.parquet").unlink()
    (tmp_path / "features.parquet").mkdir()
    assert refusal(tmp_path) == "features.parquet has no rows"


def test_a_damaged_page_is_noticed_by_its_checksum(tmp_path):
    save(tmp_path)
    table = pq.read_table(tmp_path / "features.parquet")
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(table, tmp_path / "features.parquet", **options)
    whole = (tmp_path / "features.parquet").read_bytes()
    place = whole.index(np.array([1.0, 0.0, 0.0, 2.0]).tobytes())
    (tmp_path / "features.parquet").write_bytes(whole[: place + 6] + bytes([whole[place + 6] ^ 1]) + whole[place + 7 :])
    assert refusal(tmp_path).startswith(f"{tmp_path / 'features.parquet'} is not whole and valid Parquet: ")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    save(tmp_path)
    table = pa.Table.from_arrays(
        [pa.array(X), pa.array(LABELS), pa.array(LABELS), pa.array(DOMAINS)],
        names=["feature", "label", "label", "domain"],
    )
    pq.write_table(table, tmp_path / "features.parquet")
    assert "duplicate field names" in refusal(tmp_path)


def test_a_path_that_is_not_utf8_is_said(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    save(tmp_path)
    for name in ("classes.parquet", "features.parquet"):
        (tmp_path / name).rename(folder / name)
    assert refusal(folder).endswith("classes.parquet' cannot be read: its path is not UTF-8")


def test_pandas_frames_are_read_as_they_are_written(tmp_path):
    frame = pd.DataFrame({"feature": [np.array(row) for row in X], "label": LABELS, "domain": DOMAINS})
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(tmp_path / "features.parquet")
    pd.DataFrame({"prototype": PROTOTYPES}, index=pd.Index(CLASSES, name="class")).to_parquet(
        tmp_path / "classes.parquet"
    )
    features = load(tmp_path)
    assert features.x.tolist() == X and named(features) == LABELS
