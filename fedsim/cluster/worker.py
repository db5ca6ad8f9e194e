"""What a worker runs in: its device, and the actor around it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fedsim.errors import InputError
from fedsim.memory import collect_seldom, keep_freed_memory


class WorkerSlot:
    """Where a process has its worker: one at a time, that of the handle which was called last.

    Args:
        gpus: the process's share of a GPU, in [0, 1].
    """

    def __init__(self, gpus: float) -> None:
        self.gpus, self.number, self.worker = gpus, 0, None

    def call(self, number: int, spec: Callable[[], Sequence[Any]], method: str, *args: Any) -> Any:
        """`worker.method(*args)` of the handle with this number, which `spec` describes where it is not loaded yet."""
        with _gpu_memory_errors(self.gpus):
            if number != self.number:
                self._load_worker(number, *spec())
            return getattr(self.worker, method)(*args)

    def _load_worker(self, number: int, factory: Callable[..., Any], *args: Any) -> None:
        self.number, self.worker = 0, None  # before the next one is made: memory may not hold both
        self.worker = factory(*args, device_of(self.gpus))
        self.number = number


class WorkerActor:
    """The Ray actor around a worker."""

    def __init__(self, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        collect_seldom()
        self.slot = WorkerSlot(gpus)

    def ping(self) -> None:
        pass

    def call(self, handle: tuple[int, Sequence[Any]], method: str, *args: Any) -> Any:
        """Args: handle: its number, and references to its factory and arguments."""
        import ray

        number, refs = handle
        return self.slot.call(number, lambda: ray.get(list(refs)), method, *args)


@contextmanager
def _gpu_memory_errors(gpus: float) -> Iterator[None]:
    """Says in one sentence that a share of a GPU is too small."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"this does not fit into the {gpus:g} of a GPU that an actor has; take a larger --gpus-per-actor, "
            "a smaller --method.batch-size, or a smaller backbone"
        ) from None


def device_of(gpus: float) -> str:
    """Where a worker with a share of a GPU computes.

    Decided by torch and not by Ray: an actor without a GPU sees all of them, and a GPU may be only logical.
    """
    if not gpus or not torch.cuda.is_available():
        return "cpu"
    # torch lets convolutions round float32 to 10 bits of mantissa; features would then depend on the device.
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_per_process_memory_fraction(gpus)  # or one that takes too much would end the others on its GPU
    return "cuda"
