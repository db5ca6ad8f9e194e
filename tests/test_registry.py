"""A component is a checked dataclass; a subclass changes what it states and keeps the rest."""

from typing import Literal

import pytest

from fedsim import InputError, component
from fedsim.cli.help import limits_of
from fedsim.methods import Method
from fedsim.methods.probe import Probe
from fedsim.registry import replaced
from fedsim.search_space import Choice, Field, search_of


@component
class Mine(Probe):
    lr: float = 0.02
    eps = 1e-4
    batch_size: "int" = Field(8, search=Choice((4, 8)))
    optimizer: Literal["sgd"] = "sgd"


@pytest.mark.parametrize("field", ["lr", "eps", "momentum"])
def test_a_plain_default_keeps_limits_search_range_and_description(field):
    ours, theirs = Mine.__pydantic_fields__[field], Method.__pydantic_fields__[field]
    assert limits_of(Mine, field) == limits_of(Method, field) != []
    assert search_of(Mine, field) == search_of(Method, field)
    assert ours.description == theirs.description
    assert ours.annotation is theirs.annotation is float


@pytest.mark.parametrize(("field", "value"), [("lr", -1), ("eps", 0), ("batch_size", 0), ("optimizer", "adam")])
def test_a_value_outside_of_inherited_limits_is_refused(field, value):
    with pytest.raises(InputError, match=f"method.{field} "):
        replaced("method", Mine(), {field: value})


def test_a_default_of_a_subclass_counts_with_and_without_an_annotation():
    assert (Mine().lr, Mine().eps, Mine().batch_size, Mine().optimizer) == (0.02, 1e-4, 8, "sgd")
    assert (Probe().lr, Probe().eps, Probe().batch_size, Probe().optimizer) == (1e-3, 1e-8, 32, "adam")


def test_a_field_changes_what_it_states():
    assert search_of(Mine, "batch_size") == Choice((4, 8))
    assert Mine.__pydantic_fields__["batch_size"].description == "rows per local step"
    assert (limits_of(Mine, "batch_size"), str(search_of(Mine, "batch_size"))) == ([">= 1"], "4,8")

    @component
    class Narrow(Mine):
        lr: float = Field(0.01, gt=0, lt=0.5, description="small steps")

    assert (limits_of(Narrow, "lr"), str(search_of(Narrow, "lr"))) == (["> 0", "< 0.5"], "1e-05:0.1:log")
    assert Narrow.__pydantic_fields__["lr"].description == "small steps"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"lr": -1.0}, r"Bad\.lr .* be > 0, got -1\.0"),
        ({"lr": Field(-1.0, ge=-2)}, r"Bad\.lr .* be > 0, got -1\.0"),
        ({"lr": float("inf")}, r"Bad\.lr .* finite number, got inf"),
        ({"batch_size": Field(8, le=64)}, r"Bad\.batch_size .* be <= 64, got 128"),
        ({"momentum": Field(0.5, search=Choice((0.5, 1.0)))}, r"Bad\.momentum .* be < 1, got 1\.0"),
        ({"optimizer": "adamax"}, r"Bad\.optimizer .* 'adam', 'adamw' or 'sgd', got 'adamax'"),
    ],
)
def test_a_default_or_a_search_range_outside_of_the_limits_is_refused_where_it_is_declared(body, sentence):
    with pytest.raises(InputError, match=sentence):
        component(type("Bad", (Probe,), body))
