"""Prompts of domains, each the mean of the clients of its domain; those of other domains change slowly (ADAPT).

Source: the server of method `adapt`, Wei et al. 2024, arXiv 2310.03103, as a review describes it. No authors' code was
found: not checked against code.
Unread: the paper, beyond its abstract.
"""

import torch

from fedsim.methods.adapt import Adapt
from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers._domains import PerDomain
from fedsim.servers._needs import required


@component
class DomainPrompts(PerDomain):
    """For method `adapt`. Visual tokens become the mean over all clients of a round, a prompt that over its domain's.

    In a client's loss, the prompts of other domains are frozen copies. Each round, a copy keeps the share `copies` of
    itself and takes the rest from the newest prompt. With `copies` 0 and one client per domain, clients have the newest
    prompts. The newest ones are evaluated.

    A client sends the index of its domain. It is sent the newest prompts and the copies, of which it needs the newest
    one of its domain and the copies of the others.

    Differs: there is one copy for all clients, which is that of each client if all take part in every round.
    """

    copies: float = Field(
        0.99, ge=0, le=1, search=Choice((0.0, 0.9, 0.99)), description="share that a copy keeps of itself in a round"
    )

    def adapt(self, method):
        return required(self, method, Adapt, "prompts of method adapt")

    def init(self, params):
        prompts = params["tokens"]  # (K, L, W), of K domains
        return {"others": {"tokens": prompts}, "trained": {"tokens": torch.zeros(len(prompts))}}, {}

    def broadcast(self, slots, params):
        return {"others": slots["others"]["tokens"]}

    def step(self, params, slots, total, rng):
        params, trained = self.by_domain(params, total, slots["trained"]["tokens"], ["tokens"])
        prompts, others = params["tokens"], slots["others"]["tokens"].double()
        others = torch.lerp(prompts.double(), others, self.copies).to(prompts.dtype)
        return params, {"others": {"tokens": others}, "trained": {"tokens": trained}}
