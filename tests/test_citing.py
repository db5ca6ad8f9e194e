"""docs/citing.md says where every work that cites FedCLIP is, and follows from the registry."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(__file__).parents[1]
COMMAND = "uv run python tools/citing/build.py"


@pytest.fixture(scope="module")
def build():
    return SimpleNamespace(**runpy.run_path(str(PROJECT / "tools" / "citing" / "build.py")))


def test_the_page_is_as_its_script_makes_it_now(build):
    assert (PROJECT / "docs" / "citing.md").read_text(encoding="utf-8") == build.page(), (
        f"docs/citing.md is stale: {COMMAND}"
    )


def test_every_number_of_the_list_is_there_once_and_is_either_here_or_has_a_reason(build):
    works = build.works()
    assert [work.number for work in works] == list(range(1, 53))
    assert {work.kind for work in works} == {"system", "benchmark", "survey"}
    for work in works:
        assert work.kind == "survey" or work.places or work.reason or work.missing, work.title


def test_what_the_page_links_to_exists(build):
    links = re.findall(r"\]\(\.\./(.*?)\)", build.page())
    assert links and all((PROJECT / link).is_file() for link in links)


def test_every_component_that_names_a_citing_work_as_its_source_is_on_the_page(build):
    # Independent of the script: by arXiv number, in the whole first paragraph that begins with Source.
    page, seen = build.page(), 0
    numbers = {work.paper.removeprefix("arXiv ") for work in build.works() if work.paper.startswith("arXiv ")}
    for file in sorted(PROJECT.glob("fedsim/*/[a-z]*.py")):
        source = re.search(r"^Source:.*?(?=\n\n|\"\"\")", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if source and numbers & set(re.findall(r"\d{4}\.\d{5}", source[0])):
            seen += 1
            assert f"(../{file.relative_to(PROJECT)})" in page, file
    assert seen >= 12
