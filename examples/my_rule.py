"""FedAvg with Nesterov momentum on the server.

Source: the outer optimizer of DiLoCo (Douillard et al. 2023, arXiv 2311.08105); not checked against code.
"""

from fedsim import Field, Linear, Server, apply_update, component, mean_delta


@component
class Nesterov(Server):
    """Steps along the new momentum and the mean delta."""

    beta: float = Field(0.9, ge=0, lt=1, search=Linear(0.0, 0.99), description="share of the momentum that is kept")

    def step(self, params, slots, total):
        delta = mean_delta(total, params)
        past = slots.get("momentum", {name: 0 * value for name, value in delta.items()})
        momentum = {name: self.beta * past[name] + value for name, value in delta.items()}
        step = {name: self.beta * momentum[name] + value for name, value in delta.items()}
        return apply_update(params, step), {"momentum": momentum}
