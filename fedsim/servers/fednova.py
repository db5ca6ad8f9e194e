"""FedAvg in which a client counts by its direction, and not also by how many steps it took along it.

Source: Wang et al. 2020, arXiv 2007.07481; effective steps as in the authors' code, JYWa/FedNova, commit 47b4e09,
distoptim/FedNova.py, whose program has no momentum by default and 0.9 in its launch script.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search import Field
from fedsim.servers import Server
from fedsim.updates import apply_update


@component
class FedNova(Server):
    """A delta is divided by its client's own effective steps, and the mean multiplied with the mean of these.

    Differs: the paper weighs a client by its rows, here `weighting: rows`; uniform is the default, as of all rules.
    Differs: the paper has no Adam; its effective steps are here its steps, as of plain sgd.
    """

    momentum: float = Field(0.0, ge=0, lt=1, description="of the clients' sgd, the same as the method's")

    def fit(self, method):
        theirs = method.momentum if method.optimizer == "sgd" else 0.0
        if theirs != self.momentum:
            raise InputError(
                f"fednova counts steps by the momentum of the clients' sgd, {theirs:g} with this method, "
                f"not {self.momentum:g}; set --server.momentum {theirs:g}"
            )
        if theirs and method.keep_moments:
            raise InputError(
                "fednova counts steps of a momentum that starts afresh in every round; set --method.keep-moments false"
            )
        return method

    def weight(self, rows, staleness=0, steps=1):
        # Who took no step has no direction, and is left out.
        return super().weight(rows) / self._effective(steps) if steps else 0.0

    def step(self, params, slots, total):
        notes = total.clients[total.clients["steps"] > 0]
        if not len(notes):
            return params, slots
        shares = notes["rows"].astype(float) if self.weighting == "rows" else np.ones(len(notes))
        shares /= shares.sum()
        effective = shares @ [self._effective(steps) for steps in notes["steps"].tolist()]
        # Over all weights, and not `total.weight`, which is the sum of weights that are divided already.
        whole = float(notes["rows"].sum()) if self.weighting == "rows" else len(notes)
        return apply_update(params, unflatten(effective / whole * total.delta, params)), slots

    def _effective(self, steps: int) -> float:
        """How often a gradient that is the same at each of these steps would be in their sum."""
        kept = self.momentum
        return (steps - kept * (1 - kept**steps) / (1 - kept)) / (1 - kept)
