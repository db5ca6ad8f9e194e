"""Rows with owners, each of whom is a client of the partition natural."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsim import Config, InputError, run
from fedsim.clients import make_clients
from fedsim.datasets import UNASSIGNED, Labels
from fedsim.registry import parse

NAMES = ["zoe", "ada", "bob"]  # in turn


def labels(count=60, owners=3, **fields) -> Labels:
    index = np.arange(count)
    names = {"classes": ("a", "b"), "domains": ("ink", "oil")}
    values = {"y": index % 2, "domain": index // 2 % 2, "split": np.full(count, UNASSIGNED, np.int8)}
    return Labels(**{**names, **values, "owner": index % owners, **fields})


def clients(data: Labels, number=None, held_out=(), share=0.6, **fields):
    partition = parse("partition", {"name": "natural", **fields})
    return make_clients(data, partition, number, held_out, 1, share)


def owned(root: Path, features_dir: Path, owner) -> Path:
    """The features with a column of owners."""
    root.mkdir()
    rows = pd.read_parquet(features_dir / "features.parquet")
    rows.assign(owner=owner(len(rows))).to_parquet(root / "features.parquet")
    pd.read_parquet(features_dir / "classes.parquet").to_parquet(root / "classes.parquet")
    return root


def load(root: Path, **options):
    return parse("dataset", {"name": "features", **options}).load(root)


def test_each_owner_is_a_client_with_its_rows_and_no_other(tmp_path):
    data = labels()
    population = clients(data)
    assert population.trainers == 3
    for owner, client in enumerate(population):
        rows = np.concatenate([client.train, client.val, client.test])
        assert np.array_equal(np.sort(rows), np.arange(owner, 60, 3))
        assert (len(client.train), len(client.val), len(client.test)) == (12, 4, 4)
    again = clients(data, number=3)
    assert all(np.array_equal(one.train, other.train) for one, other in zip(population, again, strict=True))


def test_rows_of_a_held_out_domain_belong_to_no_owner():
    data = labels(owner=np.arange(60) // 4)
    population = clients(data, held_out=("oil",), share=0.5)
    assert population.trainers == 15 and np.array_equal(population[15].test, np.flatnonzero(data.domain == 1))
    assert all((data.domain[client.train] == 0).all() for client in list(population)[:15])


def test_owners_with_few_rows_are_left_out_if_asked_for_and_otherwise_refused():
    owner = np.repeat([0, 1, 2, 3], [1, 20, 38, 1])
    with pytest.raises(InputError, match="2 of 4 owners, with 1 row at most, have no train rows; --partition"):
        clients(labels(owner=owner))
    population = clients(labels(owner=owner), min_rows=5)
    assert population.trainers == 2 and len(population[0].train) == 12


@pytest.mark.parametrize(
    ("data", "options", "sentence"),
    [
        (
            labels(owner=None),
            {},
            "partition natural needs a data set whose rows have owners, such as a column",
        ),
        (labels(), {"number": 5}, "partition natural has 3 clients here, one per owner; leave --clients out"),
        (labels(), {"min_rows": 50}, "no owner has 50 rows in the training domains; the most: 20"),
        (labels(), {"rows_sigma": 1.0}, "--partition.rows-sigma has no effect on rows with owners; leave it out"),
    ],
)
def test_what_does_not_fit_owners_is_refused(data, options, sentence):
    with pytest.raises(InputError) as caught:
        clients(data, **options)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_generated_clients_have_no_smallest_number_of_rows():
    data = parse("dataset", "synthetic").load(None)
    with pytest.raises(InputError, match=r"--partition\.min-rows has no effect on a data set that generates clients"):
        clients(data, number=3, min_rows=2)


def test_features_have_owners_as_text_or_numbers_in_the_order_of_their_names(tmp_path, features_dir):
    text = load(owned(tmp_path / "text", features_dir, lambda n: [NAMES[k % 3] for k in range(n)]))
    assert text.owner is not None and text.owner.tolist() == [[2, 0, 1][k % 3] for k in range(360)]
    number = load(owned(tmp_path / "number", features_dir, lambda n: [[70, 5, 6][k % 3] for k in range(n)]))
    assert number.owner is not None and np.array_equal(text.owner, number.owner)
    assert load(features_dir).owner is None
    some = load(tmp_path / "text", classes="cat,pig")
    assert some.owner is not None and np.array_equal(some.owner, text.owner[np.isin(text.y, (0, 3))])


@pytest.mark.parametrize(
    ("owner", "sentence"),
    [
        (lambda n: ["zoe"] * (n - 1) + [None], "features.parquet: owner is null in 1 row (359)"),
        (lambda n: [0.5] * n, "features.parquet: owner needs text or integers, not double"),
    ],
)
def test_a_column_of_owners_that_cannot_be_used_is_refused(tmp_path, features_dir, owner, sentence):
    with pytest.raises(InputError) as caught:
        load(owned(tmp_path / "bad", features_dir, owner))
    assert str(caught.value).startswith(sentence)


def test_a_run_has_one_client_per_owner(tmp_path, features_dir):
    root = owned(tmp_path / "set", features_dir, lambda n: [NAMES[k % 3] for k in range(n)])
    fields = {"data_dir": root, "partition": "natural", "rounds": 1, "actors": 0, "out": tmp_path / "run"}
    report = run(Config(dataset="features", held_out="photo", cache_dir=tmp_path / "cache", **fields))
    assert sorted(set(report.tables().partition["client"])) == [0, 1, 2, 3]
