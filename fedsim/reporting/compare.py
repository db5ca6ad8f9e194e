"""Finished runs side by side: the settings that differ, the accuracies, and means over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.config import flat
from fedsim.errors import InputError, Stopped, listing
from fedsim.files import FULL, reason, write_text
from fedsim.folder import check_page
from fedsim.formats import number, percent, setting, spread
from fedsim.reporting.canvas import Plot
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.html import Section, portable, render
from fedsim.reporting.metrics import TRAVELLED, against_cost, curves
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.plots import Line, Panel, plot_lines
from fedsim.reporting.remarks import NEVER
from fedsim.reporting.tables import TUNED, ZERO_SHOT

# Column heads of the measures of a summary; those of new classes and of a long tail only if a run has some.
SHOWN = {
    "generalization": "generalization",
    "personalization": "personalization",
    "worst_tenth": "worst tenth",
    "validation": "validation",
    "neighbor": "neighbor",
    "attack_success": "attack success",
    "generalization_attack_success": "held-out attack success",
    "average_accuracy": "average over tasks",
    "last_accuracy": "after the last task",
    "forgetting": "forgetting",
    "worst_group": "worst group",
    "demographic_parity": "demographic parity difference",
    "equalized_odds": "equalized odds difference",
    "local": "local",
    "base": "base",
    "new": "new",
    "harmonic_2": "harmonic mean (base, new)",
    "harmonic_3": "harmonic mean (local, base, new)",
    "head": "head classes",
    "medium": "medium classes",
    "tail": "tail classes",
}
TUNED_SHOWN = ("generalization", "personalization", "worst_tenth", "neighbor", "dual")
MORE = {
    "pooled": "all rows together",
    "balanced": "balanced accuracy",
    "spread": "deviation over clients",
    "personalization_own": "own classes competing",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "generalization_f1": "held-out macro-F1",
    "generalization_ece": "held-out calibration error",
}
SEEDS = ("seed", "partition_seed")
CHOSEN = (
    "Each run is shown at its first round with the highest mean validation accuracy; at its last, if no client has "
    "validation rows."
)
# Why accuracies do not compare, by the fields that differ.
CAVEATS = {
    ("dataset", "data_dir"): "These runs are on different data: their accuracies do not compare.",
    ("held_out",): "These runs hold out different domains: all accuracies are measured on different rows.",
    ("attack",): "These runs have different attacks, or malicious clients, which are not evaluated.",
    ("new_classes",): "These runs train on different classes: all accuracies are measured on different rows.",
    ("tasks",): "These runs have different tasks: at the same round, they have seen different rows.",
    ("neighbors",): "These runs have different numbers of neighbors: neighbor is measured on different rows.",
    ("partition", "clients", "train_share", "partition_seed"): (
        "These runs have different partitions: all but generalization is measured on different rows."
    ),
}

TRANSDUCTIVE = (
    "Transductive: {}. Training read the test rows of held-out domains without their labels, so generalization does "
    "not compare with that of runs that never saw these rows."
)
SCRAMBLED = (
    "Scrambled labels: {}. The rows of clients have the images of other rows, in training and in tests, so accuracy on "
    "clients' own rows does not measure recognition there, and does not compare with that of other runs."
)


@dataclass(frozen=True)
class Finished:
    """A finished run, as it is compared.

    Attributes:
        fields: the experiment, flat: `method.lr`.
        chosen: the chosen round.
        means, zero_shot: `summarize` of the chosen round and of zero-shot CLIP.
        tuned: the same of the tuned models; empty if there are none.
        lines: `curves` by round and by cost, with the key "round" or that of `against_cost`.
        transductive: its method read target rows.
        scrambled: its clients' rows had the images of other rows.
    """

    name: str
    fields: dict[str, Any]
    chosen: int
    means: dict[str, float]
    zero_shot: dict[str, float]
    tuned: dict[str, float]
    lines: dict[str, pd.DataFrame]
    megabytes: float
    seconds: float
    transductive: bool
    scrambled: bool


Groups = list[tuple[str, list[Finished]]]  # a name, and one run or those that differ only in their seeds


def compare(runs: Sequence[Path], out: Path, warn: Callable[[str], None] = lambda _: None) -> tuple[pd.DataFrame, Path]:
    """Compares finished runs.

    Args:
        runs: their folders.
        out: file of the page.
        warn: called with each reason why accuracies of these runs do not compare; the page has them as well.

    Returns:
        One row per run, accuracies in percent as text; and `out`. If some runs differ only in their seeds, rows of
        means follow: sample standard deviation after the ±, number of runs in column `n`.

    Raises:
        InputError: a folder is no finished run, a file is damaged, or `out` cannot be written, for example because it
            is not a page of fedsim.
        Stopped: the disk is full.
    """
    check_page(Path(out))
    finished = _read_all([Path(run) for run in runs])
    differing = _differing(finished)
    shared = {field: value for field, value in finished[0].fields.items() if field not in differing}
    shown: Groups = [(run.name, [run]) for run in finished]
    table = _table(shown, differing)
    tables = {"Each run: accuracy in percent at its chosen round; megabytes of all clients together": table}
    settings = [field for field in differing if field not in SEEDS]
    if len(groups := _groups(finished, settings)) < len(finished):
        shown, means = groups, _table(groups, settings).assign(n=[str(len(group)) for _, group in groups])
        caption = "Means ± sample standard deviation over n seeds; a seed that was run twice counts once"
        tables = {caption: means} | tables
        table = pd.concat([table.assign(n="1"), means[means.n != "1"]], ignore_index=True).fillna("")
    caption = "The same rounds, in percent: own test rows of all clients, or of held-out domains if a head names them"
    tables |= {caption: _more(shown)}
    names = {field.partition(".")[0] for field in differing}
    caveats = [caveat for fields, caveat in CAVEATS.items() if names & set(fields)]
    if transductive := [run.name for run in finished if run.transductive]:
        caveats.append(TRANSDUCTIVE.format(listing(transductive, 20)))
    if scrambled := [run.name for run in finished if run.scrambled]:
        caveats.append(SCRAMBLED.format(listing(scrambled, 20)))
    message = "" if caveats or len(shown) < 2 else _message(next(iter(tables.values())))
    words = [*filter(None, [message]), f"{CHOSEN} {NEVER}", *caveats]
    sections = [
        Section("", words, tables={caption: rows.set_index("name") for caption, rows in tables.items()}),
        Section("Round by round", plots=_plots(shown)),
        Section("What the runs share", code=to_yaml(portable(shared))),
    ]
    _write(Path(out), render(f"{len(finished)} runs side by side", sections))
    for caveat in caveats:
        warn(caveat)
    return table, Path(out)


def _write(out: Path, page: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        if error.errno in FULL:
            raise Stopped(f"{reason(error)}; nothing was written") from None
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None


# Reading ---------------------------------------------------------------------------------------------------


def _read_all(runs: list[Path]) -> list[Finished]:
    if not runs:
        raise InputError("compare needs the folder of at least one run; none was given")
    folders = [run.resolve() for run in runs]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return [_read(run, name) for run, name in zip(runs, names, strict=True)]


def _read(run: Path, name: str) -> Finished:
    if not run.is_dir():
        raise InputError(f"compare needs folders of runs; {run} {'is a file' if run.exists() else 'does not exist'}")
    tables = read_tables(run)
    by_round = curves(tables.trained.scores, tables.held_out)
    return Finished(
        name,
        # The same data may be at another path on another machine: the folder's name identifies it.
        flat(tables.experiment) | {"data_dir": portable(tables.experiment["data_dir"])},
        tables.chosen_round,
        tables.summary(),
        tables.summary(ZERO_SHOT),
        tables.summary(TUNED) if tables.tuned else {},
        {"round": by_round} | against_cost(by_round, tables.rounds),
        tables.rounds.bytes_up.sum() / 1e6,
        tables.rounds.seconds.sum(),
        bool(tables.facts.get("transductive")),
        bool(tables.facts.get("scrambled")),
    )


# What differs ----------------------------------------------------------------------------------------------


def _differing(runs: list[Finished]) -> list[str]:
    """Fields with more than one value; hyperparameters, among runs of the same component."""
    values: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for field, value in run.fields.items():
            component = run.fields[field.partition(".")[0]] if "." in field else ""
            values.setdefault((field, component), set()).add(repr(value))
    return list(dict.fromkeys(field for (field, _), distinct in values.items() if len(distinct) > 1))


def _groups(runs: list[Finished], settings: list[str]) -> Groups:
    """Runs that differ only in their seeds, named by the fields that differ; of a seed run twice, the first."""
    groups: dict[str, dict[Any, Finished]] = {}
    for run in runs:
        key = repr(sorted((field, repr(value)) for field, value in run.fields.items() if field not in SEEDS))
        groups.setdefault(key, {}).setdefault(tuple(run.fields[seed] for seed in SEEDS), run)
    return [(_name(list(group.values()), settings), list(group.values())) for group in groups.values()]


def _name(group: list[Finished], settings: list[str]) -> str:
    first = group[0]
    if len(group) == 1:
        return first.name
    words = {field: _word(first, field) for field in settings if field in first.fields}
    parts = [word if field in ("method", "server") else f"{field} {word}" for field, word in words.items()]
    return f"{', '.join(parts) or first.fields['method']} ({len(group)} seeds)"


def _word(run: Finished, field: str) -> str:
    """A field's value as it is shown."""
    value = portable(run.fields.get(field, ""))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return setting(value)


# Tables and plots ------------------------------------------------------------------------------------------


def _table(groups: Groups, differing: list[str]) -> pd.DataFrame:
    """A row of text for each group, by the fields that differ."""
    measures = {key for _, group in groups for run in group for key in run.means}
    tuned = [key for key in TUNED_SHOWN if any(key in run.tuned for _, group in groups for run in group)]
    rows = []
    for name, group in groups:
        row = {"name": name} | {field: _word(group[0], field) for field in differing}
        row["chosen round"] = ", ".join(str(round) for round in sorted({run.chosen for run in group}))
        row |= {head: _mean(group, key) for key, head in SHOWN.items() if key in measures}
        for key in tuned:
            row[f"tuned, {SHOWN.get(key, key)}"] = _spread([run.tuned.get(key, np.nan) for run in group])
        row["zero-shot generalization"] = _spread([run.zero_shot["generalization"] for run in group])
        row["megabytes up"] = number(float(np.mean([run.megabytes for run in group])))
        row["seconds"] = number(float(np.mean([run.seconds for run in group])))
        rows.append(row)
    return pd.DataFrame(rows)


def _more(groups: Groups) -> pd.DataFrame:
    """A row of text for each group, with the measures that the first table has no room for."""
    return pd.DataFrame(
        [{"name": name} | {head: _mean(group, key) for key, head in MORE.items()} for name, group in groups]
    )


def _message(table: pd.DataFrame) -> str:
    """Which rows of the first table have the highest accuracies, and which send least."""
    sentences = []
    for head, best, unit in (("generalization", max, "%"), ("personalization", max, "%"), ("megabytes up", min, "")):
        values = {
            row["name"]: float(row[head].split()[0].replace(",", "")) for _, row in table.iterrows() if row[head] != "-"
        }
        if len(values) == len(table):
            first = best(values.values())
            names = listing([name for name, value in values.items() if value == first], 3)
            sentences.append(f"{'Highest' if best is max else 'Fewest'} {head}: {names} ({first:g}{unit}).")
    return " ".join(sentences)


def _mean(group: list[Finished], key: str) -> str:
    return _spread([run.means.get(key, np.nan) for run in group])


def _spread(accuracies: list[float]) -> str:
    """Mean ± sample standard deviation in percent; for one run, its value."""
    return spread(percent(float(np.mean(accuracies))), pd.Series(accuracies).std())


def _plots(groups: Groups) -> list[Plot]:
    """By round, and by bytes, where a run that sends none is a vertical line at 0."""
    caption = "Dashed: zero-shot CLIP on the same rows. Large dots: the chosen round, of single runs only."
    if any(len(group) > 1 for _, group in groups):
        caption += " Bands: sample standard deviation over seeds."
    sides = {"generalization": "accuracy on held-out domains (%)", "personalization": "accuracy on own test rows (%)"}
    return [
        plot_lines(caption, [Panel(by, ylabel, _lines(groups, by, side)) for side, ylabel in sides.items()])
        for by in ("round", TRAVELLED)
    ]


def _lines(groups: Groups, by: str, side: str) -> list[Line]:
    lines = []
    for index, (name, group) in enumerate(groups):
        first = group[0]
        y = 100 * pd.concat([run.lines["round"][side] for run in group], axis=1).set_axis(first.lines[by].index)
        dot = list(first.lines["round"].index).index(first.chosen)
        deviation, dot = (y.std(axis=1), None) if len(group) > 1 else (None, dot)
        if y.notna().all(axis=None):
            zero_shot = 100 * first.zero_shot[side]
            lines.append(Line(name, index, y.mean(axis=1), zero_shot=zero_shot, spread=deviation, dot=dot))
    return lines
