"""The site: it is built without a warning, loads nothing from elsewhere, and shows nothing that does not run."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.registry import FOLDERS, KINDS, available, find
from fedsim.sweep.config import Sweep

PROJECT = Path(__file__).parents[1]
PAGES = sorted((PROJECT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


class Loaded(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        name = {"script": "src", "img": "src", "link": "href", "iframe": "src"}.get(tag)
        self.addresses += [value for key, value in attrs if key == name and value]


def test_every_component_has_a_page_and_a_row(site):
    for kind in KINDS:
        overview = (site / FOLDERS[kind] / "index.html").read_text(encoding="utf-8")
        for name in available(kind):
            page = (site / FOLDERS[kind] / f"{name}.html").read_text(encoding="utf-8")
            assert f'href="{name}.html"' in overview
            for field in find(kind, name).__pydantic_fields__:
                assert f"--{kind}.{field.replace('_', '-')}<" in page


def test_what_fedclip_sends_is_counted_from_its_tensors(site):
    both = 512 * 512 + 512
    page = (site / "methods" / "fedclip.html").read_text(encoding="utf-8")
    assert f"{2 * both:,}" in page and f"receives {4 * 2 * both:,} bytes" in " ".join(page.split())


def test_a_page_loads_nothing_from_another_host(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses and not [address for address in loaded.addresses if "//" in address], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize("page", [PROJECT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_flag_of_a_page_exists(page):
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_.-]*", page.read_text(encoding="utf-8")))
    assert sorted(flag for flag in shown if not known(flag.strip(".-"))) == []


def known(flag: str) -> bool:
    """Whether a flag without its hyphens is one of fedsim or of a command that the documentation shows."""
    kind, dot, field = flag.replace("-", "_").partition(".")
    if dot:
        return kind in KINDS and any(field in find(kind, name).__pydantic_fields__ for name in available(kind))
    others = {
        "config",
        "detach",
        "help",
        "version",
        "extra",
        "group",
        "address",
        "generate",
        "quick",
        "only",
        "repeats",
        "days",
    }
    return kind in {*Config.model_fields, *Sweep.model_fields, *others}
