"""Adam on the server, with the mean delta in the gradient's place.

Source: Reddi et al. 2021, arXiv 2003.00295 (FedOpt).
"""

from fedsim.registry import component
from fedsim.servers._adaptive import Adaptive


@component
class FedAdam(Adaptive):
    """The second moment goes toward the squared delta by a share of the distance to it."""

    def second(self, past, delta):
        return self.beta2 * past + (1 - self.beta2) * delta**2
