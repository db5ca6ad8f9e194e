"""Nobody shares anything: every client trains alone. The baseline that federation has to beat.

Source: a standard baseline; there is no paper to cite.
"""

from fedsim.registry import component
from fedsim.servers import Server


@component
class LocalOnly(Server):
    """All tensors stay private, whatever the method; held-out domains are judged by every client's own model."""

    def scope(self, name, scope):
        return "private" if scope == "shared" else scope

    def step(self, params, slots, total, rng):
        return params, slots
