"""How a pool of workers is opened."""

from typing import Any

from fedsim.cluster.actors import _Actors
from fedsim.cluster.in_process import _InProcess
from fedsim.cluster.placement import Sizing
from fedsim.cluster.workers import Pool


def open_pool(sizing: Sizing, jobs: int, factory: type, *args: Any) -> Pool:
    """A pool of `factory(*args, device)` workers, of use for at most `jobs` calls at a time."""
    pool = _InProcess(sizing) if sizing.actors == 0 else _Actors(sizing, jobs)
    try:
        pool.employ(factory, *args)
    except BaseException:
        pool.close()
        raise
    return pool
