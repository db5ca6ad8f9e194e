"""Names of classes and domains: what is one name, and what is refused."""

import unicodedata

import numpy as np
import pytest

from fedsim.datasets._names import canonical_names
from fedsim.errors import InputError


def refusal(kind, rows, where="data") -> str:
    with pytest.raises(InputError) as caught:
        canonical_names(kind, rows, where)
    return str(caught.value)


def test_names_stay_as_they_are():
    names = {"alarm_clock": 3, "Alarm Bell": 1, "café": 2, "7": 1}
    assert canonical_names("class", names, "data") == {name: name for name in names}


def test_a_name_in_the_forms_of_macos_and_linux_is_one_name():
    linux, macos = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert linux != macos
    assert canonical_names("class", {linux: 2, macos: 3}, "data") == {linux: linux, macos: linux}


@pytest.mark.parametrize("other", ["Photo", "photo ", " photo", "PHOTO", "pho to", "photo\xa0", "photo\n"])
def test_names_that_differ_in_capitals_or_blanks_are_refused_with_their_rows(other):
    first, second = sorted([("photo", 30), (other, 4)])
    assert refusal("domain", {"ink": 9, "photo": 30, other: 4}, "features.parquet") == (
        "features.parquet: these domain names differ only in capitals or blanks: "
        f"{first[0]!r} ({first[1]} rows), {second[0]!r} ({second[1]} rows)"
    )


def test_rows_of_one_name_in_two_forms_are_counted_together_in_a_refusal():
    linux, macos = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert refusal("class", {linux: 2, macos: 3, "Café": 1}).endswith("blanks: 'Café' (1 row), 'café' (5 rows)")


def test_words_that_only_fold_alike_are_two_names():
    assert len(set(canonical_names("class", {"Maße": 1, "Masse": 1}, "data").values())) == 2


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), "", "  ", "\t"])
def test_rows_without_a_name_are_counted_and_refused(missing):
    assert refusal("domain", {"ink": 9, missing: 3}) == (
        "data: every row needs a domain; 3 of 12 have none (null, NaN or blank)"
    )


def test_a_name_that_is_not_utf8_is_refused():
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert refusal("class", {"cat": 1, name: 1}) == (
        "data: the name of a class needs to be UTF-8; it is not in: 'caf\\udce9'"
    )


def test_a_number_is_named_by_its_digits():
    assert canonical_names("class", {0: 2, 1: 3}, "data") == {0: "0", 1: "1"}
