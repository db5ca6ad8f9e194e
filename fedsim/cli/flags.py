"""Flags: fields of Config, and nothing of their own.

argparse reads the flags and pydantic, in Config, checks them: types, ranges and defaults are then the same in
Python, in YAML and here. (jsonargparse, tried on paper, wants import paths of classes in the YAML, and checks
ranges only of what came through the command line; tyro makes a subcommand of every component.)
"""

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

# What imports torch is imported where it is used: it takes seconds, which some commands can do without.
from fedsim.errors import InputError, listing
from fedsim.registry import KINDS, available, find
from fedsim.search import search_of

DETACH = "--detach"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_run(argv: list[str], command: str = "run", others: Iterable[str] = ()) -> tuple[Any, str]:
    """The Config that the flags of `fedsim run` describe, and a sentence on where it starts from.

    Args:
        command: that has these flags too.
        others: what else it has, to be named where one is misspelt.
    """
    from fedsim.config import Config, merged, read_yaml
    from fedsim.weights import EMBEDDED

    flags = _flags(argv, command, others)
    file = flags.pop("config", None)
    # The embedded experiment is tuned for its own images and model; with any other, defaults are the papers'.
    ours = {"dataset": {"name": "glyphs"}, "backbone": EMBEDDED[0], "pretrained": EMBEDDED[1]}
    embedded = file is None and all(flags.get(name) in (None, value) for name, value in ours.items())
    if embedded:
        file = "glyphs"
    below = read_yaml(file) if file else {}
    origin = f"config {file}" if file else "the papers' defaults"
    if embedded:
        origin = "the embedded experiment (glyphs.yaml, tuned on validation rows; --config paper has FedCLIP's values)"
    return Config(**merged(below, flags)), origin


def run_parser() -> argparse.ArgumentParser:
    """Flags for every field of Config, and for every field of every component below its kind."""
    from fedsim.config import Config, flat, read_yaml

    embedded = flat(read_yaml("glyphs"))
    parser = Parser(
        prog="fedsim run",
        description="Run one experiment; the same command again resumes it. Without --config, on the embedded images "
        f"and model, other defaults apply: {', '.join(f'{name} {value}' for name, value in embedded.items())}.",
        epilog=describe_components(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these fields, or the name of an embedded one")
    parser.add_argument(DETACH, action="store_true", help="go on without this terminal; fedsim watch picks it up again")
    for name, field in Config.model_fields.items():
        switch = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        ours = f"; {embedded[name]} on the embedded images" if name in embedded and name not in KINDS else ""
        about = f"{field.description} (default: {_default(field)}{ours}{_range(Config, name)})"
        parser.add_argument(flag(name), dest=name, metavar=_metavar(name), help=about.replace("%", "%%"), **switch)
    for kind in KINDS:
        fields = {field for name in available(kind) for field in find(kind, name).__pydantic_fields__}
        for field in sorted(fields):
            parser.add_argument(flag(f"{kind}.{field}"), dest=f"{kind}.{field}", help=argparse.SUPPRESS)
    return parser


def describe_components() -> str:
    """Every component with its source, and each of its hyperparameters with default and range."""
    lines = []
    for kind in KINDS:
        lines.append(f"--{kind} NAME, one of:")
        for name in available(kind):
            component = find(kind, name)
            source = (sys.modules[component.__module__].__doc__ or "").partition("Source: ")[2].split("\n\n")[0]
            lines.append(f"  {name}  {(component.__doc__ or '').strip().splitlines()[0]}")
            lines += [f"      source: {' '.join(source.split())}"] if source else []
            for field, about in component.__pydantic_fields__.items():
                line = f"      --{kind}.{field} {_default(about)}{_range(component, field)}"
                lines.append(f"{line}: {about.description}" if about.description else line)
        lines.append("")
    return "\n".join(lines)


def _flags(argv: list[str], command: str, others: Iterable[str]) -> dict[str, Any]:
    """Flags as nested fields: `--method fedclip --method.lr 1e-3` -> {"method": {"name": "fedclip", "lr": "1e-3"}}."""
    parser = run_parser()
    args, unknown = parser.parse_known_args([dashed(word) for word in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = get_close_matches(flag, [*others, *parser._option_string_actions], n=3)
        hint = f"did you mean {listing(close)}?" if close else f"fedsim {command} --help lists all"
        raise InputError(f"no flag {flag}; {hint}")
    fields: dict[str, Any] = {}
    for name, value in vars(args).items():
        kind, _, field = name.partition(".")
        # Not where a value is required: a domain may be called none.
        if value.lower() in ("none", "null") and (field or _optional(name)):
            value = None
        if kind in KINDS:
            fields.setdefault(kind, {})[field or "name"] = value
        else:
            fields[name] = value
    return fields


def _optional(name: str) -> bool:
    from fedsim.config import Config

    return name in Config.model_fields and type(None) in get_args(Config.model_fields[name].annotation)


def _default(field: FieldInfo) -> str:
    try:
        value = field.get_default(call_default_factory=True)
    except InputError:  # of the cache, where this user has no home folder
        value = None
    return "none" if value in (None, ()) else str(value)


def _range(owner: type, name: str) -> str:
    """`, > 0, < 1` or `, one of adam, sgd`, as the field itself declares it, and what a sweep searches of it."""
    field = owner.__pydantic_fields__[name]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = dict.fromkeys(  # a subclass may state a limit of its parent again
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    )
    choices = [f"one of {' | '.join(get_args(field.annotation))}"] if get_origin(field.annotation) is Literal else []
    search = search_of(owner, name)
    return "".join(f", {text}" for text in (*limits, *choices, *([f"searched {search}"] if search else [])))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(name: str) -> str:
    known = {"out": "DIR", "data_dir": "DIR", "cache_dir": "DIR", "held_out": "DOMAIN", "address": "ADDR"}
    known |= {"pretrained": "TAG_OR_FILE", "prompt": "TEXT"} | dict.fromkeys((*KINDS, "backbone", "dtype"), "NAME")
    return known.get(name, "N")


def dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
