"""Base of methods that score a class by the transport of image patches to its texts with several prompts.

Source: PLOT and FedOTP, whose files name the papers and the codes.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedsim.clip.sites import Site
from fedsim.clip.stacked import over_clients
from fedsim.methods import Backbone
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Field, Log

MAX_SIMILARITIES = 1 << 22  # transported at once: 32 MB in float64


@component
class TransportMethod(PromptMethod):
    """Entropic transport by scaling iterations, through which no gradients pass."""

    # Below 0.003 the kernel of opposite patches and texts would underflow, even in float64.
    entropy: float = Field(0.1, ge=0.003, search=Log(0.01, 1.0), description="entropic regularization of the transport")
    tolerance: float = Field(1e-3, ge=0, description="change of the scaling at which the iterations stop")
    iterations: int = Field(100, ge=1, description="maximum number of scaling iterations")

    changes_gradients = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "patch_tokens"


class Transported(Prompted):
    """Scores of classes by what is transported to their texts."""

    def __init__(
        self, backbone: Backbone, length: int, method: TransportMethod, mass: float = 1.0, balanced: bool = True
    ) -> None:
        super().__init__(backbone, length, method.length_flag(length))
        fields = {name: getattr(method, name) for name in ("entropy", "tolerance", "iterations")}
        self.plan = partial(plan, mass=mass, balanced=balanced, **fields)

    def transported(self, x: Tensor, texts: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, T, D) patches and (n, K, D) unit rows, the texts of the n active classes -> (B, C)."""
        rows = max(1, MAX_SIMILARITIES // max(1, x.shape[1] * texts.shape[:2].numel()))
        return self.spread(torch.cat([self._score(part, texts) for part in x.split(rows)]), classes)

    def _score(self, x: Tensor, texts: Tensor) -> Tensor:  # (B, T, D), (n, K, D) -> (B, n)
        cosines = torch.einsum("btd,nkd->bntk", normalize(x, dim=-1), texts)
        return self.scale * (cosines * over_clients(self.plan, cosines)).sum(dim=(-2, -1))


@torch.no_grad()
def plan(
    cosines: Tensor, entropy: float, mass: float, tolerance: float, iterations: int, balanced: bool = False
) -> Tensor:
    """The transport plan between patches and texts, without gradients, as in the codes of FedOTP and PLOT.

    Differs: the codes stop all problems of a batch together, when their mean change is small, so that predictions
    depend on the other images of the batch; here each problem stops on its own.

    Args:
        cosines: (..., T, K) between patches and texts.
        mass: fraction of the patches that is transported; 1 if balanced.
        balanced: whether each patch gives 1 / T (PLOT), or no patch gives more (FedOTP).

    Returns:
        (..., T, K): each text receives mass / K.
    """
    patches, texts = cosines.shape[-2:]
    kernel = ((cosines.double() - 1) / entropy).exp()  # float32 would underflow at FedOTP's smallest entropy, 0.01
    give, take = kernel.new_ones(*cosines.shape[:-1], 1), kernel.new_ones(*cosines.shape[:-2], texts, 1)
    active = torch.ones_like(give[..., :1, :], dtype=torch.bool)
    for _ in range(iterations):
        before = give if balanced else take  # the one whose change the codes look at
        new = 1 / (patches * (kernel @ take))
        give = torch.where(active, new if balanced else new.clamp(max=1), give)
        take = torch.where(active, mass / (texts * (kernel.mT @ give)), take)
        change = (give if balanced else take) - before
        active = active & (change.abs().mean(dim=-2, keepdim=True) >= tolerance)
        if not active.any():
            break
    return (give * kernel * take.mT).to(cosines.dtype)
