"""The calls of one map over actors: given out, answered, late or lost."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Any

from fedsim.errors import Stopped

QUEUED = 2  # calls given to an actor: one that runs, one that waits, so that it never idles on the driver
TRIES = 4  # a call that ended, or outran, so many actors will do so to the next one too
UNKNOWN_S = 300  # for a call while none of its name has answered: it may load a model; and for a restart


@dataclass(eq=False)
class _Seat:
    """An actor, and what it has been given. With a ping out it is benched: it gets no call until it answers.

    Attributes:
        calls: by reference, in the order in which the actor does them.
        due: when the first of the calls, or the ping, is late.
        restarts: since it last answered; as many as there may be while it never has.
    """

    actor: Any
    calls: dict[Any, "_Call"] = field(default_factory=dict)
    ping: Any = None
    due: float = inf
    restarts: int = TRIES

    def load(self) -> int:
        return QUEUED if self.ping else sum(call.weight for call in self.calls.values())

    def bench(self, patience: float) -> None:
        self.calls.clear()
        self.due = time.monotonic() + patience
        # An actor does one thing after the other: its answer also says that it is done with all earlier calls.
        self.ping = self.ping or self.actor.ping.remote()


@dataclass(eq=False)
class _Call:
    """One of the times that an item was given to an actor.

    Attributes:
        weight: how many places it takes of the QUEUED.
        began: when its actor came to it.
        late: it was given to another actor too; the first answer counts.
    """

    index: int
    seat: _Seat
    weight: int
    began: float = inf
    late: bool = False


class _Work:
    """The items of one map: which are to be done, which are being done, and what came of them.

    Attributes:
        todo: a heap of indices, so that an item which is done again comes first.
        missing: indices without a result.
        running: by reference, the calls that may still answer.
    """

    def __init__(self, pool: Any, name: str, items: Sequence[Any], shared: list) -> None:
        self.pool, self.name, self.items, self.shared = pool, name, items, shared
        self.todo = list(range(len(items)))
        self.missing = set(self.todo)
        self.running: dict[Any, _Call] = {}
        self.results: dict[int, Any] = {}
        self.deaths: Counter[int] = Counter()
        self.lates: Counter[int] = Counter()

    def hand_out(self, end: int) -> None:
        """Gives items before `end` to actors, as long as one is free."""
        while self.todo and self.todo[0] < end:
            index = self.todo[0]
            # A call that has ended an actor has the next one to itself, or it would be the others that are blamed.
            weight = QUEUED if self.deaths[index] or self.lates[index] else 1
            if index in self.missing:  # and not answered late, meanwhile
                if (seat := self.pool.idle(weight)) is None:
                    return
                call = _Call(index, seat, weight)
                ref = seat.actor.call.remote(self.pool.post, self.name, *self.shared, self.items[index])
                self.running[ref] = seat.calls[ref] = call
                self._start(seat)
            heappop(self.todo)

    def take(self, ref: Any) -> None:
        """Takes the answer of a call, or its failure."""
        call, ray = self.running.pop(ref), self.pool.ray
        call.seat.calls.pop(ref, None)
        self._start(call.seat)
        if call.index not in self.missing:
            return
        try:
            self.results[call.index] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.pool.lost:
            if not call.late:
                self._blame(self.deaths, call.index, f"ended {TRIES} actors; is there memory for it?")
                call.seat.bench(UNKNOWN_S)
            return
        self.missing.remove(call.index)
        seconds = time.monotonic() - call.began if call.began < inf else 0.0
        self.pool.longest[self.name] = max(seconds, self.pool.longest.get(self.name, 0.0))

    def overdue(self, seat: _Seat) -> None:
        """Gives the calls of an actor to others as well, for the first of them is late."""
        calls = list(seat.calls.values())
        patience = self.pool.deadline(self.name, self.lates[calls[0].index])
        self._blame(self.lates, calls[0].index, f"was late {TRIES} times, the last by {patience:.0f} s")
        for call in calls[1:]:
            heappush(self.todo, call.index)
        for call in calls:
            call.late = True
        seat.bench(patience)

    def _start(self, seat: _Seat) -> None:
        """Starts the clock of an actor's first call: not while it is queued, for that time is the other's."""
        if seat.ping:
            return
        first = next(iter(seat.calls.values()), None)
        if first and first.began == inf:
            first.began = time.monotonic()
        seat.due = first.began + self.pool.deadline(self.name, self.lates[first.index]) if first else inf

    def _blame(self, counts: Counter[int], index: int, what: str) -> None:
        if index not in self.missing:  # answered by another, meanwhile
            return
        counts[index] += 1
        if counts[index] == TRIES:
            raise Stopped(f"{self.name} of item {index} {what}") from None
        heappush(self.todo, index)
