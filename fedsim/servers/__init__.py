"""Server rules: what becomes of the clients' updates.

A rule is pure: parameters and slots in, parameters and slots out. A checkpoint can then forget nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fedsim.params import Params, unflatten
from fedsim.registry import component

Slots = dict[str, Params]


@dataclass(frozen=True)
class Trained:
    """What is noted of one client's share of a round."""

    client: int
    rows: int
    loss: float  # mean over its local steps, nats; nan when it took none
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Partial:
    """The sum over some clients of a round; partials add up, in the order of their chunks.

    Attributes:
        delta: (P,) float64, sum of weight * (trained - received) over the shared tensors.
        weight: sum of the weights.
        clients: one note per client.
        private: (Q,) of each client's private tensors, for methods that have any.
    """

    delta: np.ndarray
    weight: float
    clients: list[Trained]
    private: dict[int, np.ndarray] = field(default_factory=dict)

    def __add__(self, other: Partial) -> Partial:
        return Partial(
            self.delta + other.delta,
            self.weight + other.weight,
            self.clients + other.clients,
            self.private | other.private,
        )


def mean_delta(total: Partial, like: Params) -> Params:
    """The weighted mean of the clients' deltas, in float64, with the names and shapes of `like`."""
    return unflatten(total.delta / total.weight, like)


def moved(params: Params, step: Params) -> Params:
    """params + step, added in float64 and rounded once to the dtype of params."""
    return {name: (params[name].double() + step[name]).to(params[name].dtype) for name in params}


@component
class Server(ABC):
    """A server rule, as hyperparameters. Subclasses are components."""

    weighting: Literal["uniform", "rows"] = Field(
        "uniform",
        description="weight of a client in the mean: 1 (FedCLIP's code), or its train rows (FedAvg)",
    )

    def weight(self, rows: int) -> float:
        """A client's weight in the mean, from its number of train rows."""
        return float(rows) if self.weighting == "rows" else 1.0

    def is_shared(self, name: str) -> bool:
        """Whether the rule combines the tensor of this name at all."""
        return True

    def local_term(self, params: Params, received: Params) -> Tensor | float:
        """What the rule adds to every client's loss; `params` carry gradients, `received` are constants."""
        return 0.0

    @abstractmethod
    def step(self, params: Params, slots: Slots, total: Partial) -> tuple[Params, Slots]:
        """The shared parameters of the next round, and the rule's memory; leaves its arguments alone."""


@dataclass(frozen=True)
class ServerState:
    """All that changes from round to round, which is what a checkpoint holds.

    Attributes:
        round: rounds done.
        params: every tensor of the module; private ones as they were in round 0.
        slots: the server rule's memory.
        private: (Q,) private tensors of each client that has trained.
    """

    round: int
    params: Params
    slots: Slots = field(default_factory=dict)
    private: dict[int, np.ndarray] = field(default_factory=dict)


def advance(server: Server, state: ServerState, total: Partial, shared: list[str]) -> ServerState:
    """The state one round later; `shared` names the tensors that travel."""
    sent = {name: state.params[name] for name in shared}
    params, slots = server.step(sent, state.slots, total)
    return ServerState(state.round + 1, state.params | params, slots, state.private | total.private)
