"""What malicious clients make of their train rows and of their updates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

import numpy as np
import torch

from fedsim.attacks import Attack
from fedsim.attacks.honest import Honest
from fedsim.clients import Population
from fedsim.datasets import Labels
from fedsim.errors import InputError, counted
from fedsim.methods import Method
from fedsim.params import Params, views
from fedsim.registry import name_of
from fedsim.rng import numpy_rng, torch_rng
from fedsim.shares import part
from fedsim.training.task import Task
from fedsim.training.transmit import joined
from fedsim.updates import RoundSum, blocks, stepped


def poisoned(
    task: Task,
    data: Labels,
    trained: np.ndarray,
    population: int,
    clients: Sequence[int],
    rows_of: Mapping[int, np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
    """(N,) the classes of the rows on which some clients train, client by client; and (N,) bool, which are attacked.

    A malicious client attacks the same rows in every round.

    Args:
        trained: (C,) bool, the classes that clients train on.
        population: number of training clients.
        rows_of: the train rows of each of `clients`.

    Returns:
        None instead of the mask where no row is attacked.
    """
    labels = [data.y[rows_of[client]] for client in clients]
    malicious = task.malicious(population)
    if not task.attack.targeted or malicious.isdisjoint(clients):
        return np.concatenate(labels), None
    attacked = [np.zeros(len(own), bool) for own in labels]
    for client, own, chosen in zip(clients, labels, attacked, strict=True):
        if client in malicious:
            aims = task.attack.aims(own, data.classes, trained)
            drawn = numpy_rng(task.seed, "poison", client).permutation(np.flatnonzero(aims >= 0))
            chosen[drawn[: part(len(drawn), task.attack.poisoned)]] = True
            own[chosen] = aims[chosen]
    return np.concatenate(labels), np.concatenate(attacked)


def forges(task: Task, population: int, client: int) -> bool:
    """Whether a client sends another update than it has trained. It then clips nothing and adds no noise, either."""
    return task.attack.forges and client in task.malicious(population)


@torch.no_grad()
def forged(task: Task, population: int, round: int, client: int, received: Params, trained: Params) -> Params:
    """The shared tensors that a client says it has trained; if it is honest, those that it has."""
    if not trained or not forges(task, population, client):
        return trained
    rng = torch_rng(task.seed, "attack", round, client)
    pieces = views(task.attack.forge(joined(trained) - joined(received), rng), trained)
    return {name: received[name] + piece for name, piece in pieces.items()}


def check_attack(
    attack: Attack, method: Method, data: Labels, clients: Population, seed: int, evaluated: int | None
) -> None:
    """Refuses an attack that these clients, their rows or the method do not allow.

    Args:
        evaluated: number of clients to evaluate; None: all that are not malicious.

    Raises:
        InputError: no client is malicious, or rows cannot be given other classes.
    """
    name, malicious = name_of(attack), attack.malicious(clients.trainers, seed)
    if isinstance(attack, Honest):
        return
    if not malicious:
        raise InputError(
            f"--attack.share {attack.share:g} of {counted(clients.trainers, 'client')} rounds down to none; "
            f"give {ceil(1e6 / clients.trainers) / 1e6:g} or more, or --attack honest"
        )
    honest = clients.trainers - len(malicious)
    if evaluated and evaluated > honest:
        raise InputError(f"eval_clients of {evaluated} from {honest} clients that are not malicious")
    if not attack.targeted:
        return
    if data.class_domain:
        raise InputError(f"attack {name} gives rows other classes, but the data sets of a suite have different ones")
    if method.label_space == "client":
        raise InputError(
            f"attack {name} gives rows classes that their client does not have, and --method.label-space client "
            "leaves these out of the loss; give all"
        )
    if method.expands:
        raise InputError(
            f"attack {name} changes rows, and clients of this method train on others that they make of them"
        )
    attack.check(data.classes, clients.trained_classes(data))


def check_attacked(task: Task, params: Params) -> None:
    """Refuses an attack on a model of which clients train and send nothing.

    Raises:
        InputError: the method trains nothing, or under this rule sends nothing.
    """
    attack, server = name_of(task.attack), name_of(task.server)
    if not isinstance(task.attack, Honest) and not task.select(params, "shared"):
        raise InputError(
            f"attack {attack} has no effect: under server {server}, clients of method {name_of(task.method)} send no "
            "parameters"
        )
    if task.attack.colludes and task.reply(params).message:
        raise InputError(
            f"attack {attack} replaces updates once all clients have trained, and under server {server} they also send "
            "messages, which would be those of what they trained; take another rule"
        )
    if task.attack.colludes and task.privacy.protects == "clients":
        raise InputError(
            f"attack {attack} replaces updates that privacy {name_of(task.privacy)} has clipped; take another attack"
        )
    if task.attack.colludes and not task.codec.lossless:
        raise InputError(
            f"attack {attack} makes updates from those that the server decodes, and codec {name_of(task.codec)} could "
            "not have encoded them; take plain"
        )


def colluded(task: Task, total: RoundSum) -> RoundSum:
    """The sum of a round with what malicious clients send who know updates of others."""
    if not task.attack.colludes:
        return total
    clients = stepped(total)
    malicious = np.isin(total.clients["client"][clients], list(task.malicious(total.population)))
    if not malicious.any():
        return total
    delta, deltas, weights = total.delta.copy(), total.require_deltas(), total.clients["weight"][clients[malicious]]
    for block, each in blocks(total):
        sent = task.attack.collude(each, malicious).astype(deltas.dtype)
        deltas[clients[malicious], block] = sent
        if len(delta):
            delta[block] += np.einsum("m,mp->p", weights, sent - each[malicious])
    return replace(total, delta=delta)
