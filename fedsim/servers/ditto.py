"""FedAvg plus a personal model per client, pulled toward the received shared model (Ditto).

Source: Li et al. 2021, arXiv 2012.04221; lam and the mean as in the authors' code, litian96/ditto, commit 26d9b29.
"""

from torch import Tensor

from fedsim.methods import Batch
from fedsim.methods._halves import HALVES, Halves, Pair
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging


@component
class Ditto(Averaging):
    """Personal models stay with their clients and are the ones evaluated, on held-out domains too.

    As in the code (flearn/trainers_MTL/ditto.py), both models of a client train on the same batches, and the mean is
    uniform. lam 1 is that of its scripts; the program's default is 0, and on request it chooses among 0.1, 1 and 2 for
    each client, on validation rows.

    Differs: the code takes a fixed number of local steps per round (1 or 2 in its scripts); here it is `local_epochs`.
    """

    lam: float = Field(
        1.0,
        ge=0,
        search=Log(0.01, 10.0),
        description="weight of the pull, tuned in the paper; 0: personal models train independently",
    )

    def adapt(self, method):
        return _Twins.of(method)

    def gradient(self, params, received, client_state, sent):
        pairs = {f"own.{name.removeprefix('shared.')}": tensor for name, tensor in received.items()}
        return {name: self.lam * (params[name] - tensor) for name, tensor in pairs.items()}


@component
class _Twins(Halves):
    """Two copies of a method with independent losses; the recorded loss is their sum."""

    def loss(self, module: Pair, batch: Batch) -> Tensor:
        return self.inner_loss(module.shared, batch) + self.inner_loss(module.own, batch)

    def closed_form(self, module: Pair, params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """The closed form of each half, if the inner method has one."""
        losses, grads = [], {}
        for half in HALVES:
            tensors = {name.removeprefix(f"{half}."): v for name, v in params.items() if name.startswith(f"{half}.")}
            closed = self.inner.closed_form(getattr(module, half), tensors, batch)
            if closed is None:
                return None
            losses.append(closed[0])
            grads |= {f"{half}.{name}": grad for name, grad in closed[1].items()}
        return losses[0] + losses[1], grads
