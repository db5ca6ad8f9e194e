"""The commands of fedsim, and their exit codes."""

import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from fedsim import __version__
from fedsim.cli.background import stop, watch
from fedsim.cli.flags import DETACH, Parser, parse_run
from fedsim.cli.launch import launch
from fedsim.cli.show import rich_table, show_run
from fedsim.cli.streams import SafeStream, safe_streams
from fedsim.cluster.signals import signals_as_interrupts

# What imports torch is imported in functions: it takes seconds, in which `main` already handles Ctrl-C, and some
# commands do not need it.
from fedsim.errors import EXPECTED, RESUMES, InputError, Stopped, code_of, listing, sentence_of
from fedsim.memory import collect_seldom
from fedsim.progress import plain_console, progress_bars, show_on
from fedsim.registry import FOLDERS

USAGE = """\
fedsim run [FLAGS]                    run one experiment
fedsim sweep [FLAGS]                  search over hyperparameters
fedsim compare RUN RUN ... [--out D]  compare finished runs in a table and a page
fedsim page RUN                       write the page of a finished run again
fedsim watch FOLDER                   show the progress of a run or sweep in another process
fedsim stop FOLDER                    interrupt it; the same command resumes it
fedsim list [KIND]                    list methods, servers, codecs, datasets, ...
fedsim help NAME                      describe a method, server, ... or command
fedsim doctor                         look at this machine: versions, GPUs, memory, weights, Ray
fedsim cache [prune]                  list encoded features, or remove those not used for a while
fedsim completion SHELL               print a script that completes flags and names in a shell
Every command has --help; fedsim --version"""
# How things stand after Ctrl-C, for the commands that it does not make resumable.
AFTER_INTERRUPT = {
    "compare": "run the same command again",
    "page": "run the same command again",
    "doctor": "run the same command again",
    "cache": "run the same command again",
    "watch": "the run or sweep itself continues",
    "stop": "the run or sweep may not have ended yet",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for bad input, 128 + the number of a signal, or 1 for any other failure.

    Output lost to a full disk is a failure, although the work is done; output lost to a closed pipe is not.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of another encoding shows a name in escapes
            stream.reconfigure(errors="backslashreplace")
    collect_seldom()
    argv = sys.argv[1:] if argv is None else argv
    with safe_streams() as (stdout, _), signals_as_interrupts():
        try:
            return _command(argv) or _check_printed(stdout)
        except (*EXPECTED, KeyboardInterrupt) as error:
            after_interrupt = AFTER_INTERRUPT.get("".join(argv[:1]), RESUMES)
            print(f"fedsim: {sentence_of(error, after_interrupt)}", file=sys.stderr)
            return code_of(error)


def _command(argv: list[str]) -> int:
    commands = {
        "run": run_command,
        "sweep": sweep_command,
        "compare": compare_command,
        "page": page_command,
        "watch": watch_command,
        "stop": stop_command,
        "list": list_command,
        "help": help_command,
        "doctor": doctor_command,
        "cache": cache_command,
        "completion": completion_command,
    }
    if argv[:1] == ["help"] and (len(argv) == 1 or argv[1] in commands):
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(f"fedsim {__version__}")
        return 0
    if argv[0] not in commands:
        raise InputError(f"no command {argv[0]!r}; available: {listing(commands)}")
    return commands[argv[0]](argv[1:])


def _check_printed(stream: SafeStream) -> int:
    stream.flush()
    if stream.fault is None or isinstance(stream.fault, BrokenPipeError):
        return 0
    raise Stopped(f"standard output: {stream.fault.strerror}; the work is complete, its output is not")


def run_command(argv: list[str]) -> int:
    """fedsim run: one experiment."""
    config, origin = parse_run([word for word in argv if word != DETACH])
    from fedsim.prepare import prepare
    from fedsim.simulate import run

    folder = config.folder()
    return launch(
        ["run", *argv],
        folder,
        origin,
        partial(prepare, config),
        partial(run, config),
        lambda console, report: show_run(console, report.tables(), folder),
    )


def sweep_command(argv: list[str]) -> int:
    """fedsim sweep: a search over hyperparameters."""
    from fedsim.sweep.command import sweep_command

    return sweep_command(argv)


def watch_command(argv: list[str]) -> int:
    """fedsim watch: shows a run or sweep of another process until it ends, and returns its exit code."""
    console = plain_console()
    folder = _folder("watch", "Show the progress of a run or sweep until it ends; Ctrl-C ends only this command.", argv)
    with progress_bars(console) as bars:
        ended = watch(folder, show_on(bars))
    if ended.code:
        print(f"fedsim: {ended.message}", file=sys.stderr)
    else:
        console.print(ended.message, end="")
    return ended.code


def stop_command(argv: list[str]) -> int:
    """fedsim stop: interrupts a run or sweep of another process."""
    stop(_folder("stop", "Interrupt a run or sweep, as Ctrl-C does.", argv))
    return 0


def list_command(argv: list[str]) -> int:
    """fedsim list: the names of components, and a line about each."""
    parser = Parser(prog="fedsim list", description="List components by kind.", allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{listing(FOLDERS.values())} (default: all)")
    args = parser.parse_args(argv)
    from fedsim.cli.help import show_components

    show_components(plain_console(), args.kinds)
    return 0


def help_command(argv: list[str]) -> int:
    """fedsim help: one component in full."""
    parser = Parser(prog="fedsim help", description="Describe a component and its fields.", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="name of a component, as fedsim list prints it, or of a command")
    args = parser.parse_args(argv)
    from fedsim.cli.help import component_help

    print(component_help(args.name), end="")
    return 0


def _folder(command: str, description: str, argv: list[str]) -> Path:
    parser = Parser(prog=f"fedsim {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="its --out, or the folder that it printed at its start"
    )
    return parser.parse_args(argv).folder


def compare_command(argv: list[str]) -> int:
    """fedsim compare: finished runs in a table and a page."""
    parser = Parser(prog="fedsim compare", description="Compare finished runs: a table and a page.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder for compare.html (default: current folder)"
    )
    args = parser.parse_args(argv)
    from fedsim.reporting.compare import compare

    console = plain_console()
    table, page = compare(args.runs, args.out / "compare.html", console.print)
    console.print(rich_table(table))
    console.print(f"page  {page}")
    return 0


def page_command(argv: list[str]) -> int:
    """fedsim page: the page of a finished run, from its tables."""
    parser = Parser(prog="fedsim page", description="Write report.html of a finished run again.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    args = parser.parse_args(argv)
    from fedsim.folder import exclusive
    from fedsim.prepare import PAGE
    from fedsim.reporting.page import write_page
    from fedsim.reporting.parquet import read_tables

    tables = read_tables(args.run)
    with exclusive(args.run, "run"):
        write_page(tables, args.run / PAGE)
    plain_console().print(f"page  {args.run / PAGE}", soft_wrap=True)
    return 0


def doctor_command(argv: list[str]) -> int:
    """fedsim doctor: what a run finds on this machine; 1 if something needs a remedy."""
    description = "Look at this machine: versions, GPUs, memory, folders, weights, and whether Ray starts."
    parser = Parser(prog="fedsim doctor", description=description, allow_abbrev=False)
    add_cache_dir(parser)
    parser.add_argument("--address", metavar="ADDR", help="Ray cluster, host:port or auto (default: a private one)")
    args = parser.parse_args(argv)
    from fedsim.cli.doctor import examine, report

    return 1 if report(plain_console(), examine(args.cache_dir, args.address)) else 0


def cache_command(argv: list[str]) -> int:
    """fedsim cache: what is in the cache; fedsim cache prune: removes what is not used."""
    parser = Parser(prog="fedsim cache", description="List or prune encoded features.", allow_abbrev=False)
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list", help="(default: list)")
    parser.add_argument("--days", type=float, default=30, metavar="N", help="unused for so long (default: 30; 0: all)")
    add_cache_dir(parser)
    args = parser.parse_args(argv)
    from fedsim.cli.cached import show_cache

    show_cache(plain_console(), args.cache_dir, args.days if args.action == "prune" else None)
    return 0


def completion_command(argv: list[str]) -> int:
    """fedsim completion: a script for a shell."""
    description = 'Print a script that completes flags and names: eval "$(fedsim completion bash)"'
    parser = Parser(prog="fedsim completion", description=description, allow_abbrev=False)
    from fedsim.cli.completion import SHELLS, completion

    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    from fedsim.cli.flags import run_parser
    from fedsim.sweep.command import sweep_parser

    print(completion(shell, {"run": [run_parser()], "sweep": [sweep_parser(), run_parser()]}))
    return 0


def add_cache_dir(parser: Parser) -> None:
    from fedsim.config import cache_dir

    folder = cache_dir()
    parser.add_argument("--cache-dir", type=Path, default=folder, metavar="DIR", help=f"(default: {folder})")


if __name__ == "__main__":
    sys.exit(main())
