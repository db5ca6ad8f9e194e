"""Numbers that no machine has room for are refused in one sentence, before anything is allocated."""

import pytest

from fedsim import Config, InputError
from fedsim.prepare import prepare
from fedsim.registry import KINDS, available, find, parse


def integers(owner: type) -> list[str]:
    return [name for name, field in owner.__pydantic_fields__.items() if field.annotation in (int, int | None)]


FIELDS = [("config", None, name) for name in integers(Config)] + [
    (kind, name, field) for kind in KINDS for name in available(kind) for field in integers(find(kind, name))
]


@pytest.mark.parametrize("kind, name, field", FIELDS)
@pytest.mark.parametrize("value", [10**12, 10**30])
def test_a_huge_integer_is_refused_or_does_no_harm(kind, name, field, value, tmp_path, features_dir):
    fields = {
        "dataset": {"name": "synthetic", "rows": 20, "width": 8},
        "partition": "natural",
        "clients": 50,
        "rounds": 1,
    }
    fields |= {"actors": 0, "out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    try:
        if kind == "config":
            prepare(Config(**fields | {field: value}))
        elif kind == "method" and parse(kind, name).reads.towers:
            assert parse(kind, {"name": name, field: value})  # what is built with it: tests of the method
        else:
            if kind == "partition" and name != "natural":
                fields |= {"dataset": "features", "data_dir": features_dir}
            prepare(Config(**fields | {kind: {"name": name, field: value}}))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("method", [name for name in available("method") if hasattr(parse("method", name), "length")])
def test_no_prompt_has_a_million_tokens(method):
    with pytest.raises(InputError, match=r"method.length must be <= 4096, got 1000000"):
        Config(method={"name": method, "length": 10**6})


def test_two_sizes_that_together_make_too_large_a_matrix_are_named():
    with pytest.raises(InputError) as caught:
        parse("dataset", {"name": "synthetic", "rows": 2**20, "width": 2**16}).load(None)
    assert str(caught.value) == (
        "--dataset.rows 1048576 times --dataset.width 65536 is 68,719,476,736 numbers; at most 67,108,864 are made at "
        "a time"
    )


def test_a_population_has_a_limit():
    with pytest.raises(InputError, match="clients must be <= 100000000, got 1000000000000"):
        Config(clients=10**12)
