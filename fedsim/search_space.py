"""What is worth trying of a hyperparameter, declared beside its default and its limits.

Limits say what makes sense at all; a range says where good values are looked for. Nothing here searches: `fedsim.sweep`
reads what is declared here.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pydantic
from pydantic_core import PydanticUndefined

from fedsim.errors import InputError, listing

LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
}

Plain: TypeAlias = str | int | float | bool | None

# (field, value, ...): a hyperparameter counts only while that other field of its component has one of the values, as
# sgd's momentum does; () for always.
When: TypeAlias = tuple[Plain, ...]


@dataclass(frozen=True)
class Span:
    """The numbers from `low` to `high`, both included, drawn evenly, or evenly by their logarithm.

    Raises:
        InputError: no number lies between, or, by logarithm, a number that has none.
    """

    low: int | float
    high: int | float
    log: bool = False
    when: When = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"a range wants two finite numbers, the lower one first, not {self.low}:{self.high}")
        if self.log and self.low <= 0:
            raise InputError(
                f"a range by logarithm wants to begin above 0, not at {self.low}; {self.low}:{self.high}:linear may"
            )

    @property
    def extremes(self) -> tuple[Plain, ...]:
        return self.low, self.high

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}:{self.high}:{'log' if self.log else 'linear'}"


@dataclass(frozen=True)
class Choice:
    """Some values, without an order among them.

    Raises:
        InputError: fewer than two, or one twice.
    """

    values: tuple[Plain, ...]
    when: When = ()

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise InputError(f"a choice wants two values or more, not {listing(self.values) or 'none'}")
        if len(set(self.values)) < len(self.values):
            raise InputError(f"a choice wants each value once, not {listing(self.values)}")

    @property
    def extremes(self) -> tuple[Plain, ...]:
        return self.values

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(_said(value) for value in self.values)


def Linear(low: int | float, high: int | float, when: When = ()) -> Span:
    return Span(low, high, log=False, when=when)


def Log(low: int | float, high: int | float, when: When = ()) -> Span:
    return Span(low, high, log=True, when=when)


def Field(default: Any = PydanticUndefined, *, search: Span | Choice | None = None, **about: Any) -> Any:
    """pydantic's Field, and what is worth trying of it.

    Raises:
        InputError: `search` leaves the field's own limits.
    """
    if search is None:
        return pydantic.Field(default, **about)
    for name, (sign, holds) in LIMITS.items():
        outside = [value for value in search.extremes if name in about and not holds(value, about[name])]
        if outside:
            raise InputError(
                f"{search} is to be searched, of a field that wants {sign} {about[name]}: {listing(outside)}"
            )
    extra: Any = {"search": search}
    return pydantic.Field(default, json_schema_extra=extra, **about)


def search_of(owner: type, field: str) -> Span | Choice | None:
    """What a component, or Config, declares to be worth trying of a field."""
    extra: Any = owner.__pydantic_fields__[field].json_schema_extra
    return extra.get("search") if isinstance(extra, dict) else None


def _said(value: Plain) -> str:
    """As the command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
