"""The folder of a private Ray cluster: only its user may enter it, and it is removed at the end."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from stat import S_IMODE, S_ISDIR

from filelock import FileLock, Timeout

from fedsim.errors import InputError
from fedsim.events import Note, Progress

PREFIX, LOCK = "fedsim-", ".ray-of-fedsim"  # how a folder's name begins; the file in it that its owner holds locked
# The longest path of a socket below TMPDIR, and of any socket.
BELOW = "/fedsim-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PATH_BYTES = 107 if sys.platform == "linux" else 103
END_S = 10  # for Ray's processes to end


@contextmanager
def private_folder(progress: Progress) -> Iterator[Path]:
    """A new folder that only this user may enter, removed at the end.

    Everyone may write to the folder that Ray makes, where it reads from a file which port the token is sent to; so
    that folder must be inside this one.
    """
    folder, lock = _locked_folder(progress)
    try:
        yield folder
    finally:
        for _ in range(END_S * 10):  # a process that is ending may still write to it
            rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
        lock.release()


def _locked_folder(progress: Progress) -> tuple[Path, FileLock]:
    """The folder, and the lock in it by which others see that its owner is alive."""
    problems: list[str] = []
    named = [(name, os.environ[name]) for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    for name, root in [*named, ("", "/tmp")]:
        try:
            if problem := _problem_of(root):
                raise OSError(None, problem)
            _remove_abandoned(Path(root))
            # Under another name until it is locked, or another process might remove it as one whose owner has died.
            fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
            lock = FileLock(fresh / LOCK)
            lock.acquire()
            folder = fresh.rename(fresh.with_name(fresh.name[1:]))
        except (OSError, NotImplementedError) as error:
            problems.append(f"{name} {root} ".lstrip() + str(getattr(error, "strerror", error)))
        else:
            if problems:
                progress(Note("Ray", f"its files are below {root}, since {'; '.join(problems)}"))
            return folder, lock
    raise InputError(f"Ray needs a folder for its files: {'; '.join(problems)}; set TMPDIR to a short, writable path")


def _problem_of(root: str) -> str:
    """Why Ray cannot have its sockets below a folder; empty if it can."""
    if not root.isascii() or re.search(r"\s", root):
        return "has blanks or letters that are not ASCII"
    limit = PATH_BYTES - len(BELOW)
    return f"is longer than the {limit} bytes that the paths of its sockets leave" if len(root) > limit else ""


def _remove_abandoned(root: Path) -> None:
    """Removes what killed processes of this user have left: folders that no process holds locked."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout, NotImplementedError):
            status = folder.lstat()
            own = S_ISDIR(status.st_mode) and S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.geteuid()
            if own and (folder / LOCK).is_file():
                with FileLock(folder / LOCK, timeout=0):
                    rmtree(folder, ignore_errors=True)
