"""Differential privacy: what of a client is clipped, where noise is added, and what that guarantees (epsilon, delta).

The noise of a simulation is pseudo-random: it follows from the seed, and so does who trains in a round. Epsilon is that
of a deployment of the same mechanism with secret, truly random numbers. It is about the shared parameters of all
rounds. Accuracies and losses, which a simulation computes from the clients' rows, are not covered; nor is the choice of
a round or of a run of a sweep by them, which clients exist, or how many rows they have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError
from fedsim.methods import Method
from fedsim.params import Params
from fedsim.privacy._accounting import Accounting
from fedsim.registry import component, name_of
from fedsim.search_space import Field, Log
from fedsim.servers import ClientUpdate, Reply, Server
from fedsim.updates import RoundSum


@component
class Privacy(ABC):
    """A mechanism and its hyperparameters. Subclasses are components; their methods do not modify their arguments."""

    # Whom: "clients" or "rows"; empty without privacy.
    protects: ClassVar[str] = ""
    # Whether `protect` changes a client's update before it is encoded.
    protects_updates: ClassVar[bool] = False

    def check(self, method: Method, server: Server, params: Params) -> None:  # noqa: B027 - without privacy, anything goes
        """Checks that the mechanism guarantees something with this method and rule.

        Args:
            method: as the rule has it trained.
            params: the shared tensors at round 0.

        Raises:
            InputError: it does not.
        """

    def init(self) -> Params:
        """What the server remembers for the mechanism before round 1, with the names and shapes of later rounds."""
        return {}

    def bound(self, memory: Params) -> float:
        """The largest norm of a client's delta in the sum of the next round; longer ones are scaled to it."""
        return inf

    def protect(self, update: Tensor, rng: torch.Generator) -> Tensor:
        """(P,) what a client sends in place of its update, (P,), of the same dtype and device.

        Args:
            rng: on the CPU, keyed by seed, round and client.
        """
        return update

    def release(
        self, total: RoundSum, memory: Params, cohort: int, rng: np.random.Generator
    ) -> tuple[RoundSum, Params]:
        """The sum of a round as the rule gets it, and what the server remembers.

        Args:
            total: the sum of clipped deltas; the weight of a client is the factor by which its delta was scaled.
            cohort: clients in a round, or their expected number.
            rng: keyed by seed and round.
        """
        return total, memory

    @property
    def poisson(self) -> bool:
        """Whether each client takes part in a round by itself, with the probability cohort / population."""
        return False

    @property
    def solves(self) -> bool:
        """Whether the noise follows from epsilon and the number of rounds."""
        return False

    @abstractmethod
    def accounting(self, method: Method, cohort: int, population: int, uniform: bool) -> Accounting | None:
        """How what is released is accounted for; None without privacy.

        Args:
            method: as the rule has it trained.
            cohort, population: clients in a round, and in all.
            uniform: every cohort is a uniform draw from all clients, independent of all before.
        """


@component
class Noised(Privacy):
    """A mechanism that clips to a norm and adds Gaussian noise, for which `noise` or `epsilon` is given."""

    clip: float | None = Field(
        1.0, gt=0, search=Log(1e-2, 10.0), description="largest norm, of all tensors together; none with noise 0 only"
    )
    noise: float | None = Field(
        None, ge=0, le=1e6, description="noise multiplier: standard deviation / clip (default: solved from epsilon)"
    )
    epsilon: float | None = Field(
        None, gt=0, description="of the last round, for which the noise is solved; give this or noise"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="probability that is left out; well below 1 / clients or rows")

    @property
    def solves(self) -> bool:
        return self.epsilon is not None

    def check(self, method: Method, server: Server, params: Params) -> None:
        name = name_of(self)
        if (self.noise is None) == (self.epsilon is None):
            given = "neither" if self.noise is None else "both"
            raise InputError(
                f"privacy {name} needs --privacy.epsilon, for which the noise is solved, or --privacy.noise; {given} "
                "given"
            )
        if self.clip is None and self.noise != 0:
            raise InputError(f"privacy {name} adds noise in proportion to --privacy.clip, and there is none; give one")
        if not params:
            raise InputError(f"privacy {name} protects shared tensors, and {name_of(method)} has none to send")
        if server.root_rows:
            raise InputError(
                f"server {name_of(server)} trains on copies of clients' rows, which privacy {name} does not cover; "
                "take another rule"
            )

    @property
    def multiplier(self) -> float:
        """The noise multiplier, once it is known."""
        if self.noise is None:
            raise TypeError("the noise is not solved yet")
        return self.noise


def check_mean(privacy: Privacy, method: Method, server: Server, params: Params) -> None:
    """Refuses a rule that learns more of clients than the uniform mean of their deltas.

    Raises:
        InputError: it weights clients, or gets messages, losses, single deltas or stale ones.
    """
    reasons = {
        "needs the delta of each client": server.needs_deltas or server.unicasts,
        "needs the losses of clients": server.needs_loss,
        "has no rounds": server.buffer is not None,
        "gives clients new tensors before they train": bool(server.start(params, torch.Generator())),
    }
    if not any(reasons.values()):
        answers = replies(method, server, params)
        reasons["weights clients, or sums messages of theirs"] = any(
            each.weight != 1 or each.message for each in answers
        )
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"privacy {name_of(privacy)} releases the uniform mean of clients' deltas and nothing else, but server "
                f"{name_of(server)} {reason}; take a rule that needs the mean alone, such as fedavg or fedadam, with "
                "--server.weighting uniform"
            )


def replies(method: Method, server: Server, params: Params) -> list[Reply]:
    """What two clients reply that differ in their rows and in what they have trained."""
    slots, client_state = server.init(params)
    sent = server.broadcast(slots, params)
    answers = []
    for rows in (1, 3):
        trained = {name: tensor + rows for name, tensor in params.items()}
        update = ClientUpdate(params, trained, client_state, sent, rows, rows, 0, method, method.lr, float(rows))
        answers.append(server.reply(update))
    return answers
