"""KgCoOp: PromptFL whose class texts are held near those of the prompt that a person wrote.

Source: Yao et al. 2023, arXiv 2303.13283; among clients as in the code of FedTPG, boschresearch/FedTPG.
"""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.methods.promptfl import PromptFL
from fedsim.registry import component
from fedsim.search import Field, Linear


@component
class KgCoOp(PromptFL):
    """The weight is the paper's, the single local epoch that of FedTPG's code, and the rest is PromptFL's."""

    local_epochs: int = Field(1, ge=1, description="passes over a client's train rows in a round")
    pull: float = Field(
        8.0,
        ge=0,
        search=Linear(0.0, 10.0),
        description="weight of 1 - the mean cosine of learnt and written class texts",
    )

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        texts = module.texts(module.tokens)
        # Over the classes in question alone: the names of others are not a client's to know.
        cosines = (texts * module.prototypes[module.among()]).sum(dim=-1)
        return cross_entropy(module.logits(x, texts), y) + self.pull * (1 - cosines.mean())
