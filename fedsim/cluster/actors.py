"""A pool of Ray actors.

The methods of a worker are pure, so an actor that dies or does not answer costs only the calls it held: they are
repeated on another actor, to the same bits.
"""

import time
from math import inf
from typing import Any

from fedsim.cluster.calls import QUEUED, TRIES, UNKNOWN_S, ActorSlot, CallQueue, Deadlines
from fedsim.cluster.nodes import nodes_of, nodes_without_access
from fedsim.cluster.placement import Placement, Sizing, bundles, plan, sizes_of
from fedsim.cluster.worker import WorkerActor
from fedsim.cluster.workers import Pool
from fedsim.errors import InputError, Stopped, listing

PLACEMENT_S = 120  # for the first actor of a pool to answer
RESULTS_AHEAD = 4 * QUEUED  # results kept for each actor while an earlier one is awaited
SHORTEST_WAIT_S = 0.5  # an answer that came in while the driver was busy needs time to be fetched


class ActorPool(Pool):
    """Workers on Ray actors, which come and go.

    Attributes:
        spans_nodes: its cluster has several machines, which are taken to share no files.
        placed: an actor has answered, so there was room for at least one.
    """

    def __init__(self, sizing: Sizing, jobs: int) -> None:
        import ray

        self.ray: Any = ray
        self.deadlines = Deadlines(sizing.call_timeout_s)
        nodes = nodes_of(ray, sizing)
        self.spans_nodes = len(nodes) > 1
        placements = bundles(ray) if sizing.grouped else plan(sizing, jobs, nodes)
        self.sizes = sizes_of(placements, sizing.threads_per_actor)
        self.slots = _started_actors(ray, placements, sizing.threads_per_actor)
        self.placed = False

    def map(self, workers, method, items, *shared):
        # Once for all actors: passed by value, every call would store its own copy.
        stored = [self.ray.put(value) for value in shared]
        queue = CallQueue(self.ray, self.slots, self.deadlines, workers, method, items, stored)
        window = RESULTS_AHEAD * len(self.slots)
        try:
            for index in range(len(items)):
                queue.hand_out(index + window)
                while index not in queue.results:
                    self._wait(queue)
                    queue.hand_out(index + window)
                yield queue.results.pop(index)
        finally:
            queue.abandon()

    def check_shared_folder(self, folder):
        if self.spans_nodes and (names := nodes_without_access(self.ray, folder)):
            raise InputError(
                f"{folder} is not seen by {listing(names)}; clients have private state here, which needs an --out on a "
                "file system that all machines of the cluster share"
            )

    def close(self):
        for slot in self.slots:
            self.ray.kill(slot.actor)  # at once; Ray ends those that do not listen

    def _ship(self, part):
        # Passed by reference with every call: an actor that has restarted does not know earlier ones. To another
        # machine an argument takes its files along, once for all actors there.
        return self.ray.put(part.inline() if self.spans_nodes and hasattr(part, "inline") else part)

    def _wait(self, queue: CallQueue) -> None:
        """Waits for an answer to a call or a ping, or for a deadline."""
        pings = {slot.ping: slot for slot in self.slots if slot.ping}
        due = min(slot.due for slot in self.slots)
        patience_s = max(SHORTEST_WAIT_S, due - time.monotonic()) if self.placed else PLACEMENT_S
        answered, _ = self.ray.wait([*queue.running, *pings], timeout=None if patience_s == inf else patience_s)
        for ref in answered:
            if ref in pings:
                self._on_ready(pings[ref])
            else:
                queue.take(ref)
        if not answered:
            self._on_deadline(queue)

    def _on_ready(self, slot: ActorSlot) -> None:
        """Puts a slot whose ping was answered back to use; or pings again, while its actor restarts."""
        try:
            self.ray.get(slot.ping)
        except self.ray.exceptions.ActorUnavailableError:  # it restarts; Ray takes 2 s to say so, so this does not spin
            slot.ping = slot.actor.ping.remote()
        except self.ray.exceptions.OutOfMemoryError:  # Ray's memory monitor has ended it; it restarts, too
            self._count_restart(slot, f"Ray ended all of {self.sizes} since memory is short; take fewer --actors")
            slot.ping = slot.actor.ping.remote()
        except self.ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            raise Stopped(f"an actor could not start: {reason}") from None
        else:
            slot.ping, slot.due, slot.restarts, self.placed = None, inf, 0, True

    def _on_deadline(self, queue: CallQueue) -> None:
        """Gives late calls to other actors, and restarts the actors that missed the deadline of a ping as well."""
        if not self.placed:
            free = self.ray.available_resources()
            raise InputError(
                f"none of {self.sizes} found room in {PLACEMENT_S} s; the cluster has "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU free; take fewer --actors"
            )
        now = time.monotonic()
        for slot in self.slots:
            if slot.due <= now and slot.ping:
                self._restart(slot)
            elif slot.due <= now:
                queue.reassign(slot)

    def _restart(self, slot: ActorSlot) -> None:
        """Ends the process of an actor that has missed two deadlines: of a call, and of the ping after it.

        One that was stopped, or that a network has forgotten, may never answer again; and with a single actor, or
        when all of them hang, no other can take its calls. A slow one loses what it has computed so far.
        """
        self._count_restart(slot, f"none of {self.sizes} responds; is the cluster up? try `ray status`")
        self.ray.kill(slot.actor, no_restart=False)  # a process that does not listen is ended after 5 s
        slot.due = time.monotonic() + UNKNOWN_S

    def _count_restart(self, slot: ActorSlot, problem: str) -> None:
        """Raises Stopped with the problem once every actor has restarted TRIES times without an answer."""
        slot.restarts += 1
        if all(each.restarts >= TRIES for each in self.slots):
            raise Stopped(problem) from None


def _started_actors(ray: Any, placements: list[Placement], threads: int) -> list[ActorSlot]:
    """A slot for every placement. Ray starts an actor when it has room; many take minutes."""
    # No task events: Ray's head would keep those of every round, and grow without end.
    actor = ray.remote(max_restarts=-1, max_task_retries=0, enable_task_events=False)(WorkerActor)
    slots = []
    for place in placements:
        where = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus, "scheduling_strategy": place.strategy()}
        slots.append(ActorSlot(actor.options(**where).remote(threads, place.num_gpus)))
        slots[-1].suspend(inf)
    return slots
