"""FedAvg whose evaluated model is a moving average of the server's models over the rounds.

Source: the server of TRIP's code, GongShuai8210/TRIP, commit c79253e, TRIP/methods/FedMoeP_NR_cos.py: weights from a
Beta density (its default, with shape 0.2), or exponential ones (0.99). The former are CLIPood's, Shu et al. 2023, arXiv
2302.00864, and have the positions of its code, thuml/CLIPood, commit 538dd3b, engine.py.

Gaussian weights are PromptSRC's, Khattak et al. 2023, arXiv 2307.06948, whose code (muzairkhattak/PromptSRC, commit
bb95c77, trainers/promptsrc.py) averages the prompts of its epochs in this way, with the 15th of 20 as the centre.

Differs: in FLIP, 0-ml/flip, commit ec3a848, which has these weights by round, the sum so far replaces the server's
model in each round. Its first weights are nearly 0, so its first prompts are too; here clients are sent the model.

Differs: TRIP's code gives the model after round r the position of round r - 1, so that its density is not symmetric. It
weights clients by their rows (`weighting: rows`); the mean is uniform by default, as in `fedavg`.

Unread: the papers of TRIP and of DiPrompT (arXiv 2403.08506), which averages prompts in this way.
"""

import math
from typing import Literal

import torch

from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging


@component
class MovingAverage(Averaging):
    """Clients are sent the server's model; only the average is evaluated. It includes the model of round 0.

    With exponential weights and decay 0 this is `fedavg`; with beta and shape 1, the plain mean of all models so far.
    Gaussian weights leave out the model of round 0, as PromptSRC's do.
    In a round without an update the model stays as it is; that round counts from the next update on.
    """

    average: Literal["exponential", "beta", "gaussian"] = Field(
        "beta",
        description="weights of the rounds: exponential, gaussian, or a Beta density over the run, whose rounds are "
        "then fixed",
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
    center: float = Field(15.0, ge=1, le=1e9, description="of gaussian: the round that weighs most")
    width: float = Field(
        1.0,
        ge=0.01,
        search=Choice((1.0, 5.0, 10.0), when=("average", "gaussian")),
        description="of gaussian: the standard deviation, in rounds",
    )

    @property
    def evaluated_as(self):
        weights = {"exponential": "exponential", "beta": "beta-weighted", "gaussian": "Gaussian-weighted"}
        return f"{weights[self.average]} moving average"

    @property
    def fixed_rounds(self):
        return self.average == "beta"

    def init(self, params):
        average = {name: tensor.double() for name, tensor in params.items()}
        return {"average": average, "last": {"round": torch.zeros((), dtype=torch.float64)}}, {}

    def evaluated(self, params, slots):
        return {name: slots["average"][name].to(tensor.dtype) for name, tensor in params.items()}

    def step(self, params, slots, total, rng):
        last, average, rounds = int(slots["last"]["round"]), slots["average"], total.rounds or total.round
        if last < total.round - 1:  # no update since
            average = _moved(average, params, self._share(last, total.round - 1, rounds))
        params, _ = super().step(params, slots, total, rng)
        average = _moved(average, params, self._share(total.round - 1, total.round, rounds))
        return params, {"average": average, "last": {"round": torch.tensor(total.round, dtype=torch.float64)}}

    def _share(self, last: int, round: int, rounds: int) -> float:
        """The weight of the models after round `last` in the average of those up to `round`."""
        if self.average == "exponential":
            return 1 - self.decay ** (round - last)
        weights = self._weights(round, rounds)
        return sum(weights[last + 1 :]) / sum(weights)

    def _weights(self, round: int, rounds: int) -> list[float]:
        """The weights of the models after rounds 0 to `round`, up to a factor with which not all of them underflow."""
        if self.average == "gaussian":
            logs = [-(((k - self.center) / self.width) ** 2) / 2 for k in range(1, round + 1)]
            largest = max(logs)
            return [0.0, *(math.exp(log - largest) for log in logs)]
        positions = [(k + 0.5) / (rounds + 1) for k in range(round + 1)]
        # Relative to the newest: the constant of the density cancels out, and no power underflows.
        spans = [x * (1 - x) for x in positions]
        return [(span / spans[-1]) ** (self.shape - 1) for span in spans]


def _moved(average: Params, params: Params, share: float) -> Params:
    return {name: mean.lerp(params[name].double(), share) for name, mean in average.items()}
