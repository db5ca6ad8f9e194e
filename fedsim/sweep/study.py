"""The Optuna study in a sweep's folder: proposes trials, stores their results and prunes them. Does not know Ray.

All of its state is in `study.db`, so an interrupted sweep resumes by opening it again.
"""

import logging
import sqlite3
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.trial import TrialState

from fedsim.errors import InputError
from fedsim.rng import seed_for

FILE, NAME = "study.db", "sweep"
# Accuracies on validation rows, and costs; with the direction of the search.
OBJECTIVES: dict[str, Any] = {
    "validation": "maximize",
    "worst_tenth": "maximize",
    "bytes": "minimize",
    "clock_s": "minimize",
    "flops": "minimize",
}
Sampler = Literal["tpe", "random", "nsga2"]
Pruner = Literal["asha", "median", "none"]
SAMPLERS, PRUNERS = get_args(Sampler), get_args(Pruner)
POPULATION = 20  # of NSGA-II: with Optuna's 50, most of a sweep of 60 trials would be random
ENDED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


@dataclass(frozen=True)
class Rules:
    """How a study proposes and prunes trials.

    Attributes:
        objectives: names in `OBJECTIVES`; trials are pruned only when there is one.
        sampler: one of `SAMPLERS`.
        pruner: one of `PRUNERS`.
        grace: rounds before a trial may be pruned.
        reduction: asha continues one trial in this many at each rung.
        seed: of the sampler.
    """

    objectives: tuple[str, ...] = ("validation",)
    sampler: str = "tpe"
    pruner: str = "asha"
    grace: int = 5
    reduction: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Proposal:
    """A trial to run: its number, and the fields merged into the base config."""

    number: int
    fields: dict[str, Any]


class Study:
    """The study in a folder; created if missing.

    Only one process may use it at a time.

    Attributes:
        optuna: the study itself, for tables and pages.
        live: trials that have been proposed and have not ended.

    Raises:
        InputError: `study.db` is damaged.
    """

    def __init__(self, folder: Path, rules: Rules) -> None:
        _silence_optuna()
        self.rules = rules
        file = (folder / FILE).absolute()
        _check_intact(file)
        # Not a URL: ? and # in the path would be read as parts of it.
        connect = {"creator": lambda: sqlite3.connect(file, timeout=60, check_same_thread=False)}
        storage = optuna.storages.RDBStorage("sqlite:///", engine_kwargs=connect)
        directions = [OBJECTIVES[name] for name in rules.objectives]
        self.optuna = optuna.create_study(
            storage=storage, study_name=NAME, directions=directions, pruner=_pruner(rules), load_if_exists=True
        )
        running = self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        self.unfinished = [trial.number for trial in running]
        self.live: dict[int, optuna.trial.Trial] = {}
        self._reported_rounds: dict[int, set[int]] = {}  # of live trials
        self._prune_at: dict[
            int, int
        ] = {}  # trials killed between the verdict that prunes them and their end: its round

    def describe(self, settings: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
        """Stores what is searched, and in an empty study enqueues the first trial.

        Args:
            settings: of the sweep, as `Sweep.plain` returns them.
            first: parameters of the first trial, by Optuna's names.
        """
        self.optuna.set_user_attr("objectives", list(self.rules.objectives))
        self.optuna.set_user_attr("sweep", dict(settings))
        if first is not None and not self.optuna.get_trials(deepcopy=False):
            self.optuna.enqueue_trial(dict(first))

    def ended(self) -> int:
        """Number of trials that have finished, failed or been pruned."""
        return len(self.optuna.get_trials(deepcopy=False, states=ENDED))

    def ask(self, suggest: Callable[[optuna.trial.Trial], dict[str, Any]]) -> Proposal:
        """The next trial: unfinished ones first, then new ones.

        Args:
            suggest: draws a trial's parameters, and returns the fields that they stand for.
        """
        if self.unfinished:
            number = self.unfinished.pop(0)
            self.optuna.sampler = _sampler(self.rules, number)
            stored = self.optuna.get_trials(deepcopy=False)[number]
            trial, reported = optuna.trial.Trial(self.optuna, stored._trial_id), set(stored.intermediate_values)
            if self._was_to_be_pruned(stored):
                self._prune_at[number] = max(reported)
        else:
            # A new sampler per trial: what is proposed depends on the trials before, not on this process.
            self.optuna.sampler = _sampler(self.rules, self._next_number())
            trial, reported = self.optuna.ask(), set()
        fields = trial.user_attrs.get("fields")
        if fields is None:
            fields = suggest(trial)
            trial.set_user_attr("fields", fields)
        self.live[trial.number], self._reported_rounds[trial.number] = trial, reported
        return Proposal(trial.number, fields)

    def report(self, number: int, round: int, measures: Mapping[str, float], **attributes: Any) -> bool:
        """Stores what a trial has reached after some rounds; returns whether it is pruned, and has thereby ended.

        Args:
            measures: at least the objectives.
            attributes: stored with the trial when it ends.
        """
        trial = self.live[number]
        if len(self.rules.objectives) != 1:  # Optuna cannot prune by several
            return False
        if round not in self._reported_rounds[number]:
            self._reported_rounds[number].add(round)
            trial.report(float(measures[self.rules.objectives[0]]), round)
            if not trial.should_prune():
                return False
        elif self._prune_at.get(number) != round:  # reported and decided before the trial or the sweep was killed
            return False
        self._end(number, TrialState.PRUNED, None, measures=dict(measures), **attributes)
        return True

    def finish(self, number: int, round: int, measures: Mapping[str, float], **attributes: Any) -> None:
        """Stores the result of a trial after its last round; the arguments are those of `report`."""
        values = [float(measures[name]) for name in self.rules.objectives]
        if len(values) == 1:
            self.live[number].report(values[0], round)
        self._end(number, TrialState.COMPLETE, values, measures=dict(measures), **attributes)

    def fail(self, number: int, sentence: str, invalid: bool, **attributes: Any) -> None:
        """Stores why a trial cannot be completed.

        Args:
            invalid: whether its parameters are the cause, not its process. Optuna's samplers ignore failed trials and
                would keep proposing parameters with which training diverges, so with one objective an invalid trial
                is stored as pruned, with the worst possible value.
        """
        pruned = invalid and len(self.rules.objectives) == 1
        state = TrialState.PRUNED if pruned else TrialState.FAIL
        self._end(number, state, None, failed=sentence, **attributes)

    def best(self) -> optuna.trial.FrozenTrial | None:
        """The best finished trial so far by the first objective."""
        better = max if OBJECTIVES[self.rules.objectives[0]] == "maximize" else min
        finished = self.optuna.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return better(finished, key=lambda trial: trial.values[0], default=None)

    def _was_to_be_pruned(self, stored: optuna.trial.FrozenTrial) -> bool:
        """Whether a trial was killed after the report that prunes it and before its end."""
        rounds = sorted(stored.intermediate_values)
        if not rounds or len(self.rules.objectives) > 1:
            return False
        trial = deepcopy(stored)
        rung = sum(name.startswith("completed_rung_") for name in trial.system_attrs) - 1
        # The pruner stores that it has decided at a rung, but not what; if the last report decided it, ask again.
        if rung >= 0 and all(round < self.rules.grace * self.rules.reduction**rung for round in rounds[:-1]):
            del trial.system_attrs[f"completed_rung_{rung}"]
        return self.optuna.pruner.prune(self.optuna, trial)

    def _next_number(self) -> int:
        """The number of the trial that Optuna will propose next."""
        waiting = self.optuna.get_trials(deepcopy=False, states=[TrialState.WAITING])
        return waiting[0].number if waiting else len(self.optuna.get_trials(deepcopy=False))

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None, **attributes: Any) -> None:
        trial = self.live.pop(number)
        self._reported_rounds.pop(number)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self.optuna.tell(trial, values, state=state)


def _check_intact(file: Path) -> None:
    """Raises InputError when SQLite finds its file damaged; it has no checksums of values."""
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(file)) as database:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.DatabaseError as error:
        verdict = error
    if verdict != "ok":
        cause = " ".join(str(verdict).split())
        raise InputError(f"{file} is damaged ({cause}); delete {file.parent} to start again, or give another --out")


def _sampler(rules: Rules, number: int) -> optuna.samplers.BaseSampler:
    seed = seed_for(rules.seed, "sampler", number) % 2**32
    if rules.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if rules.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    # group: the parameters of one method are modelled together, although other methods lack them.
    # constant_liar: running trials count as bad ones, so that parallel trials differ.
    return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def _pruner(rules: Rules) -> optuna.pruners.BasePruner:
    if rules.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=rules.grace, reduction_factor=rules.reduction)
    if rules.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=rules.grace)
    return optuna.pruners.NopPruner()


def _silence_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
