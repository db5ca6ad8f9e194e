"""The folder of a run or a sweep: whose it is, who works in it, and whether its files are as they were written.

Only a new or an empty folder, or one that fedsim has marked, is ever written to.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from fedsim import __version__
from fedsim.errors import RENAMED, InputError, Stopped, listing
from fedsim.files import FULL, Damaged, digest, reason, write_text

MARK, LOCK, RUNNING = ".fedsim", ".lock", ".running.lock"
CONFIG, CHECKPOINT = "config.yaml", "checkpoint.safetensors"
# What tells of each kind: the file that says what it is, and the one that says how far it has come.
HOLDS = {"run": (CONFIG, CHECKPOINT), "sweep": ("sweep.yaml", "study.db")}
GENERATOR = b'<meta name="generator" content="fedsim">'  # as in page.html.j2
FORMAT = 2  # of a folder's files; raised when an earlier version's can no longer be read
SEAL = "# Written by fedsim, format {}; digest {}\n"
SEALED = re.compile(r"# Written by fedsim(?:, format (\d+))?; digest \w+\n")  # format 1 does not name itself
Kind = Literal["run", "sweep"]


def check_folder(folder: Path, kind: Kind) -> None:
    """Refuses a folder that a run or a sweep must not or cannot write to; writes nothing.

    Raises:
        InputError: it is a file, holds files that fedsim has not written or the other kind, or is not writable.
        Stopped: its disk is full.
    """
    try:
        _check_writable(folder)
        others = _others(folder, kind)
        held = [other for other, (about, _) in HOLDS.items() if other != kind and (folder / about).exists()]
    except OSError as error:
        if error.errno in FULL:
            raise Stopped(f"no space left in {folder}; the same command starts once there is room") from None
        raise InputError(f"--out {folder} cannot be written: {reason(error)}") from None
    if held:
        raise InputError(f"{folder} holds a {held[0]}, not a {kind}; give another --out")
    if others:
        raise InputError(
            f"{folder} is not empty and holds no {kind} of this version of fedsim, but {listing(others)}; "
            "give another --out"
        )


def claim(folder: Path, kind: Kind) -> None:
    """Makes a folder, or takes an empty one, and marks it as fedsim's; before anything else is written there.

    Raises:
        InputError, Stopped: as `check_folder` does.
    """
    check_folder(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()  # empty: that is atomic


@contextmanager
def exclusive(folder: Path, kind: Kind, patience_s: float = 0) -> Iterator[None]:
    """Claims a folder, and holds it for as long as the block lasts.

    Raises:
        InputError: another process holds it for longer than `patience_s`, or it cannot be claimed.
    """
    claim(folder, kind)
    try:
        with FileLock(folder / LOCK, timeout=patience_s):
            yield
    except Timeout:
        raise InputError(f"another process is running in {folder}; wait for it, or give another --out") from None


def refuse_another(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises InputError, naming the fields that differ, when a folder holds another experiment; plain values."""
    refuse_another_version(folder, theirs, ours)
    if differ := differences(theirs, ours):
        raise InputError(f"{folder} holds another experiment ({listing(differ)}); give another --out")


def differences(theirs: dict[str, Any], ours: dict[str, Any], of: str = "") -> list[str]:
    """What differs between two experiments, in words; of components with the same name, the fields."""
    differ = []
    for name in sorted(theirs.keys() | ours.keys()):
        old, new = theirs.get(name), ours.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if old.get("name") == new.get("name"):
                differ += differences(old, new, f"{of}{name}.")
                continue
            old, new = old.get("name"), new.get("name")
        if old != new:
            differ.append(f"{of}{name} {old!r} there, {new!r} here")
    return differ


def continued(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Their experiment with what may change as a folder's run continues: its rounds, and that models are tuned."""
    may_change = ["rounds", *["tune_epochs"] * (theirs.get("tune_epochs") == 0)]
    return theirs | {name: ours[name] for name in may_change}


def refuse_another_version(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises InputError, naming the fields that only one of two experiments has; plain values."""
    versions = {"fedsim": theirs.keys() ^ ours.keys()}
    for kind in sorted(theirs.keys() & ours.keys()):
        old, new = theirs[kind], ours[kind]
        if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name"):
            versions[f"fedsim or of {kind} {new.get('name')}"] = old.keys() ^ new.keys()
    for version, fields in versions.items():
        if fields:
            current = {RENAMED[field] for field in fields if field in RENAMED}
            names = [f"{field} (now {RENAMED[field]})" if field in RENAMED else field for field in fields - current]
            raise InputError(
                f"{folder} was written by another version of {version}: only one of them has "
                f"{listing(sorted(names))}; give another --out"
            )


def check_page(file: Path) -> None:
    """Raises InputError where a page would replace a file that is not one of fedsim's pages."""
    if not file.exists() and not file.is_symlink():
        return
    try:
        with file.open("rb") as stream:
            ours = GENERATOR in stream.read(1000)
    except OSError as error:
        raise InputError(f"--out {file.parent}: {reason(error)}") from None
    if not ours:
        raise InputError(f"{file} is not a page of this version of fedsim; give another --out")


# Files that are read back -----------------------------------------------------------------------------------


def write_sealed(file: Path, text: str) -> None:
    """Writes a text file whose first line, a comment of YAML, holds a digest of the rest."""
    write_text(file, SEAL.format(FORMAT, digest(text)) + text)


def read_sealed(file: Path, remedy: str) -> str:
    """The text that `write_sealed` wrote.

    Raises:
        InputError: the file is missing, damaged or of another format.
    """
    with intact(file, remedy):
        text = file.read_bytes().decode()
        first, rest = text[: (end := text.find("\n") + 1)], text[end:]
        if (seal := SEALED.fullmatch(first)) and (number := int(seal[1] or 1)) != FORMAT:
            raise InputError(
                f"{file} was written by another version of fedsim: it has format {number}, and fedsim "
                f"{__version__} reads format {FORMAT}; {remedy}"
            )
        if first != SEAL.format(FORMAT, digest(rest)):
            raise Damaged("its content does not match its digest")
        return rest


@contextmanager
def intact(file: Path, remedy: str) -> Iterator[None]:
    """Says what became of a file that cannot be read, and what to do: `remedy` ends the sentence.

    Raises:
        InputError: in place of an OSError, a Damaged or a UnicodeDecodeError.
    """
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file} is missing; {remedy}") from None
    except (Damaged, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}); {remedy}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def start_again(folder: Path) -> str:
    """The remedy for a run that cannot be resumed."""
    return f"delete the run's folder {folder} to start again, or give another --out"


def safe_name(parts: Iterable[str], suffix: str, length: int = 120) -> str:
    """One path component out of any names, which a suffix keeps apart; ordinary names stay as they are.

    Args:
        length: in bytes of UTF-8, at most; file systems take 255, and files below need some for themselves.
    """
    name = "-".join(re.sub(r'[/\\:*?"<>|]', "_", part) for part in parts if part)
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    if name.startswith("."):
        name = f"_{name}"
    room = length - len(suffix) - 1
    return f"{name.encode()[:room].decode(errors='ignore')}-{suffix}"


# ------------------------------------------------------------------------------------------------------------


def _others(folder: Path, kind: Kind) -> list[str]:
    """Names of the files that keep fedsim from writing to a folder."""
    if not folder.is_dir() or (folder / MARK).is_file():
        return []
    # Hidden files are not touched, except the locks, which are emptied when they are taken.
    names = {
        entry.name
        for entry in folder.iterdir()
        if not entry.name.startswith(".") or (entry.name in (LOCK, RUNNING) and entry.stat().st_size)
    }
    about, state = HOLDS[kind]
    if not _is_sealed(folder / about):
        return sorted(names)
    return [] if state in names else sorted(names - {about})  # a copy may have lost the mark, which is hidden


def _is_sealed(file: Path) -> bool:
    try:
        return bool(read_sealed(file, ""))
    except InputError:
        return False


def _check_writable(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--out expects a folder; {folder} is {'a file' if folder.exists() else 'a broken link'}")
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryFile(dir=standing):  # leaves nothing; and os.access tells root that all is well
        pass
