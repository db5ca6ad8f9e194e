"""A pool of one worker in this process: for a debugger, and where whole runs are side by side."""

import torch

from fedsim.cluster.placement import Sizing
from fedsim.cluster.worker import WorkerSlot
from fedsim.cluster.workers import Pool
from fedsim.memory import keep_freed_memory


class InProcessPool(Pool):
    sizes = "in this process"

    def __init__(self, sizing: Sizing) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(sizing.threads_per_actor)  # as in every actor: sums then come out the same to the bit
        keep_freed_memory()
        self.slot = WorkerSlot(sizing.gpus_per_actor or 0.0)

    def map(self, workers, method, items, *shared):
        for item in items:
            yield self.slot.call(workers.number, lambda: workers.spec, method, *shared, item)

    def check_shared_folder(self, folder):
        pass

    def close(self):
        torch.set_num_threads(self.threads)

    def _ship(self, part):
        return part
