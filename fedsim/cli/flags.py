"""The flags of `fedsim run`: one for every field of Config and of every component.

argparse reads the flags; pydantic checks them in Config, so types, ranges and defaults are the same in Python, in YAML
and on the command line. (Rejected: jsonargparse, which needs import paths of classes in the YAML and checks ranges only
of flags; tyro, which makes each component a subcommand.)
"""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from fedsim.cli.help import flag, run_help

# What imports torch is imported in functions: it takes seconds, and some commands do not need it.
from fedsim.errors import RENAMED, InputError, listing
from fedsim.registry import KINDS, available, find

if TYPE_CHECKING:
    from fedsim.config import Config

DETACH = "--detach"


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_run(
    argv: Sequence[str],
    command: str = "run",
    other_flags: Iterable[str] = (),
    base: tuple[dict[str, Any], str] | None = None,
) -> tuple["Config", str]:
    """The Config that flags describe, and where it starts from in a few words, for the user.

    Args:
        command: the command that takes these flags.
        other_flags: which it takes besides; used to suggest a correction of a misspelt one.
        base: fields and name of the config to start from, instead of --config.
    """
    from fedsim.config import Config, merged

    words = with_dashes(argv)
    try:
        args, unknown = _parser(_component_fields(words)).parse_known_args(words)
        if unknown:
            raise InputError(f"no flag {unknown[0]}")
        flags = _nested(vars(args))
        file = flags.pop("config", None)
        fields, origin = base or _base(file, flags)
        return Config(**merged(fields, flags)), origin
    except Exception:
        # An unknown flag may be the cause: only now are all components imported, to find out.
        _check_flags(words, command, other_flags)
        raise


def _base(file: str | None, flags: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Fields and name of the config that flags override."""
    from fedsim.clip.checkpoints import EMBEDDED
    from fedsim.config import read_yaml

    if file:
        return read_yaml(file), f"config {file}"
    # The embedded experiment is tuned for its own images and model; with others, the defaults are the papers'.
    embedded = {"dataset": "glyphs", "backbone": EMBEDDED[0], "pretrained": EMBEDDED[1]}
    given = flags | {"dataset": flags.get("dataset", {}).get("name")}
    if all(given.get(name) in (None, value) for name, value in embedded.items()):
        words = "the embedded experiment (glyphs.yaml, tuned on validation rows; --config paper has FedCLIP's values)"
        return read_yaml("glyphs"), words
    return {}, "the papers' defaults"


def run_parser() -> argparse.ArgumentParser:
    """The parser of `fedsim run`, with the flags of all components; imports each of them, which takes a second."""
    components = ((kind, find(kind, name)) for kind in KINDS for name in available(kind))
    return _parser(f"{kind}.{field}" for kind, component in components for field in component.__pydantic_fields__)


def _parser(component_fields: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of `fedsim run`, with flags of these fields of components: `method.lr`."""
    from fedsim.config import Config

    parser = _RunParser(prog="fedsim run", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config")
    parser.add_argument(DETACH, action="store_true")
    for name, field in Config.model_fields.items():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(flag(name), dest=name, **switch)
    for name in sorted({*component_fields}):
        parser.add_argument(flag(name), dest=name)
    return parser


class _RunParser(Parser):
    def format_help(self) -> str:
        return run_help()


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Flags written with underscores, as they are defined: `--held_out=ink` -> `--held-out=ink`."""
    parts = [word.partition("=") for word in argv]
    return [
        flag(name[2:]) + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in parts
    ]


def _component_fields(words: Sequence[str]) -> set[str]:
    """The fields of components that flags name, such as `method.lr`; they may not exist."""
    names = (word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--"))
    parts = ((name, *name.partition(".")[::2]) for name in names)
    return {name for name, kind, field in parts if kind in KINDS and field.isidentifier() and field != "name"}


def _check_flags(words: Sequence[str], command: str, other_flags: Iterable[str]) -> None:
    """Raises InputError for the first flag that neither Config nor any component has."""
    parser = run_parser()
    _, unknown = parser.parse_known_args(words)
    if not unknown:
        return
    name = unknown[0].partition("=")[0]
    kind, _, field = name.removeprefix("--").replace("-", "_").rpartition(".")
    if current := RENAMED.get(field):
        raise InputError(f"no flag {name}; it is now called {flag(f'{kind}.{current}' if kind else current)}")
    close = get_close_matches(name, [*other_flags, *parser._option_string_actions], n=3)
    hint = f"did you mean {listing(close)}?" if close else f"fedsim {command} --help lists all"
    raise InputError(f"no flag {name}; {hint}")


def _nested(args: dict[str, Any]) -> dict[str, Any]:
    """Flags as nested fields: `--method fedclip --method.lr 1e-3` -> {"method": {"name": "fedclip", "lr": "1e-3"}}."""
    fields: dict[str, Any] = {}
    for name, value in args.items():
        kind, _, field = name.partition(".")
        # A domain may be called none: only fields that can be empty take the word.
        if value.lower() in ("none", "null") and (field or _may_be_none(name)):
            value = None
        if kind in KINDS:
            fields.setdefault(kind, {})[field or "name"] = value
        else:
            fields[name] = value
    return fields


def _may_be_none(field: str) -> bool:
    from fedsim.config import Config

    return field in Config.model_fields and type(None) in get_args(Config.model_fields[field].annotation)
