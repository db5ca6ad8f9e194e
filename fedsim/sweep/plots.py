"""Plots of a search: how it went, what mattered, and where the good values lie.

Optuna's own plots drop trials that lack a parameter, as most do where one choice opens further ones; here such a trial
has a place of its own below the axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.formats import in_unit, setting
from fedsim.plots import GREY, PALETTE, inline_svg, legend, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
PALE = "#b8b8b8"  # what was pruned or is dominated: to be seen, not to be looked at
MANY = 300  # dots or curves from which they are a picture inside of the page, or it would weigh megabytes
UNUSED = -0.13  # where trials that lack a parameter pass its axis


@dataclass(frozen=True)
class Scale:
    """Where the values of a parameter lie on an axis from 0 to 1.

    Attributes:
        low, high: of a number; `log` as it is searched.
        choices: of what is chosen from a list, which has no low and high.
    """

    name: str
    low: float = np.nan
    high: float = np.nan
    log: bool = False
    choices: tuple[Any, ...] = ()

    def place(self, value: Any) -> float:
        """In [0, 1]; nan of what is on no such axis."""
        if self.choices:
            places = [k for k, choice in enumerate(self.choices) if _same(choice, value)]
            return (places[0] + 0.5) / len(self.choices) if places else np.nan
        if self.low == self.high:
            return 0.5
        low, high, value = np.log([self.low, self.high, value]) if self.log else (self.low, self.high, value)
        return float((value - low) / (high - low))

    def ticks(self, most: int = 5) -> tuple[list[float], list[str]]:
        """Places, and what is written there."""
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
            room = 1e-9 * abs(self.high - self.low)
            values = [value for value in values if self.low - room <= value <= self.high + room]
        return [self.place(value) for value in values], [setting(value) for value in values]


def best_so_far(values: pd.Series, highest: bool) -> pd.Series:
    """Of values by trial."""
    return values.cummax() if highest else values.cummin()


@inline_svg
def plot_history(figure: "Figure", trials: pd.DataFrame, highest: Mapping[str, bool], base: Mapping[str, float]) -> str:
    """A panel for each objective: every trial's value, and the best so far.

    Args:
        trials: (n,) by number: kind, and a column for each objective, in the unit that its name says.
        highest: whether the highest value of an objective is the best one.
        base: value of the base configuration by objective, where a trial had it; dashed.
    """
    handles, said = {}, []
    lost = trials.index[trials.kind == FAILED]
    for axes, (name, high) in zip(figure.subplots(1, len(highest), squeeze=False)[0], highest.items(), strict=True):
        done, pruned = (trials.loc[trials.kind == kind, name].dropna() for kind in (FINISHED, PRUNED))
        axes.set(xlabel="trial", ylabel=name)
        if len(pruned):
            handles["pruned, where it stood"] = _dots(axes, pruned.index, pruned, PALE, len(trials) > MANY)
        if len(done):
            handles[FINISHED] = _dots(axes, done.index, done, PALETTE[0], len(trials) > MANY)
            record = best_so_far(done, high)
            record = pd.concat([record, record.tail(1).set_axis([trials.index.max()])])
            handles["best so far"] = axes.plot(
                record.index, record, drawstyle="steps-post", color=PALETTE[1], linewidth=1.5
            )[0]
            said.append(f"{name} from {in_unit(done.iloc[0], name)}, best {in_unit(record.iloc[-1], name)}")
        if name in base:
            handles["base configuration"] = axes.axhline(base[name], color=GREY, linestyle="--", linewidth=1)
        if len(lost):
            foot = np.full(len(lost), 0.02)
            handles[FAILED] = axes.plot(lost, foot, "x", color="black", transform=axes.get_xaxis_transform())[0]
        if not len(done) and not len(pruned):
            _nothing(axes)
        axes.set_xlim(trials.index.min() - 0.5, trials.index.max() + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    legend(figure, handles)
    return f"Value by trial: {'; '.join(said) or 'no trial has finished'}; {len(lost)} failed"


@inline_svg
def plot_learning(figure: "Figure", ylabel: str, curves: Sequence[tuple[str, pd.Series]], best: int | None) -> str:
    """Of each trial its curve by round.

    Args:
        curves: kind of a trial, and values by round.
        best: place in `curves` of the one that is drawn thick.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    axes = figure.add_subplot(xlabel="round", ylabel=ylabel)
    handles: dict[str, Any] = {}
    looks = {PRUNED: (PALE, 0.9), FINISHED: (PALETTE[0], 0.5), FAILED: ("black", 0.5)}
    for kind, (colour, most) in looks.items():
        mine = [curve for of, curve in curves if of == kind]
        if not mine:
            continue
        lines = [np.column_stack([curve.index, curve]) for curve in mine]
        alpha = max(0.15, min(most, 40 / len(mine)))  # of many, where they are dense is still to be seen
        drawn = LineCollection(lines, colors=colour, linewidths=1, alpha=alpha, rasterized=len(curves) > MANY)
        axes.add_collection(drawn)
        handles[f"{kind} ({len(mine)})"] = Line2D([], [], color=colour)
        ends = [curve.index[-1] for curve in mine], [curve.iloc[-1] for curve in mine]
        axes.plot(*ends, ".", color=colour, markersize=4, rasterized=len(curves) > MANY)
    if best is not None:
        curve = curves[best][1]
        handles["best trial"] = axes.plot(curve.index, curve, color=PALETTE[1], linewidth=2)[0]
    axes.autoscale()
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    legend(figure, handles)
    rounds = [curve.index[-1] for _, curve in curves]
    return f"{ylabel} of {len(curves)} trials by round; they ended after {min(rounds)} to {max(rounds)} rounds"


@inline_svg
def plot_importance(figure: "Figure", shares: Mapping[str, Mapping[str, float]]) -> str:
    """By objective, the share of each parameter, the same order in all."""
    names = list(next(iter(shares.values())))
    figure.set_figheight(1 + 0.27 * len(names) + 0.2)
    columns = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (objective, share) in zip(columns, shares.items(), strict=True):
        widths = np.array([100 * share[name] for name in names])
        axes.barh(range(len(names)), widths, height=0.7, color=PALETTE[0])
        for at, width in enumerate(widths):
            beside = {"xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(f"{width:.0f}", (width, at), va="center", fontsize="small", **beside)
        axes.set(xlabel=f"importance for {objective} (%)", xlim=(0, 1.08 * widths.max()))
        axes.grid(False, axis="y")
    # Shared: the first panel's names and direction are all panels'.
    columns[0].set_yticks(range(len(names)), [short(name, 28) for name in names])
    columns[0].invert_yaxis()
    said = [
        f"{objective}: {', '.join(f'{name} {100 * share[name]:.0f}%' for name in names[:5])}"
        for objective, share in shares.items()
    ]
    return f"Importance for {'; '.join(said)}"


@inline_svg
def plot_slices(
    figure: "Figure", ylabel: str, scales: Sequence[Scale], places: pd.DataFrame, trials: pd.DataFrame, best: int | None
) -> str:
    """A panel for each parameter: the objective by its value.

    Args:
        places: (n, parameters) in [0, 1] by trial; nan where a trial lacks the parameter.
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
            mine = trials.index[(trials.kind == kind) & places[scale.name].notna() & trials[ylabel].notna()]
            if len(mine):
                handles[kind] = _dots(
                    axes, places.loc[mine, scale.name], trials.loc[mine, ylabel], colour, len(trials) > MANY
                )
        if best is not None and not np.isnan(places.loc[best, scale.name]):
            dot = places.loc[best, scale.name], trials.loc[best, ylabel]
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
    figure: "Figure", scales: Sequence[Scale], places: pd.DataFrame, kinds: pd.Series, best: int | None
) -> str:
    """A line for each trial through the axes of its parameters and objectives.

    Args:
        places: (n, scales) in [0, 1] by trial, the best last; nan where a trial lacks the parameter.
        kinds: (n,) by trial; those that were pruned are pale.
        best: number of the trial that is drawn thick.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    figure.set_figheight(4.4)
    axes, at = figure.add_subplot(), np.arange(len(scales))
    missing = places.isna()
    heights = places[[scale.name for scale in scales]].to_numpy(copy=True)
    # All trials of one choice would pass through one point: each passes a little beside the others.
    beside = np.linspace(-1, 1, len(places)) if len(places) > 1 else np.zeros(1)
    for column, scale in enumerate(scales):
        heights[:, column] += beside * (0.3 / len(scale.choices) if scale.choices else 0)
    heights[np.isnan(heights)] = UNUSED
    lines = np.stack([np.broadcast_to(at, heights.shape), heights], axis=-1)
    done = (kinds.loc[places.index] == FINISHED).to_numpy()
    shades = colormaps["Blues"](np.linspace(0.25, 1.0, done.sum()))
    for mine, colours, alpha in ((~done, PALE, 0.45), (done, shades, 0.85)):
        drawn = LineCollection(lines[mine], colors=colours, linewidths=1.1, alpha=alpha)
        axes.add_collection(drawn)
    if best is not None:
        axes.plot(at, heights[places.index.get_loc(best)], color=PALETTE[1], linewidth=2.4)
    room = 150 // len(scales)
    lifted = max(len(scale.name) for scale in scales) > room  # every second name, where they would touch
    for place, scale in enumerate(scales):
        axes.plot([place, place], [0, 1], color="black", linewidth=0.8)
        for height, label in zip(*scale.ticks(), strict=True):
            axes.plot([place - 0.01, place + 0.01], [height, height], color="black", linewidth=0.8)
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            label = short(label, max(8, room - 2))
            axes.text(place + 0.02, height, label, va="center", fontsize="small", bbox=box)
        if missing[scale.name].any():
            axes.text(place, UNUSED - 0.04, "unused", ha="center", va="top", fontsize="small", color=GREY)
        lift = 1.05 + (0.07 if lifted and place % 2 else 0)
        axes.text(place, lift, short(scale.name, 2 * room), ha="center", fontsize="small", fontweight="bold")
    foot = UNUSED - 0.12 if missing.any(axis=None) else -0.03
    axes.set(xlim=(-0.03 * len(scales), len(scales) - 1 + 0.05 * len(scales)), ylim=(foot, 1.18 if lifted else 1.11))
    axes.set_axis_off()
    return f"{len(places)} trials through {', '.join(scale.name for scale in scales)}"


@inline_svg
def plot_front(
    figure: "Figure",
    trials: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    highest: Mapping[str, bool],
    front: Sequence[int],
    base: int | None,
) -> str:
    """A panel for each pair of objectives: all finished trials, and those that no other beats in every objective.

    Args:
        trials: (n,) by number: kind, and a column for each objective, in the unit that its name says.
        pairs: what lies below and beside.
        highest: whether the highest value of an objective is the best one.
        front: numbers of the trials that are not dominated.
        base: number of the trial that had the base configuration.
    """
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure.set_figheight(0.6 + 3.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    handles = {}
    done = trials[trials.kind == FINISHED]
    rest = done.drop(index=list(front))
    for axes, (across, up) in zip(grid.flat, pairs, strict=False):
        if len(rest):
            handles["dominated"] = _dots(axes, rest[across], rest[up], PALE, len(trials) > MANY)
        mine = done.loc[list(front)].sort_values([across, up])
        if len(pairs) == 1:
            # What can be had at most for so much, or at least.
            steps = "steps-pre" if highest[across] else "steps-post"
            axes.plot(mine[across], mine[up], color=PALETTE[0], linewidth=1, drawstyle=steps)
        handles["Pareto front"] = axes.plot(mine[across], mine[up], "o", color=PALETTE[0], markersize=6)[0]
        if len(pairs) == 1 and len(front) <= 15:
            for number, row in mine.iterrows():
                where = (row[across], row[up])
                axes.annotate(str(number), where, (5, 5), textcoords="offset points", fontsize="small")
        if base is not None:
            dot = done.loc[base, across], done.loc[base, up]
            looks = {"color": "black", "markersize": 8, "fillstyle": "none", "zorder": 5}
            handles["base configuration"] = axes.plot(*dot, "D", **looks)[0]
        for axis, name in (("x", across), ("y", up)):
            low, high = done[name].min(), done[name].max()
            if low > 0 and high / low > 20:
                _as_log(axes, axis)
        better = {True: "more is better", False: "less is better"}
        axes.set(xlabel=f"{across}, {better[highest[across]]}", ylabel=f"{up}, {better[highest[up]]}")
    for axes in grid.flat[len(pairs) :]:
        axes.set_axis_off()
    legend(figure, handles)
    return f"{len(front)} of {len(done)} finished trials are on the Pareto front: {', '.join(map(str, front[:20]))}"


def _dots(axes: "Axes", x: Any, y: Any, colour: str, many: bool) -> Any:
    return axes.plot(x, y, "o", color=colour, markersize=4.5, alpha=0.8, markeredgewidth=0, rasterized=many)[0]


def _as_log(axes: "Axes", which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: setting(float(value))))  # without mathematical type
    axis.set_minor_formatter(NullFormatter())


def _nothing(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)


def _same(one: Any, other: Any) -> bool:
    """1, 1.0 and True are three choices."""
    return type(one) is type(other) and one == other
