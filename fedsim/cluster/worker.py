"""What a worker runs in: its device, its memory, and the actor around it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedsim.errors import InputError


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
