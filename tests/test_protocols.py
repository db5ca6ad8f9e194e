"""Protocols as data: few shots, classes that no client trains on, and what is counted of them."""

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from test_federation import rows

from fedsim import Config, InputError, available, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import make_clients, new_of
from fedsim.config import read_yaml
from fedsim.counts import BINS, COLUMNS, GROUPS, Counts, merge, tally
from fedsim.datasets import TEST, UNASSIGNED
from fedsim.prepare import prepare
from fedsim.registry import parse
from fedsim.reporting.metrics import calibration_error, harmonic_mean, macro_f1

FIXED = sorted(set(available("partition")) - {"natural"})


def population(partition="iid", clients=6, held_out=(), data=None, **protocol):
    named = None if partition == "by_domain" else clients
    fields = {"name": partition} | ({"min_rows": 1} if "dirichlet" in partition else {})
    fields |= {"factor": 1, "min_rows": 5} if partition == "long_tail" else {}
    data = rows(classes=6) if data is None else data
    return make_clients(data, parse("partition", fields), named, held_out, 3, **protocol)


def splits(client):
    return client.train, client.val, client.test


# Shots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", FIXED)
def test_a_client_keeps_a_few_train_rows_of_each_class_and_all_others(partition):
    data = rows(classes=6)
    everything, few = (population(partition, shots=shots) for shots in (None, 2))
    for all_of, some in zip(everything, few, strict=True):
        there = np.bincount(data.y[all_of.train], minlength=6)
        assert np.bincount(data.y[some.train], minlength=6).tolist() == np.minimum(there, 2).tolist()
        assert set(some.train) <= set(all_of.train) and (np.diff(some.train) >= 0).all()
        assert np.array_equal(some.val, all_of.val) and np.array_equal(some.test, all_of.test)
    again = population(partition, shots=2)
    assert all(np.array_equal(again[k].train, few[k].train) for k in reversed(range(len(few))))


def test_which_shots_is_drawn_anew_for_each_client_and_more_than_there_are_is_all():
    everything, one, many = (population("by_domain", shots=shots) for shots in (None, 1, 1000))
    assert all(np.array_equal(a.train, b.train) for a, b in zip(everything, many, strict=True))
    places = [np.searchsorted(a.train, b.train).tolist() for a, b in zip(everything, one, strict=True)]
    assert len(set(map(tuple, places))) == 3


# Base to new ----------------------------------------------------------------------------------------------------


def test_new_classes_are_the_last_by_label_whatever_their_names():
    assert new_of(("zebra", "ant", "bee", "yak"), 0.5) == [2, 3]
    assert new_of(tuple("edcba"), 0.5) == [3, 4]  # of five the base has three, as the protocol has it
    assert new_of(tuple("abcde"), 0.0) == []
    assert len(new_of(range(100), 0.29)) == 29
    with pytest.raises(InputError, match=r"new_classes 0\.1 of 5 classes rounds down to none; give 0\.2 or more"):
        new_of(tuple("abcde"), 0.1)


@pytest.mark.parametrize("partition", sorted(set(FIXED) - {"classes"}))
def test_nobody_holds_rows_of_new_classes_but_one_more_client_who_holds_all_of_them(partition):
    data = rows(classes=6)
    some = population(partition, held_out=("oil",), new_classes=0.5)
    ids, away = range(some.trainers), some.trainers
    assert len(some) == away + 2 and [some.split_of(k) for k in (0, away, away + 1)] == ["test", "test", "new"]
    for k in (*ids, away):
        assert set(data.y[np.concatenate(splits(some[k]))]) <= {0, 1, 2}
    assert all(len(part) for k in ids for part in (some[k].train, some[k].test))
    new = some[away + 1]
    assert len(new.train) == len(new.val) == 0 and new.split == "new"
    assert np.array_equal(new.test, np.flatnonzero((data.y > 2) & (data.domain != 1)))
    assert np.array_equal(some[away].test, np.flatnonzero((data.y < 3) & (data.domain == 1)))
    with pytest.raises(IndexError):
        some[away + 2]


def test_without_new_classes_a_population_is_as_it_was():
    some = population(held_out=("oil",))
    assert some.new is None and len(some) == 7 and some[6].split == "test"
    assert some.trained_classes(rows(classes=6)).all()


def test_new_classes_are_judged_on_a_sets_own_test_rows_where_it_has_some():
    split = np.where(np.arange(240) % 5 == 0, TEST, UNASSIGNED).astype(np.int8)
    data = rows(classes=6, split=split)
    some = population(data=data, new_classes=0.5)
    assert np.array_equal(some[6].test, np.flatnonzero((data.y > 2) & (split == TEST)))
    data = rows(classes=6, split=np.where(data.y < 3, TEST, 0).astype(np.int8))
    with pytest.raises(InputError, match="no test rows of the new classes d, e, f to evaluate on"):
        population(data=data, new_classes=0.5)


def test_a_client_s_classes_are_those_of_its_rows_and_others_have_the_protocol_s():
    data = rows(classes=6)
    some = population("classes", clients=3, held_out=("ink",), new_classes=0.5)
    own = [np.flatnonzero(some.classes_of(some[k], data)).tolist() for k in range(5)]
    assert sorted(own[:3]) == [[0], [1], [2]]
    assert own[3] == [0, 1, 2] and own[4] == [3, 4, 5]
    assert some.trained_classes(data).tolist() == [True] * 3 + [False] * 3
    one = population("classes", clients=3, held_out=("ink",), new_classes=0.5, shots=1)
    assert [np.flatnonzero(one.classes_of(one[k], data)).tolist() for k in range(5)] == own


def test_data_made_on_demand_has_no_rows_to_choose_from():
    data = parse("dataset", {"name": "synthetic", "rows": 20}).load(None)
    for name, protocol in (("shots", {"shots": 1}), ("new_classes", {"new_classes": 0.5}), ("common", {"common": 0.5})):
        with pytest.raises(InputError, match=f"{name} needs a finite data set; this one generates rows"):
            make_clients(data, parse("partition", "natural"), 5, (), 0, **protocol)


# Counts ---------------------------------------------------------------------------------------------------------


def test_four_rows_are_counted_by_hand():
    data = rows(12, classes=4)  # row k is of class k % 4 and of domain k // 4: 0, 0, 0, 0, 1, ...
    judged = [
        (0, "val", np.array([0])),
        (0, "test", np.array([1, 2])),
        (1, "test", np.array([4])),
        (2, "new", np.array([3])),
    ]
    counts = tally(
        judged,
        predictions=np.array([0, 1, 1, 0, 2]),
        own_predictions=np.array([0, 1, 2, 3, 3]),
        confidence=np.array([0.9, 0.95, 0.5, 1.0, 0.25], np.float32),
        rows=data,
        held_out=[1],
    )
    assert COLUMNS == ("client", "domain", "split", "correct", "total", "correct_own")
    assert counts.scores.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0], [2, 0, 2, 0, 1, 1]]
    assert counts.scores.dtype == np.int32 and counts.labels.dtype == counts.bins.dtype == np.int64
    # Class by class: correct, predicted, support. The validation row is in none of them.
    assert GROUPS == ("own", "held_out", "new")
    assert counts.labels.tolist() == [
        [[0, 0, 0], [1, 2, 1], [0, 0, 1], [0, 0, 0]],
        [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]],
    ]
    where = [(0, 14), (0, 7), (1, 14), (2, 3)]  # 0.5 is in the bin from 7 / 15 on, and 1 in the last
    assert [counts.bins[place].tolist() for place in where] == [[1, 1], [0, 1], [1, 1], [0, 1]]
    assert [counts.confidence[place] for place in where] == [np.float32(0.95), 0.5, 1.0, 0.25]
    assert counts.bins.sum() == 6 and counts.confidence.sum() == pytest.approx(2.7)


def drawn(count=300, seed=0):
    """Random answers on rows of three domains, the last of them held out."""
    rng, data = np.random.default_rng(seed), rows(count)
    judged = [(0, "val", np.arange(20)), (1, "test", np.arange(20, count))]
    guesses, own = rng.integers(4, size=(2, count))
    return data, judged, guesses, own, rng.uniform(0.25, 1, count).astype(np.float32)


def test_chunks_add_up_to_the_whole_and_come_back_from_a_flat_vector():
    data, judged, *answers = drawn()
    whole = tally(judged, *answers, data, [2])
    parts = [(judged[:1], slice(None, 20)), (judged[1:], slice(20, None))]
    merged = merge(tally(some, *(answer[place] for answer in answers), data, [2]) for some, place in parts)
    for one in (merged, Counts.from_flat(whole.flat()), merge([whole])):
        for field in fields(Counts):
            ours, theirs = getattr(one, field.name), getattr(whole, field.name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    empty = tally([], *(answer[:0] for answer in answers), data)
    assert empty.scores.shape == (0, 6) and empty.labels.shape == whole.labels.shape
    again = Counts.from_flat(Counts().flat())
    assert again.labels.shape == (3, 0, 3) and again.scores.shape == (0, 6)


def macro_f1_of(y, guesses):
    f1 = []
    for label in set(y) | set(guesses):
        right = ((y == label) & (guesses == label)).sum()
        precision, recall = right / max(1, (guesses == label).sum()), right / max(1, (y == label).sum())
        f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return np.mean(f1)


def calibration_error_of(right, confidence):
    bins = np.minimum(confidence.astype(np.float64) * BINS // 1, BINS - 1)
    gaps = [(np.mean(bins == b), right[bins == b].mean() - confidence[bins == b].mean()) for b in set(bins)]
    return sum(share * abs(gap) for share, gap in gaps)


def test_f1_and_calibration_error_are_those_of_the_rows_themselves():
    from fedsim.reporting.report import Report

    data, judged, guesses, own, confidence = drawn()
    report = Report({}, list(data.domains), list(data.classes), ["photo"], {})
    report.add_scores(0, tally(judged, guesses, own, confidence, data, [2]))
    summary, test = report.summary(), np.arange(300) >= 20
    for f1, ece, mine in (
        ("macro_f1", "ece", test & (data.domain != 2)),
        ("generalization_f1", "generalization_ece", test & (data.domain == 2)),
    ):
        assert summary[f1] == pytest.approx(macro_f1_of(data.y[mine], guesses[mine]))
        assert summary[ece] == pytest.approx(
            calibration_error_of((guesses == data.y)[mine], confidence[mine]), rel=1e-5
        )
    mine = test & (data.domain != 2)
    assert summary["personalization"] == pytest.approx((guesses == data.y)[mine].mean())
    assert summary["personalization_own"] == pytest.approx((own == data.y)[mine].mean())
    assert summary["spread"] == 0.0  # of one client
    labels, bins = report.tables().trained.labels, report.tables().trained.calibration
    assert macro_f1(labels[labels.group == "own"]) == summary["macro_f1"]
    assert calibration_error(bins[bins.group == "own"]) == summary["ece"]
    assert np.isnan(macro_f1(labels[:0])) and np.isnan(calibration_error(bins[:0]))


def test_a_class_that_is_predicted_and_has_no_rows_has_an_f1_of_0():
    from fedsim.reporting.report import Report

    report = Report({}, ["ink", "oil", "photo"], list("abcd"), [], {})
    guesses = np.array([0, 1])  # of rows of classes 0 and 0
    report.add_scores(0, tally([(0, "test", np.array([0, 4]))], guesses, guesses, np.ones(2, np.float32), rows(12)))
    assert report.summary()["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert report.summary()["ece"] == 0.5  # sure of both, right in one


def test_harmonic_means_are_of_two_and_of_three():
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic_mean(0.8075, 0.7368, 0.7602) == pytest.approx(0.7671, abs=1e-4)
    assert (
        harmonic_mean(0.0, 1.0) == 0.0 and np.isnan(harmonic_mean(np.nan, 0.5)) and np.isnan(harmonic_mean(np.nan, 0.0))
    )


def test_local_is_a_mean_over_clients_and_base_one_over_rows():
    from fedsim.reporting.report import Report

    report = Report({"new_classes": 0.5}, ["ink"], list("abcd"), [], {})
    # client, domain, split, correct, total, correct_own: client 0 is right on 1 of 2 rows, client 1 on 2 of 6.
    scores = [[0, 0, 1, 1, 2, 2], [1, 0, 1, 2, 6, 3], [2, 0, 2, 3, 4, 3]]
    report.add_scores(0, Counts(np.array(scores, np.int32)))
    summary = report.summary()
    assert (summary["local"], summary["base"], summary["new"]) == (0.75, 0.375, 0.75)
    assert summary["harmonic_2"] == pytest.approx(0.5) and summary["harmonic_3"] == pytest.approx(0.5625)
    assert summary["personalization"] == pytest.approx(5 / 12) and summary["spread"] == pytest.approx(1 / 12)
    assert report.tables().new_classes == ["c", "d"]
    report.add_scores(1, Counts(np.array(scores[:2], np.int32)))
    assert "harmonic_2" not in report.summary(round=1)


# Runs -----------------------------------------------------------------------------------------------------------


def test_a_base_to_new_run_tells_new_rows_apart_and_all_of_it_is_restored(config):
    ours = config(new_classes=0.5, shots=4, method={"name": "probe", "lr": 0.01})
    report = run(ours)
    table, summary = report.tables().trained.scores, report.summary()
    assert sorted(table.client.unique()) == [0, 1, 2, 3]  # two domains, the held-out one, the new classes
    assert table[(table.client == 3) & (table["round"] == 0)].total.tolist() == [60, 60]  # 2 domains, 2 classes of 30
    assert set(table[table.client == 3].split) == {"new"} and table[table.split == "new"].client.unique() == [3]
    assert summary["new"] > 0.5 and 0 < summary["harmonic_2"] <= max(summary["base"], summary["new"])
    held = report.tables().partition
    assert set(held[held.split != "new"].label) == {"cat", "dog"} and set(held[held.split == "new"].label) == {
        "owl",
        "pig",
    }
    assert (held[held.split == "train"].rows == 4).all()
    labels = report.tables().trained.labels
    for group, names in (("own", {"cat", "dog"}), ("held_out", {"cat", "dog"}), ("new", {"owl", "pig"})):
        assert set(labels[labels.group == group].label) == names  # no other class has rows or predictions
    assert labels[(labels.group == "new") & (labels["round"] == 0)].support.sum() == 120
    restored = load_checkpoint(ours.folder(), ours.experiment())[1]
    assert restored.counts.keys() == report.counts.keys()
    for one, other in (
        (restored.zero_shot, report.zero_shot),
        *zip(restored.counts.values(), report.counts.values(), strict=True),
    ):
        assert np.array_equal(one.flat(), other.flat())
    assert restored.summary() == summary
    for name in ("scores", "labels", "calibration"):
        table = pd.read_parquet(ours.folder() / f"{name}.parquet")
        assert table.groupby("model")["round"].unique().map(list).to_dict() == {
            "trained": [0, 1, 2, 3],
            "zero_shot": [0],
        }


def test_rounds_count_local_steps(config):
    # Each of two clients has 72 train rows: 3 steps of at most 32 rows.
    assert run(config(rounds=2)).tables().rounds.steps.tolist() == [6, 6]


def test_a_client_of_few_classes_does_better_among_its_own(config):
    summary = run(config(partition="classes", clients=4, rounds=1)).summary()
    assert (
        summary["personalization_own"] == 1.0 > summary["personalization"]
    )  # with one class there is nothing to confuse


# Embedded configs -----------------------------------------------------------------------------------------------


def clients_of(name):
    """The clients of an embedded config on the embedded images, and the data."""
    config = Config(**read_yaml(name))
    data = config.dataset.load(None)
    options = {"shots": config.shots, "new_classes": config.new_classes}
    return make_clients(data, config.partition, config.clients, config.held_out, 0, config.train_share, **options), data


@pytest.mark.parametrize(("name", "targets"), [("multi_source", 1), ("single_source", 4)])
def test_clients_of_source_domains_have_blocks_of_classes_and_targets_are_tested_whole(name, targets):
    clients, data = clients_of(name)
    assert clients.trainers == (5 - targets) * 3 and len(clients.held_out) == targets
    held_out = {int(data.domain[rows[0]]) for rows in clients.held_out}
    for k in range(clients.trainers):
        own = clients[k]
        (domain,) = np.unique(data.domain[own.train])
        assert domain not in held_out
        assert np.unique(data.y[own.train]).tolist() == list(range(k % 3 * 5, k % 3 * 5 + 5))
        assert np.bincount(data.y[own.train]).max() <= 8
    for target in clients.held_out:
        assert np.array_equal(target, np.flatnonzero(data.domain == data.domain[target[0]]))


def test_pachinko_skews_domains_and_all_clients_have_the_same_number_of_rows():
    clients, data = clients_of("pachinko")
    sizes = [sum(map(len, splits(client))) for client in clients]
    assert len(sizes) == 20 and max(sizes) - min(sizes) <= 3  # of 103 rows, cut into three with a remainder
    largest = [np.bincount(data.domain[client.train]).max() / len(client.train) for client in clients]
    assert np.mean(largest) > 0.6  # of five domains


@pytest.mark.parametrize("name", ["pathological", "few_shot", "pachinko"])
def test_a_partition_is_the_same_for_every_seed_of_training(name):
    config = Config(**read_yaml(name) | {"rounds": 0})
    first, second = (prepare(config.model_copy(update={"seed": seed})).clients for seed in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(splits(one), splits(other), strict=True))
