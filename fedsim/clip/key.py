"""Digests of files of weights, each of which is read once in a process, and the key of weights in the cache."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b, sha256
from pathlib import Path
from time import time_ns

from fedsim.cache import stamp

_ALGORITHMS = {"sha256": sha256, "blake2b": partial(blake2b, digest_size=16)}


def key_of(config: dict | None, about: Mapping | None, *files: Path) -> str:
    """Changes with an architecture, what is known of the weights, and the bytes of their files."""
    described = json.dumps([config, about], sort_keys=True, default=str)
    return _digest_of("blake2b", described.encode(), files)


def sha256_of(file: Path) -> str:
    return _digest_of("sha256", b"", [file])


def _digest_of(algorithm: str, start: bytes, files: Sequence[Path]) -> str:
    stamps = tuple(stamp(file, time_ns()) for file in files)
    read = _read if all(map(any, stamps)) else _read.__wrapped__
    return read(algorithm, start, tuple(files), stamps)


@lru_cache(maxsize=64)  # otherwise each trial of a sweep would read gigabytes again
def _read(algorithm: str, start: bytes, files: tuple[Path, ...], stamps: tuple[bytes, ...]) -> str:
    digest = _ALGORITHMS[algorithm](start)
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
