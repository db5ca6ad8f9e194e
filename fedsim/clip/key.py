"""What tells weights apart in the cache."""

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path


def key_of(config: dict | None, about: Mapping | None, *files: Path) -> str:
    """Changes with an architecture, what is known of the weights, and the bytes of their files."""
    described = json.dumps([config, about], sort_keys=True, default=str)
    return _digest(described, *((file, _written(file)) for file in files))


def _written(file: Path) -> tuple[int, ...]:
    about = file.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


@lru_cache(maxsize=64)  # the trials of a sweep would read gigabytes again each
def _digest(described: str, *files: tuple[Path, tuple[int, ...]]) -> str:
    digest = blake2b(described.encode(), digest_size=16)
    for file, _ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
