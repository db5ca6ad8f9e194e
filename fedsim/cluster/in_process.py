"""One worker in this process."""

import torch

from fedsim.cluster.placement import Sizing
from fedsim.cluster.worker import _keep_memory, _within, device_of
from fedsim.cluster.workers import Pool


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
