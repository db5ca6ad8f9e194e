"""Finished runs side by side: what differs between them, what it brought, and means over seeds."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fedsim.config import EXECUTION, read_yaml
from fedsim.errors import InputError, listing
from fedsim.evaluate import COLUMNS
from fedsim.page import (
    GREY,
    PALETTE,
    Plot,
    Section,
    Table,
    curves,
    draw,
    legend,
    percent,
    portable,
    render,
    short,
    size,
    unit_of,
    whole_ticks,
)
from fedsim.report import ROUND_COLUMNS, choose_round, summarize, to_yaml, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = ("round", *COLUMNS)
TABLES = {"scores.parquet": SCORES, "zero_shot.parquet": SCORES, "rounds.parquet": ROUND_COLUMNS}
SEEDS = ("seed", "partition_seed")
DATA = ("dataset", "data_dir")
DEALING = ("partition", "clients", "train_share")
STYLES = ("-", "--", ":", "-.")
SIDES = {"generalization": "held-out domains", "personalization": "own test rows"}


@dataclass(frozen=True)
class Finished:
    """What a run's folder says of it.

    Attributes:
        fields: the experiment, flat: `method.lr`.
        means, zero_shot: `summarize` of the chosen round and of zero-shot CLIP.
        lines: `curves` of all rounds.
        up, travelled: (rounds + 1,) bytes so far, up alone and both ways.
    """

    name: str
    fields: dict[str, Any]
    chosen: int
    means: dict[str, float]
    zero_shot: dict[str, float]
    lines: pd.DataFrame
    up: np.ndarray
    travelled: np.ndarray
    seconds: float

    @property
    def seeds(self) -> tuple[Any, ...]:
        return tuple(self.fields[name] for name in SEEDS)


def compare(runs: Sequence[Path], out: Path) -> tuple[pd.DataFrame, Path]:
    """Lays finished runs side by side.

    Returns:
        One row per run, accuracies in percent as text; and the page, at `out`. Where some runs differ only in
        their seeds, rows of means follow: sample standard deviation after the ±, number of runs in column `n`.

    Raises:
        InputError: a folder that is no finished run, or `out` cannot be written.
    """
    finished = _read_all([Path(run) for run in runs])
    differing = _differing(finished)
    table = _runs_table(finished, differing)
    groups = _groups(finished)
    seeded = any(len(group) > 1 for group in groups)
    means = _groups_table(groups, [field for field in differing if field not in SEEDS]) if seeded else None
    _write(
        Path(out), render(f"{len(finished)} runs side by side", _sections(finished, groups, differing, table, means))
    )
    if means is not None:
        table = pd.concat([table.assign(n="1"), means[means.n != "1"]], ignore_index=True).fillna("")
    return table, Path(out)


# Reading ---------------------------------------------------------------------------------------------------


def _read_all(runs: list[Path]) -> list[Finished]:
    if not runs:
        raise InputError("compare wants the folder of at least one run; none was given")
    folders = [Path(os.path.realpath(run)) for run in runs]
    if twice := [run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise InputError(f"compare wants each run once; given twice: {listing(twice[:1])}")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = _apart(folders)
    return [_read(run, name) for run, name in zip(runs, names, strict=True)]


def _read(run: Path, name: str) -> Finished:
    if not run.is_dir():
        raise InputError(f"compare wants folders of runs; {run} is {'a file' if run.exists() else 'not there'}")
    missing = [file for file in ("config.yaml", *TABLES) if not (run / file).is_file()]
    if missing and "config.yaml" not in missing and (run / "checkpoint.safetensors").exists():
        raise InputError(f"{run} is not finished (it lacks {listing(missing)}); `fedsim run` with its flags goes on")
    if missing:
        raise InputError(f"{run} is not a run of fedsim: it lacks {listing(missing)}")
    config = {field: value for field, value in read_yaml(run / "config.yaml").items() if field not in EXECUTION}
    wanted = "dataset", "held_out", "method", "server", "partition", "rounds", *SEEDS
    if absent := [field for field in wanted if field not in config]:
        raise InputError(f"{run / 'config.yaml'} is not a run of fedsim: it lacks {listing(absent)}")
    scores, zero_shot, costs = (_parquet(run / file, columns) for file, columns in TABLES.items())
    if (done := int(costs["round"].max()) if len(costs) else 0) < config["rounds"]:
        raise InputError(f"{run} is not finished: it did {done} of {config['rounds']} rounds")
    chosen = choose_round(scores)
    up, down = (np.concatenate([[0], costs[column].cumsum()]) for column in ("bytes_up", "bytes_down"))
    return Finished(
        name,
        _flat(config),
        chosen,
        summarize(scores[scores["round"] == chosen], config["held_out"]),
        summarize(zero_shot, config["held_out"]),
        curves(scores, config["held_out"]),
        up,
        up + down,
        float(costs.seconds.sum()),
    )


def _parquet(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(file)
    except (pa.ArrowException, OSError) as error:  # pyarrow may add lines of its own to the sentence
        raise InputError(f"{file} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    if absent := [column for column in columns if column not in table]:
        raise InputError(f"{file} is not a table of fedsim: it lacks the columns {listing(absent)}")
    return table


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """`{"method": {"name": "fedclip", "lr": 1}}` as `{"method": "fedclip", "method.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        fields = value if isinstance(value, dict) else {"name": value}
        flat |= {name if field == "name" else f"{name}.{field}": inner for field, inner in fields.items()}
    return flat


# What differs ----------------------------------------------------------------------------------------------


def _differing(runs: list[Finished]) -> list[str]:
    """Fields with more than one value; hyperparameters, among runs of the same component."""
    values: dict[str, dict[Any, set[str]]] = {}
    for run in runs:
        for field, value in run.fields.items():
            kind, _, hyperparameter = field.partition(".")
            component = run.fields[kind] if hyperparameter else ""
            values.setdefault(field, {}).setdefault(component, set()).add(repr(value))
    return [field for field, found in values.items() if any(len(several) > 1 for several in found.values())]


def _written(runs: list[Finished], field: str) -> list[str]:
    """A field's values as they are shown; of absolute paths, what sets them apart."""
    values = [run.fields.get(field, "") for run in runs]
    paths = [value for value in values if isinstance(value, str) and Path(value).is_absolute()]
    shown = dict(zip(paths, _apart([Path(os.path.normpath(path)) for path in paths]), strict=True))
    return [shown[value] if value in paths else _word(value) for value in values]


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _apart(paths: list[Path]) -> list[str]:
    """The names of paths, with as many of the folders above as it takes to tell the paths apart."""
    for deep in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = {path: "/".join(path.parts[-deep:]) for path in paths}
        if len(set(names.values())) == len(names):
            return [names[path] for path in paths]
    return []


def _groups(runs: list[Finished]) -> list[list[Finished]]:
    """Runs that differ only in their seeds; of a seed that was run twice, the first."""
    groups: dict[str, dict[Any, Finished]] = {}
    for run in runs:
        key = repr(sorted((field, repr(value)) for field, value in run.fields.items() if field not in SEEDS))
        groups.setdefault(key, {}).setdefault(run.seeds, run)
    return [list(group.values()) for group in groups.values()]


# Tables ----------------------------------------------------------------------------------------------------


def _runs_table(runs: list[Finished], differing: list[str]) -> pd.DataFrame:
    return _table([run.name for run in runs], [[run] for run in runs], differing)


def _groups_table(groups: list[list[Finished]], differing: list[str]) -> pd.DataFrame:
    table = _table(_group_names(groups, differing), groups, differing)
    return table.assign(n=[str(len(group)) for group in groups])


def _table(names: list[str], groups: list[list[Finished]], differing: list[str]) -> pd.DataFrame:
    columns = {"name": names}
    columns |= {field: _written([group[0] for group in groups], field) for field in differing}
    columns["chosen round"] = [_span([run.chosen for run in group]) for group in groups]
    means = {
        "generalization": lambda run: run.means["generalization"],
        "personalization": lambda run: run.means["personalization"],
        "worst tenth": lambda run: run.means["worst_tenth"],
        "validation": lambda run: run.means["validation"],
        "zero-shot generalization": lambda run: run.zero_shot["generalization"],
    }
    columns |= {name: [_spread([get(run) for run in group]) for group in groups] for name, get in means.items()}
    columns["megabytes up"] = [_number(np.mean([run.up[-1] / 1e6 for run in group])) for group in groups]
    columns["seconds"] = [_number(np.mean([run.seconds for run in group])) for group in groups]
    return pd.DataFrame(columns)


def _spread(accuracies: list[float]) -> str:
    """Mean ± sample standard deviation, in percent; of one run, its number."""
    if len(accuracies) == 1 or np.isnan(accuracies).any():
        return percent(float(np.mean(accuracies)))
    return f"{percent(float(np.mean(accuracies)))} ± {percent(float(np.std(accuracies, ddof=1)))}"


def _span(rounds: list[int]) -> str:
    return str(rounds[0]) if len(set(rounds)) == 1 else f"{min(rounds)} to {max(rounds)}"


def _number(value: float) -> str:
    """One decimal, or three digits where that would show too little."""
    return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.3g}"


def _group_names(groups: list[list[Finished]], differing: list[str]) -> list[str]:
    """What sets a group apart, in words; a single run keeps its name."""
    values = {field: _written([group[0] for group in groups], field) for field in differing}

    def words(place: int) -> str:
        run = groups[place][0]
        parts = [
            values[field][place]
            if "." not in field and field in ("method", "server")
            else f"{field} {values[field][place]}"
            for field in differing
            if field in run.fields
        ]
        return ", ".join(parts) or f"{run.fields['method']}, {run.fields['server']}"

    return [
        f"{words(place)} ({len(group)} seeds)" if len(group) > 1 else group[0].name
        for place, group in enumerate(groups)
    ]


# The page --------------------------------------------------------------------------------------------------


def _sections(
    runs: list[Finished],
    groups: list[list[Finished]],
    differing: list[str],
    table: pd.DataFrame,
    means: pd.DataFrame | None,
) -> list[Section]:
    tables = [_html("Each run: accuracy in percent at its chosen round; megabytes of all clients together", table)]
    if means is not None:
        caption = "Means over seeds ± sample standard deviation over n runs; n = 1: the run itself"
        tables.insert(0, _html(caption, means))
    names = [*means.name] if means is not None else [run.name for run in runs]
    drawn = groups if means is not None else [[run] for run in runs]
    shared = {f: v for f, v in runs[0].fields.items() if all(f in run.fields and run.fields[f] == v for run in runs)}
    return [
        Section("", _warnings(runs, groups, differing), tables=tables),
        Section("Accuracy by round", *_by_round(drawn, names)),
        Section("Accuracy against bytes", *_by_bytes(drawn, names)),
        Section("What the runs share", code=to_yaml(portable(shared))),
    ]


def _html(caption: str, table: pd.DataFrame) -> Table:
    return Table(caption, list(table.columns), table.values.tolist())


def _warnings(runs: list[Finished], groups: list[list[Finished]], differing: list[str]) -> list[str]:
    """How rounds were chosen, and what keeps the numbers from being compared."""
    words = [
        "Of each run, the first round of the best mean validation accuracy is shown, or the last where it has no "
        "validation rows. Test rows never choose; test curves are here to be looked at, not to choose a round from."
    ]

    def among(*prefixes: str) -> list[str]:
        return [field for field in differing if field.partition(".")[0] in prefixes]

    if data := among(*DATA):
        words.append(f"These runs are on different data ({_values(runs, data)}): their accuracies do not compare.")
    if away := among("held_out"):
        words.append(
            f"These runs hold out different domains ({_values(runs, away)}): generalization is measured on "
            "different rows, and so is the rest."
        )
    if dealt := among(*DEALING, "partition_seed"):
        words.append(
            f"These runs deal rows to clients differently ({listing(dealt)}): personalization, worst tenth and "
            "validation are measured on different rows."
        )
    if (left := len(runs) - sum(map(len, groups))) and any(len(group) > 1 for group in groups):
        words.append(f"Means leave out {left} run{'s' * (left > 1)} of a seed that another run has already.")
    return words


def _values(runs: list[Finished], fields: list[str]) -> str:
    return "; ".join(listing(dict.fromkeys(_written(runs, field))) for field in fields)


def _by_round(groups: list[list[Finished]], names: list[str]) -> tuple[list[str], list[Plot]]:
    if all(len(run.lines) == 1 for group in groups for run in group):
        return ["No run did a round, so there is nothing to show by round."], []
    caption = _caption("Accuracy by round", groups)
    return [], [_plot("by-round", caption, "round", groups, names, lambda run: np.asarray(run.lines.index), True)]


def _by_bytes(groups: list[list[Finished]], names: list[str]) -> tuple[list[str], list[Plot]]:
    moving = [place for place, group in enumerate(groups) if group[0].travelled[-1]]
    words = []
    if len(moving) < len(groups):
        still = [names[place] for place in range(len(groups)) if place not in moving]
        words.append(f"Nothing travels in: {listing(still)}.")
    if not moving:
        return words, []
    most = max(groups[place][0].travelled[-1] for place in moving)
    scale, unit = unit_of(most)
    caption = _caption("Accuracy against all bytes that travelled so far, up and down, of all clients together", groups)
    label = f"bytes up and down since the start ({unit})"
    x = _over(scale)
    return words, [_plot("by-bytes", caption, label, groups, names, x, False, set(moving), f"; {size(most)} at most")]


def _over(scale: float) -> Callable[[Finished], np.ndarray]:
    return lambda run: run.travelled / scale


def _caption(what: str, groups: list[list[Finished]]) -> str:
    dots = "Dots: the chosen rounds"
    if any(len(group) > 1 for group in groups):
        dots += " of single runs; bands: sample standard deviation over seeds"
    return f"{what}. Dashed grey: zero-shot CLIP, where it is the same for all. {dots}."


def _plot(
    id: str,
    caption: str,
    xlabel: str,
    groups: list[list[Finished]],
    names: list[str],
    x: Callable[[Finished], np.ndarray],
    by_round: bool,
    only: set[int] | None = None,
    told: str = "",
) -> Plot:
    """Two panels, held-out domains and own test rows, a line per run or group; colours keep to their run."""
    places = [place for place in range(len(groups)) if only is None or place in only]

    def paint(figure: "Figure") -> None:
        handles = {}
        for axes, (key, title) in zip(figure.subplots(1, 2), SIDES.items(), strict=True):
            axes.set(xlabel=xlabel, ylabel=f"accuracy on {title} (%)")
            there = [place for place in places if not groups[place][0].lines[key].isna().all()]
            for place in there:
                look = {"color": PALETTE[place % 7], "linestyle": STYLES[place // 7 % len(STYLES)]}
                at, lines = x(groups[place][0]), 100 * np.stack([run.lines[key] for run in groups[place]])
                handles[place] = axes.plot(at, lines.mean(0), **look)[0]
                if len(lines) > 1:
                    spread = lines.std(0, ddof=1)
                    band = lines.mean(0) - spread, lines.mean(0) + spread
                    axes.fill_between(at, *band, color=look["color"], alpha=0.15, linewidth=0)
                if len(lines) == 1:
                    run = groups[place][0]
                    row = list(run.lines.index).index(run.chosen)
                    axes.plot(at[row], lines[0, row], "o", color=look["color"], markersize=5)
            zero = {round(run.zero_shot[key], 9) for place in there for run in groups[place]}
            if len(zero) == 1:
                axes.axhline(100 * zero.pop(), color=GREY, linestyle="--", linewidth=1)
            if not there:
                axes.text(0.5, 0.5, "no such rows", transform=axes.transAxes, ha="center", color=GREY)
            if by_round:
                whole_ticks(axes)
        most = max(len(names[place]) for place in handles) if handles else 0
        columns = 3 if most <= 28 else 2 if most <= 60 else 1
        legend(figure, list(handles.values()), [short(names[place], 110) for place in handles], columns)

    ends = "; ".join(
        f"{short(names[place], 60)}: "
        + ", ".join(f"{title} {_last(groups[place], key)}" for key, title in SIDES.items())
        for place in places[:12]
    )
    height = 4.3 + 0.2 * len(places) / 2
    alt = f"{xlabel}: percent at the last round: {ends}{told}"
    return draw(id, caption, alt, paint, (11.6, height), wide=True)


def _last(group: list[Finished], key: str) -> str:
    return percent(float(np.mean([run.lines[key].iloc[-1] for run in group])))


def _write(out: Path, page: str) -> None:
    if out.is_dir():
        raise InputError(f"--out wants a file for the page; {out} is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
