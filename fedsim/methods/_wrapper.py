"""Base of the methods by which a server rule changes how a method is trained."""

from dataclasses import fields
from typing import Any

from pydantic import InstanceOf
from typing_extensions import Self  # in typing from Python 3.11 on

from fedsim.methods import Method
from fedsim.methods._local_training import LocalTraining
from fedsim.registry import component


@component
class Wrapper(Method):
    """Holds a method and is like it in everything that a subclass does not define itself."""

    inner: InstanceOf[Method]

    @classmethod
    def of(cls, method: Method, **own: Any) -> Self:
        """The wrapper of a method, with fields of its own."""
        return cls(inner=method, **own, **{field.name: getattr(method, field.name) for field in fields(Method)})


def _passed_on(name: str) -> Any:
    return property(lambda self: getattr(self.inner, name))  # a method of `inner` is then bound to it


# A loop, so that what is added to `Method` is passed on too.
for _name in {*vars(LocalTraining), *vars(Method)} - vars(Wrapper).keys() - {field.name for field in fields(Method)}:
    if not _name.startswith("_"):
        setattr(Wrapper, _name, _passed_on(_name))
