"""Functions as Ray tasks: as many at a time as there is room for, each repeated if its process is lost."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.cluster.calls import TRIES
from fedsim.cluster.nodes import nodes_of
from fedsim.cluster.placement import Placement, Sizing, plan
from fedsim.errors import Stopped

ENDED_S = 10  # for cancelled tasks to release what they hold
# Ray's errors for a task whose process or machine has ended, with its result or before it, or ran out of memory.
LOST = "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "OutOfMemoryError"
REPEAT = object()  # in place of the outcome of a task whose process was lost


@dataclass(frozen=True)
class TaskCall:
    """The arguments of a task, references among them, and its share of a machine."""

    args: tuple
    share: Placement


class Tasks:
    """The tasks of a cluster that this process has joined.

    Args:
        ray: as `session` yields it.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.nodes = nodes_of(ray, Sizing())

    def share(self, sizing: Sizing) -> Placement:
        """The share of a machine that a task of this sizing gets.

        Raises:
            InputError: no machine has room for it.
        """
        return plan(sizing, 1, self.nodes)[0]

    def store(self, value: Any) -> Any:
        """A reference to a value, which is then stored once for all tasks."""
        return self.ray.put(value)

    @property
    def several_machines(self) -> bool:
        return len(self.nodes) > 1

    def run(
        self, function: Callable[..., Any], calls: Sequence[TaskCall], at_once: int
    ) -> Generator[tuple[int, Any | Exception]]:
        """The index of each call with its result, or with its exception, as they end; closing it cancels the others.

        Args:
            at_once: tasks at a time, at most.
        """
        # A task whose process or machine is lost starts again elsewhere. This is not left to Ray, which repeats tasks
        # without end where memory is short.
        task = self.ray.remote(max_retries=0)(function)
        # A process that has used a GPU keeps its context, memory and limits, so the next task gets a new one.
        gpu_task = self.ray.remote(max_retries=0, max_calls=1)(function)
        waiting, losses = deque(range(len(calls))), Counter()
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    call = calls[waiting[0]]
                    share = {"num_cpus": call.share.num_cpus, "num_gpus": call.share.num_gpus}
                    remote = (gpu_task if call.share.num_gpus else task).options(**share)
                    running[remote.remote(*call.args)] = waiting.popleft()
                (ref,), _ = self.ray.wait(list(running))
                index = running.pop(ref)
                outcome = self._outcome(ref, losses, index)
                del ref  # or its result would stay in memory until the next one comes
                if outcome is REPEAT:
                    waiting.appendleft(index)
                else:
                    yield index, outcome
        finally:
            for ref in running:  # on a shared cluster they would keep their folders
                self.ray.cancel(ref, force=True)
            if running:
                self.ray.wait(list(running), num_returns=len(running), timeout=ENDED_S)

    def _outcome(self, ref: Any, losses: Counter[int], index: int) -> Any:
        """The result of a task, or its exception; REPEAT if it was lost."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause or error
        except tuple(getattr(self.ray.exceptions, name) for name in LOST) as error:
            losses[index] += 1
            if losses[index] < TRIES:
                return REPEAT
            reason = str(error).strip().splitlines()[0]
            return Stopped(f"ended {TRIES} processes ({reason}); is there memory for it?")
