"""Writes docs/citing.md: every work that cites FedCLIP, and where it is in fedsim, from works.yaml and the registry.

uv run python tools/citing/build.py
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedsim.config import Config
from fedsim.registry import FOLDERS, KINDS, available

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "citing.md"
WORKS = Path(__file__).parent / "works.yaml"
ADDRESSES = {"arXiv ": "https://arxiv.org/abs/", "doi ": "https://doi.org/"}
Component = tuple[str, str]  # kind and name

HEAD = """\
# The works that cite FedCLIP

Of {total} works that cite FedCLIP, {systems} are systems or benchmarks, and {surveys} are surveys. Of the former,
{here} are here, completely or in part; for the others, this page gives the reason. The file of a component says which
paper and code it was checked against, and where it differs from them.

This page is made by `tools/citing/build.py` from `tools/citing/works.yaml` and the components that exist.
"""


@dataclass(frozen=True)
class Work:
    """An entry of works.yaml, which says what its fields are."""

    number: int
    kind: str
    title: str
    name: str = ""
    authors: str = ""
    year: int = 0
    paper: str = ""
    source: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)
    partitions: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    note: str = ""
    reason: str = ""

    @property
    def named(self) -> list[Component]:
        """The components that the entry names, whether they exist or not."""
        kinds = ("method", self.methods), ("server", self.servers), ("partition", self.partitions)
        return [(kind, name) for kind, names in kinds for name in names]

    @property
    def missing(self) -> list[Component]:
        return [component for component in self.named if component not in COMPONENTS]

    @property
    def places(self) -> list[str]:
        """Links to the components and files of the work that exist, and the flags that do."""
        links = [link(component) for component in self.named if component in COMPONENTS]
        flags = [f"`--{name.replace('_', '-')}`" for name in self.flags if name in Config.model_fields]
        present = [file for file, words in self.files.items() if words in (PROJECT / file).read_text(encoding="utf-8")]
        return [*links, *flags, *(f"[`{file}`](../{file})" for file in present)]

    @property
    def naming(self) -> list[Component]:
        """The components whose `Source:` names the work."""
        words = [re.escape(word) for word in (*self.source, self.paper) if word]
        pattern = re.compile(rf"(?<!\w)({'|'.join(words)})(?!\w)")
        return [component for component, text in SOURCES.items() if words and pattern.search(text)]


def file_of(component: Component) -> str:
    kind, name = component
    return f"fedsim/{FOLDERS[kind]}/{name}.py"


def source_of(component: Component) -> str:
    """The paragraph `Source:` of a component's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse((PROJECT / file_of(component)).read_text(encoding="utf-8"))) or ""
    return next((part for part in docstring.split("\n\n") if part.startswith("Source:")), "").replace("\n", " ")


def link(component: Component) -> str:
    return f"{component[0]} [`{component[1]}`](../{file_of(component)})"


COMPONENTS = [(kind, name) for kind in KINDS for name in available(kind)]
SOURCES = {component: source_of(component) for component in COMPONENTS}


def works() -> list[Work]:
    return [Work(**entry) for entry in yaml.safe_load(WORKS.read_text(encoding="utf-8"))]


def page() -> str:
    surveys = [work for work in works() if work.kind == "survey"]
    others = [work for work in works() if work.kind != "survey"]
    here = [work for work in others if work.places]
    absent = [work for work in others if not work.places]
    counts = {"total": len(works()), "systems": len(others), "surveys": len(surveys), "here": len(here)}
    return "\n".join(
        [
            HEAD.format(**counts),
            "## In fedsim\n\n| # | work | where |\n| --- | --- | --- |",
            *(f"| {work.number} | {cited(work)} | {where(work)} |" for work in here),
            "\n## Not in fedsim\n\n| # | work | why |\n| --- | --- | --- |",
            *(f"| {work.number} | {cited(work)} | {why(work)} |" for work in absent),
            "\n## Surveys\n\n| # | work |\n| --- | --- |",
            *(f"| {work.number} | {cited(work)} |" for work in surveys),
            "",
        ]
    )


def where(work: Work) -> str:
    return _joined(", ".join(work.places), work.note, source_for(work), not_here(work))


def why(work: Work) -> str:
    return _joined(work.reason, source_for(work), not_here(work))


def source_for(work: Work) -> str:
    others = [link(component) for component in work.naming if component not in work.named]
    return f"a source of {', '.join(others)}" if others else ""


def not_here(work: Work) -> str:
    missing = [f"{kind} `{name}`" for kind, name in work.missing]
    return f"not here yet: {', '.join(missing)}" if missing else ""


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def cited(work: Work) -> str:
    name = f"**{work.name}**. " if work.name else ""
    if not work.paper:
        return f"{name}{work.title} (its subject; the paper was not found)"
    prefix = next((prefix for prefix in ADDRESSES if work.paper.startswith(prefix)), "")
    address = ADDRESSES.get(prefix, "") + work.paper.removeprefix(prefix)
    return f"{name}{work.authors} {work.year}, [{work.title}]({address})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(PROJECT)}")
