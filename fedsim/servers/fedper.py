"""FedAvg of all but the last layers, of which every client keeps its own.

Source: Arivazhagan et al. 2019, arXiv 1912.00818, of which no authors' code was found: not checked against code.
"""

from fedsim.errors import InputError, listing
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Averaging


@component
class FedPer(Averaging):
    """Uniform by default, as FedAvg here; `weighting: rows` is the paper's."""

    prefix: str = Field("head", min_length=1, description="a tensor whose name begins so stays with its client")

    def check(self, params, cohort):
        mine = [name for name in params if name.startswith(self.prefix)]
        if not mine or len(mine) == len(params):
            raise InputError(
                f"fedper keeps some of a method's shared tensors, those whose names begin with {self.prefix!r}, and of "
                f"this method these are {'all' if mine else 'none'}; set --server.prefix to the beginning of some of: "
                f"{listing(sorted(params))}"
            )

    def scope(self, name, scope):
        return "private" if scope == "shared" and name.startswith(self.prefix) else scope
