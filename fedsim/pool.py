"""Workers on Ray actors, or in this process: the only file that knows Ray.

A worker is an object whose methods are pure: the same call gives the same result in any process. So an actor
that dies costs the calls it held, done again elsewhere, to the same bits.
"""

import os
import secrets
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedsim.errors import InputError, Stopped

Progress = Callable[["Event"], None]
QUEUED = 2  # calls given to an actor: one that runs, one that waits, so that it never idles on the driver
DEATHS = 4  # a call that ended so many actors will end the next one too
PLACEMENT_S = 120  # for the first actor of a pool to answer


@dataclass(frozen=True)
class Event:
    """How far a stage of a run has come."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Sizing:
    """What each pool of a run may use; None is chosen from what the cluster offers."""

    actors: int | None = None
    gpus_per_actor: float | None = None


class Pool(ABC):
    """Several workers of one kind behind one call."""

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
    return _InProcess(factory, args) if sizing.actors == 0 else _Actors(sizing, jobs, factory, args)


class _InProcess(Pool):
    """One worker, here: for a debugger."""

    def __init__(self, factory: type, args: tuple) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in every actor: sums then come out the same to the bit
        self.worker = factory(*args, "cpu")

    def map(self, name, items, *shared):
        return (getattr(self.worker, name)(*shared, item) for item in items)

    def close(self):
        torch.set_num_threads(self.threads)


class _Actors(Pool):
    """Workers on Ray actors, which come and go."""

    def __init__(self, sizing: Sizing, jobs: int, factory: type, args: tuple) -> None:
        import ray

        self.ray = ray
        count, options = plan(sizing, jobs, ray.cluster_resources())
        self.options = options
        # Kept: a restarted actor is made from these references again, which must then still be alive.
        self.args = [ray.put(arg) for arg in args]
        actor = ray.remote(max_restarts=-1, max_task_retries=0, **options)(_Worker)
        use_gpu = options["num_gpus"] > 0
        self.actors = [actor.remote(factory, use_gpu, *self.args) for _ in range(count)]
        self.load = dict.fromkeys(range(count), QUEUED)  # full until the first answer
        self.pings = {actor.ping.remote(): k for k, actor in enumerate(self.actors)}
        self.placed = False

    def map(self, name, items, *shared):
        shared = [self.ray.put(value) for value in shared]  # once, whatever the number of calls
        todo, running, results = deque(enumerate(items)), {}, {}
        deaths: Counter[int] = Counter()
        window = 4 * QUEUED * len(self.actors)  # results kept while an earlier one is awaited
        given = 0
        while given < len(items):
            while todo and todo[0][0] < given + window:
                # A call that has ended an actor has the next one to itself, or it would be the others that are blamed.
                weight = QUEUED if deaths[todo[0][0]] else 1
                if (k := self._idle(weight)) is None:
                    break
                index, item = todo.popleft()
                running[self.actors[k].call.remote(name, *shared, item)] = index, item, k, weight
                self.load[k] += weight
            for ref in self._wait([*running, *self.pings]):
                if ref in self.pings:
                    self._welcome(ref)
                    continue
                index, item, k, weight = running.pop(ref)
                self.load[k] -= weight
                try:
                    results[index] = self.ray.get(ref)
                except self.ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except self.ray.exceptions.RayActorError:
                    deaths[index] += 1
                    if deaths[index] == DEATHS:
                        raise Stopped(
                            f"{name} of item {index} ended {DEATHS} actors; is there memory for it?"
                        ) from None
                    todo = deque(sorted([(index, item), *todo], key=lambda pair: pair[0]))
                    self._bench(k)
            while given in results:
                yield results.pop(given)
                given += 1

    def close(self):
        for actor in self.actors:
            self.ray.kill(actor)

    def _idle(self, weight: int) -> int | None:
        k = min(self.load, key=self.load.get)
        return k if self.load[k] + weight <= QUEUED else None

    def _wait(self, refs):
        done, _ = self.ray.wait(refs, timeout=None if self.placed else PLACEMENT_S)
        if not done:
            raise InputError(
                f"no actor of {self.options} found room in {PLACEMENT_S} s; "
                f"the cluster has {_resources(self.ray.available_resources())} free; take fewer --actors"
            )
        return done

    def _bench(self, k: int) -> None:
        """Gives an actor nothing more until it answers again."""
        if k not in self.pings.values():
            self.load[k] += QUEUED
            self.pings[self.actors[k].ping.remote()] = k

    def _welcome(self, ping) -> None:
        k = self.pings.pop(ping)
        try:
            self.ray.get(ping)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayActorError:
            time.sleep(0.2)  # it restarts; asking at once again would only spin
            self.pings[self.actors[k].ping.remote()] = k
            return
        self.load[k] -= QUEUED
        self.placed = True


class _Worker:
    """The actor around a worker."""

    def __init__(self, factory: type, use_gpu: bool, *args: Any) -> None:
        torch.set_num_threads(1)
        # Asked of torch and not of Ray: an actor without a GPU sees all of them, and one may be only logical.
        self.worker = factory(*args, "cuda" if use_gpu and torch.cuda.is_available() else "cpu")

    def ping(self) -> None:
        pass

    def call(self, name: str, *args: Any) -> Any:
        return getattr(self.worker, name)(*args)


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
    with _session(address) as ray:
        # No CPU of its own: a pool that owns every CPU would starve it. One thread works, the other tells.
        driver = ray.remote(num_cpus=0, max_concurrency=2)(_Driver).remote()
        result = driver.run.remote(work, args)
        done = []
        while not done:
            done, _ = ray.wait([result], timeout=0.2)
            try:
                for event in ray.get(driver.events.remote()):
                    progress(event)
            except ray.exceptions.RayActorError:
                done = [result]
        try:
            return ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise Stopped(
                f"the driver actor has died; the same command goes on from the last round ({error})"
            ) from None


def plan(sizing: Sizing, jobs: int, resources: dict[str, float]) -> tuple[int, dict[str, float]]:
    """How many actors, and what share of a CPU and a GPU each is given.

    Args:
        jobs: more actors than calls would only wait.
        resources: of the whole cluster, as `ray.cluster_resources()` tells.

    Raises:
        InputError: a share of a GPU is asked for where there is none.
    """
    cpus, gpus = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
    if sizing.gpus_per_actor and not gpus:
        raise InputError(f"--gpus-per-actor {sizing.gpus_per_actor} on a cluster without a GPU")
    share = (0.5 if gpus else 0.0) if sizing.gpus_per_actor is None else sizing.gpus_per_actor
    most = int(gpus / share) if share else max(1, int(cpus))
    count = sizing.actors or max(1, min(most, jobs))
    if share and sizing.gpus_per_actor is None:
        # Only whole divisors of a GPU pack without stranding a part of one.
        share = int(10_000 / max(1, -(-count // gpus))) / 10_000
    return count, {"num_cpus": min(1.0, int(cpus * 10_000 / count) / 10_000), "num_gpus": share}


def check_reachable(address: str | None) -> None:
    """Knocks at a cluster's door, since Ray itself would try for minutes.

    Raises:
        InputError: nobody answers at host:port.
    """
    if address is None or address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--address wants host:port or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise InputError(f"no cluster answers at {address} ({error}); is it up? try `ray status`") from None


@contextmanager
def _session(address: str | None):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # A cluster of our own, which nobody else can use and which leaves no token in the home folder. Ray reads
        # this once, when it is imported; where that has happened, its own choice stands.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "fedsim"}
    try:
        # Said in so many words: without an address, Ray joins whatever cluster it finds on the machine.
        ray.init(address=address or "local", **quiet, **({} if address else {"include_dashboard": False}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot join a cluster at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _resources(free: dict[str, float]) -> str:
    return ", ".join(f"{free.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
