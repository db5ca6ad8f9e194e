"""Search ranges, declared next to the default and the limits of a hyperparameter.

Limits say which values are valid; a range says where to search for good ones. Nothing here searches: `fedsim.sweep`
reads these declarations.
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

# (field, value, ...): a hyperparameter has an effect only if that other field of its component has one of the values,
# as momentum has only with sgd; (): always.
When: TypeAlias = tuple[Plain, ...]


@dataclass(frozen=True)
class Span:
    """The numbers from `low` to `high`, both included, drawn uniformly or log-uniformly.

    Raises:
        InputError: `low` is not below `high`, an end is not finite, or a log-uniform range includes 0.
    """

    low: int | float
    high: int | float
    log: bool = False
    when: When = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"a range needs two finite numbers, the lower one first, got {self.low}:{self.high}")
        if self.log and self.low <= 0:
            raise InputError(
                f"a log-uniform range must begin above 0, got {self.low}:{self.high}; "
                f"{self.low}:{self.high}:linear may begin anywhere"
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
    """A set of values without an order.

    Raises:
        InputError: fewer than two values, or a value is given twice.
    """

    values: tuple[Plain, ...]
    when: When = ()

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise InputError(f"a choice needs two values or more, got {listing(self.values) or 'none'}")
        if len(set(self.values)) < len(self.values):
            raise InputError(f"a choice needs each value once, got {listing(self.values)}")

    @property
    def extremes(self) -> tuple[Plain, ...]:
        return self.values

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(_as_text(value) for value in self.values)


def Linear(low: int | float, high: int | float, when: When = ()) -> Span:
    return Span(low, high, log=False, when=when)


def Log(low: int | float, high: int | float, when: When = ()) -> Span:
    return Span(low, high, log=True, when=when)


def Field(default: Any = PydanticUndefined, *, search: Span | Choice | None = None, **about: Any) -> Any:
    """pydantic's Field with a search range.

    Raises:
        InputError: `search` exceeds the field's limits.
    """
    if search is None:
        return pydantic.Field(default, **about)
    for name, (sign, holds) in LIMITS.items():
        outside = [value for value in search.extremes if name in about and not holds(value, about[name])]
        if outside:
            raise InputError(f"search range {search} of a field that must be {sign} {about[name]}: {listing(outside)}")
    extra: Any = {"search": search}
    return pydantic.Field(default, json_schema_extra=extra, **about)


def search_of(owner: type, field: str) -> Span | Choice | None:
    """The search range that a component or Config declares for a field."""
    extra: Any = owner.__pydantic_fields__[field].json_schema_extra
    return extra.get("search") if isinstance(extra, dict) else None


def _as_text(value: Plain) -> str:
    """A value as it is written on the command line."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
