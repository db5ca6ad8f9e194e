"""The top of a sweep's page: what was searched, the best trial, and its gain on the reporting seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedsim.errors import counted, listing
from fedsim.formats import difference, number, percent, setting, spread
from fedsim.prepare import PARTITION_FIELDS
from fedsim.registry import available, find
from fedsim.reporting.html import Section, portable
from fedsim.reporting.page import MEASURES, NEW_MEASURES
from fedsim.sweep.plots import FINISHED, Scale
from fedsim.sweep.tables import ABSENT, count_by_kind
from fedsim.sweep.view import StudyView, value_in

SAMPLER_NAMES = {"tpe": "TPE", "random": "random draws", "nsga2": "NSGA-II"}
STOPPING = {
    "asha": "Successive halving (ASHA) stops trials that fall behind",
    "median": "Trials below the median of earlier ones are stopped",
}
F1_AND_ECE = {
    "macro_f1": "macro-F1 of own test rows",
    "ece": "calibration error on own test rows",
    "generalization_f1": "macro-F1 of held-out domains",
    "generalization_ece": "calibration error on held-out domains",
}


def summary(view: StudyView, reporting: pd.DataFrame | None) -> Section:
    """What was searched and found, without a heading."""
    return Section("", [_search(view), _outcome(view)], tables=_reporting_table(reporting) | _space_table(view))


def title(view: StudyView) -> str:
    config = portable(view.settings.get("config", {}))
    data = config.get("dataset", {}).get("name", "")
    data += f" ({config['data_dir']})" if config.get("data_dir") else ""
    held_out = f", {listing(config['held_out'])} held out" if config.get("held_out") else ""
    return f"Sweep of {counted(len(view.trials), 'trial')}" + (f" on {data}{held_out}" if data else "")


def _search(view: StudyView) -> str:
    settings = view.settings
    goals = " and ".join(f"the {'highest' if goal.highest else 'lowest'} {goal.title}" for goal in view.goals)
    sampler = f", proposed by {SAMPLER_NAMES[settings['sampler']]}," if settings.get("sampler") in SAMPLER_NAMES else ""
    text = f"{counted(len(view.trials), 'trial')}{sampler} searched for {goals}: {count_by_kind(view.trials)}."
    text += _stopping(settings, len(view.goals))
    if settings.get("tuning_seeds"):
        text += f" Every trial was evaluated on {_seeds('tuning', settings['tuning_seeds'])}."
    text += " Test rows were not used in the search"
    if names := _transductive(view):
        text += f", except by {listing(names)}: training reads those of held-out domains without their labels"
    text += "."
    if _scrambled(view):
        text += " With scrambled labels, the rows of clients have the images of other rows (`scramble_labels`)."
    partitioning = {*PARTITION_FIELDS, *available("partition")}
    if names := [scale.name for scale in view.scales if scale.name.partition(".")[0] in partitioning]:
        text += f" Trials that differ in {listing(names)} have different partitions, and so different problems."
    return text


def _transductive(view: StudyView) -> list[str]:
    """Names of the searched methods that read target rows; custom methods are not known."""
    names = {view.settings.get("config", {}).get("method", {}).get("name")}
    names |= {trial.params.get("method") for trial in view.trials}
    return [name for name in available("method") if name in names and find("method", name).reads_target]


def _scrambled(view: StudyView) -> bool:
    """Whether the partition of some trial gives rows the images of other rows."""
    partition = view.settings.get("config", {}).get("partition", {})
    searched = (value for trial in view.trials for name, value in trial.params.items() if "scramble_labels" in name)
    return bool(partition.get("scramble_labels")) or any(searched)


def _stopping(settings: Mapping[str, Any], goals: int) -> str:
    pruner = settings.get("pruner") or ("asha" if goals == 1 else "none")
    if "grace" not in settings or pruner not in STOPPING:
        return ""
    return f" {STOPPING[pruner]}, from round {settings['grace']} on."


def _outcome(view: StudyView) -> str:
    if view.best is None:
        failed = any("failed" in trial.user_attrs for trial in view.trials)
        return "No trial has finished." + (" The reasons are listed below." if failed else "")
    finished = (view.shown.kind == FINISHED).sum()
    values = _values_of(view, view.best)
    if len(view.goals) == 1:
        text = f"The best is trial {view.best}: {values}"
    else:
        text = (
            f"{len(view.front)} of {finished} finished trials are on the Pareto front. Of these, trial {view.best} has "
            f"the highest validation accuracy: {values}"
        )
    measures = view.trials[view.best].user_attrs.get("measures", {})
    if measures.get("chosen_round") is not None and measures.get("rounds") is not None:
        text += f" (round {measures['chosen_round']} of {measures['rounds']})"
    text += f". {_base_sentence(view)}"
    if finished > 1:
        text += " The validation accuracy of the best trial is optimistic: it is the highest of many."
    return text


def _base_sentence(view: StudyView) -> str:
    if view.base is None:
        return "No trial had the base configuration."
    if view.base == view.best:
        return "That is the base configuration: the search found nothing better."
    if not view.base_finished:
        return f"The base configuration was trial {view.base}, {view.shown.kind[view.base]}."
    return f"The base configuration was trial {view.base}: {_values_of(view, view.base)}."


def _values_of(view: StudyView, trial: int) -> str:
    return "; ".join(goal.sentence(view.shown[goal.label][trial]) for goal in view.goals)


def _seeds(kind: str, seeds: Sequence[int]) -> str:
    return f"{kind} seed{'s' if len(seeds) > 1 else ''} {listing(seeds)}"


def _reporting_table(reporting: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """Mean ± sample deviation over the reporting seeds of base and best, and of their difference by seed."""
    if reporting is None or reporting.empty:
        return {}
    labels = MEASURES | NEW_MEASURES | F1_AND_ECE
    labels["validation"] += " (used by the search)"
    configs = [config for config in ("base", "best") if (reporting.config == config).any()]
    # A seed on which one of the two has failed is left out of both.
    common = set.intersection(*(set(reporting.seed[reporting.config == config]) for config in configs))
    seeds = sorted(common or set(reporting.seed))
    reporting = reporting[reporting.seed.isin(seeds)]
    runs = {config: reporting[reporting.config == config].set_index("seed").sort_index() for config in configs}
    rows = {}
    for name, label in labels.items():
        if name not in reporting or reporting[name].isna().all():
            continue
        accuracy = {config: table[name] for config, table in runs.items()}
        rows[label] = {config: spread(percent(values.mean()), values.std()) for config, values in accuracy.items()}
        if len(configs) == 2:
            gains = (accuracy["best"] - accuracy["base"]).dropna()
            mean = difference(accuracy["base"][gains.index].mean(), accuracy["best"][gains.index].mean())
            rows[label]["difference"] = spread(mean, gains.std())
    if "bytes" in reporting:
        row = {config: number(table["bytes"].mean() / 1e6) for config, table in runs.items()}
        rows["megabytes up and down, all clients and rounds"] = row | ({"difference": ""} if len(configs) == 2 else {})
    caption = (
        f"On {_seeds('reporting', seeds)}, which the search did not use: accuracy in percent at the round of the best "
        "validation accuracy, and the difference in percentage points"
        + (", mean ± sample standard deviation over seeds" if len(seeds) > 1 else "")
    )
    return {caption: pd.DataFrame(rows).T.rename_axis("accuracy")}


def _space_table(view: StudyView) -> dict[str, pd.DataFrame]:
    if not view.scales:
        return {}
    config = view.settings.get("config", {})
    rows = {}
    for scale in view.scales:
        base = value_in(config, scale.name)
        row = {"values": _range(scale), "trials": str(sum(scale.name in trial.params for trial in view.trials))}
        if config:
            row["base"] = "-" if base is ABSENT else setting(base)
        if view.best is not None:
            params = view.trials[view.best].params
            row["best trial"] = setting(params[scale.name]) if scale.name in params else "-"
        rows[scale.name] = row
    caption = "What was searched; some parameters exist only with one choice, and other trials do not have them"
    if view.positions.loc[[bool(trial.params) for trial in view.trials]].notna().all(axis=None):
        caption = "What was searched"
    return {caption: pd.DataFrame(rows).T.rename_axis("parameter")}


def _range(scale: Scale) -> str:
    if scale.choices:
        return listing(map(setting, scale.choices))
    return f"{setting(scale.low)} to {setting(scale.high)}" + (", log-uniform" if scale.log else "")
