"""What the commands share: their flags' parser, their bars, and how they leave a terminal."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedsim.errors import InputError
from fedsim.pool import Progress as Tell
from fedsim.watch import Telling, detach, read_status

DETACH = "--detach"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def launch(
    argv: Sequence[str],
    folder: Path,
    origin: str,
    check: Callable[[], Any],
    work: Callable[[Tell], Any],
    show: Callable[[Console, Any], None],
) -> int:
    """Does a command with its progress and what it shows at the end; or, with --detach, has another process do it.

    Args:
        argv: the command and its flags.
        origin: where it starts from, in a sentence.
        check: raises what the command would be refused for.
        work: told whom to tell of its progress; what it returns is shown.
    """
    console = Console(record=True)
    console.print(f"{origin}\n-> {folder}", highlight=False)
    if DETACH in argv:
        check()
        return _let_go(console, folder, [word for word in argv if word != DETACH])
    with bars_on(console) as bars, Telling(folder, shown(bars)) as telling:
        found = work(telling.progress)
        bars.stop()
        console.export_text()  # what was said so far
        show(console, found)
        telling.said = console.export_text()
    return 0


def _let_go(console: Console, folder: Path, argv: Sequence[str]) -> int:
    detach(folder, argv)
    status = read_status(folder)
    where = "is done" if status["ended"] else f"goes on in process {status['pid']} on {status['host']}"
    console.print(where, highlight=False)
    console.print(f"  fedsim watch {folder}\n  fedsim stop {folder}", highlight=False, soft_wrap=True)
    return 0


def bars_on(console: Console) -> Progress:
    """A bar for each stage of a run or sweep."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class _Rate(ProgressColumn):
    """Images or rounds a second."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def shown(bars: Progress) -> Tell:
    """Who shows events on these bars."""
    tasks: dict[str, Any] = {}

    def show(event) -> None:
        if not event.total and not event.note:
            return
        if not event.total:  # said once, and nothing to wait for
            bars.console.print(f"{event.stage}: {event.note}", highlight=False)
            return
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
        bars.update(tasks[event.stage], completed=event.done, note=event.note)

    return show
