"""LoRA with a shared `down` and a private `up` in each pair (FedSA-LoRA).

Source: Guo et al. 2024, arXiv 2410.01463; the scopes are those of the authors' code, Pengxin-Guo/FedSA-LoRA, commit
fc276b5, federatedscope/llm/yamls/fedsa-lora.yaml.
"""

from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import require_lora


@component
class FedSALora(Averaging):
    """Averages `down` as FedAvg does.

    Differs: the mean is uniform by default; the code weights clients by their rows. A pair's rank, scale and training
    are those of method `lora`; the code trains language models, with rank 8, alpha 16 and dropout 0.05.
    """

    def adapt(self, method):
        return require_lora(self, method)

    def scope(self, name, scope):
        return "private" if name.startswith("up.") else scope
