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
from fedsim.reporting.plots import GREY, PALETTE, inline_svg, legend, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
PALE = "#b8b8b8"  # pruned or dominated trials: in the background
MANY = 300  # dots or curves from which they are drawn as pixels: the page would have megabytes
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
def plot_history(figure: "Figure", trials: pd.DataFrame, highest: Mapping[str, bool], base: Mapping[str, float]) -> str:
    """One panel per objective: the value of every trial, and the best so far.

    Args:
        trials: (n,) by number: kind, and one column per objective, in the unit that its name states.
        highest: whether the highest value of an objective is the best one.
        base: value of the base configuration by objective, if a trial had it; dashed.
    """
    handles, sentences = {}, []
    failed = trials.index[trials.kind == FAILED]
    for axes, (name, high) in zip(figure.subplots(1, len(highest), squeeze=False)[0], highest.items(), strict=True):
        finished, pruned = (trials.loc[trials.kind == kind, name].dropna() for kind in (FINISHED, PRUNED))
        axes.set(xlabel="trial", ylabel=name)
        if len(pruned):
            handles["pruned, at its last round"] = _dots(axes, pruned.index, pruned, PALE, len(trials) > MANY)
        if len(finished):
            handles[FINISHED] = _dots(axes, finished.index, finished, PALETTE[0], len(trials) > MANY)
            record = best_so_far(finished, high)
            record = pd.concat([record, record.tail(1).set_axis([trials.index.max()])])
            handles["best so far"] = axes.plot(
                record.index, record, drawstyle="steps-post", color=PALETTE[1], linewidth=1.5
            )[0]
            first, best = in_unit(finished.iloc[0], name), in_unit(record.iloc[-1], name)
            sentences.append(f"{name} from {first}, best {best}")
        if name in base:
            handles["base configuration"] = axes.axhline(base[name], color=GREY, linestyle="--", linewidth=1)
        if len(failed):
            bottom = np.full(len(failed), 0.02)
            handles[FAILED] = axes.plot(failed, bottom, "x", color="black", transform=axes.get_xaxis_transform())[0]
        if not len(finished) and not len(pruned):
            _note_empty(axes)
        axes.set_xlim(trials.index.min() - 0.5, trials.index.max() + 0.5)
        _count_whole(axes)
    legend(figure, handles)
    return f"Value by trial: {'; '.join(sentences) or 'no trial has finished'}; {len(failed)} failed"


@inline_svg
def plot_learning(figure: "Figure", ylabel: str, curves: Sequence[tuple[str, pd.Series]], best: int | None) -> str:
    """One curve per trial, by round.

    Args:
        curves: kind of the trial, and values by round.
        best: index in `curves` of the one that is drawn thick.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    axes = figure.add_subplot(xlabel="round", ylabel=ylabel)
    handles: dict[str, Any] = {}
    looks = {PRUNED: (PALE, 0.9), FINISHED: (PALETTE[0], 0.5), FAILED: ("black", 0.5)}
    for kind, (colour, most) in looks.items():
        values = [curve for kind_of_trial, curve in curves if kind_of_trial == kind]
        if not values:
            continue
        lines = [np.column_stack([curve.index, curve]) for curve in values]
        alpha = max(0.15, min(most, 40 / len(values)))  # so that with many curves, dense regions still stand out
        drawn = LineCollection(lines, colors=colour, linewidths=1, alpha=alpha, rasterized=len(curves) > MANY)
        axes.add_collection(drawn)
        handles[f"{kind} ({len(values)})"] = Line2D([], [], color=colour)
        ends = [curve.index[-1] for curve in values], [curve.iloc[-1] for curve in values]
        axes.plot(*ends, ".", color=colour, markersize=4, rasterized=len(curves) > MANY)
    if best is not None:
        curve = curves[best][1]
        handles["best trial"] = axes.plot(curve.index, curve, color=PALETTE[1], linewidth=2)[0]
    axes.autoscale()
    _count_whole(axes)
    legend(figure, handles)
    rounds = [curve.index[-1] for _, curve in curves]
    return f"{ylabel} of {len(curves)} trials by round; they ended after {min(rounds)} to {max(rounds)} rounds"


@inline_svg
def plot_importance(figure: "Figure", shares: Mapping[str, Mapping[str, float]]) -> str:
    """One panel per objective: the share of each parameter, in the same order."""
    names = list(next(iter(shares.values())))
    figure.set_figheight(1 + 0.27 * len(names) + 0.2)
    columns = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (objective, share) in zip(columns, shares.items(), strict=True):
        widths = np.array([100 * share[name] for name in names])
        axes.barh(range(len(names)), widths, height=0.7, color=PALETTE[0])
        for index, width in enumerate(widths):
            offset = {"xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(f"{width:.0f}", (width, index), va="center", fontsize="small", **offset)
        axes.set(xlabel=f"importance for {objective} (%)", xlim=(0, 1.08 * widths.max()))
        axes.grid(False, axis="y")
    # The panels share their y axis, so this sets the names and direction of all.
    columns[0].set_yticks(range(len(names)), [short(name, 28) for name in names])
    columns[0].invert_yaxis()
    sentences = [
        f"{objective}: {', '.join(f'{name} {100 * share[name]:.0f}%' for name in names[:5])}"
        for objective, share in shares.items()
    ]
    return f"Importance for {'; '.join(sentences)}"


@inline_svg
def plot_slices(
    figure: "Figure",
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
    columns = min(4, len(scales))
    rows = -(-len(scales) // columns)
    figure.set_figheight(0.6 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles = {}
    for axes, scale in zip(grid.flat, scales, strict=False):
        for kind, colour in ((PRUNED, PALE), (FINISHED, PALETTE[0])):
            numbers = trials.index[(trials.kind == kind) & positions[scale.name].notna() & trials[ylabel].notna()]
            if len(numbers):
                x, y = positions.loc[numbers, scale.name], trials.loc[numbers, ylabel]
                handles[kind] = _dots(axes, x, y, colour, len(trials) > MANY)
        if best is not None and positions[scale.name].notna()[best]:
            dot = positions.loc[best, scale.name], trials.loc[best, ylabel]
            handles["best trial"] = axes.plot(*dot, "o", color=PALETTE[1], markersize=8)[0]
        ticks, names = scale.ticks()
        names = [short(name, max(4, 36 // len(names))) for name in names]
        axes.set_xticks(ticks, names, fontsize="small")
        axes.set(xlabel=short(scale.name, 34), xlim=(-0.04, 1.04))
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    for axes in grid.flat[len(scales) :]:
        axes.set_axis_off()
    legend(figure, handles)
    return f"{ylabel} by {', '.join(scale.name for scale in scales)}"


@inline_svg
def plot_parallel(
    figure: "Figure", scales: Sequence[Scale], positions: pd.DataFrame, kinds: pd.Series, best: int | None
) -> str:
    """One line per trial through the axes of its parameters and objectives.

    Args:
        positions: (n, scales) in [0, 1] by trial, the best last; nan where a trial does not have the parameter.
        kinds: (n,) by trial; pruned ones are pale.
        best: number of the trial that is drawn thick.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    figure.set_figheight(4.4)
    axes, columns = figure.add_subplot(), np.arange(len(scales))
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
    for chosen, colours, alpha in ((~finished, PALE, 0.45), (finished, shades, 0.85)):
        drawn = LineCollection(list(lines[chosen]), colors=colours, linewidths=1.1, alpha=alpha)
        axes.add_collection(drawn)
    if best is not None:
        axes.plot(columns, heights[positions.index.get_loc(best)], color=PALETTE[1], linewidth=2.4)
    width = 150 // len(scales)  # characters
    staggered = max(len(scale.name) for scale in scales) > width  # every second name is raised if they would touch
    for column, scale in enumerate(scales):
        axes.plot([column, column], [0, 1], color="black", linewidth=0.8)
        for height, label in zip(*scale.ticks(), strict=True):
            axes.plot([column - 0.01, column + 0.01], [height, height], color="black", linewidth=0.8)
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
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
    figure: "Figure",
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
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure.set_figheight(0.6 + 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    handles = {}
    finished = trials[trials.kind == FINISHED]
    dominated = finished.drop(index=list(front))
    for axes, (x, y) in zip(grid.flat, pairs, strict=False):
        if len(dominated):
            handles["dominated"] = _dots(axes, dominated[x], dominated[y], PALE, len(trials) > MANY)
        points = finished.loc[list(front)].sort_values([x, y])
        if len(pairs) == 1:
            steps = "steps-pre" if highest[x] else "steps-post"
            axes.plot(points[x], points[y], color=PALETTE[0], linewidth=1, drawstyle=steps)
        handles["Pareto front"] = axes.plot(points[x], points[y], "o", color=PALETTE[0], markersize=6)[0]
        if len(pairs) == 1 and len(front) <= 15:
            for number, row in points.iterrows():
                axes.annotate(str(number), (row[x], row[y]), (5, 5), textcoords="offset points", fontsize="small")
        if base is not None:
            dot = finished.loc[base, x], finished.loc[base, y]
            looks = {"color": "black", "markersize": 8, "fillstyle": "none", "zorder": 5}
            handles["base configuration"] = axes.plot(*dot, "D", **looks)[0]
        for axis, name in (("x", x), ("y", y)):
            low, high = finished[name].min(), finished[name].max()
            if low > 0 and high / low > 20:
                _as_log(axes, axis)
        better = {True: "more is better", False: "less is better"}
        axes.set(xlabel=f"{x}, {better[highest[x]]}", ylabel=f"{y}, {better[highest[y]]}")
    for axes in grid.flat[len(pairs) :]:
        axes.set_axis_off()
    legend(figure, handles)
    return f"{len(front)} of {len(finished)} finished trials are on the Pareto front: {', '.join(map(str, front[:20]))}"


def _dots(axes: "Axes", x: Any, y: Any, colour: str, many: bool) -> Any:
    return axes.plot(x, y, "o", color=colour, markersize=4.5, alpha=0.8, markeredgewidth=0, rasterized=many)[0]


def _as_log(axes: "Axes", which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: setting(float(value))))  # without mathematical type
    axis.set_minor_formatter(NullFormatter())


def _note_empty(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)


def _same(one: Any, other: Any) -> bool:
    """Compares the types too: 1, 1.0 and True are three choices."""
    return type(one) is type(other) and one == other


def _count_whole(axes: "Axes") -> None:
    locator: Any = axes.xaxis.get_major_locator()  # a MaxNLocator, as long as no ticks are set
    locator.set_params(integer=True, min_n_ticks=1)
