"""Client-level differential privacy without a trusted server: clients clip their updates and add noise themselves.

Source: ours; local differential privacy is that of Kasiviswanathan et al. 2008, arXiv 0803.0924, by the Gaussian
mechanism.
"""

import torch

from fedsim.errors import InputError
from fedsim.privacy import Noised, replies
from fedsim.privacy._accounting import Accounting
from fedsim.registry import component, name_of


@component
class LocalDP(Noised):
    """Epsilon is about all that one client sends in all rounds, and any other rows in the place of its own.

    All shared tensors are clipped together, and noise with the standard deviation noise * clip is added to each number;
    a codec encodes the sum. What the server makes of that, robust rules included, needs no more noise. Epsilon is that
    of the client with the most rounds; nothing is gained by the secret of who was drawn, since the server knows.
    Malicious clients that forge an update send it as it is.
    """

    protects = "clients"
    protects_updates = True

    def check(self, method, server, params):
        super().check(method, server, params)
        reasons = {
            "needs the losses of clients": server.needs_loss,
            "gives clients new tensors before they train": bool(server.start(params, torch.Generator())),
        }
        if not any(reasons.values()):
            answers = replies(method, server, params)
            reasons["weights clients by their rows or deltas"] = len({reply.weight for reply in answers}) > 1
            sent = any(reply.message for reply in answers) and not server.computes_messages
            reasons["sums messages of clients, to which no noise is added"] = sent
        for reason, holds in reasons.items():
            if holds:
                raise InputError(
                    f"privacy {name_of(self)} protects the updates of clients and nothing else that they send, but "
                    f"server {name_of(server)} {reason}; take another rule, such as fedavg"
                )

    def protect(self, update, rng):
        if self.clip is None:
            return update
        norm = torch.linalg.vector_norm(update.double())
        clipped = update.double() * (self.clip / norm.clamp_min(self.clip))
        if self.multiplier:
            noise = torch.randn(update.shape, generator=rng, dtype=torch.float64)
            clipped += self.multiplier * self.clip * noise.to(update.device)
        return clipped.to(update.dtype)

    def accounting(self, method, cohort, population, uniform):
        return Accounting("a client's rows replaced", 2.0)
