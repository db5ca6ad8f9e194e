"""A bias for each class on top of zero-shot CLIP.

Source: ours.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim import Backbone, Method, component


@component
class Bias(Method):
    """One number for each class, added to zero-shot CLIP's logits."""

    lr: float = 0.1  # keeps the limits, the search range and the description that Method declares

    def build(self, backbone: Backbone) -> nn.Module:
        return _Biased(backbone)


class _Biased(nn.Module):
    text: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(backbone.class_embeddings)))  # trained, sent and averaged
        self.register_buffer("text", backbone.class_embeddings, persistent=False)  # (C, D), never sent
        self.scale = backbone.logit_scale

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D), (C,) active -> (B, C)
        return self.scale * normalize(x, dim=-1) @ self.text.T + self.bias


if __name__ == "__main__":
    from fedsim import Config, run

    report = run(Config(method=Bias(lr=0.3), held_out=("ink",), rounds=5, out="runs/bias"))
    print(report.summary())
