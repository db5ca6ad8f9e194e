"""The classes of a data set that are used, and their names in the prompt: one rule for all data sets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from fedsim.datasets._labels import Images, Labels
from fedsim.datasets._names import canonical, canonical_names
from fedsim.datasets._walk import ENDINGS
from fedsim.errors import InputError, listing
from fedsim.yaml_files import read_mapping

Data = TypeVar("Data", bound=Labels)


def at_least_two(names: tuple[str, ...]) -> tuple[str, ...]:
    """A choice of classes, which a classifier can be evaluated on.

    Raises:
        InputError: there are fewer than two.
    """
    if len(names) < 2:
        given = f"only {names[0]!r}" if names else "none"
        raise InputError(f"--dataset.classes needs the names of two classes or more, comma-separated, and has {given}")
    return names


def arrange_classes(data: Data, names: Mapping[str, str], chosen: Sequence[str] | None, absent: bool) -> Data:
    """The rows of the chosen classes, with the names that go into the prompt.

    Args:
        names: the name in the prompt by the set's name; it may have more classes than the set.
        chosen: classes, by either name; None: all.
        absent: whether a domain may lack classes.

    Raises:
        InputError: a chosen class does not exist; a class has no name, or two have the same; a domain has no rows, or
            none of a class although it needs them.
    """
    if chosen is not None:
        data = _chosen(data, names, [canonical(name) for name in chosen])
    if unnamed := [name for name in data.classes if name not in names]:
        raise InputError(f"the file of class names needs a name for every class; it has none for: {listing(unnamed)}")
    lacking = _lacking(data)
    if empty := [data.domains[domain] for domain, classes in lacking.items() if len(classes) == len(data.classes)]:
        raise InputError(f"no row of the chosen classes in the domains: {listing(empty)}")
    if lacking and not absent:
        _refuse_absent(data, lacking)
    final = tuple(canonical(names[name]) for name in data.classes)
    if final != data.classes:
        _refuse_same(data.classes, final)
    return replace(data, classes=final, notes=(*data.notes, *_notes(data, final, lacking)))


def read_names(file: Path, classes: Sequence[str] | None = None) -> dict[str, str]:
    """The name in the prompt of each class, from a YAML mapping or a text file.

    A line of text is `n01440764 tench`: the set's name, a blank and the other name; a tab stands between them where the
    set's name has blanks itself.

    Args:
        classes: of the data set; None: the file may have names of others.

    Raises:
        InputError: the file is missing or not of that form; a name is empty, or given twice, or no class has it.
    """
    if not file.is_file():
        raise InputError(f"--dataset.class-names needs a file; {file} is none")
    yaml = file.suffix.lower() in (".yaml", ".yml")
    names = dict(_mapping(file)) if yaml else _lines(file)
    if classes is not None and (unknown := [name for name in names if name not in classes]):
        raise InputError(f"{file} names classes that the data set does not have: {listing(unknown)}; {_there(classes)}")
    return names


def _mapping(file: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for key, value in read_mapping(file, "classes to names").items():
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise InputError(f"{file}: the name of class {key} needs to be text, not {value!r}")
        names[canonical(str(key))] = str(value).strip()
    return names


def _lines(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows may put a mark at the start
    except UnicodeDecodeError as error:
        raise InputError(f"{file} needs to be UTF-8 text; {error}") from None
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, *rest = line.strip().split("\t" if "\t" in line.strip() else None, 1)
        if not rest or not rest[0].strip():
            raise InputError(
                f"{file.name}:{number} needs a class and its name, such as 'n01440764 tench', not {line!r}"
            )
        key = canonical(key.strip())
        if key in names:
            raise InputError(f"{file.name}:{number} names class {key} a second time")
        names[key] = rest[0].strip()
    return names


def _chosen(data: Data, names: Mapping[str, str], chosen: Sequence[str]) -> Data:
    index = {names[name]: label for label, name in enumerate(data.classes) if name in names}
    index |= {name: label for label, name in enumerate(data.classes)}  # the set's names come first
    if unknown := [name for name in chosen if name not in index]:
        raise InputError(
            f"--dataset.classes names classes that do not exist: {listing(unknown)}; {_there(data.classes)}"
        )
    labels = sorted({index[name] for name in chosen})
    if len(labels) < 2:
        at_least_two(tuple(data.classes[label] for label in labels))
    rows, others = len(data), len(data.classes) - len(labels)
    data = data.only(labels)
    left_out = f"left out {rows - len(data)} of {rows} rows, of {others} other class{'es' * (others > 1)}"
    return replace(data, notes=(*data.notes, left_out)) if others else data


def _there(classes: Sequence[str]) -> str:
    return f"there are: {listing(classes, 40)}"


def _lacking(data: Labels) -> dict[int, list[int]]:
    """The classes without a row in each domain, of domains that lack any."""
    present = np.zeros((len(data.domains), len(data.classes)), bool)
    present[data.domain, data.y] = True
    return {domain: np.flatnonzero(~row).tolist() for domain, row in enumerate(present) if not row.all()}


def _refuse_absent(data: Labels, lacking: Mapping[int, Sequence[int]]) -> None:
    cells = [(data.domains[domain], data.classes[label]) for domain, labels in lacking.items() for label in labels]
    others = data.other_files if isinstance(data, Images) else {}
    places = [f"{d}/{c} ({others[d, c]})" if (d, c) in others else f"{d}/{c}" for d, c in cells]
    endings = f"; images end in {listing(ENDINGS)}" if any(cell in others for cell in cells) else ""
    raise InputError(
        f"every class needs images in every domain; there are none in: {listing(places)}{endings}; the classes are: "
        f"{listing(data.classes)}; --dataset.classes chooses classes, --dataset.absent-classes true accepts this"
    )


def _refuse_same(classes: Sequence[str], final: Sequence[str]) -> None:
    """Refuses two classes with one name, which no prompt can tell apart."""
    count = Counter(final)
    if same := {
        name: [c for c, f in zip(classes, final, strict=True) if f == name] for name in count if count[name] > 1
    }:
        pairs = listing(f"{name!r} ({listing(group)})" for name, group in same.items())
        raise InputError(f"every class needs a name of its own; these have the same: {pairs}")
    canonical_names("class", count, "the names of the classes")


def _notes(data: Labels, names: Sequence[str], lacking: Mapping[int, Sequence[int]]) -> list[str]:
    """What is absent: classes from all domains, and those that only some domains lack."""
    nowhere = set.intersection(*map(set, lacking.values())) if len(lacking) == len(data.domains) else set()
    notes = []
    if nowhere:
        absent = listing(names[label] for label in sorted(nowhere))
        notes.append(f"{len(nowhere)} of {len(names)} classes compete without a row: {absent}")
    for domain, labels in lacking.items():
        if only_here := [names[label] for label in labels if label not in nowhere]:
            count = f"{len(only_here)} of {len(names)} classes"
            notes.append(f"{data.domains[domain]} lacks {count}: {listing(only_here, 4)}")
    return notes
