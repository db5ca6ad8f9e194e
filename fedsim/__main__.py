"""The command line: fields of Config, and nothing of its own.

argparse reads the flags and pydantic, in Config, checks them: types, ranges and defaults are then the same in
Python, in YAML and here. (jsonargparse, tried on paper, wants import paths of classes in the YAML, and checks
ranges only of what came through the command line; tyro makes a subcommand of every component.)
"""

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

# What imports torch is imported where it is used: it takes seconds, in which `main` already hears Ctrl-C, and which
# some commands can do without.
from fedsim.errors import InputError, Stopped, code_of, listing, sentence_of
from fedsim.formats import number, percent
from fedsim.registry import KINDS, available, find
from fedsim.search import search_of
from fedsim.signals import heard
from fedsim.streams import Outlet, outlets
from fedsim.terminal import DETACH, Parser, bars_on, launch, plain_console, shown
from fedsim.watch import stop, watch

USAGE = """\
fedsim run [FLAGS]                    one experiment
fedsim sweep [FLAGS]                  a search over hyperparameters
fedsim compare RUN RUN ... [--out D]  finished runs side by side
fedsim watch FOLDER                   a run or sweep that another process is doing, to its end
fedsim stop FOLDER                    interrupts it; the same command goes on from there
--help after any of them tells more; fedsim --version"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 128 + its number for a signal, 1 for whatever else stopped a run.

    Also 1 where all was done, but could not be printed since a disk is full; a reader that has gone is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that a terminal cannot show is shown in escapes
            stream.reconfigure(errors="backslashreplace")
    with outlets() as (printed, _), heard():
        try:
            return _command(sys.argv[1:] if argv is None else argv) or _printed(printed)
        except (InputError, Stopped, KeyboardInterrupt) as error:
            print(f"fedsim: {sentence_of(error)}", file=sys.stderr)
            return code_of(error)


def _command(argv: list[str]) -> int:
    commands = {
        "run": run_command,
        "sweep": sweep_command,
        "compare": compare_command,
        "watch": watch_command,
        "stop": stop_command,
    }
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(f"fedsim {version('fedsim')}")
        return 0
    if argv[0] not in commands:
        raise InputError(f"no command {argv[0]!r}; there are: {listing(commands)}")
    return commands[argv[0]](argv[1:])


def _printed(outlet: Outlet) -> int:
    outlet.flush()
    if outlet.fault is None or isinstance(outlet.fault, BrokenPipeError):
        return 0
    raise Stopped(f"standard output: {outlet.fault.strerror}; all but what is printed is complete")


def run_command(argv: list[str]) -> int:
    """fedsim run: one experiment, with its progress and a small table at the end."""
    config, origin = parse_run([word for word in argv if word != DETACH])
    from fedsim.simulate import prepare, run

    folder = config.folder()
    show = partial(_show, folder=folder)
    return launch(["run", *argv], folder, origin, partial(prepare, config), partial(run, config), show)


def sweep_command(argv: list[str]) -> int:
    """fedsim sweep: a search over hyperparameters."""
    for mine in (Path("tune.py"), Path("tune/__init__.py")):
        if mine.exists() and mine.absolute().parents[1 if mine.parent.name else 0] != Path(__file__).parents[1]:
            # Ray's workers look in the folder where a command was given before they look among what is installed.
            raise InputError(f"{mine} in this folder hides fedsim's own `tune`; give the command in another folder")
    from tune.command import sweep_command

    return sweep_command(argv)


def watch_command(argv: list[str]) -> int:
    """fedsim watch: a run or a sweep of another process, until it ends; its exit code."""
    console = plain_console()
    folder = _folder("watch", "Show how a run or sweep is getting on, until it ends; to leave does not end it.", argv)
    with bars_on(console) as bars:
        ended = watch(folder, shown(bars))
    if ended.code:
        print(f"fedsim: {ended.said}", file=sys.stderr)
    else:
        console.print(ended.said, end="")
    return ended.code


def stop_command(argv: list[str]) -> int:
    """fedsim stop: interrupts a run or a sweep of another process."""
    stop(_folder("stop", "Interrupt a run or sweep, as Ctrl-C would.", argv))
    return 0


def _folder(command: str, about: str, argv: list[str]) -> Path:
    parser = Parser(prog=f"fedsim {command}", description=about, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="its --out, as it was said when it started")
    return parser.parse_args(argv).folder


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


def compare_command(argv: list[str]) -> int:
    """fedsim compare: runs side by side, as a table and a page."""
    parser = Parser(prog="fedsim compare", description="Lay finished runs side by side.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where compare.html goes (default: here)"
    )
    args = parser.parse_args(argv)
    from fedsim.compare import compare

    console = plain_console()
    table, page = compare(args.runs, args.out / "compare.html", console.print)
    console.print(_rich(table))
    console.print(f"page  {page}")
    return 0


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
        parser.add_argument(_flag(name), dest=name, metavar=_metavar(name), help=about.replace("%", "%%"), **switch)
    for kind in KINDS:
        fields = {field for name in available(kind) for field in find(kind, name).__pydantic_fields__}
        for field in sorted(fields):
            parser.add_argument(_flag(f"{kind}.{field}"), dest=f"{kind}.{field}", help=argparse.SUPPRESS)
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
    args, unknown = parser.parse_known_args([_dashed(word) for word in argv])
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(name: str) -> str:
    known = {"out": "DIR", "data_dir": "DIR", "cache_dir": "DIR", "held_out": "DOMAIN", "address": "ADDR"}
    known |= {"pretrained": "TAG_OR_FILE", "prompt": "TEXT"} | dict.fromkeys((*KINDS, "backbone", "dtype"), "NAME")
    return known.get(name, "N")


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _show(console: Console, report, folder: Path) -> None:
    from fedsim.page import remarks, rows_tested

    for remark in remarks(report):
        console.print(remark)
    means = report.zero_shot_summary(), report.summary()
    counts = rows_tested(report)
    heads = {"generalization": f"held-out domain ({listing(report.held_out)})"} if report.held_out else {}
    heads |= {
        "personalization": "clients' own test rows",
        "worst_tenth": "worst tenth of clients",
    }
    if any(abs(one["personalization_own"] - one["personalization"]) > 0 for one in means):
        heads["personalization_own"] = "own test rows among own classes"
    tables = {f"accuracy in percent, round {report.chosen_round} of {report.last_round}": heads}
    if report.new_classes:
        heads = {
            "local": "local",
            "base": "base",
            "new": "new",
            "harmonic_2": "of base, new",
            "harmonic_3": "of all three",
        }
        tables["base and new classes, and harmonic means"] = heads
    method, server = report.experiment["method"]["name"], report.experiment["server"]["name"]
    for title, heads in tables.items():
        table = Table(title=title)
        for head in ("", *heads.values()):
            table.add_column(head, justify="right" if head else "left")
        for name, one in zip(("zero-shot CLIP", f"{method}, {server}"), means, strict=True):
            table.add_row(name, *(percent(one[key]) for key in heads))
        if counts.keys() & heads.keys():
            table.add_row("test rows", *(number(counts[key]) if key in counts else "" for key in heads))
        console.print(table)
    for file in ("report.html", "scores.parquet", "rounds.parquet", "adapter.safetensors", "config.yaml"):
        console.print(f"  {folder / file}", soft_wrap=True)


def _rich(frame) -> Table:
    if len(frame) < len(frame.columns):  # a few runs stand side by side, or their many columns would not fit
        frame = frame.set_index("name").T.reset_index(names="name")
    table = Table()
    for place, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if place else "left", overflow="fold", no_wrap=not place)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


if __name__ == "__main__":
    sys.exit(main())
