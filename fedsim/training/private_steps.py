"""Gradients of local steps that are private by row: each row's is clipped, and noise is added to their sum.

Source: Abadi et al. 2016, arXiv 1607.00133, Algorithm 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.methods import Batch, Method, trained
from fedsim.methods._calls import with_tensors
from fedsim.params import Params, views
from fedsim.privacy import Noised
from fedsim.rng import torch_rng
from fedsim.training.dimensions import batch_of_client, dims_of, dims_of_batch, of_client, one_sentence
from fedsim.training.task import Task


class PrivateSteps(NamedTuple):
    """How the gradients of M clients are clipped and noised.

    Attributes:
        clip: the largest norm of a row's gradients, of all tensors together; None: no limit.
        noise: standard deviation of the noise on their sum, in units of clip.
        rngs: of each client, on the CPU, keyed by seed, round and client.
    """

    clip: float | None
    noise: float
    rngs: Sequence[torch.Generator]

    def gradients(
        self, method: Method, module: nn.Module, params: Params, batch: Batch, first: int = 0
    ) -> tuple[Tensor, Params]:
        """What `stack.gradients` returns, private by row.

        Args:
            params, batch: as there, of the clients from `first` on.
        """
        with one_sentence(method):
            losses, sums = self._sums(method, module, params, batch)
        return losses, self._noised(sums, batch.x.shape[1], first)

    def alone(self, method: Method, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """The same on the readable path: the mean loss of a client's rows, and gradients by name, (*shape).

        Args:
            params: the module's trained parameters.
        """
        losses, rows = [], []
        for x, y in zip(batch.x, batch.y, strict=True):
            loss = method.loss(module, batch._replace(x=x[None], y=y[None]))
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            rows.append(self._clipped(dict(zip(params, grads, strict=True))))
            losses.append(loss.detach())
        sums = {name: torch.stack([row[name] for row in rows]).sum(dim=0)[None] for name in params}
        return torch.stack(losses).mean(), {n: grad[0] for n, grad in self._noised(sums, len(rows), 0).items()}

    def _sums(self, method: Method, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """(M,) mean losses, and the sums of clipped gradients, (M, *shape)."""
        learned = {name: params[name] for name in trained(module)}
        fixed = {name: tensor for name, tensor in params.items() if name not in learned}
        dims, each = (dims_of(module, learned), dims_of(module, fixed)), dims_of_batch(module, batch)

        def loss(learned: Params, fixed: Params, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
            return with_tensors(method.loss, module, learned | fixed, batch._replace(x=x[None], y=y[None]))

        def client(learned: Params, fixed: Params, batch: Batch) -> tuple[Tensor, Params]:
            def row(x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
                grads, value = grad_and_value(loss)(learned, fixed, batch, x, y)
                return value, self._clipped(grads)

            losses, rows = vmap(row)(batch.x, batch.y)
            return losses.mean(), {name: grads.sum(dim=0) for name, grads in rows.items()}

        if not method.reads.towers:
            return vmap(client, in_dims=(*dims, each))(learned, fixed, batch)
        # One client at a time. If no image passes a tower, all rows have the same texts, which are encoded once.
        results = []
        for k in range(len(batch.x)):
            live = {n: v.detach().requires_grad_() for n, v in of_client(learned, k, dims[0]).items()}
            rest, own = of_client(fixed, k, dims[1]), batch_of_client(batch, k, each.rule)
            with torch.enable_grad():
                values = partial(loss, live, rest, own)
                together = method.reads.image == "features"
                losses = vmap(values)(own.x, own.y).unbind() if together else list(map(values, own.x, own.y))
            rows = []
            for value in losses:
                grads = torch.autograd.grad(value, list(live.values()), retain_graph=True, materialize_grads=True)
                rows.append(self._clipped(dict(zip(live, grads, strict=True))))
            results.append(
                (torch.stack(losses).detach().mean(), {n: torch.stack([r[n] for r in rows]).sum(dim=0) for n in live})
            )
        losses, sums = zip(*results, strict=True)
        return torch.stack(losses), {name: torch.stack([each[name] for each in sums]) for name in learned}

    def _clipped(self, grads: Params) -> Params:
        """The gradients of a row, scaled down if they are longer than `clip`."""
        if self.clip is None or not grads:
            return grads
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        factor = self.clip / norm.clamp_min(self.clip)
        return {name: grad * factor for name, grad in grads.items()}

    def _noised(self, sums: Params, rows: int, first: int) -> Params:
        """The sums of clipped gradients, (M, *shape), plus noise, divided by the rows of the batch."""
        if self.clip is None or not self.noise:
            return {name: grad / rows for name, grad in sums.items()}
        noised = {name: torch.empty_like(grad) for name, grad in sums.items()}
        for k, rng in enumerate(self.rngs[first : first + len(next(iter(sums.values())))]):
            own = {name: grad[k] for name, grad in sums.items()}
            normal = torch.randn(sum(grad.numel() for grad in own.values()), generator=rng, dtype=torch.float64)
            for name, noise in views(normal * self.noise * self.clip, own).items():
                noised[name][k] = (own[name] + noise.to(own[name])) / rows
        return noised


def private_steps(task: Task, round: int, clients: Sequence[int]) -> PrivateSteps | None:
    """Those of some clients in a round; None unless the run protects rows."""
    privacy = task.privacy
    if not isinstance(privacy, Noised) or privacy.protects != "rows":
        return None
    rngs = [torch_rng(task.seed, "privacy", round, client) for client in clients]
    return PrivateSteps(privacy.clip, privacy.multiplier, rngs)
