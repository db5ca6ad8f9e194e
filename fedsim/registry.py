"""The folder is the registry: `methods/lora.py` *is* `lora`, and its one public component is `Lora`.

A component is a frozen dataclass of hyperparameters. Adding one edits no list: the command line, the
YAML files, the help and the contract tests find it because the file is there.
"""

from collections.abc import Collection
from importlib import import_module
from inspect import get_annotations, isclass
from pkgutil import iter_modules
from types import GenericAlias
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo
from typing_extensions import dataclass_transform  # in typing from Python 3.11 on

from fedsim.errors import RENAMED, InputError, listing
from fedsim.search_space import search_of

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


@dataclass_transform(frozen_default=True, kw_only_default=True)
def component(cls: type) -> type:
    """Makes a class a frozen dataclass whose values are checked wherever it is made.

    pydantic does the checking, so that `FedCLIP(lr=-1)` in a notebook and `--method.lr -1` on the
    command line fail with the same sentence.

    A subclass that gives an inherited field another default, `lr: float = 0.1`, keeps the field's limits, search range
    and description. With a `Field` it changes those that it states; limits become narrower, never wider.

    Raises:
        InputError: a default, or an end of a search range, is outside of the field's limits.
    """
    cls.numbers_are_not_truths = numbers_are_not_truths
    cls.__annotations__ = _inherited(cls)
    checked = dataclass(frozen=True, kw_only=True, config=CHECKED)(cls)
    for name in cls.__annotations__.keys() & checked.__pydantic_fields__.keys():
        _check_values(checked, name)
    return checked


def _inherited(cls: type) -> dict[str, Any]:
    """The annotations of a class; those of fields that it has from a base include what the base declares of them."""
    fields: dict[str, FieldInfo] = {}
    for base in reversed(cls.__mro__[1:]):
        fields |= vars(base).get("__pydantic_fields__", {})
    annotations = get_annotations(cls)
    for name, field in fields.items():
        # `lr = 0.1` without an annotation is a new default too; a dataclass would ignore it without a word.
        if name in annotations or name in vars(cls):
            annotations[name] = Annotated[annotations.get(name, field.annotation), field]
    return annotations


def _check_values(cls: type, name: str) -> None:
    """Refuses a default, and values to search, that the field does not take."""
    field, search = cls.__pydantic_fields__[name], search_of(cls, name)
    default = [] if field.is_required() else [field.get_default(call_default_factory=True)]
    # In a dict: errors then name the field, and pydantic takes no config for the bare type of a dataclass.
    annotation: Any = GenericAlias(dict, (str, field.rebuild_annotation()))
    values = TypeAdapter[Any](annotation, config=CHECKED)
    try:
        for value in (*default, *(search.extremes if search else ())):
            values.validate_python({name: value})
    except ValidationError as error:
        raise InputError(sentence(error, f"{cls.__name__}.", ())) from None


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


def sentence(error: ValidationError, prefix: str, names: Collection[str]) -> str:
    """The first of pydantic's complaints: what was wanted, what came, what there is."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if (current := RENAMED.get(place)) in names:
            return f"no field {place!r} in {error.title}; it is now called {current!r}"
        return f"no field {place!r} in {error.title}; there are: {listing(names, 60)}"
    wanted = first["msg"].partition(", unable")[0].removeprefix("Input should be ")
    wanted = wanted.replace("a valid integer", "an integer").replace("a valid", "a")
    return f"{prefix}{place} wants {wanted}, not {first['input']!r}"


def name_of(thing: Any) -> str:
    """How a component is called on the command line: the name of its file; one from elsewhere by its full name."""
    cls = type(thing)
    package, _, file = cls.__module__.rpartition(".")
    return file if package in {f"fedsim.{kind}s" for kind in KINDS} else f"{cls.__module__}.{cls.__qualname__}"
