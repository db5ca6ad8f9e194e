"""How a pool of workers is opened."""

from fedsim.cluster.actors import ActorPool
from fedsim.cluster.in_process import InProcessPool
from fedsim.cluster.placement import Sizing
from fedsim.cluster.workers import Pool


def open_pool(sizing: Sizing, jobs: int) -> Pool:
    """A pool for at most `jobs` calls at a time: of actors, or of this process alone."""
    return InProcessPool(sizing) if sizing.actors == 0 else ActorPool(sizing, jobs)
