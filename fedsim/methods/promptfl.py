"""PromptFL: clients learn the tokens before every class's name together, and nothing else.

Source: Guo et al. 2022, arXiv 2208.11625; the prompt is CoOp's, Zhou et al. 2022, arXiv 2109.01134: the same tokens
for all classes, the name last.
"""

from torch import Tensor, nn

from fedsim.methods import Backbone
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search import Field


@component
class PromptFL(PromptMethod):
    """Defaults are those of the authors' code; its 20 rounds are the experiment's."""

    local_epochs: int = Field(5, ge=1, description="passes over a client's train rows in a round")

    def build(self, backbone: Backbone) -> nn.Module:
        return _Prompt(backbone, self)


class _Prompt(Prompted):
    def __init__(self, backbone: Backbone, method: PromptMethod) -> None:
        tokens = method.start(backbone.text)
        super().__init__(backbone, len(tokens), method.asked(len(tokens)))
        self.tokens = nn.Parameter(tokens)

    def forward(self, x: Tensor) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens))
