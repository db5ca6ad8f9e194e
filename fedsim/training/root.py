"""What a server rule trains on rows of its own (`Server.root_rows`)."""

import numpy as np

from fedsim.clients import Population
from fedsim.errors import InputError
from fedsim.params import flatten, moved, unflatten
from fedsim.registry import name_of
from fedsim.rng import numpy_rng
from fedsim.servers import Server
from fedsim.training.received import Received
from fedsim.training.task import Task
from fedsim.training.trainer import Trainer

ROOT = -1  # in place of a client's id


def root_rows(server: Server, clients: Population, seed: int) -> np.ndarray:
    """(n,) the rows of which the server has copies: train rows of clients, ascending; none for most rules.

    Raises:
        InputError: clients have fewer, or are drawn on demand.
    """
    count = server.root_rows
    if not count:
        return np.empty(0, np.int64)
    if not isinstance(clients.splits, list):
        raise InputError(
            f"server {name_of(server)} has copies of clients' train rows, which needs a partition that assigns the "
            "rows of all clients at once"
        )
    rows = np.unique(np.concatenate([train for train, _, _ in clients.splits]))
    if count > len(rows):
        raise InputError(f"server.root_rows of {count} from {len(rows)} train rows; it can be at most {len(rows)}")
    return np.sort(numpy_rng(seed, "root").choice(rows, count, replace=False))


class RootTrainer:
    """Trains as a client does that has the server's rows; nothing is sent or stored."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def train(self, task: Task, round: int, params: np.ndarray, broadcast: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(P,) float64, the delta of the shared tensors.

        Args:
            params: (P,) all parameters as the server has them; private ones are those of round 0.
            broadcast: what the server rule sends besides the parameters, flat.
        """
        models = self.trainer.models
        like, (_, broadcast_like, _) = models.module(task)[1], self.trainer.rule_tensors(task)
        all_params = moved(unflatten(params, like), models.device)
        sent = moved(unflatten(broadcast, broadcast_like), models.device, task.dtype)
        received = Received(round, all_params, sent, {})
        (stack,) = self.trainer.train_stacks(task, round, received, [(ROOT, 0)], {ROOT: rows})
        old = task.select(all_params, "shared")
        return flatten({name: stack.params[name][0].double() - tensor for name, tensor in old.items()})
