"""How much privacy is left after each round. It follows from the schedule alone, so it is known before training."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import numpy as np

from fedsim.config import Config
from fedsim.fleets import Fleet
from fedsim.formats import setting
from fedsim.params import Params
from fedsim.privacy import Noised, Privacy
from fedsim.registry import name_of
from fedsim.schedule import PlannedRound
from fedsim.training.task import Task


class Ledger:
    """Counts what a mechanism has released.

    Attributes:
        accounting: what a release is; None without privacy.
    """

    def __init__(self, config: Config, task: Task, params: Params, population: int, planned: Iterable[PlannedRound]):
        """
        Args:
            task: with the privacy to account for, whose noise may still have to be solved.
            params: all tensors of round 0.
            population: clients that train.
            planned: the rounds of the run, from the first on.
        """
        uniform = _draws_alike(config.fleet) and not task.has_private_state(params)
        cohort = config.cohort or population
        self.privacy, self.rounds = task.privacy, config.rounds
        self.accounting = task.privacy.accounting(task.method, cohort, population, uniform)
        self._planned, self._done = iter(planned), 0
        self._counts = np.zeros(population, np.int64)

    def releases(self, round: int) -> int:
        """How often something of one client has been released after this round; of that with the most."""
        assert self.accounting is not None
        if self.accounting.sampling != "none":
            return round * self.accounting.per_round
        for planned in islice(self._planned, round - self._done):
            self._counts[[client for client, _ in planned.trained]] += 1
        self._done = max(self._done, round)
        return int(self._counts.max()) * self.accounting.per_round

    def epsilon(self, round: int) -> float:
        """Epsilon after this round, which is not before that of the last call; nan without privacy."""
        if self.accounting is None or not isinstance(self.privacy, Noised):
            return float("nan")
        return self.accounting.epsilon(self.privacy.multiplier, self.privacy.delta, self.releases(round))

    @property
    def words(self) -> str:
        """What epsilon is about, for reports; empty without privacy."""
        if self.accounting is None or not isinstance(privacy := self.privacy, Noised):
            return ""
        clip = "no limit" if privacy.clip is None else f"norms up to {setting(privacy.clip)}"
        return (
            f"{name_of(privacy)}: {clip}, noise multiplier {setting(privacy.multiplier)}, "
            f"delta {setting(privacy.delta)}; {self.accounting.words}"
        )

    def solved(self) -> Privacy:
        """The mechanism with the noise that its epsilon needs.

        Raises:
            InputError: there is none.
        """
        privacy = self.privacy
        if self.accounting is None or not isinstance(privacy, Noised) or privacy.epsilon is None:
            return privacy
        noise = self.accounting.noise(privacy.epsilon, privacy.delta, self.releases(self.rounds))
        return replace(privacy, noise=noise, epsilon=None)


def _draws_alike(fleet: Fleet) -> bool:
    """Whether every client takes part in a round with the same probability."""
    return fleet.instantaneous and all(
        getattr(type(fleet), name) is getattr(Fleet, name) for name in ("available", "outcomes")
    )
