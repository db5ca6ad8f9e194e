"""New LoRA pairs per client and round, stacked along the rank and added to the frozen weights (FLoRA).

Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA); pairs are drawn where and when the authors' code draws them,
ATP-1010/FederatedLLM, main.py and fed_utils/model_aggregation.py, commit 7bea158. The FLoRA of Nguyen et al. 2024 is a
different method; see method `lora`.
"""

from dataclasses import replace

from fedsim.errors import InputError, listing
from fedsim.methods.lora import random_down
from fedsim.params import payload_bytes, unflatten
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import Merged, first_ranks, products, require_lora
from fedsim.updates import apply_update


@component
class LoraStacking(Averaging):
    """The product of the stacked pairs is the mean of the clients' products; it is stored as a sum of products.

    `down` is drawn from the run's seed, the round and the client. If all clients started from the same `down`, the rank
    of their stack would hardly exceed that of a single pair, since `down` moves little in a round.

    Bytes are those of the paper: a client sends its pairs and receives the stack of a whole cohort, in the first round
    too. Earlier stacks that a client missed are not counted. With `--fleet.ranks`, clients have pairs of unequal rank,
    and the stack of a cohort counts with its mean size.

    Differs: the mean is uniform by default; the code weights clients by their rows, here `weighting: rows`. Pairs start
    as in method `lora`; the code uses PEFT's uniform initialization. Products are multiplied by alpha / `--method.rank`
    whatever a client's rank; in the code, too, alpha grows with it.
    """

    heeds = frozenset(("rank",))

    def adapt(self, method):
        pairs = require_lora(self, method)
        if method.persist_optimizer:
            raise InputError("lora_stacking draws new pairs in each round; leave --method.persist-optimizer out")
        return Merged.of(pairs)

    def check(self, params, cohort):
        if others := [name for name in params if not name.startswith(("up.", "down."))]:
            raise InputError(
                f"lora_stacking stacks low-rank pairs, and could not move {listing(others)}; take fedex_lora"
            )

    def start(self, params, rng):
        # Sorted by name, so that the draws depend on the seed alone and not on the order of the dict.
        downs = sorted(name for name in params if name.startswith("down."))
        return {name: random_down(params[name].shape, rng).to(params[name]) for name in downs}

    def held(self, params, device, rng):
        return first_ranks(params, device)

    def scope(self, name, scope):
        return "server" if name.startswith("merged.") else scope

    def reply(self, update):
        return replace(super().reply(update), message=products(update.trained))

    def payload(self, shared, server, sent, message, cohort):
        return round(cohort * payload_bytes(shared)), payload_bytes(shared)

    def step(self, params, slots, total, rng):
        # The pairs stay as in round 0, with `up` at zero; the products hold what clients have trained.
        merged = {name: tensor for name, tensor in params.items() if name.startswith("merged.")}
        return params | apply_update(merged, unflatten(total.message / total.weight, merged)), slots
