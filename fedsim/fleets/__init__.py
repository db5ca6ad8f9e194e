"""Fleets: the devices of clients; how long they take, when they are available, whether they respond, and how much of
a model they can train.

All times are simulated: nothing sleeps, and no result depends on the speed of the machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import BeforeValidator

from fedsim.errors import InputError, counted
from fedsim.fields import split
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field

Positive = Annotated[int, Field(ge=1, le=10**9)]


class Device(NamedTuple):
    """What a class of devices can train; None: as much as the method says.

    Attributes:
        rank: of the low-rank pairs.
        blocks: of each tower.
        epochs: local epochs.
    """

    rank: int | None = None
    blocks: int | None = None
    epochs: int | None = None

    def __str__(self) -> str:
        parts = [f"rank {self.rank}"] if self.rank else []
        parts += [counted(self.blocks, "block")] if self.blocks else []
        parts += [counted(self.epochs, "local epoch")] if self.epochs else []
        return ", ".join(parts)


@component
class Fleet(ABC):
    """The devices of K clients. Subclasses are components.

    Devices may be of several classes. The lists name one value for each class, in the same order.
    """

    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(split)] = Field(
        (), description="relative numbers of clients by class of devices, such as 5,3,2 (default: equal)"
    )
    ranks: Annotated[tuple[Positive, ...], BeforeValidator(split)] = Field(
        (), description="rank of LoRA pairs by class of devices (default: that of the method)"
    )
    blocks: Annotated[tuple[Positive, ...], BeforeValidator(split)] = Field(
        (), description="blocks of a tower that a client trains, by class of devices (default: all)"
    )
    epochs: Annotated[tuple[Positive, ...], BeforeValidator(split)] = Field(
        (), description="local epochs by class of devices (default: those of the method)"
    )

    instantaneous: ClassVar[bool] = False  # whether all work takes no time

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The classes of devices; one if no list is given.

        Raises:
            InputError: the lists do not have one value for each class.
        """
        lists = {name: getattr(self, name) for name in ("ranks", "blocks", "epochs") if getattr(self, name)}
        lengths = {f"fleet.{name}": len(values) for name, values in lists.items()}
        if self.shares:
            lengths["fleet.shares"] = len(self.shares)
        if len(set(lengths.values())) > 1:
            given = " and ".join(f"{length} in {name}" for name, length in lengths.items())
            raise InputError(f"a fleet needs one value for each class of devices in every list, got {given}")
        classes = range(max(lengths.values(), default=1))
        return tuple(
            Device(*(values[k] if values else None for values in (self.ranks, self.blocks, self.epochs)))
            for k in classes
        )

    def classes(self, clients: int, seed: int) -> np.ndarray | None:
        """(K,) int64, the class of each client's device, drawn once; None if there is one class.

        Each class has its share of the K clients, up to rounding; which these are is drawn.
        """
        return _classes(self.shares or (1.0,) * len(self.devices), clients, seed)

    def by_class(self, values: Sequence[int], clients: int, seed: int) -> np.ndarray:
        """(K,) of each client the value of its class of devices."""
        classes = self.classes(clients, seed)
        return np.broadcast_to(values[0], clients) if classes is None else np.asarray(values)[classes]

    @abstractmethod
    def costs(self, clients: int, rng: np.random.Generator) -> np.ndarray:
        """The cost of work for each client, drawn once.

        Returns:
            (K, 3) float64, seconds per train row, per byte down and per byte up. A client's costs do not depend on
            the number of clients after it.
        """

    def available(self, clients: int, rng: np.random.Generator) -> np.ndarray:
        """(K,) bool, whether each client is available in a round."""
        return np.ones(clients, bool)

    def outcomes(self, clients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For n clients and one request: (n,) float64, a factor on their time, and (n,) bool, whether they respond."""
        return np.ones(clients), np.ones(clients, bool)


@lru_cache(maxsize=4)
def _classes(shares: tuple[float, ...], clients: int, seed: int) -> np.ndarray | None:
    if len(shares) == 1:
        return None
    ends = np.round(clients * np.cumsum(shares) / np.sum(shares)).astype(np.int64)
    return numpy_rng(seed, "devices").permutation(np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0)))
