"""Plots of a sweep: its history, the importance of parameters, and which values are good.

Optuna's own plots drop trials that lack a parameter, which most do when parameters depend on a choice; here such a
trial is drawn below the axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.formats import in_unit, setting
from fedsim.reporting.canvas import GREY, INK, PALE, PALETTE, PANEL, PAPER, WIDE, Canvas, inline_svg
from fedsim.reporting.plots import count_whole, note_empty, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
MANY = 300  # curves from which they are drawn as pixels: the page would have megabytes
UNUSED = -0.13  # height at which trials without a parameter pass its axis


@dataclass(frozen=True)
class Scale:
    """Maps the values of a parameter to positions on an axis from 0 to 1.

    Attributes:
        low, high: of a numeric parameter; `log` if it is searched log-uniformly.
        choices: of a categorical parameter, which has no low and high.
    """

    name: str
    low: float = np.nan
    high: float = np.nan
    log: bool = False
    choices: tuple[Any, ...] = ()

    def position(self, value: Any) -> float:
        """In [0, 1]; nan for a value that is not one of the choices."""
        if self.choices:
            matching = [index for index, choice in enumerate(self.choices) if _same(choice, value)]
            return (matching[0] + 0.5) / len(self.choices) if matching else np.nan
        if self.low == self.high:
            return 0.5
        low, high, value = np.log([self.low, self.high, value]) if self.log else (self.low, self.high, value)
        return float((value - low) / (high - low))

    def ticks(self, most: int = 5) -> tuple[list[float], list[str]]:
        """Positions and labels."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.choices:
            values = list(self.choices)
        elif self.low == self.high:
            values = [self.low]
        elif self.log and self.high / self.low >= 30:
            values = LogLocator(numticks=most).tick_values(self.low, self.high)
        elif self.log:
            values = LogLocator(subs=(1, 2, 5), numticks=99).tick_values(self.low, self.high)
        else:
            values = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        if not self.choices:
            margin = 1e-9 * abs(self.high - self.low)
            values = [value for value in values if self.low - margin <= value <= self.high + margin]
        return [self.position(value) for value in values], [setting(value) for value in values]


def best_so_far(values: pd.Series, highest: bool) -> pd.Series:
    """The best of each value and those before it; values by trial."""
    return values.cummax() if highest else values.cummin()


@inline_svg
def plot_history(canvas: Canvas, trials: pd.DataFrame, highest: Mapping[str, bool], base: Mapping[str, float]) -> str:
    """One panel per objective: the value of every trial, and the best so far.

    Args:
        trials: (n,) by number: kind, and one column per objective, in the unit that its name states.
        highest: whether the highest value of an objective is the best one.
        base: value of the base configuration by objective, if a trial had it; dashed.
    """
    sentences = []
    failed = trials.index[trials.kind == FAILED]
    for name, high in highest.items():
        axes = canvas.panel(WIDE if len(highest) == 1 else PANEL, xlabel="trial", ylabel=name)
        finished, pruned = (trials.loc[trials.kind == kind, name].dropna() for kind in (FINISHED, PRUNED))
        if len(pruned):
            _dots(canvas, axes, PRUNED, pruned.index, pruned, _values(pruned, name))
        if len(finished):
            _dots(canvas, axes, FINISHED, finished.index, finished, _values(finished, name))
            record = best_so_far(finished, high)
            record = pd.concat([record, record.tail(1).set_axis([trials.index.max()])])
            looks: dict[str, Any] = {"color": PALETTE[1], "gid": canvas.series("best so far", "line", PALETTE[1])}
            axes.plot(record.index, record, drawstyle="steps-post", linewidth=1.5, **looks)
            canvas.points(axes, "best so far", finished.index, record[:-1], _values(record[:-1], name))
            first, best = in_unit(finished.iloc[0], name), in_unit(record.iloc[-1], name)
            sentences.append(f"{name} from {first}, best {best}")
        if name in base:
            gid = canvas.series("base configuration", "line", GREY, "--")
            axes.axhline(base[name], color=GREY, linestyle="--", linewidth=1, gid=gid)
        if len(failed):
            gid, below = canvas.series(FAILED, "cross"), axes.get_xaxis_transform()
            axes.plot(failed, np.full(len(failed), 0.02), "x", transform=below, color=INK, gid=gid)
        if not len(finished) and not len(pruned):
            note_empty(axes)
        axes.set_xlim(trials.index.min() - 0.5, trials.index.max() + 0.5)
        count_whole(axes)
        canvas.zoom(axes, "trial")
    return f"Value by trial: {'; '.join(sentences) or 'no trial has finished'}; {len(failed)} failed"


@inline_svg
def plot_learning(canvas: Canvas, ylabel: str, curves: Mapping[int, tuple[str, pd.Series]], best: int | None) -> str:
    """One curve per trial, by round.

    Args:
        curves: by number, kind of the trial, and values by round.
        best: number of the trial whose curve is drawn thick.
    """
    from matplotlib.collections import LineCollection

    axes, many = canvas.panel(WIDE, xlabel="round", ylabel=ylabel), len(curves) > MANY
    looks = {PRUNED: (PALE, 0.9), FINISHED: (PALETTE[0], 0.5), FAILED: (INK, 0.5)}
    for kind, (colour, most) in looks.items():
        values = {number: curve for number, (its_kind, curve) in curves.items() if its_kind == kind}
        if not values:
            continue
        label = f"{kind} ({len(values)})"
        gid = canvas.series(label, "line", colour)
        lines = [np.column_stack([curve.index, curve]) for curve in values.values()]
        alpha = max(0.15, min(most, 40 / len(values)))  # so that with many curves, dense regions still stand out
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=1, alpha=alpha, rasterized=many, gid=gid))
        ends = pd.Series({number: curve.iloc[-1] for number, curve in values.items()})
        rounds = [curve.index[-1] for curve in values.values()]
        axes.plot(rounds, ends, ".", color=colour, markersize=4, rasterized=many, gid=gid)
        canvas.points(axes, label, rounds, ends, _trials(ends, ylabel))
    if best is not None:
        curve = curves[best][1]
        gid = canvas.series("best trial", "line", PALETTE[1])
        axes.plot(curve.index, curve, color=PALETTE[1], linewidth=2, gid=gid)
        canvas.points(axes, "best trial", curve.index, curve, _values(curve, ylabel))
    axes.autoscale()
    count_whole(axes)
    canvas.zoom(axes, "round")
    rounds = [curve.index[-1] for _, curve in curves.values()]
    return f"{ylabel} of {len(curves)} trials by round; they ended after {min(rounds)} to {max(rounds)} rounds"


@inline_svg
def plot_importance(canvas: Canvas, shares: Mapping[str, Mapping[str, float]]) -> str:
    """One panel per objective: the share of each parameter, in the same order."""
    names = list(next(iter(shares.values())))
    for objective, share in shares.items():
        axes = canvas.panel(WIDE if len(shares) == 1 else PANEL, 1.2 + 0.27 * len(names))
        widths = np.array([100 * share[name] for name in names])
        axes.barh(range(len(names)), widths, height=0.7, color=PALETTE[0])
        for index, width in enumerate(widths):
            offset = {"xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(f"{width:.0f}", (width, index), va="center", fontsize="small", **offset)
        axes.set(xlabel=f"importance for {objective} (%)", xlim=(0, 1.08 * widths.max()))
        axes.grid(False, axis="y")
        axes.set_yticks(range(len(names)), [short(name, 28) for name in names])
        axes.invert_yaxis()
    sentences = [
        f"{objective}: {', '.join(f'{name} {100 * share[name]:.0f}%' for name in names[:5])}"
        for objective, share in shares.items()
    ]
    return f"Importance for {'; '.join(sentences)}"


@inline_svg
def plot_slices(
    canvas: Canvas,
    ylabel: str,
    scales: Sequence[Scale],
    positions: pd.DataFrame,
    trials: pd.DataFrame,
    best: int | None,
) -> str:
    """One panel per parameter: the objective by its value.

    Args:
        positions: (n, parameters) in [0, 1] by trial; nan where a trial does not have the parameter.
        trials: (n,) by number: kind, and the objective as column `ylabel`.
        best: number of the trial that is drawn large.
    """
    values = trials[ylabel].dropna()
    margin = 0.05 * (values.max() - values.min()) or 0.5
    for scale in scales:
        axes = canvas.panel(3.6, 2.8, xlabel=short(scale.name, 34), ylabel=ylabel, xlim=(-0.04, 1.04))
        axes.set_ylim(values.min() - margin, values.max() + margin)
        for kind in (PRUNED, FINISHED):
            numbers = trials.index[(trials.kind == kind) & positions[scale.name].notna() & trials[ylabel].notna()]
            if len(numbers):
                x, y = positions.loc[numbers, scale.name], trials.loc[numbers, ylabel]
                _dots(canvas, axes, kind, x, y, _trials(y, ylabel))
        if best is not None and positions[scale.name].notna()[best]:
            dot: Any = positions.loc[best, scale.name], trials.loc[best, ylabel]
            gid = canvas.series("best trial", "dot", PALETTE[1])
            axes.plot(*dot, "o", color=PALETTE[1], markersize=8, gid=gid)
        ticks, names = scale.ticks()
        names = [short(name, max(4, 36 // len(names))) for name in names]
        axes.set_xticks(ticks, names, fontsize="small")
    return f"{ylabel} by {', '.join(scale.name for scale in scales)}"


@inline_svg
def plot_parallel(
    canvas: Canvas, scales: Sequence[Scale], positions: pd.DataFrame, kinds: pd.Series, best: int | None
) -> str:
    """One line per trial through the axes of its parameters and objectives.

    Args:
        positions: (n, scales) in [0, 1] by trial, the best last; nan where a trial does not have the parameter.
        kinds: (n,) by trial; pruned ones are pale.
        best: number of the trial that is drawn thick.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    axes, columns = canvas.panel(WIDE, 4.4), np.arange(len(scales))
    missing = positions.isna()
    heights = positions[[scale.name for scale in scales]].to_numpy(copy=True)
    # All trials with one choice would pass through one point: they are spread out a little.
    offsets = np.linspace(-1, 1, len(positions)) if len(positions) > 1 else np.zeros(1)
    for column, scale in enumerate(scales):
        heights[:, column] += offsets * (0.3 / len(scale.choices) if scale.choices else 0)
    heights[np.isnan(heights)] = UNUSED
    lines = np.stack([np.broadcast_to(columns, heights.shape), heights], axis=-1)
    finished = (kinds.loc[positions.index] == FINISHED).to_numpy()
    shades = colormaps["Blues"](np.linspace(0.25, 1.0, finished.sum()))
    for kind, chosen, colours, alpha in ((PRUNED, ~finished, PALE, 0.45), (FINISHED, finished, shades, 0.85)):
        if not chosen.any():
            continue
        gid = canvas.series(kind, "line", PALE) if kind == PRUNED else canvas.series(kind, "line", PALETTE[0]) + " tone"
        drawn = LineCollection(list(lines[chosen]), colors=colours, linewidths=1.1, alpha=alpha, gid=gid)
        axes.add_collection(drawn)
        names = [f"trial {number}" for number in positions.index[chosen] for _ in scales]
        canvas.points(axes, kind, np.tile(columns, chosen.sum()), heights[chosen].ravel(), names)
    if best is not None:
        gid = canvas.series("best trial", "line", PALETTE[1])
        axes.plot(columns, heights[positions.index.get_loc(best)], color=PALETTE[1], linewidth=2.4, gid=gid)
    width = 150 // len(scales)  # characters
    staggered = max(len(scale.name) for scale in scales) > width  # every second name is raised if they would touch
    for column, scale in enumerate(scales):
        axes.plot([column, column], [0, 1], color=INK, linewidth=0.8)
        for height, label in zip(*scale.ticks(), strict=True):
            axes.plot([column - 0.01, column + 0.01], [height, height], color=INK, linewidth=0.8)
            box = {"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            label = short(label, max(8, width - 2))
            axes.text(column + 0.02, height, label, va="center", fontsize="small", bbox=box)
        if missing[scale.name].any():
            axes.text(column, UNUSED - 0.04, "unused", ha="center", va="top", fontsize="small", color=GREY)
        lift = 1.05 + (0.07 if staggered and column % 2 else 0)
        axes.text(column, lift, short(scale.name, 2 * width), ha="center", fontsize="small", fontweight="bold")
    bottom, top = UNUSED - 0.12 if missing.any(axis=None) else -0.03, 1.18 if staggered else 1.11
    axes.set(xlim=(-0.03 * len(scales), len(scales) - 1 + 0.05 * len(scales)), ylim=(bottom, top))
    axes.set_axis_off()
    return f"{len(positions)} trials through {', '.join(scale.name for scale in scales)}"


@inline_svg
def plot_front(
    canvas: Canvas,
    trials: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    highest: Mapping[str, bool],
    front: Sequence[int],
    base: int | None,
) -> str:
    """One panel per pair of objectives: all finished trials, and those that no other beats in every objective.

    Args:
        trials: (n,) by number: kind, and one column per objective, in the unit that its name states.
        pairs: objectives of the x and the y axis.
        highest: whether the highest value of an objective is the best one.
        front: numbers of the trials that are not dominated.
        base: number of the trial that had the base configuration.
    """
    finished = trials[trials.kind == FINISHED]
    dominated = finished.drop(index=list(front))
    for x, y in pairs:
        axes = canvas.panel(WIDE if len(pairs) == 1 else PANEL, 4)
        if len(dominated):
            _dots(canvas, axes, "dominated", dominated[x], dominated[y], _both(dominated, x, y))
        points = finished.loc[list(front)].sort_values([x, y])
        looks: dict[str, Any] = {"color": PALETTE[0], "gid": canvas.series("Pareto front", "dot", PALETTE[0])}
        if len(pairs) == 1:
            steps = "steps-pre" if highest[x] else "steps-post"
            axes.plot(points[x], points[y], linewidth=1, drawstyle=steps, **looks)
        axes.plot(points[x], points[y], "o", markersize=6, **looks)
        if len(pairs) == 1 and len(front) <= 15:
            for number, row in points.iterrows():
                axes.annotate(str(number), (row[x], row[y]), (5, 5), textcoords="offset points", fontsize="small")
        if base is not None:
            dot: Any = finished.loc[base, x], finished.loc[base, y]
            looks: dict[str, Any] = {"color": INK, "gid": canvas.series("base configuration", "diamond")}
            axes.plot(*dot, "D", markersize=8, fillstyle="none", zorder=5, **looks)
        for axis, name in (("x", x), ("y", y)):
            low, high = finished[name].min(), finished[name].max()
            if low > 0 and high / low > 20:
                _as_log(axes, axis)
        better = {True: "more is better", False: "less is better"}
        axes.set(xlabel=f"{x}, {better[highest[x]]}", ylabel=f"{y}, {better[highest[y]]}")
        canvas.points(axes, "Pareto front", points[x], points[y], _both(points, x, y))  # now that the scales are set
    return f"{len(front)} of {len(finished)} finished trials are on the Pareto front: {', '.join(map(str, front[:20]))}"


def _dots(canvas: Canvas, axes: "Axes", kind: str, x: Any, y: Any, texts: list[str]) -> None:
    colour = PALETTE[0] if kind == FINISHED else PALE
    looks: dict[str, Any] = {"color": colour, "gid": canvas.series(kind, "dot", colour), "solid_capstyle": "round"}
    # Lines without length, which are one path: a thousand markers would be a hundred kilobytes.
    axes.plot(np.repeat(x, 3), np.column_stack([y, y, np.full(len(y), np.nan)]).ravel(), linewidth=4.5, **looks)
    canvas.points(axes, kind, x, y, texts)


def _values(values: pd.Series, name: str) -> list[str]:
    return [in_unit(value, name) for value in values]


def _trials(values: pd.Series, name: str) -> list[str]:
    """What is shown of trials that are pointed at; values by number."""
    return [f"trial {number}: {in_unit(value, name)}" for number, value in values.items()]


def _both(trials: pd.DataFrame, x: str, y: str) -> list[str]:
    rows = trials[[x, y]].itertuples(name=None)
    return [f"trial {number}: {y} {in_unit(b, y)}, {x} {in_unit(a, x)}" for number, a, b in rows]


def _as_log(axes: "Axes", which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: setting(float(value))))  # without mathematical type
    axis.set_minor_formatter(NullFormatter())


def _same(one: Any, other: Any) -> bool:
    """Compares the types too: 1, 1.0 and True are three choices."""
    return type(one) is type(other) and one == other
