"""Build glyphs.parquet: everyday things drawn in five styles, from pinned packages.

    uv run --group assets python tools/glyphs/build.py
    uv run --group assets python tools/glyphs/build.py --archives FOLDER

Four icon packages come from npm (`npm pack`), one clip-art package from Debian 12
(`apt-get download`); archives that FOLDER already holds are not fetched again. Every SVG, WebP and
PNG becomes one 64 x 64 RGB image on white, written losslessly, so that all readers decode the same
pixels. concepts.tsv names every image that may go in, deny.tsv every image that was looked at and
left out; fedsim/assets/glyphs/NOTICE.md holds the licences and the datasheet.

Source: ours.
"""

import argparse
import csv
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py  # pyright: ignore[reportMissingImports] - of the group assets
from PIL import Image, ImageChops

HERE = Path(__file__).resolve().parent
GLYPHS = HERE.parents[1] / "fedsim" / "assets" / "glyphs" / "glyphs.parquet"
SIZE = 64  # pixels a side of a finished image
MARGIN = 2  # white pixels around the drawing
RASTER = 256  # pixels a side before cropping: what the 3D renderings have
CAPS = {"train": 30, "test": 12}  # images per (domain, label), so that no cell dominates
TEST_SHARE = 4  # one concept in four is test
EMOJI = {  # domain: pinned npm package
    "render3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
CLIPART = "openclipart-png=1:0.18+dfsg-19"
CLIPART_ROOT = "./usr/share/openclipart/png/"
# label: salt of its split, the first number that put a fair share (a fifth to a third) of its
# drawings into test. Counts decided, no model was asked. Fixed: other assets keep clear of test.
SALTS = {
    "bird": 16,
    "bug": 9,
    "building": 34,
    "clothing": 95,
    "dessert": 32,
    "drink": 61,
    "electronic device": 7,
    "fruit": 13,
    "mammal": 4,
    "musical instrument": 5,
    "office supply": 34,
    "plant": 6,
    "sports equipment": 10,
    "tool": 21,
    "vehicle": 44,
}
COLUMNS = ("domain", "label", "concept", "source", "split", "image")


@dataclass(frozen=True)
class Concept:
    """One line of concepts.tsv: a thing, and its drawings by code point and by file."""

    label: str
    name: str
    emoji: list[str]
    clipart: list[str]

    @property
    def split(self) -> str:
        """The same in all domains, so no thing is tested that was trained on in another style."""
        digest = _hash(f"{self.label} {SALTS[self.label]}:{self.name}")
        return "test" if digest % TEST_SHARE == 0 else "train"


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.archives or Path(scratch)
        concepts, denied = _concepts(), _denied()
        rows = []
        for domain, package in EMOJI.items():
            icons = _icons(_npm(package, folder))
            rows += _cell_capped(_emoji_rows(concepts, domain, package, icons, denied))
        rows += _cell_capped(_clipart_rows(concepts, _deb(CLIPART, folder, concepts), denied))
    _write(sorted(rows, key=lambda row: [row[name] for name in COLUMNS[:4]]), args.out)
    _report(rows, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the data set glyphs.")
    parser.add_argument("--archives", type=Path, help="folder of archives, fetched or to fetch")
    parser.add_argument("--out", type=Path, default=GLYPHS)
    return parser.parse_args()


# What may go in


def _concepts() -> list[Concept]:
    with open(HERE / "concepts.tsv", newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file, delimiter="\t")
    concepts = [Concept(label, name, emoji.split(), files.split()) for label, name, emoji, files in lines]
    twice = [name for name, n in Counter(c.name for c in concepts).items() if n > 1]
    if twice:
        raise ValueError(f"concepts.tsv: a concept has one line, these have more: {twice}")
    return concepts


def _denied() -> set[tuple[str, str]]:
    """(domain, code point or file) of what was looked at and left out.

    The domain "emoji" stands for all four; a line with one of the four takes out a single drawing
    of a thing that stays in the others.
    """
    with open(HERE / "deny.tsv", newline="", encoding="utf-8") as file:
        return {(x["domain"], x["item"]) for x in csv.DictReader(file, delimiter="\t")}


def _emoji_rows(concepts, domain, package, icons, denied) -> Iterator[dict]:
    for concept in concepts:
        for rank, code in enumerate(concept.emoji):
            _no_contradiction("emoji", code, denied)
            # A package lacks the code points that are younger than it is.
            if code in icons and (domain, code) not in denied:
                name, picture = icons[code]
                yield _row(concept, rank, domain, f"{package}:{name}", picture)


def _clipart_rows(concepts, files, denied) -> Iterator[dict]:
    for concept in concepts:
        for rank, name in enumerate(concept.clipart):
            _no_contradiction("clipart", name, denied)
            source = f"{CLIPART.replace('=', '@')}:{name}.png"
            yield _row(concept, rank, "clipart", source, files[name])


def _no_contradiction(domain: str, item: str, denied: set[tuple[str, str]]) -> None:
    if (domain, item) in denied:
        raise ValueError(f"{item} is both in concepts.tsv and in deny.tsv")


def _row(concept: Concept, rank: int, domain: str, source: str, picture: bytes | str) -> dict:
    return {
        "domain": domain,
        "label": concept.label,
        "concept": concept.name,
        "source": source,
        "split": concept.split,
        "image": picture,
        "turn": (rank, _hash(concept.name)),
    }


def _cell_capped(rows: Iterator[dict]) -> list[dict]:
    """Keeps the first images of each cell: one of every concept, then a second, in hash order.

    The order knows no domain, so the emoji domains keep the same things and differ by style only.
    """
    cells = defaultdict(list)
    for row in rows:
        cells[row["domain"], row["label"], row["split"]].append(row)
    kept = []
    for (_, _, split), cell in cells.items():
        cell.sort(key=lambda row: row["turn"])
        kept += cell[: CAPS[split]]
    for row in kept:
        row["image"] = _encoded(_framed(_raster(row["image"])))
    return kept


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


# Archives


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _npm(package: str, folder: Path) -> dict[str, bytes]:
    """The files of a package by their path in it."""
    name, version = package.rsplit("@", 1)
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    with tarfile.open(path) as archive:
        return {member.name.removeprefix("package/"): _read(archive, member) for member in archive if member.isfile()}


def _deb(package: str, folder: Path, concepts: list[Concept]) -> dict[str, bytes]:
    """The clip art that the concepts name, by path without the ending."""
    name, version = package.split("=")
    pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"
    if not list(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
    [path] = folder.glob(pattern)
    wanted = {f"{CLIPART_ROOT}{file}.png": file for c in concepts for file in c.clipart}
    unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE)
    with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
        files = {
            wanted[member.name]: _read(archive, member)
            for member in archive
            if member.name in wanted and member.isfile()
        }
    missing = sorted(set(wanted.values()) - set(files))
    if missing:
        raise ValueError(f"{package} lacks {missing}")
    return files


def _icons(files: dict[str, bytes]) -> dict[str, tuple[str, bytes | str]]:
    """(name, picture) by code point: WebP bytes, or SVG text cut from an Iconify collection."""
    if "icons.json" not in files:
        webp = (name for name in files if name.endswith(".webp"))
        return {_plain(Path(name).stem): (Path(name).name, files[name]) for name in webp}
    collection, names = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    return {_plain(code): (name, _svg(collection, name)) for code, name in names.items()}


def _plain(code: str) -> str:
    """U+FE0F only asks for colour; the packages do not agree on where to write it."""
    return code.lower().replace("-fe0f", "")


def _svg(collection: dict, name: str) -> str:
    icon = collection["icons"][name]
    left, top, width, height = (
        icon.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{left} {top} {width} {height}" width="{RASTER}" height="{RASTER}"'
        f' color="#111">{icon["body"]}</svg>'
    )


# Pictures


def _raster(picture: bytes | str) -> Image.Image:
    if isinstance(picture, str):
        picture = bytes(resvg_py.svg_to_bytes(svg_string=picture))
    return Image.open(io.BytesIO(picture)).convert("RGBA")


def _framed(image: Image.Image) -> Image.Image:
    """The drawing on white, cropped to its ink and centred: packages pad as they please."""
    if max(image.size) > 4 * RASTER:  # some clip art is thousands of pixels wide
        image.thumbnail((4 * RASTER, 4 * RASTER), Image.Resampling.BOX)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    image = white.convert("RGB")
    box = ImageChops.invert(image.convert("L")).point([0] * 13 + [255] * 243).getbbox()
    if box is None:
        raise ValueError("a blank image: put it into deny.tsv")
    image = image.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (SIZE, SIZE), "white")
    framed.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return framed


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Lossless: a lossy decoder may differ by a bit between versions. Smaller than PNG by a quarter.
    image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


# Results


def _write(rows: list[dict], path: Path) -> None:
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    order = ("image", "label", "domain", "concept", "split", "source")
    table = pa.table({name: columns[name] for name in order})
    part = path.with_suffix(".part")  # a reader never sees half a file
    pq.write_table(table, part, compression="zstd")
    part.replace(path)


def _report(rows: list[dict], path: Path) -> None:
    counts = Counter((row["label"], row["domain"], row["split"]) for row in rows)
    domains = [*EMOJI, "clipart"]
    print("| label | " + " | ".join(domains) + " |")
    print("| --- |" + " --- |" * len(domains))
    for label in SALTS:
        cells = [f"{counts[label, d, 'train']} + {counts[label, d, 'test']}" for d in domains]
        print(f"| {label} | " + " | ".join(cells) + " |")
    splits = Counter(row["split"] for row in rows)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{dict(splits)}, {path.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
