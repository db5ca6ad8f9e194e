"""Features of your own, from any image tower: two Parquet files in place of images and a CLIP.

Source: ours.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from fedsim.datasets import TEST, TRAIN, UNSAID, VAL, Dataset, Features
from fedsim.errors import InputError, listing
from fedsim.registry import component

SPLITS = {"train": TRAIN, "val": VAL, "test": TEST, None: UNSAID}


@component
class FeatureFiles(Dataset):
    """Reads `features.parquet` and `classes.parquet` in `--data-dir`.

    `features.parquet`: `feature` (D numbers: a list, a list of fixed size, or the bytes of D little-endian
    halves), `label` (a class name, or its row in `classes.parquet`), `domain`, and perhaps `split` (train,
    val, test or null). `classes.parquet`: `class` (its name), `prototype` (D numbers, of any length but 0).

    """

    logit_scale: float | None = Field(
        None, gt=0, description="exp of the tower's temperature; none given: as classes.parquet says, or 100"
    )

    def load(self, root: Path | None) -> Features:
        if root is None:
            raise InputError("data set features wants --data-dir, the folder of features.parquet; none was given")
        root = root.expanduser().absolute()
        table = _read(root / "classes.parquet", ["class", "prototype"])
        classes = _class_names(table["class"])
        prototypes = _matrix(table["prototype"], "classes.parquet: prototype").astype(np.float64)
        length = np.linalg.norm(prototypes, axis=1, keepdims=True)
        if (length == 0).any():
            zero = listing(np.array(classes)[length[:, 0] == 0])
            raise InputError(f"classes.parquet: a prototype wants a length above 0, not that of: {zero}")

        rows = _read(root / "features.parquet", ["feature", "label", "domain"], ["split"])
        domain, domains = _codes(rows["domain"])
        return Features(
            file=None,
            x=_matrix(rows["feature"], "features.parquet: feature", prototypes.shape[1]),
            y=_labels(rows["label"], classes),
            domain=domain,
            classes=classes,
            domains=domains,
            split=_splits(rows),
            prototypes=(prototypes / length).astype(np.float32),
            logit_scale=self.logit_scale or _scale_of(table),
        )


def _read(file: Path, wanted: list[str], perhaps: Sequence[str] = ()) -> pa.Table:
    if not file.is_file():
        there = listing(sorted(entry.name for entry in file.parent.glob("*"))) or "nothing"
        raise InputError(f"no {file.name} in {file.parent}; there is: {there}")
    try:
        parquet = pq.ParquetFile(file)
        columns = parquet.schema_arrow.names
        if absent := [name for name in wanted if name not in columns]:
            raise InputError(f"{file.name} lacks the columns {listing(absent)}; it has: {listing(columns)}")
        table = parquet.read([name for name in (*wanted, *perhaps) if name in columns])
    except (pa.ArrowException, OSError) as error:  # pyarrow may add lines of its own to the sentence
        raise InputError(f"{file} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    if not len(table):
        raise InputError(f"{file.name} has no rows")
    for name in wanted:
        if table[name].null_count:
            nulls = np.flatnonzero(table[name].is_null().to_numpy())
            raise InputError(f"{file.name}: {name} is null in {_rows(nulls)}")
    return table


def _matrix(column: pa.ChunkedArray, what: str, width: int | None = None) -> np.ndarray:
    """(N, D) float16 if the column holds halves, float32 otherwise.

    Raises:
        InputError: not numbers, not D of them in each row, NaN or infinite.
    """
    array, kind = column.combine_chunks(), column.type
    if pa.types.is_fixed_size_binary(kind):
        raw = np.frombuffer(array.buffers()[1], np.uint8)
        raw = raw[array.offset * kind.byte_width :][: len(array) * kind.byte_width]
        widths = np.full(len(array), kind.byte_width // 2)
        values = raw.view("<f2") if kind.byte_width % 2 == 0 else None
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        widths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        flat = array.flatten()
        # A null inside a list becomes NaN here, and is refused with it below.
        values = flat.to_numpy(zero_copy_only=False) if pa.types.is_floating(flat.type) else None
    else:
        values = None
    if values is None:
        raise InputError(f"{what} wants lists of half, float or double, or bytes of halves, not {kind}")

    width = int(widths[0]) if width is None else width
    if (wrong := np.flatnonzero(widths != width)).size:
        came = listing(sorted(set(widths[wrong].tolist())))
        raise InputError(f"{what} wants {width} numbers, like the first prototype; {came} in {_rows(wrong)}")
    with np.errstate(over="ignore"):  # a double too large for a float becomes infinite, and is refused below
        x = values.astype(np.float16 if values.dtype == np.float16 else np.float32, copy=False)
    x = x.reshape(len(array), width)
    if (bad := np.flatnonzero(~np.isfinite(x).all(axis=1))).size:
        raise InputError(f"{what} wants finite numbers; NaN or infinite in {_rows(bad)}")
    x.flags.writeable = False
    return x


def _class_names(column: pa.ChunkedArray) -> tuple[str, ...]:
    names = [str(name) for name in column.to_pylist()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"classes.parquet wants each class once; more than once: {listing(twice)}")
    return tuple(names)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 into the sorted distinct values, and these."""
    try:
        coded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    except pa.ArrowException:
        raise InputError(f"features.parquet: label and domain want text or integers, not {column.type}") from None
    found = coded.dictionary.to_pylist()
    names = sorted(found)
    return np.array([names.index(name) for name in found])[coded.indices.to_numpy()], tuple(names)


def _labels(column: pa.ChunkedArray, classes: tuple[str, ...]) -> np.ndarray:
    if pa.types.is_integer(column.type):
        y = column.to_numpy().astype(np.int64)
        if unknown := sorted(set(y[(y < 0) | (y >= len(classes))].tolist())):
            raise InputError(
                f"features.parquet: label wants a row of classes.parquet, 0 to {len(classes) - 1}, "
                f"not: {listing(unknown)}"
            )
        return y
    y, names = _codes(column)
    if unknown := [name for name in names if name not in classes]:
        raise InputError(
            f"features.parquet: labels that classes.parquet does not have: {listing(unknown)}; "
            f"it has: {listing(classes)}"
        )
    return np.array([classes.index(name) for name in names])[y]


def _splits(rows: pa.Table) -> np.ndarray:
    if "split" not in rows.column_names:
        return np.full(len(rows), UNSAID, np.int8)
    names = rows["split"].to_pylist()
    if unknown := set(names) - SPLITS.keys():
        came = listing(sorted(map(str, unknown)))
        raise InputError(f"features.parquet: split wants train, val, test or null, not: {came}")
    return np.array([SPLITS[name] for name in names], np.int8)


def _scale_of(table: pa.Table) -> float:
    said = (table.schema.metadata or {}).get(b"logit_scale", b"100").decode()
    try:
        scale = float(said)
    except ValueError:
        scale = np.nan
    if not 0 < scale < np.inf:
        raise InputError(f"classes.parquet: logit_scale in the metadata wants a number above 0, not {said!r}")
    return scale


def _rows(rows: np.ndarray) -> str:
    return f"{len(rows)} row{'s' * (len(rows) > 1)} ({listing(rows)})"
