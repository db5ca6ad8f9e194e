"""Every client keeps the same random `down` of each pair, and trains and sends `up` alone.

The product is then linear in what travels, so that the mean is exact; about half as much travels.

Source: Sun et al. 2024, arXiv 2403.12313 (FFA-LoRA). No code of these authors was found; checked against two by others:
Pengxin-Guo/FedSA-LoRA, commit fc276b5 (`freeze_A`), and RaghavSinghal10/fedex-lora, commit 683a3f3, fed_agg.py.
"""

from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import require_lora


@component
class FfaLora(Averaging):
    """FedAvg of `up`. No hyperparameters of its own."""

    def adapt(self, method):
        require_lora(self, method)
        return method

    def scope(self, name, scope):
        return "frozen" if name.startswith("down.") else scope
