"""Asynchronous federated averaging with a buffer of updates (FedBuff).

Source: Nguyen et al. 2022, arXiv 2106.06639 (FedBuff). The scaled sum of a buffer is divided by the number of
updates, not by the sum of their scales, so stale buffers take shorter steps.

The buffer of 10 is also that of the example in FLSim, the library of the authors' group (facebookresearch/FLSim, commit
7311f2d, examples/configs/sent140_fedbuff_config.json). No code of the paper's experiments was found: otherwise not
checked against code. The concurrency of 100 is ours.

Differs: FLSim sums a buffer without dividing, so its step sizes (0.7 in that example, with momentum 0.9) do not carry
over, and it scales updates so that one of average age has weight 1.
"""

from typing import Literal

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update


@component
class FedBuff(Server):
    """A round is one full buffer, with at most one update per client. It needs a fleet with device times."""

    averages = False

    buffer: int = Field(10, ge=1, description="updates per server step; the paper's K, which it sets to 10")
    concurrency: int = Field(
        100, ge=1, description="clients that train at the same time, if the population is that large"
    )
    lr: float = Field(1.0, gt=0, search=Log(0.01, 10.0), description="server step size; the paper tunes it per task")
    staleness: Literal["sqrt", "constant"] = Field(
        "sqrt", description="weight of an update that is t rounds old: 1/sqrt(1 + t), as in the paper, or 1"
    )

    def reply(self, update):
        return Reply((1 + update.staleness) ** -0.5 if self.staleness == "sqrt" else 1.0)

    def step(self, params, slots, total, rng):
        return apply_update(params, unflatten(self.lr / len(total.clients) * total.delta, params)), slots
