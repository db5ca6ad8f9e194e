"""The cache: arrays in files on this machine, which are checked for damage when they are opened.

A file of the cache is an `.npy` file followed by a seal: the CRC-32 of its name and its bytes, in 8 hexadecimal digits.
`np.load` can read it. Nothing is ever unpickled.
"""

import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from hashlib import blake2b
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
from filelock import FileLock

from fedsim.errors import InputError, Stopped
from fedsim.files import atomic, digest

Notice = Callable[[Path], None]  # called with each damaged file
SEAL = 8  # bytes
STEP = 1 << 20  # bytes read at a time
READERS = 16  # threads: on a network file system, reading small files is waiting
RECENT_NS = 2_000_000_000  # FAT's times are this coarse; those of other file systems are finer


def check_writable(cache: Path) -> None:
    """Creates the folder if it does not exist.

    Raises:
        InputError: it cannot be written to.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):  # os.access tells root that everything is writable
            pass
    except OSError as error:
        reason = "it is a file" if cache.is_file() else error.strerror
        raise InputError(f"--cache-dir {cache} cannot be written: {reason}") from None


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps other processes from computing `file`, also on other machines if the file system has locks."""
    with _reported(file):
        # Writable for everyone who may write to the folder: the next process may be another user's.
        lock = FileLock(file.with_suffix(".lock"), mode=file.parent.stat().st_mode & 0o666)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_array(file: Path, rows: int, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array whole or not at all.

    Args:
        rows: length of the array.
        blocks: the rows, in blocks, because all of them may not fit into memory.

    Raises:
        Stopped: the disk is full, or the folder has been removed.
    """
    blocks = iter(blocks)
    first = next(blocks)
    fields = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    header = BytesIO()
    np.lib.format.write_array_header_2_0(header, fields | {"shape": (rows, *first.shape[1:])})
    seal = zlib.crc32(file.name.encode())
    with _reported(file), atomic(file) as stream:  # not memory-mapped: a full disk would end the process
        for block in chain([np.frombuffer(header.getvalue(), np.uint8), first], blocks):
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            seal = zlib.crc32(data, seal)
            stream.write(data)
        stream.write(b"%08x" % seal)


def read_array(file: Path, notice: Notice) -> np.ndarray | None:
    """An array written by `write_array`: memory-mapped, read-only, all of its bytes checked.

    Returns:
        None if there is no such file, or if it is damaged; then `notice` is called.

    Raises:
        Stopped: the file cannot be read.
    """
    with _reported(file):
        if not file.exists():
            return None
        # A forged file may have the right seal and still not be an array.
        with suppress(ValueError, EOFError):
            if _is_sealed(file):
                with suppress(OSError):  # of another user
                    os.utime(file)  # `fedsim cache prune` keeps what is used
                return _mapped(file)
    notice(file)
    return None


def map_array(file: Path) -> np.ndarray:
    """The same without the check, for a file that `read_array` has checked, perhaps in another process.

    Raises:
        Stopped: the file was removed or replaced since.
    """
    try:
        return _mapped(file)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise Stopped(f"{file} was removed or changed during the run ({reason}); run the same command again") from None


def content_digests(files: Sequence[Path | bytes], cache: Path | None, notice: Notice) -> np.ndarray:
    """(N, 16) uint8, a digest of the bytes of each file; zeros for files that cannot be read.

    Args:
        cache: the folder that remembers digests by path, size, times and inode of a file. A file is read again if any
            of these has changed. No program can set the time of the last change (ctime), so a file that was replaced
            by one of the same size and modification time (`cp -p`, `rsync -t`, `tar -x`) is read again too.
    """
    if cache is None or not isinstance(files, list) or not all(isinstance(file, Path) for file in files):
        return _digests(files)  # encoded images have no path to remember, and a lazy sequence is to be read once
    paths = [file for file in files if isinstance(file, Path)]
    joined = np.frombuffer(b"\0".join(map(os.fsencode, paths)), np.uint8)
    index = cache / f"{digest(joined)}.index.npy"
    now = time.time_ns()
    stamps = np.frombuffer(b"".join(stamp(file, now) for file in paths), np.uint8).reshape(-1, 16)
    known = read_array(index, notice)
    known = np.zeros((len(files), 2, 16), np.uint8) if known is None else known.copy()
    changed = np.flatnonzero((known[:, 0] != stamps).any(axis=1) | ~stamps.any(axis=1))
    if len(changed):
        known[changed, 0], known[changed, 1] = stamps[changed], _digests([paths[row] for row in changed.tolist()])
        known[~known[:, 1].any(axis=1), 0] = 0
        write_array(index, len(files), [known])
    return known[:, 1]


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    """Turns errors of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise Stopped(
                f"no space left in {file.parent}; make room there and run the same command again: images that are "
                "already encoded are kept (or give another --cache-dir)"
            ) from None
        raise Stopped(f"the cache cannot be used: {error.filename or file}: {error.strerror}") from None


def _is_sealed(file: Path) -> bool:
    # Checked once per run, by the process that computes what is missing: actors map what it has checked, and those on
    # other machines receive it. CRC-32 instead of a longer digest: it misses one damaged file in 4 billion and runs
    # at 7 GB/s on one core (blake2b: 1.4, SHA-256: 2.0), so checking takes no longer than reading. Read, not mapped:
    # mapped pages would count as this process's memory, and a bad sector would end it.
    seal, left = zlib.crc32(file.name.encode()), file.stat().st_size - SEAL
    with file.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, STEP))):
            seal, left = zlib.crc32(block, seal), left - len(block)
        return stream.read() == b"%08x" % seal


def _mapped(file: Path) -> np.ndarray:
    return np.asarray(np.lib.format.open_memmap(file, "r"))


def stamp(file: Path, now: int) -> bytes:
    """16 bytes that change whenever the file does; zeros if that cannot be promised."""
    try:
        stat = file.stat()
    except OSError:  # a link to nowhere, for example
        return bytes(16)
    if now - stat.st_ctime_ns < RECENT_NS:  # another write in the same tick of the clock would not show
        return bytes(16)
    fields = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    return blake2b(os.fsencode(file) + repr(fields).encode(), digest_size=16).digest()


def _digests(files: Sequence[Path | bytes]) -> np.ndarray:
    # In groups: a future for each of 0.6 million files would take more memory than their names.
    groups = [files[first : first + 64] for first in range(0, len(files), 64)]
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda group: b"".join(map(_digest, group)), groups)
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def _digest(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return blake2b(file, digest_size=16).digest()
    result = blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(STEP):
                result.update(block)
    except OSError:
        return bytes(16)
    return result.digest()
