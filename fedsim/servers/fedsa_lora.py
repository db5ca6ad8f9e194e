"""Clients share `down` of each pair, which learns what is common, and keep `up`, which learns what is theirs.

Source: Guo et al. 2024, arXiv 2410.01463; who has which half as in the authors' code, Pengxin-Guo/FedSA-LoRA, commit
fc276b5, federatedscope/llm/yamls/fedsa-lora.yaml.
"""

from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import require_lora


@component
class FedSALora(Averaging):
    """FedAvg of `down`. No hyperparameters of its own.

    Differs: uniform is the default, as of all rules; the code weights clients by their rows. A pair's rank, scale and
    training are those of method `lora`; the code trains language models, with rank 8, alpha 16 and dropout 0.05.
    """

    def adapt(self, method):
        require_lora(self, method)
        return method

    def scope(self, name, scope):
        return "private" if name.startswith("up.") else scope
