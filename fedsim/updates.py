"""Sums of clients' updates: of a chunk, and of a round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from fedsim.params import Params, unflatten

# One row per client of a round; loss is the mean over its local steps in nats, nan if it took none.
CLIENT_STATS = np.dtype([("client", "i8"), ("rows", "i8"), ("steps", "i8"), ("loss", "f8"), ("weight", "f8")])


@dataclass(frozen=True)
class ChunkSum:
    """The sum over a chunk of clients.

    Attributes:
        delta: (P,) float64, sum of weight * (trained - received) over the shared tensors.
        weight: sum of the weights.
        clients: (n,) of `CLIENT_STATS`.
        message: (Q,) float64, sum of weight * message; empty if clients send none.
        deltas: (n, P) in training's dtype, the delta of each client, in the order of `clients`; None unless
            `Task.keeps_deltas`.
        messages: (n, Q) float64, the message of each client, without its weight; None unless there are `deltas`.
        held: (P,) float64, for each entry of the shared tensors the sum of the weights of the clients that have it, as
            what a client does not have it does not weigh; None if all clients have all.
    """

    delta: np.ndarray
    weight: float
    clients: np.ndarray
    message: np.ndarray = field(default_factory=lambda: np.zeros(0))
    deltas: np.ndarray | None = None
    messages: np.ndarray | None = None
    held: np.ndarray | None = None


@dataclass(frozen=True)
class RoundSum(ChunkSum):
    """The sum over all clients of a round.

    Attributes:
        population: all training clients of the run, whether they trained in this round or not.
        round: that of the clients, from 1.
        rounds: their number in total; None unless `Server.fixed_rounds`, since a run may continue with more.
        root: (P,) float64, the delta that the server has trained on its own rows; None unless it has `root_rows`.
    """

    population: int = 0
    round: int = 1
    rounds: int | None = None
    root: np.ndarray | None = None

    def require_deltas(self) -> np.ndarray:
        """`deltas`, for a rule that cannot do without them.

        Raises:
            TypeError: the rule does not declare `needs_deltas`.
        """
        if self.deltas is None:
            raise TypeError("the deltas of each client were not kept; set `needs_deltas = True` in the server rule")
        return self.deltas

    def require_root(self) -> np.ndarray:
        """`root`, for a rule that cannot do without it.

        Raises:
            TypeError: the rule has no `root_rows`.
        """
        if self.root is None:
            raise TypeError("the server has no rows to train on; set `root_rows` in the server rule")
        return self.root


def sum_chunks(chunks: Iterable[ChunkSum], population: int = 0) -> RoundSum:
    """The sum of one or more chunks, in their order, with at most two of them in memory.

    The deltas of each client, where a rule needs them, go to a temporary file that is memory-mapped.
    """
    chunks = iter(chunks)
    first = next(chunks)
    # Copied: an array from an actor is in shared memory and would keep the whole chunk's sum there.
    delta, message, weight, clients = first.delta.copy(), first.message.copy(), first.weight, [first.clients.copy()]
    messages = [] if first.messages is None else [first.messages.copy()]
    held = None if first.held is None else first.held.copy()
    # The file is closed, and thereby deleted, with its last mapping.
    file = TemporaryFile() if first.deltas is not None else None  # noqa: SIM115
    if file:
        _append(first, file)
    for chunk in chunks:
        if held is not None or chunk.held is not None:
            held = _held(held, weight, len(delta)) + _held(chunk.held, chunk.weight, len(delta))
        delta += chunk.delta
        message += chunk.message
        weight += chunk.weight
        clients.append(chunk.clients.copy())
        messages += [] if chunk.messages is None else [chunk.messages.copy()]
        if file:
            _append(chunk, file)
    stats = np.concatenate(clients)
    deltas = None if first.deltas is None or file is None else _mapped(file, first.deltas, len(stats))
    each = np.concatenate(messages) if messages else None
    return RoundSum(delta, weight, stats, message, deltas, each, held, population)


def _held(held: np.ndarray | None, weight: float, size: int) -> np.ndarray:
    return np.full(size, weight) if held is None else held


def _append(chunk: ChunkSum, file: IO[bytes]) -> None:
    if chunk.deltas is not None:
        file.write(chunk.deltas.tobytes())
        file.flush()


def _mapped(file: IO[bytes], like: np.ndarray, rows: int) -> np.ndarray:
    width, dtype = like.shape[1], like.dtype
    # An empty file cannot be mapped. Copy on write: what an attack changes stays in memory.
    return np.memmap(file, dtype, "c").reshape(-1, width) if width else np.zeros((rows, 0), dtype)


def stepped(total: RoundSum) -> np.ndarray:
    """Positions of the clients that took a step; rules that compare clients ignore the others, whose delta is zero."""
    return np.flatnonzero(total.clients["steps"] > 0)


def blocks(total: RoundSum, width: int = 1 << 16) -> Iterator[tuple[slice, np.ndarray]]:
    """The deltas of the `stepped` clients by block of parameters: its slice of (P,), and (n, width) float64."""
    clients, deltas = stepped(total), total.require_deltas()
    for first in range(0, deltas.shape[1], width):
        block = slice(first, min(first + width, deltas.shape[1]))
        yield block, deltas[clients, block].astype(np.float64)


def mean_delta(total: RoundSum, like: Params) -> Params:
    """The weighted mean of the clients' deltas, in float64, with the names and shapes of `like`.

    The mean of an entry is that over the clients that have it; it is 0 where no client has it.
    """
    if total.held is None:
        return unflatten(total.delta / total.weight, like)
    zeros = np.zeros_like(total.delta)
    return unflatten(np.divide(total.delta, total.held, out=zeros, where=total.held > 0), like)


def apply_update(params: Params, step: Params) -> Params:
    """params + step, added in float64 and rounded once to the dtype of params."""
    return {name: (params[name].double() + step[name]).to(params[name].dtype) for name in params}
