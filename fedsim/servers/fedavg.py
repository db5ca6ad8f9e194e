"""Federated averaging (FedAvg).

Source: McMahan et al. 2017, arXiv 1602.05629, of which no code was found: not checked against code.
"""

from fedsim.registry import component
from fedsim.servers import Averaging


@component
class FedAvg(Averaging):
    """The mean is uniform by default, as in FedCLIP's code; `weighting: rows` is the rule of the FedAvg paper."""
