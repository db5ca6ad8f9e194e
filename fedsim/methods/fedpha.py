"""A shared and a private prompt of different lengths, with terms that pull and push their texts (FedPHA).

Source: Fang et al., ICML 2025, PMLR 267:15960; details as in the authors' code, CYFang6/FedPHA, commit 1ab33df
(trainers/GL_SVDMSE.py, federated_main.py).
Unread: the equations of the paper; only its abstract was read.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, relu

from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log


@component
class FedPHA(PromptMethod):
    """Defaults are those of the authors' program without flags, with configs/datasets/OfficeHome.yaml.

    Its 50 rounds of all clients, and averaging by rows, are set in the experiment. Its two weights of 1 are constants.

    A client predicts with its private prompt; the shared one enters by the loss. A singular value decomposition gives
    the directions of the shared prompt. The private prompt is projected onto the weakest of them, without all that is
    orthogonal to the shared prompt, and the texts of the result pull. Gradients pass through the decomposition, as in
    the code.

    Differs: the private prompts of all clients have one length. The code has a second program (GL_SVDMSE_HE.py) that
    reads a length for each client, 16 or 32 for Office-Home; here a tensor has the same shape on all clients.
    Differs: the code counts directions by a float that may be just below an integer: of 10 directions, it removes 1 in
    place of 2 at the default share.
    """

    private_length: int = Field(
        16, ge=1, le=4096, search=Choice((4, 8, 16, 32), when=("init", "")), description="tokens of the private prompt"
    )
    share: float = Field(
        0.8,
        gt=0,
        le=1,
        search=Linear(0.2, 1.0),
        description="fraction of the shared prompt's directions, the weakest, onto which the private one is projected",
    )
    pull: float = Field(
        1.0,
        ge=0,
        search=Log(0.01, 100.0),
        description="weight of the squared error between private and projected texts",
    )
    push: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of what private and shared texts lack of `margin`"
    )
    margin: float = Field(1.0, gt=0, le=2, search=Linear(0.2, 1.4), description="distance of unit texts, in [0, 2]")

    def build(self, backbone: Backbone) -> nn.Module:
        return _Projected(backbone, self)

    def loss(self, module: "_Projected", batch: Batch) -> Tensor:
        x, y, classes = batch.x, batch.y, batch.classes
        private, shared = module.texts(module.own, classes), module.texts(module.together, classes)
        pull = mse_loss(private, module.texts(module.projected(), classes))
        push = relu(self.margin - torch.linalg.vector_norm(private - shared, dim=-1)).mean()
        own, together = (cross_entropy(module.logits(x, texts, classes), y) for texts in (private, shared))
        return own + together + self.pull * pull + self.push * push

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Projected(Prompted):
    def __init__(self, backbone: Backbone, method: FedPHA) -> None:
        """
        Raises:
            InputError: tokens of the shared prompt depend on each other, so that some of its directions are arbitrary.
        """
        shared = method.initial_tokens(backbone.text)
        own = replace(method, length=method.private_length).initial_tokens(backbone.text)
        longer = len(own) > len(shared)
        flag = f"--method.private-length {len(own)}" if longer else method.length_flag(len(shared))
        super().__init__(backbone, max(len(own), len(shared)), flag)
        directions = min(shared.shape)
        if int(torch.linalg.matrix_rank(shared)) < directions:
            raise InputError(
                f"--method.init {method.init!r} has tokens that depend on each other, such as a word that occurs "
                "twice; the shared prompt of fedpha needs independent ones"
            )
        self.together, self.own = nn.Parameter(shared), nn.Parameter(own)
        # Rounded first: 10 * (1 - 0.8) is less than 2.
        self.removed = int(round(directions * (1 - method.share), 6))

    def projected(self) -> Tensor:
        """(l, W), the private tokens within the weakest directions of the shared ones."""
        directions = torch.linalg.svd(self.together, full_matrices=False).Vh[self.removed :]
        return self.own @ directions.mT @ directions

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.own, classes), classes)
