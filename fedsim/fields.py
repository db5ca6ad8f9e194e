"""Types of fields that the config and components share."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from fedsim.errors import InputError


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


def _names(value: Any) -> Any:
    """Names separated by commas, or a sequence of names; repeated ones are dropped."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    elif not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    # A YAML name such as 7 or true is not text.
    if not all(isinstance(name, str | int | float) for name in value):
        return value  # pydantic names the wrong item
    names = [str(name).lower() if isinstance(name, int) else name for name in value]
    return tuple(dict.fromkeys(name for name in names if name != ""))


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
AbsolutePath = Annotated[Path | None, AfterValidator(absolute)]
