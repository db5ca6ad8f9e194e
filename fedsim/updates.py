"""Sums of clients' updates: of a chunk, and of a round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from fedsim.params import Params, unflatten

# One row for each client of a round; the loss is the mean over its local steps in nats, nan when it took none.
CLIENT_STATS = np.dtype([("client", "i8"), ("rows", "i8"), ("steps", "i8"), ("loss", "f8"), ("weight", "f8")])


@dataclass(frozen=True)
class ChunkSum:
    """The sum over a chunk of clients.

    Attributes:
        delta: (P,) float64, sum of weight * (trained - received) over the shared tensors.
        weight: sum of the weights.
        clients: (n,) of `CLIENT_STATS`.
        message: (Q,) float64, sum of weight * message, of rules whose clients send one.
        each: (n, P) in training's dtype, every client's own delta, in the order of `clients`; of rules that see each.
    """

    delta: np.ndarray
    weight: float
    clients: np.ndarray
    message: np.ndarray = field(default_factory=lambda: np.zeros(0))
    each: np.ndarray | None = None


@dataclass(frozen=True)
class RoundSum(ChunkSum):
    """The sum over all clients of a round.

    Attributes:
        population: all training clients of the run, whether they trained in this round or not.
    """

    population: int = 0


def sum_chunks(chunks: Iterable[ChunkSum], population: int = 0) -> RoundSum:
    """The sum of one or more chunks, in their order; never holds more than two of them.

    The deltas of rules that see each client go to a temporary file, which is memory-mapped.
    """
    chunks = iter(chunks)
    first = next(chunks)
    # Copies: what comes from an actor is in shared memory, where one array would hold the whole chunk's sum.
    delta, message, weight, clients = first.delta.copy(), first.message.copy(), first.weight, [first.clients.copy()]
    # Closed, and thereby deleted, with its last mapping.
    file = _append(first.each, TemporaryFile()) if first.each is not None else None  # noqa: SIM115
    for chunk in chunks:
        delta += chunk.delta
        message += chunk.message
        weight += chunk.weight
        clients.append(chunk.clients.copy())
        if file:
            _append(chunk.each, file)
    stats = np.concatenate(clients)
    each = None
    if file:  # an empty one cannot be mapped
        width, dtype = first.each.shape[1], first.each.dtype
        each = np.memmap(file, dtype, "r").reshape(-1, width) if width else np.zeros((len(stats), 0), dtype)
    return RoundSum(delta, weight, stats, message, each, population)


def _append(each: np.ndarray, file: IO[bytes]) -> IO[bytes]:
    file.write(each.tobytes())
    file.flush()
    return file


def stepped(total: RoundSum) -> np.ndarray:
    """Positions of the clients that took a step; one with too few rows for a step has a delta of zero, and no vote."""
    return np.flatnonzero(total.clients["steps"] > 0)


def blocks(total: RoundSum, width: int = 1 << 16) -> Iterator[tuple[slice, np.ndarray]]:
    """The deltas of `stepped`, a block of parameters at a time: its slice of (P,), and (n, width) float64."""
    clients = stepped(total)
    for first in range(0, total.each.shape[1], width):
        block = slice(first, min(first + width, total.each.shape[1]))
        yield block, total.each[clients, block].astype(np.float64)


def mean_delta(total: RoundSum, like: Params) -> Params:
    """The weighted mean of the clients' deltas, in float64, with the names and shapes of `like`."""
    return unflatten(total.delta / total.weight, like)


def apply_update(params: Params, step: Params) -> Params:
    """params + step, added in float64 and rounded once to the dtype of params."""
    return {name: (params[name].double() + step[name]).to(params[name].dtype) for name in params}
