"""The folder is the registry: `methods/lora.py` *is* `lora`, and its one public component is `Lora`.

A component is a frozen dataclass of hyperparameters. Adding one edits no list: the command line, the
YAML files, the help and the contract tests find it because the file is there.
"""

from collections.abc import Iterable
from importlib import import_module
from inspect import isclass
from pkgutil import iter_modules
from typing import Any, get_args

import pydantic
from pydantic import ConfigDict, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on

from fedsim.errors import InputError, listing
from fedsim.search import Field

KINDS = ("dataset", "partition", "method", "server", "fleet")
# Infinity and nan are no values of any field: what has no limit is None, and says so.
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


@field_validator("*", mode="before", check_fields=False)
def numbers_are_not_truths(cls: type, value: Any, info: ValidationInfo) -> Any:
    """A validator of all fields: pydantic would read `rounds: true` as 1."""
    annotation = cls.__pydantic_fields__[info.field_name].annotation
    types = annotation, *get_args(annotation)
    if isinstance(value, bool) and bool not in types and (int in types or float in types):
        raise PydanticCustomError("not_a_truth", "Input should be a number")
    return value


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, pydantic.Field))
def component(cls: type) -> type:
    """Makes a class a frozen dataclass whose values are checked wherever it is made.

    pydantic does the checking, so that `FedCLIP(lr=-1)` in a notebook and `--method.lr -1` on the
    command line fail with the same sentence.
    """
    cls.numbers_are_not_truths = numbers_are_not_truths
    return dataclass(frozen=True, kw_only=True, config=CHECKED)(cls)


def available(kind: str) -> list[str]:
    """Names of all components of a kind (one of `KINDS`), in alphabetical order."""
    package = import_module(f"fedsim.{kind}s")
    return sorted(m.name for m in iter_modules(package.__path__) if not m.name.startswith("_"))


def find(kind: str, name: str) -> type:
    """The component class of that name.

    Raises:
        InputError: there is no such file; the message lists those that there are.
    """
    name = name.replace("-", "_")
    if name not in available(kind):
        raise InputError(f"no {kind} {name!r}; there are: {listing(available(kind), 40)}")
    module = import_module(f"fedsim.{kind}s.{name}")
    found = [
        thing
        for thing in vars(module).values()
        if isclass(thing) and thing.__module__ == module.__name__ and hasattr(thing, "__pydantic_fields__")
    ]
    public = [thing for thing in found if not thing.__name__.startswith("_")]
    if len(public) != 1:
        raise TypeError(f"{kind}s/{name}.py must hold one public component, not {len(public)}")
    return public[0]


def parse(kind: str, value: Any, default: str | None = None) -> Any:
    """A component from how it is written: an object, `"fedclip"`, or `{"name": "fedclip", "lr": 1e-3}`.

    Raises:
        InputError: no such component or field, or a value of the wrong type or out of its range.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return value
    fields = {"name": default} | value
    name = fields.pop("name")
    if not isinstance(name, str):
        raise InputError(f"{kind} wants a name, not {name!r}; there are: {listing(available(kind), 40)}")
    component = find(kind, name)
    try:
        return component(**fields)
    except ValidationError as error:
        raise InputError(sentence(error, f"{kind}.", component.__pydantic_fields__)) from None


def changed(kind: str, thing: Any, fields: dict[str, Any]) -> Any:
    """The same component, one of the user's own perhaps, with other values of some fields.

    Raises:
        InputError: no such field, or a value of the wrong type or out of its range.
    """
    there = type(thing).__pydantic_fields__
    try:
        return type(thing)(**{name: getattr(thing, name) for name in there} | fields)
    except ValidationError as error:
        raise InputError(sentence(error, f"{kind}.", there)) from None


def sentence(error: ValidationError, prefix: str, names: Iterable[str]) -> str:
    """The first of pydantic's complaints: what was wanted, what came, what there is."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"no field {place!r} in {error.title}; there are: {listing(names, 60)}"
    wanted = first["msg"].partition(", unable")[0].removeprefix("Input should be ")
    wanted = wanted.replace("a valid integer", "an integer").replace("a valid", "a")
    return f"{prefix}{place} wants {wanted}, not {first['input']!r}"


def name_of(thing: Any) -> str:
    """How a component is called on the command line: the name of its file; one from elsewhere by its full name."""
    cls = type(thing)
    package, _, file = cls.__module__.rpartition(".")
    return file if package in {f"fedsim.{kind}s" for kind in KINDS} else f"{cls.__module__}.{cls.__qualname__}"
