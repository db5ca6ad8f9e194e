"""The page of `methods.py`: accuracy against what travels and what is trained, a point for each method."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd

from fedsim.errors import counted
from fedsim.formats import number, percent
from fedsim.registry import find, parse
from fedsim.reporting.canvas import GREY, PALETTE, Canvas, inline_svg
from fedsim.reporting.html import Section, render
from fedsim.reporting.plots import short

NOTHING = 1e-3  # where methods that send nothing are drawn, in MB: the axis is logarithmic
COSTS = {"bytes": "MB up and down, whole run", "parameters": "trained parameters"}


def page(
    about: str,
    table: pd.DataFrame,
    methods: Mapping[str, tuple[str, str]],
    protocols: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame],
) -> str:
    """HTML.

    Args:
        about: what the runs have in common.
        table: (n,) method, protocol, seed, validation and zero-shot in percent, bytes, parameters.
        methods: method and rule of fedsim by the name in the table.
        protocols: the measure that is shown of each.
        tables: further tables by caption; those with a row for each method can be filtered by site.
    """
    sites = {name: _sites(method) for name, (method, _) in methods.items()}
    filtered = {caption: _with_sites(rows, sites) for caption, rows in tables.items()}
    texts = {name: " ".join(_paragraphs(method)) for name, (method, _) in methods.items()}
    papers = pd.DataFrame({"source, and how fedsim differs from it": texts}).rename_axis("method")
    caption = "Bars: deviation over seeds. Dashed: zero-shot CLIP. Named: clearly better than all that cost less."
    nothing = "" if table.bytes.all() else f" At {NOTHING} MB: nothing travels."
    captions = {"bytes": caption + nothing, "parameters": caption}
    plots = [_points(text, table, methods, protocols, cost) for cost, text in captions.items()]
    how = (
        "Percent, mean ± deviation over seeds; the round was chosen on validation rows. Each method has its published "
        "hyperparameters but for one local epoch a round; none was tuned. The legend names where parameters attach to "
        "CLIP: an entry hides and shows these methods in plots and tables."
    )
    return render(
        "Methods and protocols",
        [
            Section("", [f"{about} {_message(table, protocols)}", how]),
            Section("Accuracy and cost", plots=plots),
            Section("Tables", tables=filtered, open=True),
            Section("Sources", tables={"What each method is": papers}),
        ],
    )


@inline_svg
def _points(
    canvas: Canvas, table: pd.DataFrame, methods: Mapping[str, tuple[str, str]], protocols: Mapping[str, str], cost: str
) -> str:
    """A panel for each protocol; the colour is that of the site."""
    from matplotlib.ticker import FuncFormatter

    kinds = list(dict.fromkeys(_sites(method) for method, _ in methods.values()))
    for protocol, measure in protocols.items():
        rows = table[table.protocol == protocol]
        axes = canvas.panel(xlabel=COSTS[cost], ylabel=f"{protocol}: {measure} (%)", xscale="log")
        axes.axhline(rows["zero-shot"].mean(), color=GREY, linestyle="--", linewidth=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        shown = _by_method(rows, cost)
        clear = 0.05 * (shown.accuracy.max() - shown.accuracy.min())
        for name, (x, mean, deviation) in shown.iterrows():
            kind = _sites(methods[str(name)][0])
            place = kinds.index(kind)
            colour, mark, shape = PALETTE[place % 7], "oD"[place // 7 % 2], ("dot", "diamond")[place // 7 % 2]
            gid = canvas.series(kind, shape, colour)
            axes.plot([x, x], [mean - deviation, mean + deviation], color=colour, linewidth=1, alpha=0.5, gid=gid)
            axes.plot(x, mean, mark, color=colour, fillstyle="full" if mark == "o" else "none", gid=gid)
            others = shown.accuracy[(shown.x <= x) & (shown.index != name)]
            if others.empty or mean > others.max() + clear:
                axes.annotate(str(name), (x, mean), (5, 4), textcoords="offset points", fontsize="small", gid=gid)
            text = f"{name}: {mean:.1f} ± {deviation:.1f}%, {_amount(rows[rows.method == name])}"
            canvas.points(axes, kind, [x], [mean], [f"{text}\n{_in_short(methods[str(name)])}"])
    best = _by_method(table, cost).accuracy
    average = f"on average over protocols {best.min():.1f} to {best.max():.1f}%"
    return f"Accuracy by {COSTS[cost]} of {len(best)} methods; {average}"


def _by_method(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Cost, and mean and deviation of accuracy over seeds."""
    seeds = rows.groupby(["method", "seed"], sort=False).validation.mean().groupby("method", sort=False)
    x = rows.groupby("method", sort=False)[cost].median() / (1e6 if cost == "bytes" else 1)
    return pd.DataFrame({"x": x.clip(lower=NOTHING), "accuracy": seeds.mean(), "deviation": seeds.std().fillna(0)})


def _amount(rows: pd.DataFrame) -> str:
    return f"{number(rows.bytes.median() / 1e6)} MB, {number(int(rows.parameters.median()))} trained parameters"


def _message(table: pd.DataFrame, protocols: Mapping[str, str]) -> str:
    best = []
    for protocol in protocols:
        rows = table[table.protocol == protocol]
        means = rows.groupby("method", sort=False).validation.mean()
        zero_shot = percent(rows["zero-shot"].mean() / 100)
        best.append(f"{protocol}: {means.idxmax()}, {percent(means.max() / 100)}% ({zero_shot}%)")
    return f"Highest accuracy by protocol (zero-shot CLIP): {'; '.join(best)}."


def _with_sites(rows: pd.DataFrame, sites: Mapping[str, str]) -> pd.DataFrame:
    shown = rows.rename_axis("method")
    shown.insert(0, "attaches to", [sites.get(str(name), "") for name in rows.index])
    return shown


def _sites(method: str) -> str:
    """Where parameters of a method attach to CLIP."""
    return ", ".join(site.replace("_", " ") for site in parse("method", method).sites)


def _in_short(method_and_rule: tuple[str, str]) -> str:
    """What is shown of a method that is pointed at: its components, its source and how many differences there are."""
    method, rule = method_and_rule
    source, *differs = _paragraphs(method)
    first = short(differs[0].partition(" ")[2], 160) if differs else ""
    count = f"{counted(len(differs), 'difference')}: {first}" if differs else ""
    return "\n".join(filter(None, [f"{method} with {rule}, {_sites(method)}", short(source, 160), count]))


@cache
def _paragraphs(method: str) -> Sequence[str]:
    """The source of a method, and how it differs, as its docstrings say."""
    component = find("method", method)
    texts = [inspect.cleandoc(text or "") for text in (sys.modules[component.__module__].__doc__, component.__doc__)]
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    parts = [part.strip() for text in paragraphs for part in re.split(r"(?=\b(?:Source|Differs|Unread): )", text)]
    sources = [part for part in parts if part.startswith("Source: ")]
    return [*(sources or [parts[0]]), *(part for part in parts if part.startswith(("Differs: ", "Unread: ")))]
