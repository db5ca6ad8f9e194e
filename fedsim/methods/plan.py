"""Deep prompts of both towers for each domain, and attention over the domains that makes global prompts of them (PLAN).

Source: Gong et al., IEEE TIFS, "Federated Domain Generalization via Prompt Learning and Aggregation"; details as in the
authors' code, GongShuai8210/PLAN, commit f02cdd8: methods/PLAN.py, nets/plan.py and the command in readme.md.
Unread: the paper, beyond its abstract.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, ClientContext
from fedsim.methods._distillation import divergence
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class PLAN(PromptMethod):
    """Defaults are those of the command in the authors' README, which has 6 rounds; server `domain_means`.

    Rounds alternate. In odd ones a client trains the prompts of its domain, one for each tower, and also learns from
    the predictions of the global prompts that it received, in round 1 from those of zero-shot CLIP. In even rounds all
    prompts are fixed, and clients train the aggregator, by which each block's global tokens are the mean over domains
    of what attention over the domains makes of them. The global prompts are evaluated. If the rows of a client are of
    several domains, it trains the mean of all prompts.

    Differs: in the code, after round 1 odd rounds train the aggregator too, on copies of the prompts, so that prompts
    never change again; here they follow the abstract, in which clients learn local prompts in each round. There, a test
    of names takes some blocks of a domain's visual prompt from the client of another domain; not here.
    Differs: in the code, global text prompts are means, and an aggregator of texts is never trained, while the abstract
    speaks of aggregators. Here `text_aggregation` decides; the default is the code's.
    Differs: held-out domains have prompts too, under `domain_means` the mean of the others, to which attention extends.
    Differs: the code distils from texts of several templates in round 1; here from those of `--prompt`.
    """

    lr: float = Field(1.5e-3, search=Log(1e-4, 1e-1))
    length: int = Field(8, search=Choice((4, 8, 16), when=("init", "")))
    depth: int = Field(
        12,
        ge=1,
        search=Choice((1, 6, 9, 12)),
        description="number of first blocks, each with its own tokens (all of a tower that has fewer)",
    )
    heads: int = Field(8, ge=1, description="heads of the attention over domains")
    text_aggregation: Literal["mean", "attention"] = Field(
        "mean", search=Choice(("mean", "attention")), description="how global text prompts follow from those of domains"
    )
    distillation: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of the global prompts, or zero-shot CLIP, as a teacher"
    )

    reads_client = True
    reads_rule = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Domains(backbone, self)

    def loss(self, module: "_Domains", batch: Batch) -> Tensor:
        x, y, classes, client = batch.x, batch.y, batch.classes, batch.client
        if client is None or client.round % 2 == 0:
            return cross_entropy(module(x, classes), y)
        own = module.scores(x, *module.prompts_of(client), classes)
        received = batch.rule.received if batch.rule else {}
        with torch.no_grad():
            if client.round == 1:
                teacher = module.zero_shot(module.image_tower.encode(x), classes)
            else:
                teacher = module.scores(x, *module.together(received), classes)
        return cross_entropy(module.spread(own, classes), y) + self.distillation * divergence(own, teacher)

    def learned(self, names, round):
        return [name for name in names if ("_aggregator." in name) == (round % 2 == 0)]


class _Domains(Prompted):
    def __init__(self, backbone: Backbone, method: PLAN) -> None:
        count, image = backbone.domains, backbone.image
        depths = min(method.depth, backbone.text.depth), min(method.depth, image.depth)
        tokens = torch.stack([method.deep_tokens(backbone.text, depths[0]) for _ in range(count)])
        length = tokens.shape[2]
        super().__init__(backbone, length, method.length_flag(length))
        self.image_tower = image
        self.text_prompts = nn.Parameter(tokens)  # (K, d, L, W), of K domains
        self.visual_prompts = nn.Parameter(torch.empty(count, depths[1], length, image.width).normal_(std=0.02))
        self.visual_aggregator = _Aggregator(depths[1], image.width, method.heads)
        attends = method.text_aggregation == "attention"
        self.text_aggregator = _Aggregator(depths[0], self.tower.width, method.heads) if attends else None

    def prompts_of(self, client: ClientContext) -> tuple[Tensor, Tensor]:
        """(d, L, W) each, the text and the visual prompt of the client's domain."""
        domains = torch.arange(len(self.text_prompts), device=self.text_prompts.device)
        shares = ((domains == client.domain) | (client.domain < 0)).to(self.text_prompts.dtype)
        shares = shares / shares.sum()
        return torch.tensordot(shares, self.text_prompts, dims=1), torch.tensordot(shares, self.visual_prompts, dims=1)

    def together(self, prompts: Params | None = None) -> tuple[Tensor, Tensor]:
        """Prompts of all domains by name, by default the module's, (K, d, L, W) -> (d, L, W) each, the global ones."""
        prompts = prompts or {}
        texts, visual = (prompts.get(name, getattr(self, name)) for name in ("text_prompts", "visual_prompts"))
        aggregate = self.text_aggregator or (lambda prompts: prompts.mean(dim=0))
        return aggregate(texts), self.visual_aggregator(visual)

    def scores(self, x: Tensor, texts: Tensor, visual: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) and (d, L, W) prompts -> (B, n) logits of the n active classes."""
        images = self.image_tower.encode(x, insertions=Insertions(visual))
        return self.score(images, self.texts(texts, classes))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        return self.spread(self.scores(x, *self.together(), classes), classes)


class _Aggregator(nn.Module):
    """A layer of attention over domains for each block of a tower; the layer norms are those of all layers."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"--method.heads must divide {width}, a tower's width; {heads} does not")
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads) for _ in range(depth))
        self.widen = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, prompts: Tensor) -> Tensor:  # (K, d, L, W) -> (d, L, W)
        blocks = []
        layers = zip(prompts.unbind(dim=1), self.attention, self.widen, self.narrow, strict=True)
        for x, attention, widen, narrow in layers:
            x = self.norm(x + attention(x, x, x, need_weights=False)[0])
            blocks.append(self.last_norm(x + narrow(widen(x).relu())).mean(dim=0))
        return torch.stack(blocks)
