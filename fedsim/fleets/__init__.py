"""Fleets: the devices of clients; how long they take, when they are available, and whether they respond.

All times are simulated: nothing sleeps, and no result depends on the speed of the machine.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np


class Fleet(ABC):
    """The devices of K clients. Subclasses are components."""

    instantaneous: ClassVar[bool] = False  # whether all work takes no time

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
