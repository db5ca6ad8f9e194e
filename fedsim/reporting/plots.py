"""Plots as inline SVG: curves, bars and heat maps that read alike for four clients and for a thousand."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.formats import in_unit, percent

# matplotlib takes longer to import than all of fedsim's own files, and actors draw nothing: only functions import it.
if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe & Ito's palette, whose colours differ with any colour vision.
PALETTE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
GREY = "#767676"
DASHES = "-", "--", ":", "-."
NAMED = 40  # names along an axis at most; of more, every second, third, ... is shown
STYLE = {
    "figure.figsize": (11.6, 3.9),
    "svg.hashsalt": "fedsim",  # the same bytes each time
    "svg.fonttype": "none",  # text stays text, which has a tenth of the bytes and can be searched
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a class may be called "a$b$"
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    caption: str
    alt: str  # read aloud by screen readers
    svg: "Markup"


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


def inline_svg(paint: Callable[..., str]) -> Callable[..., Plot]:
    """Turns a function that fills a figure and returns its alternative text into one from a caption to a `Plot`."""

    @wraps(paint)
    def draw(caption: str, *args: Any) -> Plot:
        from markupsafe import Markup
        from matplotlib import style
        from matplotlib.figure import Figure

        text = StringIO()
        with style.context(["default", STYLE]):  # not what a matplotlibrc of the user says
            figure = Figure(layout="constrained")
            alt = paint(figure, *args)
            figure.savefig(text, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = text.getvalue().partition("<svg")[2]
        # Ids are unique within a plot only, and a page has several.
        prefix = "p" + blake2b(svg.encode(), digest_size=4).hexdigest()
        return Plot(caption, alt, Markup("<svg" + re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)))

    return draw


@inline_svg
def plot_lines(figure: "Figure", panels: Sequence[Panel]) -> str:
    """Panels next to each other below one legend."""
    from matplotlib.ticker import EngFormatter

    handles, curves = {}, []
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        for line in panel.lines:
            handles[line.label] = _draw_line(axes, line)
            ends = [in_unit(value, panel.ylabel) for value in (line.y.iloc[0], line.y.iloc[-1])]
            curves.append(f"{line.label} by {panel.xlabel} from {ends[0]} to {ends[1]}")
        if not panel.lines:
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.xaxis.set_major_formatter(EngFormatter())  # 20 M
    legend(figure, handles)
    return f"{panels[0].ylabel}: {', '.join(curves)}"


@inline_svg
def plot_bars(figure: "Figure", xlabel: str, before: pd.Series, after: pd.Series, kinds: dict[str, np.ndarray]) -> str:
    """A bar for each accuracy in percent, with zero-shot CLIP as a line across it.

    Args:
        before, after: (n,) accuracies by name, in the same order.
        kinds: by kind, (n,) bool, the bars that have its colour.
    """
    foot = -1.5  # where bars begin, so that an accuracy of 0 is visible too
    axes = figure.add_subplot(xlabel=xlabel, ylabel="accuracy on test rows (%)", ylim=(foot, 102))
    at, handles = np.arange(len(after)), {}
    for (kind, members), colour in zip(kinds.items(), PALETTE, strict=False):
        if members.any():
            # One path for all, so that a thousand bars are no larger than a line.
            edges = (at[members, None] + [-0.4, 0.4]).ravel()
            heights = np.insert(after[members].to_numpy(), range(1, members.sum()), foot)
            handles[kind] = axes.stairs(heights, edges, baseline=foot, fill=True, color=colour)
    marks = (at[:, None] + [-0.4, 0.4, np.nan]).ravel()
    handles["zero-shot CLIP"] = axes.plot(marks, np.repeat(before.to_numpy(), 3), color="black")[0]
    _label(axes.xaxis, after.index)
    spare = max(0, 8 - len(after)) / 2  # keeps a few bars narrow
    axes.set_xlim(-0.7 - spare, len(after) - 0.3 + spare)
    axes.grid(False, axis="x")
    legend(figure, handles)
    least, most, median = (percent(value / 100) for value in (after.min(), after.max(), after.median()))
    return f"Accuracy by {xlabel}: {least} to {most} percent, median {median}"


@inline_svg
def plot_heat(figure: "Figure", xlabel: str, tables: Sequence[pd.DataFrame]) -> str:
    """Counts as heat maps above each other, with the same columns and colours."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    heights = [min(len(table), NAMED) for table in tables]
    figure.set_figheight(1.2 + 0.2 * sum(heights))
    # A square root, since the many small cells of a skewed partition would otherwise all be white.
    norm = PowerNorm(0.5, 0, max(table.to_numpy().max() for table in tables))
    column = figure.subplots(len(tables), 1, sharex=True, height_ratios=heights)
    for axes, table in zip(column, tables, strict=True):
        image = axes.imshow(table, cmap="Blues", norm=norm, aspect="auto", interpolation="none")
        axes.set_ylabel(table.index.name)
        axes.grid(False)
        _label(axes.yaxis, table.index)
    _label(axes.xaxis, table.columns)
    axes.set_xlabel(xlabel)
    bar = figure.colorbar(image, ax=column, label="rows", pad=0.01, ticks=MaxNLocator(6, integer=True))
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # one small image instead of 256 paths
    rows = tables[0].sum()
    return f"Rows by {xlabel}: {rows.sum()} in all, {rows.min()} to {rows.max()} each of {len(rows)}"


def _draw_line(axes: "Axes", line: Line) -> Any:
    x, y, colour = line.y.index, line.y, PALETTE[line.place % 7]
    marker = "." if len(y) <= 12 else None
    if line.spread is not None:
        axes.fill_between(x, y - line.spread, y + line.spread, color=colour, alpha=0.15, linewidth=0)
    if line.dot is not None:
        axes.plot(x[line.dot], y.iloc[line.dot], "o", color=colour)
    axes.axhline(line.zero_shot, color=GREY, linestyle="--", linewidth=1)
    return axes.plot(x, y, color=colour, linestyle=DASHES[line.place // 7 % 4], marker=marker)[0]


def legend(figure: "Figure", handles: dict[str, Any]) -> None:
    """Draws a legend above the plot, where it covers nothing."""
    labels = [short(label, 110) for label in handles]
    columns = max(1, min(4, 150 // (8 + max(map(len, labels), default=0))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(labels) // columns))
    figure.legend(handles.values(), labels, loc="outside upper left", ncols=columns, fontsize="small")


def _label(axis: "Axis", names: Iterable[Any]) -> None:
    from matplotlib.axis import XAxis

    names = [short(str(name), 28) for name in names]
    long = max(map(len, names), default=1) if isinstance(axis, XAxis) else 1
    every = -(-len(names) // max(1, min(NAMED, 160 // (long + 2))))  # about 160 letters fit in a row
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize="small")


def short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
