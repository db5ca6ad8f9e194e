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

# Okabe & Ito's palette: told apart with any colour vision.
PALETTE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
GREY = "#767676"
DASHES = "-", "--", ":", "-."
NAMED = 40  # names along an axis; of more, every second, third, ...
LOOKS = {
    "figure.figsize": (11.6, 3.9),
    "svg.hashsalt": "fedsim",  # the same bytes each time
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes, and it can be searched
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
    alt: str  # for those who hear the page
    svg: "Markup"


@dataclass(frozen=True)
class Line:
    """A curve, in the unit of its panel.

    Attributes:
        place: tells its colour and dashes.
        y: (n,) by x; `spread` makes it a band of y ± spread.
        zero_shot: what zero-shot CLIP has on the same rows, dashed.
        dot: index of the point that is reported.
    """

    label: str
    place: int
    y: pd.Series
    spread: pd.Series | None = None
    zero_shot: float = np.nan
    dot: int | None = None  # the place of a point that is drawn large


@dataclass(frozen=True)
class Panel:
    xlabel: str
    ylabel: str
    lines: Sequence[Line]  # over whole numbers


def inline_svg(paint: Callable[..., str]) -> Callable[..., Plot]:
    """Of a function that fills a figure and says what is on it, one that takes a caption first and gives a plot."""

    @wraps(paint)
    def draw(caption: str, *args: Any) -> Plot:
        from markupsafe import Markup
        from matplotlib import style
        from matplotlib.figure import Figure

        text = StringIO()
        with style.context(["default", LOOKS]):  # a user's own matplotlibrc must not count
            figure = Figure(layout="constrained")
            alt = paint(figure, *args)
            figure.savefig(text, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = text.getvalue().partition("<svg")[2]
        # Ids are unique within a plot only, and a page has several.
        own = "p" + blake2b(svg.encode(), digest_size=4).hexdigest()
        return Plot(caption, alt, Markup("<svg" + re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", svg)))

    return draw


@inline_svg
def plot_lines(figure: "Figure", panels: Sequence[Panel]) -> str:
    """Panels side by side below one legend."""
    from matplotlib.ticker import EngFormatter

    handles, told = {}, []
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        for line in panel.lines:
            handles[line.label] = _draw_line(axes, line)
            ends = [in_unit(value, panel.ylabel) for value in (line.y.iloc[0], line.y.iloc[-1])]
            told.append(f"{line.label} by {panel.xlabel} from {ends[0]} to {ends[1]}")
        if not panel.lines:
            axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.xaxis.set_major_formatter(EngFormatter())  # 20 M
    legend(figure, handles)
    return f"{panels[0].ylabel}: {', '.join(told)}"


@inline_svg
def plot_bars(figure: "Figure", xlabel: str, before: pd.Series, after: pd.Series, kinds: dict[str, np.ndarray]) -> str:
    """A bar for each accuracy in percent, and zero-shot CLIP as a mark across it.

    Args:
        before, after: (n,) accuracies by name, in one order.
        kinds: which bars, (n,) bool, are of which kind; each has its colour.
    """
    foot = -1.5  # where bars begin, so that an accuracy of 0 is seen as well
    axes = figure.add_subplot(xlabel=xlabel, ylabel="accuracy on test rows (%)", ylim=(foot, 102))
    at, handles = np.arange(len(after)), {}
    for (kind, mine), colour in zip(kinds.items(), PALETTE, strict=False):
        if mine.any():
            # One path for all: a thousand bars are then no heavier than a line.
            edges = (at[mine, None] + [-0.4, 0.4]).ravel()
            heights = np.insert(after[mine].to_numpy(), range(1, mine.sum()), foot)
            handles[kind] = axes.stairs(heights, edges, baseline=foot, fill=True, color=colour)
    marks = (at[:, None] + [-0.4, 0.4, np.nan]).ravel()
    handles["zero-shot CLIP"] = axes.plot(marks, np.repeat(before.to_numpy(), 3), color="black")[0]
    _name(axes.xaxis, after.index)
    spare = max(0, 8 - len(after)) / 2  # three bars are not walls
    axes.set_xlim(-0.7 - spare, len(after) - 0.3 + spare)
    axes.grid(False, axis="x")
    legend(figure, handles)
    least, most, median = (percent(value / 100) for value in (after.min(), after.max(), after.median()))
    return f"Accuracy by {xlabel}: {least} to {most} percent, median {median}"


@inline_svg
def plot_heat(figure: "Figure", xlabel: str, tables: Sequence[pd.DataFrame]) -> str:
    """Counts as heat maps one above the other, which share their columns and colours."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    heights = [min(len(table), NAMED) for table in tables]
    figure.set_figheight(1.2 + 0.2 * sum(heights))
    # A square root, or the many small cells of a skewed partition would all be white.
    norm = PowerNorm(0.5, 0, max(table.to_numpy().max() for table in tables))
    column = figure.subplots(len(tables), 1, sharex=True, height_ratios=heights)
    for axes, table in zip(column, tables, strict=True):
        image = axes.imshow(table, cmap="Blues", norm=norm, aspect="auto", interpolation="none")
        axes.set_ylabel(table.index.name)
        axes.grid(False)
        _name(axes.yaxis, table.index)
    _name(axes.xaxis, table.columns)
    axes.set_xlabel(xlabel)
    bar = figure.colorbar(image, ax=column, label="rows", pad=0.01, ticks=MaxNLocator(6, integer=True))
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # one small picture in place of 256 paths
    each = tables[0].sum()
    return f"Rows by {xlabel}: {each.sum()} in all, {each.min()} to {each.max()} each of {len(each)}"


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
    """Above the plot, where it covers nothing."""
    labels = [short(label, 110) for label in handles]
    columns = max(1, min(4, 150 // (8 + max(map(len, labels), default=0))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(labels) // columns))
    figure.legend(handles.values(), labels, loc="outside upper left", ncols=columns, fontsize="small")


def _name(axis: "Axis", names: Iterable[Any]) -> None:
    from matplotlib.axis import XAxis

    names = [short(str(name), 28) for name in names]
    long = max(map(len, names), default=1) if isinstance(axis, XAxis) else 1
    every = -(-len(names) // max(1, min(NAMED, 160 // (long + 2))))  # about 160 letters stand side by side
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize="small")


def short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
