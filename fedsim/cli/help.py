"""The texts of `fedsim run --help`, `fedsim help` and `fedsim list`; 80 columns wide."""

import ast
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from fedsim.errors import InputError, listing

# What imports torch is imported in functions: it takes seconds, and `fedsim list` does not need it.
from fedsim.registry import FOLDERS, KINDS, available, find
from fedsim.search_space import LIMITS, search_of

WIDTH = 80
LISTS = {folder: kind for kind, folder in FOLDERS.items()}
# The first field of each group, in the order of Config.
GROUPS = {"dataset": "data", "held_out": "clients", "method": "training and evaluation", "engine": "execution"}
METAVARS = {"data_dir": "DIR", "out": "DIR", "cache_dir": "DIR", "held_out": "DOMAINS", "prompt": "TEXT"}
METAVARS |= {"backbone": "NAME", "pretrained": "NAME", "precision": "NAME", "dtype": "NAME", "engine": "NAME"}
METAVARS |= {"address": "ADDR", "loggers": "NAMES"}


def run_help() -> str:
    """The fields of an experiment in groups, and where components are listed."""
    from fedsim.config import DEFAULTS, Config, flat, read_yaml

    embedded = flat(read_yaml("glyphs"))
    values = listing(f"{name} {value}" for name, value in embedded.items() if name not in Config.model_fields)
    intro = (
        "Run one experiment; the same command again resumes it. Without --config, on the embedded images and model, "
        f"other defaults apply: those marked glyphs, {values}."
    )
    lines = ["usage: fedsim run [--config FILE] [--detach] [--FIELD VALUE ...]", "", *wrap(intro, WIDTH)]
    lines += ["", "components (e.g. fedsim list methods), each with fields (fedsim help NAME):"]
    for kind, default in DEFAULTS.items():
        lines += _entry(f"{flag(kind)} NAME", f"one of {len(available(kind))} (default: {default})")
    for name, field in Config.model_fields.items():
        if name in GROUPS:
            lines.append(f"{GROUPS[name]}:")
        if name not in KINDS:
            switch = field.annotation is bool
            metavar = "" if switch else f" {METAVARS.get(name, 'N')}"
            details = [*_choices(field), *_defaults(field) * (not switch)]
            details += [f"glyphs: {embedded[name]}"] if name in embedded else []
            lines += _entry(flag(name) + metavar, _described(field, [*details, *_searched(Config, name)]))
    lines += _entry("--config FILE", "YAML file of these fields, or an embedded config")
    lines += _entry("--detach", "run in the background; fedsim watch shows the progress")
    return "\n".join(lines) + "\n"


def component_help(name: str) -> str:
    """A component in full: what it is, its source, and each of its fields.

    Raises:
        InputError: no component of that name; the message lists names.
    """
    name = name.replace("-", "_")
    kinds = [kind for kind in KINDS if name in available(kind)]
    if not kinds:
        names = [name for kind in KINDS for name in available(kind)]
        close = get_close_matches(name, names, n=3)
        hint = f"did you mean {listing(close)}?" if close else f"available: {listing(names, 80)}"
        raise InputError(f"no component {name!r}; {hint}")
    return "\n\n".join("\n".join(_component(kind, name)) for kind in kinds) + "\n"


def limits_of(owner: type, field: str) -> list[str]:
    """The limits of a field of a component: `["> 0", "< 1"]`."""
    limits = (
        f"{sign} {getattr(limit, name):g}"
        for limit in owner.__pydantic_fields__[field].metadata
        for name, (sign, _) in LIMITS.items()
        if hasattr(limit, name)
    )
    return list(dict.fromkeys(limits))  # a subclass may repeat a limit of its parent


def show_components(console: Console, names: list[str]) -> None:
    """Prints the names of components and a line about each.

    Args:
        names: some of `LISTS`; all of them if empty.

    Raises:
        InputError: another name.
    """
    for name in names:
        if name not in LISTS:
            raise InputError(f"no list {name!r}; available: {listing(LISTS)}")
    for title in names or LISTS:
        kind = LISTS[title]
        table = Table(title=title, title_justify="left") if console.is_terminal else None
        if table:
            table.add_column("name", no_wrap=True)
            table.add_column("what it is")
        for name in available(kind):
            if table:
                table.add_row(name, _summary(kind, name))
            else:
                console.print(f"{name:<17} {_summary(kind, name)}", soft_wrap=True)
        if table:
            console.print(table)


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _summary(kind: str, name: str) -> str:
    """The first line of a component's file, which is not imported for it."""
    file = Path(__file__).parents[1] / FOLDERS[kind] / f"{name}.py"
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _component(kind: str, name: str) -> Iterator[str]:
    component = find(kind, name)
    yield f"--{kind} {name}"
    for text in (sys.modules[component.__module__].__doc__, component.__doc__):
        for paragraph in (text or "").split("\n\n"):
            yield ""
            yield from wrap(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False)
    if component.__pydantic_fields__:
        yield from ("", "fields")
    for field, about in component.__pydantic_fields__.items():
        details = [*_choices(about), *_defaults(about), *limits_of(component, field), *_searched(component, field)]
        yield from _entry(flag(f"{kind}.{field}"), _described(about, details), 28)


def _entry(name: str, text: str, column: int = 24) -> list[str]:
    """A flag and the text about it, which begins at a column."""
    first = f"  {name:<{column - 3}} "
    if len(first) > column:
        return [first.rstrip(), *_entry("", text, column)]
    return wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False)


def _described(field: FieldInfo, details: list[str]) -> str:
    """`rows per local step (default: 32; >= 1)`."""
    text = field.description or ""
    text, described, default = text.partition(" (default: ")  # as of a field whose default is None
    if described:
        details = [f"default: {default.removesuffix(')')}", *details]
    return f"{text} ({'; '.join(details)})".strip() if details else text


def _choices(field: FieldInfo) -> list[str]:
    return [" | ".join(get_args(field.annotation))] if get_origin(field.annotation) is Literal else []


def _defaults(field: FieldInfo) -> list[str]:
    value = field.default
    if field.default_factory or value in (None, ()):  # the description says what happens
        return []
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return [f"default: {str(value).lower() if isinstance(value, bool) else value}"]


def _searched(owner: type, field: str) -> list[str]:
    search = search_of(owner, field)
    return [f"searched {search}"] if search else []
