"""What tells weights apart: digests of their files, each of which is read once in a process."""

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from time import time_ns

from fedsim.cache import stamp
from fedsim.files import digest


def key_of(config: dict | None, about: Mapping | None, *files: Path) -> str:
    """Changes with an architecture, what is known of the weights, and the bytes of their files."""
    return digest(json.dumps([config, about], sort_keys=True, default=str), *map(sha256_of, files))


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; it is read again only if it may have changed."""
    now = time_ns()
    known = stamp(file, now)
    return _read(file, known if any(known) else now)


@lru_cache(maxsize=64)  # otherwise each trial of a sweep would read gigabytes again
def _read(file: Path, state: bytes | int) -> str:
    result = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            result.update(block)
    return result.hexdigest()
