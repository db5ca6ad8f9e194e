"""Prompts of several experts, mixed for each image by the share of its patches that belong to each expert (TRIP).

Source: Gong et al. 2025, arXiv 2504.21063; details as in the authors' code, GongShuai8210/TRIP, commit d4c8496
(methods/FedMoeP_NR_cos.py, nets/coop2_NR_data.py, utils/generate_weights_multi.py, train.sh).
Unread: the equations of the paper; only its abstract was read.
"""

from functools import lru_cache
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy, normalize, one_hot

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Batch, Schedule, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.methods.cocoop import MAX_TEXTS
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

MAX_ROUTED = 16  # images that are routed together


@component
class TRIP(PromptMethod):
    """Defaults are those of the authors' script, train.sh, but for the size of the prompts.

    The script has 8 experts of 32 tokens, the program without flags 4 of 2, as here; the README's table has the 65,536
    parameters of 4 experts of 32 tokens. The script's 15 rounds are set in the experiment, as is its server:
    `moving_average`, with clients weighted by rows.

    Patches are clustered by k-means whose clusters have limited room; those that prefer a full cluster belong to none.
    Clusters are assigned to fixed orthogonal keys, one per expert, by the largest sum of cosines, and weight the tokens
    of the experts by their sizes. This has no parameters; images with equal weights share their class texts.

    Differs: all experts of the code begin with the same values, because one tensor initializes them; here each has its
    own. Differs: the code starts k-means from random tokens; here they are evenly spaced, so that an image always has
    the same weights. Differs: the code clusters the tokens of the last block, that of the class among them, in half
    precision; here they are the projected patches. Differs: the code distils from texts of several templates; here from
    those of `--prompt`.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(5e-4, search=Log(1e-5, 1e-1))
    schedule: Schedule = Field("exponential", search=Choice(("constant", "cosine", "exponential")))
    lr_decay: float = 0.8
    beta2: float = 0.98
    eps: float = 1e-7
    weight_decay: float = 0.01
    batch_size: int = Field(16, search=Choice((8, 16, 32)))
    length: int = Field(2, search=Choice((2, 4, 8, 16), when=("init", "")))
    experts: int = Field(4, ge=1, le=8, search=Choice((2, 4, 8)), description="prompts that are mixed for each image")
    distillation: float = Field(1.0, ge=0, search=Log(0.01, 10.0), description="weight of zero-shot CLIP as a teacher")
    room: float = Field(1.0, ge=1, search=Linear(1.0, 3.0), description="room of a cluster in training, in mean sizes")
    test_room: float = Field(2.0, ge=1, search=Linear(1.0, 3.0), description="the same in evaluation")

    @property
    def sites(self) -> tuple[Site, ...]:
        return "image_feature", "patch_tokens", "conditional_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Experts(backbone, self)

    def loss(self, module: "_Experts", batch: Batch) -> Tensor:
        scores = module.scores(batch.x, self.room, batch.classes)
        distillation = cross_entropy(scores, module.zero_shot(batch.x[:, 0], batch.classes).softmax(dim=-1))
        return cross_entropy(module.spread(scores, batch.classes), batch.y) + self.distillation * distillation

    def scope(self, name: str) -> Scope:
        return "frozen" if name == "keys" else "shared"


class _Experts(Prompted):
    keys: Tensor  # (E, D), of E experts

    def __init__(self, backbone: Backbone, method: TRIP) -> None:
        tokens = torch.stack([method.initial_tokens(backbone.text) for _ in range(method.experts)])
        super().__init__(backbone, tokens.shape[1], method.length_flag(tokens.shape[1]))
        self.tokens = nn.Parameter(tokens)  # (E, L, W)
        self.register_buffer("keys", nn.init.orthogonal_(torch.empty(method.experts, backbone.width)))
        self.test_room = method.test_room

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 1 + T, D) -> (B, C)
        return self.spread(self.scores(x, self.test_room, classes), classes)

    def scores(self, x: Tensor, room: float, classes: Tensor | None = None) -> Tensor:
        """(B, 1 + T, D), the feature and the patches of each image -> (B, n) logits of the n active classes."""
        count = len(self.active(classes))
        if not len(x):
            return x.new_zeros(0, count)
        weights = torch.cat([route(part[:, 1:], self.keys, room) for part in x.split(MAX_ROUTED)]).to(x.dtype)
        distinct, which = weights.unique(dim=0, return_inverse=True)
        tokens = torch.tensordot(distinct, self.tokens, dims=1).split(max(1, MAX_TEXTS // max(1, count)))
        # The text tower takes images as it takes the clients of a stack: in one call.
        texts = torch.cat([vmap(lambda own: self.texts(own, classes))(part) for part in tokens])
        return self.scale * torch.einsum("bd,bnd->bn", normalize(x[:, 0], dim=-1), texts[which])


@torch.no_grad()
def route(
    tokens: Tensor, keys: Tensor, room: float, iterations: int = 100, step: float = 1e-4, tolerance: float = 1e-4
) -> Tensor:
    """The share of each image's clustered patches that belongs to each expert: (B, T, D), (E, D) -> (B, E) float64.

    The constants are the code's. Patches come in the order of their distances to the nearest centre, less the bonus of
    its cluster, which grows by `step` per vacancy and iteration. An image stops when its centres move by less than
    `tolerance` in the mean, whatever the other images do. `room` is that of a cluster, in multiples of T / E.
    """
    x, (count, experts) = tokens.double(), (tokens.shape[1], len(keys))
    places = torch.full((experts,), int(count // experts * room), device=x.device)
    places[: count % experts] += 1
    centres = x[:, (torch.arange(experts, device=x.device) * 2 + 1) * count // (2 * experts)]
    penalty = x.new_zeros(len(x), experts)
    sizes, active = penalty, torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        # Exact: equal patches have equal distances, on every device.
        distances = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
        cost, preferred = (distances + penalty[:, None]).min(dim=-1)
        order = cost.argsort(dim=1, stable=True)[..., None].expand_as(distances)
        queue = one_hot(preferred, experts).gather(1, order)
        accepted = queue * (queue.cumsum(dim=1) <= places)
        members = torch.zeros_like(accepted).scatter(1, order, accepted).to(x.dtype)  # (B, T, E)
        filled = members.sum(dim=1)
        farthest = x[torch.arange(len(x), device=x.device), distances.amin(dim=-1).argmax(dim=-1)]
        means = members.mT @ x / filled.clamp(min=1)[..., None]
        means = torch.where(filled[..., None] > 0, means, farthest[:, None])
        penalty = torch.where(filled > 0, penalty + step * (filled - places), 0)
        sizes = torch.where(active[:, None], filled, sizes)
        active = active & ((means - centres).norm(dim=-1).mean(dim=-1) >= tolerance)
        centres = torch.where(active[:, None, None], means, centres)
        if not active.any():
            break
    cosines = normalize(centres, dim=-1) @ normalize(keys.double(), dim=-1).T  # (B, clusters, E)
    orders = _orders(experts, x.device)
    totals = cosines[:, torch.arange(experts, device=x.device), orders].sum(dim=-1)
    best = orders[totals.argmax(dim=1)]
    return torch.zeros_like(sizes).scatter(1, best, sizes / sizes.sum(dim=1, keepdim=True))


@lru_cache(maxsize=4)
def _orders(experts: int, device: torch.device) -> Tensor:
    """(E!, E) the expert of each cluster, in every assignment; 40,320 of 8 experts."""
    return torch.tensor(list(permutations(range(experts))), device=device)
