"""A study as its page shows it: values in the units shown, parameters as positions on axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from fedsim.sweep.plots import FINISHED, Scale
from fedsim.sweep.tables import (
    ABSENT,
    KINDS,
    Goal,
    best_trial,
    goals_of,
    importances,
    measures_of,
    parameter_names,
    pareto,
    state_of,
)


@dataclass(frozen=True)
class StudyView:
    """A study as its page shows it.

    Attributes:
        shown: (n,) by number: kind, and one column per goal, named and in the unit as shown; of a pruned trial, only
            accuracies, at its last round.
        scales: of every parameter, in the order in which trials first have them.
        positions: (n, parameters) by number, in [0, 1]; nan where a trial does not have the parameter.
        front: numbers of the trials on the Pareto front.
        best, base: numbers of the best trial, and of the one with the base configuration.
        shares, top: see `importances`.
        settings: of the sweep, as `Sweep.plain` returns them.
    """

    study: optuna.Study
    trials: list[FrozenTrial]
    goals: list[Goal]
    shown: pd.DataFrame
    scales: list[Scale]
    positions: pd.DataFrame
    front: list[int]
    best: int | None
    base: int | None
    shares: dict[str, dict[str, float]]
    top: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, study: optuna.Study) -> "StudyView":
        trials, goals = study.get_trials(deepcopy=False), goals_of(study)
        settings = study.user_attrs.get("sweep", {})
        shown = _shown(trials, goals)
        scales = [_scale(name, trials) for name in parameter_names(trials)]
        finished = (shown.kind == FINISHED).any()
        shares, top = importances(study)
        return cls(
            study=study,
            trials=trials,
            goals=goals,
            shown=shown,
            scales=scales,
            positions=_positions(trials, scales),
            front=[trial.number for trial in pareto(study)] if finished else [],
            best=best_trial(study).number if finished else None,
            base=_number_of_base(trials, settings.get("config", {})),
            shares=shares,
            top=top,
            settings=settings,
        )

    @property
    def base_finished(self) -> bool:
        """Whether a trial with the base configuration has finished."""
        return self.base is not None and self.shown.kind[self.base] == FINISHED

    def from_worst(self, numbers: pd.Index) -> pd.Index:
        """Trials from the worst to the best by the first goal."""
        goal = self.goals[0]
        return self.shown.loc[numbers, goal.label].sort_values(ascending=goal.highest, kind="stable").index


def value_in(config: Mapping[str, Any], name: str) -> Any:
    """The value of `cohort`, `method` or `fedclip.lr` in a config's plain fields; ABSENT when there is none."""
    component, _, field = name.rpartition(".")
    if not component:
        value = config.get(name, ABSENT)
        return value.get("name", ABSENT) if isinstance(value, dict) else value
    components = [value for value in config.values() if isinstance(value, dict) and value.get("name") == component]
    return next((fields[field] for fields in components if field in fields), ABSENT)


def _shown(trials: Sequence[FrozenTrial], goals: Sequence[Goal]) -> pd.DataFrame:
    columns = {goal.label: [goal.factor * _value(trial, k, goals) for trial in trials] for k, goal in enumerate(goals)}
    return pd.DataFrame({"kind": [KINDS[state_of(trial)] for trial in trials]} | columns, index=_numbers(trials))


def _positions(trials: Sequence[FrozenTrial], scales: Sequence[Scale]) -> pd.DataFrame:
    columns = {
        scale.name: [
            scale.position(trial.params[scale.name]) if scale.name in trial.params else np.nan for trial in trials
        ]
        for scale in scales
    }
    return pd.DataFrame(columns, index=_numbers(trials))


def _numbers(trials: Sequence[FrozenTrial]) -> pd.Index:
    return pd.Index([trial.number for trial in trials], dtype=int)


def _number_of_base(trials: Sequence[FrozenTrial], config: Mapping[str, Any]) -> int | None:
    for trial in trials:
        if trial.params and all(value_in(config, name) == value for name, value in trial.params.items()):
            return trial.number
    return None


def _value(trial: FrozenTrial, index: int, goals: Sequence[Goal]) -> float:
    if state_of(trial) == TrialState.COMPLETE:
        return trial.values[index]
    # A pruned trial has an accuracy; its costs so far would look like savings.
    known = state_of(trial) == TrialState.PRUNED and goals[index].unit == "%"
    return measures_of(trial, goals).get(goals[index].name, np.nan) if known else np.nan


def _scale(name: str, trials: Sequence[FrozenTrial]) -> Scale:
    distributions: list[Any] = [trial.distributions[name] for trial in trials if name in trial.distributions]
    if isinstance(distributions[0], CategoricalDistribution):
        choices = [choice for distribution in distributions for choice in distribution.choices]
        return Scale(name, choices=tuple({(type(choice), choice): choice for choice in choices}.values()))
    values = [trial.params[name] for trial in trials if name in trial.params]  # an enqueued value may be outside
    low = min(values + [distribution.low for distribution in distributions])
    high = max(values + [distribution.high for distribution in distributions])
    return Scale(name, low, high, distributions[0].log)
