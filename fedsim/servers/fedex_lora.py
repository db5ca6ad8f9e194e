"""FedAvg of both matrices of a pair, and what their product then lacks of the mean of products beside it.

Source: Singhal et al. 2024, arXiv 2410.09432; as in the authors' code, RaghavSinghal10/fedex-lora, commit 683a3f3,
fed_agg.py, whose mean is uniform. The code trains language models, with rank 4, alpha 8 or 32 and dropout 0.1.
"""

from dataclasses import replace

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import Merged, products, require_lora
from fedsim.updates import apply_update, mean_delta


@component
class FedExLora(Averaging):
    """The weights of the next round are the mean of the clients' weights, exactly; the pairs go on from their means.

    A client sends its pairs. It is sent the mean pairs and the whole matrices of what they lack, summed over rounds,
    since one that was away would otherwise miss some. Products are made where clients train only to sum them there.
    """

    def adapt(self, method):
        require_lora(self, method)
        return Merged.of(method)

    def scope(self, name, scope):
        return "server" if name.startswith("merged.") else scope

    def reply(self, update):
        return replace(super().reply(update), message=products(update.trained))

    def payload(self, shared, server, sent, message, cohort):
        return super().payload(shared, server, sent, {}, cohort)  # the server can make the products of the pairs

    def step(self, params, slots, total, rng):
        merged = {name: tensor for name, tensor in params.items() if name.startswith("merged.")}
        shared = {name: tensor for name, tensor in params.items() if name not in merged}
        mean = apply_update(shared, mean_delta(total, shared))
        of_clients, of_mean = unflatten(total.message / total.weight, merged), products(mean)
        return mean | apply_update(merged, {name: of_clients[name] - of_mean[name] for name in merged}), slots
