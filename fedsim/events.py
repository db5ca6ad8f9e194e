"""What a run tells of its progress."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """How far a stage of a run has come."""

    stage: str
    done: int
    total: int
    note: str = ""
