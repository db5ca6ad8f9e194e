"""The optimizers of a stack of clients, stepping all of them at once, their state in the open.

torch's fused kernels are called as they are: making a torch.optim.Optimizer imports torch._dynamo, 4 CPU seconds per
actor, and even the functional forms around the kernels take a tenth of the time of a step.
"""

from itertools import chain

import torch
from torch import Tensor

from fedsim.methods import Method
from fedsim.params import Params


class Optimizer:
    """Steps the parameters of M clients in place by their gradients.

    Attributes:
        state: what it remembers, by kind and parameter, (M, *shape): `first`, `second` and `steps` (M,) of adam and
            adamw, `momentum` of sgd with momentum.
        together: whether clients are stepped in one call per parameter where their step counts are equal. A GPU needs
            that; on a CPU client by client is faster, for one client's tensors stay in cache.
    """

    def __init__(self, method: Method, params: Params, together: bool | None = None) -> None:
        """
        Args:
            params: each (M, *shape) and contiguous, client by client.
            together: (default: on a GPU)
        """
        first = next(iter(params.values()), torch.empty(0))
        self.method, self.params, self.count = method, params, len(first)
        self.together = first.is_cuda if together is None else together
        self.state: dict[str, Params] = {}
        if method.optimizer != "sgd":
            self.state = {kind: {n: torch.zeros_like(v) for n, v in params.items()} for kind in ("first", "second")}
            self.state["steps"] = {
                n: torch.zeros(len(v), dtype=torch.float32, device=v.device) for n, v in params.items()
            }
        elif method.momentum:
            self.state = {"momentum": {n: torch.zeros_like(v) for n, v in params.items()}}
        self.taken: list[int | None] = [0] * self.count  # steps of each client; None where only the state knows
        # Client by client, as the kernels are given them; made once, for a view costs as much as a small kernel.
        self.views = {kind: _by_client(tensors, self.count) for kind, tensors in (self.state | {"": params}).items()}
        for tensor in self.views[""]:
            assert tensor.is_contiguous()  # the kernels for the CPU walk raw memory

    def reset(self) -> None:
        """Forgets everything."""
        self.taken = [0] * self.count
        for tensors in self.state.values():
            for tensor in tensors.values():
                tensor.zero_()

    def moments(self, client: int) -> Params:
        """What it remembers of the client at this place of the stack, as views."""
        return {f"{kind}/{name}": tensor[client] for kind, some in self.state.items() for name, tensor in some.items()}

    def load(self, client: int, moments: Params) -> None:
        """Goes on from what `moments` gave earlier."""
        self.taken[client] = None
        for name, tensor in self.moments(client).items():
            tensor.copy_(moments[name])

    @torch.no_grad()
    def step(self, grads: Params, first: int = 0, last: int | None = None) -> None:
        """One step of the clients from `first` to before `last`.

        Args:
            grads: of each parameter, (last - first, *shape).
        """
        if not grads:
            return
        last = self.count if last is None else last
        counts = set(self.taken[first:last])
        self.taken[first:last] = [count if count is None else count + 1 for count in self.taken[first:last]]
        for steps in self.state.get("steps", {}).values():
            steps[first:last] += 1
        # A step count enters a step of adam as one number for each tensor of the call.
        if self.together and (self.method.optimizer == "sgd" or (len(counts) == 1 and None not in counts)):
            slope = [grads[name].contiguous() for name in self.params]
            views = {
                kind: [v[first:last] for v in some.values()] for kind, some in (self.state | {"": self.params}).items()
            }
            views |= {"steps": [steps[first] for steps in self.state.get("steps", {}).values()]}
        else:
            mine = slice(first * len(self.params), last * len(self.params))
            slope = [grads[name][k].contiguous() for k in range(last - first) for name in self.params]
            views = {kind: some[mine] for kind, some in self.views.items()}
        self._kernel(views, slope)

    def _kernel(self, views: dict[str, list[Tensor]], grads: list[Tensor]) -> None:
        method, params = self.method, views[""]
        common = {"lr": method.lr, "weight_decay": method.weight_decay, "maximize": False}
        if method.optimizer == "sgd":
            # Momentum starts at zero, so that its first step is like any other.
            how = {"momentum": method.momentum, "dampening": 0.0, "nesterov": False, "is_first_step": False}
            torch._fused_sgd_(params, grads, views.get("momentum", []), **how, **common)
            return
        kernel = torch._fused_adam_ if method.optimizer == "adam" else torch._fused_adamw_
        betas = {"beta1": method.beta1, "beta2": method.beta2, "eps": method.eps, "amsgrad": False}
        kernel(params, grads, views["first"], views["second"], [], views["steps"], **betas, **common)


def _by_client(tensors: Params, count: int) -> list[Tensor]:
    return list(chain.from_iterable([tensor[k] for tensor in tensors.values()] for k in range(count)))
