"""The calls of one map over actors: handed out, answered, late or lost."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Any

from fedsim.cluster.workers import Workers
from fedsim.errors import Stopped

QUEUED = 2  # calls in an actor's queue: one that runs, one that waits, so that it never idles until the driver answers
TRIES = 4  # a call that ended, or outran, this many actors will do so to the next one too
UNKNOWN_S = 300  # for a call while none of its kind has been answered: it may load a model; and for a restart
SHORTEST_S = 60  # no learned deadline is shorter


@dataclass(eq=False)
class ActorSlot:
    """A place for an actor, which Ray may restart, and the calls it has been given.

    While a ping is out the slot is suspended: its actor gets no call until it answers.

    Attributes:
        calls: by reference, in the order in which the actor executes them.
        due: when the first of the calls, or the ping, is late; in seconds of `time.monotonic`.
        restarts: since the actor last answered; TRIES as long as it never has.
    """

    actor: Any
    calls: dict[Any, "Call"] = field(default_factory=dict)
    ping: Any = None
    due: float = inf
    restarts: int = TRIES

    def load(self) -> int:
        return QUEUED if self.ping else sum(call.weight for call in self.calls.values())

    def suspend(self, patience_s: float) -> None:
        self.calls.clear()
        self.due = time.monotonic() + patience_s
        # An actor executes one call after the other: an answered ping also says that all earlier calls are over.
        self.ping = self.ping or self.actor.ping.remote()


@dataclass(eq=False)
class Call:
    """One attempt at an item.

    Attributes:
        weight: how much of the QUEUED calls of an actor it counts for.
        began: when its actor started it, in seconds of `time.monotonic`.
        late: it was given to another actor too; the first answer counts.
    """

    index: int
    slot: ActorSlot
    weight: int
    began: float = inf
    late: bool = False


class Deadlines:
    """How long a call may run: what the user says, or 20 times the longest call of its kind so far.

    Args:
        call_timeout_s: seconds, or None.
    """

    def __init__(self, call_timeout_s: float | None) -> None:
        self.call_timeout_s = call_timeout_s
        self.longest: dict[Any, float] = {}  # seconds from the start of a call to its answer, by kind

    def seconds(self, kind: Any, missed: int = 0) -> float:
        """Seconds for a call, doubled with every deadline it has missed: a guess may be too short."""
        learned = max(SHORTEST_S, 20 * self.longest[kind]) if kind in self.longest else UNKNOWN_S
        return (self.call_timeout_s or learned) * 2**missed

    def learn(self, kind: Any, seconds: float) -> None:
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))


class CallQueue:
    """The items of one map: which are waiting, which are running, and their results.

    Attributes:
        todo: a heap of indices, so that an item which is tried again comes first.
        missing: indices without a result.
        running: by reference, the calls that may still answer.
        kind: what has its own deadline: a method of one kind of workers.
    """

    def __init__(
        self,
        ray: Any,
        slots: Sequence[ActorSlot],
        deadlines: Deadlines,
        workers: Workers,
        method: str,
        items: Sequence[Any],
        shared: Sequence[Any],
    ) -> None:
        self.ray, self.slots, self.deadlines = ray, slots, deadlines
        self.handle, self.method, self.items, self.shared = (workers.number, workers.shipped), method, items, shared
        self.kind = workers.number, method
        # A call whose actor or node has ended, whose answer was lost with it, or for which there was no memory left.
        self.lost = ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError
        self.todo = list(range(len(items)))
        self.missing = set(self.todo)
        self.running: dict[Any, Call] = {}
        self.results: dict[int, Any] = {}
        self.deaths: Counter[int] = Counter()
        self.late: Counter[int] = Counter()

    def hand_out(self, end: int) -> None:
        """Gives items before `end` to actors, as long as one is free."""
        while self.todo and self.todo[0] < end:
            index = self.todo[0]
            # A call that has ended an actor has the next one to itself: others would otherwise be recorded as failed.
            weight = QUEUED if self.deaths[index] or self.late[index] else 1
            if index in self.missing:  # it may have been answered late
                slot = min(self.slots, key=ActorSlot.load)
                if slot.load() + weight > QUEUED:
                    return
                ref = slot.actor.call.remote(self.handle, self.method, *self.shared, self.items[index])
                self.running[ref] = slot.calls[ref] = Call(index, slot, weight)
                self._start_clock(slot)
            heappop(self.todo)

    def take(self, ref: Any) -> None:
        """Takes the answer of a call, or its failure."""
        call = self.running.pop(ref)
        call.slot.calls.pop(ref, None)
        self._start_clock(call.slot)
        if call.index not in self.missing:
            return
        try:
            self.results[call.index] = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.lost:
            if not call.late:
                self._record_failure(self.deaths, call.index, f"ended {TRIES} actors; is there memory for it?")
                call.slot.suspend(UNKNOWN_S)
            return
        self.missing.remove(call.index)
        self.deadlines.learn(self.kind, time.monotonic() - call.began if call.began < inf else 0.0)

    def reassign(self, slot: ActorSlot) -> None:
        """Gives the calls of an actor to others as well, since the first of them is late."""
        first, *others = calls = list(slot.calls.values())
        patience_s = self.deadlines.seconds(self.kind, self.late[first.index])
        self._record_failure(
            self.late, first.index, f"missed its deadline {TRIES} times, the last of {patience_s:.0f} s"
        )
        for call in others:
            heappush(self.todo, call.index)
        for call in calls:
            call.late = True
        slot.suspend(patience_s)

    def abandon(self) -> None:
        """Suspends the actors that still execute a call whose answer is not needed any more."""
        for slot in self.slots:
            if slot.calls:
                slot.suspend(self.deadlines.seconds(self.kind))

    def _start_clock(self, slot: ActorSlot) -> None:
        """Starts the clock of an actor's first call, which until now waited for the one before it."""
        if slot.ping:
            return
        first = next(iter(slot.calls.values()), None)
        if first and first.began == inf:
            first.began = time.monotonic()
        slot.due = first.began + self.deadlines.seconds(self.kind, self.late[first.index]) if first else inf

    def _record_failure(self, counts: Counter[int], index: int, problem: str) -> None:
        if index not in self.missing:  # answered by another actor
            return
        counts[index] += 1
        if counts[index] == TRIES:
            raise Stopped(f"{self.method} of item {index} {problem}") from None
        heappush(self.todo, index)
