"""Sets of the Hugging Face hub, or in its formats on a disk: Parquet shards, or a folder written by `save_to_disk`.

Source: the library datasets, huggingface/datasets, which is an optional dependency.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, FixedDataset, Images
from fedsim.datasets._names import canonical_names
from fedsim.datasets._tree import checked
from fedsim.errors import InputError, Stopped, first_line, listing
from fedsim.registry import component

SPLITS = {"train": TRAIN, "validation": VAL, "valid": VAL, "val": VAL, "test": TEST}
DOMAIN = "images"  # of sets without a domain column


@component
class HuggingFace(FixedDataset):
    """Reads `--data-dir`, or `--dataset.hub` from the hub, which keeps its own cache of downloads.

    Each image is read as the bytes of its file. Splits called train, validation and test are used as they are; without
    a validation split, validation rows are drawn from the train rows. The only split of a set is split by the
    partition's seed.
    """

    hub: str | None = Field(
        None,
        description="a set of the hub, OWNER/NAME (default: the files in --data-dir)",
    )
    subset: str | None = Field(None, description="a configuration of the hub's set (default: its only one)")
    image: str = Field("image", description="column of images")
    label: str = Field("label", description="column of classes: class labels with names, or strings")
    domain: str | None = Field(None, description="column of visual domains (default: one domain)")
    owner: str | None = Field(None, description="column of owners, which become the clients of partition natural")
    group: str | None = Field(None, description="column of a sensitive attribute, by which fairness is measured")

    def read(self, root: Path | None) -> Images:
        tables = self._open(root)
        splits = {name: tables[name] for name in sorted(tables, key=lambda name: (SPLITS.get(name, 3), name))}
        where = self.hub or root
        if len(splits) > 1 and (unknown := [name for name in splits if name not in SPLITS]):
            raise InputError(f"{where} has splits other than train, validation and test: {listing(unknown)}")
        files, names, labels, domains, codes, owners, values = [], [], [], [], [], [], []
        for split, table in splits.items():
            self._check(table, where)
            rows = len(table)
            files.append(table)
            names += [f"{split}/{row}" for row in range(rows)]
            labels += _names_of(table, self.label, where)
            domains += _names_of(table, self.domain, where) if self.domain else [DOMAIN] * rows
            owners += table.with_format("numpy")[self.owner][:].tolist() if self.owner and rows else []
            values += _names_of(table, self.group, where) if self.group else []
            codes += [SPLITS[split] if len(splits) > 1 else UNASSIGNED] * rows
        y, classes = _numbers("class", labels, _order(splits, self.label), where)
        domain, domain_names = _numbers("domain", domains, [], where)
        group, groups = _numbers("group", values, [], where) if self.group else (None, ())
        return Images(
            files=_Column(files, self.image),
            names=names,
            y=y,
            domain=domain,
            classes=classes,
            domains=domain_names,
            split=np.array(codes, np.int8),
            owner=self._numbered(owners, where),
            group=group,
            groups=groups,
        )

    def _open(self, root: Path | None) -> dict[str, Any]:
        """The set's tables by split."""
        try:
            import datasets
        except ImportError:
            raise InputError(
                "data set huggingface needs the library datasets, which is not installed: uv sync --extra huggingface"
            ) from None
        if self.hub is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", self.hub):
            raise InputError(f"dataset.hub must be OWNER/NAME, got {self.hub!r}")
        if (self.hub is None) == (root is None):
            raise InputError(
                "data set huggingface needs --dataset.hub OWNER/NAME, or a folder as --data-dir, and not both"
            )
        datasets.disable_progress_bars()
        if self.hub:
            try:
                return _by_name(datasets.load_dataset(self.hub, self.subset))
            except ValueError as error:  # no such subset
                raise InputError(f"the hub's set {self.hub} cannot be loaded: {first_line(error)}") from None
            except OSError as error:  # no network, or no such set: offline, the library does not tell them apart
                raise Stopped(f"the hub's set {self.hub} cannot be loaded: {first_line(error)}") from None
        root = checked(root, "huggingface")
        from datasets.exceptions import DatasetsError

        try:
            return self._open_folder(root)
        except (OSError, ValueError, DatasetsError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{root} cannot be read: {first_line(error)}") from None

    def _open_folder(self, root: Path) -> dict[str, Any]:
        import datasets

        if (root / "dataset_dict.json").exists() or (root / "dataset_info.json").exists():
            table = datasets.load_from_disk(str(root))
            return _by_name(table) if isinstance(table, datasets.DatasetDict) else {"train": table}
        shards: dict[str, list[str]] = {}
        for file in sorted(root.rglob("*.parquet")):
            shards.setdefault(_split_of(file), []).append(str(file))
        if not shards:
            raise InputError(f"expected Parquet shards, or a folder written by save_to_disk, in {root}; there are none")
        return _by_name(datasets.load_dataset("parquet", data_files=shards))

    def _numbered(self, owners: list[Any], where: object) -> np.ndarray | None:
        """(N,) owners numbered in the order of their names."""
        if self.owner is None:
            return None
        if any(not isinstance(owner, str | int) for owner in owners):
            raise InputError(f"{where}: column {self.owner} needs text or integers, one for each row")
        return np.unique(np.array(owners), return_inverse=True)[1].astype(np.int64)

    def _check(self, table: Any, where: object) -> None:
        import datasets

        for column in filter(None, (self.image, self.label, self.domain, self.owner, self.group)):
            if column not in table.features:
                raise InputError(f"{where} has no column {column!r}; there are: {listing(table.features)}")
        if not isinstance(kind := table.features[self.image], datasets.Image):
            raise InputError(f"{where}: column {self.image} needs to hold images, not {kind}")


class _Column(Sequence[Path | bytes]):
    """The bytes of the images of several tables, read from their memory-mapped files."""

    def __init__(self, tables: list[Any], column: str) -> None:
        import datasets

        self.tables = [
            table.select_columns([column]).cast_column(column, datasets.Image(decode=False)) for table in tables
        ]
        self.starts = np.cumsum([0, *map(len, tables)])
        self.column = column

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        table = int(np.searchsorted(self.starts, index, "right")) - 1
        entry = self.tables[table][int(index - self.starts[table])][self.column]
        # A set may hold the path of a file in place of its bytes.
        return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"])


def _by_name(splits: Any) -> dict[str, Any]:
    return {str(name): table for name, table in splits.items()}


def _split_of(file: Path) -> str:
    """The split of a shard, `train-00000-of-00002.parquet` or `test/0000.parquet`, as the hub names them."""
    for name in (file.name.split("-")[0].split(".")[0].lower(), file.parent.name.lower()):
        if name in SPLITS:
            return {VAL: "validation"}.get(SPLITS[name], name)
    return "train"


def _names_of(table: Any, column: str, where: object) -> list[str]:
    """The names in a column of class labels or strings."""
    import datasets

    kind = table.features[column]
    values = table.with_format("numpy")[column][:] if len(table) else []
    if isinstance(kind, datasets.ClassLabel):
        return [kind.names[int(value)] if value >= 0 else "" for value in values]
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        return [str(value) for value in values]
    raise InputError(f"{where}: column {column} needs class labels with names, or strings, not {kind}")


def _order(splits: dict[str, Any], column: str) -> list[str]:
    """The names of class labels in the order of their numbers; none if the column holds strings."""
    return next((list(getattr(table.features[column], "names", None) or []) for table in splits.values()), [])


def _numbers(
    kind: str, names: Iterable[str], order: Sequence[str], where: object
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) indices of names, in the given order or sorted, and the names that occur."""
    distinct, inverse, counts = np.unique(np.array(list(names)), return_inverse=True, return_counts=True)
    spelling = canonical_names(kind, dict(zip(distinct.tolist(), counts.tolist(), strict=True)), where)
    rank = {name: k for k, name in enumerate(order)}
    ordered = sorted(set(spelling.values()), key=lambda name: (rank.get(name, len(rank)), name))
    index = np.array([ordered.index(spelling[name]) for name in distinct.tolist()], np.int64)
    return index[inverse], tuple(ordered)
