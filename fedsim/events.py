"""What a run reports as it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Progress = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """Something that a run or sweep reports.

    Attributes:
        stage: what it concerns, such as "training".
    """

    stage: str


@dataclass(frozen=True)
class Started(Event):
    """All checks have passed: from here on the run may stop or fail, but it is not refused."""


@dataclass(frozen=True)
class Step(Event):
    """How far a stage has come; a bar shows it.

    Attributes:
        done: how much of `total`, such as rounds or images.
        note: what was reached so far, such as the loss of the last round.
    """

    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Note(Event):
    """Something to know about a stage, printed once."""

    text: str


@dataclass(frozen=True)
class RoundValues(Event):
    """The values of a round for loggers; only a run with loggers reports them.

    Attributes:
        values: by name, such as `accuracy/validation`.
    """

    round: int
    values: Mapping[str, float]
