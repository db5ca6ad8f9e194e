"""Differential privacy of single rows by DP-SGD on each client: row gradients are clipped, and each step adds noise.

Source: Abadi et al. 2016, arXiv 1607.00133, on each client.

Differs: the paper's accountant is for Poisson-sampled batches. Here a local epoch goes through the shuffled rows, as in
every other run, so a row is in one batch of each epoch, and no amplification by sampling is claimed: a local epoch
counts as one release of the Gaussian mechanism. That is exact for a row whose gradients are set to zero, whatever the
optimizer makes of the noised gradients.
"""

from fedsim.errors import InputError
from fedsim.privacy import Noised
from fedsim.privacy._accounting import Accounting
from fedsim.registry import component, name_of


@component
class ExampleDP(Noised):
    """Epsilon is about all that one client sends, and one of its rows, whose gradients are zeros.

    The gradients of a row by all tensors that the client trains, private ones included, are clipped together; their sum
    gets noise with the standard deviation noise * clip, and is divided by the rows of the batch. Epsilon is that of the
    client with the most rounds. How many rows a client has is not hidden, so rules may weight clients by rows.

    It needs losses that are means over rows; with contrasts between the rows of a batch, a row changes the gradients of
    others.
    """

    protects = "rows"

    def check(self, method, server, params):
        super().check(method, server, params)
        reasons = {
            "contrasts the rows of a batch": method.contrasts_rows,
            "estimates the gradients of whole batches (--method.estimator)": method.estimator == "spsa",
            "reads the rows of held-out domains": method.reads_target,
            "compares the groups of rows": method.reads_group,
            "trains on rows that it makes of all of a client's": method.expands,
            "reads a client's counts of classes": method.reads_client,
            "has only the classes of a client's rows compete (--method.label-space)": method.label_space == "client",
        }
        for reason, holds in reasons.items():
            if holds:
                raise InputError(
                    f"privacy {name_of(self)} clips the gradients of single rows, but method {name_of(method)} "
                    f"{reason}, so a row changes those of others; take another method or objective"
                )
        if server.needs_loss:
            raise InputError(
                f"privacy {name_of(self)} does not cover the losses of clients, which server {name_of(server)} needs; "
                "take another rule"
            )

    def accounting(self, method, cohort, population, uniform):
        return Accounting("a row's gradients, or zeros in their place", per_round=method.local_epochs)
