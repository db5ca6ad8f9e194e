"""LoRA with a frozen random `down`, where clients train and send only `up` (FFA-LoRA).

The product is then linear in what is averaged, so the mean is exact, with about half the traffic.

Source: Sun et al. 2024, arXiv 2403.12313 (FFA-LoRA). No code of these authors was found; checked against two by others:
Pengxin-Guo/FedSA-LoRA, commit fc276b5 (`freeze_A`), and RaghavSinghal10/fedex-lora, commit 683a3f3, fed_agg.py.
"""

from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import require_lora


@component
class FfaLora(Averaging):
    """Averages `up` as FedAvg does."""

    def adapt(self, method):
        return require_lora(self, method)

    def scope(self, name, scope):
        return "frozen" if name.startswith("down.") else scope
