"""Server rules: what becomes of the clients' updates.

A rule is pure: parameters and slots in, parameters and slots out. A checkpoint can then forget nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedsim.methods import Method, Scope
from fedsim.params import Params, payload_bytes
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.updates import RoundSum, apply_update, mean_delta

Slots = dict[str, Params]


@dataclass(frozen=True)
class ClientUpdate:
    """A client's share of a round, once it has trained.

    Attributes:
        received, trained: the shared tensors, as the server had them and as the client has trained them.
        client_state: the client's memory for the rule, before this round.
        sent: what `Server.broadcast` returned.
        rows: its train rows.
        steps: its local steps; 0 where it had too few rows for one.
        staleness: rounds done since the parameters were sent.
        method: as the rule has it trained.
    """

    received: Params
    trained: Params
    client_state: Params
    sent: Params
    rows: int
    steps: int
    staleness: int
    method: Method


@dataclass(frozen=True)
class Reply:
    """What a client returns besides its delta.

    Attributes:
        weight: of its delta and of its message in their sums.
        message: tensors that are summed by weight, into `RoundSum.message`.
        client_state: its memory for its next round; it is not sent.
    """

    weight: float = 1.0
    message: Params = field(default_factory=dict)
    client_state: Params = field(default_factory=dict)


@component
class Server(ABC):
    """A server rule, as hyperparameters. Subclasses are components, and leave their arguments unchanged."""

    # Whether `step` needs every client's delta (`RoundSum.each`), and not their sum alone.
    sees_each: ClassVar[bool] = False
    # Updates of a round, and clients at work at any time, of asynchronous rules; None: rounds are synchronous.
    buffer: ClassVar[int | None] = None
    concurrency: ClassVar[int | None] = None

    def adapt(self, method: Method) -> Method:
        """The method as this rule has it trained.

        Raises:
            InputError: the rule cannot be used with this method.
        """
        return method

    def check(self, params: Params, cohort: int) -> None:  # noqa: B027 - most rules accept anything
        """Checks what is to be trained, before the first round.

        Args:
            params: the tensors that the method shares, in round 0.
            cohort: clients of a round.

        Raises:
            InputError: the tensors do not suit the rule, or the clients are too few.
        """

    def scope(self, name: str, scope: Scope) -> Scope:
        """Who holds the tensor of this name, whose scope in the method is `scope`."""
        return scope

    def init(self, params: Params) -> tuple[Slots, Params]:
        """The rule's memory, and a client's, before the first round; `params` are the shared tensors of round 0."""
        return {}, {}

    def broadcast(self, slots: Slots, params: Params) -> Params:
        """What clients are sent besides the parameters; of the same names and shapes in every round.

        Args:
            params: the shared tensors.
        """
        return {}

    def start(self, params: Params, rng: torch.Generator) -> Params:
        """Those shared tensors from which a client starts its round, where they are not the ones that it received.

        Args:
            params: the shared tensors as received, for their names and shapes.
            rng: keyed by seed, round and client.
        """
        return {}

    def gradient(self, params: Params, received: Params, client_state: Params, sent: Params) -> Params:
        """What the rule adds to a client's gradients at a local step, by name of the parameter.

        It is called under vmap where clients are trained together, so it must not depend on values.

        Args:
            params: what the client trains, shared and private.
            received: the shared tensors among them, as received.
            client_state, sent: of `init` or the last `reply`, and of `broadcast`.
        """
        return {}

    def reply(self, update: ClientUpdate) -> Reply:
        """What a client returns besides its delta, and what it remembers."""
        return Reply(client_state=update.client_state)

    def payload(self, shared: Params, server: Params, sent: Params, message: Params, cohort: int) -> tuple[int, int]:
        """Bytes that a client is sent and sends: those of the tensors that travel.

        Args:
            shared, server: the tensors of these scopes.
            sent, message: of `broadcast` and `reply`.
            cohort: clients of the round.
        """
        down, up = (shared, server, sent), (shared, message)
        return sum(map(payload_bytes, down)), sum(map(payload_bytes, up))

    @abstractmethod
    def step(self, params: Params, slots: Slots, total: RoundSum, rng: torch.Generator) -> tuple[Params, Slots]:
        """The parameters of the next round, and the rule's memory.

        Args:
            params: the shared tensors, to which `total.delta` belongs, and those whose scope is `server`.
            rng: keyed by seed and round.
        """


@component
class Averaging(Server):
    """The weighted mean of the clients' deltas."""

    weighting: Literal["uniform", "rows"] = Field(
        "uniform",
        description="weight of a client in the mean: 1 (FedCLIP's code), or its train rows (FedAvg)",
    )

    def reply(self, update: ClientUpdate) -> Reply:
        weight = float(update.rows) if self.weighting == "rows" else 1.0
        return Reply(weight, client_state=update.client_state)

    def step(self, params: Params, slots: Slots, total: RoundSum, rng: torch.Generator) -> tuple[Params, Slots]:
        return apply_update(params, mean_delta(total, params)), slots
