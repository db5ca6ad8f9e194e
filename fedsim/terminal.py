"""What the commands share: their flags' parser, their bars, and how they leave a terminal."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedsim.errors import InputError
from fedsim.pool import Progress as Tell
from fedsim.watch import detach, read_status

DETACH = "--detach"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def let_go(console: Console, folder: Path, argv: list[str]) -> int:
    """Has another process do a command, which then needs this terminal no more."""
    detach(folder, [word for word in argv if word != DETACH])
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
