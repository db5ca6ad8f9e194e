"""PromptFolio: a class's text is a mixture of one behind tokens that all learn and one behind a client's own.

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
    """Defaults are those of the authors' program as its README runs it.

    That is federated_main.py with configs/trainers/PromptFolio/vit_b16.yaml, which is laid over the command line: the
    file's step size 2e-3 and 5 local epochs count, and not the 1e-3 and 1 that the command line shows. Its 10 rounds
    and 10 clients, and averaging by rows, are the experiment's.

    Differs: the step size is constant, see `PromptMethod`; there 2e-3 is the highest.
    """

    lr: float = 2e-3
    local_epochs: int = 5
    batch_size: int = 16
    length: int = 8
    theta: float = Field(
        0.4, ge=0, le=1, search=Linear(0.0, 1.0), description="share of a client's own text; 0 is PromptFL"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Folio(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Folio(Prompted):
    def __init__(self, backbone: Backbone, method: PromptFolio) -> None:
        tokens = method.start(backbone.text)
        super().__init__(backbone, len(tokens), method.asked(len(tokens)))
        self.together, self.own = nn.Parameter(tokens), nn.Parameter(method.start(backbone.text))
        self.theta = method.theta

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        # Each of unit length before they are mixed, and the mixture as long as it comes.
        mixed = (1 - self.theta) * self.texts(self.together, classes) + self.theta * self.texts(self.own, classes)
        return self.logits(x, mixed, classes)
