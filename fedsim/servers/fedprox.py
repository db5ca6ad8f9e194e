"""Federated averaging with a proximal term (FedProx).

Source: Li et al. 2020, arXiv 1812.06127, which tunes mu over 0.001, 0.01, 0.1 and 1; so does the authors' code,
litian96/FedProx, commit d2a4501, with 0.5 among them, and says that no value suits all data. Its default is 0.
"""

from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging


@component
class FedProx(Averaging):
    """Adds mu/2 times the squared distance to the received parameters to each client's loss.

    Differs: the mean is uniform by default; the code weights clients by their rows. mu 0.01 is ours.
    """

    mu: float = Field(0.01, ge=0, search=Log(1e-3, 1.0), description="weight of the proximal term; 0 is FedAvg")

    def gradient(self, params, received, client_state, sent):
        return {name: self.mu * (params[name] - received[name]) for name in received}
