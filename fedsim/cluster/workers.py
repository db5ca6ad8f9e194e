"""The contract of a pool, and the handle by which its workers are called."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)
class Workers:
    """The workers of one kind in a pool.

    Every process of the pool makes its own, `factory(*args, device)`, at the first call that names this handle, and
    drops the worker of any other handle first. The methods of a worker are pure: any process gives the same result.

    Attributes:
        number: identifies the handle within its pool, from 1.
        spec: the factory and its arguments.
        shipped: the same as they travel to the processes.
    """

    pool: "Pool"
    number: int
    spec: tuple
    shipped: tuple

    def map(self, method: str, items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        """Yields `worker.method(*shared, item)` for every item, in the order of the items."""
        return self.pool.map(self, method, items, *shared)


class Pool(ABC):
    """Processes that stay, whatever workers they run: a new worker costs neither the start of Python nor of torch.

    Attributes:
        sizes: what the processes have, such as "2 actors of 1 CPU on 1 node".
    """

    sizes: str
    _latest: Workers | None = None

    def workers(self, factory: type, *args: Any) -> Workers:
        """The handle of workers made by `factory(*args, device)`.

        The same objects as in the latest call give the same handle: runs that share them share what a worker has
        loaded. An object that the latest handle has, too, is not shipped again.
        """
        spec, latest = (factory, *args), self._latest
        shipped = dict(zip(map(id, latest.spec), latest.shipped, strict=True)) if latest else {}
        if not latest or list(map(id, spec)) != list(map(id, latest.spec)):
            parts = [shipped[id(part)] if id(part) in shipped else self._ship(part) for part in spec]
            latest = self._latest = Workers(self, latest.number + 1 if latest else 1, spec, tuple(parts))
        return latest

    @abstractmethod
    def map(self, workers: Workers, method: str, items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        """What `Workers.map` gives."""

    @abstractmethod
    def check_shared_folder(self, folder: Path) -> None:
        """Raises InputError where a machine of the pool does not see a folder of this machine; names the machines."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _ship(self, part: Any) -> Any:
        """A factory or an argument, as it travels to the processes."""

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
