"""Local training without federation, the baseline that federated methods have to beat.

Source: a standard baseline; there is no paper to cite.
"""

from fedsim.registry import component
from fedsim.servers import Server


@component
class LocalOnly(Server):
    """All shared tensors become private; each client's model is also evaluated on held-out domains."""

    def scope(self, name, scope):
        return "private" if scope == "shared" else scope

    def step(self, params, slots, total, rng):
        return params, slots
