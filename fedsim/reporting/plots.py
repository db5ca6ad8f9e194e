"""The plots of pages: curves, bars and heat maps that read alike for four clients and for a thousand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.formats import difference, in_unit, percent
from fedsim.reporting.canvas import DASHES, GREY, INK, PALETTE, PANEL, WIDE, Canvas, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FINEST = 20_000  # cells of a heat map that can be pointed at: smaller ones than these cannot be hit
NAMED = 40  # names along an axis at most; of more, every second, third, ... is shown


@dataclass(frozen=True)
class Line:
    """A curve, in the unit of its panel.

    Attributes:
        place: index in the legend, which gives its colour and dashes.
        y: (n,) by x.
        spread: (n,) half the height of a band around it.
        zero_shot: the value of zero-shot CLIP on the same rows, dashed.
        dot: index of the point that is drawn large, that of the chosen round.
    """

    label: str
    place: int
    y: pd.Series
    spread: pd.Series | None = None
    zero_shot: float = np.nan
    dot: int | None = None


@dataclass(frozen=True)
class Panel:
    xlabel: str
    ylabel: str
    lines: Sequence[Line]  # over whole numbers


@inline_svg
def plot_lines(canvas: Canvas, panels: Sequence[Panel]) -> str:
    """A panel for each set of curves, below one legend."""
    from matplotlib.ticker import EngFormatter

    curves = []
    for panel in panels:
        axes = canvas.panel(xlabel=panel.xlabel, ylabel=panel.ylabel)
        for line in panel.lines:
            _draw_line(canvas, axes, line, panel.ylabel)
            ends = [in_unit(value, panel.ylabel) for value in (line.y.iloc[0], line.y.iloc[-1])]
            curves.append(f"{line.label} by {panel.xlabel} from {ends[0]} to {ends[1]}")
        if panel.lines:
            canvas.zoom(axes, panel.xlabel)
        else:
            note_empty(axes)
        count_whole(axes)
        axes.xaxis.set_major_formatter(EngFormatter())  # 20 M
    return f"{panels[0].ylabel}: {', '.join(curves)}"


@inline_svg
def plot_bars(canvas: Canvas, xlabel: str, before: pd.Series, after: pd.Series, kinds: dict[str, np.ndarray]) -> str:
    """A bar for each accuracy in percent, with zero-shot CLIP as a line across it.

    Args:
        before, after: (n,) accuracies by name, in the same order.
        kinds: by kind, (n,) bool, the bars that have its colour.
    """
    foot = -1.5  # where bars begin, so that an accuracy of 0 is visible too
    width = _width(after.index)
    axes = canvas.panel(width, xlabel=xlabel, ylabel="accuracy on test rows (%)", ylim=(foot, 102))
    at = np.arange(len(after))
    for (kind, members), colour in zip(kinds.items(), PALETTE, strict=False):
        if members.any():
            # One path for all, so that a thousand bars are no larger than a line.
            edges = (at[members, None] + [-0.4, 0.4]).ravel()
            heights = np.insert(after[members].to_numpy(), range(1, members.sum()), foot)
            gid = canvas.series(kind, "bar", colour)
            axes.stairs(heights, edges, baseline=foot, fill=True, color=colour, gid=gid)
            canvas.points(axes, kind, at[members], after[members], _gains(after[members], before[members]))
    marks = (at[:, None] + [-0.4, 0.4, np.nan]).ravel()
    axes.plot(marks, np.repeat(before.to_numpy(), 3), color=INK, gid=canvas.series("zero-shot CLIP"))
    canvas.points(axes, "zero-shot CLIP", at, before, [percent(value / 100) for value in before])
    canvas.zoom(axes, names=[str(name) for name in after.index])
    _label(axes.xaxis, after.index, width)
    spare = max(0, 4 - len(after)) / 2  # keeps a few bars narrow
    axes.set_xlim(-0.7 - spare, len(after) - 0.3 + spare)
    axes.grid(False, axis="x")
    least, most, median = (percent(value / 100) for value in (after.min(), after.max(), after.median()))
    return f"Accuracy by {xlabel}: {least} to {most} percent, median {median}"


@inline_svg
def plot_heat(canvas: Canvas, xlabel: str, tables: Sequence[pd.DataFrame]) -> str:
    """Counts as heat maps above each other, with the same columns and colours."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    heights = [min(len(table), NAMED) for table in tables]
    width = _width(tables[0].columns)
    figure = canvas.figure(width, 1.2 + 0.2 * sum(heights))
    # A square root, since the many small cells of a skewed partition would otherwise all be white.
    norm = PowerNorm(0.5, 0, max(table.to_numpy().max() for table in tables))
    column = figure.subplots(len(tables), 1, sharex=True, height_ratios=heights)
    for axes, table in zip(column, tables, strict=True):
        image = axes.imshow(table, cmap="Blues", norm=norm, aspect="auto", interpolation="none")
        axes.set_ylabel(table.index.name)
        axes.grid(False)
        _label(axes.yaxis, table.index)
        if table.size <= FINEST:
            canvas.cells(axes, table)
    _label(axes.xaxis, tables[0].columns, width)
    axes.set_xlabel(xlabel)
    bar = figure.colorbar(image, ax=column, label="rows", pad=0.01, ticks=MaxNLocator(6, integer=True))
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # one small image instead of 256 paths
    rows = tables[0].sum()
    return f"Rows by {xlabel}: {rows.sum()} in all, {rows.min()} to {rows.max()} each of {len(rows)}"


def _draw_line(canvas: Canvas, axes: "Axes", line: Line, ylabel: str) -> None:
    x, y, colour, dashes = line.y.index, line.y, PALETTE[line.place % 7], list(DASHES)[line.place // 7 % 4]
    gid = canvas.series(line.label, "line", colour, dashes)
    looks: dict[str, Any] = {"color": colour, "gid": gid}
    if line.spread is not None:
        axes.fill_between(x, y - line.spread, y + line.spread, alpha=0.15, linewidth=0, **looks)
    if line.dot is not None:
        axes.plot(x[line.dot], y.iloc[line.dot], "o", **looks)
    axes.axhline(line.zero_shot, color=GREY, linestyle="--", linewidth=1, gid=gid)
    axes.plot(x, y, linestyle=dashes, marker="." if len(y) <= 12 else None, **looks)
    known = np.isfinite(line.zero_shot)
    texts = _gains(y, pd.Series(line.zero_shot, y.index)) if known else [in_unit(value, ylabel) for value in y]
    canvas.points(axes, line.label, x, y, texts)


def _gains(after: pd.Series, before: pd.Series) -> list[str]:
    """Accuracies in percent, each with the difference from zero-shot CLIP."""
    pairs = zip(after / 100, before / 100, strict=True)
    return [f"{percent(value)} ({difference(zero_shot, value)})" for value, zero_shot in pairs]


def count_whole(axes: "Axes") -> None:
    locator: Any = axes.xaxis.get_major_locator()  # a MaxNLocator, as long as no ticks are set
    locator.set_params(integer=True, min_n_ticks=1)


def note_empty(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)


def _label(axis: "Axis", names: Iterable[Any], width: float = 0) -> None:
    """Names along an axis; along an x axis, as many as there is room for in `width` inches."""
    names = [short(str(name), 28) for name in names]
    room = int(len(names) * width / _inches(names)) if width else NAMED
    every = -(-len(names) // max(1, min(NAMED, room)))
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize="small")


def _width(names: Iterable[Any]) -> float:
    """Of a panel with these names along its x axis, in inches."""
    return min(max(PANEL, 1 + _inches([short(str(name), 28) for name in names])), WIDE)


def _inches(names: Sequence[str]) -> float:
    return len(names) * (max(map(len, names), default=1) + 2) / 13  # of which about 13 letters fit into one


def short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
