"""Runs a command in this terminal, or with --detach in a process that outlives it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsim.cli.background import StatusFile, detach, read_status
from fedsim.cli.flags import DETACH
from fedsim.events import Progress
from fedsim.folder import Kind
from fedsim.progress import plain_console, progress_bars, show_on


def launch(
    argv: Sequence[str],
    folder: Path,
    origin: str,
    check: Callable[[], Any],
    work: Callable[[Progress], Any],
    show: Callable[[Console, Any], None],
    kind: Kind = "run",
) -> int:
    """Runs a command with progress bars, and shows its result; with --detach, starts a process that does.

    Args:
        argv: the command and its flags.
        origin: the config that it starts from, in a few words.
        check: raises what the command would be refused for.
        work: takes a callback for progress; returns what `show` prints.
        kind: what the folder will hold.
    """
    console = plain_console(record=True)
    console.print(origin)
    if DETACH in argv:
        check()
        return _detach(console, folder, [word for word in argv if word != DETACH], kind)
    with (
        progress_bars(console) as bars,
        StatusFile(folder, show_on(bars, f"-> {folder}"), kind) as status,
    ):
        result = work(status.progress)
        bars.stop()
        console.export_text()  # drops what was printed so far
        show(console, result)
        status.message = console.export_text()
    return 0


def _detach(console: Console, folder: Path, argv: Sequence[str], kind: Kind) -> int:
    detach(folder, argv, kind)
    status = read_status(folder)
    console.print(f"-> {folder}")
    console.print("finished" if status.ended else f"runs in process {status.pid} on {status.host}")
    console.print(f"  fedsim watch {folder}\n  fedsim stop {folder}", soft_wrap=True)
    return 0
