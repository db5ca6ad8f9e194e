"""Populations that are made as they are asked for."""

import pickle

import numpy as np
import pytest
from test_federation import rows

from fedsim import InputError
from fedsim.clients import make_clients
from fedsim.datasets import VAL
from fedsim.registry import parse


def synthetic(**fields):
    return parse("dataset", {"name": "synthetic", "rows": 20, "width": 8} | fields).load(None)


def natural(data, clients, held_out=(), **fields):
    return make_clients(data, parse("partition", {"name": "natural"} | fields), clients, held_out, seed=1)


def test_a_hundred_thousand_clients_are_a_few_numbers():
    data, size = synthetic(width=512), 100_000
    population = natural(data, size, ("domain 1",))
    assert len(pickle.dumps(population)) < 20_000 and len(pickle.dumps(data)) < 50_000
    last = population[size - 1]
    assert (len(last.train), len(last.val), len(last.test)) == (12, 4, 4)
    assert set(data.domain[last.train]) == {0} and set(data.domain[population[size].test]) == {1}
    assert np.intersect1d(last.test, population[size].test).size == 0
    bootstrap = make_clients(rows(), parse("partition", "bootstrap"), size, (), seed=1)
    assert len(pickle.dumps(bootstrap)) < 20_000


def test_rows_are_the_same_whoever_is_asked_with_them():
    data = synthetic()
    together = np.array([65, 3, 40, 41, 7, 3])
    for values in (data.x, data.y, data.domain):
        one_by_one = np.concatenate([values[np.array([row])] for row in together])
        assert np.array_equal(values[together], one_by_one)
    assert data.x[together].dtype == np.float32 and data.x[together].shape == (6, 8)
    assert data.domain[together].tolist() == [3, 0, 2, 2, 0, 0]  # blocks 3, 0, 2, 2, 0 and 0 of 4 domains
    assert not np.array_equal(data.x[together], synthetic(seed=1).x[together])
    assert len(np.unique(data.x[np.arange(200)], axis=0)) == 200
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.x[together], data.x[together])
    assert data.x[np.empty(0, np.int64)].shape == (0, 8)


def test_no_two_clients_share_a_row_that_was_made():
    population = natural(synthetic(), 50, ("domain 0", "domain 2"))
    everything = np.concatenate([np.concatenate([c.train, c.val, c.test]) for c in population])
    assert len(np.unique(everything)) == len(everything)


def test_clients_may_have_unequal_numbers_of_rows_and_never_none():
    sizes = [len(client.train) for client in natural(synthetic(), 300, rows_sigma=1.5)]
    assert min(sizes) >= 1 and max(sizes) == 12 and len(set(sizes)) > 6


def test_nobody_trains_on_anybody_elses_test_rows_under_bootstrap():
    data = rows()
    clients = list(make_clients(data, parse("partition", {"name": "bootstrap", "rows": 40}), 60, ("oil",), seed=1))
    train, val, test = (
        set(np.concatenate([getattr(c, split) for c in clients[:60]])) for split in ("train", "val", "test")
    )
    assert not train & val and not train & test and not val & test
    assert [len(split) for split in (train, val, test)] == [96, 32, 32]  # 60, 20 and 20% of two domains of 80 rows
    assert all(len(set(data.domain[c.train])) == 1 for c in clients[:60])
    assert set(data.domain[clients[60].test]) == {1}
    assert all((len(c.train), len(c.val), len(c.test)) == (24, 8, 8) for c in clients[:60])


def test_a_row_is_of_the_same_split_whether_or_not_bootstrap_keeps_domains_apart():
    data, drawn = rows(), []
    for by_domain in (True, False):
        partition = parse("partition", {"name": "bootstrap", "by_domain": by_domain})
        clients = make_clients(data, partition, 60, ("oil",), seed=1)
        drawn.append([set(np.concatenate([getattr(clients[k], s) for k in range(60)])) for s in ("train", "test")])
    assert drawn[0] == drawn[1]  # after 60 clients every row of a pool has been drawn
    assert all(len(set(data.domain[clients[k].train])) == 2 for k in range(60))


def test_bootstrap_leaves_a_sets_own_split_as_it_is():
    split = np.where(np.arange(240) % 2, VAL, -1).astype(np.int8)
    data = rows(split=split)
    client = make_clients(data, parse("partition", "bootstrap"), 5, (), seed=1)[2]
    assert VAL in split[client.val] and VAL not in split[client.train] and VAL not in split[client.test]


def test_a_small_alpha_skews_what_is_drawn():
    def most(alpha):
        fields = {"name": "bootstrap", "alpha": alpha, "by_domain": False}
        data = rows()
        clients = make_clients(data, parse("partition", fields), 100, (), seed=1)
        return np.mean([np.bincount(data.y[c.train], minlength=4).max() / len(c.train) for c in clients])

    assert most(0.05) > 0.8 > 0.4 > most(None)
    assert most(100.0) < 0.4


@pytest.mark.parametrize("share", [0.29, 0.6, 0.8])
def test_clients_that_are_drawn_have_the_share_of_train_rows_that_was_asked_for(share):
    made, there = synthetic(rows=100), rows()
    for data, name in ((made, "natural"), (there, "bootstrap")):
        client = make_clients(data, parse("partition", name), 3, (), 0, train_share=share)[1]
        assert len(client.train) == round(100 * share)
        assert len(client.val) == len(client.test) == (100 - round(100 * share)) // 2


def test_what_is_not_finite_or_not_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"partition\.alpha must be a finite number, got inf"):
        parse("partition", {"name": "bootstrap", "alpha": float("inf")})
    for name in ("noise", "shift"):
        with pytest.raises(InputError, match=rf"dataset\.{name} must be a finite number, got inf"):
            parse("dataset", {"name": "synthetic", name: float("inf")})
    with pytest.raises(InputError, match="data set synthetic is made on demand and takes no --data-dir"):
        parse("dataset", "synthetic").load(tmp_path)


def test_who_is_not_dealt_or_made_says_so():
    with pytest.raises(InputError, match="partition iid needs a finite data set; this one generates rows"):
        make_clients(synthetic(), parse("partition", "iid"), 5, (), 0)
    with pytest.raises(InputError, match="partition bootstrap needs a finite data set"):
        make_clients(synthetic(), parse("partition", "bootstrap"), 5, (), 0)
    with pytest.raises(InputError, match="partition natural needs a data set whose rows have owners"):
        make_clients(rows(), parse("partition", "natural"), 5, (), 0)
    with pytest.raises(InputError, match=r"a train share of 0\.01 of 20 rows leaves no client a train row"):
        make_clients(synthetic(), parse("partition", "natural"), 5, (), 0, train_share=0.01)
