"""Server rules: what becomes of the clients' updates.

A rule is pure: parameters and slots in, parameters and slots out. A checkpoint can then forget nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from fedsim.methods import Method, Scope
from fedsim.params import Params, payload_bytes
from fedsim.registry import component
from fedsim.search import Field
from fedsim.updates import RoundSum

Slots = dict[str, Params]


@component
class Server(ABC):
    """A server rule, as hyperparameters. Subclasses are components."""

    # Whether clients come and go, and a round is one full buffer; such a rule says `buffer` and `concurrency`.
    asynchronous: ClassVar[bool] = False

    weighting: Literal["uniform", "rows"] = Field(
        "uniform",
        description="weight of a client in the mean: 1 (FedCLIP's code), or its train rows (FedAvg)",
    )

    # Whether `step` needs every client's delta (`RoundSum.each`), and not their sum alone.
    sees_each: ClassVar[bool] = False
    # Whether `step` moves tensors of scope `server`; to other rules a method with such is refused.
    moves_server: ClassVar[bool] = False

    def fit(self, method: Method) -> Method:
        """The method as this rule has it trained.

        Raises:
            InputError: the rule cannot be used with this method.
        """
        return method

    def check(self, params: Params, cohort: int) -> None:  # noqa: B027 - most rules take what comes
        """Looks at what is to be trained, before the first round.

        Args:
            params: the module's tensors in round 0 that are shared by the method's own word.
            cohort: clients of a round.

        Raises:
            InputError: the tensors are not of the kind that the rule speaks of, or the clients too few.
        """

    def scope(self, name: str, scope: Scope) -> Scope:
        """Who has the tensor of this name, for which the method says `scope`."""
        return scope

    def weight(self, rows: int, staleness: int = 0, steps: int = 1) -> float:
        """A client's weight in the mean.

        Args:
            rows: its train rows.
            staleness: rounds done since it was sent its parameters.
            steps: local steps that it took.
        """
        return float(rows) if self.weighting == "rows" else 1.0

    def local_term(self, params: Params, received: Params) -> Tensor | float:
        """What the rule adds to every client's loss.

        Args:
            params: what the client trains, shared and private; these carry gradients.
            received: the shared tensors among them as they came; constants.
        """
        return 0.0

    def sends(self, slots: Slots, params: Params) -> Params:
        """What each client is sent of the rule's memory; of the same names and shapes in every round.

        Args:
            slots: empty before the first step.
            params: the shared tensors.
        """
        return {}

    def start(self, shared: Params, seed: int) -> Params:
        """Those shared tensors from which a client starts its round, where they are not the ones that the server has.

        Args:
            shared: the shared tensors as the server has them, for their names and shapes.
            seed: another one for every client of every round; follows from the run's.
        """
        return {}

    def keeps(self, params: Params) -> Params:
        """What a client keeps for the rule before it has trained; `params` are the shared tensors."""
        return {}

    def correction(self, kept: Params, sent: Params) -> Params:
        """Constants that are added to each of a client's gradients, by name of the parameter."""
        return {}

    def settle(
        self, kept: Params, sent: Params, received: Params, trained: Params, steps: int, lr: float
    ) -> tuple[Params, Params]:
        """What a client keeps for the rule once it has trained, and its message, which is summed by weight.

        Args:
            kept, sent: of `keeps` (or of the last `settle`) and `sends`.
            received, trained: the shared tensors, as the server has them and as the client has trained them.
            steps: local steps that it took; 0 where it had too few rows.
        """
        return kept, {}

    def payload(self, shared: Params, server: Params, cohort: int) -> tuple[int, int]:
        """Bytes that a client is sent and sends.

        Args:
            shared, server: the tensors of these scopes.
            cohort: clients of the round.
        """
        return payload_bytes(shared) + payload_bytes(server), payload_bytes(shared)

    @abstractmethod
    def step(self, params: Params, slots: Slots, total: RoundSum) -> tuple[Params, Slots]:
        """The parameters of the next round, and the rule's memory; leaves its arguments alone.

        Args:
            params: the shared tensors, to which `total.delta` belongs; and, of a rule that moves them, those of scope
                `server`.
        """
