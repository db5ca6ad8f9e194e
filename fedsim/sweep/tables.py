"""Trials of a study as tables: all of them, the best, the Pareto front, and the importance of parameters.

Everything is read from the Optuna study, so an interrupted or running sweep has the same tables as a finished one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from fedsim.formats import in_unit, setting
from fedsim.sweep.plots import FAILED, FINISHED, PRUNED

# Measures of a trial, with their types; a parameter of the same name becomes the column "param.NAME".
MEASURED: dict[str, Any] = {
    "validation": "Float64",
    "worst_tenth": "Float64",
    "bytes": "Float64",
    "clock_s": "Float64",
    "flops": "Float64",
    "chosen_round": "Int64",
    "rounds": "Int64",
}
FIRST, LAST = ("number", "state", "failed"), ("seconds",)
KINDS = {
    TrialState.COMPLETE: FINISHED,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
MIN_FINISHED = 4  # trials, for importances
TOP = 5  # trials at least in the top quantile, as Optuna's documentation of PED-ANOVA recommends
ABSENT = object()  # the value of a parameter that a trial does not have
# Name, unit and factor of each objective as it is shown.
GOALS: dict[str, tuple[str, str, float]] = {
    "validation": ("validation accuracy", "%", 100),
    "worst_tenth": ("worst tenth's validation", "%", 100),
    "bytes": ("traffic", "MB", 1e-6),
    "clock_s": ("simulated time", "s", 1),
    "flops": ("training compute", "teraflops", 1e-12),
}


@dataclass(frozen=True)
class Goal:
    """An objective as it is shown: `factor` times its value, in `unit`; `highest` if the highest value is the best."""

    name: str
    title: str
    unit: str
    factor: float
    highest: bool

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def sentence(self, shown: float) -> str:
        """Such as `traffic 4 MB`."""
        return f"{self.title} {self.cell(shown)}{'%' if self.unit == '%' else f' {self.unit}'.rstrip()}"

    def cell(self, shown: float) -> str:
        return in_unit(shown, self.label)


def goals_of(study: optuna.Study) -> list[Goal]:
    """The objectives of a study, in its order."""
    names = study.user_attrs.get("objectives") or [f"objective {k + 1}" for k in range(len(study.directions))]
    return [
        Goal(name, *GOALS.get(name, (name, "", 1)), direction == optuna.study.StudyDirection.MAXIMIZE)
        for name, direction in zip(names, study.directions, strict=True)
    ]


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial: number, state, failed (the reason), parameters, measures, seconds of wall time.

    A numeric parameter is a numeric column, empty where a trial does not have it; one whose values have several types,
    such as 16 and "auto", is text. Accuracies are in [0, 1]. `state` is complete, pruned, fail, running or waiting.
    The validation of a pruned trial is its last value.
    """
    trials = study.get_trials(deepcopy=False)
    goals = goals_of(study)
    table = {
        "number": pd.array([trial.number for trial in trials], "Int64"),
        "state": pd.array([state_of(trial).name.lower() for trial in trials], "string"),
        "failed": pd.array([trial.user_attrs.get("failed") for trial in trials], "string"),
    }
    taken = {*FIRST, *MEASURED, *LAST}
    for name in parameter_names(trials):
        values = [trial.params.get(name, ABSENT) for trial in trials]
        table[f"param.{name}" if name in taken else name] = _column(values)
    measures = [measures_of(trial, goals) for trial in trials]
    for name, dtype in MEASURED.items():
        table[name] = pd.array([values.get(name) for values in measures], dtype)
    table["seconds"] = pd.array([trial.user_attrs.get("seconds") for trial in trials], "Float64")
    return pd.DataFrame(table)


def state_of(trial: FrozenTrial) -> TrialState:
    """The state of a trial; Optuna stores one that failed by its parameters as pruned, so that its sampler learns."""
    return TrialState.FAIL if "failed" in trial.user_attrs else trial.state


def measures_of(trial: FrozenTrial, goals: Sequence[Goal]) -> dict[str, Any]:
    measures = {name: value for name, value in trial.user_attrs.get("measures", {}).items() if value is not None}
    if state_of(trial) == TrialState.COMPLETE:
        return {goal.name: value for goal, value in zip(goals, trial.values, strict=True)} | measures
    if trial.last_step is not None:
        measures.setdefault(goals[0].name, trial.intermediate_values[trial.last_step])
    return measures


def parameter_names(trials: Sequence[FrozenTrial]) -> list[str]:
    """Names of all parameters, in the order in which trials first have them."""
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def pareto(study: optuna.Study) -> list[FrozenTrial]:
    """Finished trials that no other dominates, by number; with one objective, all that have the best value."""
    return sorted(study.best_trials, key=lambda trial: trial.number)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The best trial; with several objectives, the one on the Pareto front with the highest validation accuracy.

    Ties go to the lowest number.

    Raises:
        ValueError: no trial has finished. The message counts trials by state.
    """
    front = pareto(study)
    if not front:
        raise ValueError(f"no trial has finished: {count_by_kind(study.get_trials(deepcopy=False))}")
    if len(study.directions) == 1:
        return front[0]
    goals = goals_of(study)
    validation = [measures_of(trial, goals).get("validation") for trial in front]
    known = [-np.inf if value is None or np.isnan(value) else value for value in validation]
    return front[int(np.argmax(known))]


def count_by_kind(trials: Sequence[FrozenTrial]) -> str:
    """Such as `41 finished, 17 pruned, 2 failed`."""
    kinds = [KINDS[state_of(trial)] for trial in trials]
    return (
        ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS.values() if kind in kinds) or "no trial has started"
    )


def importances(study: optuna.Study) -> tuple[dict[str, dict[str, float]], int]:
    """How much each parameter tells the top trials from the others.

    Source: PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255, as implemented in Optuna.

    Returns:
        By title of the objective, the share of each parameter; and the number of top trials. An objective under which
        no parameter tells them apart is left out; with fewer than `MIN_FINISHED` finished trials, all are.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    top = max(TOP, -(-len(finished) // 10))
    top = min(top, len(finished) // 2)
    result: dict[str, dict[str, float]] = {}
    if len(finished) < MIN_FINISHED:
        return result, top
    names = parameter_names(finished)
    for index, goal in enumerate(goals_of(study)):
        sign = -1 if goal.highest else 1
        with warnings.catch_warnings():
            # Optuna warns that low targets count as good, which `sign` accounts for, of few trials, which the page
            # states, and that shares before normalization are experimental.
            warnings.simplefilter("ignore")
            shares = get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=top / len(finished)),
                target=lambda trial, index=index, sign=sign: sign * trial.values[index],
                normalize=False,
            )
        total = sum(shares.values())
        if total > 0:
            result[goal.title] = {name: shares[name] / total for name in names if name in shares}
    return result, top


def _column(values: list[Any]) -> pd.api.extensions.ExtensionArray:
    """A column of one type; of text when there are several."""
    types = {type(value) for value in values if value is not ABSENT}
    accepted: dict[Any, set[type]] = {"boolean": {bool}, "Int64": {int}, "Float64": {int, float}}
    for dtype in accepted:
        if types <= accepted[dtype]:
            return pd.array([None if value is ABSENT else value for value in values], dtype)
    return pd.array([None if value is ABSENT else setting(value) for value in values], "string")
