"""Clients share `down` of each pair, which learns what is common, and keep `up`, which learns what is theirs.

Source: Guo et al. 2024, arXiv 2410.01463 (FedSA-LoRA).
"""

from fedsim.registry import component
from fedsim.servers import Server, mean_delta, moved
from fedsim.servers._lora import wants_lora


@component
class FedSALora(Server):
    """FedAvg of `down`. No hyperparameters of its own."""

    def fit(self, method):
        wants_lora(self, method)
        return method

    def scope(self, name, scope):
        return "private" if name.startswith("up.") else scope

    def step(self, params, slots, total):
        return moved(params, mean_delta(total, params)), slots
