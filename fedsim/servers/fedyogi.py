"""FedAdam with Yogi's additive second moment, so that one large delta does not stall all later steps (FedYogi).

Source: Reddi et al. 2021, arXiv 2003.00295 (FedOpt).
"""

from fedsim.registry import component
from fedsim.servers._adaptive import Adaptive


@component
class FedYogi(Adaptive):
    """Moves the second moment toward the squared mean delta by (1 - beta2) times that square."""

    def second_moment(self, past, delta):
        square = delta**2
        # It stays positive: it shrinks only while it is above the square, and by a fraction of the square.
        return past - (1 - self.beta2) * square * (past - square).sign()
