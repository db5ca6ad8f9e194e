"""Base of the rules by which the prompts of a domain become the mean over the clients of that domain."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.params import Params
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._deltas import weighted_mean
from fedsim.updates import RoundSum, apply_update


@component
class PerDomain(Averaging):
    """A client sends the index of its domain."""

    needs_deltas = True

    def reply(self, update):
        # Without a client, the message is only counted.
        domain = update.client.domain if update.client else torch.tensor(-1)
        return replace(super().reply(update), message={"domain": domain})

    def by_domain(
        self, params: Params, total: RoundSum, trained: Tensor, names: Collection[str]
    ) -> tuple[Params, Tensor]:
        """The parameters after a round, and which domains have been trained.

        Args:
            trained: (K,) 1 for domains of which a client has changed the prompts; the others get the mean of these.
            names: of the tensors with a prompt of each domain, (K, ...).
        """
        step = weighted_mean(total, total.clients["weight"], params)
        assert total.messages is not None, "needs_deltas"
        domains, trained = total.messages[:, 0], trained.clone()
        for name in names:
            step[name].zero_()
        for domain in range(len(trained)):
            own = (domains == domain) | (domains < 0)  # a client of several domains trains all prompts
            if (weights := total.clients["weight"] * own).any():
                mean = weighted_mean(total, weights, params)
                for name in names:
                    step[name][domain] = mean[name][domain]
                    trained[domain] = trained[domain].maximum(mean[name][domain].any())
        params = apply_update(params, step)
        if trained.any():
            for prompts in (params[name] for name in names):
                prompts[trained == 0] = prompts[trained > 0].double().mean(dim=0).to(prompts.dtype)
        return params, trained
