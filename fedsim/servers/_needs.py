"""What the rules of one method have in common."""

from typing import TypeVar

from fedsim.errors import InputError
from fedsim.methods import Method
from fedsim.registry import name_of
from fedsim.servers import Server

M = TypeVar("M", bound=Method)


def required(rule: Server, method: Method, kind: type[M], what: str) -> M:
    """The method, if it is of a kind.

    Args:
        what: the rule needs of it, such as `prompts of method plan`.

    Raises:
        InputError: it is of another kind.
    """
    if not isinstance(method, kind):
        raise InputError(f"server {name_of(rule)} needs the {what}, not {name_of(method)}")
    return method
