"""Keys of groups, averaged by how often each client selected the group; keys and tokens change with momentum (SGPT).

Source: the server of method `sgpt`, Deng et al., CVPR 2024, arXiv 2310.18285, as in the authors' code, ubc-tea/SGPT,
commit 213c95b: aggregation_func and group_ratio_func in utils.py, with the script's flags in train.sh.
Unread: the paper, beyond its abstract.
"""

from typing import Literal

import torch

from fedsim.methods.sgpt import SGPT
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging
from fedsim.servers._deltas import weighted_mean
from fedsim.servers._needs import required
from fedsim.updates import apply_update, stepped

FEW = 50  # selections of a group in a round, up to which all clients weigh the same


@component
class GroupKeys(Averaging):
    """For method `sgpt`. Shared tokens become the mean by rows.

    The key of a group is averaged with the weights of clients' selections of it in this round, or with equal ones if
    there are at most 50. Of keys and tokens of groups, a share of the old ones stays; the authors' script for
    Office-Caltech10 has a `key_momentum` of 0. Clients are sent the sum of all selections so far.
    """

    needs_deltas = True

    weighting: Literal["uniform", "rows"] = "rows"
    key_momentum: float = Field(
        0.5, ge=0, lt=1, search=Choice((0.0, 0.5, 0.9)), description="share of the keys that stays in a round"
    )
    token_momentum: float = Field(
        0.5, ge=0, lt=1, search=Choice((0.0, 0.5, 0.9)), description="share of the tokens of groups that stays"
    )

    def adapt(self, method):
        return required(self, method, SGPT, "groups of method sgpt")

    def init(self, params):
        return {"selections": {"counts": torch.zeros(len(params["counts"]))}}, {}

    def broadcast(self, slots, params):
        return {"selections": slots["selections"]["counts"]}

    def step(self, params, slots, total, rng):
        active, step = stepped(total), weighted_mean(total, total.clients["weight"], params)
        if not len(active):
            return apply_update(params, step), slots
        deltas = [unflatten(delta, params) for delta in total.require_deltas()[active]]
        counts = torch.stack([delta["counts"].double() for delta in deltas])  # (n, G)
        selected = counts.sum(dim=0)
        shares = torch.where(selected > FEW, counts / selected, 1 / len(counts))
        keys = [share[:, None] * delta["keys"].double() for share, delta in zip(shares, deltas, strict=True)]
        step["keys"] = (1 - self.key_momentum) * torch.stack(keys).sum(dim=0)
        step["grouped"] = (1 - self.token_momentum) * step["grouped"]
        step["counts"].zero_()  # clients count from 0 in each round
        selections = slots["selections"]["counts"]
        selections = (selections.double() + selected).to(selections.dtype)
        return apply_update(params, step), {"selections": {"counts": selections}}
