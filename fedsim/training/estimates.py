"""Gradients that are estimated from values of the loss, for clients that can only evaluate a model.

Source: simultaneous perturbation (SPSA), Spall 1992, IEEE Transactions on Automatic Control 37 (3).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedsim.methods import Batch, Method
from fedsim.methods._calls import with_tensors
from fedsim.params import Params, views


@torch.no_grad()
def by_differences(
    losses: Callable[[Params], Tensor], params: Params, like: Params, method: Method, rngs: Sequence[torch.Generator]
) -> tuple[Tensor, Params]:
    """Losses of M clients and estimates of their gradients, from two values of the loss in each direction.

    With a direction u of random signs and a perturbation c, the slope is (L(w + c u) - L(w - c u)) / 2c. The mean of
    slope * u over all u is the gradient, up to terms in c^2.

    Args:
        losses: the parameters of all clients, (M, *shape) each -> (M,) losses in nats.
        params: (M, *shape) each, or (*shape) if all clients have the same.
        like: (*shape) each, tensors of the same names.
        rngs: of each client, draws its directions.

    Returns:
        (M,) the mean of these values of the loss; and the estimate for each parameter, (M, *shape), by its name.
    """
    device, step = next(iter(params.values())).device, method.perturbation
    total, estimates = torch.zeros(len(rngs), device=device), {}
    for _ in range(method.directions):
        signs = _signs(params, like, rngs)
        # A module that draws random numbers draws the same ones for both.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            ahead = losses({name: tensor + step * signs[name] for name, tensor in params.items()})
        behind = losses({name: tensor - step * signs[name] for name, tensor in params.items()})
        slopes = (ahead - behind) / (2 * step)
        total = total + (ahead + behind) / 2
        for name, u in signs.items():
            part = slopes.view(-1, *[1] * (u.dim() - 1)) * u
            estimates[name] = estimates[name] + part if name in estimates else part
    return total / method.directions, {name: tensor / method.directions for name, tensor in estimates.items()}


def estimated(
    method: Method, module: nn.Module, params: Params, batch: Batch, rng: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """The same of one client: the mean of the values, and the estimate for each of the module's `params`, in order."""

    def losses(moved: Params) -> Tensor:
        return with_tensors(method.loss, module, {name: tensor[0] for name, tensor in moved.items()}, batch)[None]

    own = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    values, estimates = by_differences(losses, own, params, method, [rng])
    return values[0], [estimates[name][0] for name in params]


def _signs(params: Params, like: Params, rngs: Sequence[torch.Generator]) -> Params:
    """(M, *shape) of 1 and -1 with equal probability, drawn on the CPU so that devices have the same."""
    count = sum(tensor.numel() for tensor in like.values())
    drawn = [views(torch.randint(0, 2, (count,), generator=rng, dtype=torch.int8), like) for rng in rngs]
    return {name: 2 * torch.stack([row[name] for row in drawn]).to(tensor) - 1 for name, tensor in params.items()}
