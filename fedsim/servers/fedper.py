"""FedAvg with private last layers (FedPer).

Source: Arivazhagan et al. 2019, arXiv 1912.00818, of which no authors' code was found: not checked against code.
"""

from fedsim.errors import InputError, listing
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Averaging


@component
class FedPer(Averaging):
    """The mean is uniform by default, as in `fedavg`; `weighting: rows` is the rule of the paper."""

    prefix: str = Field("head", min_length=1, description="tensors whose names begin with this are private")

    def check(self, params, cohort):
        private = [name for name in params if name.startswith(self.prefix)]
        if not private or len(private) == len(params):
            raise InputError(
                f"fedper makes some shared tensors private, but {'all' if private else 'none'} of this method's names "
                f"begin with {self.prefix!r}; set --server.prefix to the beginning of some of these: "
                f"{listing(sorted(params))}"
            )

    def scope(self, name, scope):
        return "private" if scope == "shared" and name.startswith(self.prefix) else scope
