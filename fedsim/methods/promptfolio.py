"""A shared and a private prompt whose text features are mixed (PromptFolio).

Source: Pan et al., NeurIPS 2024, arXiv 2409.19610; details as in the authors' code, PanBikang/PromptFolio, commit
8f729aa.
"""

from torch import Tensor, nn

from fedsim.methods import Backbone, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Field, Linear


@component
class PromptFolio(PromptMethod):
    """Defaults are those of the authors' program as run by its README.

    The program is federated_main.py with configs/trainers/PromptFolio/vit_b16.yaml, which overrides the command line:
    the file's step size 2e-3 and 5 local epochs apply, not the 1e-3 and 1 of the command line. Its 10 rounds and 10
    clients, and averaging by rows, are set in the experiment.

    Differs: the code's step size oscillates from one local epoch to the next, see `PromptMethod`; 2e-3 is its maximum.
    """

    lr: float = 2e-3
    local_epochs: int = 5
    batch_size: int = 16
    length: int = 8
    theta: float = Field(
        0.4, ge=0, le=1, search=Linear(0.0, 1.0), description="weight of the private text; 0 is PromptFL"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Folio(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Folio(Prompted):
    def __init__(self, backbone: Backbone, method: PromptFolio) -> None:
        tokens = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(tokens), method.length_flag(len(tokens)))
        self.together, self.own = nn.Parameter(tokens), nn.Parameter(method.initial_tokens(backbone.text))
        self.theta = method.theta

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        # Both have unit length before they are mixed; the mixture is not normalised.
        mixed = (1 - self.theta) * self.texts(self.together, classes) + self.theta * self.texts(self.own, classes)
        return self.logits(x, mixed, classes)
