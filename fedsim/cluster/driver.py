"""The driver actor: runs an experiment on the cluster, and reports to the process that started it."""

from collections import deque
from collections.abc import Callable
from typing import Any

from fedsim.cluster.nodes import this_node
from fedsim.cluster.placement import node_affinity
from fedsim.cluster.session import HeadMonitor, joined, session
from fedsim.errors import RESUMES, Stopped
from fedsim.events import Event, Progress
from fedsim.memory import collect_seldom

POLL_S = 0.2  # between two looks at the progress of a run
END_S = 5  # for an interrupted run to end


class DriverActor:
    """Runs an experiment, and keeps its events until they are fetched."""

    def __init__(self) -> None:
        collect_seldom()
        self.waiting: deque[Event] = deque()

    def run(self, work: Callable[..., Any], args: tuple) -> Any:
        return work(*args, self.waiting.append)

    def events(self) -> list[Event]:
        return [self.waiting.popleft() for _ in range(len(self.waiting))]


def run_in_driver_actor(work: Callable[..., Any], args: tuple, address: str | None, progress: Progress) -> Any:
    """Runs `work(*args, progress)` in a driver actor, on a private cluster or the one at `address`.

    Raises:
        Stopped: the driver actor, or the head of the cluster, has died.
    """
    private = address is None and not joined()
    with session(address, progress) as ray:
        driver = _started_driver(ray)
        head, result = HeadMonitor(ray, private), driver.run.remote(work, args)
        try:
            while not ray.wait([result], timeout=POLL_S)[0]:
                head.check()
                _forward_events(ray, driver, progress)
            _forward_events(ray, driver, progress)
            return ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.OutOfMemoryError:
            raise Stopped(f"Ray ended the driver actor since memory is short on this machine; {RESUMES}") from None
        except ray.exceptions.RayError as error:
            raise Stopped(f"the driver actor has died; {RESUMES} ({error})") from None
        finally:
            ray.kill(driver)
            if not private:  # an interrupted driver would hold the folder of the run for seconds
                ray.wait([result], timeout=END_S)


def _started_driver(ray: Any) -> Any:
    # No CPU: a pool that owns every CPU would starve it. Two threads: one works, the other answers. On this machine,
    # where the folder of the run was checked, and whose loss would end the run anyway; without the strategy, Ray puts
    # an actor that needs no resources on any node.
    where = {"num_cpus": 0, "scheduling_strategy": node_affinity(this_node(ray), soft=False)}
    return ray.remote(max_concurrency=2, enable_task_events=False, **where)(DriverActor).remote()


def _forward_events(ray: Any, driver: Any, progress: Progress) -> None:
    for event in ray.get(driver.events.remote()):
        progress(event)
