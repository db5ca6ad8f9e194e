"""A prompt per class, scaled by a fixed random key per domain; a linear layer recognizes an image's domain (FedAPT).

Source: Su et al., AAAI 2024, arXiv 2211.07864; details as in the authors' code, leondada/FedAPT, commit 2f8060a.
Unread: the equations of the paper; only its abstract and introduction were read.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Batch, ClientContext, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedAPT(PromptMethod):
    """Defaults are those of the authors' program for supervised training, supervised/prompt-ours.py.

    Its 50 rounds of all clients, one per domain, and uniform averaging are set in the experiment. With five clients per
    domain (supervised/prompt-ours-device.py), the length is 16. Both programs ignore their `--learning_rate`; the step
    size is 0.01.

    A client trains the prompts with the key of its domain, and the layer with its domain as the label. If its rows are
    of several domains, each counts as equally likely: the key is their mean. The tokens of classes that no client
    trains remain random.

    Differs: the program combines the keys for each test image and encodes all class texts with the result. Here the
    texts are encoded once with the key of each domain, and the logits are combined: the same if one weight is 1, as
    nearly all are at the default temperature, and cheaper by the number of images per domain.
    Differs: held-out domains have keys too. No client is of such a domain, so images are not recognized as of it.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(1e-2, search=Log(1e-3, 1.0))
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = Field(256, search=Choice((32, 64, 128, 256)))
    length: int = Field(24, search=Choice((4, 8, 16, 24), when=("init", "")))
    temperature: float = Field(
        0.01, gt=0, search=Log(1e-3, 1.0), description="of the softmax over domains; near 0, an image gets one key"
    )

    reads_client = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("conditional_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Keyed(backbone, self)

    def loss(self, module: "_Keyed", batch: Batch) -> Tensor:
        shares = module.domain_shares(batch.client)
        key = torch.tensordot(shares, module.keys, dims=1)
        logits = module.logits(batch.x, module.keyed_texts(key, batch.classes), batch.classes)
        return cross_entropy(logits, batch.y) + cross_entropy(module.query(batch.x), shares.expand(len(batch.y), -1))

    def scope(self, name: str) -> Scope:
        return "frozen" if name == "keys" else "shared"


class _Keyed(Prompted):
    """`tokens` are (C, L, W)."""

    keys: Tensor  # (K, L, W), of K domains

    def __init__(self, backbone: Backbone, method: FedAPT) -> None:
        length = len(method.initial_tokens(backbone.text))
        super().__init__(backbone, length, method.length_flag(length))
        self.tokens = nn.Parameter(torch.stack([method.initial_tokens(self.tower) for _ in backbone.classes]))
        self.query = nn.Linear(backbone.width, backbone.domains, bias=False)
        self.register_buffer("keys", torch.rand(backbone.domains, *self.tokens.shape[1:]))
        self.temperature = method.temperature

    def domain_shares(self, client: ClientContext | None) -> Tensor:
        """(K,) 1 for the domain of the client; equal shares if its rows are of several."""
        domains = len(self.keys)
        if client is None or client.domain < 0:
            return self.keys.new_full((domains,), 1 / domains)
        return (torch.arange(domains, device=self.keys.device) == client.domain).to(self.keys.dtype)

    def keyed_texts(self, key: Tensor, classes: Tensor | None = None) -> Tensor:
        """(L, W) key -> (n, D) unit rows, the text features of the n active classes."""
        active = self.active(classes)
        names, tokens = self.names[active], self.tokens[active]
        texts = torch.cat([names[:, :1], tokens + tokens * key, names[:, 1:]], dim=1)
        start = texts.new_empty(0, self.tower.width)  # the texts have no more in common than their first token
        return normalize(self.tower.encode_after(start, texts, self.ends[active] + tokens.shape[1]), dim=-1)

    def weights(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K), the weight of each domain's key: a softmax of standardized scores."""
        scores = self.query(x)
        # A standard deviation is the length of the centred vector, divided by the root of K - 1. Of one domain it is 0.
        standardized = normalize(scores - scores.mean(dim=-1, keepdim=True), dim=-1) * (len(self.keys) - 1) ** 0.5
        return (standardized / self.temperature).softmax(dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        texts = torch.stack([self.keyed_texts(key, classes) for key in self.keys])  # (K, n, D)
        cosines = normalize(x, dim=-1) @ texts.mT
        return self.spread(self.scale * (self.weights(x).mT[:, :, None] * cosines).sum(dim=0), classes)
