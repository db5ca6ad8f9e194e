"""Workers on Ray actors.

A worker is an object whose methods are pure: the same call gives the same result in any process. So an actor
that dies or does not answer costs the calls it held, done again elsewhere, to the same bits.
"""

import time
from math import inf

from fedsim.cluster.calls import QUEUED, TRIES, UNKNOWN_S, _Seat, _Work
from fedsim.cluster.nodes import blind, nodes_of
from fedsim.cluster.placement import Sizing, bundles, plan, sizes_of
from fedsim.cluster.worker import _Worker
from fedsim.cluster.workers import Pool
from fedsim.errors import InputError, Stopped, listing

PLACEMENT_S = 120  # for the first actor of a pool to answer


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
