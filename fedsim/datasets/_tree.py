"""Trees of image files, `domain/class/file`, from which all data sets of images on disk are read.

Source: torchvision's ImageFolder (sorted order), one level deeper.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.datasets import UNASSIGNED, Images
from fedsim.datasets._names import canonical, canonical_names
from fedsim.datasets._walk import ENDINGS, Walk, display_name, folders, walk
from fedsim.errors import InputError, counted, listing

# Names of the parts of a split, which are neither visual domains nor classes. `train` alone is a class of DomainNet.
TRAIN_FOLDERS = {"train", "training"}
JUDGE_FOLDERS = {"val", "valid", "validation", "crossval", "test", "testing"}
SPLIT_FOLDERS = TRAIN_FOLDERS | JUDGE_FOLDERS


class Part(NamedTuple):
    """A folder of class folders: a domain, or the part of it in one split."""

    domain: str
    folder: Path
    split: int = UNASSIGNED


def checked(root: Path | None, name: str) -> Path:
    """`--data-dir` as an absolute path: actors need not run in the folder that the user typed it in.

    Raises:
        InputError: it was not given, or is no folder.
    """
    if root is None:
        raise InputError(f"data set {name} needs --data-dir, a folder of images; none was given")
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"data set {name} needs a folder as --data-dir; {root} is not a folder")
    return root


def find_domains(root: Path, names: Mapping[str, Sequence[str]]) -> tuple[Path, dict[str, Path]]:
    """Finds the folder, at most two levels below `root`, that has a folder for every domain.

    Archives have different folders around the domains (`PACS/kfold/`, `pacs/images/`, none), and copies differ in
    spelling, so only the letters and digits of a name count, in any case.

    Args:
        names: the domains, each with its other spellings.

    Returns:
        That folder, and the folder of each domain.

    Raises:
        InputError: no folder has them all, or two do. The message says what the best one lacks and has.
    """
    level, best, best_found = [root], root, {}
    for _ in range(3):
        whole = []
        for place in level:
            found = _match(place, names)
            if len(found) == len(names):
                whole.append((place, found))
            if len(found) > len(best_found):
                best, best_found = place, found
        if len(whole) == 1:
            place, matches = whole[0]
            _refuse_twice(place, matches)
            return place, {domain: match[0] for domain, match in matches.items()}
        if whole:
            places = listing(place for place, _ in whole)
            raise InputError(f"expected one folder with {listing(names)} below --data-dir; there are: {places}")
        level = [folder for place in level for folder in folders(place)]
    lacks = listing(domain for domain in names if domain not in best_found)
    has = listing(folder.name for folder in folders(best)) or "no folders"
    raise InputError(f"expected the folders {listing(names)}; {best} lacks {lacks} and has: {has}")


def list_tree(
    base: Path, parts: Sequence[Part], class_names: Mapping[str, str] | None = None, layout: str = "domain/class/file"
) -> Images:
    """Lists every image of every class of every domain, sorted by class and file name within a part.

    `_walk` and `_names` decide what is an image, a link and a name. A single folder between each domain and its
    classes, such as `images` in Office-31, is skipped. The `notes` of the result say what was left out or assumed.

    Args:
        base: the folder that image names are relative to.
        parts: where the domains are; the domains are numbered in this order.
        class_names: names of classes whose folders have other names.
        layout: what is expected below `base`, for messages.

    Raises:
        InputError: the folders are not domains and classes, or names clash.
        OSError: a folder cannot be read.
    """
    trees, notes = _class_folders(base, parts, layout)
    renamed = class_names or {}
    cells = [
        (part, renamed.get(folder, folder), found)
        for part, tree in zip(parts, trees, strict=True)
        for folder, found in tree.items()
    ]
    domain_rows, class_rows = Counter({part.domain: 0 for part in parts}), Counter()
    for part, name, found in cells:
        domain_rows[part.domain] += len(found.files)
        class_rows[name] += len(found.files)
    domain_of = canonical_names("domain", domain_rows, base)
    class_of = canonical_names("class", class_rows, base)
    domains, classes = list(dict.fromkeys(domain_of.values())), sorted(set(class_of.values()))
    _refuse_splits(base, classes, layout)

    files, reals, codes = [], [], []
    ignored: dict[tuple[str, str], Counter[str]] = {(d, c): Counter() for d in domains for c in classes}
    for part, name, found in cells:
        ignored[domain_of[part.domain], class_of[name]] += found.ignored
        files += found.files
        reals += found.real
        code = classes.index(class_of[name]), domains.index(domain_of[part.domain]), part.split
        codes += [code] * len(found.files)
    y, domain, split = np.array(codes, np.int64).reshape(-1, 3).T.copy()
    filled = {(domains[d], classes[c]) for c, d, _ in set(codes)}
    images = Images(
        files=[Path(file) for file in files],
        names=[display_name(file.removeprefix(f"{base}/")) for file in files],  # relative_to: twenty times slower
        y=y,
        domain=domain,
        classes=tuple(classes),
        domains=tuple(domains),
        split=split.astype(np.int8),
        other_files={cell: _by_ending(others) for cell, others in ignored.items() if others and cell not in filled},
    )
    if reals != files:
        images, about = _each_file_once(images, reals)
        notes += about
    if other := sum(ignored.values(), Counter()):
        notes.append(f"left out {counted(other.total(), 'file')} not named like an image: {_by_ending(other)}")
    return replace(images, notes=tuple(notes))


def _by_ending(files: Counter[str]) -> str:
    return listing(f"{count} {ending or 'without an ending'}" for ending, count in sorted(files.items()))


def _class_folders(base: Path, parts: Sequence[Part], layout: str) -> tuple[list[dict[str, Walk]], list[str]]:
    """The class folders of each part, which may be further levels down; and notes."""
    places, notes = [part.folder for part in parts], []
    while True:
        trees = [{folder.name: walk(folder) for folder in folders(place)} for place in places]
        levels = [_level(place, tree) if tree else "" for place, tree in zip(places, trees, strict=True)]
        named = [level for level in levels if level is not None]
        if not any(named) or len(named) < len(levels):
            break
        places = [place / level for place, level in zip(places, named, strict=True)]
        names = listing((display_name(str(place.relative_to(base))) for place in places), 4)
        notes.append(f"classes are the folders in {names}, each of which is the only folder with images in its domain")
    if not any(trees):
        _refuse_no_classes(base, parts, layout)
    for place, tree in zip(places, trees, strict=True):
        _refuse_level(base, place, tree, layout)
    return trees, notes


def _level(place: Path, tree: Mapping[str, Walk]) -> str | None:
    """The only folder with images in a place, if it holds folders of images."""
    filled = [name for name, found in tree.items() if found.files]
    return filled[0] if len(filled) == 1 and None not in _inside(place, tree, filled[0]) else None


def _inside(place: Path, tree: Mapping[str, Walk], name: str) -> set[str | None]:
    """The folders directly below a class folder that hold its images; None stands for the class folder itself."""
    below = (file.removeprefix(f"{place / name}/").partition("/") for file in tree[name].files)
    return {first if slash else None for first, slash, _ in below}


def _refuse_no_classes(base: Path, parts: Sequence[Part], layout: str) -> None:
    direct = [part.domain for part in parts if any(file.suffix.lower() in ENDINGS for file in part.folder.iterdir())]
    domains = listing(dict.fromkeys(part.domain for part in parts))
    also = f"; images are one level too high, directly in: {listing(direct)}" if direct else ""
    raise InputError(f"expected {layout} in {base}; no class folders in: {domains}{also}")


def _refuse_level(base: Path, place: Path, tree: Mapping[str, Walk], layout: str) -> None:
    """Refuses a level above the classes: folders that hold the same folders and no images of their own."""
    inside = {name: _inside(place, tree, name) for name, found in tree.items() if found.files}
    below = {frozenset(names) for names in inside.values()}
    if len(inside) > 1 and len(below) == 1 and None not in (same := min(below)) and len(same) > 1:
        raise InputError(
            f"expected {layout} in {base}; {listing(inside, 4)} in {place} cannot be the classes: "
            f"each holds no images but the same folders, {listing(sorted(filter(None, same)), 4)}; "
            f"is {place} what --data-dir should be?"
        )


def _refuse_splits(base: Path, classes: Sequence[str], layout: str) -> None:
    plain = {name.lower() for name in classes}
    if plain <= SPLIT_FOLDERS or (plain & TRAIN_FOLDERS and plain & JUDGE_FOLDERS):
        raise InputError(f"expected {layout} in {base}; where classes should be, there are splits: {listing(classes)}")


def _each_file_once(images: Images, reals: Sequence[str]) -> tuple[Images, list[str]]:
    """Drops links to an image that the same class and domain already has; other duplicates are only noted."""
    first: dict[str, int] = {}
    again, shared = [], []
    for row, real in enumerate(reals):
        original = first.setdefault(real, row)
        if original != row:
            same = images.y[row] == images.y[original] and images.domain[row] == images.domain[original]
            (again if same else shared).append((row, original))
    notes = []
    if again:
        notes.append(
            f"left out {counted(len(again), 'link')} to images of the same class and domain{_example(images, again)}"
        )
    if shared:
        notes.append(
            f"{counted(len(shared), 'image')} linked to a file of another class or domain{_example(images, shared)}"
        )
    return images.take(np.setdiff1d(np.arange(len(images)), [row for row, _ in again])) if again else images, notes


def _example(images: Images, links: Sequence[tuple[int, int]]) -> str:
    link, original = links[0]
    return f", such as {images.names[link]} to {images.names[original]}"


def apply_lists(images: Images, root: Path, base: Path, lists: Mapping[str, int]) -> Images:
    """Keeps the images that the data set's split files name, with their splits.

    A line is `domain/class/file number`. The folder names the class; each class needs to have one number. The files are
    next to the domains, or next to their folder but not outside of `root`, or in a folder there.

    Args:
        images: all images of `domain/class/file` below `base`.
        lists: split of each kind of file; `{}` in its name stands for the domain.

    Raises:
        InputError: a file is missing or not UTF-8; a line is not of that form, or names an image that is not there or
            in another split; numbers and class folders disagree; or a domain or a class has no line.
    """
    expected = {form.format(domain): split for form, split in lists.items() for domain in images.domains}
    around = [base] if base == root else [base, base.parent]
    places = [place for near in around for place in (near, *folders(near))]
    place = max(places, key=lambda place: sum((place / name).is_file() for name in expected))
    if absent := [name for name in expected if not (place / name).is_file()]:
        raise InputError(
            f"split 'own' needs the set's own split files next to its domains; {place} lacks "
            f"{listing(absent, 30)}; split 'seeded' needs none"
        )

    rows = {
        canonical(f"{images.domains[d]}/{name.partition('/')[2]}"): row  # this disk may spell the domain otherwise
        for row, (d, name) in enumerate(zip(images.domain, images.names, strict=True))
    }
    split = np.full(len(images), UNASSIGNED, np.int8)
    lines = [(line, code) for name, code in expected.items() for line in _lines(place / name)]
    if unknown := [line for line, _ in lines if line.image not in rows]:
        more = f", and {len(unknown) - 1} more of {len(lines)} lines name missing images" if len(unknown) > 1 else ""
        raise InputError(f"{unknown[0].at} names {unknown[0].image}, which is not in {base}{more}")
    for line, code in lines:
        if split[rows[line.image]] not in (UNASSIGNED, code):
            raise InputError(f"{line.at} names {line.image}, which another split has too")
        split[rows[line.image]] = code
    listed = np.flatnonzero(split != UNASSIGNED)
    if idle := [d for k, d in enumerate(images.domains) if k not in images.domain[listed]]:
        raise InputError(f"split 'own': the split files in {place} name no image of the domains: {listing(idle)}")
    if idle := [c for k, c in enumerate(images.classes) if k not in images.y[listed]]:
        raise InputError(f"split 'own': the split files in {place} name no image of the classes: {listing(idle)}")
    _check_numbers(lines, [images.classes[images.y[rows[line.image]]] for line, _ in lines])
    unlisted = len(images) - len(listed)
    notes = (f"left out {unlisted} of {len(images)} images, which no split file in {place} names",) if unlisted else ()
    return replace(images, split=split, notes=(*images.notes, *notes)).take(listed)


class _Line(NamedTuple):
    at: str  # file:line
    image: str
    label: int


def _lines(file: Path) -> Iterator[_Line]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows may put a mark at the start
    except UnicodeDecodeError as error:
        raise InputError(f"{file} needs to be UTF-8 text; {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        image, *label = line.strip().rsplit(maxsplit=1)
        if not label or not label[0].isdecimal():
            raise InputError(f"{file.name}:{number} needs 'domain/class/file number', not {line!r}")
        yield _Line(f"{file.name}:{number}", canonical(image), int(label[0]))


def _check_numbers(lines: Sequence[tuple[_Line, int]], classes: Sequence[str]) -> None:
    """Checks that numbers and class folders agree; otherwise images were moved between folders."""
    number_of: dict[str, int] = {}
    class_of: dict[int, str] = {}
    for (line, _), name in zip(lines, classes, strict=True):
        number, known = number_of.setdefault(name, line.label), class_of.setdefault(line.label, name)
        if number != line.label:
            raise InputError(f"{line.at} gives {line.image} the number {line.label}; other lines give {name} {number}")
        if known != name:
            raise InputError(f"{line.at} gives {line.image} the number {line.label}, which is that of {known}")


def _match(place: Path, names: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    """The folders of each domain in a place; a domain in several spellings has more than one."""
    inside, matches = folders(place), {}
    for domain, others in names.items():
        spellings = {_plain(name) for name in (domain, *others)}
        if match := [folder for folder in inside if _plain(folder.name) in spellings]:
            matches[domain] = match
    return matches


def _refuse_twice(place: Path, matches: Mapping[str, Sequence[Path]]) -> None:
    twice = {domain: match for domain, match in matches.items() if len(match) > 1}
    counts = [
        f"{folder.name!r} ({counted(len(walk(folder).files), 'image')})" for match in twice.values() for folder in match
    ]
    if twice:
        raise InputError(f"{place} has more than one folder for the domain {listing(twice)}: {listing(counts)}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
