"""A self-contained HTML page: sections of words, plots and tables. `page.html.j2` is the only place that knows HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.reporting.canvas import Plot

LONGEST = 1000  # rows of a table: a page of 10 000 clients would otherwise be over a megabyte


@dataclass(frozen=True)
class Section:
    """A heading and what follows it; tables by caption, with cells as they are shown, folded if long and not `open`."""

    heading: str
    words: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    code: str = ""
    open: bool = False


def render(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a page, which loads nothing from anywhere."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True)
    return pages.get_template("page.html.j2").render(title=title, sections=sections)


def portable(value: Any) -> Any:
    """The same without the machine in it: of an absolute path, only the last name."""
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
