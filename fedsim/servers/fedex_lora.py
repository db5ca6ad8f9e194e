"""FedAvg of LoRA pairs, plus the exact residual between the mean product and the product of means (FedEx-LoRA).

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
    """The next round starts from the exact mean of the clients' weights, with the mean pairs plus a residual.

    Clients send their pairs and receive the mean pairs and the residual matrices. The residuals are summed over rounds,
    since a client that was not in the cohort would otherwise miss some. Clients compute their products only so that
    they can be summed; products are not counted as traffic.
    """

    computes_messages = True

    def adapt(self, method):
        return Merged.of(require_lora(self, method))

    def scope(self, name, scope):
        return "server" if name.startswith("merged.") else scope

    def reply(self, update):
        return replace(super().reply(update), message=products(update.trained))

    def payload(self, shared, server, sent, message, cohort):
        return super().payload(shared, server, sent, {}, cohort)  # the server could compute the products from the pairs

    def step(self, params, slots, total, rng):
        merged = {name: tensor for name, tensor in params.items() if name.startswith("merged.")}
        shared = {name: tensor for name, tensor in params.items() if name not in merged}
        mean = apply_update(shared, mean_delta(total, shared))
        mean_product, product_of_means = unflatten(total.message / total.weight, merged), products(mean)
        residual = {name: mean_product[name] - product_of_means[name] for name in merged}
        return mean | apply_update(merged, residual), slots
