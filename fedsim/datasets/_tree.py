"""Trees of image files, `domain/class/file`: what all data sets that lie on a disk have in common.

Source: torchvision's ImageFolder (which file names count, sorted order), one level deeper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.datasets import UNSAID, Images
from fedsim.errors import InputError, listing

# Nobody means these as the only classes; Dassl's office_home_dg has them between domain and class.
SPLIT_FOLDERS = {"train", "val", "valid", "validation", "crossval", "test", "full"}


class Part(NamedTuple):
    """A folder of class folders: a domain, or that much of it which the set itself put into a split."""

    domain: str
    folder: Path
    split: int = UNSAID


def checked(root: Path | None, name: str) -> Path:
    """`--data-dir` as an absolute path: actors need not run in the folder that the user typed it in.

    Raises:
        InputError: it was not given, or is no folder.
    """
    if root is None:
        raise InputError(f"data set {name} wants --data-dir, a folder of images; none was given")
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"data set {name} wants a folder as --data-dir; {root} is no folder")
    return root


def folders(place: Path) -> list[Path]:
    """Folders directly in a place, by name; hidden ones (`.git`, `.cache`) are not data."""
    return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def find_domains(root: Path, wanted: Mapping[str, Sequence[str]]) -> tuple[Path, dict[str, Path]]:
    """Looks for the place, at most two folders below `root`, that has a folder for every domain.

    Archives differ in what they wrap around the domains (`PACS/kfold/`, `pacs/images/`, nothing), and
    copies differ in spelling, so only letters and digits of a name count, and no capitals.

    Args:
        wanted: other spellings of each domain.

    Returns:
        That place, and the folder of each domain.

    Raises:
        InputError: no place has them all, or two do. The message says what the best one lacks and has.
    """
    level, best, best_found = [root], root, {}
    for _ in range(3):
        whole = []
        for place in level:
            found = _match(place, wanted)
            if len(found) == len(wanted):
                whole.append((place, found))
            if len(found) > len(best_found):
                best, best_found = place, found
        if len(whole) == 1:
            return whole[0]
        if whole:
            places = listing(place for place, _ in whole)
            raise InputError(f"wanted one folder with {listing(wanted)} as --data-dir; there are: {places}")
        level = [folder for place in level for folder in folders(place)]
    lacks = listing(domain for domain in wanted if domain not in best_found)
    has = listing(folder.name for folder in folders(best)) or "no folders"
    raise InputError(f"wanted the folders {listing(wanted)}; {best} lacks {lacks} and has: {has}")


def list_tree(base: Path, parts: Sequence[Part], class_names: Mapping[str, str] | None = None) -> Images:
    """Lists every image of every class of every domain, sorted by class and file name within a part.

    Files beside folders are ignored, and so are files that do not end like an image.

    Args:
        base: the folder that image names are told from.
        parts: where the domains lie; the domains are numbered in this order.
        class_names: names of classes whose folders are called otherwise.

    Raises:
        InputError: a class has no folder, or no images, in a domain. The message names both.
    """
    known = class_names or {}
    named = [{f.name: known.get(f.name, f.name) for f in folders(part.folder)} for part in parts]
    here = {(part.domain, name) for part, names in zip(parts, named, strict=True) for name in names.values()}
    domains = list(dict.fromkeys(part.domain for part in parts))
    classes = sorted({name for _, name in here})
    if not classes:
        raise InputError(f"wanted domain/class/file in {base}; no class folders in: {listing(domains)}")
    if all(name.lower() in SPLIT_FOLDERS for name in classes):
        raise InputError(
            f"wanted domain/class/file in {base}; where classes should be, there are splits: {listing(classes)}"
        )
    if absent := [f"{d}/{c}" for d in domains for c in classes if (d, c) not in here]:
        raise InputError(
            f"wanted every class in every domain of {base}; missing: {listing(absent)}; "
            f"there are the classes: {listing(classes)}"
        )

    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # takes seconds to import

    files, rows = [], []
    for part, names in zip(parts, named, strict=True):
        index = {folder: classes.index(name) for folder, name in names.items()}
        # torchvision refuses an empty index: VLCS's `test` of one domain, say, with nothing in it.
        found = make_dataset(part.folder, index, IMG_EXTENSIONS, allow_empty=True) if index else []
        for file, label in found:
            file = Path(file)
            if not file.name.startswith("."):  # macOS puts a ._photo.jpg beside each photo.jpg
                files.append(file)
                rows.append((label, domains.index(part.domain), part.split))
    y, domain, split = np.array(rows, np.int64).reshape(-1, 3).T.copy()

    count = np.zeros((len(domains), len(classes)), np.int64)
    np.add.at(count, (domain, y), 1)
    if empty := [f"{domains[d]}/{classes[c]}" for d, c in np.argwhere(count == 0)]:
        ends = listing(IMG_EXTENSIONS)
        raise InputError(f"no images in {listing(empty)} of {base}; wanted files that end in: {ends}")
    return Images(
        files=files,
        names=[str(file).removeprefix(f"{base}/") for file in files],  # relative_to: twenty times slower
        y=y,
        domain=domain,
        classes=tuple(classes),
        domains=tuple(domains),
        split=split.astype(np.int8),
    )


def apply_lists(images: Images, root: Path, base: Path, lists: Mapping[str, int]) -> Images:
    """Only the images that the set's own split files name, with the split that each file stands for.

    A line is `domain/class/file number`. The number is not used, since the folder names the class. The
    files lie beside the domains, or beside their folder but not outside of `root`, or in a folder there.

    Args:
        images: all images of `domain/class/file` below `base`.
        lists: split of each kind of file; `{}` in its name stands for the domain.

    Raises:
        InputError: a file is missing, is not UTF-8, or names no image of a domain; a
            line is not of that form, is named by two splits, or names no image.
    """
    wanted = {form.format(domain): split for form, split in lists.items() for domain in images.domains}
    around = [base] if base == root else [base, base.parent]
    places = [place for beside in around for place in (beside, *folders(beside))]
    place = max(places, key=lambda place: sum((place / name).is_file() for name in wanted))
    if absent := [name for name in wanted if not (place / name).is_file()]:
        raise InputError(
            f"split 'own' wants the set's own split files beside its domains; {place} lacks "
            f"{listing(absent, 30)}; split 'seeded' needs none"
        )

    rows = {
        f"{images.domains[d]}/{name.partition('/')[2]}": row  # this disk may spell the domain otherwise
        for row, (d, name) in enumerate(zip(images.domain, images.names, strict=True))
    }
    split = np.full(len(images), UNSAID, np.int8)
    for name, code in wanted.items():
        try:
            lines = (place / name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{place / name} wants UTF-8 text; {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            image, _, label = line.strip().rpartition(" ")
            if not image or not label.isdigit():
                raise InputError(f"{name}:{number} wants 'domain/class/file number', not {line!r}")
            if image not in rows:
                raise InputError(f"{name}:{number} names {image}, which is not in {base}")
            if split[rows[image]] not in (UNSAID, code):
                raise InputError(f"{name}:{number} names {image}, which another split has too")
            split[rows[image]] = code
    listed = np.flatnonzero(split != UNSAID)
    if idle := [d for k, d in enumerate(images.domains) if k not in images.domain[listed]]:
        raise InputError(f"split 'own': the split files in {place} name no image of {listing(idle)}")
    return replace(images, split=split).take(listed)


def _match(place: Path, wanted: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    here = {_plain(folder.name): folder for folder in folders(place)}
    found = {}
    for domain, others in wanted.items():
        for name in map(_plain, (domain, *others)):
            if name in here:
                found.setdefault(domain, here[name])
    return found


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
