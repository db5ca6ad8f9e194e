"""Types of fields that the config, components and sweeps share."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from fedsim.errors import InputError, listing

LOGGERS = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # and the package that each needs


def expanded(value: Path | None) -> Path | None:
    """A path whose `~` is the user's home folder.

    Raises:
        InputError: there is no such user, or no home folder.
    """
    try:
        return value and value.expanduser()
    except RuntimeError:
        raise InputError(f"{value}: there is no such user, or no home folder") from None


def absolute(value: Path | None) -> Path | None:
    """An absolute path, `~` expanded."""
    # Workers run in other folders, where a relative path would mean another file.
    return (path := expanded(value)) and path.absolute()


def parts_of(text: str) -> list[str]:
    """The parts of a text with commas; none of an empty one.

    Raises:
        PydanticCustomError: a part is empty, which may be a value that was forgotten.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and "" in parts:
        raise PydanticCustomError("empty_part", "a list without an empty part")
    return [part for part in parts if part]


def _names(value: Any) -> Any:
    """Names separated by commas, or a sequence of names; repeated ones are dropped."""
    if isinstance(value, str):
        value = parts_of(value)
    elif not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    # A YAML name such as 7 or true is not text.
    if not all(isinstance(name, str | int | float) for name in value):
        return value  # pydantic names the wrong item
    names = [str(name).lower() if isinstance(name, int) else name for name in value]
    return tuple(dict.fromkeys(name for name in names if name != ""))


def split(value: Any) -> Any:
    """The parts of texts with commas, or of a sequence of these; none is empty."""
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    return tuple(part for item in value for part in (parts_of(item) if isinstance(item, str) else [item]))


def each_in(kind: str, known: Any) -> AfterValidator:
    """Refuses names that are not among the known ones."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in known:
                raise InputError(f"no {kind} {name!r}; available: {listing(known)}")
        return names

    return AfterValidator(check)


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Loggers = Annotated[tuple[str, ...], BeforeValidator(split), each_in("logger", LOGGERS)]
AbsolutePath = Annotated[Path | None, AfterValidator(absolute)]
