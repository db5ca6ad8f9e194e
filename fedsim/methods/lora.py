"""Low-rank pairs added to matrices of CLIP's towers; only the pairs are trained and sent (LoRA).

Source: Hu et al. 2021, arXiv 2106.09685 (LoRA); federated on CLIP's text tower as in FLoRA, Nguyen et al. 2024, arXiv
2404.15182; details as in the authors' code, dphuongn/FedCLIP, commit 4c31126. With `fedavg`, which averages the
matrices of a pair separately, this is FedIT (Zhang et al. 2023, arXiv 2305.05644). The product of means differs from
the mean of products; see the server rules `ffa_lora`, `fedsa_lora`, `fedex_lora` and `lora_stacking`.
"""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError, listing
from fedsim.methods import Backbone, Batch, Method
from fedsim.methods._tuned_towers import Objective, Side, Sides, TunedTowers, blocks, module_key, objective, tower_of
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log

Modules = Literal["attention", "mlp", "all"]

# By open_clip's names; `attnpool` is the attention pooling of its ResNets.
KINDS = {
    "attention": re.compile(r"(in_proj_weight|out_proj\.weight|attnpool\.[qkvc]_proj\.weight)$"),
    "mlp": re.compile(r"mlp\.(c_fc|c_proj)\.weight$"),
    "all": re.compile(""),
}
EMBEDDINGS = "token_embedding.weight", "positional_embedding", "class_embedding", "pos_embed", "cls_token"


@component
class Lora(Method):
    """Defaults are those of the authors' program, except for where pairs are added.

    The program is system/main.py with flcore/clients/clientlora.py and flcore/trainmodel/clip_model.py; the batch size
    of 32 is that of its scripts, such as scripts/p37/p37_gs_lorat_sd_all_pfl.sh. Their 100 rounds and 10 clients, and
    averaging by rows, are set in the experiment.

    Differs: pairs are added to attention only, as in Hu et al.; the scripts add them to the MLPs and the projection
    too, here `modules: all`. They also choose a step size per data set, from 1e-6 to 5e-5.
    Differs: in the code AdamW persists over rounds, here `persist_optimizer`.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(5e-5, search=Log(1e-5, 1e-2))
    clip_norm: float | None = 1.0
    objective: Objective = Field(
        "contrastive", description="CLIP's loss over the texts of the batch, or cross-entropy over all classes"
    )
    rank: int = Field(2, ge=1, search=Choice((1, 2, 4, 8, 16)), description="rank of each pair")
    alpha: float = Field(
        16.0, gt=0, search=Log(1.0, 64.0), description="a pair's product is multiplied by alpha / rank"
    )
    towers: Sides = Field("text", description="towers whose matrices get pairs")
    modules: Modules = Field(
        "attention", description="matrices that get a pair: in attention, in the MLPs, or all but embeddings"
    )

    min_batch: ClassVar[int] = 2  # a single image has nothing to contrast

    @property
    def contrasts_rows(self) -> bool:
        return self.objective == "contrastive"

    @property
    def sites(self) -> tuple[Site, ...]:
        return blocks(self.towers)

    def build(self, backbone: Backbone) -> "Paired":
        return Paired(self, backbone)

    def loss(self, module: TunedTowers, batch: Batch) -> Tensor:
        return objective(self.objective, module, batch)


class Paired(TunedTowers):
    """W' = W + alpha / rank * up @ down for each chosen W, with the pairs under `up.` and `down.`.

    After `add_merged` it is W + alpha / rank * (up @ down + merged), with zeros under `merged.`. After `add_blocks`,
    `blocks.` holds a number for each block of a tower, 1, and blocks with 0 are left out.
    """

    def __init__(self, method: Lora, backbone: Backbone) -> None:
        super().__init__(backbone, method.towers)
        self.strength = method.alpha / method.rank
        self.frozen = {side: _chosen(tower_of(backbone, side).weights, side, method) for side in self.sides}
        self.down, self.up, self.merged = nn.ParameterDict(), nn.ParameterDict(), nn.Module()
        self.blocks = nn.Module()
        for side, weights in self.frozen.items():
            for name, weight in weights.items():
                *parts, rows, columns = _matrix_shape(name, weight)
                key = module_key(f"{side}.{name}")
                self.down[key] = nn.Parameter(random_down((*parts, method.rank, columns)))
                self.up[key] = nn.Parameter(torch.zeros(*parts, rows, method.rank))

    def add_merged(self) -> None:
        for key, up in self.up.items():
            self.merged.register_buffer(key, torch.zeros(*up.shape[:-1], self.down[key].shape[-1]))

    def add_blocks(self, backbone: Backbone) -> None:
        for side in self.sides:
            self.blocks.register_buffer(side, torch.ones(tower_of(backbone, side).depth))

    def insertions(self, side: Side) -> Insertions | None:
        if (present := getattr(self.blocks, side, None)) is None or present.all():
            return None
        return Insertions(left_out=frozenset((present == 0).nonzero().flatten().tolist()))

    def weights(self, side: Side) -> Params:
        return {name: weight + self._added(side, name).view_as(weight) for name, weight in self.frozen[side].items()}

    def _added(self, side: Side, name: str) -> Tensor:
        key = module_key(f"{side}.{name}")
        product, merged = self.product(key), getattr(self.merged, key, None)
        return self.strength * (product if merged is None else product + merged)

    def product(self, key: str) -> Tensor:
        """(..., out, in), that of a pair."""
        return self.up[key] @ self.down[key]


def random_down(shape: Sequence[int], rng: torch.Generator | None = None) -> Tensor:
    """An initial `down`, (..., rank, in) with variance 1 / rank; `up` starts at zero, so the product is zero."""
    return torch.randn(*shape, generator=rng) / shape[-2] ** 0.5


def _matrix_shape(name: str, weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight as a matrix: (out, in), or (3, out, in) where query, key and value are packed."""
    # A single pair for all three would couple them through its rank.
    if name.endswith("in_proj_weight"):
        return 3, weight.shape[0] // 3, weight.shape[1]
    return weight.shape[0], weight[0].numel()  # for a convolution: (out, in * height * width)


def _chosen(weights: Params, side: Side, method: Lora) -> Params:
    """The matrices of a tower that get a pair.

    Raises:
        InputError: there is none, or the rank is too large for one of them.
    """
    matrices = {name: w for name, w in weights.items() if w.dim() > 1 and not name.endswith(EMBEDDINGS)}
    chosen = {name: w for name, w in matrices.items() if KINDS[method.modules].search(name)}
    if not chosen:
        raise InputError(
            f"lora needs {method.modules} matrices in the {side} tower, which has none; "
            f"modules: all would use: {listing(matrices, 4)}"
        )
    for name, weight in chosen.items():
        *_, rows, columns = _matrix_shape(name, weight)
        if method.rank > min(rows, columns):
            raise InputError(
                f"lora.rank {method.rank} is more than the smaller side of the {side} tower's {name}, "
                f"{rows} x {columns}; the largest that fits all chosen matrices is "
                f"{min(min(_matrix_shape(n, w)[-2:]) for n, w in chosen.items())}"
            )
    return chosen
