"""Server rules: what becomes of the clients' updates.

A rule is pure: parameters and slots in, parameters and slots out. A checkpoint can then forget nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import IO, ClassVar, Literal

import numpy as np
from torch import Tensor

from fedsim.methods import Method, Scope
from fedsim.params import Params, payload_bytes, unflatten
from fedsim.registry import component
from fedsim.search import Field

Slots = dict[str, Params]


# What is noted of each client's share of a round; its loss is the mean over local steps in nats, nan without any.
NOTE = np.dtype(
    [("client", "i8"), ("rows", "i8"), ("steps", "i8"), ("loss", "f8"), ("bytes_up", "i8"), ("bytes_down", "i8")]
)


@dataclass(frozen=True)
class Partial:
    """The sum over some clients of a round.

    Attributes:
        delta: (P,) float64, sum of weight * (trained - received) over the shared tensors.
        weight: sum of the weights.
        clients: (n,) of `NOTE`.
        message: (Q,) float64, sum of weight * message, of rules whose clients send one.
        each: (n, P) in training's dtype, every client's own delta, in the order of `clients`; of rules that see each.
        population: training clients of the run, whoever of them trains.
    """

    delta: np.ndarray
    weight: float
    clients: np.ndarray
    message: np.ndarray = field(default_factory=lambda: np.zeros(0))
    each: np.ndarray | None = None
    population: int = 0


def add_up(partials: Iterable[Partial], population: int = 0) -> Partial:
    """The sum of one or more partials, in their order; never holds more than two of them.

    Where each client's delta is wanted, they are laid down in a file without a name, and mapped.
    """
    partials = iter(partials)
    first = next(partials)
    # Copies: what comes from an actor lies in shared memory, and one note would hold its whole partial there.
    delta, message, weight, clients = first.delta.copy(), first.message.copy(), first.weight, [first.clients.copy()]
    # Closed, and thereby gone, with the last who maps it.
    file = _laid_down(first.each, TemporaryFile()) if first.each is not None else None  # noqa: SIM115
    for partial in partials:
        delta += partial.delta
        message += partial.message
        weight += partial.weight
        clients.append(partial.clients.copy())
        if file:
            _laid_down(partial.each, file)
    notes = np.concatenate(clients)
    each = None
    if file:  # an empty one cannot be mapped
        width, dtype = first.each.shape[1], first.each.dtype
        each = np.memmap(file, dtype, "r").reshape(-1, width) if width else np.zeros((len(notes), 0), dtype)
    return Partial(delta, weight, notes, message, each, population)


def _laid_down(each: np.ndarray, file: IO[bytes]) -> IO[bytes]:
    file.write(each.tobytes())
    file.flush()
    return file


def voters(total: Partial) -> np.ndarray:
    """Places of the clients that took a step; a delta of zero is not the word of one that had too few rows for any."""
    return np.flatnonzero(total.clients["steps"] > 0)


def blocks(total: Partial, width: int = 1 << 16) -> Iterator[tuple[slice, np.ndarray]]:
    """The deltas of `voters`, a block of parameters at a time: its place in (P,), and (n, width) float64."""
    who = voters(total)
    for first in range(0, total.each.shape[1], width):
        place = slice(first, min(first + width, total.each.shape[1]))
        yield place, total.each[who, place].astype(np.float64)


def mean_delta(total: Partial, like: Params) -> Params:
    """The weighted mean of the clients' deltas, in float64, with the names and shapes of `like`."""
    return unflatten(total.delta / total.weight, like)


def moved(params: Params, step: Params) -> Params:
    """params + step, added in float64 and rounded once to the dtype of params."""
    return {name: (params[name].double() + step[name]).to(params[name].dtype) for name in params}


@component
class Server(ABC):
    """A server rule, as hyperparameters. Subclasses are components."""

    # Whether clients come and go, and a round is one full buffer; such a rule says `buffer` and `concurrency`.
    asynchronous: ClassVar[bool] = False

    weighting: Literal["uniform", "rows"] = Field(
        "uniform",
        description="weight of a client in the mean: 1 (FedCLIP's code), or its train rows (FedAvg)",
    )

    # Whether `step` needs every client's delta (`Partial.each`), and not their sum alone.
    sees_each: ClassVar[bool] = False
    # Whether `step` moves tensors of scope `server`; to other rules a method with such is refused.
    moves_server: ClassVar[bool] = False

    def fit(self, method: Method) -> Method:
        """The method as this rule has it trained.

        Raises:
            InputError: the rule cannot be used with this method.
        """
        return method

    def check(self, params: Params, cohort: int) -> None:  # noqa: B027 - most rules take what comes
        """Looks at what is to be trained, before the first round.

        Args:
            params: the module's tensors in round 0 that are shared by the method's own word.
            cohort: clients of a round.

        Raises:
            InputError: the tensors are not of the kind that the rule speaks of, or the clients too few.
        """

    def scope(self, name: str, scope: Scope) -> Scope:
        """Who has the tensor of this name, for which the method says `scope`."""
        return scope

    def weight(self, rows: int, staleness: int = 0, steps: int = 1) -> float:
        """A client's weight in the mean.

        Args:
            rows: its train rows.
            staleness: rounds done since it was sent its parameters.
            steps: local steps that it took.
        """
        return float(rows) if self.weighting == "rows" else 1.0

    def local_term(self, params: Params, received: Params) -> Tensor | float:
        """What the rule adds to every client's loss.

        Args:
            params: what the client trains, shared and private; these carry gradients.
            received: the shared tensors among them as they came; constants.
        """
        return 0.0

    def sends(self, slots: Slots, params: Params) -> Params:
        """What each client is sent of the rule's memory; of the same names and shapes in every round.

        Args:
            slots: empty before the first step.
            params: the shared tensors.
        """
        return {}

    def start(self, shared: Params, seed: int) -> Params:
        """Those shared tensors from which a client starts its round, where they are not the ones that the server has.

        Args:
            shared: the shared tensors as the server has them, for their names and shapes.
            seed: another one for every client of every round; follows from the run's.
        """
        return {}

    def keeps(self, params: Params) -> Params:
        """What a client keeps for the rule before it has trained; `params` are the shared tensors."""
        return {}

    def correction(self, kept: Params, sent: Params) -> Params:
        """Constants that are added to each of a client's gradients, by name of the parameter."""
        return {}

    def settle(
        self, kept: Params, sent: Params, received: Params, trained: Params, steps: int, lr: float
    ) -> tuple[Params, Params]:
        """What a client keeps for the rule once it has trained, and its message, which is summed by weight.

        Args:
            kept, sent: of `keeps` (or of the last `settle`) and `sends`.
            received, trained: the shared tensors, as the server has them and as the client has trained them.
            steps: local steps that it took; 0 where it had too few rows.
        """
        return kept, {}

    def payload(self, shared: Params, server: Params, cohort: int) -> tuple[int, int]:
        """Bytes that a client is sent and sends.

        Args:
            shared, server: the tensors of these scopes.
            cohort: clients of the round.
        """
        return payload_bytes(shared) + payload_bytes(server), payload_bytes(shared)

    @abstractmethod
    def step(self, params: Params, slots: Slots, total: Partial) -> tuple[Params, Slots]:
        """The parameters of the next round, and the rule's memory; leaves its arguments alone.

        Args:
            params: the shared tensors, to which `total.delta` belongs; and, of a rule that moves them, those of scope
                `server`.
        """


@dataclass(frozen=True)
class ServerState:
    """All that changes from round to round, which is what a checkpoint holds.

    Attributes:
        round: rounds done.
        params: every tensor of the module; private ones as they were in round 0.
        slots: the server rule's memory.
        past: parameters of earlier rounds that some client is still at work on, by rounds done.
        private: (K,) int64, the round in which each client last wrote down what it keeps; 0 for never. The tensors
            themselves are in a `PrivateStore`.
    """

    round: int
    params: Params
    slots: Slots = field(default_factory=dict)
    past: dict[int, Params] = field(default_factory=dict)
    private: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def advance(
    server: Server, state: ServerState, total: Partial, shared: list[str], needed: frozenset[int]
) -> ServerState:
    """The state one round later.

    Args:
        shared: names of the tensors that clients are sent.
        needed: versions of the parameters, by rounds done, that some client is still at work on.
    """
    sent = {name: state.params[name] for name in shared}
    params, slots = server.step(sent, state.slots, total)
    past = kept_past(state, shared, needed)
    return replace(state, round=state.round + 1, params=state.params | params, slots=slots, past=past)


def kept_past(state: ServerState, shared: list[str], needed: frozenset[int]) -> dict[int, Params]:
    """The parameters of this round and of earlier ones that some client will still be at work on."""
    sent = {name: state.params[name] for name in shared}
    return {done: params for done, params in (state.past | {state.round: sent}).items() if done in needed}
