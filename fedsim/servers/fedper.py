"""FedAvg with private tensors, such as the last layers (FedPer) or some blocks of a tower (FedSplitBERT).

Source: Arivazhagan et al. 2019, arXiv 1912.00818 (FedPer), and Li et al. 2022, arXiv 2205.13299 (FedSplitBERT), of
which no authors' code was found: not checked against code.

Unread: of FedSplitBERT, all but the abstract; so which blocks are private, and how many, is for the user to say.
"""

from fedsim.errors import InputError, listing
from fedsim.fields import Names
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Averaging


@component
class FedPer(Averaging):
    """The mean is uniform by default, as in `fedavg`; `weighting: rows` is the rule of the paper.

    With method finetune, a block is named as `image.transformer/resblocks/11/`; without the last slash, 1 would be the
    blocks 10 and 11, too.

    Differs: FedSplitBERT also quantizes what is sent; here that is a codec, such as `int8`.
    """

    prefix: Names = Field(
        ("head",), min_length=1, description="tensors whose names begin with one of these are private, comma-separated"
    )

    def check(self, params, cohort):
        for prefix in self.prefix:
            if not any(name.startswith(prefix) for name in params):
                raise self._refused("none", prefix, params)
        if all(name.startswith(self.prefix) for name in params):
            raise self._refused("all", listing(self.prefix), params)

    def _refused(self, count: str, prefix: str, params: Params) -> InputError:
        return InputError(
            f"fedper makes some shared tensors private, but {count} of this method's names begin with {prefix!r}; set "
            f"--server.prefix to the beginning of some of these: {listing(sorted(params))}"
        )

    def scope(self, name, scope):
        return "private" if scope == "shared" and name.startswith(self.prefix) else scope
