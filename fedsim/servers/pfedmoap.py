"""Prompts of other clients as frozen experts next to a client's own prompt, weighed by a private gate (pFedMoAP).

Source: Luo et al., ICLR 2025, arXiv 2410.10114; details as in the authors' code, ljaiverson/pFedMoAP, commit a481de3,
federated_main.py and trainers/pfedmoap.py.

Unread: the paper beyond its abstract.
"""

from dataclasses import fields
from typing import Literal

import numpy as np
import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.memo import Memo
from fedsim.errors import InputError
from fedsim.methods import Backbone
from fedsim.methods._prompt import Prompted
from fedsim.methods.promptfl import PromptFL
from fedsim.registry import component, name_of
from fedsim.search_space import Choice, Field, Linear, Log
from fedsim.servers import Averaging

MAX_SCORES = 1 << 22  # of the gate at once: 16 MB in float32


@component
class PFedMoAP(Averaging):
    """Needs method promptfl. A client is sent the mean prompt, from which it trains, and the prompts of other clients.

    These are the `experts` prompts that are nearest to the one that the client last sent. In its first round a client
    has none and trains as with PromptFL; with fewer other prompts than `experts`, zeros are sent instead, and counted.
    The gate attends from the image to the texts of all prompts. It stays with the client, as does the trained prompt. A
    client is evaluated with them and with the experts that it last received, on held-out domains too; a client that has
    not trained yet, with the mean prompt.

    Defaults are those of the authors' program, whose mean is by rows. Its script, train.sh, trains the prompt with a
    step size of 2e-3 and a batch size of 16. The operations that are reported are those of a step without experts,
    whose texts are computed once in a round.

    Differs: the nearest prompts are an option of the code without effect: it takes the first ones in an order that is
    drawn once, which is the same if all others are sent. Nearest prompts would call torch.topk on a list, an error.

    Differs: within a round, the code sends a client the new prompts of clients that have already trained in it. It
    gives experts of the last client to one in its first round, and tests a client that was not asked with new experts.

    Differs: prompt and gate have one step size. In the code the gate's is 0.01, and that of the prompt oscillates
    as in PromptFL's.
    """

    unicasts = True

    weighting: Literal["uniform", "rows"] = "rows"
    experts: int = Field(9, ge=1, le=1024, search=Linear(1, 9), description="prompts of others that a client is sent")
    width: int = Field(128, ge=1, description="numbers of a feature that the gate reads, evenly spaced")
    heads: int = Field(8, ge=1, search=Choice((1, 4, 8)), description="attention heads of the gate")
    scaling: float = Field(10.0, gt=0, search=Log(0.1, 100.0), description="factor of the gate's scores")
    lam: float = Field(
        0.5,
        ge=0,
        search=Linear(0.0, 1.0),
        description="weight of the logits of a client's own prompt, to which those of the gate are added",
    )

    def adapt(self, method):
        if type(method) is not PromptFL:
            raise InputError(f"server {name_of(self)} needs the prompt of method promptfl, not {name_of(method)}")
        return _Mixture(rule=self, **{field.name: getattr(method, field.name) for field in fields(method)})

    def scope(self, name, scope):
        return "server" if name == "experts" else scope

    def unicast(self, client, bank, params):
        experts = torch.zeros_like(params["experts"])
        if client in bank:
            own = bank[client].astype(np.float64)
            distance = {other: np.linalg.norm(prompt - own) for other, prompt in bank.items() if other != client}
            for row, other in enumerate(sorted(distance, key=distance.__getitem__)[: self.experts]):  # ties: lower ids
                experts[row] = torch.from_numpy(bank[other]).view(experts.shape[1:])
        return {"experts": experts}

    def step(self, params, slots, total, rng):
        prompt = {name: tensor for name, tensor in params.items() if name != "experts"}
        return super().step(prompt, slots, total, rng)


@component
class _Mixture(PromptFL):
    """PromptFL with experts and a gate."""

    rule: InstanceOf[PFedMoAP]

    def build(self, backbone: Backbone) -> nn.Module:
        return _Gated(backbone, self)

    def scope(self, name: str):
        return {"tokens": "shared", "experts": "frozen"}.get(name, "private")


class _Gated(Prompted):
    experts: Tensor  # (E, L, W), zeros where there is none

    def __init__(self, backbone: Backbone, method: _Mixture) -> None:
        tokens, rule = method.initial_tokens(backbone.text), method.rule
        super().__init__(backbone, len(tokens), method.length_flag(len(tokens)))
        if backbone.width % rule.width or rule.width % rule.heads:
            raise InputError(
                f"--server.width must be a divisor of the {backbone.width} numbers of a feature, and a multiple of "
                f"--server.heads {rule.heads}; got {rule.width}"
            )
        self.tokens = nn.Parameter(tokens)
        self.register_buffer("experts", torch.zeros(rule.experts, *tokens.shape))
        self.query, self.key, self.value, self.out = (nn.Linear(rule.width, rule.width) for _ in range(4))
        self.rule, self.stride, self.expert_memo = rule, backbone.width // rule.width, Memo()

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        own = self.texts(self.tokens, classes)
        logits = self.logits(x, own, classes)
        experts = self.experts[self.experts.flatten(1).any(dim=1)]
        if not len(experts):
            return logits
        texts = torch.cat([own[:, None, :: self.stride], self._expert_texts(experts, classes)], dim=1)
        key, value = (self._split(layer(texts)) for layer in (self.key, self.value))
        rows = max(1, MAX_SCORES // (self.rule.heads * texts.shape[0] * texts.shape[1]))
        features = normalize(x, dim=-1)[:, :: self.stride]
        gated = torch.cat([self._gated(part, key, value) for part in features.split(rows)])
        return self.rule.lam * logits + self.spread(self.scale * gated, classes)

    def _gated(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Products of (B, width) image features with the gate's mean texts of n classes: (B, n)."""
        scores = torch.einsum("bhd,nehd->bnhe", self._split(self.query(x)), key)
        weights = (self.rule.scaling * scores).softmax(dim=-1)
        # x is multiplied by the output layer first, so that no (B, n, width) tensor is made.
        products = torch.einsum("bhd,nehd->bnhe", self._split(x @ self.out.weight), value)
        return (weights * products).sum(dim=(-2, -1)) + (x @ self.out.bias)[:, None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.rule.heads, -1))

    @torch.no_grad()
    def _expert_texts(self, experts: Tensor, classes: Tensor | None) -> Tensor:
        """(n, E, width), encoded again only if the experts or the classes are others than in recent calls."""

        def encode() -> Tensor:
            return torch.stack([self.texts(tokens, classes)[:, :: self.stride] for tokens in experts], dim=1)

        return self.expert_memo(encode, experts, self.active(classes))
