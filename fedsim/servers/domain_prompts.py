"""Prompts of domains, each the mean of the clients of its domain; those of other domains change slowly (ADAPT).

Source: the server of method `adapt`, Wei et al. 2024, arXiv 2310.03103, as a review describes it. No authors' code was
found: not checked against code.
Unread: the paper, beyond its abstract.
"""

from dataclasses import replace

import numpy as np
import torch

from fedsim.errors import InputError
from fedsim.methods.adapt import Adapt
from fedsim.params import Params, unflatten
from fedsim.registry import component, name_of
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging
from fedsim.servers._deltas import weighted_sum
from fedsim.updates import RoundSum, apply_update, stepped


@component
class DomainPrompts(Averaging):
    """For method `adapt`. Visual tokens become the mean over all clients of a round, a prompt that over its domain's.

    In a client's loss, the prompts of other domains are frozen copies. Each round, a copy keeps the share `copies` of
    itself and takes the rest from the newest prompt. With `copies` 0 and one client per domain, clients have the newest
    prompts. The newest ones are evaluated.

    A client sends the index of its domain. It is sent the newest prompts and the copies, of which it needs the newest
    one of its domain and the copies of the others.

    Differs: there is one copy for all clients, which is that of each client if all take part in every round.
    """

    needs_deltas = True

    copies: float = Field(
        0.99, ge=0, le=1, search=Choice((0.0, 0.9, 0.99)), description="share that a copy keeps of itself in a round"
    )

    def adapt(self, method):
        if not isinstance(method, Adapt):
            raise InputError(f"server {name_of(self)} needs the prompts of method adapt, not {name_of(method)}")
        return method

    def init(self, params):
        prompts = params.get("tokens", torch.zeros(0))  # (K, L, W), of K domains
        return {"others": {"tokens": prompts}, "trained": {"tokens": torch.zeros(len(prompts))}}, {}

    def broadcast(self, slots, params):
        return {"others": slots["others"]["tokens"]}

    def reply(self, update):
        domain = update.client.domain if update.client else torch.tensor(-1)
        return replace(super().reply(update), message={"domain": domain})

    def step(self, params, slots, total, rng):
        step = _mean(total, total.clients["weight"], params)
        if total.messages is None or "tokens" not in params:
            return apply_update(params, step), slots
        domains, trained = total.messages[:, 0], slots["trained"]["tokens"].clone()
        step["tokens"].zero_()
        for domain in range(len(trained)):
            own = (domains == domain) | (domains < 0)  # a client of several domains trains all prompts
            if (weights := total.clients["weight"] * own).any():
                step["tokens"][domain] = _mean(total, weights, params)["tokens"][domain]
                trained[domain] = 1
        params = apply_update(params, step)
        prompts, others = params["tokens"], slots["others"]["tokens"].double()
        if trained.any():
            prompts[trained == 0] = prompts[trained > 0].double().mean(dim=0).to(prompts.dtype)
        others = torch.lerp(prompts.double(), others, self.copies).to(prompts.dtype)
        return params, {"others": {"tokens": others}, "trained": {"tokens": trained}}


def _mean(total: RoundSum, weights: np.ndarray, like: Params) -> Params:
    """The mean delta of the clients of a round with weights (n,); clients without a step have a delta of 0."""
    return unflatten(weighted_sum(total, weights[stepped(total)]) / weights.sum(), like)
