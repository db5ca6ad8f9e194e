"""What is in the cache, and removal of what no run has used for a while."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fedsim.errors import InputError, counted

DAY_S = 24 * 3600
# The digest in the name, what the file holds, and the part of it.
NAME = re.compile(r"[0-9a-f]{32}(?:\.(?P<kind>[a-z_]+)(?:-[\d-]+)?)?\.(?P<ending>npy|lock)")
KINDS = {None: "image features", "text": "class embeddings", "index": "digests of images"}
KINDS |= {"features": "features of augmented views"}
LOCKS = "locks"


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache.

    Attributes:
        kind: what it holds.
        size: in bytes.
        used: when a run last read or wrote it, in seconds since 1970.
    """

    path: Path
    kind: str
    size: int
    used: float


def show_cache(console: Console, cache: Path, days: float | None = None) -> None:
    """Prints what is in the cache by kind.

    Args:
        days: files that no run has used for so long are removed first; None: nothing is.

    Raises:
        InputError: there is no such folder, or `days` is negative.
    """
    if not cache.is_dir():
        raise InputError(f"--cache-dir {cache} does not exist; no run has written there")
    if days is not None:
        if not days >= 0:
            raise InputError(f"--days is a number >= 0, got {days:g}")
        removed = [file for file in cached_files(cache) if file.used <= time.time() - days * DAY_S]
        for file in removed:  # a run that has mapped one keeps it; a run that starts computes it again
            file.path.unlink(missing_ok=True)
        console.print(f"removed {_amount([file for file in removed if file.kind != LOCKS])}")
    files = [file for file in cached_files(cache) if file.kind != LOCKS]
    table = Table("kind", "files", "size", "used")
    for kind in sorted({file.kind for file in files}):
        group = [file for file in files if file.kind == kind]
        idle = (time.time() - max(file.used for file in group)) / DAY_S
        row = str(len(group)), decimal(sum(file.size for file in group)), f"{counted(int(max(idle, 0)), 'day')} ago"
        table.add_row(kind, *row)
    if files:
        console.print(table)
    console.print(f"{cache}: {_amount(files)}; {decimal(shutil.disk_usage(cache).free)} free", soft_wrap=True)


def cached_files(cache: Path) -> Iterator[CachedFile]:
    """The files that fedsim wrote to its cache; other files in the folder are not looked at."""
    for path in sorted(cache.glob("*")):
        with suppress(FileNotFoundError):  # another process has just removed it
            if (match := NAME.fullmatch(path.name)) and path.is_file():
                kind = LOCKS if match["ending"] == "lock" else KINDS.get(match["kind"], match["kind"])
                stat = path.stat()
                yield CachedFile(path, kind, stat.st_size, stat.st_mtime)


def _amount(files: list[CachedFile]) -> str:
    return f"{counted(len(files), 'file')}, {decimal(sum(file.size for file in files))}"
