"""A release: a wheel with the package alone, an sdist with the whole repository, and one version in every place.

`.ci/wheel` runs the wheel in an empty environment.
"""

import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

from fedsim import __version__

PROJECT = Path(__file__).parents[1]
NAME, VERSION, LICENCES = re.findall(
    r'^(?:name|version|license) = "(.*)"$', (PROJECT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)
NAMED = f"{NAME.replace('-', '_')}-{VERSION}"
DIST_INFO = f"{NAMED}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([os.environ.get("UV", "uv"), "build", "-q", "-o", out, PROJECT], check=True)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built / f"{NAMED}-py3-none-any.whl") as archive:
        yield archive


def repository(*below: str) -> set[str]:
    """The files that git knows or would add."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *below]
    files = subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.split("\0")
    return {file for file in files if (PROJECT / file).is_file()}


def test_the_sdist_holds_the_repository(built):
    with tarfile.open(built / f"{NAMED}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAMED}/") for name in archive.getnames()}
    assert names == repository() | {"PKG-INFO"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    package = {name for name in names if not name.startswith(DIST_INFO)}
    assert package == repository("fedsim")
    assert package >= {
        "fedsim/py.typed",
        "fedsim/reporting/page.html.j2",
        "fedsim/assets/glyphs/glyphs.parquet",
        "fedsim/assets/tiny/tiny.safetensors",
        "fedsim/experiments/paper.yaml",
    }


def test_the_metadata_is_valid_and_has_every_licence(wheel):
    about = Metadata.from_email(wheel.read(f"{DIST_INFO}/METADATA"), validate=True)
    assert (about.name, str(about.version)) == (NAME, VERSION)
    assert about.description == (PROJECT / "README.md").read_text(encoding="utf-8")
    assert set(about.provides_extra or ()) == {"huggingface", "privacy"}
    expected = {"LICENSE", *repository("fedsim/assets/*/NOTICE.md", "fedsim/assets/*/LICENSE-*")}
    assert len(expected) == 4 and {*(about.license_files or ())} == expected
    assert {f"{DIST_INFO}/licenses/{file}" for file in expected} <= {*wheel.namelist()}


def test_every_licence_of_the_embedded_drawings_is_declared():
    rows = (PROJECT / "fedsim/assets/glyphs/NOTICE.md").read_text(encoding="utf-8").splitlines()
    licences = {cells[4].strip() for row in rows if len(cells := row.split("|")) == 7} - {"licence", "---"}
    assert licences - {"public domain"} == set(LICENCES.split(" AND "))


def test_every_place_has_the_version_of_pyproject():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ == VERSION
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[?(\d+\.\d+\.\d+)", text, flags=re.MULTILINE)
    assert not released or released[0] == VERSION


def test_the_changelog_has_the_sections_of_keep_a_changelog():
    releases = re.split(r"^## .*$", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for release in releases:
        before, *sections = re.split(r"^### (.*)$", release, flags=re.MULTILINE)
        assert not before.strip(), before
        assert {*sections[::2]} <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
