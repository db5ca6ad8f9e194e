"""FedAvg whose evaluated model is a moving average of the server's models over the rounds.

Source: the server of TRIP's code, GongShuai8210/TRIP, commit c79253e, TRIP/methods/FedMoeP_NR_cos.py: weights from a
Beta density (its default, with shape 0.2), or exponential ones (0.99). The former are CLIPood's, Shu et al. 2023, arXiv
2302.00864, and have the positions of its code, thuml/CLIPood, commit 538dd3b, engine.py.

Differs: TRIP's code gives the model after round r the position of round r - 1, so that its density is not symmetric. It
weights clients by their rows (`weighting: rows`); the mean is uniform by default, as in `fedavg`.

Unread: the papers of TRIP and of DiPrompT (arXiv 2403.08506), which averages prompts in this way.
"""

from typing import Literal

from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging


@component
class MovingAverage(Averaging):
    """Clients are sent the server's model; only the average is evaluated. It includes the model of round 0.

    With exponential weights and decay 0 this is `fedavg`; with beta and shape 1, the plain mean of all models so far.
    """

    average: Literal["exponential", "beta"] = Field(
        "beta",
        description="weights of the rounds: exponential, or a Beta density over the run, whose rounds are then fixed",
    )
    decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        search=Choice((0.5, 0.9, 0.99), when=("average", "exponential")),
        description="of exponential: weight of the average so far",
    )
    shape: float = Field(
        0.2,
        gt=0,
        le=10,
        search=Choice((0.2, 0.5, 1.0), when=("average", "beta")),
        description="of beta: both parameters of the density; below 1, the first and the last models weigh most",
    )

    @property
    def evaluated_as(self):
        return "beta-weighted moving average" if self.average == "beta" else "exponential moving average"

    @property
    def fixed_rounds(self):
        return self.average == "beta"

    def init(self, params):
        return {"average": {name: tensor.double() for name, tensor in params.items()}}, {}

    def evaluated(self, params, slots):
        return {name: slots["average"][name].to(tensor.dtype) for name, tensor in params.items()}

    def step(self, params, slots, total, rng):
        params, _ = super().step(params, slots, total, rng)
        share = self._share(total.round, total.rounds or total.round)
        average = {name: mean.lerp(params[name].double(), share) for name, mean in slots["average"].items()}
        return params, {"average": average}

    def _share(self, round: int, rounds: int) -> float:
        """The weight of the newest model in the average."""
        if self.average == "exponential":
            return 1 - self.decay
        positions = [(k + 0.5) / (rounds + 1) for k in range(round + 1)]
        # Relative to the newest: the constant of the density cancels out, and no power underflows.
        spans = [x * (1 - x) for x in positions]
        return 1 / sum((span / spans[-1]) ** (self.shape - 1) for span in spans)
