"""Scrambled labels: rows of clients that show the images of other rows, as in published label-shift tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_federation import rows

from fedsim import run
from fedsim.clients import make_clients
from fedsim.datasets import TEST, TRAIN
from fedsim.registry import parse
from fedsim.reporting.compare import compare
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.remarks import SCRAMBLED, remarks, remarks_of_page

SKEW = {"name": "domain_dirichlet", "alpha": 0.3, "min_rows": 2}


def population(data, scramble, held_out=(), seed=3, **protocol):
    partition = parse("partition", SKEW | {"scramble_labels": scramble})
    return make_clients(data, partition, 12, held_out, seed, **protocol)


def by_list(clients, data):
    """The rows of each client in each list: the train, validation and test rows of a domain."""
    lists = {}
    for client in list(clients)[: clients.trainers]:
        for split, own in enumerate((client.train, client.val, client.test)):
            lists.setdefault((data.domain[client.train[0]], split), []).append(own)
    return lists


def test_a_client_with_n_rows_has_the_first_n_images_of_its_domains_list_and_its_own_labels():
    data = rows(count=900, classes=5)
    right, wrong = population(data, scramble=False), population(data, scramble=True)
    assert right.images is None
    for own, other in zip(right, wrong, strict=True):
        assert all(np.array_equal(getattr(own, part), getattr(other, part)) for part in ("train", "val", "test"))
    for clients in by_list(wrong, data).values():
        everything, most = np.concatenate(clients), max(map(len, clients))
        times = np.bincount(wrong.images[everything], minlength=len(data))
        # The i-th image of the list goes to every client with more than i rows, and to each of them once.
        expected = [sum(len(own) > i for own in clients) for i in range(most)]
        assert sorted(times[times > 0], reverse=True) == sorted(expected, reverse=True)
        assert set(wrong.images[everything]) <= set(everything)
        assert all(len(set(wrong.images[own])) == len(own) for own in clients)


def test_images_and_labels_are_independent():
    data = rows(count=12_000, classes=5)
    some = population(data, scramble=True)
    owned = np.concatenate([np.concatenate([client.train, client.val, client.test]) for client in some])
    # Every class has a fifth of the images, so a row shows its own class as often, whatever a client's classes are.
    assert (data.y[some.images[owned]] == data.y[owned]).mean() == pytest.approx(0.2, abs=0.02)


def test_splits_of_the_data_set_stay_apart_and_held_out_rows_and_new_classes_have_their_own_images():
    split = np.where(np.arange(900) % 7 < 2, TEST, TRAIN).astype(np.int8)
    data = rows(count=900, classes=6, split=split)
    some = population(data, scramble=True, held_out=("oil",), new_classes=0.3)
    assert (data.split[some.images] == split).all() and (data.domain[some.images] == data.domain).all()
    others = np.concatenate([some[k].test for k in range(some.trainers, len(some))])
    assert len(others) and np.array_equal(some.images[others], others)
    again, other = (population(data, True, ("oil",), seed, new_classes=0.3).images for seed in (3, 4))
    assert np.array_equal(again, some.images) and not np.array_equal(other, some.images)


@pytest.fixture
def skewed(config, tmp_path):
    """Makes a Config of scrambled clients, or of right ones."""

    def make(scramble=True, **fields):
        partition = SKEW | {"scramble_labels": scramble}
        return config(**({"partition": partition, "clients": 4, "method": "probe"} | fields))

    return make


def test_a_run_is_that_of_data_whose_features_were_exchanged(skewed, features_dir, tmp_path):
    ours = skewed(engine="reference")
    data = ours.dataset.load(features_dir)
    images = make_clients(data, ours.partition, 4, ours.held_out, ours.partition_seed, ours.train_share).images
    table = pd.read_parquet(features_dir / "features.parquet")
    table["feature"] = [table.feature[row] for row in images]
    (exchanged := tmp_path / "exchanged").mkdir()
    table.to_parquet(exchanged / "features.parquet")
    pd.read_parquet(features_dir / "classes.parquet").to_parquet(exchanged / "classes.parquet")
    theirs = skewed(scramble=False, engine="reference", data_dir=exchanged, out=tmp_path / "other")
    first, second = run(ours), run(theirs)
    assert all(torch.equal(first.adapter[name], second.adapter[name]) for name in first.adapter)
    pd.testing.assert_frame_equal(first.tables().scores, second.tables().scores)
    assert first.summary("zero_shot")["personalization"] < 0.45 < first.summary("zero_shot")["generalization"]


def test_every_report_says_that_labels_are_scrambled(skewed, tmp_path):
    run(skewed(rounds=0))
    run(skewed(scramble=False, rounds=0, out=tmp_path / "right"))
    tables = read_tables(tmp_path / "run")
    assert SCRAMBLED in remarks(tables) and SCRAMBLED in remarks_of_page(tables)
    assert SCRAMBLED not in remarks(read_tables(tmp_path / "right"))
    warnings = []
    compare([tmp_path / "run", tmp_path / "right"], tmp_path / "both.html", warnings.append)
    assert any(warning.startswith("Scrambled labels: run. The rows of clients have") for warning in warnings)
    assert "Scrambled labels: run." in (tmp_path / "both.html").read_text()
