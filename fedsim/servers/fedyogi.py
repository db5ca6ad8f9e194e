"""FedAdam whose second moment moves by a step of bounded size, so that one large delta does not end all later steps.

Source: Reddi et al. 2021, arXiv 2003.00295 (FedOpt).
"""

from fedsim.registry import component
from fedsim.servers._adaptive import Adaptive


@component
class FedYogi(Adaptive):
    """The second moment goes toward the squared delta by a share of that square, not of the distance to it."""

    def second(self, past, delta):
        square = delta**2
        # Never below zero: where it shrinks, it is above the square, of which it loses a share.
        return past - (1 - self.beta2) * square * (past - square).sign()
