"""The actor that runs an experiment, so that it does not live in anybody's terminal."""

from collections import deque
from collections.abc import Callable
from typing import Any

from fedsim.cluster.placement import here, on
from fedsim.cluster.session import pulse, session
from fedsim.errors import RESUMES, Stopped
from fedsim.events import Event, Progress


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


class _Driver:
    """The actor that runs an experiment, so that it does not live in anybody's terminal."""

    def __init__(self) -> None:
        self.seen: deque[Event] = deque()

    def run(self, work: Callable[..., Any], args: tuple) -> Any:
        return work(*args, self.seen.append)

    def events(self) -> list[Event]:
        return [self.seen.popleft() for _ in range(len(self.seen))]


def _tell(ray, driver: Any, progress: Progress) -> None:
    for event in ray.get(driver.events.remote()):
        progress(event)
