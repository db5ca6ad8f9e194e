"""Attacks: what malicious clients do to their train rows, to their updates, or to all their updates together.

Malicious clients train, and an attack changes some of their rows before that (`aims`, `trigger`), or the update that a
client sends (`forge`), or those of all malicious clients in a round once the others' are known, too (`collude`). They
answer a survey honestly, and say truly how many rows they have. They are not evaluated: reports are of the others.

An update that is not finite ends the run as diverged, from any client and under every rule. A server would discard it,
so no attack here sends one, unless its scale is beyond the range of the numbers.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError, listing
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field
from fedsim.shares import part


@component
class Attack:
    """An attack and its hyperparameters. Subclasses are components; their methods do not modify their arguments."""

    share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of the training clients that are malicious, drawn by the seed; their number is rounded down",
    )

    def check(self, classes: Sequence[str], trained: np.ndarray) -> None:
        """Checks the classes before anything starts; arguments as of `aims`.

        Raises:
            InputError: a class that the attack names does not exist or is not trained on.
        """

    def aims(self, y: np.ndarray, classes: Sequence[str], trained: np.ndarray) -> np.ndarray:
        """(n,) int64, the class as which each row is to be predicted; -1 for rows that are not attacked.

        Args:
            y: (n,) their true classes.
            classes: names of the C classes.
            trained: (C,) bool, the classes that clients train on.
        """
        return np.full(len(y), -1)

    @property
    def targeted(self) -> bool:
        """Whether rows are to be predicted as other classes. Reports then have a success rate."""
        return type(self).aims is not Attack.aims

    @property
    def triggers(self) -> bool:
        """Whether attacked rows look different."""
        return type(self).trigger is not Attack.trigger

    @property
    def colludes(self) -> bool:
        """Whether updates are replaced where those of all clients of a round are known. Each is then stored."""
        return type(self).collude is not Attack.collude

    @property
    def forges(self) -> bool:
        """Whether malicious clients send other updates than those that they have trained."""
        return type(self).forge is not Attack.forge

    @property
    def poisoned(self) -> float:
        """The share of the rows to attack which malicious clients train on as attacked."""
        return 0.0

    def trigger(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Attacked rows as they are shown to a model, in training and in tests.

        Args:
            x: (n, ...) what the method reads of them; of pixels, bytes.
            rng: on the CPU, keyed by the seed alone: each call draws the same.
        """
        return x

    def forge(self, update: Tensor, rng: torch.Generator) -> Tensor:
        """(P,) what a malicious client sends for its update.

        Args:
            update: (P,) trained minus received parameters; zeros if it took no step.
            rng: on the CPU, keyed by seed, round and client.
        """
        return update

    def collude(self, deltas: np.ndarray, malicious: np.ndarray) -> np.ndarray:
        """(m, P) what the m malicious clients of a round send, float64; called for a block of parameters at a time.

        Args:
            deltas: (n, P) float64, of all clients that took a step; those of malicious clients as they trained them.
            malicious: (n,) bool, with at least one.
        """
        return deltas[malicious]

    def malicious(self, population: int, seed: int) -> frozenset[int]:
        """Ids of the malicious clients among all training clients."""
        return _drawn(population, part(population, self.share), seed)


@component
class Poisoning(Attack):
    """An attack on the train rows of malicious clients."""

    poison: float = Field(1.0, gt=0, le=1, description="share of a client's rows to attack that it does attack")

    @property
    def poisoned(self) -> float:
        return self.poison


def class_index(name: str, field: str, classes: Sequence[str], trained: np.ndarray) -> int:
    """The index of a trained class.

    Raises:
        InputError: it is none.
    """
    names = [each for each, known in zip(classes, trained, strict=True) if known]
    if name not in names:
        raise InputError(
            f"attack.{field} must be a class that clients train on, got {name!r}; available: {listing(names, 40)}"
        )
    return list(classes).index(name)


@lru_cache(maxsize=4)
def _drawn(population: int, count: int, seed: int) -> frozenset[int]:
    return frozenset(numpy_rng(seed, "malicious").choice(population, count, replace=False).tolist() if count else ())
