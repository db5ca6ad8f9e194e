"""Federated prompt learning with one shared prompt for all classes (PromptFL).

Source: Guo et al. 2022, arXiv 2208.11625; details as in the authors' code, PEILab-Federated-Learning/PromptFL, commit
da401e7. The prompt is CoOp's, Zhou et al. 2022, arXiv 2109.01134: the same tokens for all classes, then the name.
"""

from torch import Tensor, nn

from fedsim.methods import Backbone
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component


@component
class PromptFL(PromptMethod):
    """Defaults are those of the authors' script, with 16 tokens as in its README.

    The script is scripts/main_pipeline.sh (64 clients, 20 rounds) with configs/trainers/CoOp/vit_b16_ep50.yaml. Its
    averaging is uniform.

    Differs: the code's step size oscillates from one local epoch to the next, see `PromptMethod`. We read the code but
    did not run it, since two modules that it imports were not published. As published, it averages references to a
    single model, so a round ends with what its last client has trained; here it ends with the mean.
    """

    local_epochs: int = 5

    def build(self, backbone: Backbone) -> nn.Module:
        return _Prompt(backbone, self)


class _Prompt(Prompted):
    def __init__(self, backbone: Backbone, method: PromptMethod) -> None:
        tokens = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(tokens), method.length_flag(len(tokens)))
        self.tokens = nn.Parameter(tokens)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens, classes), classes)
