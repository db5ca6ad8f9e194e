"""The contract of a pool of workers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Pool(ABC):
    """Several workers of one kind behind one call.

    Attributes:
        sizes: what they have, such as "2 actors of 1 CPU on 1 node".
        staff: the factory of the workers and what it is given.
    """

    sizes: str
    staff: tuple = ()

    def employ(self, factory: type, *args: Any) -> None:
        """From here on `factory(*args, device)` answers; the workers that are there, where they are just that.

        Processes stay: a new worker costs its own making, not the start of Python and torch.
        """
        staff = factory, *args
        if len(staff) != len(self.staff) or any(a is not b for a, b in zip(staff, self.staff, strict=True)):
            before, self.staff = self.staff, ()  # nobody's, if this fails
            self._renew(staff, before)
            self.staff = staff

    @abstractmethod
    def _renew(self, staff: tuple, before: tuple) -> None:
        """Has calls answered by another staff than before."""

    @abstractmethod
    def check_sees(self, folder: Path) -> None:
        """Raises InputError where a worker's machine does not see a folder of this one's; names the machines."""

    @abstractmethod
    def map(self, name: str, items: Sequence[Any], *shared: Any) -> Iterator[Any]:
        """Yields `worker.name(*shared, item)` for every item, in the order of the items."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
