"""Surveys, trains and evaluates chunks of clients, in an actor or in the driver's own process."""

from fedsim.clients import Population
from fedsim.clip.model import Frozen
from fedsim.representations import Encoded
from fedsim.training.evaluator import Evaluator
from fedsim.training.models import Models
from fedsim.training.survey import Surveyor
from fedsim.training.trainer import Trainer


class ClientWorker:
    """Surveys, trains and evaluates chunks of clients. A chunk is pure: the same call gives the same bits anywhere.

    `survey`, `train` and `evaluate` are those of `Surveyor`, `Trainer` and `Evaluator`, which share the modules and
    the data.
    """

    def __init__(self, data: Encoded, clients: Population, frozen: Frozen | None = None, device: str = "cpu") -> None:
        """
        Args:
            frozen: CLIP, for methods that train through its towers.
            device: cpu or cuda.
        """
        self.models = Models(data, frozen, device)
        self.survey = Surveyor(self.models, clients).survey
        self.train = Trainer(self.models, clients).train
        self.evaluate = Evaluator(self.models, clients).evaluate
