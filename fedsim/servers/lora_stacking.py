"""The pairs of all clients, stacked along the rank, are added to the frozen weights, and every pair starts anew.

Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA).
"""

from dataclasses import replace
from hashlib import blake2b

import torch

from fedsim.errors import InputError
from fedsim.params import flatten, payload_bytes, unflatten
from fedsim.registry import component
from fedsim.servers import Server, mean_delta, moved
from fedsim.servers._lora import products, wants_lora


@component
class LoraStacking(Server):
    """A product of stacked pairs is the mean of the clients' products, which is how it is held here: summed.

    Bytes are those of the paper: a client sends its pairs and is sent the stack of a whole cohort's, in the first round
    too. Not counted is what a client that was away has missed of earlier stacks.
    """

    moves_server = True

    def fit(self, method):
        wants_lora(self, method)
        if method.keep_moments:
            raise InputError("lora_stacking starts every pair anew each round; leave --method.keep_moments out")
        return replace(method, merged=True)

    def settle(self, kept, sent, received, trained, steps, lr):
        return kept, products(trained)

    def payload(self, shared, server, cohort):
        return cohort * payload_bytes(shared), payload_bytes(shared)

    def step(self, params, slots, total):
        merged = {name: tensor for name, tensor in params.items() if name.startswith("merged.")}
        shared = {name: tensor for name, tensor in params.items() if name not in merged}
        mean = moved(shared, mean_delta(total, shared))
        merged = moved(merged, unflatten(total.message / total.weight, merged))
        return mean | _anew(shared) | merged, slots


def _anew(shared):
    """Every pair as at its start: `down` drawn, `up` zero.

    The seed is the last `down`. Each draw thus follows from that of round 0, and so from the run's seed, without
    anything to remember; clients can draw it for themselves.
    """
    downs = {name: tensor for name, tensor in shared.items() if name.startswith("down.")}
    seed = blake2b(flatten(downs).tobytes(), digest_size=8).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    fresh = {name: torch.zeros_like(tensor) for name, tensor in shared.items() if name.startswith("up.")}
    for name in sorted(downs):
        like = downs[name]
        fresh[name] = (torch.randn(like.shape, generator=draw, dtype=torch.float64) / like.shape[-2] ** 0.5).to(like)
    return fresh
