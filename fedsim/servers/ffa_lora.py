"""Every client keeps the same random `down` of each pair, and trains and sends `up` alone.

The product is then linear in what travels, so that the mean is exact; about half as much travels.

Source: Sun et al. 2024, arXiv 2403.12313 (FFA-LoRA). No code of these authors was found; checked against two by others:
Pengxin-Guo/FedSA-LoRA, commit fc276b5 (`freeze_A`), and RaghavSinghal10/fedex-lora, commit 683a3f3, fed_agg.py.
"""

from fedsim.registry import component
from fedsim.servers import Server
from fedsim.servers._lora import wants_lora
from fedsim.updates import apply_update, mean_delta


@component
class FfaLora(Server):
    """FedAvg of `up`. No hyperparameters of its own."""

    def fit(self, method):
        wants_lora(self, method)
        return method

    def scope(self, name, scope):
        return "frozen" if name.startswith("down.") else scope

    def step(self, params, slots, total):
        return apply_update(params, mean_delta(total, params)), slots
