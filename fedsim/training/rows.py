"""What the clients of a stack train on, and what a server rule gives them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.methods import Batch, ClientContext, RuleContext
from fedsim.params import Params
from fedsim.training.inputs import Inputs
from fedsim.training.targets import Targets


@dataclass(frozen=True)
class TrainRows:
    """The train rows of M clients, and what a loss reads with them.

    Attributes:
        x, y: (N, ...) inputs and (N,) classes of all clients' rows, client by client.
        sizes: rows of each client; descending for `train_stack`.
        classes: (M, C) bool, the classes that compete in each client's loss; None: all.
        client: the M clients, for methods that read them.
        targets: of the M clients, for methods that read rows of held-out domains.
        group: (N,) the rows' groups, for methods that read them.
    """

    x: Tensor | Inputs
    y: Tensor
    sizes: list[int]
    classes: Tensor | None = None
    client: ClientContext | None = None
    targets: Targets | None = None
    group: Tensor | None = None

    def batch(self, index: Tensor, first: int, last: int, rule: RuleContext | None = None) -> Batch:
        """That of the clients from `first` to before `last`; every tensor has their dimension first.

        Args:
            index: (last - first, B) positions among all rows.
        """
        classes = None if self.classes is None else self.classes[first:last]
        client = self.client and self.client.part(slice(first, last))
        target = self.targets and self.targets.take(index.shape[1], first, last)
        return Batch(self.x[index], self.y[index], classes, client, target, rule, self._groups(index))

    def batch_of_one(self, index: Tensor, k: int = 0, rule: RuleContext | None = None) -> Batch:
        """That of the k-th client alone, as `Method.loss` takes it.

        Args:
            index: (B,) positions among all rows.
        """
        classes, client = None if self.classes is None else self.classes[k], self.client and self.client.part(k)
        target = self.targets and self.targets.take(len(index), k, k + 1)[0]
        return Batch(self.x[index], self.y[index], classes, client, target, rule, self._groups(index))

    def _groups(self, index: Tensor) -> Tensor | None:
        return None if self.group is None else self.group[index]


@dataclass(frozen=True)
class RuleInputs:
    """What a server rule gives M clients besides the parameters that they train.

    Attributes:
        shared: (*shape) each, the tensors with which all of them start alike.
        unicast: (M, *shape) each, the shared tensors of which each was sent its own or a part, as received.
        states: each client's memory for the rule.
        sent: what the rule sends besides the parameters.
        held: of each client, which entries of a tensor it has, where that is not all; the others have no gradient.
    """

    shared: Params
    unicast: Params = field(default_factory=dict)
    states: Sequence[Params] = ({},)
    sent: Params = field(default_factory=dict)
    held: Sequence[Params] = ()

    def stacked_held(self, params: Params) -> Params:
        """(M, *shape) bool each, of the tensors of which a client does not have all."""
        shapes = {name: params[name].shape[1:] for masks in self.held for name in masks}
        full = {name: torch.ones((), dtype=torch.bool, device=params[name].device) for name in shapes}
        return {name: torch.stack([m.get(name, full[name]).expand(s) for m in self.held]) for name, s in shapes.items()}
