"""The command line: the commands, what they print of errors, and their exit codes."""

import sys
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

from fedsim.cli.background import stop, watch
from fedsim.cli.flags import DETACH, Parser, parse_run
from fedsim.cli.progress import bars_on, launch, plain_console, shown
from fedsim.cli.show import rich_table, show_run
from fedsim.cluster.signals import heard

# What imports torch is imported where it is used: it takes seconds, in which `main` already hears Ctrl-C, and which
# some commands can do without.
from fedsim.errors import InputError, Stopped, code_of, listing, sentence_of
from fedsim.streams import Outlet, outlets

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
    show = partial(show_run, folder=folder)
    return launch(["run", *argv], folder, origin, partial(prepare, config), partial(run, config), show)


def sweep_command(argv: list[str]) -> int:
    """fedsim sweep: a search over hyperparameters."""
    from fedsim.sweep.command import sweep_command

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
    console.print(rich_table(table))
    console.print(f"page  {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
