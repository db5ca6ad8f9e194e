"""The folder is the registry: `methods/lora.py` *is* `lora`, and its one public component is `Lora`.

A component is a frozen dataclass of hyperparameters. No list has to be edited to add one: the command line, YAML files,
the help and the contract tests find its file.
"""

from collections.abc import Collection
from importlib import import_module
from inspect import get_annotations, isclass
from os import listdir
from pathlib import Path
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

KINDS = ("dataset", "partition", "method", "server", "codec", "privacy", "attack", "fleet")
# Their folders, which are also the names of their lists.
FOLDERS = {kind: f"{kind}s" for kind in KINDS} | {"privacy": "privacy"}
# No field takes infinity or nan; where there may be no limit, the value is None.
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
# What pydantic's messages say, and what ours say.
PHRASES = {
    "a valid integer": "an integer",
    "a valid": "a",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
}


@field_validator("*", mode="before", check_fields=False)
def reject_booleans_for_numbers(cls: type, value: Any, info: ValidationInfo) -> Any:
    """A validator of all fields: pydantic would read `rounds: true` as 1."""
    annotation = cls.__pydantic_fields__[info.field_name].annotation
    types = annotation, *get_args(annotation)
    if isinstance(value, bool) and bool not in types and (int in types or float in types):
        raise PydanticCustomError("not_a_truth", "Input should be a number")
    return value


@dataclass_transform(frozen_default=True, kw_only_default=True)
def component(cls: type) -> type:
    """Makes a class a frozen dataclass whose values are checked by pydantic.

    `FedCLIP(lr=-1)` in a notebook and `--method.lr -1` on the command line therefore fail with the same sentence.

    A subclass that gives an inherited field another default, `lr: float = 0.1`, keeps its limits, search range and
    description. With a `Field` it changes those that it states; limits can become narrower, never wider.

    Raises:
        InputError: a default, or an end of a search range, is outside the field's limits.
    """
    cls.reject_booleans_for_numbers = reject_booleans_for_numbers
    cls.__annotations__ = _inherited(cls)
    checked = dataclass(frozen=True, kw_only=True, config=CHECKED)(cls)
    for name in cls.__annotations__.keys() & checked.__pydantic_fields__.keys():
        _check_values(checked, name)
    return checked


def _inherited(cls: type) -> dict[str, Any]:
    """The annotations of a class; those of inherited fields include what the base class declares about them."""
    fields: dict[str, FieldInfo] = {}
    for base in reversed(cls.__mro__[1:]):
        fields |= vars(base).get("__pydantic_fields__", {})
    annotations = get_annotations(cls)
    for name, field in fields.items():
        # `lr = 0.1` without an annotation is a new default too; a dataclass would silently ignore it.
        if name in annotations or name in vars(cls):
            annotations[name] = Annotated[annotations.get(name, field.annotation), field]
    return annotations


def _check_values(cls: type, name: str) -> None:
    """Refuses a default or values to search that the field does not accept."""
    field, search = cls.__pydantic_fields__[name], search_of(cls, name)
    default = [] if field.is_required() else [field.get_default(call_default_factory=True)]
    # In a dict: errors then name the field, and pydantic accepts no config for the bare type of a dataclass.
    annotation: Any = GenericAlias(dict, (str, field.rebuild_annotation()))
    values = TypeAdapter[Any](annotation, config=CHECKED)
    try:
        for value in (*default, *(search.extremes if search else ())):
            values.validate_python({name: value})
    except ValidationError as error:
        raise InputError(first_error(error, f"{cls.__name__}.", ())) from None


def available(kind: str) -> list[str]:
    """Names of all components of a kind (one of `KINDS`), in alphabetical order."""
    # By the files: importing the package would import torch, and lists of names do not need it.
    modules = iter_modules([str(Path(__file__).parent / FOLDERS[kind])])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def find(kind: str, name: str) -> type:
    """The component class of that name.

    Raises:
        InputError: there is no such file; the message lists the available names.
    """
    name = name.replace("-", "_")
    # Quicker than `available`. A question to the file system would ignore capitals on some, and refuse a long name.
    files = listdir(Path(__file__).parent / FOLDERS[kind])
    if name.startswith("_") or f"{name}.py" not in files:
        raise InputError(f"no {kind} {name!r}; available: {listing(available(kind), 40)}")
    module = import_module(f"fedsim.{FOLDERS[kind]}.{name}")
    classes = [value for value in vars(module).values() if isclass(value) and value.__module__ == module.__name__]
    public = [cls for cls in classes if hasattr(cls, "__pydantic_fields__") and not cls.__name__.startswith("_")]
    if len(public) != 1:
        raise TypeError(f"{FOLDERS[kind]}/{name}.py must hold one public component, not {len(public)}")
    return public[0]


def parse(kind: str, value: Any, default: str | None = None) -> Any:
    """The component that is written as an object, as `"fedclip"` or as `{"name": "fedclip", "lr": 1e-3}`.

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
        raise InputError(f"{kind} must be a name, got {name!r}; available: {listing(available(kind), 40)}")
    component = find(kind, name)
    try:
        return component(**fields)
    except ValidationError as error:
        raise InputError(first_error(error, f"{kind}.", component.__pydantic_fields__)) from None


def replaced(kind: str, component: Any, fields: dict[str, Any]) -> Any:
    """A copy of a component, which may be a user's own, with other values of some fields.

    Raises:
        InputError: no such field, or a value of the wrong type or out of its range.
    """
    names = type(component).__pydantic_fields__
    try:
        return type(component)(**{name: getattr(component, name) for name in names} | fields)
    except ValidationError as error:
        raise InputError(first_error(error, f"{kind}.", names)) from None


def first_error(error: ValidationError, prefix: str, names: Collection[str]) -> str:
    """The first of pydantic's errors in one sentence: what was expected, what was given, what exists."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if (current := RENAMED.get(field)) in names:
            return f"no field {field!r} in {error.title}; it is now called {current!r}"
        return f"no field {field!r} in {error.title}; available: {listing(names, 60)}"
    if first["type"] == "missing":
        return f"{prefix}{field} is required"
    expected = first["msg"].partition(", unable")[0].removeprefix("Input should be ")
    for words, shorter in PHRASES.items():
        expected = expected.replace(words, shorter)
    return f"{prefix}{field} must be {expected}, got {first['input']!r}"


def name_of(component: Any) -> str:
    """A component's name on the command line, which is its file's; the full name of a class from elsewhere."""
    cls = type(component)
    package, _, file = cls.__module__.rpartition(".")
    return (
        file
        if package in {f"fedsim.{folder}" for folder in FOLDERS.values()}
        else f"{cls.__module__}.{cls.__qualname__}"
    )
