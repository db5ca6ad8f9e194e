"""Several data sets in one federation, such as the nine recognition sets of FedTPG.

Source: the federation of FedTPG, Qiu et al., ICLR 2024, arXiv 2310.06123, and its code, boschresearch/FedTPG, commit
f141c29 (federated/server.py, dataloader/dm_federated.py).
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from fedsim.datasets import TEST, Dataset, FixedDataset, Images
from fedsim.datasets._tree import checked
from fedsim.datasets._walk import folders
from fedsim.errors import InputError, listing
from fedsim.fields import parts_of
from fedsim.registry import component, name_of, parse

MEMBER = "coop"  # the data set of a member that names none
Members = dict[str, dict[str, Any]]


def _members(value: Any) -> Members | None:
    """The folder, the data set and its fields by the name of each member."""
    if value is None:
        return None
    if isinstance(value, str):
        value = parts_of(value)
    if isinstance(value, list | tuple):
        pairs = [str(part).partition("=") for part in value]
        names = [name.strip() for name, _, _ in pairs]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"dataset.members has two members of one name: {listing(twice)}")
        value = {name: folder.strip() or name for name, (_, _, folder) in zip(names, pairs, strict=True)}
    if not isinstance(value, dict) or not value:
        raise InputError(f"dataset.members must map the name of each data set to its folder, got {value!r}")
    names = [str(name).strip() for name in value]
    if not all(names) or len({name.lower() for name in names}) < len(names):
        raise InputError(
            f"every member needs a name, and not one that differs only in capitals; got {listing(map(repr, names))}"
        )
    return {name: _member(name, each) for name, each in zip(names, value.values(), strict=True)}


def _member(name: str, value: Any) -> dict[str, Any]:
    """`dtd`, or {"folder": "dtd", "name": "coop", ...} -> the latter, with all fields of that data set."""
    fields = {"folder": value} if isinstance(value, str) else value or {}
    if not isinstance(fields, dict):
        raise InputError(f"member {name} must be a folder or a mapping of its fields, got {value!r}")
    fields = {"folder": name} | fields
    if not isinstance(folder := fields.pop("folder"), str) or not folder:
        raise InputError(f"member {name}: folder must be the name of a folder in --data-dir, got {folder!r}")
    try:
        dataset = parse("dataset", fields, MEMBER)
    except InputError as error:
        raise InputError(f"member {name}: {error}") from None
    if not isinstance(dataset, FixedDataset):
        raise InputError(f"member {name}: data set {name_of(dataset)} cannot be a member of a suite")
    if dataset.domain_groups:
        raise InputError(f"member {name}: its rows are of one domain, and so of one group; leave out domain_groups")
    options = {field: getattr(dataset, field) for field in vars(type(dataset))["__pydantic_fields__"]}
    return {"folder": folder, "name": name_of(dataset)} | options


@component
class Suite(Dataset):
    """`--data-dir` holds the folders of the members; each becomes a domain with classes of its own.

    Classes of one set compete with each other only; in the training of a client with rows of several sets (partition
    iid, for example) the classes of all of these compete. Each class has the text of its set, unless `--prompt` gives
    another. New classes are the last of each set; with these, local, base and new are means over the sets, as in
    FedTPG. A held-out set with its own test rows is tested on these. Partition `domain_classes` gives each client
    classes of one set. Tables show the class banded of the member dtd as dtd/banded.

    In YAML, `members` maps names to folders or to fields: `{dtd: dtd, pets: {folder: oxford_pets, name: coop}}`.
    """

    members: Annotated[Members | None, BeforeValidator(_members)] = Field(
        None,
        description="NAME=FOLDER of each set, comma-separated; =FOLDER may be left out, and the sets are those of coop "
        "(default: every folder in --data-dir)",
    )

    def load(self, root: Path | None) -> Images:
        root = checked(root, "suite")
        members = self.members or _members([folder.name for folder in folders(root)])
        assert members is not None
        sets = {name: _load(root, name, **fields) for name, fields in members.items()}
        _check_tests(sets)
        labels = np.cumsum([0, *(len(data.classes) for data in sets.values())])
        return Images(
            files=[file for data in sets.values() for file in data.files],
            names=[f"{name}/{image}" for name, data in sets.items() for image in data.names],
            y=np.concatenate([data.y + first for data, first in zip(sets.values(), labels, strict=False)]),
            domain=np.repeat(np.arange(len(sets)), [len(data) for data in sets.values()]),
            classes=tuple(name for data in sets.values() for name in data.classes),
            domains=tuple(sets),
            split=np.concatenate([data.split for data in sets.values()]),
            notes=tuple(f"{name}: {note}" for name, data in sets.items() for note in data.notes),
            template=tuple(template for data in sets.values() for template in _templates(data)),
            class_domain=tuple(k for k, data in enumerate(sets.values()) for _ in data.classes),
        )


def _load(root: Path, member: str, folder: str, name: str, **fields: Any) -> Images:
    if not (root / folder).is_dir():
        has = listing(each.name for each in folders(root)) or "none"
        raise InputError(f"member {member} of the suite needs the folder {root / folder}; folders there: {has}")
    try:
        data = parse("dataset", {"name": name} | fields).load(root / folder)
    except InputError as error:
        raise InputError(f"member {member}: {error}") from None
    if not isinstance(data, Images) or not isinstance(data.files, list) or len(data.domains) > 1:
        raise InputError(f"member {member} must be image files of one domain; data set {name} has others")
    return data


def _templates(data: Images) -> tuple[str | None, ...]:
    """The template of each class."""
    return data.template if isinstance(data.template, tuple) else (data.template,) * len(data.classes)


def _check_tests(sets: dict[str, Images]) -> None:
    """Refuses sets with and without test rows of their own, because these are drawn for all alike, or for none."""
    without = [name for name, data in sets.items() if not (data.split == TEST).any()]
    if 0 < len(without) < len(sets):
        others = [name for name in sets if name not in without]
        raise InputError(
            f"the members of a suite need test rows of their own, or none may have them: {listing(others)} with, "
            f"{listing(without)} without"
        )
