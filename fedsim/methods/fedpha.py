"""A shared and a private prompt of different lengths, with terms that pull and push their texts (FedPHA).

Source: Fang et al., ICML 2025, PMLR 267:15960; details as in the authors' code, CYFang6/FedPHA, commit 1ab33df
(trainers/GL_SVDMSE.py, federated_main.py).
Unread: the equations of the paper; only its abstract was read.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, relu

from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, ClientContext, Scope
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

    The code has a second trainer, GL_SVDMSE_HE.py, whose clients have private prompts of different lengths: listed, 16
    or 32 tokens for Office-Home, or drawn, 4 to 32 for CIFAR. Here `spread` does this, for clients in turn: the latter
    is about `--method.private-length 4 --method.spread 28`. Clients of different lengths are not stacked.

    Differs: the code counts directions by a float that may be just below an integer: of 10 directions, it removes 1 in
    place of 2 at the default share.
    """

    private_length: int = Field(
        16, ge=1, le=4096, search=Choice((4, 8, 16, 32)), description="tokens of the private prompt, random at first"
    )
    spread: int = Field(
        0, ge=0, le=4096, description="client k has k mod (spread + 1) private tokens more than `private_length`"
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

    reads_client = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("conditional_tokens",) if self.spread else ("text_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Projected(backbone, self)

    def loss(self, module: "_Projected", batch: Batch) -> Tensor:
        x, y, classes = batch.x, batch.y, batch.classes
        tokens = self.private_tokens(module, batch.client)
        private, shared = module.texts(tokens, classes), module.texts(module.together, classes)
        pull = mse_loss(private, module.texts(module.projected(tokens), classes))
        push = relu(self.margin - torch.linalg.vector_norm(private - shared, dim=-1)).mean()
        own, together = (cross_entropy(module.logits(x, texts, classes), y) for texts in (private, shared))
        return own + together + self.pull * pull + self.push * push

    def logits(
        self, module: "_Projected", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return module.logits(x, module.texts(self.private_tokens(module, client), classes), classes)

    def private_tokens(self, module: "_Projected", client: ClientContext | None) -> Tensor:
        """(l, W) the private tokens of a client; of none, all that there are."""
        if not self.spread or client is None or client.id is None:
            return module.own
        return module.own[: self.private_length + int(client.id) % (self.spread + 1)]

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Projected(Prompted):
    def __init__(self, backbone: Backbone, method: FedPHA) -> None:
        """
        Raises:
            InputError: tokens of the shared prompt depend on each other, so that some of its directions are arbitrary.
        """
        shared = method.initial_tokens(backbone.text)
        random = replace(method, init="", length=method.private_length + method.spread)
        own = random.initial_tokens(backbone.text)
        longer = len(own) > len(shared)
        added = f" with --method.spread {method.spread}" if method.spread else ""
        flag = f"--method.private-length {method.private_length}{added}" if longer else method.length_flag(len(shared))
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

    def projected(self, tokens: Tensor) -> Tensor:
        """(l, W) tokens -> (l, W), within the weakest directions of the shared ones."""
        directions = torch.linalg.svd(self.together, full_matrices=False).Vh[self.removed :]
        return tokens @ directions.mT @ directions

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.own, classes), classes)
