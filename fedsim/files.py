"""Files that are written whole or not at all, and checked for damage when they are read."""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FULL = errno.ENOSPC, errno.EDQUOT


class Damaged(ValueError):
    """A file is not as it was written; the message says in what way."""


@contextmanager
def atomic(file: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary stream whose content replaces `file` once the block has ended without an error.

    Args:
        durable: the content is flushed to the disk before it gets its name, so a power cut leaves the old file or the
            new one. It takes about 10 ms on a busy disk, and is not needed for the status of a process.

    Raises:
        OSError: the disk is full, for example. `filename` names `file`, which is unchanged; no part of it is left.
    """
    part = file.with_name(f"part-{os.uname().nodename}-{os.getpid()}-{file.name}")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)  # on a full disk it would take the remaining space
        if isinstance(error, OSError):
            error.filename = str(file)
        raise


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Deletes partial files left by processes killed in `atomic`. No process may be writing these files now."""
    part = re.compile(rf"part-.+-\d+-({'|'.join(map(re.escape, names))})")
    for file in folder.glob("part-*"):
        if part.fullmatch(file.name):
            file.unlink(missing_ok=True)


def write_text(file: Path, text: str, durable: bool = True) -> None:
    """Writes UTF-8 in any locale; see `atomic`."""
    with atomic(file, durable) as stream:
        stream.write(text.encode())


def digest(*values: str | np.ndarray) -> str:
    """A digest of strings and arrays, in this order: 32 hexadecimal digits."""
    result = blake2b(digest_size=16)
    for value in values:
        data = memoryview(value.encode() if isinstance(value, str) else np.ascontiguousarray(value))
        result.update(f"{data.nbytes}:".encode())  # so that ("ab", "c") and ("a", "bc") differ
        result.update(data)
    return result.hexdigest()


def reason(error: OSError) -> str:
    """The file or folder and what went wrong, without advice."""
    if error.errno in FULL and error.filename:
        return f"no space left in {Path(error.filename).parent}"
    text = (error.strerror or str(error) or type(error).__name__).splitlines()[0]  # pyarrow adds lines
    return f"{error.filename}: {text}" if error.filename else text


def pack(tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file with `about` as JSON in its metadata, next to a digest of everything."""
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
    about = {**about, "digest": _digest(contiguous, json.dumps(about))}
    # One entry: safetensors writes several in any order, and the same run would not give the same bytes. Not with
    # safetensors.torch, which keeps a type in memory for each tensor size it has ever seen.
    return save(contiguous, metadata={"fedsim": json.dumps(about)})


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes `pack` whole or not at all."""
    content = pack(tensors, about)
    with atomic(file) as stream:
        stream.write(content)


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file of `write_tensors`: writable arrays, and `about` after its round trip through JSON.

    Raises:
        Damaged: a bit is not as it was written.
        OSError: for example, there is no such file.
    """
    try:
        with safe_open(file, "np") as reader:
            about = json.loads((reader.metadata() or {})["fedsim"])
            stated = about.pop("digest")
            tensors = {name: reader.get_tensor(name).copy() for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"no safetensors file with a digest: {error}") from None
    if _digest(tensors, json.dumps(about)) != stated:
        raise Damaged("its content does not match its digest")
    return tensors, about


def _digest(tensors: Mapping[str, np.ndarray], about: str) -> str:
    parts: list[str | np.ndarray] = [about]
    for name in sorted(tensors):
        parts += [name, f"{tensors[name].dtype} {tensors[name].shape}", tensors[name]]
    return digest(*parts)
