"""Several prompts, to whose texts the patches of an image are transported (PLOT), averaged over clients.

Source: Chen et al., ICLR 2023, arXiv 2210.01253; details as in the authors' code, CHENGY12/PLOT, commit 728539f
(plot-coop/trainers/plot.py). Federated in the code of FLIP, 0-ml/flip, commit ec3a848.
"""

import torch
from torch import Tensor, nn

from fedsim.methods import Backbone, Schedule
from fedsim.methods._transport import Transported, TransportMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class PLOT(TransportMethod):
    """Defaults are those of the authors' script with four prompts, with one of its epochs in each round.

    The script is plot-coop/scripts/main.sh with configs/trainers/PLOT/rn50.yaml.

    Differs: the code reads the positions of a ResNet's last feature map, here the patches of a ViT, as FedOTP does; for
    ViTs, the authors have PLOT++, which also trains tokens in the image tower. For ImageNet, the code adds the logits
    of the mean text and the whole image. It computes in half precision, and a kernel that underflows ends the program;
    here the plan is in float64. The cosine starts at the full step size, without the code's first epoch at 1e-5.
    Unread: the paper, beyond its abstract.
    """

    lr: float = 2e-3
    schedule: Schedule = "cosine"
    batch_size: int = Field(128, search=Choice((16, 32, 64, 128)))
    prompts: int = Field(4, ge=1, le=1024, search=Choice((2, 4, 8)), description="learned prompts")
    tolerance: float = 1e-2

    def build(self, backbone: Backbone) -> nn.Module:
        return _Transported(backbone, self)


class _Transported(Transported):
    def __init__(self, backbone: Backbone, method: PLOT) -> None:
        tokens = method.several_tokens(backbone.text, method.prompts)
        super().__init__(backbone, tokens.shape[1], method)
        self.tokens = nn.Parameter(tokens)  # (K, L, W)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, T, D) -> (B, C)
        texts = torch.stack([self.texts(tokens, classes) for tokens in self.tokens], dim=1)
        return self.transported(x, texts, classes)
