"""Ready-made features of any image tower: two Parquet files instead of images and a CLIP.

Source: ours.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyarrow import dataset as arrow
from pydantic import Field

from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, Features, FixedDataset
from fedsim.datasets._names import canonical_names
from fedsim.errors import InputError, listing
from fedsim.registry import component

pc: Any = pyarrow.compute  # a module that makes its functions when it is imported
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST, None: UNASSIGNED}
SCALES = 5, 1000  # logit scales of real models are 14 to 120; their logarithms and inverses are below


@component
class FeatureFiles(FixedDataset):
    """Reads `features.parquet` and `classes.parquet` in `--data-dir`, each a file or a folder of parts.

    Columns of `features.parquet`: `feature` (D numbers of nonzero norm: a list of half, float or double, a tensor, or
    the bytes of D little-endian halves), `label` (a class name, or a row of `classes.parquet`), `domain`, and
    optionally `split` (train, val, test or null), `owner` (text or integers: who becomes a client of the partition
    natural) and `group` (text or integers: a sensitive attribute, by which fairness is measured). Columns of
    `classes.parquet`: `class` (a name) and `prototype` (the class embedding, D numbers of nonzero norm). Numbers are
    read as halves or floats.
    """

    absent_classes: bool = True  # a class without rows competes by its prototype
    logit_scale: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="exp of the tower's temperature parameter (default: as classes.parquet says, or 100)",
    )

    def read(self, root: Path | None) -> Features:
        if root is None:
            raise InputError("data set features needs --data-dir, the folder of features.parquet")
        root = root.expanduser().absolute()
        classes_file, features_file = root / "classes.parquet", root / "features.parquet"
        table = _open(classes_file, ["class", "prototype"])
        classes = _class_names(_column(table, classes_file, "class"))
        class_embeddings = _matrix(table, classes_file, "prototype").astype(np.float64)
        length = np.linalg.norm(class_embeddings, axis=1, keepdims=True)
        if (length == 0).any():
            zero = listing(np.array(classes)[length[:, 0] == 0])
            raise InputError(f"classes.parquet: a prototype needs a length above 0, which these have not: {zero}")

        rows = _open(features_file, ["feature", "label", "domain"])
        y = _labels(_column(rows, features_file, "label"), classes, _names_of_numbers(rows))
        domain, domains = _named(_column(rows, features_file, "domain"), "domain")
        group, groups = None, ()
        if "group" in rows.schema.names:
            group, groups = _named(_column(rows, features_file, "group"), "group")
        x = _matrix(rows, features_file, "feature", class_embeddings.shape[1])
        if (zero := np.flatnonzero(~x.any(axis=1))).size:
            raise InputError(f"features.parquet: feature needs a length above 0; it is all zeros in {_rows(zero)}")
        # In float32, because methods divide by the length: rows outside of this range would become zeros.
        squares = np.einsum("nd,nd->n", x, x, dtype=np.float32)
        if (lost := np.flatnonzero(~((squares >= 1e-24) & np.isfinite(squares)))).size:
            raise InputError(
                f"features.parquet: feature needs a length from 1e-12 to 1.8e19; others are in {_rows(lost)}"
            )
        return Features(
            x=x,
            y=y,
            domain=domain,
            classes=classes,
            domains=domains,
            split=_splits(rows, features_file),
            owner=_owners(rows, features_file),
            group=group,
            groups=groups,
            class_embeddings=class_embeddings / length,  # float64, which a run in float32 rounds once
            logit_scale=self.logit_scale or _scale_of(table),
        )


def _open(file: Path, needed: Sequence[str]) -> arrow.Dataset:
    """Opens a Parquet file or a folder of parts, whose folder names may hold columns (`domain=ink/`).

    Raises:
        InputError: it does not exist, is damaged, has no rows or lacks a column.
    """
    if not file.exists():
        present = listing(sorted(entry.name for entry in file.parent.glob("*"))) or "nothing"
        raise InputError(f"no {file.name} in {file.parent}; there is: {present}")
    with _arrow_errors(file):
        checked = arrow.ParquetFileFormat(
            default_fragment_scan_options=arrow.ParquetFragmentScanOptions(page_checksum_verification=True)
        )
        data = arrow.dataset(str(file), format=checked, partitioning="hive")
        rows = data.count_rows()
    columns = data.schema.names
    if not rows:
        raise InputError(f"{file.name} has no rows")
    if absent := [name for name in needed if name not in columns]:
        raise InputError(f"{file.name} lacks the columns {listing(absent)}; it has: {listing(columns)}")
    return data


@contextmanager
def _arrow_errors(file: Path) -> Iterator[None]:
    """Turns errors of Arrow into one sentence."""
    try:
        yield
    except UnicodeError:
        raise InputError(f"{str(file)!a} cannot be read: its path is not UTF-8") from None
    except (pa.ArrowException, OSError) as error:  # which may add lines of its own
        raise InputError(f"{file} is not whole and valid Parquet: {str(error).splitlines()[0]}") from None


def _column(data: arrow.Dataset, file: Path, name: str) -> pa.ChunkedArray:
    """A column of text or integers without nulls; dictionaries are decoded."""
    kind = data.schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or pa.types.is_integer(kind)):
        why = " (pandas makes integers double where one is missing)" if pa.types.is_floating(kind) else ""
        raise InputError(f"{file.name}: {name} needs text or integers, not {kind}{why}")
    with _arrow_errors(file):
        column = data.to_table([name])[name].cast(pa.large_string() if text else pa.int64())
    if column.null_count:
        raise InputError(f"{file.name}: {name} is null in {_rows(np.flatnonzero(column.is_null().to_numpy()))}")
    return column


def _matrix(data: arrow.Dataset, file: Path, name: str, width: int | None = None) -> np.ndarray:
    """(N, D) float16 if the column holds halves, otherwise float32; read in batches, so only once in memory.

    Raises:
        InputError: not numbers, not D per row, null, NaN or infinite.
    """
    what, kind = f"{file.name}: {name}", _storage_type(data.schema.field(name).type)
    binary = _is_binary(kind)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (binary or (lists and pa.types.is_floating(kind.value_type))):
        raise InputError(f"{what} needs lists of half, float or double, or the bytes of halves, not {kind}")
    half = binary or pa.types.is_float16(kind.value_type)

    start, null, other, wrong = 0, [], [], []
    x = np.empty((0, width or 0), np.float32)
    with _arrow_errors(file):
        # Small batches: a list cannot hold 2**31 numbers, and memory may not hold a column and its matrix.
        for batch in data.to_batches([name], batch_size=1 << 13, batch_readahead=4, fragment_readahead=1):
            array = batch.column(0)
            array = array.storage if isinstance(array, pa.ExtensionArray) else array
            widths = _widths(array)
            if width is None:
                width = max(0, int(widths[0]))
            if not start:
                x = np.empty((data.count_rows(), width), np.float16 if half else np.float32)
            nulls = array.is_null().to_numpy(zero_copy_only=False)
            unlike = ~nulls & (widths != width)
            null.append(start + np.flatnonzero(nulls))
            other += [(start + row, widths[row]) for row in np.flatnonzero(unlike)]
            if not (nulls | unlike).any():
                part = x[start : start + len(array)]
                with np.errstate(over="ignore"):  # a double too large for a float becomes infinite, and is refused
                    part[:] = _numbers(array, width).reshape(part.shape)
                wrong.append(start + np.flatnonzero(~np.isfinite(part).all(axis=1)))
            start += len(array)
    if (rows := np.concatenate(null)).size:
        raise InputError(f"{what} is null in {_rows(rows)}")
    if other:
        given = listing(f"{width:g}" for width in sorted({width for _, width in other}))
        rows = _rows(np.array([row for row, _ in other]))
        raise InputError(f"{what} needs {width} numbers, like the first prototype; {given} in {rows}")
    if (rows := np.concatenate(wrong)).size:
        raise InputError(f"{what} needs finite numbers; NaN or infinite in {_rows(rows)}")
    x.flags.writeable = False
    return x


def _storage_type(kind: pa.DataType) -> pa.DataType:
    """The storage type of an extension type, such as Arrow's fixed-shape tensor."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _widths(array: pa.Array) -> np.ndarray:
    """(n,) numbers in each row; -1 for a null."""
    if _is_binary(array.type):
        return pc.binary_length(array).fill_null(-1).to_numpy(zero_copy_only=False) / 2
    return pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False)


def _numbers(array: pa.Array, width: int) -> np.ndarray:
    """(n * width,) the numbers of n rows of this width; a null in a list becomes NaN."""
    if not _is_binary(array.type):
        return array.flatten().to_numpy(zero_copy_only=False)
    array = array.cast(pa.binary(2 * width))
    raw = np.frombuffer(array.buffers()[1], np.uint8)[2 * width * array.offset :]
    return raw[: 2 * width * len(array)].view("<f2")


def _class_names(column: pa.ChunkedArray) -> tuple[str, ...]:
    spellings = column.to_pylist()
    names = canonical_names("class", _counts(column), "classes.parquet")
    classes = tuple(names[spelling] for spelling in spellings)
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise InputError(f"classes.parquet needs each class once; more than once: {listing(twice)}")
    return classes


def _counts(column: pa.ChunkedArray) -> dict[Any, int]:
    """How many rows each spelling has."""
    return {value["values"]: value["counts"] for value in pc.value_counts(column).to_pylist()}


def _codes(column: pa.ChunkedArray, name_of: Mapping[Any, str], names: Sequence[str]) -> np.ndarray:
    """(N,) int64, the index of each row's name in `names`."""
    code_of = {name: code for code, name in enumerate(names)}
    coded = column.combine_chunks().dictionary_encode()
    codes = np.array([code_of[name_of[spelling]] for spelling in coded.dictionary.to_pylist()], np.int64)
    return codes[coded.indices.to_numpy()]


def _named(column: pa.ChunkedArray, kind: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 into the sorted distinct names of domains or groups; and these names."""
    name_of = canonical_names(kind, _counts(column), "features.parquet")
    names = tuple(sorted(set(name_of.values())))
    return _codes(column, name_of, names), names


def _labels(column: pa.ChunkedArray, classes: tuple[str, ...], named: Sequence[str] | None) -> np.ndarray:
    """(N,) int64 rows of `classes.parquet`.

    An integer is a name in the metadata of Hugging Face's datasets; or the class of that name, if all classes are named
    by integers; otherwise a row of `classes.parquet`.

    Args:
        named: the class of each integer by such metadata; None without it.
    """
    counts = _counts(column)
    name_of: Mapping[Any, str]
    if not pa.types.is_integer(column.type):
        name_of = canonical_names("class", counts, "features.parquet: label")
    elif named is not None:
        name_of = {number: named[int(number)] if 0 <= number < len(named) else str(number) for number in counts}
    elif all(name.removeprefix("-").isdecimal() for name in classes):
        name_of = {number: str(number) for number in counts}
    else:
        if set(counts) != set(range(len(classes))):
            raise InputError(
                f"features.parquet: numbers as labels need to be the rows of classes.parquet, all of 0 to "
                f"{len(classes) - 1}; these are {listing(sorted(counts))}; or write the names of classes"
            )
        name_of = dict(enumerate(classes))
    if unknown := sorted(set(name_of.values()) - set(classes)):
        raise InputError(
            f"features.parquet: labels that classes.parquet does not have: {listing(unknown)}; "
            f"it has: {listing(classes)}"
        )
    return _codes(column, name_of, classes)


def _names_of_numbers(data: arrow.Dataset) -> list[str] | None:
    """The names of the integers in `label`, if Hugging Face's datasets has written them (ClassLabel)."""
    try:
        about = json.loads((data.schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]
        return [str(name) for name in about["names"]] if about["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def _splits(data: arrow.Dataset, file: Path) -> np.ndarray:
    if "split" not in data.schema.names:
        return np.full(data.count_rows(), UNASSIGNED, np.int8)
    with _arrow_errors(file):
        names = data.to_table(["split"])["split"].to_pylist()
    if unknown := set(names) - SPLITS.keys():
        given = listing(sorted(map(str, unknown)))
        raise InputError(f"features.parquet: split needs train, val, test or null, not: {given}")
    return np.array([SPLITS[name] for name in names], np.int8)


def _owners(data: arrow.Dataset, file: Path) -> np.ndarray | None:
    """(N,) int64, owners numbered in the order of their names."""
    if "owner" not in data.schema.names:
        return None
    return np.unique(_column(data, file, "owner").to_numpy(), return_inverse=True)[1].astype(np.int64)


def _scale_of(table: arrow.Dataset) -> float:
    text = (table.schema.metadata or {}).get(b"logit_scale", b"100").decode(errors="replace")
    try:
        scale = float(text)
    except ValueError:
        scale = np.nan
    if not 0 < scale < np.inf:
        raise InputError(f"classes.parquet: logit_scale in the metadata needs a number above 0, not {text!r}")
    if not SCALES[0] <= scale <= SCALES[1]:
        guess = f", and {scale:g} looks like the logarithm of {np.exp(scale):.4g}" if 1 <= scale < SCALES[0] else ""
        guess = f", and {scale:g} looks like its inverse, {1 / scale:.4g}" if scale < 1 else guess
        raise InputError(
            f"classes.parquet: logit_scale in the metadata is what cosines are multiplied with, {SCALES[0]} to "
            f"{SCALES[1]}{guess}; --dataset.logit_scale {scale:g} takes it as it is"
        )
    return scale


def _rows(rows: np.ndarray) -> str:
    return f"{len(rows)} row{'s' * (len(rows) > 1)} ({listing(rows)})"
