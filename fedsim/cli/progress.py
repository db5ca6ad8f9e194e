"""What the commands share: their bars, and how they leave a terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedsim.cli.background import Telling, detach, read_status
from fedsim.cli.flags import DETACH
from fedsim.events import Event
from fedsim.events import Progress as Tell
from fedsim.folder import Kind


def launch(
    argv: Sequence[str],
    folder: Path,
    origin: str,
    check: Callable[[], Any],
    work: Callable[[Tell], Any],
    show: Callable[[Console, Any], None],
    kind: Kind = "run",
) -> int:
    """Does a command with its progress and what it shows at the end; or, with --detach, has another process do it.

    Args:
        argv: the command and its flags.
        origin: where it starts from, in a sentence.
        check: raises what the command would be refused for.
        kind: what the folder will hold.
        work: told whom to tell of its progress; what it returns is shown.
    """
    console = plain_console(record=True)
    console.print(origin)
    if DETACH in argv:
        check()
        return _let_go(console, folder, [word for word in argv if word != DETACH], kind)
    with bars_on(console) as bars, Telling(folder, shown(bars, f"-> {folder}"), kind) as telling:
        found = work(telling.progress)
        bars.stop()
        console.export_text()  # what was said so far
        show(console, found)
        telling.said = console.export_text()
    return 0


def _let_go(console: Console, folder: Path, argv: Sequence[str], kind: Kind) -> int:
    detach(folder, argv, kind)
    status = read_status(folder)
    console.print(f"-> {folder}")
    console.print("is done" if status.ended else f"goes on in process {status.pid} on {status.host}")
    console.print(f"  fedsim watch {folder}\n  fedsim stop {folder}", soft_wrap=True)
    return 0


def plain_console(**options: Any) -> Console:
    """A console that prints names as they are: `[/x]` in one is no markup, and `:x:` no emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def bars_on(console: Console) -> Progress:
    """A bar for each stage of a run or sweep."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


class _Rate(ProgressColumn):
    """Images or rounds a second."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def shown(bars: Progress, heading: str = "") -> Tell:
    """Shows events on these bars, below a heading, which is left out where nothing happens."""
    headings = [heading] if heading else []
    tasks: dict[str, Any] = {}

    def show(event: Event) -> None:
        while headings:
            bars.console.print(headings.pop())
        if not event.total and not event.note:
            return
        if not event.total:  # said once, and nothing to wait for
            bars.console.print(f"{event.stage}: {event.note}")
            return
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
        bars.update(tasks[event.stage], completed=event.done, note=event.note)

    return show
