"""Surveys, trains, evaluates and tunes chunks of clients, in an actor or in the driver's own process."""

from fedsim.clients import Population
from fedsim.clip.model import Frozen
from fedsim.representations import Encoded
from fedsim.training.evaluator import Evaluator
from fedsim.training.models import Models
from fedsim.training.root import RootTrainer
from fedsim.training.survey import Surveyor
from fedsim.training.trainer import Trainer
from fedsim.training.tuner import Tuner


class ClientWorker:
    """Does a chunk of clients' share of a run. A chunk is pure: the same call gives the same bits anywhere.

    `survey`, `train`, `evaluate` and `tune` are those of `Surveyor`, `Trainer`, `Evaluator` and `Tuner`, and `root` is
    the server's own training; they share the modules and the data.
    """

    def __init__(self, data: Encoded, clients: Population, frozen: Frozen | None = None, device: str = "cpu") -> None:
        """
        Args:
            frozen: CLIP, for methods that train through its towers.
            device: cpu or cuda.
        """
        self.models = Models(data, frozen, device)
        self.survey = Surveyor(self.models, clients).survey
        trainer, evaluator = Trainer(self.models, clients), Evaluator(self.models, clients)
        self.train, self.evaluate = trainer.train, evaluator.evaluate
        self.tune, self.root = Tuner(trainer, evaluator).tune, RootTrainer(trainer).train
