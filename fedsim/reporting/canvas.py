"""A plot as inline SVG: a drawing for each panel, a legend in HTML, and the points that a reader can point at.

matplotlib draws everything once. `page.js` adds to that drawing, so what is explored is what is printed, and what is
read without JavaScript. A library that draws in the browser (Vega, Bokeh, Plotly) would have every plot drawn twice,
and add 1 to 5 MB to a page of 100 kB.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from hashlib import blake2b
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

# matplotlib takes longer to import than all of fedsim's own files, and actors draw nothing: only functions import it.
if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, whose colours differ with any colour vision.
INK, PAPER, PALE, LINE = "#010101", "#fefefe", "#b8b8b8", "#e4e4e4"
PALETTE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK
GREY = "#767676"
# Colours that depend on whether the page is light or dark.
THEMED = {INK: "currentColor", PAPER: "var(--paper)", PALE: "var(--pale)", LINE: "var(--line)"}
DASHES = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}
WIDE = 11.6  # inches; a panel of several has PANEL
PANEL = 4.8
STYLE = {
    "svg.hashsalt": "fedsim",  # the same bytes each time
    "svg.fonttype": "none",  # text stays text, which has a tenth of the bytes and can be searched
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a class may be called "a$b$"
    "path.simplify": False,  # which drops lines without length, that are dots
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Key:
    """How the legend shows a series: `shape` is line, bar, dot, cross or diamond; `dashes` as SVG has them."""

    label: str
    shape: str
    colour: str
    dashes: str


@dataclass(frozen=True)
class Drawing:
    """A panel: its SVG, `width` points wide, and what `page.js` is told about it."""

    svg: "Markup"
    width: float
    data: dict[str, Any]


@dataclass(frozen=True)
class Plot:
    caption: str
    alt: str  # read aloud by screen readers
    drawings: list[Drawing]
    keys: list[Key]


@dataclass
class Canvas:
    """What a function that draws a plot draws on."""

    keys: dict[str, Key] = field(default_factory=dict)
    figures: list[tuple["Figure", list[dict[str, Any]]]] = field(default_factory=list)

    def figure(self, width: float = PANEL, height: float = 3.5) -> "Figure":
        """The figure of the next panel, in inches."""
        from matplotlib.figure import Figure

        # The resolution is that of parts which are images, such as heat maps.
        self.figures.append((Figure((width, height), dpi=150, layout="constrained"), []))
        return self.figures[-1][0]

    def panel(self, width: float = PANEL, height: float = 3.5, **looks: Any) -> "Axes":
        """The axes of the next panel, which has no others."""
        return self.figure(width, height).add_subplot(**looks)

    def series(self, label: str, shape: str = "line", colour: str = INK, dashes: str = "-") -> str:
        """Enters a series in the legend; artists with this `gid` are shown and hidden with it."""
        self.keys.setdefault(label, Key(label, shape, THEMED.get(colour, colour), DASHES[dashes]))
        return f"series-{list(self.keys).index(label)}"

    def points(self, axes: "Axes", label: str, x: Any, y: Any, texts: Sequence[str]) -> None:
        """Points of a series in the last panel, in data coordinates, with what is shown when one is pointed at."""
        at = {"axes": axes, "s": list(self.keys).index(label), "xy": np.column_stack([x, y]).astype(float)}
        self.figures[-1][1].append(at | {"texts": list(texts)})

    def zoom(self, axes: "Axes", name: str = "", names: Sequence[str] = ()) -> None:
        """Lets a reader zoom along the x axis of the last panel, and shows all series at the x pointed at.

        Args:
            name: what one x is, which is shown before its value.
            names: of the integers on the axis, if these are names.
        """
        self.figures[-1][1].append({"zoom": axes, "name": name, "names": list(names)})

    def cells(self, axes: "Axes", table: Any) -> None:
        """A heat map in the last panel, whose rows and columns are those of a table of counts."""
        names = [[f"{axis.name} {name}" for name in axis] for axis in (table.index, table.columns)]
        self.figures[-1][1].append({"cells": axes, "names": names, "values": table.to_numpy().tolist()})


def inline_svg(paint: Callable[..., str]) -> Callable[..., Plot]:
    """Turns a function that fills a canvas and returns its alternative text into one from a caption to a `Plot`."""

    @wraps(paint)
    def draw(caption: str, *args: Any) -> Plot:
        from matplotlib import style

        canvas = Canvas()
        with style.context(["default", STYLE]):  # not what a matplotlibrc of the user says
            alt = paint(canvas, *args)
            drawings = [_drawing(figure, found) for figure, found in canvas.figures]
        return Plot(caption, alt, drawings, list(canvas.keys.values()))

    return draw


def _drawing(figure: "Figure", found: list[dict[str, Any]]) -> Drawing:
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = StringIO()
    # Not by `savefig`, which goes through the figure twice, first for the layout alone; this one lays it out as well.
    FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue().partition("<svg")[2]
    # Ids are unique within a drawing only, and a page has several; those of series are classes.
    prefix = "p" + blake2b(svg.encode(), digest_size=4).hexdigest()
    svg = re.sub(r' id="(series-\d+( tone)?)"', r' class="\1"', svg)
    svg = re.sub(r' (d|x|y)="[^"]*"', lambda where: re.sub(r"\d+\.\d{3,}", _rounded, where[0]), svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub("|".join(THEMED), lambda colour: THEMED[colour[0]], svg)
    return Drawing(Markup("<svg" + svg), round(72 * figure.get_figwidth(), 1), _data(figure, found))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _data(figure: "Figure", found: list[dict[str, Any]]) -> dict[str, Any]:
    """What `page.js` is told, in the coordinates of the SVG, which has 72 points an inch and begins at the top."""
    scale, height = 72 / figure.dpi, 72 * figure.get_figheight()

    def box(axes: "Axes") -> list[float]:
        left, bottom, right, top = scale * np.array(axes.bbox.extents)
        return [round(float(edge), 2) for edge in (left, height - top, right, height - bottom)]

    data: dict[str, Any] = {"series": [], "maps": []}
    for item in found:
        if axes := item.get("axes"):
            x, y = scale * axes.transData.transform(item["xy"]).T
            here = np.isfinite(x) & np.isfinite(y)
            texts = [text for text, shown in zip(item["texts"], here, strict=True) if shown]
            at = {"x": x[here].round(2).tolist(), "y": (height - y[here]).round(1).tolist()}
            data["series"].append({"s": item["s"], **at, "t": texts})
        elif axes := item.get("zoom"):
            limits = [float(edge) for edge in axes.get_xlim()]
            data |= {"box": box(axes), "x": limits, "name": item["name"], "names": item["names"]}
        elif axes := item.get("cells"):
            rows, columns = item["names"]
            data["maps"].append({"box": box(axes), "rows": rows, "columns": columns, "values": item["values"]})
    return data
