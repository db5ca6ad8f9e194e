"""The page of a sweep: one self-contained HTML file, made from the Optuna study alone.

A running or interrupted sweep therefore has the same page as a finished one.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from fedsim.config import EXECUTION
from fedsim.errors import counted
from fedsim.files import write_text
from fedsim.formats import number, setting
from fedsim.reporting.canvas import Plot
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.html import LONGEST, Section, portable, render
from fedsim.sweep.plots import (
    FAILED,
    FINISHED,
    MANY,
    PRUNED,
    Scale,
    plot_front,
    plot_history,
    plot_importance,
    plot_learning,
    plot_parallel,
    plot_slices,
)
from fedsim.sweep.summary import summary, title
from fedsim.sweep.tables import FIRST, GOALS, KINDS, LAST, MEASURED, MIN_FINISHED, Goal, state_of, trial_table
from fedsim.sweep.view import StudyView

MAX_AXES = 12  # of parallel coordinates, objectives included: more cannot be read


def write_sweep_page(study: optuna.Study, reporting: pd.DataFrame | None, facts: Mapping[str, Any], file: Path) -> None:
    """Writes the page of a sweep, finished or not; the same study gives the same bytes.

    Args:
        study: as a sweep leaves it; its user attributes hold the settings.
        reporting: one row per run on the reporting seeds: config ("best" or "base"), seed, measures as `summarize`
            returns them, bytes; None when there were none.
        facts: `best`, the fields of best.yaml; `versions`, by name; everything else becomes a row of the facts.
        file: where to write.
    """
    view = StudyView.of(study)
    sections = [summary(view, reporting)]
    if view.shown.kind.isin([FINISHED, PRUNED]).any():
        sections += [_history(view), _importance(view)]
        sections += [values] if (values := _values(view)).plots else []
    sections.append(_all_trials(view))
    if (best := facts.get("best")) is not None:
        words = ["best.yaml in the same folder: `fedsim run --config best.yaml` runs it."]
        sections.append(Section("The best configuration", words, code=_yaml(best)))
    if config := view.settings.get("config"):
        sections.append(Section("The base configuration", code=_yaml(config)))
    sections.append(_facts(view, facts))
    write_text(file, render(title(view), sections))


def _history(view: StudyView) -> Section:
    highest = {goal.label: goal.highest for goal in view.goals}
    base = (
        {label: view.shown[label][view.base] for label in highest}
        if view.base is not None and view.base_finished
        else {}
    )
    caption = "All trials in the order in which they started." + (" Dashed: the base configuration." if base else "")
    plots = [plot_history(caption, view.shown, highest, base)]
    if len(view.goals) > 1 and view.front:
        plots.append(_front(view))
    goal = view.goals[0]
    curves = {
        trial.number: (KINDS[state_of(trial)], goal.factor * pd.Series(trial.intermediate_values).sort_index())
        for trial in view.trials
        if trial.intermediate_values and KINDS[state_of(trial)] in (FINISHED, PRUNED, FAILED)
    }
    if curves:
        best = view.best if view.best in curves else None
        caption = f"{_capitalized(goal.title)} so far, by round, which trials are pruned by. Dots: where a trial ended."
        plots.append(plot_learning(caption, goal.label, curves, best))
    return Section("History", plots=plots)


def _front(view: StudyView) -> Plot:
    labels = [goal.label for goal in view.goals]
    pairs = [(second, first) for first, second in combinations(labels, 2)]  # costs on the x axis
    caption = "Numbers are those of trials on the front." if len(pairs) == 1 and len(view.front) <= 15 else ""
    caption = f"The Pareto front: trials that no other trial beats in every objective. {caption}".strip()
    return plot_front(
        caption,
        view.shown,
        pairs,
        {goal.label: goal.highest for goal in view.goals},
        view.front,
        view.base if view.base_finished else None,
    )


def _importance(view: StudyView) -> Section:
    shares, top = view.shares, view.top
    finished = int((view.shown.kind == FINISHED).sum())
    if not shares:
        few = finished < MIN_FINISHED
        cause = f"only {counted(finished, 'trial')} finished" if few else "the finished trials are too similar"
        return Section("Importance", [f"Importance is not computed: {cause}."])
    first = next(iter(shares.values()))
    order = sorted(first, key=lambda name: -sum(share[name] for share in shares.values()))
    caption = (
        f"Importance (PED-ANOVA): how well a parameter tells the best {top} of {finished} finished trials apart"
        + ("; pruned trials are left out" if (view.shown.kind == PRUNED).any() else "")
        + ("; an estimate from few trials." if finished < 30 else ".")
    )
    ordered = {goal: {name: share[name] for name in order} for goal, share in shares.items()}
    return Section("Importance", plots=[plot_importance(caption, ordered)])


def _by_importance(view: StudyView) -> list[Scale]:
    """Scales of the parameters that vary, the most important first."""
    importance = {scale.name: sum(share.get(scale.name, 0) for share in view.shares.values()) for scale in view.scales}
    varied = [scale for scale in view.scales if len(scale.choices) > 1 or scale.low < scale.high]
    return sorted(varied, key=lambda scale: -importance[scale.name])


def _values(view: StudyView) -> Section:
    scales, plots = _by_importance(view), []
    most = 8 if len(view.goals) == 1 else 4
    for goal in view.goals:
        if scales and view.shown[goal.label].notna().sum() > 1:
            cut = f" The {most} most important of {len(scales)} parameters." if len(scales) > most else ""
            caption = f"{_capitalized(goal.title)} by the value of each parameter.{cut}"
            plots.append(plot_slices(caption, goal.label, scales[:most], view.positions, view.shown, view.best))
    numbers = view.shown.index[view.shown.drop(columns="kind").notna().all(axis=1)]
    if scales and len(numbers) > 1:
        plots.append(_parallel(view, scales, numbers))
    return Section("Good values", plots=plots)


def _parallel(view: StudyView, scales: list[Scale], numbers: pd.Index) -> Plot:
    """Axes are in the order of the search: a choice comes before the parameters that depend on it."""
    room = MAX_AXES - len(view.goals)
    important = {scale.name for scale in scales[:room]}
    axes = [scale for scale in view.scales if scale.name in important]
    drawn = view.from_worst(numbers)[-MANY:]
    if view.best is not None and view.best not in drawn:
        drawn = drawn.insert(0, view.best)
    positions = view.positions.loc[drawn, [scale.name for scale in axes]]
    goal_axes = []
    for goal in view.goals:
        values = view.shown.loc[positions.index, goal.label]
        goal_axes.append(Scale(goal.label, values.min(), values.max()))
        positions[goal.label] = [goal_axes[-1].position(value) for value in values]
    kinds = view.shown.kind.loc[positions.index]
    line = f"one of the best {MANY} trials of {len(numbers)}" if len(numbers) > MANY else "a trial"
    words = [f"Each line is {line}; darker lines have better {view.goals[0].title}, and the best is thick."]
    if (kinds == PRUNED).any():
        words.append("Grey: pruned trials, at their last round.")
    if positions.isna().any(axis=None):
        words.append("The line of a trial without a parameter passes below the axis.")
    if len(scales) > room:
        words.append(f"The {room} most important of {len(scales)} parameters.")
    return plot_parallel(" ".join(words), [*axes, *goal_axes], positions, kinds, view.best)


def _all_trials(view: StudyView) -> Section:
    table = trial_table(view.study).set_index("number")
    order = _from_best(view)[:LONGEST]
    cells: dict[str, Any] = {"": view.shown.loc[order, "kind"]}
    if len(view.goals) > 1:
        cells[""] = cells[""].where(~order.isin(view.front), "on the front")
    for goal in view.goals:
        values = table[goal.name] if goal.name in MEASURED else view.shown[goal.label] / goal.factor
        cells[goal.label] = [_cell(goal, value) for value in values.loc[order]]
    for name in [str(column) for column in table if column not in (*MEASURED, *FIRST, *LAST)]:
        cells[name] = ["" if pd.isna(value) else setting(_python_value(value)) for value in table.loc[order, name]]
    objectives = {goal.name for goal in view.goals}
    for name in [name for name in GOALS if name not in objectives and table[name].notna().any()]:
        goal = Goal(name, *GOALS[name], True)
        cells[goal.label] = [_cell(goal, value) for value in table.loc[order, name]]
    cells["rounds"] = ["" if pd.isna(value) else str(value) for value in table.loc[order, "rounds"]]
    cells["seconds"] = ["" if pd.isna(value) else number(value) for value in table.loc[order, "seconds"]]
    shown = pd.DataFrame(cells, index=order).rename_axis("trial")
    caption = f"{len(shown)} of {len(table)} trials" if len(shown) < len(table) else "All trials"
    tables = {f"{caption}, the best first": shown}
    failed = table.loc[table.failed.notna(), ["failed"]].rename(columns={"failed": "reason"}).rename_axis("trial")
    if len(failed):
        tables = {f"Failed trials, {len(failed)} in all": failed[:LONGEST]} | tables
    return Section("All trials", tables=tables)


def _from_best(view: StudyView) -> pd.Index:
    """Numbers of all trials: by kind, then those on the front, then by the first goal."""
    rank = {kind: index for index, kind in enumerate(KINDS.values())}
    goal = view.goals[0]
    keys = view.shown.assign(rank=view.shown.kind.map(rank), dominated=~view.shown.index.isin(view.front))
    keys["value"] = keys[goal.label] * (-1 if goal.highest else 1)
    order = ["rank", "dominated", "value"] if len(view.goals) > 1 else ["rank", "value"]
    return keys.sort_values(order, kind="stable").index


def _cell(goal: Goal, value: Any) -> str:
    return "" if pd.isna(value) else goal.cell(goal.factor * value)


def _python_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _facts(view: StudyView, facts: Mapping[str, Any]) -> Section:
    settings = {name: value for name, value in portable(view.settings).items() if name not in ("config", *EXECUTION)}
    rows = {name.replace("_", " "): _text(value) for name, value in settings.items()}
    seconds = [trial.user_attrs["seconds"] for trial in view.trials if trial.user_attrs.get("seconds") is not None]
    if seconds:
        rows["hours of all trials together"] = number(sum(seconds) / 3600)
    if restarted := sum((trial.user_attrs.get("attempts") or 1) > 1 for trial in view.trials):
        rows["trials that were started more than once"] = str(restarted)
    others = {name: value for name, value in portable(dict(facts)).items() if name not in ("best", "versions")}
    rows |= {name.replace("_", " "): _text(value) for name, value in others.items()}
    tables = {"The sweep": pd.DataFrame({"value": pd.Series(rows, dtype=object)})} if rows else {}
    if versions := facts.get("versions"):
        tables["Versions"] = pd.DataFrame({"version": pd.Series(dict(versions), dtype=object)})
    return Section("Settings", tables=tables)


def _yaml(config: Mapping[str, Any]) -> str:
    return to_yaml(portable({name: value for name, value in config.items() if name not in EXECUTION}))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        texts = [setting(item) for item in value]
        return ("; " if any("," in text for text in texts) else ", ").join(texts) or "none"
    return setting(value)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
