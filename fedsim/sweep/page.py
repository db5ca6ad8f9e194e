"""What a search found, as a table and as one self-contained HTML page.

All of it is read from the Optuna study, so that the page of a search that is still going on, or that was killed, is
made in the same way.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from fedsim.config import EXECUTION
from fedsim.errors import listing
from fedsim.files import write_text
from fedsim.formats import difference, in_unit, number, percent, setting, spread
from fedsim.page import LONGEST, MEASURES, NEW_MEASURES, Section, portable, render
from fedsim.plots import Plot
from fedsim.registry import available
from fedsim.report import to_yaml
from fedsim.simulate import DEALT
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

# A trial's measures, and of what type; where a parameter has the same name, the parameter is headed "param.NAME".
MEASURED = {
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
LEAST = 4  # finished trials from which an importance is computed at all
TOP = 5  # trials that an importance should rest on at least, says Optuna's own documentation of PED-ANOVA
AXES = 12  # of parallel coordinates, objectives among them: more cannot be read
ABSENT = object()


@dataclass(frozen=True)
class Goal:
    """An objective as it is shown: `factor` times its value, in `unit`."""

    name: str
    words: str
    unit: str
    factor: float
    highest: bool  # whether the highest is the best

    @property
    def head(self) -> str:
        return f"{self.words} ({self.unit})" if self.unit else self.words

    def told(self, value: float) -> str:
        """A shown value in a sentence."""
        return f"{self.words} {self.cell(value)}{'%' if self.unit == '%' else f' {self.unit}'.rstrip()}"

    def cell(self, value: float) -> str:
        return in_unit(value, self.head)


# Words, unit and factor of what a search can be for.
GOALS = {
    "validation": ("validation accuracy", "%", 100),
    "worst_tenth": ("worst tenth's validation", "%", 100),
    "bytes": ("traffic", "MB", 1e-6),
    "clock_s": ("simulated time", "s", 1),
    "flops": ("training compute", "teraflops", 1e-12),
}
F1_AND_ECE = {
    "macro_f1": "macro-F1 of own test rows",
    "ece": "calibration error on own test rows",
    "generalization_f1": "macro-F1 of held-out domains",
    "generalization_ece": "calibration error on held-out domains",
}
PROPOSED = {"tpe": "TPE", "random": "random draws", "nsga2": "NSGA-II"}


def trial_table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial: number, state, failed (why), each parameter, each measure, seconds of wall time.

    A parameter of numbers is a column of numbers, empty where a trial lacks it. One whose values are of several types,
    say 16 and "auto", is a column of text. Accuracies are in [0, 1]. `state` is complete, pruned, fail, running or
    waiting. The validation of a pruned trial is what it had when it was stopped.
    """
    trials = study.get_trials(deepcopy=False)
    goals = goals_of(study)
    table = {
        "number": pd.array([trial.number for trial in trials], "Int64"),
        "state": pd.array([state_of(trial).name.lower() for trial in trials], "string"),
        "failed": pd.array([trial.user_attrs.get("failed") for trial in trials], "string"),
    }
    taken = {*FIRST, *MEASURED, *LAST}
    for name in _params(trials):
        table[f"param.{name}" if name in taken else name] = _typed([trial.params.get(name, ABSENT) for trial in trials])
    measures = [_measures(trial, goals) for trial in trials]
    for name, kind in MEASURED.items():
        table[name] = pd.array([found.get(name) for found in measures], kind)
    table["seconds"] = pd.array([trial.user_attrs.get("seconds") for trial in trials], "Float64")
    return pd.DataFrame(table)


def state_of(trial: FrozenTrial) -> TrialState:
    """To Optuna a trial that failed by its parameters is a pruned one, of which its sampler learns."""
    return TrialState.FAIL if "failed" in trial.user_attrs else trial.state


def pareto(study: optuna.Study) -> list[FrozenTrial]:
    """Finished trials that no other beats in every objective, by number; of one objective, those of the best value."""
    return sorted(study.best_trials, key=lambda trial: trial.number)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """Of one objective, its best trial; of several, the one of the Pareto front with the highest validation accuracy.

    Of equal ones the first.

    Raises:
        ValueError: no trial has finished. The message says what became of them.
    """
    front = pareto(study)
    if not front:
        raise ValueError(f"no trial has finished: {_tally(study.get_trials(deepcopy=False))}")
    if len(study.directions) == 1:
        return front[0]
    goals = goals_of(study)
    validation = [_measures(trial, goals).get("validation") for trial in front]
    known = [-np.inf if value is None or np.isnan(value) else value for value in validation]
    return front[int(np.argmax(known))]


def write_sweep_page(study: optuna.Study, reporting: pd.DataFrame | None, about: Mapping[str, Any], file: Path) -> None:
    """The page of a search, finished or not; the same study gives the same bytes.

    Args:
        study: as a sweep leaves it; its user attributes say what was asked.
        reporting: a row for each run on the reporting seeds: which ("best" or "base"), seed, and measures as
            `summarize` has them, bytes; None where there were none.
        about: `best`, the fields of best.yaml; `versions`, by name; what else is here is a row of the facts.
        file: where to write.
    """
    seen = _Seen.of(study)
    sections = [Section("", _words(seen), tables=_reported(reporting) | _searched(seen))]
    if seen.shown.kind.isin([FINISHED, PRUNED]).any():
        sections += [_history(seen), _mattered(seen)]
        sections += [values] if (values := _values(seen)).plots else []
    sections.append(_all_trials(seen))
    if (best := about.get("best")) is not None:
        words = ["best.yaml beside this page: `fedsim run --config best.yaml` runs it."]
        sections.append(Section("The best configuration", words, code=_yaml(best)))
    if config := seen.sweep.get("config"):
        sections.append(Section("The base configuration", code=_yaml(config)))
    sections.append(_facts(seen, about))
    write_text(file, render(_title(seen), sections))


def goals_of(study: optuna.Study) -> list[Goal]:
    """What the study is for, in its order."""
    names = study.user_attrs.get("objectives") or [f"objective {k + 1}" for k in range(len(study.directions))]
    return [
        Goal(name, *GOALS.get(name, (name, "", 1)), direction == optuna.study.StudyDirection.MAXIMIZE)
        for name, direction in zip(names, study.directions, strict=True)
    ]


# What a page is made from ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """A study as the page looks at it.

    Attributes:
        shown: (n,) by number: kind, and a column for each goal, headed and in the unit as it is shown; of a pruned
            trial, validation where it was stopped.
        scales: each parameter that any trial has, in the order in which trials met them.
        places: (n, parameters) by number, in [0, 1]; nan where a trial lacks the parameter.
        best, base: numbers of the best trial, and of the one that had the base configuration.
        shares, top: `importances`.
    """

    study: optuna.Study
    trials: list[FrozenTrial]
    goals: list[Goal]
    shown: pd.DataFrame
    scales: list[Scale]
    places: pd.DataFrame
    front: list[int]
    best: int | None
    base: int | None
    shares: dict[str, dict[str, float]]
    top: int
    sweep: dict[str, Any]

    @classmethod
    def of(cls, study: optuna.Study) -> "_Seen":
        trials, goals = study.get_trials(deepcopy=False), goals_of(study)
        numbers = pd.Index([trial.number for trial in trials], dtype=int)
        values = {
            goal.head: [goal.factor * _value(trial, k, goals) for trial in trials] for k, goal in enumerate(goals)
        }
        shown = pd.DataFrame({"kind": [KINDS[state_of(trial)] for trial in trials]} | values, index=numbers)
        scales = [_scale(name, trials) for name in _params(trials)]
        places = pd.DataFrame(
            {
                scale.name: [
                    scale.place(trial.params[scale.name]) if scale.name in trial.params else np.nan for trial in trials
                ]
                for scale in scales
            },
            index=numbers,
        )
        finished = (shown.kind == FINISHED).any()
        sweep = study.user_attrs.get("sweep", {})
        base = [
            trial.number
            for trial in trials
            if trial.params
            and all(_of_config(sweep.get("config", {}), name) == value for name, value in trial.params.items())
        ]
        front = [trial.number for trial in pareto(study)] if finished else []
        best = best_trial(study).number if finished else None
        base = base[0] if base else None
        return cls(study, trials, goals, shown, scales, places, front, best, base, *importances(study), sweep)

    @property
    def judged_base(self) -> bool:
        """Whether a trial of the base configuration has finished."""
        return self.base is not None and self.shown.kind[self.base] == FINISHED

    def good(self, numbers: pd.Index) -> pd.Index:
        """Trials from the worst to the best by the first goal."""
        goal = self.goals[0]
        return self.shown.loc[numbers, goal.head].sort_values(ascending=goal.highest, kind="stable").index


def _params(trials: Sequence[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def _typed(values: list[Any]) -> pd.api.extensions.ExtensionArray:
    """A column of one type; of several, as text."""
    there = [value for value in values if value is not ABSENT]
    types = {type(value) for value in there}
    for kind, accepted in (("boolean", {bool}), ("Int64", {int}), ("Float64", {int, float})):
        if types <= accepted:
            return pd.array([None if value is ABSENT else value for value in values], kind)
    return pd.array([None if value is ABSENT else setting(value) for value in values], "string")


def _measures(trial: FrozenTrial, goals: Sequence[Goal]) -> dict[str, Any]:
    found = {name: value for name, value in trial.user_attrs.get("measures", {}).items() if value is not None}
    if state_of(trial) == TrialState.COMPLETE:
        found = {goal.name: value for goal, value in zip(goals, trial.values, strict=True)} | found
    elif trial.intermediate_values:
        found.setdefault(goals[0].name, trial.intermediate_values[trial.last_step])
    return found


def _value(trial: FrozenTrial, place: int, goals: Sequence[Goal]) -> float:
    if state_of(trial) == TrialState.COMPLETE:
        return trial.values[place]
    # Where the accuracy of a pruned trial stood is known; costs that it did not come to would look like savings.
    known = state_of(trial) == TrialState.PRUNED and goals[place].unit == "%"
    return _measures(trial, goals).get(goals[place].name, np.nan) if known else np.nan


def _scale(name: str, trials: Sequence[FrozenTrial]) -> Scale:
    found = [trial.distributions[name] for trial in trials if name in trial.distributions]
    if isinstance(found[0], CategoricalDistribution):
        choices = [choice for distribution in found for choice in distribution.choices]
        return Scale(name, choices=tuple({(type(choice), choice): choice for choice in choices}.values()))
    values = [trial.params[name] for trial in trials if name in trial.params]  # what is handed in may lie outside
    low, high = min(values + [one.low for one in found]), max(values + [one.high for one in found])
    return Scale(name, low, high, found[0].log)


def _of_config(config: Mapping[str, Any], name: str) -> Any:
    """The value of `cohort`, `method` or `fedclip.lr` in a config's plain fields; ABSENT where there is none."""
    component, _, field = name.rpartition(".")
    if not component:
        value = config.get(name, ABSENT)
        return value.get("name", ABSENT) if isinstance(value, dict) else value
    holders = [value for value in config.values() if isinstance(value, dict) and value.get("name") == component]
    return next((value[field] for value in holders if field in value), ABSENT)


# Sections --------------------------------------------------------------------------------------------------


def _title(seen: _Seen) -> str:
    config = portable(seen.sweep.get("config", {}))
    data = config.get("dataset", {}).get("name", "")
    data += f" ({config['data_dir']})" if config.get("data_dir") else ""
    away = f", {listing(config['held_out'])} held out" if config.get("held_out") else ""
    return f"A search of {_count(len(seen.trials), 'trial')}" + (f" on {data}{away}" if data else "")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _tally(trials: Sequence[FrozenTrial]) -> str:
    """`41 finished, 17 pruned, 2 failed`."""
    states = Counter(KINDS[state_of(trial)] for trial in trials)
    return ", ".join(f"{states[kind]} {kind}" for kind in KINDS.values() if states[kind]) or "none was begun"


def _words(seen: _Seen) -> list[str]:
    sweep, goals = seen.sweep, seen.goals
    aims = " and ".join(f"the {'highest' if goal.highest else 'lowest'} {goal.words}" for goal in goals)
    by = f", proposed by {PROPOSED[sweep['sampler']]}," if sweep.get("sampler") in PROPOSED else ""
    how = f"{_count(len(seen.trials), 'trial')}{by} looked for {aims}: {_tally(seen.trials)}."
    how += _stopping(sweep, len(goals))
    if sweep.get("tuning_seeds"):
        how += f" Every trial was judged on {_seeds('tuning', sweep['tuning_seeds'])}."
    how += " Test rows took no part in the search."
    deals = {*DEALT, *available("partition")}
    if dealt := [scale.name for scale in seen.scales if scale.name.partition(".")[0] in deals]:
        how += f" {listing(dealt)} deal the rows: trials that differ in them were judged on different problems."
    if seen.best is None:
        why = {trial.user_attrs.get("failed") for trial in seen.trials} - {None}
        return [how, "No trial has finished, so there is no best one." + (" Below is why." if why else "")]
    best, row = seen.trials[seen.best], seen.shown.loc[seen.best]
    measures = best.user_attrs.get("measures", {})
    what = "; ".join(goal.told(row[goal.head]) for goal in goals)
    if len(goals) == 1:
        found = f"The best is trial {seen.best}: {what}"
    else:
        front = f"{len(seen.front)} of {(seen.shown.kind == FINISHED).sum()} finished trials"
        found = (
            f"{front} are beaten by no other in every objective. Of these, trial {seen.best} has the "
            f"highest validation accuracy: {what}"
        )
    if measures.get("chosen_round") is not None and measures.get("rounds") is not None:
        found += f" (round {measures['chosen_round']} of {measures['rounds']})"
    if seen.base == seen.best:
        found += ". That is the base configuration itself: the search has found nothing better."
    elif seen.base is not None and not seen.judged_base:
        found += f". The base configuration was trial {seen.base}, {seen.shown.kind[seen.base]}."
    elif seen.base is not None:
        had = "; ".join(goal.told(seen.shown.loc[seen.base, goal.head]) for goal in goals)
        found += f". The base configuration was trial {seen.base}: {had}."
    else:
        found += ". No trial had the base configuration."
    flattered = "The highest of many validations flatters its trial: it was chosen for being high."
    return [how, f"{found} {flattered}" if (seen.shown.kind == FINISHED).sum() > 1 else found]


def _stopping(sweep: Mapping[str, Any], goals: int) -> str:
    pruner = sweep.get("pruner") or ("asha" if goals == 1 else "none")
    words = {
        "asha": "Successive halving (ASHA) stops those that fall behind",
        "median": "Those below the median of earlier ones are stopped",
    }
    if "grace" not in sweep or pruner not in words:
        return ""
    return f" {words[pruner]}, from round {sweep['grace']} on."


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _seeds(kind: str, seeds: Sequence[int]) -> str:
    return f"{kind} seed{'s' if len(seeds) > 1 else ''} {listing(seeds)}"


def _reported(reporting: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """Mean ± sample deviation over the reporting seeds of base and best, and their difference seed by seed."""
    if reporting is None or reporting.empty:
        return {}
    heads = MEASURES | NEW_MEASURES | F1_AND_ECE
    heads["validation"] += " (the rows that the search chose by)"
    kinds = [kind for kind in ("base", "best") if (reporting.which == kind).any()]
    # Where a run of one side has failed, its seed is none of the other's either.
    common = set.intersection(*(set(reporting.seed[reporting.which == kind]) for kind in kinds))
    seeds = sorted(common or set(reporting.seed))
    reporting = reporting[reporting.seed.isin(seeds)]
    by_seed = {kind: reporting[reporting.which == kind].set_index("seed").sort_index() for kind in kinds}
    rows = {}
    for name, words in heads.items():
        if name not in reporting or reporting[name].isna().all():
            continue
        sides = {kind: runs[name] for kind, runs in by_seed.items()}
        rows[words] = {kind: _spread(values) for kind, values in sides.items()}
        if len(sides) == 2:
            gains = (sides["best"] - sides["base"]).dropna()
            mean = difference(sides["base"][gains.index].mean(), sides["best"][gains.index].mean())
            rows[words]["difference"] = spread(mean, gains.std())
    if "bytes" in reporting:
        row = {kind: number(runs["bytes"].mean() / 1e6) for kind, runs in by_seed.items()}
        rows["megabytes up and down, all clients and rounds"] = row | ({"difference": ""} if len(kinds) == 2 else {})
    caption = (
        f"On {_seeds('reporting', seeds)}, which no trial was judged on: accuracy in percent at the round of the best "
        "validation, the difference of the two in percentage points"
        + (", mean ± sample standard deviation over seeds" if len(seeds) > 1 else "")
    )
    return {caption: pd.DataFrame(rows).T.rename_axis("accuracy")}


def _spread(accuracies: pd.Series) -> str:
    return spread(percent(accuracies.mean()), accuracies.std())


def _searched(seen: _Seen) -> dict[str, pd.DataFrame]:
    if not seen.scales:
        return {}
    config = seen.sweep.get("config", {})
    rows = {}
    for scale in seen.scales:
        base = _of_config(config, scale.name)
        row = {"values": _range(scale), "trials": str(sum(scale.name in trial.params for trial in seen.trials))}
        if config:
            row["base"] = "-" if base is ABSENT else setting(base)
        if seen.best is not None:
            params = seen.trials[seen.best].params
            row["best trial"] = setting(params[scale.name]) if scale.name in params else "-"
        rows[scale.name] = row
    caption = "What was searched; some belong to one choice only, and other trials lack them"
    if seen.places.loc[[bool(trial.params) for trial in seen.trials]].notna().all(axis=None):
        caption = "What was searched"
    return {caption: pd.DataFrame(rows).T.rename_axis("parameter")}


def _range(scale: Scale) -> str:
    if scale.choices:
        return listing(map(setting, scale.choices))
    return f"{setting(scale.low)} to {setting(scale.high)}" + (", logarithmic" if scale.log else "")


def _history(seen: _Seen) -> Section:
    highest = {goal.head: goal.highest for goal in seen.goals}
    base = {name: seen.shown.loc[seen.base, name] for name in highest} if seen.judged_base else {}
    caption = "Every trial in the order in which they were begun." + (
        " Dashed: the base configuration." if base else ""
    )
    plots = [plot_history(caption, seen.shown, highest, base)]
    if len(seen.goals) > 1 and seen.front:
        plots.append(_front(seen))
    first = seen.goals[0]
    curves = {
        trial.number: (KINDS[state_of(trial)], first.factor * pd.Series(trial.intermediate_values).sort_index())
        for trial in seen.trials
        if trial.intermediate_values and KINDS[state_of(trial)] in (FINISHED, PRUNED, FAILED)
    }
    if curves:
        best = list(curves).index(seen.best) if seen.best in curves else None
        caption = f"{_capital(first.words)} so far, by round: what a trial is pruned by. Dots: where a trial ended."
        plots.append(plot_learning(caption, first.head, list(curves.values()), best))
    return Section("How the search went", plots=plots)


def _front(seen: _Seen) -> Plot:
    heads = [goal.head for goal in seen.goals]
    # Costs lie below, accuracies beside.
    pairs = [(second, first) for first, second in combinations(heads, 2)]
    caption = "Numbers are those of trials on the front." if len(pairs) == 1 and len(seen.front) <= 15 else ""
    caption = f"The Pareto front: trials that no other beats in every objective. {caption}".strip()
    return plot_front(
        caption,
        seen.shown,
        pairs,
        {goal.head: goal.highest for goal in seen.goals},
        seen.front,
        seen.base if seen.judged_base else None,
    )


def importances(study: optuna.Study) -> tuple[dict[str, dict[str, float]], int]:
    """By objective, the share of each parameter in what tells the top trials from the others; and how many these are.

    Source: PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255, as Optuna has it. An objective under which no parameter
    tells them apart, as when all trials are alike, is left out; so are all with fewer than `LEAST` finished trials.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    top = max(TOP, -(-len(finished) // 10))
    top = min(top, len(finished) // 2)
    found: dict[str, dict[str, float]] = {}
    if len(finished) < LEAST:
        return found, top
    names = _params(finished)
    for place, goal in enumerate(goals_of(study)):
        sign = -1 if goal.highest else 1
        with warnings.catch_warnings():
            # Optuna warns of every target that low is taken for good, which the sign has seen to, of few trials, which
            # the page says, and that shares before they sum up to 1 are experimental.
            warnings.simplefilter("ignore")
            shares = get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=top / len(finished)),
                target=lambda trial, place=place, sign=sign: sign * trial.values[place],
                normalize=False,
            )
        whole = sum(shares.values())
        if whole > 0:
            found[goal.words] = {name: shares[name] / whole for name in names if name in shares}
    return found, top


def _mattered(seen: _Seen) -> Section:
    shares, top = seen.shares, seen.top
    done = int((seen.shown.kind == FINISHED).sum())
    if not shares:
        few = f"only {_count(done, 'trial')} finished" if done < LEAST else "the finished trials are too much alike"
        return Section("What mattered", [f"Nothing can be said of what mattered: {few}."])
    first = next(iter(shares.values()))
    order = sorted(first, key=lambda name: -sum(share[name] for share in shares.values()))
    caption = (
        f"Importance (PED-ANOVA): how much a parameter tells the best {top} of {done} finished trials from the others"
        + ("; those that were pruned are not counted" if (seen.shown.kind == PRUNED).any() else "")
        + ("; an estimate from few trials." if done < 30 else ".")
    )
    return Section(
        "What mattered",
        plots=[
            plot_importance(caption, {goal: {name: share[name] for name in order} for goal, share in shares.items()})
        ],
    )


def _order(seen: _Seen) -> list[Scale]:
    """Scales, the important ones first; constant ones not at all."""
    weight = {scale.name: sum(share.get(scale.name, 0) for share in seen.shares.values()) for scale in seen.scales}
    varied = [scale for scale in seen.scales if len(scale.choices) > 1 or scale.low < scale.high]
    return sorted(varied, key=lambda scale: -weight[scale.name])


def _values(seen: _Seen) -> Section:
    scales, plots = _order(seen), []
    most = 8 if len(seen.goals) == 1 else 4
    for goal in seen.goals:
        if scales and seen.shown[goal.head].notna().sum() > 1:
            cut = f" The {most} most important of {len(scales)} parameters." if len(scales) > most else ""
            words = f"{_capital(goal.words)} by the value of each parameter.{cut}"
            plots.append(plot_slices(words, goal.head, scales[:most], seen.places, seen.shown, seen.best))
    done = seen.shown.index[seen.shown.drop(columns="kind").notna().all(axis=1)]
    if scales and len(done) > 1:
        plots.append(_parallel(seen, scales, done))
    return Section("Where the good values lie", plots=plots)


def _parallel(seen: _Seen, scales: list[Scale], done: pd.Index) -> Plot:
    """Axes in the order of the search: a choice stands before what it opens."""
    room = AXES - len(seen.goals)
    kept = {scale.name for scale in scales[:room]}
    axes = [scale for scale in seen.scales if scale.name in kept]
    drawn = seen.good(done)[-MANY:]
    if seen.best is not None and seen.best not in drawn:
        drawn = drawn.insert(0, seen.best)
    places = seen.places.loc[drawn, [scale.name for scale in axes]]
    ends = []
    for goal in seen.goals:
        values = seen.shown.loc[places.index, goal.head]
        ends.append(Scale(goal.head, values.min(), values.max()))
        places[goal.head] = [ends[-1].place(value) for value in values]
    kinds = seen.shown.kind.loc[places.index]
    some = f"one of the best {MANY} trials of {len(done)}" if len(done) > MANY else "a trial"
    words = [f"Each line is {some}: the darker, the better its {seen.goals[0].words}; the best is thick."]
    if (kinds == PRUNED).any():
        words.append("Grey: pruned, where it stood.")
    if places.isna().any(axis=None):
        words.append("Where a trial has no use for a parameter, its line passes below the axis.")
    if len(scales) > room:
        words.append(f"The {room} most important of {len(scales)} parameters.")
    return plot_parallel(" ".join(words), [*axes, *ends], places, kinds, seen.best)


def _all_trials(seen: _Seen) -> Section:
    table = trial_table(seen.study).set_index("number")
    goals = {goal.name: goal for goal in seen.goals}
    rank = {kind: place for place, kind in enumerate(KINDS.values())}
    first = seen.goals[0]
    by = seen.shown.assign(rank=seen.shown.kind.map(rank), front=~seen.shown.index.isin(seen.front))
    by["value"] = by[first.head] * (-1 if first.highest else 1)
    keys = ["rank", "front", "value"] if len(seen.goals) > 1 else ["rank", "value"]
    order = by.sort_values(keys, kind="stable").index[:LONGEST]
    cells = {"": seen.shown.loc[order, "kind"]}
    if len(seen.goals) > 1:
        cells[""] = cells[""].where(~order.isin(seen.front), "on the front")
    for goal in seen.goals:
        values = table[goal.name] if goal.name in MEASURED else seen.shown[goal.head] / goal.factor
        cells[goal.head] = [_cell(goal, value) for value in values.loc[order]]
    for name in [column for column in table if column not in (*MEASURED, *FIRST, *LAST)]:
        cells[name] = ["" if pd.isna(value) else setting(_plain(value)) for value in table.loc[order, name]]
    for name in [name for name in GOALS if name not in goals and table[name].notna().any()]:
        goal = Goal(name, *GOALS[name], True)
        cells[goal.head] = [_cell(goal, value) for value in table.loc[order, name]]
    cells["rounds"] = ["" if pd.isna(value) else str(value) for value in table.loc[order, "rounds"]]
    cells["seconds"] = ["" if pd.isna(value) else number(value) for value in table.loc[order, "seconds"]]
    shown = pd.DataFrame(cells, index=order).rename_axis("trial")
    cut = f"{len(shown)} of {len(table)} trials" if len(shown) < len(table) else "All trials"
    tables = {f"{cut}, the best first": shown}
    failed = (
        table.loc[table.failed.notna(), ["failed"]].rename(columns={"failed": "why it failed"}).rename_axis("trial")
    )
    if len(failed):
        tables = {f"Failed trials, {len(failed)} in all": failed[:LONGEST]} | tables
    return Section("All trials", tables=tables)


def _cell(goal: Goal, value: Any) -> str:
    return "" if pd.isna(value) else goal.cell(goal.factor * value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _facts(seen: _Seen, about: Mapping[str, Any]) -> Section:
    fields = {name: value for name, value in portable(seen.sweep).items() if name not in ("config", *EXECUTION)}
    facts = {name.replace("_", " "): _word(value) for name, value in fields.items()}
    seconds = [trial.user_attrs["seconds"] for trial in seen.trials if trial.user_attrs.get("seconds") is not None]
    if seconds:
        facts["hours of all trials together"] = number(sum(seconds) / 3600)
    if again := sum((trial.user_attrs.get("attempts") or 1) > 1 for trial in seen.trials):
        facts["trials that were begun more than once"] = str(again)
    rest = {name: value for name, value in portable(dict(about)).items() if name not in ("best", "versions")}
    facts |= {name.replace("_", " "): _word(value) for name, value in rest.items()}
    tables = {"The search": pd.DataFrame({"value": pd.Series(facts, dtype=object)})} if facts else {}
    if versions := about.get("versions"):
        tables["Versions"] = pd.DataFrame({"version": pd.Series(dict(versions), dtype=object)})
    return Section("What was run", tables=tables)


def _yaml(config: Mapping[str, Any]) -> str:
    return to_yaml(portable({name: value for name, value in config.items() if name not in EXECUTION}))


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_word(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        words = [setting(one) for one in value]
        return ("; " if any("," in word for word in words) else ", ").join(words) or "none"
    return setting(value)
