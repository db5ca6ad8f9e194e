"""Progress bars on the terminal and in notebooks."""

import sys
import time
from html import escape
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from fedsim.events import Event, Note, Progress, Step

BARS_FIT = 110  # columns, at which the numbers of all stages are whole
UPDATE_S = 0.2  # between two updates of a notebook


def plain_console(**options: Any) -> Console:
    """A console that prints names as they are: `[/x]` in one is not markup, and `:x:` not an emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def progress_bars(console: Console) -> Bars:
    """One bar for each stage of a run or sweep; numbers alone where bars would squeeze them."""
    bar, rate = ([BarColumn(bar_width=24)], [_Rate()]) if console.width >= BARS_FIT else ([], [])
    return Bars(
        TextColumn("{task.description}", markup=False),
        *bar,
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        *rate,
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


class _Rate(ProgressColumn):
    """Images, rounds or trials per second."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def show_on(bars: Bars, heading: str = "") -> Progress:
    """A callback that shows events on the bars; the first event prints the heading above them."""
    headings = [heading] if heading else []
    tasks: dict[str, Any] = {}

    def show(event: Event) -> None:
        while headings:
            bars.console.print(headings.pop())
        if isinstance(event, Note):
            bars.console.print(f"{event.stage}: {event.text}")
        elif isinstance(event, Step):
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
            bars.update(tasks[event.stage], completed=event.done, note=event.note)

    return show


def callback(progress: Progress | None) -> Progress:
    """The callback that is given; without one, bars in a Jupyter notebook, and nothing elsewhere."""
    if progress is None and "IPython" in sys.modules:
        from IPython import get_ipython

        if hasattr(get_ipython(), "kernel"):  # not the IPython of a terminal, or one that is only imported
            return _notebook_bars()
    return progress or (lambda event: None)


def _notebook_bars() -> Progress:
    """Bars in HTML below the cell that is running. rich's need widgets, which a notebook may lack."""
    from IPython.display import HTML, display

    steps: dict[str, Step] = {}
    notes: list[str] = []
    area: Any = display(HTML(""), display_id=True)
    updated = 0.0

    def show(event: Event) -> None:
        nonlocal updated
        if isinstance(event, Note):
            notes.append(f"{event.stage}: {event.text}")
        elif isinstance(event, Step):
            steps[event.stage] = event
            if event.done < event.total and time.monotonic() - updated < UPDATE_S:
                return
        updated = time.monotonic()
        area.update(HTML("".join([*(f"<div>{escape(note)}</div>" for note in notes), *map(_bar, steps.values())])))

    return show


def _bar(step: Step) -> str:
    name, note = escape(step.stage), escape(step.note)
    return f"<div>{name} <progress max={step.total} value={step.done}></progress> {step.done}/{step.total} {note}</div>"
