"""Adam on the server, with the mean delta as the gradient (FedAdam).

Source: Reddi et al. 2021, arXiv 2003.00295 (FedOpt).
"""

from fedsim.registry import component
from fedsim.servers._adaptive import Adaptive


@component
class FedAdam(Adaptive):
    """Updates the second moment as an exponential moving average of the squared mean delta."""

    def second_moment(self, past, delta):
        return self.beta2 * past + (1 - self.beta2) * delta**2
