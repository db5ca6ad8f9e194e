"""Every client draws a new pair in every round; the pairs of all, stacked along the rank, join the frozen weights.

Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA); who draws a pair, and when, as in the authors' code,
ATP-1010/FederatedLLM, main.py and fed_utils/model_aggregation.py, commit 7bea158. It is another method than the FLoRA
of Nguyen et al. 2024, for which see method `lora`.
"""

from dataclasses import replace

from fedsim.errors import InputError
from fedsim.methods.lora import drawn
from fedsim.params import payload_bytes, unflatten
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import Merged, products, require_lora
from fedsim.updates import apply_update


@component
class LoraStacking(Averaging):
    """A product of stacked pairs is the mean of the clients' products, which is how it is held here: summed.

    `down` follows from the run's seed, the round and the client. If all clients started from the same one, their stack
    would hardly have a higher rank than a single pair: `down` moves little in a round.

    Bytes are those of the paper: a client sends its pairs and is sent the stack of a whole cohort's, in the first round
    too. Not counted is what a client that was away has missed of earlier stacks.

    Differs: uniform is the default, as of all rules; the code weights clients by their rows, here `weighting: rows`.
    A pair starts as those of method `lora` do, where the code has PEFT's uniform start. All clients have the same rank.
    """

    def adapt(self, method):
        require_lora(self, method)
        if method.persist_optimizer:
            raise InputError("lora_stacking starts every pair again each round; leave --method.persist_optimizer out")
        return Merged.of(method)

    def start(self, params, rng):
        # In the order of their names, and not of the dict, so that a draw follows from the seed alone.
        downs = sorted(name for name in params if name.startswith("down."))
        return {name: drawn(params[name].shape, rng).to(params[name]) for name in downs}

    def scope(self, name, scope):
        return "server" if name.startswith("merged.") else scope

    def reply(self, update):
        return replace(super().reply(update), message=products(update.trained))

    def payload(self, shared, server, sent, message, cohort):
        return cohort * payload_bytes(shared), payload_bytes(shared)

    def step(self, params, slots, total, rng):
        # The pairs stay as in round 0, with `up` zero: what clients have trained is in the products.
        merged = {name: tensor for name, tensor in params.items() if name.startswith("merged.")}
        return params | apply_update(merged, unflatten(total.message / total.weight, merged)), slots
