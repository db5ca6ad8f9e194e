"""The tables of a run on disk: Parquet files and facts.yaml, whole or not at all, each with a digest."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedsim.config import EXECUTION
from fedsim.errors import InputError, listing
from fedsim.files import Damaged, atomic, digest
from fedsim.folder import CONFIG, intact, read_sealed, write_sealed
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.tables import COLUMNS, Tables

FACTS = "facts.yaml"
FILES = (FACTS, *(f"{name}.parquet" for name in COLUMNS))


def write_tables(tables: Tables, folder: Path) -> None:
    """Writes `FILES` next to the config of a run."""
    about = {name: getattr(tables, name) for name in ("domains", "classes", "class_domain", "facts")}
    write_sealed(folder / FACTS, to_yaml(about))
    for name in COLUMNS:
        write_table(folder / f"{name}.parquet", getattr(tables, name))


def read_tables(folder: Path) -> Tables:
    """The tables of a finished run, from its folder.

    Raises:
        InputError: it is not the folder of a finished run, or a file is damaged or of another version.
    """
    remedy = f"leave {folder} out, or run its experiment in another folder"
    missing = [file for file in (CONFIG, *FILES) if not (folder / file).is_file()]
    # First of all, since an earlier version wrote other files.
    config = {} if CONFIG in missing else yaml.safe_load(read_sealed(folder / CONFIG, remedy))
    if missing:
        raise InputError(f"{folder} is not a finished run of fedsim: it lacks {listing(missing)}")
    about = yaml.safe_load(read_sealed(folder / FACTS, remedy))
    tables = {}
    for name, columns in COLUMNS.items():
        with intact(file := folder / f"{name}.parquet", remedy):
            tables[name] = read_table(file)[list(columns)]
    if len(tables["rounds"]) < config["rounds"]:
        raise InputError(f"{folder} is not finished: it has {len(tables['rounds'])} of {config['rounds']} rounds")
    experiment = {field: value for field, value in config.items() if field not in EXECUTION}
    return Tables(experiment, held_out=experiment["held_out"], **about, **tables)


def write_table(file: Path, table: pd.DataFrame) -> None:
    """Writes Parquet with a digest of the values in its metadata; whole or not at all."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**arrow.schema.metadata, b"fedsim": _digest(arrow).encode()}
    with atomic(file) as stream:
        pq.write_table(arrow.replace_schema_metadata(metadata), stream)


def read_table(file: Path) -> pd.DataFrame:
    """Reads what `write_table` wrote.

    Raises:
        Damaged: a value is not as it was written, or the file is another one.
        OSError: there is no such file, for example.
    """
    try:
        arrow = pq.read_table(pa.BufferReader(file.read_bytes()))
        stated = (arrow.schema.metadata or {}).get(b"fedsim", b"")
        if stated == _digest(arrow).encode():
            # Without pandas' own metadata, which the digest does not cover.
            return arrow.replace_schema_metadata(None).to_pandas()
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise Damaged(str(error).splitlines()[0]) from None
    raise Damaged("its values are not those that its digest was taken of" if stated else "it has no digest")


def _digest(table: pa.Table) -> str:
    parts: list[str | np.ndarray] = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        parts.append(f"{name} {column.type}")
        if not pa.types.is_primitive(column.type):
            coded = column.combine_chunks().dictionary_encode()
            parts.append(json.dumps(coded.dictionary.to_pylist(), default=repr))  # bytes, if the file is damaged
            column = coded.indices
        parts.append(column.to_numpy(zero_copy_only=False))
    return digest(*parts)
