"""Server rules: how the server combines the clients' updates.

A rule is a set of pure functions: all that changes is in the parameters and slots, which checkpoints hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from fedsim.fleets import Device
from fedsim.methods import ClientContext, Method, Scope
from fedsim.params import Params, payload_bytes
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.updates import RoundSum, apply_update, mean_delta

Slots = dict[str, Params]  # by kind, such as "momentum" (without "/"), and by name of the parameter
Bank = Mapping[int, np.ndarray]  # (P,) the latest shared tensors of clients, flat, by client, ascending


@dataclass(frozen=True)
class ClientUpdate:
    """The result of a client's local training in a round.

    Attributes:
        received: the shared tensors as the server sent them to this client, before `start` replaces any; entries that
            the client does not have (`Server.held`) are zero, in `trained` too.
        trained: the same tensors after local training.
        client_state: what the client stores for the rule, before this round.
        sent: what `Server.broadcast` returned.
        rows: its train rows.
        steps: its local steps; 0 if it has too few rows for one.
        staleness: rounds completed since the parameters were sent.
        method: the method as adapted by the rule, with the local epochs of this client.
        lr: the step size of its local steps, which `Method.schedule` may have lowered.
        loss: the mean of the method's loss over its train rows before it trained, in nats; nan if it has too few rows
            for a step, or unless the rule has `needs_loss`.
        client: whose update it is; None unless `Method.reads_client`, and when bytes are counted.
    """

    received: Params
    trained: Params
    client_state: Params
    sent: Params
    rows: int
    steps: int
    staleness: int
    method: Method
    lr: float
    loss: float = float("nan")
    client: ClientContext | None = None


@dataclass(frozen=True)
class Reply:
    """What a client returns besides its delta.

    Attributes:
        weight: the weight of its delta and its message in their sums.
        message: tensors with the same names and shapes for every client; their weighted sum is `RoundSum.message`.
        client_state: what it stores for its next round, with the names and shapes of `init`'s; it is not sent.
    """

    weight: float = 1.0
    message: Params = field(default_factory=dict)
    client_state: Params = field(default_factory=dict)


@component
class Server(ABC):
    """A server rule and its hyperparameters. Subclasses are components; their methods do not modify their arguments."""

    # Whether `step` needs the delta and the message of each client (`RoundSum.deltas`), not only their sums.
    needs_deltas: ClassVar[bool] = False
    # Whether `reply` needs the loss of each client before it trains (`ClientUpdate.loss`), which takes a forward pass
    # over its train rows. Operations and simulated time do not count that pass.
    needs_loss: ClassVar[bool] = False
    # Asynchronous rules only: updates per round, and clients that train at any time. None: rounds are synchronous.
    buffer: ClassVar[int | None] = None
    concurrency: ClassVar[int | None] = None
    # Whether a tensor becomes a mean of the clients'. A rule that steps further, or less far, is refused for methods
    # with shared tensors that clients do not train, such as the running statistics of a batch norm.
    averages: ClassVar[bool] = True
    # Whether the server could compute the clients' messages from their updates, such as products of trained tensors. If
    # updates are encoded, messages are then those of the decoded ones; other messages are sent as clients compute them.
    computes_messages: ClassVar[bool] = False
    # Which limits of a client's device the rule heeds in `held`: "rank" or "blocks". A fleet with others is refused.
    # With `needs_deltas` or `unicasts` a rule cannot heed any, since it then needs whole models of clients.
    heeds: ClassVar[frozenset[str]] = frozenset()
    # Whether `unicast` gives clients tensors of their own. A client then also stores its shared tensors after training,
    # and is evaluated with them. The server stores those of all clients, in memory and in each checkpoint.
    unicasts: ClassVar[bool] = False

    # Of how many train rows of clients the server has copies, perhaps a field of the rule. In each round it trains on
    # them from what it sends, as a client would; `RoundSum.root` is its delta. Rounds must be synchronous.
    root_rows: ClassVar[int] = 0

    def adapt(self, method: Method) -> Method:
        """The method as clients train it under this rule.

        Raises:
            InputError: the rule cannot be used with this method.
        """
        return method

    def check(self, params: Params, cohort: int) -> None:  # noqa: B027 - most rules accept anything
        """Checks the parameters and the cohort before the first round.

        Args:
            params: the method's shared tensors at round 0.
            cohort: clients per round.

        Raises:
            InputError: the rule cannot use these tensors, or needs more clients.
        """

    def scope(self, name: str, scope: Scope) -> Scope:
        """The scope of a tensor under this rule; `scope` is its scope in the method."""
        return scope

    def init(self, params: Params) -> tuple[Slots, Params]:
        """The slots of the rule and the state of a client before the first round.

        Both already have all the names and shapes of later rounds. It is called in every process, so the result must
        depend on its arguments only.

        Args:
            params: the shared tensors at round 0.
        """
        return {}, {}

    def broadcast(self, slots: Slots, params: Params) -> Params:
        """What clients receive besides the parameters, with the same names and shapes in every round.

        Args:
            params: the shared tensors.
        """
        return {}

    def unicast(self, client: int, bank: Bank, params: Params) -> Params:
        """What one client receives in place of the same tensors in `params`, with the same names in every call.

        It is called for the clients of synchronous rounds if the rule `unicasts`. The bytes are those of the tensors
        that are replaced.

        Args:
            client: its id.
            bank: of all clients that have trained in an earlier round; empty in the first.
            params: the shared tensors, and those with the scope `server`.
        """
        return {}

    def start(self, params: Params, rng: torch.Generator) -> Params:
        """Shared tensors that a client replaces before it trains (default: none).

        Args:
            params: the received shared tensors, for their names and shapes.
            rng: keyed by seed, round and client.
        """
        return {}

    def held(self, params: Params, device: Device, rng: torch.Generator) -> Params:
        """Which entries of the shared tensors a client has in a round (default: all).

        A client receives, trains and sends these alone. While it trains, the others are zero and stay zero; in the sum
        of the round they weigh nothing (`RoundSum.held`). How many there are must follow from the device alone. It is
        called if the device has a limit that the rule `heeds`.

        Args:
            params: the shared tensors, for their names and shapes.
            device: what the client's device allows.
            rng: keyed by seed, round and client.

        Returns:
            By name of a tensor, bools that broadcast to its shape; of tensors without a name in it, clients have all.
        """
        return {}

    def gradient(self, params: Params, received: Params, client_state: Params, sent: Params) -> Params:
        """What the rule adds to a client's gradients at a local step, by parameter name.

        It runs under vmap when clients are trained together, so its control flow must not depend on tensor values. It
        must return the same names in every call.

        Args:
            params: the parameters that the client trains, shared and private.
            received: the shared ones among them, as this client received them.
            client_state: from `init` or the client's last `reply`.
            sent: from `broadcast`.
        """
        return {}

    def reply(self, update: ClientUpdate) -> Reply:
        """What a client returns besides its delta, and its new state."""
        return Reply(client_state=update.client_state)

    def payload(self, shared: Params, server: Params, sent: Params, message: Params, cohort: float) -> tuple[int, int]:
        """Bytes that a client receives and sends in a round, counted from the tensors that travel.

        Args:
            shared: the tensors of this scope, what the client has of them.
            server: the tensors of this scope.
            sent: from `broadcast`.
            message: from `reply`.
            cohort: clients per round; if they have unequal parts, as many with this one's part as have the same bytes.
        """
        down, up = (shared, server, sent), (shared, message)
        return sum(map(payload_bytes, down)), sum(map(payload_bytes, up))

    def evaluated(self, params: Params, slots: Slots) -> Params:
        """The shared tensors that are evaluated, reported and written as the adapter, if clients are sent other ones.

        Args:
            params: the shared tensors, as clients are sent them.
        """
        return params

    @property
    def evaluated_as(self) -> str:
        """What `evaluated` returns, in words, such as `moving average`; empty if that is what clients are sent."""
        return ""

    @property
    def fixed_rounds(self) -> bool:
        """Whether rounds depend on how many there are in total, so that a run cannot be continued with more."""
        return False

    @abstractmethod
    def step(self, params: Params, slots: Slots, total: RoundSum, rng: torch.Generator) -> tuple[Params, Slots]:
        """The parameters and slots of the next round.

        Args:
            params: the shared tensors, to which `total.delta` applies, and those with the scope `server`.
            rng: keyed by seed and round.
        """


@component
class Averaging(Server):
    """The weighted mean of the clients' deltas."""

    weighting: Literal["uniform", "rows"] = Field(
        "uniform",
        description="weight of a client in the mean: 1 (FedCLIP's code) or its number of train rows (FedAvg)",
    )

    def reply(self, update: ClientUpdate) -> Reply:
        weight = float(update.rows) if self.weighting == "rows" else 1.0
        return Reply(weight, client_state=update.client_state)

    def step(self, params: Params, slots: Slots, total: RoundSum, rng: torch.Generator) -> tuple[Params, Slots]:
        return apply_update(params, mean_delta(total, params)), slots
