"""The server's state, and the step from one round to the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedsim.params import Params
from fedsim.rng import torch_rng
from fedsim.servers import Server, Slots
from fedsim.updates import RoundSum


@dataclass(frozen=True)
class ServerState:
    """All that changes from round to round, which is what a checkpoint holds.

    Attributes:
        round: rounds done.
        params: every tensor of the module; private ones as they were in round 0, surveyed ones too, until round 1.
        slots: the server rule's memory.
        past: parameters of earlier rounds that a client still trains from, by rounds done.
        private: (K,) int64, the round in which each client last wrote its private state; 0 for never. The states are in
            a `PrivateStore`.
        bank: (K, P) under a rule that `unicasts`, the shared tensors that each client last sent, flat; zeros if it has
            not trained yet. Empty under other rules.
        privacy: what the server remembers for the privacy mechanism.
    """

    round: int
    params: Params
    slots: Slots = field(default_factory=dict)
    past: dict[int, Params] = field(default_factory=dict)
    private: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    bank: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    privacy: Params = field(default_factory=dict)


def advance(
    server: Server, state: ServerState, total: RoundSum, shared: list[str], needed: frozenset[int], seed: int = 0
) -> ServerState:
    """The state one round later.

    Args:
        shared: names of the tensors that clients are sent.
        needed: versions of the parameters, by rounds done, that a client still trains from.
    """
    sent = {name: state.params[name] for name in shared}
    params, slots = server.step(sent, state.slots, total, torch_rng(seed, "server", state.round + 1))
    past = past_versions(state, shared, needed)
    return replace(state, round=state.round + 1, params=state.params | params, slots=slots, past=past)


def past_versions(state: ServerState, shared: list[str], needed: frozenset[int]) -> dict[int, Params]:
    """The parameters of this round and of earlier ones that a client will still train from."""
    sent = {name: state.params[name] for name in shared}
    return {done: params for done, params in (state.past | {state.round: sent}).items() if done in needed}
