"""FedAvg with Nesterov momentum on the server.

Source: the outer optimizer of DiLoCo (Douillard et al. 2023, arXiv 2311.08105); not checked against code.
"""

from fedsim import Averaging, Field, Linear, apply_update, component, mean_delta


@component
class Nesterov(Averaging):
    """Steps along the mean delta plus the updated momentum."""

    beta: float = Field(0.9, ge=0, lt=1, search=Linear(0.0, 0.99), description="server momentum")

    def init(self, params):
        return {"momentum": {name: 0 * value.double() for name, value in params.items()}}, {}

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        momentum = {name: self.beta * slots["momentum"][name] + value for name, value in delta.items()}
        step = {name: self.beta * momentum[name] + value for name, value in delta.items()}
        return apply_update(params, step), {"momentum": momentum}
