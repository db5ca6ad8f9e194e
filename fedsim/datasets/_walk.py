"""Which files are data: one rule for all data sets of images.

Hidden files and folders are not data, nor are the leftovers of operating systems and tools: thumbnails, recycle bins,
checkpoints of notebooks. Links are followed; each is an image of the folder that holds the link.

Source: torchvision's ImageFolder (endings of image files, their order).
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedsim.errors import InputError

ENDINGS = ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"  # torchvision's

# Written by macOS (in archives), Synology, Windows and ext4; compared without capitals.
LEFTOVERS = {
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "desktop.ini",
}


def is_data(name: str) -> bool:
    """Whether a file or folder of this name can be data; `.ipynb_checkpoints`, `._photo.jpg` and `@eaDir` cannot."""
    return not name.startswith(".") and name.lower() not in LEFTOVERS


def folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, by name."""
    return sorted(entry for entry in folder.iterdir() if is_data(entry.name) and entry.is_dir())


class Walk(NamedTuple):
    """The image files below a folder.

    Attributes:
        files: their paths, by folder and name.
        real: the same paths with all links resolved; two images of one real path are one file.
        ignored: the number of other files, by ending.
    """

    files: list[str]
    real: list[str]
    ignored: Counter[str]


def walk(folder: Path) -> Walk:
    """Finds the image files at any depth below a folder.

    Raises:
        InputError: a link leads back to a folder above it, so the walk would not end.
        OSError: a folder cannot be read. It is not skipped, because its images would be missing.
    """
    real = os.path.realpath(folder)
    entries = sorted(_walk(str(folder), real, (real,)))
    images = [entry for entry in entries if entry[1].lower().endswith(ENDINGS)]
    others = [name for _, name, _ in entries if not name.lower().endswith(ENDINGS)]
    ignored = Counter(os.path.splitext(name)[1].lower() for name in others)
    return Walk([f"{place}/{name}" for place, name, _ in images], [real for *_, real in images], ignored)


def display_name(path: str) -> str:
    """A path for messages and digests: bytes that are not UTF-8 are written as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _walk(place: str, real: str, above: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(folder, name, real path) of each file; `above` are the real paths of the folder and those it was reached by."""
    with os.scandir(place) as entries:
        for entry in entries:
            if not is_data(entry.name):
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if target in above:
                    path = display_name(entry.path)
                    raise InputError(
                        f"{path} is a link back to {display_name(target)}, a folder that it is in; remove it"
                    )
                yield from _walk(entry.path, target, (*above, target))
            elif entry.is_symlink() or entry.is_file():
                # A link to nowhere is reported when it is opened. Pipes are skipped, since opening one would block.
                yield place, entry.name, target
