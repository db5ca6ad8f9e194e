"""Workers on Ray actors, or in this process: with cluster.py the only file that knows Ray.

A worker is an object whose methods are pure: the same call gives the same result in any process. So an actor
that dies or does not answer costs the calls it held, done again elsewhere, to the same bits.
"""

import ctypes
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedsim.cluster import Sizing, blind, bundles, here, nodes_of, on, plan, sizes_of
from fedsim.errors import RESUMES, InputError, Stopped, listing
from fedsim.events import Event, Progress
from fedsim.session import pulse, session

QUEUED = 2  # calls given to an actor: one that runs, one that waits, so that it never idles on the driver
TRIES = 4  # a call that ended, or outran, so many actors will do so to the next one too
PLACEMENT_S = 120  # for the first actor of a pool to answer
UNKNOWN_S = 300  # for a call while none of its name has answered: it may load a model; and for a restart


class Pool(ABC):
    """Several workers of one kind behind one call.

    Attributes:
        sizes: what they have, such as "2 actors of 1 CPU on 1 node".
        staff: the factory of the workers and what it is given.
    """

    sizes: str
    staff: tuple = ()

    def employ(self, factory: type, *args: Any) -> None:
        """From here on `factory(*args, device)` answers; the workers that are there, where they are just that.

        Processes stay: a new worker costs its own making, not the start of Python and torch.
        """
        staff = factory, *args
        if len(staff) != len(self.staff) or any(a is not b for a, b in zip(staff, self.staff, strict=True)):
            before, self.staff = self.staff, ()  # nobody's, if this fails
            self._renew(staff, before)
            self.staff = staff

    @abstractmethod
    def _renew(self, staff: tuple, before: tuple) -> None:
        """Has calls answered by another staff than before."""

    @abstractmethod
    def check_sees(self, folder: Path) -> None:
        """Raises InputError where a worker's machine does not see a folder of this one's; names the machines."""

    @abstractmethod
    def map(self, name: str, items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        """Yields `worker.name(*shared, item)` for every item, in the order of the items."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_pool(sizing: Sizing, jobs: int, factory: type, *args: Any) -> Pool:
    """A pool of `factory(*args, device)` workers, of use for at most `jobs` calls at a time."""
    pool = _InProcess(sizing) if sizing.actors == 0 else _Actors(sizing, jobs)
    try:
        pool.employ(factory, *args)
    except BaseException:
        pool.close()
        raise
    return pool


class _InProcess(Pool):
    """One worker, here: for a debugger, and where runs and not clients are side by side."""

    sizes = "in this process"

    def __init__(self, sizing: Sizing) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(sizing.threads_per_actor)  # as in every actor: sums then come out the same to the bit
        _keep_memory()
        self.gpus = sizing.gpus_per_actor or 0.0

    def _renew(self, staff, before):
        factory, *args = staff
        self.worker = None  # before the next one is made: memory may not hold both
        with _within(self.gpus):
            self.worker = factory(*args, device_of(self.gpus))

    def check_sees(self, folder):
        pass

    def map(self, name, items, *shared):
        for item in items:
            with _within(self.gpus):
                result = getattr(self.worker, name)(*shared, item)
            yield result

    def close(self):
        torch.set_num_threads(self.threads)


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


class _Actors(Pool):
    """Workers on Ray actors, which come and go."""

    def __init__(self, sizing: Sizing, jobs: int) -> None:
        import ray

        # How a call tells of its actor or node: it has ended, its answer with it, or there was no memory left.
        self.lost = ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError
        self.ray = ray
        self.timeout_s = sizing.call_timeout_s
        self.longest: dict[str, float] = {}  # seconds from the start of a call to its answer, by name
        nodes = nodes_of(ray, sizing)
        self.spans = len(nodes) > 1  # several machines: they share no files, unless somebody says so
        placements = bundles(ray) if sizing.grouped else plan(sizing, jobs, nodes)
        self.sizes = sizes_of(placements, sizing.threads_per_actor)
        self.post = 0, []
        # No task events: Ray's head would keep 14 kB of every round.
        actor = ray.remote(max_restarts=-1, max_task_retries=0, enable_task_events=False)(_Worker)
        self.seats = []
        for place in placements:
            where = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus, "scheduling_strategy": place.strategy()}
            self.seats.append(_Seat(actor.options(**where).remote(sizing.threads_per_actor, place.num_gpus)))
            self.seats[-1].bench(inf)  # Ray starts it when it has room; many take minutes
        self.placed = False

    def _renew(self, staff, before):
        # By reference with every call: an actor that has restarted knows nothing of earlier ones. On another machine
        # an argument has what it carries with it, once for all actors there.
        number, refs = self.post
        there = {id(arg): ref for arg, ref in zip(before, refs, strict=False)}
        self.post = number + 1, [there.get(id(arg)) or self._sent(arg) for arg in staff]
        self.longest.clear()

    def _sent(self, arg):
        return self.ray.put(arg.carried() if self.spans and hasattr(arg, "carried") else arg)

    def check_sees(self, folder):
        if self.spans and (names := blind(self.ray, folder)):
            raise InputError(
                f"{folder} is not seen by {listing(names)}; clients keep something to themselves here, which wants a "
                "--out on a file system that all machines of the cluster share"
            )

    def map(self, name, items, *shared):
        work = _Work(self, name, items, [self.ray.put(value) for value in shared])  # once for all calls
        window = 4 * QUEUED * len(self.seats)  # results kept while an earlier one is awaited
        try:
            for given in range(len(items)):
                work.hand_out(given + window)
                while given not in work.results:
                    self._turn(work)
                    work.hand_out(given + window)
                yield work.results.pop(given)
        finally:
            for seat in self.seats:  # that does a call which nobody waits for any more
                if seat.calls:
                    seat.bench(self.deadline(name))

    def close(self):
        for seat in self.seats:
            self.ray.kill(seat.actor)  # at once; Ray itself sees to those that do not listen

    def idle(self, weight: int) -> _Seat | None:
        seat = min(self.seats, key=_Seat.load)
        return seat if seat.load() + weight <= QUEUED else None

    def deadline(self, name: str, lates: int = 0) -> float:
        """Seconds that a call may run, doubled with every deadline it has missed: a guess may be too short."""
        known = max(60.0, 20 * self.longest[name]) if name in self.longest else UNKNOWN_S
        return (self.timeout_s or known) * 2**lates

    def _turn(self, work: "_Work") -> None:
        """Waits for one answer, to a call or a ping, or for a deadline."""
        pings = {seat.ping: seat for seat in self.seats if seat.ping}
        # Not less, or an answer that came in while nobody looked would have no time to be fetched.
        soonest = max(0.5, min(seat.due for seat in self.seats) - time.monotonic()) if self.placed else PLACEMENT_S
        done, _ = self.ray.wait([*work.running, *pings], timeout=None if soonest == inf else soonest)
        for ref in done:
            if ref in pings:
                self._welcome(pings[ref])
            else:
                work.take(ref)
        if done:
            return
        if not self.placed:
            free = self.ray.available_resources()
            raise InputError(
                f"none of {self.sizes} found room in {PLACEMENT_S} s; the cluster has "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU free; take fewer --actors"
            )
        now = time.monotonic()
        for seat in self.seats:
            if seat.due <= now and seat.ping:
                self._restart(seat)
            elif seat.due <= now:
                work.overdue(seat)

    def _restart(self, seat: _Seat) -> None:
        """Ends the process of an actor that has let two deadlines pass: of a call, and of the ping after it.

        One that was stopped, or that a network has forgotten, may never answer again; and with a single actor, or
        when all of them hang, nobody else can take its calls. A slow one loses what it has done so far.
        """
        seat.restarts += 1
        if all(seat.restarts >= TRIES for seat in self.seats):
            raise Stopped(f"none of {self.sizes} answers any more; is the cluster up? try `ray status`")
        self.ray.kill(seat.actor, no_restart=False)  # of a process that does not listen, after 5 s
        seat.due = time.monotonic() + UNKNOWN_S

    def _welcome(self, seat: _Seat) -> None:
        try:
            self.ray.get(seat.ping)
        except self.ray.exceptions.ActorUnavailableError:  # it restarts; Ray takes 2 s to say so, nothing spins here
            seat.ping = seat.actor.ping.remote()
            return
        except self.ray.exceptions.OutOfMemoryError:  # Ray's memory monitor has ended it; it restarts, too
            seat.restarts += 1
            if all(seat.restarts >= TRIES for seat in self.seats):
                raise Stopped(f"Ray ended all of {self.sizes} since memory is short; take fewer --actors") from None
            seat.ping = seat.actor.ping.remote()
            return
        except self.ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            raise Stopped(f"an actor could not start: {reason}") from None
        seat.ping, seat.due, seat.restarts, self.placed = None, inf, 0, True


class _Work:
    """The items of one map: which are to be done, which are being done, and what came of them.

    Attributes:
        todo: a heap of indices, so that an item which is done again comes first.
        missing: indices without a result.
        running: by reference, the calls that may still answer.
    """

    def __init__(self, pool: _Actors, name: str, items: Sequence[Any], shared: list) -> None:
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


class _Worker:
    """The actor around a worker."""

    def __init__(self, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        _keep_memory()
        self.gpus, self.number, self.worker = gpus, 0, None

    def ping(self) -> None:
        pass

    def call(self, post: tuple[int, list], name: str, *args: Any) -> Any:
        """Args: post: the number of the staff, and references to its factory and arguments."""
        with _within(self.gpus):
            if post[0] != self.number:
                self._join(*post)
            return getattr(self.worker, name)(*args)

    def _join(self, number: int, refs: list) -> None:
        import ray

        self.worker = None  # before the next one is made: memory may not hold both
        factory, *args = ray.get(refs)
        self.worker, self.number = factory(*args, device_of(self.gpus)), number


@contextmanager
def _within(gpus: float) -> Iterator[None]:
    """Says in one sentence that a share of a GPU is too small."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"this does not fit into the {gpus:g} of a GPU that an actor has; take a larger --gpus-per-actor, "
            "a smaller --method.batch, or a smaller backbone"
        ) from None


def device_of(gpus: float) -> str:
    """Where a worker with a share of a GPU computes.

    Asked of torch and not of Ray: an actor without a GPU sees all of them, and one may be only logical.
    """
    if not gpus or not torch.cuda.is_available():
        return "cpu"
    # torch lets convolutions round float32 to 10 bits of mantissa; features would then depend on the device.
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_per_process_memory_fraction(gpus)  # or one that takes too much would end the others on its GPU
    return "cuda"


def _keep_memory() -> None:
    """Has the C library keep what is freed: a stack's gradients would else be mapped anew at every step.

    Measured: a quarter of the time of a client with 525,312 parameters. glibc alone knows the call.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its most
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class _Driver:
    """The actor that runs an experiment, so that it does not live in anybody's terminal."""

    def __init__(self) -> None:
        self.seen: deque[Event] = deque()

    def run(self, work: Callable[..., Any], args: tuple) -> Any:
        return work(*args, self.seen.append)

    def events(self) -> list[Event]:
        return [self.seen.popleft() for _ in range(len(self.seen))]


def drive(work: Callable[..., Any], args: tuple, address: str | None, progress: Progress) -> Any:
    """Runs `work(*args, progress)` in a driver actor, on a private cluster or the one at `address`."""
    with session(address, progress) as ray:
        # No CPU of its own: a pool that owns every CPU would starve it. One thread works, the other tells. On this
        # machine, where the folder of the run was checked, and whose loss would end it in any case; Ray puts an actor
        # that takes nothing on a node by chance, unless it must be here.
        where = {"num_cpus": 0, "scheduling_strategy": on(here(ray), soft=False)}
        driver = ray.remote(max_concurrency=2, enable_task_events=False, **where)(_Driver).remote()
        look, result = pulse(ray), driver.run.remote(work, args)
        try:
            while not ray.wait([result], timeout=0.2)[0]:
                look()
                _tell(ray, driver, progress)
            _tell(ray, driver, progress)
            return ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.OutOfMemoryError:
            raise Stopped(f"Ray ended the driver actor since memory is short on this machine; {RESUMES}") from None
        except ray.exceptions.RayError as error:
            raise Stopped(f"the driver actor has died; {RESUMES} ({error})") from None
        finally:  # on a cluster of others, an interrupted one would keep the folder of the run for seconds
            ray.kill(driver)
            ray.wait([result], timeout=5)


def _tell(ray, driver: Any, progress: Progress) -> None:
    for event in ray.get(driver.events.remote()):
        progress(event)
