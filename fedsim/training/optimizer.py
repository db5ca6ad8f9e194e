"""Optimizers that step all clients of a stack at once, with accessible state.

They call torch's fused kernels directly: to construct a torch.optim.Optimizer imports torch._dynamo, which takes 4 CPU
seconds per actor, and even the functional wrappers around the kernels take a tenth of the time of a step.
"""

from itertools import chain, compress

import torch
from torch import Tensor

from fedsim.methods import Method
from fedsim.params import Params

# torch's stubs do not export the kernels.
SGD, ADAM, ADAMW = (getattr(torch, name) for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"))


class Optimizer:
    """Steps the parameters of M clients in place by their gradients.

    Attributes:
        lr: the step size; the method's, unless `reset` has set that of a round.
        state: tensors by kind and parameter, (M, *shape): `first`, `second` and `steps` (M,) for adam and adamw,
            `momentum` for sgd with momentum.
        together: whether one call per parameter steps all clients whose step counts are equal. A GPU needs that; on a
            CPU one client at a time is faster, because its tensors stay in cache.
    """

    def __init__(self, method: Method, params: Params, together: bool | None = None) -> None:
        """
        Args:
            params: (M, *shape) each, contiguous, client by client.
            together: default: whether the parameters are on a GPU.
        """
        first = next(iter(params.values()), torch.empty(0))
        self.method, self.params, self.count, self.lr = method, params, len(first), method.lr
        self.together = first.is_cuda if together is None else together
        self.state: dict[str, Params] = {}
        if method.optimizer != "sgd":
            self.state = {kind: {n: torch.zeros_like(v) for n, v in params.items()} for kind in ("first", "second")}
            self.state["steps"] = {
                n: torch.zeros(len(v), dtype=torch.float32, device=v.device) for n, v in params.items()
            }
        elif method.momentum:
            self.state = {"momentum": {n: torch.zeros_like(v) for n, v in params.items()}}
        self.taken: list[int | None] = [0] * self.count  # steps of each client; None: after `load`, see the state
        # Client by client, as the kernels take them; made once, because a view costs as much as a small kernel.
        self.views = {kind: _by_client(tensors, self.count) for kind, tensors in (self.state | {"": params}).items()}
        for tensor in self.views[""]:
            assert tensor.is_contiguous()  # the CPU kernels walk raw memory

    def reset(self, lr: float) -> None:
        """Sets all state to zero, and the step size."""
        self.lr = lr
        self.taken = [0] * self.count
        for tensors in self.state.values():
            for tensor in tensors.values():
                tensor.zero_()

    def moments(self, client: int) -> Params:
        """The state of the stack's client at this index, as views, by `kind/parameter`."""
        return {
            f"{kind}/{name}": tensor[client] for kind, tensors in self.state.items() for name, tensor in tensors.items()
        }

    def load(self, client: int, moments: Params) -> None:
        """Restores a state that `moments` returned."""
        self.taken[client] = None
        for name, tensor in self.moments(client).items():
            tensor.copy_(moments[name])

    @torch.no_grad()
    def step(self, grads: Params, first: int = 0, last: int | None = None) -> None:
        """One step of the clients from `first` to before `last`.

        Args:
            grads: (last - first, *shape), by name of each parameter that is stepped.
        """
        if not grads:
            return
        names = [name for name in self.params if name in grads]
        last = self.count if last is None else last
        counts = set(self.taken[first:last])
        self.taken[first:last] = [count if count is None else count + 1 for count in self.taken[first:last]]
        taken = [steps for name, steps in self.state.get("steps", {}).items() if name in grads]
        for steps in taken:
            steps[first:last] += 1
        # adam's kernel takes one step count for each tensor of the call.
        if self.together and (self.method.optimizer == "sgd" or (len(counts) == 1 and None not in counts)):
            flat = [grads[name].contiguous() for name in names]
            tensors_by_kind = self.state | {"": self.params}
            views = {kind: [tensors[n][first:last] for n in names] for kind, tensors in tensors_by_kind.items()}
            views |= {"steps": [steps[first] for steps in taken]}
        else:
            chosen = slice(first * len(self.params), last * len(self.params))
            flat = [grads[name][k].contiguous() for k in range(last - first) for name in names]
            views = {kind: tensors[chosen] for kind, tensors in self.views.items()}
            if len(names) < len(self.params):
                stepped = [name in grads for name in self.params] * (last - first)
                views = {kind: list(compress(tensors, stepped)) for kind, tensors in views.items()}
        self._kernel(views, flat)

    def _kernel(self, views: dict[str, list[Tensor]], grads: list[Tensor]) -> None:
        method, params = self.method, views[""]
        common = {"lr": self.lr, "weight_decay": method.weight_decay, "maximize": False}
        if method.optimizer == "sgd":
            # Momentum starts at zero, so the first step needs no special case.
            options = {"momentum": method.momentum, "dampening": 0.0, "nesterov": False, "is_first_step": False}
            SGD(params, grads, views.get("momentum", []), **options, **common)
            return
        kernel = ADAM if method.optimizer == "adam" else ADAMW
        betas = {"beta1": method.beta1, "beta2": method.beta2, "eps": method.eps, "amsgrad": False}
        kernel(params, grads, views["first"], views["second"], [], views["steps"], **betas, **common)


def _by_client(tensors: Params, count: int) -> list[Tensor]:
    return list(chain.from_iterable([tensor[k] for tensor in tensors.values()] for k in range(count)))
