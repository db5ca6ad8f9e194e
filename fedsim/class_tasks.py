"""Classes that arrive in tasks over the rounds, trained one task after the other (class-incremental learning).

Source: the protocol of Rebuffi et al. 2017, arXiv 1611.07725 (iCaRL): the classes in random order and in equal parts,
and after each part a test on all classes so far; federated as in Dong et al. 2022, arXiv 2203.11473.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.errors import InputError
from fedsim.rng import numpy_rng


@dataclass(frozen=True)
class ClassTasks:
    """Which classes are trained in which rounds.

    Attributes:
        classes: of each task, the indices of its classes, ascending.
        rounds: of the run; each task has an equal share of them, the first ones perhaps a round more.
    """

    classes: tuple[tuple[int, ...], ...]
    rounds: int

    def current(self, round: int) -> list[int]:
        """The classes that are trained in a round."""
        return list(self.classes[task_in(round, len(self.classes), self.rounds)])

    def seen(self, round: int) -> list[int]:
        """The classes of all tasks that have begun by a round."""
        tasks = self.classes[: 1 + task_in(round, len(self.classes), self.rounds)]
        return sorted(label for task in tasks for label in task)


def task_in(round: int, tasks: int, rounds: int) -> int:
    """The index of the task that is trained in a round, of so many; before round 1 the first, at the end the last."""
    return (min(max(round, 1), rounds) - 1) * tasks // rounds if tasks > 1 else 0


def last_rounds(tasks: int, rounds: int) -> list[int]:
    """The last round of each task."""
    return [-(-rounds * (task + 1) // tasks) for task in range(tasks)]


def split_classes(trained: Sequence[int], tasks: int, rounds: int, seed: int) -> ClassTasks:
    """The classes that clients train on in random order and in parts that differ by one class at most.

    Args:
        seed: the partition's seed.

    Raises:
        InputError: there are fewer classes or rounds than tasks.
    """
    if tasks > len(trained):
        raise InputError(f"--tasks {tasks} from {len(trained)} trained classes; it can be at most {len(trained)}")
    if tasks > rounds:
        raise InputError(f"--tasks {tasks} needs as many --rounds or more, got {rounds}: each task has a round or more")
    parts = np.array_split(numpy_rng(seed, "tasks").permutation(np.asarray(trained)), tasks)
    return ClassTasks(tuple(tuple(sorted(part.tolist())) for part in parts), rounds)
