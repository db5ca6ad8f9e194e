"""A shared prompt plus a private one, of which low-rank factors are trained and a residual is kept (DP-FPL).

Source: Tran et al., ICLR 2025, arXiv 2501.13904; details as in the authors' code, linhhtran/DP-FPL, commit cce74b4
(trainers/DP_FPL.py, federated_main.py).
Unread: the paper, beyond its abstract.
"""

from collections.abc import Collection
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn

from fedsim.errors import InputError
from fedsim.methods import Backbone, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class DPFPL(PromptMethod):
    """Defaults are those of the authors' program without flags.

    Its 100 rounds of all of 10 clients, and uniform averaging, are set in the experiment; its "neighbor" accuracy is
    that of `--neighbors`.

    The private prompt is p = left @ right + residual. After each step it is factorized again: one power iteration gives
    orthonormal factors, and the residual is what they lack of p. Only the factors have gradients, so noise on gradients
    is rank * (L + W) numbers in place of L * W, and the residual gets none.

    The noise is that of `--privacy`. With `example_dp` it is on the gradients of the factors, as published, and on
    those of the shared prompt; with `central_dp` it is on the mean update of the shared prompt, and with `local_dp` on
    that of each client, and what is private has none.

    Differs: the code averages the gradients of the shared prompt over clients, and steps, batch by batch; here clients
    take all steps of a round, and their updates are averaged. With a batch that holds all rows of a client, a round is
    one such step.
    Differs: the code clips the gradients of the shared prompt and of each factor, each to 10, of whole batches; clients
    noise those of the factors, and the server noises the mean. Its noise is sqrt(R ln(1/delta)) / epsilon times 10
    divided by the batch size, for R rounds of any number of steps. Since one row can change a clipped gradient of a
    batch by more than that, rows are not protected as stated. `example_dp` clips the gradients of each row, of all
    tensors together, and accounts for every local epoch.
    Differs: the code starts each power iteration from new random numbers, here it starts from the last right factor.
    From the clipped and noised gradients a, b of the factors u, v, the code steps p by (a v + u b + u u' a v) / 10. A
    step on factors of scale sqrt(`private_lr`) moves p by 1/10 of a v + u b, to first order in the step size. Momentum
    is that of the factors, and weight decay is applied to each of them and not to the residual.
    Differs: in the first round, the code starts every batch from the initial prompts, so that only its last step
    counts, and all clients share the momentum of one optimizer. Neither is so here.
    """

    local_epochs: int = 1
    rank: int = Field(8, ge=1, le=4096, search=Choice((1, 2, 4, 8)), description="rank of the private factors")
    private_lr: float = Field(
        0.1,
        ge=0,
        search=Log(0.01, 1.0),
        description="step size of the private prompt, in units of `lr`; 0 leaves it as it starts",
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Factored(backbone, self)

    def scope(self, name: str) -> Scope:
        return "shared" if name == "shared" else "private"

    def learned(self, names: Collection[str], round: int) -> Collection[str]:
        return [name for name in names if name != "residual"]

    def proximal(self, params: Params) -> Params:
        """The same private prompt in other factors."""
        prompt = params["left"] @ params["right"] + params["residual"]
        return self.factored(prompt, params["right"])

    def factored(self, prompt: Tensor, start: Tensor) -> Params:
        """Factors of (..., L, W) prompts and what they lack, by one power iteration.

        Args:
            start: (..., r, W), nearly the leading right singular vectors, or random.

        Returns:
            left, (..., L, r), and right, (..., r, W), orthonormal up to a scale; and residual, (..., L, W).
        """
        left = orthonormal(prompt @ start.mT)
        right = orthonormal(prompt.mT @ left).mT
        scale = sqrt(self.private_lr)
        left, right = scale * left, scale * right
        return {"left": left, "right": right, "residual": prompt - left @ right}


class _Factored(Prompted):
    left: Tensor  # (L, r)
    right: Tensor  # (r, W)
    residual: Tensor  # (L, W)

    def __init__(self, backbone: Backbone, method: DPFPL) -> None:
        """
        Raises:
            InputError: the rank is larger than the number of tokens or their width.
        """
        shared = method.initial_tokens(backbone.text)
        length, width = shared.shape
        super().__init__(backbone, length, method.length_flag(length))
        if method.rank > min(length, width):
            raise InputError(
                f"--method.rank {method.rank} is more than the private prompt of dp_fpl can have, with {length} tokens "
                f"of {width} numbers; it can be at most {min(length, width)}"
            )
        self.shared = nn.Parameter(shared)
        private = replace(method, init="", length=length).initial_tokens(backbone.text)
        tensors = method.factored(private, torch.randn(method.rank, width))
        self.left, self.right, self.residual = (
            nn.Parameter(tensors[n].contiguous()) for n in ("left", "right", "residual")
        )

    def tokens(self) -> Tensor:  # (L, W)
        return self.shared + self.left @ self.right + self.residual

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens(), classes), classes)


def orthonormal(columns: Tensor) -> Tensor:
    """(..., n, r) columns, orthonormal by Gram and Schmidt's process; one that is 0 stays 0."""
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
