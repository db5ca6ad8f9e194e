"""What a sweep remembers and decides: an Optuna study in its folder, asked for trials and told of them.

Knows nothing of Ray. All of its state is in `study.db`, so a sweep that was killed goes on by opening it again.
"""

import logging
import sqlite3
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from fedsim.errors import InputError
from fedsim.rng import seed_for

FILE, NAME = "study.db", "sweep"
# Of validation rows, or of costs, and which way is better.
OBJECTIVES = {
    "validation": "maximize",
    "worst_tenth": "maximize",
    "bytes": "minimize",
    "clock_s": "minimize",
    "flops": "minimize",
}
SAMPLERS, PRUNERS = ("tpe", "random", "nsga2"), ("asha", "median", "none")
POPULATION = 20  # of NSGA-II: Optuna's 50 would leave a sweep of 60 trials to chance
ENDED = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


@dataclass(frozen=True)
class Rules:
    """How a study chooses and prunes.

    Attributes:
        objectives: names of `OBJECTIVES`; the first is the one that trials are pruned by, where it is the only one.
        sampler: of `SAMPLERS`.
        pruner: of `PRUNERS`.
        grace: rounds before anything is pruned.
        reduction: of asha: one of so many trials goes on from each rung.
        seed: the sampler's.
    """

    objectives: tuple[str, ...] = ("validation",)
    sampler: str = "tpe"
    pruner: str = "asha"
    grace: int = 5
    reduction: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """A trial that is to be run: its number, and the fields laid over the base config."""

    number: int
    fields: dict[str, Any]


class Study:
    """The study in a folder, made where there is none.

    One process has it at a time; trials side by side are that process's business.

    Attributes:
        optuna: the study itself, for tables and pages.
    """

    def __init__(self, folder: Path, rules: Rules) -> None:
        _quiet()
        self.rules = rules
        file = (folder / FILE).absolute()
        _check_intact(file)
        # By a connection of our own, since a URL would read the ? and # of a path as its own.
        connect = {"creator": lambda: sqlite3.connect(file, timeout=60, check_same_thread=False)}
        storage = optuna.storages.RDBStorage("sqlite:///", engine_kwargs=connect)
        directions = [OBJECTIVES[name] for name in rules.objectives]
        self.optuna = optuna.create_study(
            storage=storage, study_name=NAME, directions=directions, pruner=_pruner(rules), load_if_exists=True
        )
        running = self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        self.unfinished = [trial.number for trial in running]
        self.live: dict[int, optuna.trial.Trial] = {}
        self.told: dict[int, set[int]] = {}  # rounds of live trials
        self.behind: dict[int, int] = {}  # of those that were to be pruned when they were killed, the round

    def describe(self, about: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
        """Says what is searched, and in an empty study what is to be tried first: parameters by Optuna's names."""
        self.optuna.set_user_attr("objectives", list(self.rules.objectives))
        self.optuna.set_user_attr("sweep", dict(about))
        if first is not None and not self.optuna.get_trials(deepcopy=False):
            self.optuna.enqueue_trial(dict(first))

    def ended(self) -> int:
        """How many trials have come to an end, good or bad."""
        return len(self.optuna.get_trials(deepcopy=False, states=ENDED))

    def ask(self, suggest: Callable[[optuna.trial.Trial], dict[str, Any]]) -> Asked:
        """The next trial: first those that were left unfinished, then new ones.

        Args:
            suggest: draws a trial's parameters, and returns the fields that they stand for.
        """
        if self.unfinished:
            number = self.unfinished.pop(0)
            self.optuna.sampler = _sampler(self.rules, number)
            there = self.optuna.get_trials(deepcopy=False)[number]
            trial, told = optuna.trial.Trial(self.optuna, there._trial_id), set(there.intermediate_values)
            if self._was_to_be_pruned(there):
                self.behind[number] = max(told)
        else:
            # Made anew for each trial, so that what is asked follows from the trials before and not from this process.
            self.optuna.sampler = _sampler(self.rules, self._next())
            trial, told = self.optuna.ask(), set()
        fields = trial.user_attrs.get("fields")
        if fields is None:
            fields = suggest(trial)
            trial.set_user_attr("fields", fields)
        self.live[trial.number], self.told[trial.number] = trial, told
        return Asked(trial.number, fields)

    def report(self, number: int, round: int, measures: Mapping[str, float], **about: Any) -> bool:
        """Notes what a trial has come to by some round; True where it is pruned, and has thereby ended.

        Args:
            measures: at least the objectives.
            about: what else is to be remembered of the trial, once it ends.
        """
        trial = self.live[number]
        if len(self.rules.objectives) > 1:  # Optuna has no word for what is better
            return False
        if round not in self.told[number]:
            self.told[number].add(round)
            trial.report(float(measures[self.rules.objectives[0]]), round)
            if not trial.should_prune():
                return False
        elif self.behind.get(number) != round:  # told and decided before the trial, or the sweep, was killed
            return False
        self._end(number, TrialState.PRUNED, None, measures=dict(measures), **about)
        return True

    def finish(self, number: int, round: int, measures: Mapping[str, float], **about: Any) -> None:
        """Notes what a trial has come to by its last round; the arguments are those of `report`."""
        values = [float(measures[name]) for name in self.rules.objectives]
        if len(values) == 1:
            self.live[number].report(*values, round)
        self._end(number, TrialState.COMPLETE, values, measures=dict(measures), **about)

    def fail(self, number: int, reason: str, at_fault: bool, **about: Any) -> None:
        """Notes that a trial cannot be done, and why, in one sentence.

        Args:
            at_fault: by its parameters, and not by what became of its process. Optuna learns nothing from a trial that
                has failed, and would be drawn to where training diverges: so this one is pruned, as bad as can be. Of
                several objectives Optuna prunes nothing.
        """
        taught = at_fault and len(self.rules.objectives) == 1
        self._end(number, TrialState.PRUNED if taught else TrialState.FAIL, None, failed=reason, **about)

    def best(self) -> optuna.trial.FrozenTrial | None:
        """The best so far: the first objective decides."""
        up = OBJECTIVES[self.rules.objectives[0]] == "maximize"
        done = self.optuna.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return (max if up else min)(done, key=lambda trial: trial.values[0], default=None)

    def _was_to_be_pruned(self, there: optuna.trial.FrozenTrial) -> bool:
        """Whether a trial was killed between the last round that it told of and its end."""
        rounds = sorted(there.intermediate_values)
        if not rounds or len(self.rules.objectives) > 1:
            return False
        asked = deepcopy(there)
        rung = sum(name.startswith("completed_rung_") for name in there.system_attrs) - 1
        # The pruner remembers of a rung that it has decided, and not what; so of the last round's it is asked again.
        if rung >= 0 and all(told < self.rules.grace * self.rules.reduction**rung for told in rounds[:-1]):
            del asked.system_attrs[f"completed_rung_{rung}"]
        return self.optuna.pruner.prune(self.optuna, asked)

    def _next(self) -> int:
        """The number of the trial that Optuna gives when it is asked."""
        waiting = self.optuna.get_trials(deepcopy=False, states=[TrialState.WAITING])
        return waiting[0].number if waiting else len(self.optuna.get_trials(deepcopy=False))

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None, **attributes: Any) -> None:
        trial = self.live.pop(number)
        self.told.pop(number)
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self.optuna.tell(trial, values, state=state)


def _check_intact(file: Path) -> None:
    """Raises InputError where SQLite finds its file damaged; it has no checksum of values."""
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(file)) as database:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.DatabaseError as error:
        verdict = error
    if verdict != "ok":
        why = " ".join(str(verdict).split())
        raise InputError(f"{file} is damaged ({why}); delete {file.parent} to start again, or give another --out")


def _sampler(rules: Rules, number: int) -> optuna.samplers.BaseSampler:
    seed = seed_for(rules.seed, "sampler", number) % 2**32
    if rules.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if rules.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    # In groups, so that parameters of one method are learnt together though other methods have not got them; and with
    # the running trials taken for bad ones, so that trials side by side are not all the same.
    return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def _pruner(rules: Rules) -> optuna.pruners.BasePruner:
    if rules.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=rules.grace, reduction_factor=rules.reduction)
    if rules.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=rules.grace)
    return optuna.pruners.NopPruner()


def _quiet() -> None:
    """What Optuna says is for its own users."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
