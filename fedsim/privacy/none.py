"""Updates are neither clipped nor noised.

Source: ours; simulations without privacy assume it.
"""

from fedsim.privacy import Privacy
from fedsim.registry import component


@component
class Unprotected(Privacy):
    """The server sees the sum of the clients' updates as they are."""

    def accounting(self, method, cohort, population, uniform):
        return None
