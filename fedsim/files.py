"""Files that are written whole or not at all, and whose damage is noticed when they are read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextmanager
def atomic(file: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content replaces `file` once the block has ended without an error.

    The content is flushed to the disk before it gets its name, so a power cut leaves the old file or the new one.

    Raises:
        OSError: the disk is full, for example. `filename` names `file`, which is unchanged; no part of it is left.
    """
    part = file.with_name(f"part-{os.uname().nodename}-{os.getpid()}-{file.name}")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)  # on a full disk it would take the room that is left
        if isinstance(error, OSError):
            error.filename = str(file)
        raise


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8, whatever the locale says."""
    with atomic(file) as stream:
        stream.write(text.encode())


def digest(*things: str | np.ndarray) -> str:
    """A digest of strings and arrays, in this order: 32 hexadecimal digits."""
    result = blake2b(digest_size=16)
    for thing in things:
        data = memoryview(thing.encode() if isinstance(thing, str) else np.ascontiguousarray(thing))
        result.update(f"{data.nbytes}:".encode())  # so that ("ab", "c") and ("a", "bc") differ
        result.update(data)
    return result.hexdigest()
