"""A text prompt and a visual token for each domain; an image weighs the prompts by attention to the tokens (ADAPT).

Source: Wei et al. 2024, arXiv 2310.03103 (ADAPT, in earlier versions Fed-DPT), as a review of its submission to ICLR
2024 describes it. No authors' code was found: not checked against code.
Unread: the paper, beyond its abstract; so which attention gives the weights, and all values of training.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear, normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Batch, ClientContext
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class Adapt(PromptMethod):
    """Its server is `domain_prompts`, which moves the prompt of a domain by the clients of that domain alone.

    The tokens are next to the patches at the input of the image tower. In its last block, the scores of the class token
    for them, divided by `temperature`, become the weights of the domains by a softmax. A class's text is the sum of its
    texts behind the domains' prompts with these weights. Clients train all visual tokens and the prompt of their
    domain; if their rows are of several domains, all prompts.

    16 tokens, AdamW and the cosine of images and the texts of their classes as the objective are those of the review.

    Unread: how the heads of the attention are combined; here their scores are averaged, with the block's own scale.
    Unread: step size, weight decay, batch size and epochs; here they are those of `promptfl`'s base.
    Differs: held-out domains have a prompt and a token too. No client trains that prompt; under `domain_prompts` it is
    the mean of the others.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, search=Log(1e-5, 1e-2))
    objective: Literal["cosine", "cross_entropy"] = Field(
        "cosine",
        search=Choice(("cosine", "cross_entropy")),
        description="1 - cosine of an image and the text of its class, or cross-entropy over the classes",
    )
    temperature: float = Field(
        1.0, gt=0, search=Log(0.01, 10.0), description="of the softmax over domains; near 0, an image gets one prompt"
    )

    reads_client = True
    reads_rule = True
    changes_gradients = True  # the prompts of other domains have none

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Domains(backbone, self)

    def loss(self, module: "_Domains", batch: Batch) -> Tensor:
        sent = batch.rule.sent if batch.rule else {}
        own = module.trained_by(batch.client)[:, None, None]
        tokens = torch.where(own, module.tokens, sent.get("others", module.tokens).detach())
        if self.objective == "cross_entropy":
            return cross_entropy(module.classify(batch.x, tokens, batch.classes), batch.y)
        # Only the classes in the batch are encoded: texts dominate the cost of a step.
        present, y = batch.y.unique(return_inverse=True)
        images, weights = module.read(batch.x)
        texts = module.domain_texts(tokens, torch.isin(torch.arange(len(module.ends), device=y.device), present))
        return 1 - cosine_similarity(images, torch.einsum("bk,kbd->bd", weights, texts[:, y]), dim=-1).mean()


class _Domains(Prompted):
    def __init__(self, backbone: Backbone, method: Adapt) -> None:
        tokens = torch.stack([method.initial_tokens(backbone.text) for _ in range(backbone.domains)])
        super().__init__(backbone, tokens.shape[1], method.length_flag(tokens.shape[1]))
        self.image_tower, self.temperature = backbone.image, method.temperature
        self.tokens = nn.Parameter(tokens)  # (K, L, W), of K domains
        self.visual = nn.Parameter(torch.empty(backbone.domains, backbone.image.width).normal_(std=0.02))

    def trained_by(self, client: ClientContext | None) -> Tensor:
        """(K,) bool, the domains whose prompts the client trains."""
        domains = torch.arange(len(self.tokens), device=self.tokens.device)
        return domains >= 0 if client is None else (domains == client.domain) | (client.domain < 0)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, D) image features and (B, K) weights of the domains."""
        scores: list[Tensor] = []

        def watch(block: Any, before: Tensor, after: Tensor) -> Tensor:
            scores.append(attention_scores(block, before, len(self.visual)))
            return after

        insertions = Insertions(self.visual[None], {self.image_tower.depth - 1: watch})
        features = self.image_tower.encode(x, insertions=insertions)
        return features, (scores[0].to(features.dtype) / self.temperature).softmax(dim=-1)

    def domain_texts(self, tokens: Tensor, classes: Tensor | None = None) -> Tensor:
        """(K, L, W) prompts -> (K, n, D) unit rows, the text features of the n active classes in each domain."""
        return torch.stack([self.texts(prompt, classes) for prompt in tokens])

    def classify(self, x: Tensor, tokens: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) and (K, L, W) prompts -> (B, C) logits."""
        images, weights = self.read(x)
        texts = normalize(torch.einsum("bk,knd->bnd", weights, self.domain_texts(tokens, classes)), dim=-1)
        return self.spread(self.scale * torch.einsum("bd,bnd->bn", normalize(images, dim=-1), texts), classes)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        return self.classify(x, self.tokens, classes)


def attention_scores(block: Any, x: Tensor, count: int) -> Tensor:
    """(B, T, W), what a block reads -> (B, count) scores of the first token for the last ones, averaged over heads."""
    attention, width = block.attn, x.shape[-1]
    weight, bias = attention.in_proj_weight[: 2 * width], attention.in_proj_bias[: 2 * width]
    query = linear(block.ln_1(x[:, 0]), weight[:width], bias[:width])
    keys = linear(block.ln_1(x[:, -count:]), weight[width:], bias[width:])
    # Products of all heads at once: their mean is the sum over the width, divided by the number of heads.
    heads = attention.num_heads
    return torch.einsum("bw,bkw->bk", query, keys) / (heads * (width / heads) ** 0.5)
