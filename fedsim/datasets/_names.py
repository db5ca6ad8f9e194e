"""Names of classes and domains: one rule for all data sets."""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from fedsim.errors import InputError, counted, listing

Spelling = TypeVar("Spelling")


def canonical(name: str) -> str:
    """The name in Unicode's form NFC: macOS may write `é` as two code points, and Linux as one."""
    return unicodedata.normalize("NFC", name)


def canonical_names(kind: str, rows: Mapping[Spelling, int], where: object) -> dict[Spelling, str]:
    """The canonical name of each spelling in a data set; spellings that are equal in NFC share it.

    Names that differ only in capitals or blanks are equal to CLIP's tokenizer, and usually meant to be. They are
    refused instead of merged: only the user knows which is right.

    Args:
        kind: "class" or "domain", for the message.
        rows: the number of rows (images) of each spelling; None and NaN stand for rows without a name.
        where: the file or folder, for the message.

    Raises:
        InputError: rows have no name or a blank one; a name is not valid Unicode; or two names differ only in
            capitals or blanks. The message gives the names and their numbers of rows.
    """
    if unnamed := sum(count for name, count in rows.items() if _is_missing(name)):
        raise InputError(
            f"{where}: every row needs a {kind}; {unnamed} of {sum(rows.values())} have none (null, NaN or blank)"
        )
    names = {spelling: canonical(str(spelling)) for spelling in rows}
    if wrong := [ascii(name) for name in names.values() if not _is_unicode(name)]:
        raise InputError(f"{where}: the name of a {kind} needs to be UTF-8; it is not in: {listing(wrong)}")

    alike: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for spelling, name in names.items():
        alike["".join(name.lower().split())][name] += rows[spelling]
    if clashes := [group for _, group in sorted(alike.items()) if len(group) > 1]:
        counts = [f"{name!r} ({counted(count, 'row')})" for group in clashes for name, count in sorted(group.items())]
        raise InputError(f"{where}: these {kind} names differ only in capitals or blanks: {listing(counts)}")
    return names


def _is_missing(name: object) -> bool:
    return name is None or name != name or not str(name).strip()  # only NaN differs from itself


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a file name whose bytes are not UTF-8 becomes surrogates in Python
        return False
    return True
